"""The host's stopwatch: what it times, in which order, and how its processes end."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anytime import cpu, stopwatch
from anytime.backend import Deployable, Segment, TorchNet
from anytime.backends.torch_compile import CompiledNet
from anytime.board import Replayed, Timing
from anytime.boards import host
from anytime.boards.host import Host
from anytime.ensemble_net import EnsembleNet
from anytime.errors import AnytimeError, UsageError
from anytime.metrics import Floats
from anytime.model import AnytimeModel
from anytime.policies.fixed import Fixed
from anytime.policy import Policy
from anytime.scoring import percentiles, timing_rows
from anytime.spec import key
from anytime.workshop import Workshop
from tests.contracts.board import K, N, Sure, chain, check, network, onnx, samples, simulated, sure

X = samples()

# Networks that end badly; at the top of a module, so that a fresh process can import them.


class Faulty(TorchNet):
    """Does ``what`` in the process that times it, as soon as it is opened."""

    def __init__(self, what: str, note: Path = Path()) -> None:
        super().__init__(chain(2), {}, simulated=False)
        self.what, self.note = what, note

    def open(self, threads: int) -> None:
        if self.what == "raise":
            raise RuntimeError("the engine has no kernel for this")
        if self.what == "say":
            raise AnytimeError("this graph needs opset 13: export it again")
        if self.what == "crash":
            print("munmap_chunk(): invalid pointer", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.what == "leave":
            os._exit(0)
        if self.what == "interrupt":
            self.note.write_text(str(os.getpid()))
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(3600)


class Sizes(TorchNet):
    """Notes which segment ran on how many samples."""

    ran: list[tuple[Segment, int]] = []

    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        self.ran.append((segment, len(state)))
        return super().step(segment, state)


class Closed(TorchNet):
    """Holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(chain(2), {}, simulated=False)
        self.session = lambda: None


# Whole measurements, in processes of their own


@pytest.fixture(scope="module")
def timings() -> list[Timing]:
    return Host(launches=2, warmup=1).time([network(2), network(3)], X)


@pytest.fixture(scope="module")
def jobs() -> list[tuple[Deployable, Policy]]:
    two, three = network(2), network(3)
    return [
        (two, sure(two, X, (0, 1))),
        (three, sure(three, X, (0, 1, 2), pooled=True)),
        (three, sure(three, X, (0, 2), pooled=True)),
        (three, Fixed(1)),
    ]


@pytest.fixture(scope="module")
def replays(jobs: list[tuple[Deployable, Policy]]) -> list[Replayed]:
    return Host(launches=2, warmup=1).run(jobs, X)


def test_times_every_stage_and_head_for_each_sample_and_launch(timings: list[Timing]) -> None:
    for n_exits, timing in zip((2, 3), timings, strict=True):
        for ms in (timing.stage_ms, timing.head_ms, timing.stage_cpu_ms, timing.head_cpu_ms):
            assert ms.shape == (n_exits, 2 * N)
            assert (ms > 0).all()
        assert timing.launches == 2


def test_paths_are_sums_of_what_was_timed(timings: list[Timing]) -> None:
    t = timings[1]
    np.testing.assert_allclose(t.to_exit(2, (0, 2)), t.stage_ms[0] + t.stage_ms[1] + t.stage_ms[2] + t.head_ms[0] + t.head_ms[2])
    assert t.path((0, 2), 0) == pytest.approx(np.median(t.stage_ms[0] + t.head_ms[0]))


def test_facts_of_a_measurement(timings: list[Timing]) -> None:
    facts = timings[0].facts
    wanted = {"cpu", "flags", "cores", "threads", "governor", "mhz", "memory_gb", "os", "python", "torch", "onnxruntime", "numpy"}
    wanted |= {"pressure_avg10", "load", "pressure_us", "pressure_share", "waiting_share", "noisy", "noisy_rule"}
    assert wanted <= facts.keys()
    assert all(isinstance(v, str) and v for v in facts.values())
    assert facts["torch"] == torch.__version__
    assert (facts["launches"], facts["samples"], facts["interleaved"], facts["threads"]) == ("2", str(N), "2", "1")
    assert facts["noisy"] in ("yes", "no")
    assert int(facts["stopwatch_wall_ns"]) > 0 and int(facts["stopwatch_cpu_ns"]) > 0


def test_replays_decide_and_answer_as_offline(jobs: list[tuple[Deployable, Policy]], replays: list[Replayed]) -> None:
    for (net, policy), replay in zip(jobs, replays, strict=True):
        logits = net.predict(X, batch=1)
        exits = policy.exits(logits)
        assert replay.exits.tolist() == exits.tolist()
        assert replay.answers.tolist() == policy.answer(logits, exits).argmax(-1).tolist()
        assert replay.wall_ms.shape == replay.cpu_ms.shape == (2, N)
        assert (replay.wall_ms > 0).all() and (replay.cpu_ms > 0).all()


def test_replays_in_this_test_are_of_different_kinds(replays: list[Replayed]) -> None:
    assert [sorted(set(r.exits.tolist())) for r in replays] == [[0, 1], [0, 1, 2], [0, 2], [1]]


# Batches


def test_batches_decide_and_answer_as_offline(jobs: list[tuple[Deployable, Policy]]) -> None:
    """Ten samples twice, batches of 2: 8 of them at a time are 16 samples, so that 4 are left."""
    x = np.concatenate([X, X])
    replays = Host(launches=1, warmup=0, batch=2).run(jobs, x)
    assert ["first_answer_ms" in replay.facts for replay in replays] == [
        True,
        True,
        False,
        False,
    ]  # one network is there three times
    for (net, policy), replay in zip(jobs, replays, strict=True):
        logits = net.predict(x, batch=1)
        exits = policy.exits(logits)
        assert replay.exits.tolist() == exits.tolist()
        assert replay.answers.tolist() == policy.answer(logits, exits).argmax(-1).tolist()
        assert [len(set(part)) for part in np.split(replay.wall_ms[0], [16])] == [1, 1]
        assert (replay.wall_ms > 0).all() and replay.wall_ms.shape == replay.cpu_ms.shape == (1, 2 * N)
        assert replay.readings_ms.tolist() == [replay.wall_ms[0, 0], replay.wall_ms[0, 16]]


def test_whole_batches_are_timed_link_by_link() -> None:
    board = Host(launches=2, warmup=0, batch=4)
    (timing,) = board.time([network(3)], X)
    assert timing.stage_ms.shape == timing.head_cpu_ms.shape == (3, 2 * 2)
    assert (timing.facts["batch"], timing.facts["samples"]) == ("4", "8")
    assert board.name == "host, batch 4" and Host().name == "host"
    assert float(timing.facts["first_answer_ms"]) > 0 and float(timing.facts["memory_mb"]) >= 0


def test_times_are_of_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, lambda launch, net: [40, 20, 8, 4])
    (timing,) = Host(launches=1, batch=4).time([network(1)], X)
    found = (timing.stage_ms[0, 0], timing.stage_cpu_ms[0, 0], timing.head_ms[0, 0], timing.head_cpu_ms[0, 0])
    assert found == pytest.approx((10e-6, 5e-6, 2e-6, 1e-6))


def test_less_than_one_reading_cannot_be_timed() -> None:
    with pytest.raises(UsageError, match="host, batch 16: 10 samples are less than the 16 of one reading; give 16 or more"):
        Host(batch=16).time([network(1)], X)
    with pytest.raises(UsageError, match="host, batch 2: 10 samples are less than the 16 of one reading; give 16 or more"):
        Host(batch=2).run([(network(1), Fixed(0))], X)


def test_percentiles_are_of_readings_not_of_the_samples_that_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, lambda launch, net: [10, 9, 0, 0])
    (one,) = Host(launches=3).run([(network(1), Fixed(0))], X)
    (eight,) = Host(launches=3, batch=2).run([(network(1), Fixed(0))], np.tile(X, (4, 1, 1, 1)))
    assert (one.readings_ms.size, eight.readings_ms.size) == (3 * N, 3 * 3)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_jump_pays_for_the_stages_that_it_runs(monkeypatch: pytest.MonkeyPatch, restarts: bool) -> None:
    net = network(3)
    net.twin.restarts = restarts
    launched(monkeypatch, lambda launch, net: [1, 1, 0, 0, 10, 10, 0, 0, 100, 100, 0, 0])
    (timing,) = Host(launches=1).time([net], X)
    assert timing.path((2,), 2) == pytest.approx(1e-6 * (100 if restarts else 111))
    assert timing.to_exit(2, (0, 2), cpu=True)[0] == pytest.approx(1e-6 * (101 if restarts else 111))
    assert timing.to_exit(2)[0] == pytest.approx(1e-6 * 111)


def test_kept_times_know_whether_stages_restart(tmp_path: Path) -> None:
    ms, shop = np.ones((2, 3)), Workshop(tmp_path)
    for restarts in (False, True):
        timing = Timing(ms, ms, ms, ms, 1, {}, restarts=restarts)
        shop.keep_timing("fact", timing)
        kept = shop.timing("fact")
        assert kept is not None and kept.path((1,), 1) == timing.path((1,), 1) == (2 if restarts else 3)


def test_graphs_are_written_before_a_process_is_timed_that_needs_them() -> None:
    net = onnx(3)
    held = pickle.loads(pickle.dumps(net))
    held._write = None  # what it needs now, it has
    for segment in (*stopwatch._Links(held).segments, *held.plan(range(3))):
        assert held.graph(segment) == net.graph(segment)


def test_engines_make_themselves_ready_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For every segment, whole batches, and few samples that go on alone; only the first job of a network says what it takes."""
    net = Sizes(chain(2), {}, simulated=False)
    monkeypatch.setattr(stopwatch, "_interleave", lambda *_: {})
    monkeypatch.setattr(Sizes, "ran", [])
    jobs = [(net, Sure((0.0,), (0, 1))), (net, Fixed(0))]
    (tmp_path / "jobs").write_bytes(pickle.dumps((torch.get_num_threads(), 0, 4, 8, jobs, X)))
    stopwatch._child(str(tmp_path / "jobs"), str(tmp_path / "report"))
    first, second = Segment(0, 1, 0), Segment(1, 2, 1)
    assert Sizes.ran == [(first, 4), (second, 4), (first, 1), (second, 1), (first, 4), (first, 1)]
    (whole, nothing) = pickle.loads((tmp_path / "report").read_bytes())["opening"]
    assert whole.keys() == {"first_answer_ms", "memory_mb"} and nothing == {}


def test_what_a_network_costs_before_its_first_answer(timings: list[Timing]) -> None:
    for timing in timings:
        assert float(timing.facts["first_answer_ms"]) > 0
        assert timing.facts["memory_mb"] == "unknown" or float(timing.facts["memory_mb"]) >= 0


def test_the_peak_of_memory_is_read_and_reset() -> None:
    if stopwatch._memory_mb() is None:
        pytest.skip("this system does not say how much memory a process held")
    # In a fresh process, as a launch is: what other tests have freed there is nobody's to hand back.
    code = """
import mmap
from anytime.stopwatch import _memory_mb
before = _memory_mb(reset=True)
held = mmap.mmap(-1, 40_000_000)
held.write(bytes(40_000_000))
held.close()
print(before, _memory_mb(), _memory_mb(reset=True), _memory_mb())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    before, after, reset, again = map(float, said.split())
    assert after - before > 30  # 40 MB were there, and are gone
    assert reset < after - 30 and again < after - 30


# The order of things


class Noting:
    """Stands for a network under the stopwatch; notes every run."""

    def __init__(self, name: str, log: list[tuple[str, int, bool]]) -> None:
        self.name, self.log = name, log

    def go(self, sample: Floats) -> list[list[int]]:
        self.log.append((self.name, int(sample[0]), gc.isenabled()))
        return [[int(sample[0])]]


def interleaved(n_samples: int, warmup: int) -> tuple[list[tuple[str, int, bool]], dict[str, Any]]:
    log: list[tuple[str, int, bool]] = []
    runs = [Noting(name, log) for name in "abc"]
    return log, stopwatch._interleave(runs, [np.array([r]) for r in range(n_samples)], warmup, lambda: None)  # type: ignore[arg-type]


def test_networks_take_turns_in_an_order_that_is_drawn() -> None:
    log, report = interleaved(20, warmup=2)
    assert [(name, r) for name, r, _ in log[:6]] == [(name, r) for name in "abc" for r in (0, 1)]
    turns: list[list[Any]] = []
    for name, r, _ in log[6:]:
        if not turns or turns[-1][0] != name:
            turns.append([name])
        turns[-1].append(r)
    # One round per 8 samples; 3 untimed runs on those before them, the last ones before the first.
    rounds = [[17, 18, 19, *range(8)], [5, 6, 7, *range(8, 16)], [13, 14, 15, *range(16, 20)]]
    assert [runs for _, *runs in turns] == [runs for runs in rounds for _ in "abc"]
    assert [sorted(name for name, *_ in turns[i : i + 3]) for i in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert [r.tolist() for r in report["readings"]] == [[[r] for r in range(20)]] * 3


def test_every_network_comes_after_every_other() -> None:
    """Where the order only rotates, a network always follows the same one, and its times hold what that one leaves behind."""
    log, _ = interleaved(80 * stopwatch.TURN, warmup=0)
    names = [name for name, *_ in log[:: stopwatch.TURN + stopwatch.REFRESH]]
    assert len(names) == 240
    after = Counter(zip(names, names[1:], strict=False))
    assert min(after[a, b] for a in "abc" for b in "abc" if a != b) >= 20


def test_no_garbage_is_collected_while_timing() -> None:
    log, _ = interleaved(9, warmup=1)
    assert {enabled for *_, enabled in log[:3]} == {True}
    assert {enabled for *_, enabled in log[3:]} == {False}
    assert gc.isenabled()


def test_more_untimed_runs_than_samples_wrap_around() -> None:
    _, report = interleaved(1, warmup=3)
    assert [r.tolist() for r in report["readings"]] == [[[0]]] * 3


class Clock:
    """Wall and CPU clocks that only the network moves."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0

    def spend(self, wall: int, cpu: int) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


class Ticking(Deployable):
    """Three exits; start takes 1000 ns, stage k 10 (k + 1), a head 7; two fifths of each on the CPU. Says class k, ever surer."""

    format, execution, simulated = "torch", "ticking", False
    n_exits, restarts = 3, False

    def __init__(self, clock: Clock, nan: bool = False) -> None:
        self.clock, self.nan, self.calls = clock, nan, []  # type: ignore[var-annotated]

    def _take(self, ns: int) -> None:
        self.clock.spend(5 * ns, 2 * ns)

    def start(self, x: Floats) -> Any:
        self._take(1000)
        self.calls.append("start")
        return 0

    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        assert state == segment.first, "a state was handed to the wrong segment"
        self.calls.append(tuple(segment))
        for k in range(segment.first, segment.stop):
            self._take(10 * (k + 1))
        if segment.head is None:
            return segment.stop, None
        self._take(7)
        logits = np.full((1, K), np.nan if self.nan else 0, np.float32)
        logits[0, segment.head] += segment.head
        return segment.stop, logits

    def save(self, folder: Path) -> list[Path]:
        return []


@pytest.mark.parametrize("restarts", [False, True])
def test_every_segment_is_made_ready_with_the_state_that_it_gets(clock: Clock, restarts: bool) -> None:
    class Strict(Ticking):
        def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
            if restarts and segment.stop > segment.first:
                assert state == 0, "a stage that restarts got another one's state"
                return (segment.stop if segment.head is None else state), super().step(segment, segment.first)[1]
            return super().step(segment, state)

    beats: list[int] = []
    for run in (
        stopwatch._Links(Strict(clock)),
        stopwatch._Replay(Strict(clock), Fixed(2)),
        stopwatch._Batches(Strict(clock), Sure((0.9,), (0, 2)), 2),
    ):
        net = run.net if isinstance(run, stopwatch._Links) else run.executor.net
        net.restarts = restarts
        beats.clear()
        stopwatch._ready(net, run.segments, X[:2], lambda: beats.append(1))
        assert net.calls == ["start", *map(tuple, run.segments)] and len(beats) == len(run.segments)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter_ns", lambda: clock.wall)
    monkeypatch.setattr(stopwatch, "process_time_ns", lambda: clock.cpu)
    return clock


def test_stage_and_head_of_each_link_are_timed_apart(clock: Clock) -> None:
    net = Ticking(clock)
    stages_and_heads = [1010, 7, 20, 7, 30, 7]  # the start counts to the first stage
    assert stopwatch._Links(net).go(X[:1]) == [[f * ns for ns in stages_and_heads for f in (5, 2)]]
    assert net.calls == ["start", (0, 1, None), (1, 1, 0), (1, 2, None), (2, 2, 1), (2, 3, None), (3, 3, 2)]


@pytest.mark.parametrize(
    ("thresholds", "reads", "plan", "ns", "exit"),
    [
        ((0.0, 0.0), (0, 1, 2), [(0, 1, 0)], 1017, 0),
        ((0.9, 0.0), (0, 1, 2), [(0, 1, 0), (1, 2, 1)], 1017 + 27, 1),
        ((0.9, 0.9), (0, 1, 2), [(0, 1, 0), (1, 2, 1), (2, 3, 2)], 1017 + 27 + 37, 2),
        ((0.9,), (0, 2), [(0, 1, 0), (1, 3, 2)], 1017 + 57, 2),
        ((0.4,), (1, 2), [(0, 2, 1)], 1037, 1),  # of four classes, e / (e + 3) = 0.48
        ((), (2,), [(0, 3, 2)], 1067, 2),
    ],
)
def test_a_replay_runs_what_its_policy_reads_and_no_more(
    clock: Clock, thresholds: tuple[float, ...], reads: tuple[int, ...], plan: list[tuple[int, int, int]], ns: int, exit: int
) -> None:
    net = Ticking(clock)
    replay = stopwatch._Replay(net, Sure(thresholds, reads))
    # Exit 0 is sure of nothing and says class 0; the others say their own index.
    assert replay.go(X[:1]) == [[5 * ns, 2 * ns, exit, exit]]
    assert net.calls == ["start", *plan]


def test_a_batch_s_time_is_shared_by_its_samples(clock: Clock) -> None:
    class Several(Ticking):
        def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
            state, logits = super().step(segment, state)
            return state, None if logits is None else np.repeat(logits, 4, axis=0)

    rows = stopwatch._Batches(Several(clock), Fixed(1), 4).go(X[:4])
    assert rows == [[5 * 1037 // 4, 2 * 1037 // 4, 1, 1]] * 4


def test_what_others_took_of_the_cpu_is_counted_around_all_runs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def go(self, sample: Floats) -> list[list[int]]:
            clock.spend(100, 30)
            return [[0]]

    stalled = iter((1000, 1250))
    monkeypatch.setattr(cpu, "stalled_us", lambda: next(stalled))
    monkeypatch.setattr(stopwatch, "_stopwatch_ns", lambda: (5, 50))
    beats: list[int] = []
    report = stopwatch._interleave([Idle(), Idle()], [X[:1]] * 10, 2, lambda: beats.append(1))  # type: ignore[list-item]
    runs = 2 * (10 + 2 * stopwatch.REFRESH)  # two turns, each after untimed runs; the warm-up lies before the clocks
    assert (report["wall_ns"], report["cpu_ns"], report["stalled_us"]) == (100 * runs, 30 * runs, 250)
    assert report["stopwatch_ns"] == (5, 50) and len(beats) == 2 * (2 + 10), "it says that it lives after each run that counts"


def test_exit_tests_and_the_answer_are_part_of_a_replay(clock: Clock) -> None:
    class Slow(Sure):
        def stop(self, logits: Floats) -> Any:
            clock.spend(100_000, 30_000)
            return super().stop(logits)

        def answer(self, logits: Floats, exits: np.ndarray) -> Floats:
            clock.spend(1_000_000, 500_000)
            return super().answer(logits, exits)

    (readings,) = stopwatch._Replay(Ticking(clock), Slow((0.9, 0.9), (0, 1, 2))).go(X[:1])
    assert readings[:2] == [5 * 1081 + 2 * 100_000 + 1_000_000, 2 * 1081 + 2 * 30_000 + 500_000]


def test_an_answer_from_an_exit_that_was_not_read_is_refused(clock: Clock) -> None:
    class Peeking(Sure):
        def answer(self, logits: Floats, exits: np.ndarray) -> Floats:
            return logits[-1]

    replay = stopwatch._Replay(Ticking(clock), Peeking((0.0, 0.0), (0, 1, 2)))
    with pytest.raises(AnytimeError, match="Peeking answers at exit 1 with logits of exits that were not read"):
        replay.go(X[:1])


def test_a_network_that_says_nan_is_refused(clock: Clock) -> None:
    with pytest.raises(AnytimeError, match="not finite"):
        stopwatch._Replay(Ticking(clock, nan=True), Fixed(0)).go(X[:1])


# What the parent makes of its launches


class Onnx(TorchNet):
    """Says that it is for ONNX Runtime."""

    format = "onnx"


def launched(
    monkeypatch: pytest.MonkeyPatch, readings: Callable[[int, Any], list[int]], told: list[str] | None = None
) -> list[list[str]]:
    """Replace the processes by ones whose every sample has ``readings(launch, net)``; lists the formats that each one ran.

    ``told`` is given each one's device.
    """
    seen: list[list[str]] = []

    def launch(file: Path, threads: int, who: str, device: str) -> dict[str, Any]:
        if told is not None:
            told.append(device)
        _, _, _, _, jobs, x = host.pickle.loads(file.read_bytes())
        seen.append([net.format for net, _ in jobs])
        rows = [np.array([readings(len(seen), net)] * len(x)) for net, _ in jobs]
        noise = {"wall_ns": 1000, "cpu_ns": 990, "stalled_us": None, "stopwatch_ns": (50, 500)}
        return {"readings": rows, **noise, "opening": [{"first_answer_ms": 1.0, "memory_mb": None}] * len(jobs)}

    monkeypatch.setattr(host, "_launch", launch)
    monkeypatch.setattr(host, "_cores", lambda: 4)
    return seen


def mixed() -> list[Deployable]:
    return [network(2), Onnx(chain(3), {}, simulated=False), network(1)]


@pytest.mark.parametrize("threads", [1, 2])
def test_engines_have_processes_of_their_own_that_take_turns(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    seen = launched(monkeypatch, lambda launch, net: list(range(4 * net.n_exits)))
    timings = Host(threads=threads, launches=2).time(mixed(), X)
    assert seen == 2 * [["torch", "torch"], ["onnx"]]
    assert [t.stage_ms.shape for t in timings] == [(2, 2 * N), (3, 2 * N), (1, 2 * N)]
    assert timings[1].stage_ms[:, 0].tolist() == pytest.approx([0, 4e-6, 8e-6])
    assert timings[1].stage_cpu_ms[:, 0].tolist() == pytest.approx([1e-6, 5e-6, 9e-6])
    assert timings[1].head_ms[:, 0].tolist() == pytest.approx([2e-6, 6e-6, 10e-6])
    assert timings[1].head_cpu_ms[:, 0].tolist() == pytest.approx([3e-6, 7e-6, 11e-6])


def test_launches_follow_each_other_in_the_sample_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, lambda launch, net: [launch] * 4)
    (timing,) = Host(launches=3).time([network(1)], X)
    assert timing.stage_ms[0].tolist() == pytest.approx([1e-6] * N + [2e-6] * N + [3e-6] * N)


def test_replayed_times_are_in_ms_wall_and_cpu_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, lambda launch, net: [4_000_000 * launch, 3_000_000 * launch, 0, 2])
    (replay,) = Host(launches=2).run([(network(1), Fixed(0))], X)
    assert replay.wall_ms.tolist() == [[4.0] * N, [8.0] * N] and replay.cpu_ms.tolist() == [[3.0] * N, [6.0] * N]
    assert set(replay.answers) == {2}


def test_rows_of_a_timing_by_hand() -> None:
    stage, head = np.array([[1.0, 1.0, 4.0], [2.0, 2.0, 8.0]]), np.array([[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]])
    first, last = timing_rows(Timing(stage, head, stage / 2, head / 2, 1, {}))
    assert (first["latency_ms_p50"], first["latency_ms_mean"], first["cpu_ms"]) == (1.5, 2.5, 1.25)
    assert (last["latency_ms_p50"], last["latency_ms_mean"], last["cpu_ms"]) == (3.75, pytest.approx(6.75), pytest.approx(3.375))
    assert (last["stage_ms_p50"], last["head_ms_p50"], last["own_latency_ms_p50"]) == (2.0, 0.25, 3.25)


def test_a_percentile_wants_samples_enough() -> None:
    ms = np.arange(1.0, 102.0)
    assert percentiles(ms) == {"latency_ms_p50": 51.0, "latency_ms_p90": 91.0, "latency_ms_p99": None}
    assert percentiles(ms[:63])["latency_ms_p90"] is None and percentiles(ms[:64])["latency_ms_p90"] is not None
    many = np.tile(np.arange(1.0, 102.0), 7)
    assert percentiles(many[:662])["latency_ms_p99"] == 100.0 and percentiles(many[:661])["latency_ms_p99"] is None


@pytest.mark.parametrize("moving", [2, 3])
def test_exits_and_answers_must_not_differ_between_launches(monkeypatch: pytest.MonkeyPatch, moving: int) -> None:
    launched(monkeypatch, lambda launch, net: [10, 9, *(int(i == moving and launch == 2) for i in (2, 3))])
    with pytest.raises(AnytimeError, match=f"on {N} of {N} samples: its kernels are not deterministic"):
        Host(launches=2).run([(network(2), Fixed(0))], X)


# What the host refuses


def test_refuses_simulated_networks() -> None:
    assert "no latency" in (Host().why_not(simulated()) or "")
    with pytest.raises(AnytimeError, match="host cannot time fake-quant: simulated arithmetic has no latency"):
        Host().time([network(2), simulated()], X)


def needing(*flags: str) -> TorchNet:
    return TorchNet(chain(2), {}, simulated=False, needs=flags)


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        ("sse2 avx2", True),
        ("sse2 avx2 avx_vnni", False),
        ("sse2 avx512_vnni", False),
        ("sse2 amx_int8", False),
        ("asimd", False),
        ("", False),
    ],
)
def test_an_x86_without_vnni_saturates(monkeypatch: pytest.MonkeyPatch, flags: str, saturates: bool) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: frozenset(flags.split()))
    assert cpu.saturates() is saturates


def test_refuses_kernels_that_the_cpu_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"avx2", "avx512_bf16"}))
    why = Host().why_not(needing("avx512_fp16", "amx_fp16")) or ""
    assert "none of avx512_fp16, amx_fp16" in why and "emulation" in why
    assert Host().why_not(needing("amx_bf16", "avx512_bf16")) is None


def test_a_system_that_names_no_flags_is_not_trusted_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: frozenset())
    assert "does not say" in (Host().why_not(needing("avx512_fp16")) or "")
    assert Host().why_not(network(2)) is None


def test_refuses_other_formats_and_missing_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keras(TorchNet):
        format = "keras"

    assert Host().why_not(Keras(chain(1), {}, simulated=False)) == "host runs torch, onnx, openvino, tflite, not keras"
    onnx = Onnx(chain(1), {}, simulated=False)
    assert Host().why_not(onnx) is None
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert "pip install onnxruntime" in (Host().why_not(onnx) or "")


def test_refuses_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_cores", lambda: 2)
    assert Host(threads=2).why_not(network(1)) is None
    assert "2 cores, fewer than threads=3" in (Host(threads=3).why_not(network(1)) or "")


@pytest.mark.parametrize("field", [{"threads": 0}, {"launches": 0}, {"warmup": -1}, {"batch": 0}])
def test_refuses_settings_that_measure_nothing(field: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="use threads >= 1"):
        Host(**field)


def test_refuses_no_samples() -> None:
    with pytest.raises(UsageError, match="0 samples are less than the 1 of one reading"):
        Host().time([network(1)], X[:0])


def test_no_network_is_no_work() -> None:
    assert Host().time([], X) == [] and Host().run([], X) == []


def test_says_which_state_cannot_be_handed_over() -> None:
    with pytest.raises(AnytimeError, match="cannot be handed to a process of its own .*keep lambdas"):
        Host().time([Closed()], X)


def test_a_temporary_folder_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host.tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(AnytimeError, match="set TMPDIR"):
        Host().time([network(1)], X)


# A GPU, which no machine that ran these tests has had


def seen(monkeypatch: pytest.MonkeyPatch, bf16: bool = True) -> None:
    """Let torch say that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


def test_a_board_with_a_gpu_is_another_board_and_the_cpu_s_keeps_its_key() -> None:
    assert key(Host()) == key(Host(device="cpu")) == "ca3211bd33e6"  # what the records say
    assert key(Host(device="cuda")) != key(Host())
    assert (Host(device="cuda").name, Host(device="cuda", batch=4).name) == ("host, cuda", "host, cuda, batch 4")
    with pytest.raises(UsageError, match="device='cudaa' must be one of 'cpu', 'cuda'; did you mean"):
        Host(device="cudaa")  # type: ignore[arg-type]


def test_without_cuda_the_board_says_why_and_that_another_machine_may_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    board = Host(device="cuda")
    for built, said in ((None, "was built without it$"), ("13.0", "it was built for CUDA 13.0 and finds no GPU or no driver$")):
        monkeypatch.setattr(torch.version, "cuda", built)
        why = board.why_not(network(2)) or ""
        assert re.match(f"torch sees no CUDA here: .*{said}", why) and why == board.lacks("torch", ())
        with pytest.raises(AnytimeError, match="host, cuda cannot time torch: torch sees no CUDA here: "):
            board.time([network(2)], X)
    assert board.facts()["gpu"] == "none that torch sees" and "gpu" not in Host().facts()


def test_a_gpu_is_given_only_what_torch_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch)
    board = Host(device="cuda")
    assert board.why_not(network(2)) is None
    for net in (onnx(2), CompiledNet(chain(2), {}, False, "torch.compile"), EnsembleNet([network(1)], [nn.Identity()], K, False)):
        assert f"host, cuda runs what torch runs as it stands, not {net.execution}: " in (board.why_not(net) or "")
    assert "no latency" in (board.why_not(simulated()) or "")


def test_a_gpu_needs_no_kernels_of_the_cpu_but_those_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: frozenset())
    seen(monkeypatch, bf16=False)
    assert Host(device="cuda").why_not(needing(*cpu.FP16_KERNELS)) is None
    assert "does not multiply bfloat16" in (Host(device="cuda").why_not(needing(*cpu.BF16_KERNELS)) or "")
    seen(monkeypatch)
    assert Host(device="cuda").why_not(needing(*cpu.BF16_KERNELS)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_that_moves_keeps_its_type_and_its_states_stay_there(dtype: torch.dtype) -> None:
    net = TorchNet(chain(2).to(dtype), {}, simulated=False, dtype=dtype)
    net.move("meta")  # torch's device without memory: it shows where a tensor is, and knows no value
    assert {(p.device.type, p.dtype) for p in net.twin.parameters()} == {("meta", dtype)}
    state = net.start(X)
    for k in range(2):
        assert (state.device.type, state.dtype) == ("meta", dtype)
        state, _ = net.step(Segment(k, k + 1, None), state)
    assert net.start(np.zeros((2, 3, 8, 8), np.float32)).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # logits are asked back
        net.step(Segment(2, 2, 1), state)


def test_what_is_no_image_moves_too() -> None:
    net = TorchNet(AnytimeModel([nn.Linear(8, 8)], [nn.Linear(8, K)]), {}, simulated=False)
    net.move("meta")
    assert net.start(np.zeros((3, 8), np.float32)).device.type == "meta"


def test_a_network_in_channels_last_says_the_same() -> None:
    here, moved = network(3), network(3)
    moved.move("cpu")
    assert moved.twin.stages[1][0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index, operator, union-attr]
    np.testing.assert_allclose(moved.predict(X), here.predict(X), atol=1e-5)


def test_a_stage_without_a_head_is_waited_for_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stage's time would be that of asking for it, and its head's hold both."""
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    net = network(2)
    state, _ = net.step(Segment(0, 1, None), net.start(X))
    assert not waited
    net.device = "cuda"
    net.step(Segment(1, 2, None), state)
    assert waited == [1]


def test_fp32_on_a_gpu_is_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    net = network(1)
    monkeypatch.setattr(net.twin, "to", lambda *_, **__: None)
    net.move("cuda")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32 and net.device == "cuda"


class Moving(Sizes):
    """Notes where it was moved to, and before which run."""

    moved: list[tuple[str, int]] = []

    def move(self, device: str) -> None:
        self.moved.append((device, len(self.ran)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_process_that_times_moves_a_network_once_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    net = Moving(chain(2), {}, simulated=False)
    for cls, name in ((Sizes, "ran"), (Moving, "moved")):
        monkeypatch.setattr(cls, name, [])
    monkeypatch.setattr(stopwatch, "_interleave", lambda *_: {})
    jobs = [(net, Fixed(0)), (net, Fixed(1))]
    (tmp_path / "jobs").write_bytes(pickle.dumps((torch.get_num_threads(), 0, 1, 1, jobs, X)))
    stopwatch._child(str(tmp_path / "jobs"), str(tmp_path / "report"), device)
    assert Moving.moved == ([("cuda", 0)] if device == "cuda" else []) and len(Sizes.ran) == 2


def test_the_process_that_times_is_told_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    seen(monkeypatch)
    monkeypatch.setattr(host, "_gpu", lambda: {"gpu": "NVIDIA H200"})
    launched(monkeypatch, lambda launch, net: [1] * 4, told)
    (timing,) = Host(device="cuda", launches=2).time([network(1)], X)
    Host(launches=1).time([network(1)], X)
    assert told == ["cuda", "cuda", "cpu"] and timing.facts["gpu"] == "NVIDIA H200"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
def test_a_gpu_keeps_the_contract_of_boards() -> None:
    check(Host(launches=2, warmup=1, device="cuda"))


# How a process can end


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("raise", "the process that ran torch failed: RuntimeError: the engine has no kernel for this$"),
        ("say", "failed: this graph needs opset 13: export it again$"),
        ("crash", r"was killed by signal 11 \(Segmentation fault\): munmap_chunk\(\): invalid pointer$"),
        ("leave", "ended without a result, without a word$"),
    ],
)
def test_a_process_that_ends_badly_is_reported(what: str, sentence: str) -> None:
    with pytest.raises(AnytimeError, match="^host, launch 1 of 3: .*" + sentence):
        Host().time([Faulty(what)], X)


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SILENCE_S", 0.5)
    with pytest.raises(AnytimeError, match="gave no sign of life for 0.5 s and was ended, without a word"):
        Host().time([Faulty("hang")], X)


def test_a_class_that_no_process_can_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = types.ModuleType("gone_with_its_process")
    exec("from anytime.backend import TorchNet\nclass Lost(TorchNet): pass", gone.__dict__)
    monkeypatch.setitem(sys.modules, gone.__name__, gone)
    with pytest.raises(AnytimeError, match="cannot import what it shall run .*gone_with_its_process.*a module of its own"):
        Host().time([gone.Lost(chain(1), {}, simulated=False)], X)


def test_a_class_beside_the_users_script_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "users_own_module.py").write_text("from anytime.backend import TorchNet\nclass Mine(TorchNet): pass")
    monkeypatch.syspath_prepend(tmp_path)  # as Python does with the folder of a script
    mine = importlib.import_module("users_own_module").Mine(chain(1), {}, simulated=False)
    (timing,) = Host(launches=1, warmup=0).time([mine], X)
    assert (timing.stage_ms > 0).all()


def test_an_interrupt_ends_the_process(tmp_path: Path) -> None:
    # In a process of its own: with OpenVINO loaded beside pytest's machinery an interrupt has ended in a segmentation fault.
    note = tmp_path / "pid"
    # A shell's background job, as tests may run in, is started with interrupts ignored.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"{heard}from tests.test_host import *\nHost().time([Faulty('interrupt', Path({str(note)!r}))], X)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode and done.stderr.rstrip().endswith("KeyboardInterrupt")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_process_whose_parent_is_gone_ends() -> None:
    command = [sys.executable, "-c", "from anytime.stopwatch import _pulse\nbeat = _pulse()\nwhile True: beat()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None and child.stdout.read(1) == b"."
        child.stdout.close()
        try:
            assert child.wait(30) != 0
        finally:
            child.kill()


# Noise


@pytest.mark.parametrize(
    ("pressure", "waiting", "said"),
    [
        (0.0, 0.0, "no"),
        (0.10, 0.10, "no"),
        (0.11, 0.0, "yes"),
        (0.0, 0.11, "yes"),
        (None, 0.02, "no"),
        (None, 0.5, "yes"),
        (0.97, None, "yes"),
        (0.01, None, "no"),
        (None, None, "unknown"),
    ],
)
def test_noisy(pressure: float | None, waiting: float | None, said: str) -> None:
    assert host.noisy(pressure, waiting) == said


def test_noise_is_counted_over_all_launches() -> None:
    launch = {"wall_ns": 10_000_000, "cpu_ns": 9_600_000, "stalled_us": 400, "stopwatch_ns": (50, 500)}
    worse = {"wall_ns": 30_000_000, "cpu_ns": 24_400_000, "stalled_us": 3_000, "stopwatch_ns": (60, 400)}
    facts = host._noise([launch, worse], threads=1)
    # By hand: 3.4 of 40 ms under pressure; 34 of 40 ms on the CPU.
    assert (facts["pressure_us"], facts["pressure_share"], facts["waiting_share"]) == ("3400", "0.085", "0.150")
    assert (facts["stopwatch_wall_ns"], facts["stopwatch_cpu_ns"], facts["noisy"]) == ("60", "500", "yes")
    # Several threads spend more CPU than time passes: only the pressure says anything.
    two = host._noise([launch, worse], threads=2)
    assert (two["waiting_share"], two["noisy"]) == ("unknown", "no")


def test_a_system_without_proc_says_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "read", lambda path: "")
    monkeypatch.setattr(cpu, "flags", lambda: frozenset())
    facts = Host().facts()
    assert (facts["flags"], facts["governor"], facts["mhz"], facts["pressure_avg10"]) == ("unknown",) * 4
    assert all(facts.values())
    _, report = interleaved(2, warmup=0)
    noise = host._noise([report], threads=2)
    assert (noise["pressure_share"], noise["pressure_us"], noise["noisy"]) == ("unknown",) * 3


def test_reads_the_clock_and_the_pressure_of_a_machine_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # Formats: Linux Documentation/accounting/psi.rst and admin-guide/pm/cpufreq.rst (kHz).
    files = {
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 7763\ncpu MHz\t\t: 2450.0\n\nmodel name\t: another\n",
        "/proc/pressure/cpu": (
            "some avg10=12.50 avg60=3.84 avg300=2.52 total=17933155\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7"
        ),
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000",
    }
    monkeypatch.setattr(cpu, "read", lambda path: files.get(path, ""))
    monkeypatch.setattr(cpu, "flags", lambda: frozenset())  # they are asked once a process
    facts = Host().facts()
    assert (facts["cpu"], facts["governor"], facts["mhz"]) == ("AMD EPYC 7763", "performance", "1500")
    assert facts["pressure_avg10"] == "12.50"
    assert cpu.stalled_us() == 17933155
    del files["/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"]
    assert Host().facts()["mhz"] == "2450.0"


def test_no_network_pays_for_the_import_of_tensorflow(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr("anytime.tf.tensorflow", lambda: told.append("imported"))
    monkeypatch.setattr(Sizes, "format", "tflite")
    monkeypatch.setattr(Sizes, "open", lambda self, threads: told.append("opened"))
    monkeypatch.setattr(stopwatch, "_interleave", lambda *_: {})
    (tmp_path / "jobs").write_bytes(pickle.dumps((1, 0, 1, 1, [(Sizes(chain(1), {}, simulated=False), None)], X)))
    stopwatch._child(str(tmp_path / "jobs"), str(tmp_path / "report"))
    assert told == ["imported", "opened"]
