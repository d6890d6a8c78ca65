"""What a long command shows: bars and colours on a terminal only, plain lines elsewhere, nothing when it is to be quiet."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from anytime import progress
from anytime.progress import Bars, span

ROOT = Path(__file__).parent.parent
CODE = """
from anytime import progress
progress.QUIET_S = -1
with progress.Bars({quiet}) as bars:
    bars.log("3 facts to do [red]")
    bars.step("mine", 1, 3)
    bars.step("train [b]", 5, 20)
    bars.step("train [b]", 20, 20)
    bars.step("mine", 3, 3)
"""


def on_a_terminal(code: str, **env: str) -> str:
    """What a process writes to a terminal."""
    parent, child = pty.openpty()
    ran = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=child, stderr=child, stdin=child,
        env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", "COLUMNS": "120", **env},
    )  # fmt: skip
    os.close(child)
    said = b""
    try:
        while more := os.read(parent, 65536):
            said += more
    except OSError:  # the other end is closed
        pass
    assert ran.wait() == 0, said
    os.close(parent)
    return said.decode()


def through_a_pipe(code: str) -> tuple[str, str]:
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


def test_a_terminal_gets_bars_with_colours_and_a_pipe_plain_lines():
    shown = on_a_terminal(CODE.format(quiet=False))
    assert "\x1b[3" in shown and "━" in shown and "train [b]" in shown and "0/20" in shown
    out, err = through_a_pipe(CODE.format(quiet=False))
    assert out == "" and "\x1b" not in err and "━" not in err
    assert err.splitlines()[:3] == [
        "3 facts to do [red]",
        "mine: 1 of 3, 0 s left",
        "mine: 1 of 3, 0 s left; train [b]: 5 of 20, 0 s left",
    ]


def test_no_color_takes_the_colours_away():
    shown = on_a_terminal(CODE.format(quiet=False), NO_COLOR="1")
    assert "━" in shown and not re.search(r"\x1b\[[0-9;]*(3|4|9)[0-9][0-9;]*m", shown)


def test_quiet_shows_nothing_on_either():
    assert on_a_terminal(CODE.format(quiet=True)) == ""
    assert through_a_pipe(CODE.format(quiet=True)) == ("", "")


def test_a_line_says_how_far_and_how_long_still_and_not_too_often(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    bars = Bars()
    for second, done in ((0, 0), (5, 10), (15, 30), (16, 31), (50, 100)):
        now[0] = second
        bars.step("train", done, 100)
    assert capsys.readouterr().err.splitlines() == ["train: 30 of 100, 35 s left", "train: 100 of 100, 0 s left", "train: 50 s"]
    now[0] = 51
    bars.step("predict", 1, 1)
    assert capsys.readouterr().err == "", "what is over at once is not said"


def test_finished_bars_leave_the_screen():
    bars = Bars()
    for i in range(50):
        bars.step(f"train {i}", 1, 1)
    assert bars._bars.tasks == []


@pytest.mark.parametrize("seconds, said", [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")])
def test_spans_are_said_as_people_do(seconds, said):
    assert span(seconds) == said
