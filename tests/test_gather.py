"""Records that were edited, contradict themselves or each other, or may not be read: a sentence each, and the rest stays."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime import report
from anytime.__main__ import main
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
    (trouble,) = rows.attrs["troubles"]
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
