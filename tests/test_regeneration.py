"""``report --check``: tables are what the records give, byte by byte; a changed digit, a lost table and one too many are caught."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anytime.__main__ import main

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def results(tmp_path):
    """The golden records and their tables as a results folder."""
    shutil.copytree(GOLDEN / "records", tmp_path / "records")
    assert main(["report", "--results", str(tmp_path), "--quiet"]) == 0
    return tmp_path


def check(results, *more):
    return main(["report", "--check", "--results", str(results), *more])


def test_what_was_just_written_is_found_equal_and_nothing_is_written(results, capsys):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    assert check(results) == 0
    assert "experiments: 1; every table is what its records give" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before


@pytest.mark.parametrize("name", ["golden.md", "golden.csv", "golden.tex"])
def test_a_changed_digit_in_a_table_is_caught(results, capsys, name):
    path = results / "tables" / name
    text = path.read_text()
    at = next(i for i in range(len(text) // 2, len(text)) if text[i].isdigit())
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    line = text[:at].count("\n") + 1
    assert check(results) == 1
    assert f"{name} is not what its records give, from line {line} on: make report EXP=golden" in capsys.readouterr().err


def test_a_changed_digit_in_a_record_is_caught(results, capsys):
    path = next((results / "records" / "golden").glob("*-eval-lenet-fp32-0-eval.json"))
    path.write_text(path.read_text().replace('"macs": 100000', '"macs": 100001'))
    assert check(results, "--quiet") == 1
    assert "golden.csv is not what its records give" in capsys.readouterr().err


def test_a_lost_table_and_one_without_records_are_caught(results, capsys):
    (results / "tables" / "golden.md").rename(results / "tables" / "older.md")
    assert check(results, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["experiments"] == ["golden"] and len(said["wrong"]) == 2
    assert "golden.md is missing" in said["wrong"][0] and "older.md has no records" in said["wrong"][1]


def test_a_figure_that_cannot_be_drawn_is_an_error(results, monkeypatch):
    from anytime import figures

    def broken(rows):
        raise ZeroDivisionError

    monkeypatch.setattr(figures, "pictures", lambda rows: {"": broken})
    with pytest.raises(ZeroDivisionError):
        check(results)


def test_no_records_at_all_is_one_sentence(tmp_path, capsys):
    assert check(tmp_path) == 2
    assert "there are no records in" in capsys.readouterr().err


def test_the_report_as_json_has_the_rows(results, capsys):
    assert main(["report", "golden", "--results", str(results), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["exp"] == "golden" and len(said["wrote"]) == 4 and len(said["troubles"]) == 1
    row = said["rows"][0]
    assert (row["model"], row["accuracy"], row["speedup"]) == ("LeNet", 0.925, 1.0) and row["loss"] is None


def test_the_committed_tables_are_checked_by_make_check_and_by_ci_without_torch():
    rule = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert "$(ANYTIME) report --check" in rule and "make -s check" in (ROOT / ".ci" / "run").read_text()
    code = "import sys; sys.modules['torch'] = None; from anytime.__main__ import main; main(['report', 'quickstart', '--check'])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stderr
