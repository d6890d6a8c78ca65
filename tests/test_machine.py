"""What records say of the code that made them."""

import subprocess

from anytime import machine


def test_the_commit_and_whether_the_code_differs_from_it(tmp_path, monkeypatch):
    def git(*args):
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        return subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True, text=True).stdout.strip()

    code = tmp_path / "anytime" / "machine.py"
    code.parent.mkdir()
    code.write_text("1")
    monkeypatch.setattr(machine, "__file__", str(code))
    asked = machine.commit.__wrapped__
    assert asked() == {}, "not in git"
    git("init", "-q")
    assert asked() == {}, "in somebody else's checkout"
    git("add", "-A")
    git("commit", "-qm", "one")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert asked() == clean
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text("what a run writes")
    assert asked() == clean
    code.write_text("2")
    assert asked() == clean | {"dirty": True}
