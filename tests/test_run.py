"""A whole experiment on made-up data: every kind of fact, nothing twice, nothing lost."""

import base64
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from anytime import cpu, find, workshop
from anytime.arms import Decider
from anytime.backend import Backend
from anytime.backends.float import Float16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.boards.host import Host
from anytime.boards.ssh import Ssh
from anytime.cells import only
from anytime.config import ARMS, Experiment, Suite
from anytime.datasets.npz import Npz
from anytime.datasets.synthetic import Synthetic
from anytime.errors import AnytimeError, DataError, Infeasible, Unreachable, Unsupported, UsageError
from anytime.facts import facts_of
from anytime.gather import gather
from anytime.listing import listing
from anytime.metrics import Predictions, nll
from anytime.models.attached import Attached
from anytime.models.static import Static
from anytime.page.pictures import keep
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.patience import Patience
from anytime.record import load
from anytime.rows import Fold, absent
from anytime.run import Runner
from anytime.spec import key
from anytime.train import Recipe
from anytime.workshop import Workshop
from tests.worlds import Tiny

ROOT = Path(__file__).parent.parent


def experiment(**fields):
    given = dict(
        name="small",
        question="Does it all hang together?",
        suites=(Suite(Synthetic(n=800, size=16, channels=3, n_classes=4, noise=0.25), (Static(Tiny()), Tiny())),),
        recipe=Recipe(epochs=2, batch=64, lr=1e-2),
        backends=(Float32(), OnnxRuntime(of=PTQ()), OnnxRuntime(of=QAT(epochs=1)), QAT(epochs=1), QAT(4, 4, epochs=1), Float16()),
        policies=(Entropy(),),
        budgets=(0.01, 0.7, 1.0),
        boards=(Host(launches=1, warmup=1),),
        time_samples=4,
        replay_samples=12,
    )
    return Experiment(**{**given, **fields})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The experiment, run once; its results folder and the trainings that it made."""
    results = tmp_path_factory.mktemp("results")
    steps = []
    Runner(experiment(), results, progress=lambda what, *_: steps.append(what), log=lambda line: None).run()
    return results, steps


def records(results, kind=None):
    loaded = load(results / "records", "small")
    assert not loaded.troubles
    return [r for r, _ in loaded.records if kind in (None, r.kind)]


def test_every_fact_is_there_once(done):
    results, _ = done
    wanted = {f.name: f for f in facts_of(experiment())}
    got = records(results)
    names = [r.fact for r in got]
    assert len(names) == len(set(names)) and set(names) <= set(wanted)
    # What needs a skipped fact shares its fate and needs no record of its own.
    skipped = {r.fact for r in got if r.kind == "skip"}
    assert all(set(wanted[n].needs) & skipped for n in set(wanted) - set(names))
    assert {r.kind for r in got} == {"eval", "measure", "decide", "replay", "skip"}


def test_again_does_nothing(done):
    results, _ = done
    before = sorted(p.name for p in (results / "records" / "small").iterdir())
    runner = Runner(experiment(), results, log=lambda line: None)
    assert runner.todo() == []
    runner.run()
    assert sorted(p.name for p in (results / "records" / "small").iterdir()) == before


def test_only_some_networks_are_run_and_what_they_are_compared_with(tmp_path):
    exp = experiment(backends=(Float32(), PTQ(), PTQ(4, 8)), boards=(), budgets=(0.7,))
    meant = only(exp, ["Tiny", "INT8 PTQ"])
    networks = {(c.model.label, c.backend.label) for c in meant}
    assert networks == {(name, backend) for name in ("Tiny", "Tiny static") for backend in ("Float32", "PTQ")}
    assert only(exp, ["Tiny", "static", "INT8", "PTQ"]) == {c for c in meant if c.model.label == "Tiny static"}
    runner = Runner(exp, tmp_path, log=lambda line: None, only=meant)
    runner.run()
    assert runner.todo() == [] and {r.cell for r in records(tmp_path)} == {key(c) for c in meant}
    ran = records(tmp_path, "eval")
    assert ["max_error_share" in r.exits[0] for r in ran if r.facts["backend"] == "PTQ"] == [True, True] and len(ran) == 4
    # What is made again is what is meant; the rest of the experiment stays.
    Runner(exp, tmp_path, log=lambda line: None).run()
    again = Runner(exp, tmp_path, log=lambda line: None, only=meant)
    again.forget()
    assert {f.cell for f in again.todo()} == meant and len(again.known) > 0
    with pytest.raises(UsageError, match="small has no network that is 'Tinny'; did you mean 'Tiny'"):
        only(exp, ["Tinny"])


def test_one_qat_under_two_engines_trains_once(done):
    results, _ = done
    trainings = sorted(p.name for p in (results / "cache" / "trained").iterdir())
    # per network: itself, QAT at 8 bits (engine and fake-quant share it), QAT at 4 bits
    assert len(trainings) == 2 * 3


def test_the_engine_says_what_its_twin_says(done):
    results, _ = done
    for r in records(results, "eval"):
        if r.facts["execution"] == "ONNX Runtime":
            assert all(e["agreement"] > 0.95 and e["int8_macs_share"] == 1.0 for e in r.exits)


def test_costs_are_counted_and_priced(done):
    results, _ = done
    by = {(r.facts["model"], r.facts["backend"]): r for r in records(results, "eval")}
    fp32, int8, int4 = (
        by["Tiny", b].exits for b in ("Float32", "OnnxRuntime(of=PTQ)", "QAT(weight_bits=4, activation_bits=4, epochs=1)")
    )
    for a, b, c in zip(fp32, int8, int4, strict=True):
        assert a["macs"] == b["macs"] == c["macs"] > 0
        assert a["bops"] == 1024 * a["macs"] and b["bops"] == 64 * b["macs"] and 16 * c["macs"] < c["bops"] <= 64 * c["macs"]
    assert int4[-1]["bops"] < int8[-1]["bops"]
    assert by["Tiny static", "Float32"].exits[0]["macs"] < fp32[-1]["macs"]
    assert by["Tiny", "Float32"].facts["ptflops_macs"]["aten"] == pytest.approx(fp32[-1]["macs"], rel=0.02)


def test_decisions_keep_to_their_budget_on_val_and_infeasible_ones_say_so(done):
    results, _ = done
    for r in records(results, "decide"):
        p = r.points[0]
        assert p["spent_val"] <= p["budget"] + 1e-9 or p["arm"] == "kept"
        assert sum(p["share"]) == pytest.approx(1) and p["n"] == 200
    skipped = [r for r in records(results, "skip") if r.of == "decide"]
    assert len(skipped) == 11 and all(
        "least possible" in r.reason for r in skipped
    )  # 6 backends x 2 arms, less the reference's kept


def test_what_is_simulated_is_scored_and_never_timed(done):
    results, _ = done
    simulated = {r.cell for r in records(results, "eval") if r.facts["simulated"]}
    assert len(simulated) == (4 if cpu.has_any(cpu.FP16_KERNELS) else 6)  # a CPU with FP16 arithmetic computes in it
    assert not simulated & {r.cell for r in records(results, "measure") + records(results, "replay")}
    assert all("no latency" in r.reason for r in records(results, "skip") if r.of == "measure")


def test_executed_decisions_are_the_offline_ones(done):
    results, _ = done
    for r in records(results, "replay"):
        assert r.points[0]["same_exits"] >= 0.9 and r.points[0]["same_answers"] >= 0.9
        assert r.points[0]["latency_ms_p50"] > 0 and r.points[0]["latency_ms_p90"] is None  # 12 samples are too few for it


def test_a_record_says_where_it_comes_from(done):
    results, _ = done
    for r in records(results):
        assert {"versions", "git", "device", "model", "dataset", "backend", "column", "position"} <= r.facts.keys()
        assert r.spec["is"] == "Cell" and r.spec["recipe"]["epochs"] == 2


def test_compact_predictions_lie_beside_the_record(done):
    results, _ = done
    for r, path in load(results / "records", "small").records:
        if r.kind == "eval":
            held = np.load(path.with_suffix(".npz"))
            right = (held["argmax"] == held["labels"]).sum(1)
            assert right.tolist() == [e["n_right"] for e in r.exits]


def test_a_policy_added_later_trains_nothing(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "r")
    steps = []
    exp = experiment(policies=(Entropy(), Entropy(per_exit=True)), budgets=(0.7, 0.9))
    Runner(exp, tmp_path / "r", progress=lambda what, *_: steps.append(what), log=lambda line: None).run()
    assert not [s for s in steps if s.startswith(("train", "predict"))]
    assert len(records(tmp_path / "r", "decide")) > len(records(done[0], "decide"))


@dataclass(frozen=True)
class Breaks(Backend):
    """Source: a saboteur."""

    how: str = "fail"

    def why_not(self):
        return "the vendor is not installed" if self.how == "absent" else None

    def compress(self, model, calib, trainer, target="u8s8"):
        raise Unsupported("layer stages.0 is odd") if self.how == "unsupported" else RuntimeError("kernel exploded")


def test_a_backend_that_breaks_is_a_row_and_the_rest_goes_on(tmp_path):
    exp = experiment(backends=(Float32(), Breaks(), Breaks("unsupported"), Breaks("absent")), policies=(), boards=())
    said = []
    Runner(exp, tmp_path, log=said.append).run()
    kinds = sorted((r.kind, r.reason) for r in records(tmp_path))
    assert [k for k, _ in kinds] == ["eval"] * 2 + ["fail"] * 2 + ["skip"] * 4
    assert {reason for _, reason in kinds} == {
        "",
        "RuntimeError: kernel exploded",
        "layer stages.0 is odd",
        "the vendor is not installed",
    }
    again = Runner(exp, tmp_path, log=said.append)
    assert {f.cell.backend for f in again.todo()} == {Breaks()}  # a failure is tried again, a skip is not


@dataclass(frozen=True)
class Explosive(Host):
    """A board on which INT8 networks crash. Source: a saboteur."""

    launches: int = 1
    warmup: int = 1

    def time(self, nets, x):
        if any(net.bits for net in nets):
            raise AnytimeError("the child died of SIGSEGV.")
        return super().time(nets, x)


def test_a_network_that_crashes_the_board_fails_alone(tmp_path):
    exp = experiment(backends=(Float32(), OnnxRuntime(of=PTQ())), policies=(), boards=(Explosive(),))
    Runner(exp, tmp_path, log=lambda line: None).run()
    assert len(records(tmp_path, "measure")) == 2
    assert [(r.of, r.reason, r.facts["column"]) for r in records(tmp_path, "fail")] == [
        ("measure", "the child died of SIGSEGV.", "INT8 PTQ")
    ] * 2


def test_what_a_board_lacked_is_measured_once_it_is_there(tmp_path, monkeypatch):
    exp = experiment(backends=(Float32(), OnnxRuntime(of=PTQ()), PTQ()), policies=(), boards=(Host(launches=1, warmup=1),))
    with monkeypatch.context() as here:
        here.setattr(Host, "lacks", lambda self, form, needs: "no onnx here" if form == "onnx" else None)
        Runner(exp, tmp_path, log=lambda line: None).run()
        assert not Runner(exp, tmp_path, log=lambda line: None).todo()
    again = Runner(exp, tmp_path, log=lambda line: None)
    assert {(f.of, f.cell.backend.label) for f in again.todo()} == {("measure", "OnnxRuntime(of=PTQ)")}
    again.run()
    # Simulated arithmetic has no latency anywhere.
    assert {r.facts["backend"] for r in records(tmp_path, "measure")} == {"Float32", "OnnxRuntime(of=PTQ)"}
    assert not Runner(exp, tmp_path, log=lambda line: None).todo()


def test_a_missing_measurement_makes_no_network_that_cannot_be_timed(tmp_path, monkeypatch):
    exp = experiment(backends=(Float32(), PTQ()), policies=(), boards=(Host(launches=1, warmup=1),))
    Runner(exp, tmp_path, log=lambda line: None).run()
    for path in (tmp_path / "records").rglob("*-measure-*.json"):
        path.unlink()
    made = []
    monkeypatch.setattr(PTQ, "compress", lambda *args, **kwargs: made.append(args))
    Runner(exp, tmp_path, log=lambda line: None).run()
    assert {r.facts["backend"] for r in records(tmp_path, "measure")} == {"Float32"} and not made


def test_a_board_that_refuses_hides_nothing_that_it_has_measured(tmp_path, monkeypatch):
    def run(*backends):
        exp = experiment(backends=backends, policies=(), boards=(Host(launches=1, warmup=1),))
        Runner(exp, tmp_path, log=said.append).run()
        return Runner(exp, tmp_path)

    def refuses(*_):
        raise OSError("too hot")

    said = []
    run(Float32())
    monkeypatch.setattr(Host, "time", refuses)
    again = run(Float32(), OnnxRuntime(of=Float32()))
    kinds = {(r.facts["backend"], r.kind) for r, _ in again.known.values() if r.of == "measure"}
    assert kinds == {("Float32", "measure"), ("OnnxRuntime(of=Float32)", "fail")}
    assert any(line.endswith("measure: OSError: too hot What was found before stays.") for line in said)


@dataclass(frozen=True)
class Gone(Host):
    """A board that cannot be reached. Source: a saboteur."""

    def time(self, nets, x):
        raise Unreachable("board: the connection is lost.")


def test_a_board_that_is_lost_leaves_its_facts_to_do(tmp_path):
    said = []
    exp = experiment(backends=(Float32(),), policies=(), boards=(Gone(),))
    runner = Runner(exp, tmp_path, log=said.append)
    runner.run()
    assert not records(tmp_path, "fail") and not records(tmp_path, "measure")
    assert {f.of for f in Runner(exp, tmp_path).todo()} == {"measure"}
    assert "board: the connection is lost. It stays to do." in said


def test_a_board_without_an_address_is_skipped_uncompressed_and_measured_once_it_has_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    exp = experiment(backends=(OnnxRuntime(of=Float32()),), policies=(), boards=())
    Runner(exp, tmp_path, log=lambda line: None).run()
    exp = replace(exp, boards=(Ssh("nano.invalid", board="AGX Xavier"),))
    runner = Runner(exp, tmp_path, log=lambda line: None)
    monkeypatch.setattr(runner.shop, "net", lambda cell: pytest.fail("a network was compressed for a board that is not there"))
    runner.run()
    skips = records(tmp_path, "skip")
    assert {(r.of, r.board) for r in skips} == {("measure", "nano.invalid")}
    assert skips[0].reason.startswith("no address of nano.invalid is known here (")
    assert "Host nano.invalid in ~/.ssh/config" in skips[0].reason

    assert not Runner(exp, tmp_path).todo()
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host nano.invalid\n HostName 127.0.0.1\n")
    assert {f.of for f in Runner(exp, tmp_path).todo()} == {"measure"}


def test_budgets_in_milliseconds_need_a_board():
    with pytest.raises(UsageError, match="need a board"):
        experiment(currency="ms", boards=())


def test_budgets_in_milliseconds_are_fitted_on_measured_time(tmp_path):
    exp = experiment(currency="ms", budgets=(100.0,), backends=(Float32(),))
    Runner(exp, tmp_path, log=lambda line: None).run()
    (decide,) = records(tmp_path, "decide")
    assert decide.board == "host" and 0 < decide.points[0]["spent"] < 100


def test_times_that_left_the_cache_are_taken_again_where_budgets_are_fitted_on_them(tmp_path):
    exp = experiment(currency="ms", budgets=(100.0,), backends=(Float32(),))
    Runner(exp, tmp_path, log=lambda line: None).run()
    shutil.rmtree(tmp_path / "cache" / "timings")
    again = Runner(replace(exp, policies=(Entropy(), MaxProb())), tmp_path, log=lambda line: None)
    assert {f.of for f in again.todo()} >= {"measure", "decide"}
    again.run()
    assert len(records(tmp_path, "decide")) >= 2 and not records(tmp_path, "skip")


def test_two_processes_side_by_side_make_the_same_table(tmp_path, done):
    exp = experiment(boards=())
    Runner(exp, tmp_path, log=lambda line: None).run(jobs=2)
    assert scores(tmp_path).keys() == {k for k in scores(done[0])}


def scores(results):
    """Everything that is not a time, by fact."""
    return {
        r.fact: json.dumps([r.exits, r.points, r.layers], sort_keys=True)
        for r in records(results)
        if r.kind in ("eval", "decide")
    }


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
from anytime.run import Runner
from anytime.spec import key
from tests.test_run import experiment
Runner(experiment(), Path(sys.argv[1]), log=lambda line: None).run()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path):
    """kill -9 four times, each some moments after it has got further (`benchmarks/kill.py` does it 20 times), restarted each time."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=str(ROOT)), str(folder)], env=env)

    whole = start(tmp_path / "whole")
    rng, left = np.random.default_rng(0), []
    for _ in range(4):
        before, victim = _written(tmp_path / "cut"), start(tmp_path / "cut")
        while victim.poll() is None and _written(tmp_path / "cut") <= before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 2))
        victim.kill()
        victim.wait()
        left.append(len(records(tmp_path / "cut")))
    assert start(tmp_path / "cut").wait() == 0 and whole.wait() == 0
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")
    facts = [r.fact for r in records(tmp_path / "cut")]
    assert sorted(facts) == sorted({r.fact for r in records(tmp_path / "whole")})
    assert left[0] < len(facts), "the first one, at least, was killed before its end"


def _written(folder):
    return sum(1 for path in folder.rglob("*") if path.suffix in (".json", ".pt", ".npz", ".safetensors"))


def test_forced_it_runs_again(tmp_path):
    exp = experiment(backends=(Float32(),), policies=(), boards=())
    Runner(exp, tmp_path, log=lambda line: None).run()
    runner = Runner(exp, tmp_path, log=lambda line: None)
    runner.forget()
    assert len(runner.todo()) == 2
    runner.run()
    runner.remade()
    assert len(records(tmp_path, "eval")) == 4 and not runner.forced.path.exists()


@dataclass(frozen=True)
class Moody(Backend):
    """Breaks, is missing, or works, by a file's word."""

    at: str = ""

    def compress(self, model, calib, trainer, target="u8s8"):
        said = Path(self.at).read_text() if Path(self.at).exists() else ""
        if said == "missing":
            raise Unsupported("it is not here")
        if said:
            raise KeyError(said)  # no error of ours: a bug in a backend
        return Float32().compress(model, calib, trainer, target)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_fails_when_it_is_made_again_is_failed_and_its_old_number_is_in_no_table(tmp_path, jobs):
    at = tmp_path / "said"
    exp = experiment(backends=(Float32(), Moody(str(at))), boards=(), budgets=(0.7,))
    run = partial(Runner, exp, tmp_path / "results", log=lambda line: None)
    run().run()
    assert not run().todo()
    at.write_text("oops")
    again = run()
    again.forget()
    again.run(jobs)
    again.remade()
    failed = [reason for fact_state, reason in again.states() if fact_state == "fail"]
    assert failed and set(failed) == {"KeyError: 'oops'"} and len(run().todo()) == len(failed), "they are to do again"
    said = table(tmp_path / "results", exp)
    assert all(row["status"] == "fail" for row in said if row["backend"] == "Moody" and row["status"] != "skip")
    assert {row["status"] for row in said if row["backend"] == "Float32"} == {"done"}
    # What another machine could do stays, when this one cannot.
    at.unlink()
    run().run()
    at.write_text("missing")
    again = run()
    again.forget()
    again.run(jobs)
    again.remade()
    assert not run().todo() and {row["status"] for row in table(tmp_path / "results", exp)} == {"done"}


def table(results, exp):
    networks = gather(load(results / "records", exp.name).records, [])
    return [row for network in networks for row in Fold(networks, []).rows_of(network)]


def test_what_was_to_be_made_again_is_not_forgotten_by_a_run_of_something_else(tmp_path):
    exp = experiment(backends=(Float32(), PTQ()), policies=(), boards=())
    first, other = (frozenset(c for c in exp.cells() if c.backend == b) for b in exp.backends)
    run = partial(Runner, exp, tmp_path, log=lambda line: None)
    run().run()
    for only_these in (first, other):  # both are asked for before either is run
        run(only=only_these).forget()
    assert len(run().todo()) == 4
    ran = run(only=other)
    ran.run()
    ran.remade()
    assert {f.cell for f in run().todo()} == first


def test_a_data_set_that_cannot_be_read_loses_nothing_when_all_is_made_again(tmp_path):
    x, y = np.zeros((400, 3, 16, 16), np.uint8), np.arange(400) % 4
    x += (60 * y)[:, None, None, None].astype(np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:120], y_test=y[:120])
    data = Npz(str(tmp_path / "d.npz"), calib=32, tune=32, val=64, hold=32)
    exp = experiment(backends=(Float32(),), policies=(), boards=())
    exp = replace(exp, suites=(*exp.suites, Suite(data, (Tiny(),))))
    said: list[str] = []
    run = partial(Runner, exp, tmp_path / "results", log=said.append)
    run().run()
    trained = {p.name for p in (tmp_path / "results/cache/trained").iterdir()}
    (tmp_path / "d.npz").unlink()
    workshop._loaded.cache_clear()
    again = run()
    again.forget()
    assert [line for line in said if line.startswith("d is left out: ")] and len(again.todo()) == 2
    assert len({p.name for p in (tmp_path / "results/cache/trained").iterdir()}) == len(trained) - 2, "the other's stays"
    with pytest.raises(DataError):
        again.run()
    assert len(records(tmp_path / "results", "eval")) == 5


def test_forced_and_interrupted_it_goes_on_with_or_without_force(tmp_path):
    exp = experiment(backends=(Float32(),), policies=(), boards=())
    Runner(exp, tmp_path, log=lambda line: None).run()

    def stop(what, done, total, left_s=None):
        if what.startswith("train Tiny on") and done > 4:
            raise KeyboardInterrupt

    for _ in range(2):  # the second time nothing is forgotten that the first one has made
        runner = Runner(exp, tmp_path, progress=stop, log=lambda line: None)
        runner.forget()
        with pytest.raises(KeyboardInterrupt):
            runner.run()
        assert len(records(tmp_path, "eval")) == 3 and len(runner.todo()) == 1
    last = Runner(exp, tmp_path, log=lambda line: None)
    assert len(last.todo()) == 1
    last.run()
    last.remade()
    assert len(records(tmp_path, "eval")) == 4 and not list((tmp_path / "cache" / "forced").iterdir())
    after = Runner(exp, tmp_path, log=lambda line: None)
    assert not after.todo()
    after.forget()
    assert len(after.todo()) == 2


def test_samples_that_changed_under_their_name_are_asked_again_and_never_paired_with_the_old_ones(tmp_path):
    rng, said = np.random.default_rng(0), []

    def write():
        y = np.arange(400) % 4
        x = rng.integers(0, 60, (400, 3, 16, 16)) + 45 * y[:, None, None, None]
        rng.shuffle(y)  # of other labels than before
        np.savez(tmp_path / "d.npz", x_train=x.astype(np.uint8), y_train=y, x_test=x[:120].astype(np.uint8), y_test=y[:120])

    exp = experiment(
        suites=(Suite(Npz(str(tmp_path / "d.npz"), calib=32, tune=32, val=64, hold=32), (Static(Tiny()), Tiny())),),
        backends=(Float32(),), policies=(), boards=(),
    )  # fmt: skip
    run = partial(Runner, exp, tmp_path / "results", log=said.append)
    write()
    run().run()
    assert not run().todo()
    write()
    workshop._loaded.cache_clear()
    assert len(run().todo()) == 2 and said == ["the samples of d have changed: what was found on the old ones is made again"]
    mixed = run()
    mixed.predict_and_decide(mixed.todo()[:1])
    loaded = load(tmp_path / "results" / "records", "small")
    networks = gather(loaded.records, troubles := [])
    rows = [row for network in networks for row in Fold(networks, troubles).rows_of(network)]
    assert any("were asked of different test labels" in trouble for trouble in troubles)
    assert all(absent(row.get("static_loss")) for row in rows if row["model"] == "Tiny")
    run().run()
    assert not run().todo() and len(records(tmp_path / "results", "eval")) == 4


class Backbone(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(196, num_classes))


def test_a_factory_s_code_that_changed_is_asked_again(tmp_path, monkeypatch):
    code = tmp_path / "my_own_net.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    cell = next(iter(experiment(suites=(Suite(experiment().suites[0].data, (Attached("my_own_net:make", ("0",)),)),)).cells()))
    shop = Workshop(tmp_path / "results")
    assert not shop.content(cell), "there is no such file yet"
    found = []
    for body in ("def make(num_classes): ...", "def make(num_classes): ...  # other"):
        code.write_text(body)
        importlib.invalidate_caches()
        found.append(shop.content(cell))
    assert all(found) and found[0] != found[1]
    assert shop.changeable(cell).startswith("the weights or the code of")


NOTEBOOK = """
from torch import nn

WIDTH = 4

def block():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2), nn.ReLU())

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(block(), nn.Flatten(), nn.Linear(49 * WIDTH, num_classes))
"""


def test_a_notebook_s_factory_that_changed_is_asked_again(tmp_path, monkeypatch):
    cell = next(iter(experiment(suites=(Suite(experiment().suites[0].data, (Attached("__main__:Net", ("0",)),)),)).cells()))
    shop, found = Workshop(tmp_path / "results"), []
    for body in (
        NOTEBOOK,
        NOTEBOOK + "\nother = 3\n",
        NOTEBOOK.replace("ReLU", "Tanh"),
        NOTEBOOK.replace("WIDTH = 4", "WIDTH = 5"),
    ):
        notebook = ModuleType("__main__")
        exec(body, vars(notebook))
        monkeypatch.setitem(sys.modules, "__main__", notebook)
        found.append(shop.content(cell))
    assert all(found) and found[0] == found[1] and len(set(found)) == 3
    (tmp_path / "script.py").write_text(NOTEBOOK)
    notebook.__file__ = str(tmp_path / "script.py")
    assert shop.content(cell) not in ("", *found), "of a script it is the file"


def test_weights_that_changed_under_their_name_are_asked_again(tmp_path):
    def write(seed):
        torch.manual_seed(seed)
        torch.save(Backbone(4).state_dict(), tmp_path / "w.pt")

    imported = Attached(f"{__name__}:Backbone", ("0",), weights=str(tmp_path / "w.pt"), trained_on=("elsewhere",))
    suite = replace(experiment().suites[0], models=(Static(imported), Static(Tiny())))
    exp = experiment(suites=(suite,), backends=(Float32(),), policies=(), boards=())
    said = []
    run = partial(Runner, exp, tmp_path / "results", log=said.append)
    write(1)
    run().run()
    write(1)
    assert not run().todo()
    write(2)
    assert len(run().todo()) == 1
    assert (
        said[-1]
        == f"the weights or the code of {Static(imported).label} have changed: what was found on the old ones is made again"
    )
    run().run()
    assert not run().todo()
    (tmp_path / "w.pt").unlink()
    assert not run().todo()


def test_policies_refuse_a_network_that_saw_their_samples(tmp_path, monkeypatch):
    fit = workshop.Trainer.fit

    def peeking(self, model, **kw):
        model = fit(self, model, **kw)
        model.trained_on = model.trained_on | self.train.origins
        return model

    monkeypatch.setattr(workshop.Trainer, "fit", peeking)
    Runner(experiment(backends=(Float32(),), boards=()), tmp_path, log=lambda line: None).run()
    assert not records(tmp_path, "decide")
    assert all("trained on the samples" in r.reason for r in records(tmp_path, "skip"))


def test_kept_thresholds_are_the_float_networks(done):
    results, _ = done
    points = [(r, r.points[0]) for r in records(results, "decide")]
    floats = {(p["budget"]): p["policy"] for r, p in points if r.facts["backend"] == "Float32"}
    kept = [(p["policy"], floats[p["budget"]]) for r, p in points if p["arm"] == "kept"]
    assert kept and all(a == b for a, b in kept)


@pytest.mark.parametrize("name", ["qat_branchynet", "quickstart"])
def test_no_fact_that_is_recorded_has_moved(name):
    """Records are for ever: whatever experiments learn to ask, what was answered keeps its name."""
    asked = {f.name for f in facts_of(find.experiment(name))}
    recorded = {json.loads(path.read_text())["fact"] for path in (ROOT / "results" / "records" / name).glob("*.json")}
    assert recorded and recorded <= asked


def test_a_finished_network_needs_no_trunk_to_begin_from(tmp_path):
    data, recipe = experiment().suites[0].data, Recipe(epochs=1, batch=64, lr=1e-2, start="static")
    first = Workshop(tmp_path / "a")
    net = first.trained(data, Tiny(), recipe, 0, 0)
    names = {p.name for p in (tmp_path / "a" / "cache" / "trained").iterdir()}
    name = first.trainer(data, Tiny(), recipe, 0, 0).place("base")
    assert len(names) == 2 and name in names
    (tmp_path / "b" / "zoo").mkdir(parents=True)
    for suffix in ("safetensors", "sha256"):
        trained = tmp_path / "a" / "cache" / "trained" / name / f"weights.{suffix}"
        shutil.copy(trained, tmp_path / "b" / "zoo" / f"{name}.{suffix}")
    steps = []
    again = Workshop(tmp_path / "b", lambda what, *_: steps.append(what)).trained(data, Tiny(), recipe, 0, 0)
    assert not steps and all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_the_trunk_has_epochs_of_its_own_and_every_network_begins_from_it(tmp_path):
    data, recipe = experiment().suites[0].data, Recipe(epochs=1, batch=64, lr=1e-2, start="static", trunk_epochs=3)
    said = set()
    shop = Workshop(tmp_path, lambda what, done, total: said.add((what, total)))
    for model in (Tiny(), Static(Tiny())):
        shop.trained(data, model, recipe, 0, 0)
    trunk = shop.trainer(data, Static(Tiny()), recipe.from_scratch(), 0, 0)
    steps = -(-len(trunk.train) // 64)
    own, twin = (f"train {model.label} on {data.label}" for model in (Tiny(), Static(Tiny())))
    assert said == {(twin, 3 * steps), (own, steps), (twin, steps)}
    assert trunk.finished() and len(list((tmp_path / "cache" / "trained").iterdir())) == 3  # the trunk was trained once
    assert recipe.from_scratch() == Recipe(epochs=3, batch=64, lr=1e-2)


# Arms ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def armed(tmp_path_factory):
    """Every arm of a policy with thresholds and of one without, two training seeds; results, and the policies added later."""
    results = tmp_path_factory.mktemp("armed")
    Runner(arms(), results, log=lambda line: None).run()
    return results


def arms(**fields):
    suite = replace(experiment().suites[0], models=(Tiny(),))
    given = dict(
        suites=(suite,), backends=(Float32(), OnnxRuntime(of=Float32()), PTQ(4, 4)), policies=(MaxProb(), Patience()),
        budgets=(0.6, 0.8), boards=(), arms=ARMS, train_seeds=(0, 1), recipe=Recipe(epochs=1, batch=64, lr=1e-2),
    )  # fmt: skip
    return experiment(**{**given, **fields})


def points(results, **where):
    said = [(r.facts | {"seed": r.spec["train_seed"]}, r.points[0]) for r in records(results, "decide")]
    return [p for facts, p in said if all({**facts, **p}[name] == value for name, value in where.items())]


def test_every_arm_says_what_it_did(armed):
    said = {(r.facts["backend"], p["arm"]) for r in records(armed, "decide") for p in r.points}
    others = {"refitted", "kept", "temperature", "share-matched"}
    backends = {"OnnxRuntime(of=Float32)", "PTQ(weight_bits=4, activation_bits=4)"}
    assert said == {("Float32", arm) for arm in ("refitted", "retrained")} | {(b, arm) for b in backends for arm in others}
    skipped = records(armed, "skip")
    assert len(skipped) == 2 * 2 * 2 and all("no threshold at each exit" in r.reason for r in skipped)  # Patience, share-matched
    for p in points(armed):
        assert p["tolerance"] == 0 and p["parts"]["val"].startswith("thresholds")
        assert ("tune" in p["parts"]) == (p["arm"] == "temperature") and ("calib" in p["parts"]) == (p["arm"] == "share-matched")
        assert p["spent_val"] <= p["budget"] + 1e-9 or p["arm"] != "refitted"
        assert p["budget_violation"] == pytest.approx(p["spent"] / p["budget"] - 1)
        lo, hi = p["limits"]["regret"]
        assert lo - 1e-12 <= p["regret"] <= hi + 1e-12 and p["resamples"] > 100
        if p["arm"] == "refitted":
            assert abs(p["regret"]) < 0.02, "it lies on its own curve, but for points of equal cost"
            assert len(p["curve"]["macs"]) == len(p["curve"]["counts"])
            assert all(sum(counts) == p["n"] for counts in p["curve"]["counts"])


def test_flips_are_counted_from_the_exits_in_the_records(armed):
    def exits(p):
        return np.frombuffer(zlib.decompress(base64.b64decode(p["taken"])), np.uint8).astype(int)

    n = 0
    for seed, policy, budget in product((0, 1), ("MaxProb", "Patience"), (0.6, 0.8)):
        where = dict(seed=seed, policy_label=policy, budget=budget)
        (before,) = points(armed, backend="Float32", arm="refitted", **where)
        (again,) = points(armed, backend="Float32", arm="retrained", **where)
        (other,) = points(armed, backend="Float32", arm="refitted", **where | {"seed": 1 - seed})
        assert again["exit_flips"] == (exits(again) != exits(other)).mean()
        assert {k: v for k, v in again["policy"].items()} == other["policy"], "the other training's policy"
        for backend in ("OnnxRuntime(of=Float32)", "PTQ(weight_bits=4, activation_bits=4)"):
            for p in points(armed, backend=backend, **where):
                moved = exits(p) - exits(before)
                assert p["exit_flips"] == (moved != 0).mean()
                assert (p["earlier_flips"], p["later_flips"]) == ((moved < 0).mean(), (moved > 0).mean())
                assert p["harmful_flips"] + p["helpful_flips"] <= p["exit_flips"] + 1e-12
                n += 1
    assert n == 2 * 2 * 2 * 2 * 4 - 8


def test_temperature_leaves_the_float_network_as_it_was_and_shares_are_matched_on_calib(armed):
    for p in points(armed, backend="OnnxRuntime(of=Float32)", policy_label="MaxProb"):
        # The same network by another engine; thresholds that were matched lie elsewhere between the same calib scores.
        assert p["exit_flips"] <= (0.1 if p["arm"] == "share-matched" else 0.02)
        if p["arm"] == "temperature":
            assert p["policy"]["temperatures"] == pytest.approx([1.0] * 3, abs=1e-3)
    exp, shop = arms(), Workshop(armed)
    for fact in (f for f in facts_of(exp) if f.arm == "share-matched" and f.policy == MaxProb()):
        decider = Decider(exp, shop, lambda name: None)
        matched, kept = decider.fitted(fact), decider.fitted(replace(fact, arm="kept"))
        there, here = (shop.predictions(cell, ("calib",))["calib"] for cell in (fact.against, fact.cell))
        shares = [np.bincount(p.leave(c), minlength=3) / len(c.labels) for p, c in ((kept, there), (matched, here))]
        np.testing.assert_allclose(shares[0], shares[1], atol=2 / len(here.labels))


def test_what_reaches_an_exit_is_judged_at_the_arms_temperature(armed):
    exp, shop = arms(), Workshop(armed)
    apart = 0
    for fact in (f for f in facts_of(exp) if f.arm == "temperature" and f.policy == MaxProb() and f.cell.backend == PTQ(4, 4)):
        point, test = Decider(exp, shop, lambda name: None).point(fact), shop.predictions(fact.cell, ("test",))["test"]
        taken = np.frombuffer(zlib.decompress(base64.b64decode(point["taken"])), np.uint8)
        for k, temperature in enumerate(point["policy"]["temperatures"]):
            if (who := taken >= k).any():
                cooled, raw = (nll(test.logits[k, who] / t, test.labels[who]) for t in (temperature, 1.0))
                assert point["nll_reached"][k] == pytest.approx(cooled)
                apart += abs(cooled - raw) > 1e-6
    assert apart, "every temperature is 1: nothing is shown"


def test_costs_come_back_from_the_records(armed):
    exp, shop = arms(), Workshop(armed)
    by_name = {r.fact: r for r in records(armed, "eval")}
    decider = Decider(exp, shop, by_name.get)
    for cell in (c for c in exp.cells() if c.train_seed == 0):
        said, counted = decider.cost(cell), shop.cost(cell)
        assert np.isnan(said.stage.params).all(), "it came from the record"
        for uses, k, what in product(((0, 1, 2), (2,), (0, 2)), range(3), ("macs", "bops")):
            assert said.path(uses, k, what) == counted.path(uses, k, what) > 0
        assert said.layers == counted.layers


def test_a_policy_or_an_arm_added_later_runs_no_network(armed, tmp_path, monkeypatch):
    shutil.copytree(armed, tmp_path / "r")

    def refuse(self, *args):
        raise AssertionError("a network was asked for")

    for name in ("net", "trained", "cost"):
        monkeypatch.setattr(Workshop, name, refuse)
    exp = arms(policies=(MaxProb(), Patience(), Entropy()))
    Runner(exp, tmp_path / "r", log=lambda line: None).run()
    assert points(tmp_path / "r", policy_label="Entropy") and not records(tmp_path / "r", "fail")
    assert not Runner(exp, tmp_path / "r", log=lambda line: None).todo()


def test_an_accuracy_may_be_asked_for_instead_of_a_cost(armed, tmp_path):
    shutil.copytree(armed, tmp_path / "r")
    wanted = arms(currency="accuracy", budgets=(0.3, 1.0), policies=(MaxProb(),), arms=("refitted", "kept"), train_seeds=(0,))
    Runner(wanted, tmp_path / "r", log=lambda line: None).run()
    said = points(tmp_path / "r", currency="accuracy", budget=0.3)
    assert len(said) == 5 and all(p["budget_cost"] is None and "budget_violation" not in p for p in said)
    assert all(p["spent_val"] <= 1 for p in said)
    assert any("out of reach" in r.reason for r in records(tmp_path / "r", "skip") if r.facts["budget"] == 1.0)


def test_budgets_may_be_fractions_of_each_network_s_own_cost():
    own = experiment(budgets_of="own")
    assert [own.reference_model(c) for c in own.cells()] == [c.model for c in own.cells()]
    assert {experiment().reference_model(c) for c in own.cells()} == {Static(Tiny())}


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(arms=("kept", "kept")), "name each once"),
        (dict(arms=("refited",)), "did you mean 'refitted'"),
        (dict(arms=()), "arms is empty"),
        (dict(currency="accuracy", budgets=(80.0,)), "shares of at most 1"),
    ],
)
def test_arms_and_accuracies_that_cannot_be_meant_are_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        arms(**fields)


def test_overridden_recipes_make_other_cells():
    a = [f.name for f in facts_of(experiment())]
    b = [f.name for f in facts_of(experiment(recipe=replace(experiment().recipe, epochs=3)))]
    assert not set(a) & set(b)


def test_two_boards_of_one_name_are_refused():
    with pytest.raises(UsageError, match="two boards are called 'host'"):
        experiment(boards=(Host(), Host(threads=4)))


def test_what_cannot_be_read_stops_neither_the_others_times_nor_their_pictures(tmp_path, monkeypatch):
    x, y = np.zeros((400, 3, 16, 16), np.uint8), np.arange(400) % 4
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    bad = Suite(Npz(str(tmp_path / "d.npz"), calib=32, tune=32, val=64, hold=32), (Tiny(),))
    good = Suite(experiment().suites[0].data, (Tiny(),))
    exp = experiment(suites=(bad, good), recipe=Recipe(epochs=0), backends=(Float32(),), budgets=(1.0,), boards=())
    Runner(exp, tmp_path, log=lambda line: None).run()
    (tmp_path / "d.npz").unlink()
    workshop._loaded.cache_clear()
    asked = []
    monkeypatch.setattr(Runner, "_timeable", lambda self, f: bool(self.shop.net(f.cell)) and asked.append(f.suite))
    with pytest.raises(DataError):
        Runner(replace(exp, boards=(Host(),)), tmp_path, log=lambda line: None).run()
    assert asked == [good] and len(keep(exp, tmp_path)) == 1


def test_how_far_a_network_is_from_its_reference_does_not_hang_on_their_order(tmp_path):
    exp = experiment(backends=(PTQ(), Float32()), reference=Float32(), recipe=Recipe(epochs=0), policies=(), boards=())
    Runner(exp, tmp_path, log=lambda line: None).run()
    assert all(("max_error" in r.exits[0]) != r.facts["reference"] for r in records(tmp_path, "eval"))


def test_what_is_being_made_again_is_listed_as_to_do(tmp_path):
    exp = experiment(backends=(Float32(),), recipe=Recipe(epochs=0), policies=(), boards=())
    Runner(exp, tmp_path, log=lambda line: None).run()
    Runner(exp, tmp_path, log=lambda line: None).forget()
    todo = len(Runner(exp, tmp_path, log=lambda line: None).todo())
    assert listing(exp, tmp_path).total["todo"] == todo > 0


def test_the_least_budget_that_is_named_can_be_had(monkeypatch):
    class Costs:
        """B-AlexNet's: the least share, 0.569148, would be rounded down."""

        def path(self, uses, exit):
            return (17339392.0, 30465536.0)[exit]

    monkeypatch.setattr("anytime.arms.key", str)
    decider = Decider.__new__(Decider)
    decider.exp, decider.fits = SimpleNamespace(currency="macs"), {}
    val = Predictions(np.zeros((2, 4, 2)), np.zeros(4, int), "val")
    decider.currency, decider.said = lambda f, c: (Costs(), 30465536.0), lambda f, c: {"val": val}

    def fit(budget):
        return decider._fit(SimpleNamespace(policy=MaxProb(), budget=budget, board=None), "cell")

    with pytest.raises(Infeasible) as error:
        fit(0.5)
    assert fit(float(re.search(r"possible is ([\d.]+)", str(error.value))[1]))
