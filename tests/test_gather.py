"""Records that were edited, contradict themselves or each other, or may not be read: a sentence each, and the rest stays."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime import record, report
from anytime.__main__ import main
from anytime.gather import gather, key_of
from tests.golden.make import EXP, Cell, Maker, first

GOLDEN = Path(__file__).parent / "golden" / "records"


@pytest.fixture
def to(tmp_path):
    """Two networks: what is done to the second must leave the first as it was."""
    to = Maker(tmp_path / "records")
    for position, backend in enumerate(("FP32", "PTQ")):
        cell = Cell(to, position, "B-LeNet", backend, backend, "torch")
        cell.eval([first(8), first(4)]).decide(20).measure(0.5, 1.0)
    return to


def edited(to, kind, change):
    """Change the record of this kind of the second network; answer rows and troubles."""
    path = sorted(to.folder.glob(f"*-{kind}-b-lenet-ptq*.json"))[-1]
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    rows = report.rows(to.folder.parent, EXP)
    for fmt in ("text", "md", "csv", "tex"):
        assert report.show(rows, fmt)
    return rows, rows.attrs["troubles"]


@pytest.mark.parametrize(
    "kind, change, sentence",
    [
        ("eval", lambda r: r["exits"][1].update(accuracy="0.9"), "accuracy is '0.9'"),
        ("eval", lambda r: r["exits"][1].update(accuracy=None), "accuracy is None"),
        ("eval", lambda r: r["exits"][1].update(accuracy=90.0), "accuracy is 90.0"),
        ("eval", lambda r: r["exits"][1].update(accuracy=0.95), "accuracy is 0.95, but n_right 36 of n 40"),
        ("eval", lambda r: r["exits"][0].update(macs=[1]), "macs is [1]"),
        ("eval", lambda r: r["exits"][0].update(exit="first"), "exit is 'first'"),
        ("eval", lambda r: r["exits"][0].update(n=0), "n is 0"),
        ("eval", lambda r: r.update(layers=[{"layer": "stages.0.0"}]), "a layer lacks its macs"),
        ("eval", lambda r: r["facts"].update(versions="2.13"), "versions is '2.13'"),
        ("eval", lambda r: r["facts"].update(position="first"), "position is 'first'"),
        ("eval", lambda r: r["spec"].update(model="LeNet"), "model is 'LeNet'"),
        ("decide", lambda r: r["points"][0].update(n_right=3), "but n_right 3 of n 40"),
        ("measure", lambda r: r["exits"][0].update(latency_ms_p50="fast"), "latency_ms_p50 is 'fast'"),
        ("measure", lambda r: r["facts"].update(device="host"), "device is 'host'"),
    ],
)
def test_a_record_that_was_edited_is_a_sentence(to, kind, change, sentence):
    before = report.rows(to.folder.parent, EXP)
    rows, troubles = edited(to, kind, change)
    (trouble,) = troubles
    assert sentence in trouble and f"the {kind} record" in trouble and "remove it; what it held is run again" in trouble
    kept = [frame[frame["backend"] == "FP32"].reset_index(drop=True) for frame in (before, rows)]
    assert kept[0].drop(columns="front").equals(kept[1].drop(columns="front")), "its neighbours are whole"


def test_an_accuracy_that_its_own_predictions_deny_is_not_paired(to):
    def better(said):
        said["exits"][1].update(n_right=40, accuracy=1.0)

    rows, troubles = edited(to, "eval", better)
    row = rows[(rows["backend"] == "PTQ") & (rows["policy"] == "exit 2")].iloc[0]
    assert row["loss"] != row["loss"] and any("exit 2" in trouble and "differ" in trouble for trouble in troubles)


def test_two_records_of_one_fact_that_disagree_are_said_and_the_newer_one_is_used(to):
    Cell(to, 1, "B-LeNet", "PTQ", "PTQ", "torch").eval([first(8), first(5)])
    rows = report.rows(to.folder.parent, EXP)
    trouble, gone = sorted(rows.attrs["troubles"], reverse=True)
    assert gone == "2 records are left out: older than their network, which was made anew"
    assert "says other numbers of its fact than" in trouble and "which is newer and used" in trouble
    assert rows[(rows["backend"] == "PTQ") & (rows["policy"] == "exit 2")]["accuracy"].item() == 35 / 40


def test_two_records_of_one_fact_that_agree_are_no_trouble(to):
    Cell(to, 1, "B-LeNet", "PTQ", "PTQ", "torch").eval([first(8), first(4)])
    assert report.rows(to.folder.parent, EXP).attrs["troubles"] == []


def test_what_an_older_version_of_a_class_said_gives_way_to_the_newer_version(to):
    newer = Cell(to, 1, "B-LeNet", "PTQ", "PTQ", "torch")
    newer.name, newer.spec["backend"]["version"] = "newer", 2
    newer.eval([first(8), first(5)])
    rows = report.rows(to.folder.parent, EXP)
    assert rows.attrs["troubles"] == [] and set(rows["variant"]) == {""}
    ptq = rows[rows["backend"] == "PTQ"]
    assert set(ptq["cell"]) == {"newer"} and ptq[ptq["policy"] == "exit 2"]["accuracy"].item() == 35 / 40
    assert len(rows[rows["backend"] == "FP32"]) > 1, "of which no other version says anything"


values = st.none() | st.booleans() | st.integers(-2, 50) | st.floats(-1, 2) | st.text(max_size=3) | st.just([]) | st.just({})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_edited_there_is_a_table(tmp_path_factory, data):
    """One value of one record, anywhere in its points, layers and facts, is replaced by another."""
    root = tmp_path_factory.mktemp("edited") / "records"
    shutil.copytree(GOLDEN, root)
    path = data.draw(st.sampled_from(sorted((root / EXP).glob("0*.json"))))
    said = json.loads(path.read_text())
    places = [said["facts"], said["spec"], *said["exits"], *said["points"], *said["layers"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(values)
    path.write_text(json.dumps(said))
    rows = report.rows(root, EXP)
    for fmt in ("text", "md", "csv", "tex"):
        assert report.show(rows, fmt)


def test_what_may_not_be_written_or_read_is_a_sentence(to, tmp_path, capsys):
    (to.folder / "999.json").mkdir()  # the system refuses to read it, even for root
    assert main(["report", EXP, "--results", str(tmp_path), "--quiet"]) == 0
    assert "999.json cannot be read" in (tmp_path / "tables" / f"{EXP}.md").read_text()
    shutil.rmtree(tmp_path / "tables")
    (tmp_path / "tables").write_text("a file where a folder is needed")
    assert main(["report", EXP, "--results", str(tmp_path), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("anytime: cannot write") and "change its rights" in err and err.count("\n") == 1


def test_times_of_another_machine_or_engine_are_not_pooled(tmp_path):
    to = Maker(tmp_path / "records")
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)])
    cell.measure(0.5, 1.0).measure(0.7, 1.0)
    rows = report.rows(to.folder.parent, EXP)
    assert rows["latency_ms_p50"].iloc[0] == pytest.approx(0.6) and not rows.attrs["troubles"], "sessions of one machine are"
    path = max(to.folder.glob("*measure*"))
    said = json.loads(path.read_text())
    said["facts"]["device"]["onnxruntime"] = "9.9"
    path.write_text(json.dumps(said))
    rows = report.rows(to.folder.parent, EXP)
    assert rows["latency_ms_p50"].iloc[0] == 0.7
    assert rows.attrs["troubles"] == [
        "1 records are left out: times of another machine, setting or engine version than the newest of the same"
    ]


def test_what_was_decided_and_timed_of_a_network_that_is_another_now_is_left_out(tmp_path):
    to = Maker(tmp_path / "records")
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20).measure(0.5, 1.0).replay(0.7)
    cell.eval([first(8), first(4)])
    rows = report.rows(to.folder.parent, EXP)
    assert "Entropy" in set(rows["policy"]) and not rows.attrs["troubles"], "made again, it is the same"
    cell.eval([first(8), first(5)])
    rows = report.rows(to.folder.parent, EXP)
    assert set(rows["policy"]) == {"exit 1", "exit 2"} and rows["latency_ms_p50"].isna().all()
    assert "3 records are left out: older than their network, which was made anew" in rows.attrs["troubles"]
    cell.decide(20)
    assert "Entropy" in set(report.rows(to.folder.parent, EXP)["policy"])
    cell.miss("fail", "eval", "it does not even begin")
    assert set(report.rows(to.folder.parent, EXP)["status"]) == {"fail"}


def columns(to):
    return {(row.model, row.backend, row.column) for row in report.rows(to.folder.parent, EXP).itertuples()}


def fields(cell, part="backend", **said):
    """A cell whose spec says more."""
    cell.spec = cell.spec | {part: cell.spec[part] | said}
    return cell


def test_one_column_is_one_arithmetic(tmp_path):
    to = Maker(tmp_path / "records")
    more = {"plain": {}, "wide": {"add_bits": 8}, "fast": {"observer": "minmax"}}
    for position, (name, said) in enumerate(more.items()):
        cell = fields(Cell(to, position, "B-LeNet", name, "INT4 PTQ", "fake-quant"), **said)
        cell.spec["backend"]["is"] = "PTQ"
        cell.eval([first(8), first(4)])
    cell = fields(
        Cell(to, 4, "B-LeNet", "brecq", "INT4 PTQ (BRECQ)", "fake-quant"), observer="minmax", add_bits=8, rounding="brecq"
    )
    cell.spec["backend"]["is"] = "PTQ"
    cell.eval([first(8), first(4)])
    # The same under an engine is the same arithmetic.
    cell = Cell(to, 5, "B-LeNet", "engine", "INT4 PTQ", "ONNX Runtime")
    cell.spec = cell.spec | {"backend": {"is": "OnnxRuntime", "version": 1, "of": {"is": "PTQ", "version": 1, "add_bits": 8}}}
    cell.eval([first(8), first(4)])
    assert {(backend, column) for _, backend, column in columns(to)} == {
        ("plain", "INT4 PTQ"), ("wide", "INT4 PTQ, add_bits=8"), ("engine", "INT4 PTQ, add_bits=8"),
        ("fast", "INT4 PTQ, observer=minmax"), ("brecq", "INT4 PTQ (BRECQ), add_bits=8, observer=minmax"),
    }  # fmt: skip


def test_no_two_arithmetics_of_the_committed_records_share_a_column():
    root = Path(__file__).parent.parent / "results" / "records"
    for exp in record.experiments(root):
        seen: dict[tuple[str, ...], str] = {}
        for n in gather(record.load(root, exp).records, []):
            where = (n.place, n.model, n.variant, n.label("column"), n.label("execution"))
            assert seen.setdefault(where, key_of(n.spec["backend"])) == key_of(n.spec["backend"]), (exp, where[3:])


def test_two_folders_of_one_name_are_two_data_sets(tmp_path):
    to = Maker(tmp_path / "records")
    for position, path in enumerate(("/a/photos", "/b/photos")):
        fields(Cell(to, position, "B-LeNet", f"FP32 {path}", "FP32", "torch"), "data", path=path).eval([first(8), first(4)])
    rows = report.rows(to.folder.parent, EXP)
    assert set(rows["dataset"]) == {"Toy, path=/a/photos", "Toy, path=/b/photos"} and set(rows["variant"]) == {""}


def test_times_of_what_came_to_mean_something_else_are_not_pooled(tmp_path):
    to = Maker(tmp_path / "records")
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20)
    for fact, threads, ms in (("old", "4", 1.0), ("new", "1", 3.0)):
        said, device = {"n": 40, "latency_ms_p50": ms, "latency_ms_mean": ms}, {"cpu": "Toy CPU", "threads": threads}
        cell.record("measure", f"measure-{fact}", {"device": device}, board="host", exits=[{"exit": 0, **said}])
        cell.record("replay", f"replay-{fact}", {"device": {"cpu": "Toy CPU"}}, board="host", points=[{**cell.point, **said}])
    rows = report.rows(to.folder.parent, EXP)
    timed = rows[rows["board"] == "host"]
    assert list(timed["latency_ms_mean"]) == [3.0, 3.0] and list(timed["n_sessions"]) == [1, 1]


def test_an_engine_of_the_board_s_own_shows_no_accuracy_of_what_nobody_trained(tmp_path):
    to = Maker(tmp_path / "records")
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch")
    cell.facts["unjudged"] = "latency and fidelity only"
    cell.eval([first(8), first(4)])
    exits = [{"exit": k, "n": 40, "latency_ms_p50": 1.0, "board_accuracy": 0.1, "board_agreement": 0.9} for k in range(2)]
    cell.record("measure", "measure", board="nx", exits=exits)
    rows = report.rows(to.folder.parent, EXP)
    assert rows["board_accuracy"].isna().all() and list(rows["board_agreement"]) == [0.9, 0.9]
    assert "accuracy on the board" not in report.show(rows, "md")
