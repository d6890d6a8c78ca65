"""The report: hand-made records to hand-counted rows, and a golden table.

Expected tables lie in tests/golden/tables; after a deliberate change, write them again and read the diff:

    python -m tests.golden.make
"""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from anytime import figures, report
from anytime.decided import over_seeds
from anytime.errors import UsageError, WriteError
from anytime.metrics import METRICS, paired_loss, wilson
from anytime.page import page
from anytime.record import load, newest
from anytime.rows import COLUMNS, mark_front
from anytime.tables import pivot
from tests.golden.make import EXP, LABELS, Cell, Maker, N, first, make

REPO = Path(__file__).parents[1]
GOLDEN = REPO / "tests/golden"
ORT = "ONNX Runtime"


@pytest.fixture(scope="module")
def golden() -> pd.DataFrame:
    return report.rows(GOLDEN / "records", EXP)


@pytest.fixture
def to(tmp_path: Path) -> Maker:
    return Maker(tmp_path / "records")


def rows_of(to: Maker) -> pd.DataFrame:
    return report.rows(to.folder.parent, EXP)


def pick(rows: pd.DataFrame, **where: Any) -> pd.DataFrame:
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows


def one(rows: pd.DataFrame, **where: Any) -> dict[str, Any]:
    found = pick(rows, **where)
    assert len(found) == 1, f"{where}: {len(found)} rows"
    return dict(found.iloc[0])


def right(wrong: set[int]) -> np.ndarray:  # type: ignore[type-arg]
    return np.array([n not in wrong for n in range(N)])


# The golden table ------------------------------------------------------------------------------------------------


def test_the_committed_records_are_those_of_make(tmp_path: Path) -> None:
    make(tmp_path / "records")
    ours, theirs = tmp_path / "records" / EXP, GOLDEN / "records" / EXP
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in ours.glob("*.json"):
        assert path.read_text() == (theirs / path.name).read_text()


@pytest.mark.parametrize("fmt", ["md", "csv", "tex"])
def test_golden_table(tmp_path: Path, fmt: str) -> None:
    path, figure = report.write(GOLDEN / "records", EXP, tmp_path, [fmt])
    assert (path, figure) == (tmp_path / "tables" / f"golden.{fmt}", tmp_path / "figures" / "golden.svg")
    assert path.read_text() == (GOLDEN / "tables" / path.name).read_text(), "read the diff, then: python -m tests.golden.make"
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing temporary is left"


def test_the_same_records_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from anytime import report; report.write(*map(eval, sys.argv[1:]))"
    written = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        args = [f"Path({str(GOLDEN / 'records')!r})", repr(EXP), f"Path({str(out)!r})"]
        subprocess.run([sys.executable, "-c", code, *args], cwd=REPO, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
        written.append({p.name: p.read_bytes() for p in out.rglob("*.*")})
    assert sorted(written[0]) == ["golden.csv", "golden.md", "golden.svg", "golden.tex"]
    assert written[0] == written[1]


def test_torch_is_never_imported() -> None:
    code = "import sys; from anytime import report, figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


# Rows, counted by hand -------------------------------------------------------------------------------------------


def test_the_columns_that_were_promised_come_first(golden: pd.DataFrame) -> None:
    # The words of the issue.
    words = """
        exp model dataset backend execution policy arm budget board train_seeds n accuracy accuracy_lo accuracy_hi macs bops
        params size_bytes latency_ms_p50 latency_ms_p90 latency_ms_p99 cpu_ms speedup speedup_over agreement int8_macs_share
        status reason
    """
    promised = re.findall(r"\w+", words)
    assert list(golden.columns[: len(promised)]) == promised
    assert METRICS.keys() <= set(golden.columns), "every column that the glossary explains is there"


def test_one_seed_has_wilson_s_interval(golden: pd.DataFrame) -> None:
    row = one(golden, model="LeNet", backend="FP32")
    assert (row["policy"], row["exit"], row["n"], row["train_seeds"], row["of"]) == ("exit 1", 0, 40, "0", "measure")
    assert (row["accuracy"], row["accuracy_lo"], row["accuracy_hi"]) == wilson(37, 40)
    assert (row["macs"], row["bops"], row["params"], row["size_bytes"]) == (1e5, 1e5 * 1024, 1e4, 3e5)


def test_training_seeds_are_folded_with_a_t_interval(golden: pd.DataFrame) -> None:
    row = one(golden, model="B-LeNet", backend="FP32", policy="exit 2")
    assert row["train_seeds"] == "0,1" and row["cell"] == "b-lenet-fp32-0,b-lenet-fp32-1"
    assert row["accuracy"] == pytest.approx((36 / 40 + 34 / 40) / 2)
    assert row["accuracy_lo"] == pytest.approx(0.875 - 12.7062 * 0.025, abs=1e-5)  # t(1), standard error 0.025
    assert row["accuracy_hi"] == 1.0, "an accuracy above 100 % is none"


@given(st.lists(st.floats(0.3, 0.7), min_size=2, max_size=12, unique=True))
def test_the_interval_over_seeds_is_student_s(shares: list[float]) -> None:
    mean, lo, hi = over_seeds(shares)
    expected = stats.t.interval(0.95, len(shares) - 1, loc=np.mean(shares), scale=stats.sem(shares))
    assert mean == pytest.approx(np.mean(shares))
    assert (lo, hi) == pytest.approx(expected, abs=1e-9)


def test_losses_are_paired_with_the_reference_of_the_same_exit(golden: pd.DataFrame) -> None:
    row = one(golden, backend="PTQ", policy="exit 2")
    # FP32 is wrong on 0-3, PTQ on 0-2, 20 and 21: two lost, one won.
    expected = paired_loss(right(first(4)), right(first(3, 20, 21)))
    assert row["loss"] == pytest.approx(1 / 40)
    assert (row["loss"], row["loss_lo"], row["loss_hi"], row["loss_upper"]) == tuple(expected)
    assert pick(golden, reference=True)["loss"].isna().all(), "the reference has no loss against itself"


def test_losses_of_several_seeds_are_paired_seed_by_seed_and_averaged(golden: pd.DataFrame) -> None:
    row = one(golden, backend="OnnxRuntime(of=PTQ)", model="B-LeNet", policy="exit 2")
    each = [paired_loss(right(a), right(b)) for a, b in ((first(4), first(3, 20, 21)), (first(6), first(6, 30)))]
    assert row["loss"] == pytest.approx((1 / 40 + 1 / 40) / 2)
    assert row["loss_upper"] == pytest.approx(np.mean([loss.upper for loss in each]))


def test_a_policy_loses_against_the_refitted_policy_of_the_reference(golden: pd.DataFrame) -> None:
    row = one(golden, backend="OnnxRuntime(of=PTQ)", policy="Entropy", arm="kept")
    each = []
    for fp32, ptq in (((8, 4), (first(8, 10), first(3, 20, 21))), ((10, 6), (first(10, 12), first(6, 30)))):
        theirs = [n not in (first(fp32[1]) if n < 20 else first(fp32[0])) for n in range(N)]  # FP32: the first 20 go on
        ours = [n not in (ptq[1] if n < 10 else ptq[0]) for n in range(N)]  # kept: the first 10 go on
        each.append(paired_loss(np.array(theirs), np.array(ours)))
    assert row["loss"] == pytest.approx(np.mean([loss.value for loss in each]))
    assert row["loss_upper"] == pytest.approx(np.mean([loss.upper for loss in each]))
    assert row["exit_shares"] == "0.750/0.250" and row["exit_flips"] == 0.25


def test_repeated_measurements_are_pooled_with_their_spread(golden: pd.DataFrame) -> None:
    row = one(golden, model="LeNet", backend="OnnxRuntime(of=FP32)")
    assert (row["latency_ms_p50"], row["n_sessions"]) == (pytest.approx(0.45), 2)
    assert row["latency_ms_spread"] == pytest.approx(0.1)
    assert row["noisy"] and math.isnan(row["latency_ms_p99"])
    assert math.isnan(one(golden, model="LeNet", backend="FP32")["latency_ms_spread"]), "one session has no spread"


def test_a_speedup_is_over_fp32_in_the_same_execution_and_names_it(golden: pd.DataFrame) -> None:
    row = one(golden, model="B-LeNet", backend="OnnxRuntime(of=PTQ)", policy="exit 2")
    assert (row["speedup"], row["speedup_over"]) == (pytest.approx(0.45 / 0.2), "LeNet FP32, ONNX Runtime")
    row = one(golden, model="B-LeNet", backend="FP32", policy="Entropy")
    assert (row["speedup"], row["speedup_over"], row["of"]) == (pytest.approx(0.8 / 0.7), "LeNet FP32, torch", "replay")
    assert pick(golden, board="")["speedup"].isna().all() and (pick(golden, board="")["speedup_over"] == "").all()


def test_a_speedup_falls_back_on_the_reference_s_own_execution(to: Maker) -> None:
    Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)]).measure(0.8)
    Cell(to, 1, "LeNet", "OpenVINO(of=PTQ)", "INT8 PTQ", "OpenVINO").eval([first(3)], 8).measure(0.2)
    row = one(rows_of(to), execution="OpenVINO")
    assert (row["speedup"], row["speedup_over"]) == (pytest.approx(4.0), "LeNet FP32, torch")


def test_times_of_an_emulated_board_enter_no_table(to: Maker) -> None:
    cell = Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)])
    exits = [{"exit": 0, "n": 256, "latency_ms_p50": 7.0, "latency_ms_mean": 7.0}]
    cell.record("measure", "measure-nx", {"device": {"emulated": "yes"}}, board="nx", exits=exits)
    rows = rows_of(to)
    assert rows["latency_ms_p50"].isna().all() and "nx" not in set(rows["board"])
    assert any("emulated board" in trouble for trouble in rows.attrs["troubles"])


@pytest.mark.parametrize(
    "sessions, speedup",
    [
        ({"a": 0.5, "b": 1.0, "d": 50.0}, (1.0 / 0.5 + 4.0 / 1.0) / 2),  # a and b are shared; c and d are not
        ({"d": 0.5, "e": 1.5}, 6.5 / 1.0),  # none is shared: the pooled 1, 4, 9 and 100 over the pooled 0.5 and 1.5
        ({"": 0.5}, 6.5 / 0.5),  # a record that does not say its session shares none, not even with its like
    ],
)
def test_a_speedup_is_of_means_within_the_sessions_that_timed_both(to: Maker, sessions: dict[str, float], speedup: float) -> None:
    base = Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)])
    other = Cell(to, 1, "LeNet", "PTQ", "INT8 PTQ", "torch").eval([first(3)], 8)
    for cell, means in ((base, {"a": 1.0, "b": 4.0, "c": 100.0, "": 9.0}), (other, sessions)):
        for session, mean in means.items():
            exits = [{"exit": 0, "n": 256, "latency_ms_p50": 7.0, "latency_ms_mean": mean}]
            cell.record("measure", "measure-host", {"session": session} if session else {}, board="host", exits=exits)
    row = one(rows_of(to), backend="PTQ")
    assert (row["speedup"], row["speedup_over"]) == (pytest.approx(speedup), "LeNet FP32, torch")


def test_a_policy_row_says_of_size_and_agreement_what_holds_for_the_whole_network(golden: pd.DataFrame) -> None:
    row = one(golden, backend="OnnxRuntime(of=PTQ)", policy="Entropy", arm="refitted")
    assert (row["params"], row["packed_bytes"], row["size_bytes"]) == (2e4, 2e4, 9e4)
    assert row["agreement"] == pytest.approx(0.95), "the worst exit's"
    assert row["budget"] == 0.75 and row["spent"] == pytest.approx((24 * 1 + 16 * 2) / 80)


def test_a_skip_and_a_fail_are_rows_with_their_sentence(golden: pd.DataFrame) -> None:
    missed = golden[golden["status"] != "done"]
    assert list(zip(missed["status"], missed["of"], missed["model"], missed["backend"], strict=True)) == [
        ("skip", "measure", "LeNet", "FP16"),
        ("fail", "eval", "LeNet", "QAT(bits=4)"),
        ("skip", "measure", "B-LeNet", "FP16"),
        ("skip", "measure", "B-LeNet", "PTQ"),
        ("skip", "measure", "B-LeNet", "QAT(bits=4)"),
        ("fail", "decide", "B-LeNet", "QAT(bits=4)"),
        ("skip", "eval", "B-LeNet", "TensorRT(of=PTQ)"),
    ]
    assert missed["accuracy"].isna().all() and missed["latency_ms_p50"].isna().all()
    assert one(golden, of="decide", status="fail")["budget"] == 0.25
    assert one(golden, of="eval", status="fail")["reason"] == "epoch 2, step 7: the loss is NaN; lower the rate"


def test_a_cell_that_no_board_timed_keeps_its_rows(golden: pd.DataFrame) -> None:
    assert list(pick(golden, backend="FP16", model="B-LeNet", status="done")["policy"]) == ["exit 1", "exit 2"]


def test_a_skip_is_gone_once_the_same_fact_is_there(to: Maker) -> None:
    cell = Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)])
    cell.miss("skip", "measure", "not now", "host")
    cell.measure(0.5)
    assert list(rows_of(to)["status"]) == ["done"]
    cell.miss("skip", "measure", "not here", "host")
    assert list(rows_of(to)["status"]) == ["done"], "what another machine could do stays"
    cell.miss("fail", "measure", "not any more", "host")
    assert list(rows_of(to)["status"]) == ["done", "fail"] and rows_of(to)["latency_ms_p50"].isna().all()


def test_what_one_seed_failed_is_a_row_beside_the_other_seed_s(to: Maker) -> None:
    Cell(to, 0, "LeNet", "FP32", "FP32", "torch", 0).eval([first(3)])
    for seed in (1, 2):
        Cell(to, 0, "LeNet", "FP32", "FP32", "torch", seed).miss("fail", "eval", "the loss is NaN")
    rows = rows_of(to)
    assert list(zip(rows["status"], rows["train_seeds"], strict=True)) == [("done", "0"), ("fail", "1,2")]


@settings(max_examples=12, deadline=None)
@given(keep=st.sets(st.integers(0, 45)))
def test_no_row_is_ever_lost(tmp_path_factory: pytest.TempPathFactory, keep: set[int]) -> None:
    """Whatever part of the records is there: every exit, decision, skip and failure has its row."""
    root = tmp_path_factory.mktemp("some")
    (root / EXP).mkdir()
    for path in (GOLDEN / "records" / EXP).iterdir():
        if int(path.name[:3]) in keep | {900}:
            (root / EXP / path.name).symlink_to(path)
    rows = report.rows(root, EXP)
    there = {(r.cell, e["exit"]) for r, _ in load(root).records if r.kind == "eval" for e in r.exits}
    exits = rows[rows["exit"].notna()]
    assert there <= {(cell, e) for cells, e in zip(exits["cell"], exits["exit"], strict=True) for cell in cells.split(",")}
    decided = {(r.cell, p["arm"]) for r, _ in load(root).records if r.kind == "decide" for p in r.points}
    policies = rows[(rows["policy"] == "Entropy") & (rows["status"] == "done")]
    assert decided <= {
        (cell, arm) for cells, arm in zip(policies["cell"], policies["arm"], strict=True) for cell in cells.split(",")
    }
    missed = [r for r, _ in newest(load(root).records).values() if r.kind in ("skip", "fail")]
    assert len(missed) == (rows["status"] != "done").sum()
    for fmt in ("text", "md", "csv", "tex"):
        assert report.show(rows, fmt)
    assert "900-torn.json" in report.show(rows, "md")


def test_a_replay_without_its_decision_says_so(to: Maker) -> None:
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20).replay(0.7)
    next(to.folder.glob("*decide*")).unlink()
    row = one(rows_of(to), policy="Entropy")
    assert (row["reason"], row["latency_ms_p50"]) == ("the decide record is missing", 0.7) and cell.point["budget"] == 0.75
    assert math.isnan(row["accuracy"])


def test_budgets_in_milliseconds_belong_to_a_board(to: Maker) -> None:
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)])
    cell.point = {"policy_label": "Entropy", "arm": "refitted", "budget": 2.0, "currency": "ms", "n": N}
    for board, n_right in (("agx", 36), ("nx", 30)):
        said = cell.point | {"accuracy": n_right / N, "n_right": n_right}
        cell.record("decide", f"ms-{board}", board=board, points=[said])
        cell.record("replay", f"ms-{board}-replay", board=board, points=[said | {"latency_ms_p50": 1.0}])
    rows = pick(rows_of(to), policy="Entropy")
    assert list(zip(rows["board"], rows["accuracy"], rows["of"], strict=True)) == [("agx", 0.9, "replay"), ("nx", 0.75, "replay")]
    assert "2 ms" in report.show(rows_of(to), "md")


def test_runs_under_other_settings_are_told_apart_and_not_folded(to: Maker) -> None:
    for epochs, wrong in ((4, 3), (1, 9)):
        for position, backend, execution in ((0, "FP32", "torch"), (1, "PTQ", "fake-quant")):
            cell = Cell(to, position, "LeNet", backend, backend, execution)
            cell.name += f"-{epochs}"
            cell.spec["recipe"] = {"is": "Recipe", "version": 1, "epochs": epochs}
            cell.eval([first(wrong)])
    rows = rows_of(to)
    assert sorted(set(rows["variant"])) == ["recipe.epochs=1", "recipe.epochs=4"]
    assert (pick(rows, backend="PTQ")["loss"] == 0).all(), "each is paired with the reference of its own settings"
    assert "LeNet (recipe.epochs=1)" in report.show(rows)


@pytest.mark.parametrize("said, loss", [(0, 0.1), (1, None)])
def test_a_field_that_came_later_parts_no_network_from_its_reference(to: Maker, said: int, loss: float | None) -> None:
    Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)])  # of before the field came
    later = Cell(to, 1, "LeNet", "PTQ", "INT8 PTQ", "torch")
    later.spec["recipe"] = {"is": "Recipe", "version": 1, "epochs": 4, "warmup": said}
    later.facts["defaults"] = {"Recipe 1": {"epochs": 1, "warmup": 0}}
    later.eval([first(7)])
    row = one(rows_of(to), backend="PTQ")
    assert row["loss"] == pytest.approx(loss) if loss is not None else np.isnan(row["loss"])


def test_bits_and_the_noisiest_layer_come_from_the_layers_of_the_record(to: Maker) -> None:
    def layer(name: str, bits: int, macs: int, db: float | None) -> dict[str, object]:
        return {"layer": name, "weight_bits": bits, "activation_bits": bits, "macs": macs, "sqnr_db": db}

    Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(4)], layers=(layer("stages.0.0", 32, 1000, None),))
    few = (layer("stages.0.0", 8, 100, 30.0), layer("stages.0.1", 4, 700, 12.25), layer("heads.0.0", 4, 200, None))
    Cell(to, 1, "LeNet", "PTQ", "INT4 PTQ", "fake-quant").eval([first(4)], layers=few)
    table = rows_of(to)
    assert (one(table, backend="FP32")["macs_by_bits"], one(table, backend="FP32")["worst_layer"]) == ("", "")
    row = one(table, backend="PTQ")
    assert row["macs_by_bits"] == "W4A4 90.0 %, W8A8 10.0 %" and row["worst_layer"] == "stages.0.1 12.2 dB"


def test_a_network_is_paired_with_itself_without_exits(to: Maker) -> None:
    static = Cell(to, 0, "LeNet", "FP32", "FP32", "torch")
    static.spec["model"] = {"is": "Static", "version": 1, "of": {"is": "BLeNet", "version": 1}}
    static.eval([first(4)])
    Cell(to, 1, "B-LeNet", "FP32", "FP32", "torch").eval([first(9), first(3, 20, 21)]).decide(20)
    other = Cell(to, 2, "B-LeNet", "PTQ", "INT8 PTQ", "fake-quant")
    other.spec["recipe"]["epochs"] = 5  # a recipe of its own: still the same data
    other.eval([first(9), first(5)])
    table = rows_of(to)
    row = one(table, model="B-LeNet", backend="FP32", exit=1)
    want = paired_loss(right(first(4)), right(first(3, 20, 21)))
    assert tuple(row[f"static_loss{limit}"] for limit in ("", "_lo", "_hi", "_upper")) == tuple(want)
    assert row["static_macs"] == 2.0  # the static one has 100 kMACs, this exit 200
    policy = one(table, model="B-LeNet", policy="Entropy")
    assert policy["static_macs"] == pytest.approx(policy["macs"] / 100_000) and not math.isnan(policy["static_loss"])
    assert one(table, backend="PTQ", exit=1)["static_loss"] == pytest.approx(1 / 40)
    assert table[table["model"] == "LeNet"]["static_loss"].isna().all()


def test_answers_that_are_not_those_of_the_exit_taken_have_no_paired_loss(to: Maker) -> None:
    Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20)
    cell = Cell(to, 1, "B-LeNet", "PTQ", "INT8 PTQ", "fake-quant").eval([first(8), first(4)]).decide(20)
    assert one(rows_of(to), backend="PTQ", policy="Entropy")["loss"] == 0
    path = next(to.folder.glob(f"*decide-{cell.name}*"))
    said = json.loads(path.read_text())
    said["points"][0] |= {"n_right": 37, "accuracy": 37 / N}
    path.write_text(json.dumps(said))
    assert math.isnan(one(rows_of(to), backend="PTQ", policy="Entropy")["loss"])


@pytest.mark.parametrize("what", ["attachment", "lost attachment", "taken", "points", "exits"])
def test_what_cannot_be_read_is_a_sentence_and_the_rest_stays(to: Maker, what: str) -> None:
    Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20)
    cell = Cell(to, 1, "B-LeNet", "PTQ", "INT8 PTQ", "fake-quant").eval([first(8), first(4)]).decide(20)
    evaluated, decided = (next(to.folder.glob(f"*-{kind}-{cell.name}*.json")) for kind in ("eval", "decide"))
    if what == "attachment":
        evaluated.with_suffix(".npz").write_bytes(b"PK\x03\x04 torn")
    elif what == "lost attachment":
        evaluated.with_suffix(".npz").unlink()
    elif what == "exits":
        evaluated.write_text(json.dumps(json.loads(evaluated.read_text()) | {"exits": []}))
    else:
        said = json.loads(decided.read_text())
        said["points"] = [said["points"][0] | {"taken": "AAAA"}] if what == "taken" else [{"budget": 1.0}]
        decided.write_text(json.dumps(said))
    rows = rows_of(to)
    (trouble,) = rows.attrs["troubles"]
    assert "read" in trouble or "lacks" in trouble
    assert str(to.folder) not in trouble, "where the checkout lies is no part of a committed table"
    assert trouble in report.show(rows, "md").partition("## Records left out, and why")[2]
    assert "Unreadable files: 1" in report.show(rows)
    assert len(pick(rows, backend="FP32")) == 3, "its neighbours are whole"
    assert len(pick(rows, backend="PTQ")) == {"points": 2, "exits": 1}.get(what, 3)


def test_what_was_read_and_gave_way_is_named_with_its_reason_and_is_not_called_unreadable(to: Maker) -> None:
    """Other numbers of one fact, times of a network that is another now, and other labels than the reference was asked of."""
    Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)])
    cell = Cell(to, 1, "B-LeNet", "PTQ", "INT8 PTQ", "fake-quant").eval([first(8), first(4)], 8).measure(0.5, 1.0)
    cell.eval([first(8), first(5)], 8)
    npz = max(to.folder.glob("*.npz"))
    with np.load(npz) as file:
        said = dict(file)
    np.savez(npz, **said | {"labels": said["labels"][::-1], "argmax": said["argmax"][:, ::-1]})
    rows = rows_of(to)
    assert len(rows.attrs["troubles"]) == 3
    for text in (report.show(rows), report.show(rows, "md"), page(rows, to.folder.parent, to.folder, to.folder)):
        assert "nreadable" not in text
    for trouble in rows.attrs["troubles"]:
        assert " left out: " in trouble and trouble in report.show(rows, "md").partition("## Records left out, and why")[2]
    (to.folder / "torn.json").write_text("{")
    assert "Unreadable files: 1; " in report.show(rows_of(to))


# Decisions -------------------------------------------------------------------------------------------------------


def decided(cell: Cell, early: int, arm: str, policy: str = "MaxProb", **said: Any) -> None:
    """A decision as it is recorded since arms are compared; the first ``40 - early`` samples go on to exit 2."""
    cell.decide(early, arm, flips=said.pop("flips", None))
    path = sorted(cell.to.folder.glob(f"*decide-{cell.name}*"))[-1]
    record = json.loads(path.read_text())
    point = record["points"][0]
    point |= {"policy_label": policy, "bound": False, "resamples": 500, "reference": {"macs": 2e5, "bops": 2e5 * 1024}} | said
    record["fact"] += f"{policy}{said.get('budget', '')}"
    path.write_text(json.dumps(record))


def armed(to: Maker) -> pd.DataFrame:
    curve = {"n_right": [32, 36], "macs": [1e5, 2e5], "bops": [6.4e6, 1.28e7], "counts": [[40, 0], [0, 40]]}
    fp32 = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)])
    decided(fp32, 20, "refitted", policy_position=0, regret=0.0, budget_violation=0.0, curve=curve, area=0.85)
    decided(fp32, 20, "retrained", policy_position=0, regret=0.01, flips=0.3)
    same = Cell(to, 1, "B-LeNet", "OnnxRuntime(of=FP32)", "FP32", ORT).eval([first(8), first(4)])
    decided(same, 20, "kept", policy_position=0, regret=0.0, flips=0.0, limits={"regret": [0.0, 0.0], "exit_flips": [0.0, 0.0]})
    ptq = Cell(to, 2, "B-LeNet", "PTQ", "INT8 PTQ", ORT).eval([first(8, 10), first(3, 20, 21)], 8).measure(0.1, 0.2)
    shared = {"policy_position": 0, "earlier_flips": 0.1, "later_flips": 0.15, "harmful_flips": 0.05, "helpful_flips": 0.025}
    limits = {"regret": [0.01, 0.06], "budget_violation": [-0.05, 0.15], "exit_flips": [0.2, 0.3]}
    decided(ptq, 24, "kept", regret=0.04, budget_violation=0.07, flips=0.25, limits=limits, **shared)
    decided(ptq, 24, "share-matched", regret=0.01, budget_violation=0.01, flips=0.2, limits=limits, **shared)
    decided(ptq, 24, "temperature", regret=-0.002, budget_violation=0.03, flips=0.2, limits=limits, **shared)
    decided(
        ptq,
        24,
        "refitted",
        policy_position=0,
        regret=0.0,
        curve=curve,
        nll_reached=[0.5, None],
        reference={"macs": 2e5, "bops": 1e7},
    )
    answers = np.arange(N) >= 2  # an ensemble: it answers more than the exits do
    packed = base64.b64encode(zlib.compress(np.packbits(answers).tobytes())).decode()
    decided(ptq, 24, "refitted", "ZTW", policy_position=1, n_right=38, accuracy=0.95, right=packed)
    decided(ptq, 40, "refitted", "Oracle", policy_position=2, bound=True, accuracy=1.0, n_right=40)
    return rows_of(to)


def test_recovered_is_the_share_of_kept_regret_that_is_gone(to: Maker) -> None:
    ptq = pick(armed(to), backend="PTQ", policy="MaxProb")
    assert one(ptq, arm="share-matched")["recovered"] == pytest.approx(0.75)
    assert one(ptq, arm="temperature")["recovered"] == pytest.approx(1.05) and one(ptq, arm="refitted")["recovered"] == 1
    assert math.isnan(one(ptq, arm="kept")["recovered"])
    row = one(ptq, arm="kept")
    assert (row["budget_violation_lo"], row["budget_violation_hi"]) == (-0.05, 0.15) and row["earlier_flips"] == 0.1


def test_where_kept_thresholds_regret_nothing_there_is_nothing_to_recover(to: Maker) -> None:
    cell = Cell(to, 0, "B-LeNet", "PTQ", "INT8 PTQ", ORT).eval([first(8), first(4)])
    decided(cell, 20, "kept", regret=0.004, limits={"regret": [-0.001, 0.009]})
    decided(cell, 20, "refitted", regret=0.0)
    rows = rows_of(to)
    assert rows["recovered"].isna().all() and one(rows, arm="kept")["regret_lo"] == -0.001


def test_limits_over_several_training_seeds_are_student_s(to: Maker) -> None:
    for seed, regret in enumerate((0.01, 0.03)):
        cell = Cell(to, 0, "B-LeNet", "PTQ", "INT8 PTQ", ORT, seed).eval([first(8), first(4)])
        decided(cell, 20, "kept", regret=regret, limits={"regret": [0.0, 0.1]})
    row = one(rows_of(to), arm="kept")
    assert (row["regret"], row["regret_lo"]) == (pytest.approx(0.02), pytest.approx(0.02 - 12.7062 * 0.01, abs=1e-5))


def test_floors_are_named(to: Maker) -> None:
    rows = pick(armed(to), policy="MaxProb")
    assert {(row["backend"], row["arm"]): row["floor"] for _, row in rows.iterrows() if row["floor"]} == {
        ("FP32", "retrained"): "trained again",
        ("OnnxRuntime(of=FP32)", "kept"): "FP32 by another engine",
    }


def test_a_gain_is_paired_with_the_first_policy_even_of_an_ensemble(to: Maker) -> None:
    rows = armed(to)
    row = one(rows, policy="ZTW")
    others = right({n for n in range(N) if n in (first(3, 20, 21) if n < 16 else first(8, 10))})
    expected = paired_loss(others, right(first(2)))
    assert (row["gain"], row["gain_lo"], row["gain_hi"]) == pytest.approx((-expected.value, -expected.hi, -expected.lo))
    assert pick(rows, policy="MaxProb")["gain"].isna().all()


def test_where_the_first_policy_has_no_answer_no_other_takes_its_place(to: Maker) -> None:
    cell = Cell(to, 0, "B-LeNet", "PTQ", "INT8 PTQ", ORT).eval([first(8), first(4)])
    decided(cell, 20, "refitted", "Fixed", policy_position=1)
    decided(cell, 24, "refitted", "ZTW", policy_position=2)
    assert rows_of(to)["gain"].isna().all()


def test_a_curve_is_read_at_equal_macs_bops_and_latency(to: Maker) -> None:
    row = one(armed(to), backend="PTQ", policy="MaxProb", arm="refitted")
    assert row["accuracy_at_macs"] == pytest.approx(0.8 + 0.1 * 0.5)  # 0.75 of 200 kMACs, half way between both points
    assert row["accuracy_at_bops"] == pytest.approx(0.8 + 0.1 * (0.75e7 - 0.64e7) / 0.64e7)
    assert row["nll_reached"] == "0.5000/–" and math.isnan(row["accuracy_at_ms"]), "no board timed the reference"
    Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").measure(0.1, 0.24)
    ptq = Cell(to, 2, "B-LeNet", "PTQ", "INT8 PTQ", ORT)
    ptq.point = {"policy_label": "MaxProb", "arm": "refitted", "budget": 0.75, "currency": "macs"}
    ptq.replay(0.15)
    row = one(rows_of(to), backend="PTQ", policy="MaxProb", arm="refitted")
    assert row["accuracy_at_ms"] == pytest.approx(0.8 + 0.1 * 0.8)  # 0.75 of 0.24 ms; the exits take 0.1 and 0.2


def test_the_page_has_a_table_of_decisions_and_explains_its_words(to: Maker) -> None:
    text = report.show(armed(to), "md")
    table = text.partition("## Decisions")[2].partition("## ")[2].partition("\n## ")[0]
    assert "+7.00 [-5.00, +15.00]" in table and "25.00 [20.00, 30.00]" in table and "10.00 + 15.00" in table
    assert "+4.00 [+1.00, +6.00]" in table and "Oracle ‡" in text and "## Kept and refitted" not in text
    side_by_side = [line for line in text.partition("## Decisions")[2].splitlines() if line.startswith("| Toy")]
    assert side_by_side[1].endswith("| 7.00 | 3.00 | 1.00 | – | 4.00 | -0.20 | 1.00 | 0.00 | 105 | 75 |")
    words = text.partition("## Words")[2]
    for name in ("regret", "recovered", "harmful_flips", "budget_violation", "accuracy_at_bops", "area"):
        assert METRICS[name].meaning in words
    assert "overthinking" not in words, "nothing on the page"


def test_a_bound_is_not_on_the_front(to: Maker) -> None:
    rows = armed(to)
    assert one(rows, policy="Oracle")["bound"] and not one(rows, policy="Oracle")["front"] and rows["front"].any()


def test_a_network_that_a_board_did_not_time_is_not_on_its_front(to: Maker) -> None:
    fp32 = Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)]).measure(0.8)
    trt = Cell(to, 1, "LeNet", "TensorRT", "FP16 TensorRT", "TensorRT").eval([first(3)])
    for cell, ms in ((fp32, 0.8), (trt, 0.1)):
        times = {"exit": 0, "n": 256, "latency_ms_p50": ms, "latency_ms_mean": ms, "cpu_ms": ms}
        cell.record("measure", "measure-agx", {"device": {"cpu": "Orin", "noisy": "no"}}, board="agx", exits=[times])
    agx, host = (pivot(rows_of(to), board).iloc[0]["FP16 TensorRT"] for board in ("agx", "host"))
    assert agx["front"] and not host["front"] and math.isnan(host["latency_ms_p50"])


def test_arms_have_two_figures_more(to: Maker, tmp_path: Path) -> None:
    rows = armed(to)
    left, *bars = figures.shares(rows).axes
    assert not bars and len(left.patches) == 2 * 4  # two exits of FP32, of FP32 trained again and in ONNX Runtime, and of PTQ
    assert sum(patch.get_width() for patch in left.patches) == pytest.approx(400)
    axes = figures.arms(rows).axes
    assert [len(a.lines) for a in axes] == [
        7
    ] * 3  # the budget, FP32 and five arms, on FP32 trained again and both other backends
    assert [p.name for p in report.write(to.folder.parent, EXP, tmp_path, [])] == [
        "golden.svg", "golden_shares.svg", "golden_arms.svg",
    ]  # fmt: skip


def test_few_arms_have_one_figure(golden: pd.DataFrame) -> None:
    assert list(figures.pictures(golden)) == [""]


# The front -------------------------------------------------------------------------------------------------------

shares = st.tuples(*[st.integers(0, 20).map(lambda i: i / 20)] * 3).map(sorted)


@given(st.lists(st.tuples(st.integers(1, 6), shares), min_size=1, max_size=8))
def test_the_front_is_what_no_cheaper_row_reaches(said: list[tuple[int, list[float]]]) -> None:
    rows = [
        {"dataset": "Toy", "board": "host", "latency_ms_p50": float(ms), "accuracy_lo": lo, "accuracy": mid, "accuracy_hi": hi}
        for ms, (lo, mid, hi) in said
    ]
    mark_front(rows)
    assert any(row["front"] for row in rows)
    for row in rows:
        cheaper = [r for r in rows if r["latency_ms_p50"] < row["latency_ms_p50"]]
        if row["front"]:
            assert all(r["accuracy_hi"] < row["accuracy_lo"] for r in cheaper)
        else:
            alike = [r for r in rows if r["latency_ms_p50"] == row["latency_ms_p50"]]
            assert any(r["accuracy_hi"] >= row["accuracy_lo"] for r in cheaper) or any(
                r["accuracy_lo"] > row["accuracy_hi"] for r in alike
            )


def test_overlapping_intervals_are_not_bold_and_separate_ones_are() -> None:
    said = {"dataset": "Toy", "board": "host", "accuracy": 0.9}
    rows: list[dict[str, Any]] = [
        said | {"latency_ms_p50": 1.0, "accuracy_lo": 0.80, "accuracy_hi": 0.85},
        said | {"latency_ms_p50": 2.0, "accuracy_lo": 0.85, "accuracy_hi": 0.90},  # touches the first
        said | {"latency_ms_p50": 3.0, "accuracy_lo": 0.91, "accuracy_hi": 0.95},
        said | {"latency_ms_p50": math.nan, "accuracy_lo": 0.99, "accuracy_hi": 1.0},  # never timed: neither on it nor in its way
    ]
    mark_front(rows)
    assert [row["front"] for row in rows] == [True, False, True, False]


def test_the_mean_decides_for_a_policy_s_median_is_one_exit_s() -> None:
    said = {"dataset": "Toy", "board": "host", "accuracy": 0.9}
    rows: list[dict[str, Any]] = [
        said | {"latency_ms_p50": 1.0, "latency_ms_mean": 3.0, "accuracy_lo": 0.80, "accuracy_hi": 0.85},  # 51 % leave early
        said | {"latency_ms_p50": 2.0, "latency_ms_mean": 2.0, "accuracy_lo": 0.81, "accuracy_hi": 0.86},
    ]
    mark_front(rows)
    assert [row["front"] for row in rows] == [False, True]


# What people read ------------------------------------------------------------------------------------------------


def test_the_pivot_takes_the_fastest_real_execution_and_says_which(golden: pd.DataFrame) -> None:
    table = report.pivot(golden)
    assert list(table.columns.get_level_values(0).unique()) == ["FP32", "INT8 PTQ", "FP16", "INT4 QAT", "TensorRT INT8"]
    cell = table.loc[("Toy", "B-LeNet", "exit 2")]
    assert (cell["FP32", "execution"], cell["FP32", "latency_ms_p50"]) == (ORT, 0.5)
    assert (cell["INT8 PTQ", "execution"], cell["INT8 PTQ", "simulated"]) == (ORT, False)
    assert cell["INT4 QAT", "simulated"] and cell["INT4 QAT", "size_bytes"] == 2e4 * 4 / 8, "packed, for its files are floats"
    assert cell["TensorRT INT8", "status"] == "skip" and "not installed" in cell["TensorRT INT8", "reason"]
    assert cell["FP16", "reason"] == "this CPU has no FP16 kernels"


def test_a_column_of_several_executions_says_which_in_every_cell(to: Maker) -> None:
    Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)]).measure(0.8)
    Cell(to, 1, "B-LeNet", "OnnxRuntime(of=FP32)", "FP32", ORT).eval([first(3)]).measure(0.2)
    text = report.show(rows_of(to))
    assert re.search(r"0\.800 · 0\.300\*? \(torch\)", text) and re.search(r"0\.200 · 0\.300\*? \(ONNX Runtime\)", text)


def test_every_board_has_a_pivot_of_its_own(to: Maker) -> None:
    cell = Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)])
    for board, ms in (("agx", 1.5), ("nx", 2.5)):
        cell.record("measure", f"measure-{board}", board=board, exits=[{"exit": 0, "n": 256, "latency_ms_p50": ms}])
    rows = rows_of(to)
    assert list(rows["board"]) == ["agx", "nx"] and list(rows["accuracy"]) == [0.925, 0.925]
    text = report.show(rows)
    assert "92.50 · 1.500" in text and "92.50 · 2.500" in text and "latency on nx" in text
    assert report.pivot(rows, "orin").loc[("Toy", "LeNet", "exit 1")]["FP32", "accuracy"] == 0.925, "accuracy needs no board"


def test_every_markdown_table_has_as_many_cells_in_every_line(golden: pd.DataFrame) -> None:
    text = report.show(golden, "md")
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert len(tables) == 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert text.startswith("# golden\n\nDoes a quantized early-exit network")
    assert re.search(r"\[3\] simulated arithmetic has no latency", text)
    assert "n = 1 training seed, fewer than 5" in text


def test_latex_is_escaped_and_its_lines_have_as_many_cells(golden: pd.DataFrame) -> None:
    text = report.show(golden, "tex")
    lines = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(lines) == 4 and len({line.count(" & ") for line in lines}) == 1
    assert text.count("{") == text.count("}") and r"a\_b 50 \%" in text
    assert r"\textbf{75.00 $\cdot$ 0.100 $\cdot$ 0.090}" in text and r"\begin{tabular}{lllrrrrr}" in text
    assert not re.search(r"(?<!\\)[%&_#](?! )", text.split("\n", 1)[1]), "an unescaped special character"


def test_csv_reads_back_as_the_rows(golden: pd.DataFrame, tmp_path: Path) -> None:
    path, _ = report.write(GOLDEN / "records", EXP, tmp_path, ["csv"])
    back = pd.read_csv(
        path, keep_default_na=False, na_values={name: [""] for name in ("accuracy", "loss_upper", "latency_ms_p50")}
    )
    assert list(back.columns) == list(golden.columns) and len(back) == len(golden)
    for name in ("accuracy", "loss_upper", "latency_ms_p50"):
        np.testing.assert_allclose(back[name], golden[name], rtol=1e-11)
    assert list(back["reason"]) == list(golden["reason"]) and list(back["speedup_over"]) == list(golden["speedup_over"])


def test_with_five_seeds_no_warning(to: Maker) -> None:
    for seed in range(5):
        assert "training seed" in (report.show(rows_of(to)) if seed else "training seed")
        Cell(to, 0, "LeNet", "FP32", "FP32", "torch", seed).eval([first(3 + seed)])
    assert "fewer than 5" not in report.show(rows_of(to), "md")


def test_an_experiment_in_which_nothing_finished_has_a_table(to: Maker) -> None:
    Cell(to, 0, "LeNet", "FP32", "FP32", "").miss("skip", "eval", "MNIST is missing: set ANYTIME_DATA")
    rows = rows_of(to)
    for text in (report.show(rows), report.show(rows, "md")):
        assert "No cell has finished yet." in text and "MNIST is missing" in text
    assert report.show(rows, "tex").count("skip [1]") == 1
    assert len(figures.figure(rows).axes) == 1


def test_an_experiment_whose_every_record_is_torn_has_a_table(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "torn.json").write_text("{")
    rows = report.rows(tmp_path, "x")
    assert rows.empty and list(rows.columns) == list(COLUMNS)
    assert "x/torn.json" in report.show(rows, "md") and "Unreadable files: 1" in report.show(rows)
    assert report.show(rows, "csv").count("\n") == 1 and report.show(rows, "tex")
    figures.draw(rows, tmp_path / "x.svg")


# Bad input -------------------------------------------------------------------------------------------------------


def test_an_unknown_experiment_is_one_sentence_with_the_near_miss(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'goldne' has no records .* did you mean 'golden'"):
        report.rows(GOLDEN / "records", "goldne")
    with pytest.raises(UsageError, match="there is none"):
        report.write(tmp_path, "golden", tmp_path)


def test_an_unknown_format_is_one_sentence_with_the_near_miss(golden: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no report format 'markdown'"):
        report.show(golden, "markdown")
    with pytest.raises(UsageError, match="no report format 'mdd'; did you mean 'md'"):
        report.write(GOLDEN / "records", EXP, tmp_path, ["csv", "mdd"])
    assert list(tmp_path.iterdir()) == [], "nothing is written before the mistake is found"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_a_table_is_one_sentence_and_the_old_table_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, _ = report.write(GOLDEN / "records", EXP, tmp_path, ["md"])
    before = path.read_bytes()

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(WriteError, match=f"cannot write .*golden.md: {os.strerror(code)}; free space"):
        report.write(GOLDEN / "records", EXP, tmp_path, ["md"])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["golden.md"]


# Figures ---------------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_point_and_a_front_that_only_rises(golden: pd.DataFrame) -> None:
    left, right_ = figures.figure(golden).axes
    assert left.get_xlabel() == "MACs a sample (M)" and right_.get_xlabel() == "mean latency, batch 1 (ms)"
    done = golden[(golden["status"] == "done") & (golden["arm"] != "kept")]
    for axes, cost, n in ((left, "macs", len(done)), (right_, "latency_ms_p50", done["latency_ms_p50"].notna().sum())):
        front, *points = axes.lines
        assert sum(len(line.get_xdata()) for line in points) == n
        x, y = np.asarray(front.get_xdata()), np.asarray(front.get_ydata())
        assert (np.diff(x) >= 0).all() and (np.diff(y)[:-1] > 0).all()
        known = done[done[cost].notna()]
        assert y.max() == pytest.approx(100 * known["accuracy"].max())
        assert x[0] * (1e6 if cost == "macs" else 1) == pytest.approx(known[cost].min())


def test_where_all_points_have_the_same_macs_the_figure_sets_bit_operations(golden: pd.DataFrame) -> None:
    same = golden.assign(macs=golden["macs"].max())
    left, _ = figures.figure(same).axes
    assert (left.get_xlabel(), left.get_xscale()) == ("bit operations a sample (G)", "log")
    assert np.asarray(left.lines[0].get_xdata())[0] == pytest.approx(1e-9 * same.loc[same["status"] == "done", "bops"].min())
    assert figures.figure(same.assign(bops=1.0)).axes[0].get_xlabel() == "MACs a sample (M)"


def untimed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(latency_ms_p50=math.nan, latency_ms_mean=math.nan)


def test_exits_of_the_same_macs_in_several_arithmetics_that_nobody_timed_are_set_against_bit_operations(
    golden: pd.DataFrame,
) -> None:
    drawn = figures.figure(untimed(golden)).axes
    assert [axes.get_title() for axes in drawn] == ["Toy, LeNet", "Toy, B-LeNet"], "of networks of their own"
    assert {(axes.get_xlabel(), axes.get_xscale()) for axes in drawn} == {("bit operations a sample (G)", "log")}
    two = untimed(golden[golden["column"].isin(["FP32", "INT8 PTQ"])])
    other = untimed(golden).assign(macs=golden["macs"] + golden["column"].eq("FP16"))
    for rows in (two, other, golden):
        assert figures.figure(rows).axes[0].get_xlabel() == "MACs a sample (M)"


def test_of_more_columns_than_colours_the_reference_and_the_front_have_one_and_the_others_are_grey(golden: pd.DataFrame) -> None:
    exits = golden[(golden["status"] == "done") & (golden["policy"] == "exit 2")].iloc[:1]
    many = [exits.assign(column="FP32", reference=True, macs=9e6, accuracy=0.9, accuracy_hi=0.9)]
    for i in range(20):  # each a little dearer than the one before it; every fifth one is better
        accuracy = 0.5 + 0.01 * i if i % 5 == 0 else 0.4
        many.append(exits.assign(column=f"c{i}", reference=False, macs=1e6 + i, accuracy=accuracy, cell=f"cell{i}"))
    drawn = figures.figure(pd.concat(many, ignore_index=True))
    keys = {text.get_text(): line.get_color() for text, line in
            zip(drawn.legends[0].get_texts(), drawn.legends[0].get_lines(), strict=True)}  # fmt: skip
    named = [keys.pop(name) for name in ("FP32", "c0", "c5", "c10", "c15")]
    assert len({*named, figures.OTHERS}) == 6 and keys.pop("16 others") == figures.OTHERS and not {"c1", "c19"} & keys.keys()
    _, *points = drawn.axes[0].lines
    assert sum(len(line.get_xdata()) for line in points) == 21 and {line.get_color() for line in points} == {
        *named,
        figures.OTHERS,
    }
    few = figures.figure(pd.concat(many[: len(figures.COLOURS)], ignore_index=True)).legends[0]
    assert not any("others" in text.get_text() for text in few.get_texts())


def two_policies(to: Maker, *arms: str) -> pd.DataFrame:
    """Decisions in these arms of "Patience", which the experiment names first, and of a policy with a threshold per exit."""
    fp32 = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)])
    ptq = Cell(to, 1, "B-LeNet", "PTQ", "INT8 PTQ", "fake-quant").eval([first(9), first(4)], 8)
    for position, policy in enumerate(("Patience", "Entropy per exit")):
        for cell, arm in [(fp32, "refitted"), *((fp32 if arm == "retrained" else ptq, arm) for arm in arms)]:
            for early, budget in ((20, 0.75), (30, 0.5)):
                decided(cell, early, arm, policy, policy_position=position, budget=budget, regret=0.01)
    return rows_of(to)


def test_decisions_are_drawn_of_the_policy_that_the_experiment_names_first_in_all_their_arms(to: Maker) -> None:
    rows = two_policies(to, "refitted", "kept", "temperature", "share-matched")
    drawn = figures.arms(rows)
    assert drawn.legends[0].get_title().get_text() == "Patience, thresholds"
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names == ["FP32", "kept", "temperature", "share-matched", "refitted"]
    [axes] = drawn.axes
    assert [len(line.get_xdata()) for line in axes.lines] == [2] * 7, "two budgets, FP32, and two points of each arm"
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines[2:]}) == 5
    left = figures.shares(rows)
    assert left.get_suptitle().startswith("Patience, ")
    assert [axes.get_title() for axes in left.axes] == ["budget 0.5", "budget 0.75"]
    assert [[round(bar.get_width()) for bar in axes.patches] for axes in left.axes] == [[75, 25] * 2, [50, 50] * 2]
    assert [label.get_text() for label in left.axes[0].get_yticklabels()] == ["INT8 PTQ, fake-quant", "FP32, torch"]
    assert "| Patience |" in report.show(rows, "md").partition("## Decisions")[2].partition("### ")[0]


def test_floors_are_drawn_without_a_share_matched_arm(to: Maker) -> None:
    rows = two_policies(to, "refitted", "kept", "retrained")
    again, ptq = figures.arms(rows).axes
    assert (again.get_title(), ptq.get_title()) == ("FP32, torch", "INT8 PTQ, fake-quant")
    assert [len(line.get_xdata()) for line in again.lines[2:]] == [2, 0, 0, 2], "FP32, kept, refitted, retrained"
    assert "FP32, kept from another training" in {label.get_text() for label in figures.shares(rows).axes[0].get_yticklabels()}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_figure_is_drawn_the_same_twice(golden: pd.DataFrame, tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{i}.{suffix}" for i in (0, 1)]
    for path in paths:
        figures.draw(golden, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(paths[0].read_bytes()) > 5000


def test_the_labels_are_those_of_the_hand_made_samples() -> None:
    with np.load(next((GOLDEN / "records" / EXP).glob("000-*.npz"))) as file:
        assert (file["labels"] == LABELS).all() and (file["argmax"] != file["labels"]).sum() == 3
