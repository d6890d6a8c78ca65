"""Two runs side by side: hand-made records, differences counted by hand, and what a user's CI is told."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anytime.__main__ import main
from anytime.compare import (
    Pair,
    _apart,
    _boards,
    _differing,
    _judge,
    _spent_apart,
    _welch,
    as_json,
    as_markdown,
    compare,
    tolerances,
)
from anytime.errors import UsageError
from anytime.metrics import Interval, paired_loss, wilson
from tests.golden.make import EXP, Cell, Maker, N, first

ORT = "ONNX Runtime"


def side(root: Path, name: str) -> Maker:
    """A results folder of its own."""
    return Maker(root / name / "records")


def run(to: Maker, wrong=4, ms=0.5, size=300_000, **more) -> Cell:
    """One network with two exits, a policy and its times."""
    return (
        Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch")
        .eval([first(8), first(wrong)], size=size, **more)
        .decide(20)
        .measure(ms, 2 * ms)
    )


def compared(tmp_path, *said):
    return compare(str(tmp_path / "a"), str(tmp_path / "b"), tmp_path, tolerances(said))


def of(said, metric, asked="exit 2"):
    (pair,) = (p for p in said.pairs if (p.metric, p.asked) == (metric, asked))
    return pair


def test_a_run_beside_itself_is_equal_everywhere(tmp_path, capsys):
    for name in "ab":
        run(side(tmp_path, name))
    said = compared(tmp_path)
    assert {p.verdict for p in said.pairs} == {"equal"} and not said.only_a + said.only_b + said.made_a + said.made_b
    # Two exits and a policy, each with accuracy and MACs and size; agreement of exits and policy; times of two exits.
    assert len(said.pairs) == 3 * 4 + 2
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "0 worse" in capsys.readouterr().out


def test_a_loss_is_paired_sample_by_sample_and_is_worse_beyond_the_tolerance_and_the_noise(tmp_path):
    run(side(tmp_path, "a"), wrong=2)
    run(side(tmp_path, "b"), wrong=14)
    pair = of(compared(tmp_path), "accuracy")
    right = [np.arange(N) >= n for n in (2, 14)]
    loss = paired_loss(*right)
    assert (pair.how, pair.verdict) == ("paired", "worse") and (pair.a, pair.b) == (38 / 40, 26 / 40)
    assert (pair.value, pair.lo, pair.hi) == pytest.approx((-30.0, -100 * loss.hi, -100 * loss.lo))
    assert of(compared(tmp_path, "accuracy=30"), "accuracy").verdict == "within tolerance"
    assert of(compared(tmp_path, "accuracy=29.9points"), "accuracy").verdict == "worse"
    back = compare(str(tmp_path / "b"), str(tmp_path / "a"), tmp_path, tolerances([]))
    assert of(back, "accuracy").verdict == "better" and back.count("worse") == 0


def test_what_the_interval_leaves_open_is_noise_and_not_worse(tmp_path):
    run(side(tmp_path, "a"), wrong=4)
    run(side(tmp_path, "b"), wrong=5)
    pair = of(compared(tmp_path), "accuracy")
    assert pair.value == pytest.approx(-2.5) and pair.lo < -2.5 < 0 < pair.hi and pair.verdict == "within noise"


@pytest.mark.parametrize("what", ["other labels", "other seeds", "no predictions"])
def test_accuracies_that_cannot_be_paired_are_said_to_be_apart(tmp_path, what):
    a, b = side(tmp_path, "a"), side(tmp_path, "b")
    run(a, wrong=2)
    if what == "other seeds":
        Cell(b, 0, "B-LeNet", "FP32", "FP32", "torch", 1).eval([first(8), first(14)])
    else:
        run(b, wrong=14)
        (path,) = b.folder.glob("*-eval-*.npz")
        with np.load(path) as file:
            said = dict(file)
        if what == "other labels":
            np.savez(path, **{**said, "labels": said["labels"][::-1], "argmax": said["argmax"][:, ::-1]})
        else:
            path.unlink()
    comparison = compared(tmp_path)
    pair = of(comparison, "accuracy")
    assert pair.how == "unpaired" and pair.value == pytest.approx(-30.0) and pair.verdict == "worse"
    assert bool(comparison.troubles) == (what == "no predictions")


def test_what_policies_spend_is_noise_within_their_own_limits():
    a, b = ({"macs": m, "budget_violation": v, "budget_violation_lo": v - w, "budget_violation_hi": v + w} for m, v, w in
            ((1.0e6, 0.0, 0.04), (1.03e6, 0.03, 0.03)))  # fmt: skip
    lo, hi = _spent_apart(a, b)
    assert lo == pytest.approx(1.03 * math.exp(-math.hypot(math.log(1.03 / 1.0), math.log(1.04))))
    assert hi == pytest.approx(1.03 * math.exp(math.hypot(math.log(1.06 / 1.03), math.log(1 / 0.96))))
    pair = Pair("d", "m", "b", "p", "", "macs", 1.0e6, 1.03e6, 1.03, lo, hi)
    _judge(pair, 1.01)
    assert pair.verdict == "within noise"


def test_limits_of_two_seeds_that_reach_below_nothing_say_nothing():
    a, b = (
        {"macs": m, "budget_violation": -0.2, "budget_violation_lo": -1.47, "budget_violation_hi": 1.07} for m in (1.0e6, 2.0e6)
    )
    pair = Pair("d", "m", "b", "p", "", "macs", 1.0e6, 2.0e6, 2.0, *_spent_apart(a, b))
    _judge(pair, 1.01)
    assert pair.verdict == "within noise"


def test_fields_of_specs_that_differ_are_named():
    a, b = (
        {"is": "Cell", "recipe": {"is": "Recipe", "epochs": n, "loss": {"is": loss}}, "seed": n}
        for n, loss in ((1, "A"), (60, "B"))
    )
    assert list(_differing(a, b | {"new": 1})) == [("recipe.epochs", 1, 60), ("recipe.loss", "A", "B")]


def test_what_one_side_leaves_to_a_default_is_said_where_the_other_differs_from_it_and_of_which_network(tmp_path):
    defaults = {"Recipe 1": {"epochs": 30, "loss": {"is": "CE", "version": 1}}}
    for name, epochs, told in (("a", 60, defaults), ("b", 30, {"Recipe 1": {**defaults["Recipe 1"], "cutout": 0}})):
        to = side(tmp_path, name)
        for i, model in enumerate(("LeNet", "B-LeNet")):
            cell = Cell(to, i, model, "FP32", "FP32", "torch")
            recipe = {"is": "Recipe", "version": 1, "epochs": epochs if i else 30} | ({"cutout": 8} if name == "a" and i else {})
            cell.spec, cell.facts = cell.spec | {"recipe": recipe}, cell.facts | {"defaults": told}
            cell.eval([first(8), first(2 if name == "a" else 14)])
    said = compared(tmp_path)
    assert said.count("worse") and sorted(said.made_a) == ["B-LeNet: recipe.cutout 8", "B-LeNet: recipe.epochs 60"]
    assert sorted(said.made_b) == ["B-LeNet: recipe.cutout 0", "B-LeNet: recipe.epochs 30"], "cutout came after its record"


def test_two_samples_have_newcombe_s_interval():
    # Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10.
    value, lo, hi = _apart(Interval(*wilson(48, 80)), Interval(*wilson(56, 70)))
    assert (value, lo, hi) == pytest.approx((20.0, 5.24, 33.39), abs=0.01)


def test_sizes_macs_and_times_are_ratios(tmp_path):
    run(side(tmp_path, "a"))
    run(side(tmp_path, "b"), size=306_000, ms=0.6)
    said = compared(tmp_path)
    assert of(said, "size_bytes").value == pytest.approx(1.02) and of(said, "size_bytes").verdict == "worse"
    assert of(said, "macs").verdict == "equal"
    pair = of(said, "latency_ms_p50")  # these records hold no means
    assert (pair.value, pair.lo, pair.board, pair.verdict) == (
        pytest.approx(1.2),
        None,
        "host",
        "worse",
    ) and pair.how == "no interval"
    lenient = compared(tmp_path, "size_bytes=1.02x,latency_ms_mean=1.3")
    assert lenient.count("worse") == 0 and of(lenient, "latency_ms_p50").verdict == "within tolerance"


def test_on_a_busy_machine_cpu_time_is_compared(tmp_path):
    for name, noisy in (("a", False), ("b", True)):
        Cell(side(tmp_path, name), 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)]).measure(0.5, noisy=noisy)
    assert of(compared(tmp_path), "cpu_ms", "exit 1").board == "host"


@pytest.mark.parametrize("name, a, b", [("flags", "avx2 avx512_vnni", "avx2 avx_vnni"), ("threads", "1", "2")])
def test_times_of_another_machine_are_neither_better_nor_worse(tmp_path, capsys, name, a, b):
    for of_side, told, ms in (("a", a, 0.5), ("b", b, 0.9)):
        to = side(tmp_path, of_side)
        run(to, ms=ms)
        for path in to.folder.glob("*measure*"):
            said = json.loads(path.read_text())
            said["facts"]["device"] |= {name: told, "onnxruntime": told}  # what it runs is what one may want to compare
            path.write_text(json.dumps(said))
    said = compared(tmp_path)
    assert {p.verdict for p in said.pairs if p.board} == {"not comparable"}
    pair = of(said, "latency_ms_p50")
    assert (pair.a, pair.b, pair.value, pair.how) == (1.0, 1.8, None, "another machine")
    assert said.machines == [f"host: {name} {a} in A, {b} in B"]
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert text.count("in A, ") == 1 and "| 1.000 ms | 1.800 ms |  | another machine |" in text and "2 not comparable" in text


def test_a_machine_of_which_one_side_tells_less_is_taken_for_the_same(tmp_path):
    for name, ms in (("a", 0.5), ("b", 0.9)):
        run(side(tmp_path, name), ms=ms)
    (path,) = (tmp_path / "b" / "records" / EXP).glob("*measure*")
    path.write_text(path.read_text().replace('"threads": "1"', '"flags": "avx2"'))
    assert of(compared(tmp_path), "latency_ms_p50").verdict == "worse"


def test_times_of_several_sessions_have_an_interval(tmp_path):
    for name, means in (("a", (1.0, 1.1)), ("b", (1.0, 1.4, 1.2))):
        cell = Cell(side(tmp_path, name), 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)])
        for i, mean in enumerate(means):
            exits = [{"exit": 0, "n": 256, "latency_ms_p50": mean, "latency_ms_mean": mean}]
            cell.record("measure", "measure-host", {"session": f"s{i}"}, board="host", exits=exits)
    pair = of(compared(tmp_path), "latency_ms_mean", "exit 1")
    assert pair.how == "2 and 3 sessions" and pair.lo < 1 < pair.value < pair.hi and pair.verdict == "within noise"


apart = st.lists(st.integers(500, 2000), min_size=2, max_size=6, unique=True)  # scipy warns of what is nearly equal


@given(apart, apart)
def test_the_interval_over_sessions_is_welch_s(a, b):
    expected = stats.ttest_ind(np.log(b), np.log(a), equal_var=False).confidence_interval(0.95)
    assert np.log(_welch(a, b)) == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_what_only_one_has_is_listed_and_a_new_failure_is_worse(tmp_path):
    a, b = side(tmp_path, "a"), side(tmp_path, "b")
    run(a)
    Cell(a, 1, "LeNet", "PTQ", "INT8 PTQ", ORT).eval([first(3)], 8)
    Cell(a, 2, "LeNet", "FP32", "FP32", "torch").eval([first(3)])
    Cell(b, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20, budget=0.5)
    Cell(b, 1, "LeNet", "PTQ", "INT8 PTQ", ORT).miss("fail", "eval", "the loss is NaN")
    Cell(b, 3, "B-LeNet", "QAT", "INT8 QAT", ORT).eval([first(8), first(4)])
    said = compared(tmp_path)
    assert said.only_a == [
        "Toy, B-LeNet, FP32: Entropy at 0.75 macs, refitted", "Toy, B-LeNet, FP32: its times on host",
        "Toy, LeNet, PTQ: exit 1 (fail: the loss is NaN)", "Toy, LeNet, FP32",
    ]  # fmt: skip
    assert said.only_b == ["Toy, B-LeNet, FP32: Entropy at 0.5 macs, refitted", "Toy, B-LeNet, QAT"]
    (worse,) = (p for p in said.pairs if p.verdict == "worse")
    assert (worse.metric, worse.a, worse.b) == ("status of eval", "done", "fail: the loss is NaN")
    text = as_markdown(said, tolerances([]))
    assert said.lost == 3 and "3 lost (in A, not in B), " in text, "a policy, an exit and a network"
    assert "## Only in A" in text and "fail: the loss is NaN" in text
    assert all(isinstance(p["verdict"], str) for p in json.loads(as_json(said, tolerances([])))["pairs"])


def test_what_the_other_side_never_tried_is_no_failure(tmp_path):
    a, b = side(tmp_path, "a"), side(tmp_path, "b")
    Cell(a, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)])
    Cell(b, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).miss("fail", "measure", "it burns", "host")
    assert not any(p.metric.startswith("status") for p in compared(tmp_path).pairs)
    Cell(a, 0, "B-LeNet", "FP32", "FP32", "torch").measure(0.5, 1.0)
    (failed,) = (p for p in compared(tmp_path).pairs if p.metric.startswith("status"))
    assert (failed.metric, failed.board, failed.verdict) == ("status of measure", "host", "worse")


def test_what_b_has_lost_fails_and_what_another_experiment_never_had_does_not(tmp_path, capsys):
    for name in "ab":
        run(side(tmp_path, name))
    a, b = (tmp_path / name / "records" / EXP for name in "ab")
    next(b.glob("*decide*.json")).unlink()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "1 lost (in A, not in B), " in capsys.readouterr().out
    b.rename(b.with_name("other"))
    assert main(["compare", str(a), str(b.with_name("other"))]) == 0


def test_networks_are_paired_whatever_else_lies_beside_them(tmp_path):
    def epochs(n, cell):
        cell.spec = cell.spec | {"recipe": {**cell.spec["recipe"], "epochs": n}}
        cell.name += f"-{n}"
        return cell.eval([first(8), first(2 if n == 4 else 14)])

    new = lambda to, n: epochs(n, Cell(to, 0, "B-LeNet", "PTQ", "INT8 PTQ", "torch"))  # noqa: E731
    a, b, c = (side(tmp_path, name) for name in "abc")
    new(a, 4)
    new(b, 4)
    new(b, 9)  # now both of b have a variant
    assert {p.verdict for p in compared(tmp_path).pairs} == {"equal"} and not compared(tmp_path).only_a
    new(c, 9)
    said = compare(str(tmp_path / "a"), str(tmp_path / "c"), tmp_path, tolerances([]))
    assert said.count("worse") and not said.only_a and not said.only_b, "of another recipe, but there is no other it could be"


def test_two_experiments_of_other_names_are_compared_and_settings_that_differ_are_said(tmp_path):
    run(side(tmp_path, "a"))
    b = side(tmp_path, "b")
    run(b)
    b.folder.rename(b.folder.with_name("other"))
    for path in b.folder.with_name("other").glob("*.json"):
        path.write_text(path.read_text().replace('"2.13.0"', '"2.14.0"'))
    said = compare(str(b.folder.with_name("other")), EXP, tmp_path / "a", tolerances([]))
    assert {p.verdict for p in said.pairs} == {"equal"}
    assert (said.made_a, said.made_b) == (["versions: numpy 2.4.6, torch 2.14.0"], ["versions: numpy 2.4.6, torch 2.13.0"])


def test_folders_of_several_experiments_are_paired_by_name(tmp_path):
    for name in "ab":
        to = side(tmp_path, name)
        run(to)
        (to.folder.parent / f"only-{name}").mkdir()
        (to.folder.parent / f"only-{name}" / "1.json").write_text(next(to.folder.glob("*eval*.json")).read_text())
    said = compared(tmp_path)
    assert (said.only_a, said.only_b) == (["the experiment only-a"], ["the experiment only-b"]) and said.pairs


@pytest.mark.parametrize(
    "said, sentence",
    [
        ("acuracy=1", "did you mean 'accuracy'"),
        ("accuracy=much", "a number of 0 or more in points"),
        ("accuracy=-1", "a number of 0 or more in points"),
        ("macs=0.9", "a number of 1 or more in x"),
        ("macs=2points", "a number of 1 or more in x"),
        ("macs=nan", "a number of 1 or more in x"),
        ("loss_upper=1", "no metric 'loss_upper'"),
    ],
)
def test_a_tolerance_that_cannot_be_meant(said, sentence):
    with pytest.raises(UsageError, match="--tolerance") as caught:
        tolerances([said])
    assert sentence in str(caught.value)


def test_what_cannot_be_compared_is_one_sentence(tmp_path, capsys):
    run(side(tmp_path, "a"))
    Cell(side(tmp_path, "b"), 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)])
    run(to := side(tmp_path, "two"))
    (to.folder.parent / "more").mkdir()
    (to.folder.parent / "more" / "1.json").write_text("{}")
    to.folder.rename(to.folder.with_name("other"))
    for b, sentence in (
        ("b", "have nothing in common"),
        ("two", "no experiment of one name is in both"),
        ("c", "neither a folder with records nor an experiment"),
    ):
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / b)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("anytime: ") and sentence in err and err.count("\n") == 1


def test_scripts_get_an_exit_code_json_and_silence(tmp_path, capsys):
    run(side(tmp_path, "a"), wrong=2)
    run(side(tmp_path, "b"), wrong=14)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["compare", *both, "--quiet"]) == 1 and capsys.readouterr().out == ""
    assert main(["compare", *both, "--json", "--tolerance", "accuracy=40"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["worse"] == 0 and said["tolerance"]["accuracy"] == 40


@given(st.floats(0.5, 2), st.floats(1, 2))
def test_worse_one_way_is_better_the_other_way(ratio, allowed):
    verdicts = []
    for value in (ratio, 1 / ratio):
        pair = Pair("", "", "", "", "", "macs", 1.0, value, value)
        _judge(pair, allowed)
        verdicts.append(pair.verdict)
    if abs(abs(math.log(ratio)) - math.log(allowed)) > 1e-6 and ratio != 1:
        assert sorted(verdicts) in (["better", "worse"], ["within tolerance"] * 2)
        assert (verdicts[0] == "worse") == (ratio > allowed)


def test_a_policy_that_can_no_longer_be_executed_is_worse(tmp_path):
    for name in "ab":
        cell = run(side(tmp_path, name))
        if name == "a":
            said = {"n": 40, "latency_ms_p50": 1.0, "latency_ms_mean": 1.0}
            cell.record("replay", "replay", board="host", points=[{**cell.point, **said}])
        else:
            asked = {n: cell.point[n] for n in ("policy_label", "budget", "arm")}
            cell.record("fail", "replay", asked, of="replay", board="host", reason="it burns")
    (worse,) = (p for p in compared(tmp_path).pairs if p.verdict == "worse")
    assert (worse.metric, worse.board, worse.b) == ("status of replay", "host", "fail: it burns")


def test_what_a_board_says_is_compared_with_the_same_board():
    ours, theirs = {"agx": "A on agx", "nx": "A on nx"}, {"nx": "B on nx"}
    assert _boards("board_accuracy", ours, theirs) == {"nx": ("A on nx", "B on nx")}
    assert _boards("int8_macs_share", ours, theirs) == {"": ("A on nx", "B on nx")}
    assert _boards("accuracy", {"agx": "A"}, {"": "B"}) == {"": ("A", "B")}
