"""Processes side by side: an interruption ends them, and one that was killed is a sentence."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from anytime.errors import AnytimeError
from anytime.workers import workers


def begin(path, seconds):
    path.touch()
    time.sleep(seconds)
    path.with_suffix(".end").touch()


def test_interrupted_what_has_begun_ends_and_nothing_else_begins(tmp_path):
    with pytest.raises(KeyboardInterrupt), workers(2) as pool:
        for i in range(8):
            pool.submit(begin, tmp_path / str(i), 60)
        while not list(tmp_path.iterdir()):
            time.sleep(0.05)
        raise KeyboardInterrupt
    # Not join: the pool's own thread waits for them too, and whoever comes second is told of no exit code for a moment.
    until = time.monotonic() + 20
    while active_children() and time.monotonic() < until:
        time.sleep(0.05)
    assert not active_children()
    assert len(list(tmp_path.iterdir())) <= 3 and not list(tmp_path.glob("*.end"))


def test_a_process_that_was_killed_is_said():
    with pytest.raises(AnytimeError, match="one of 2 processes was killed, .* fewer side by side"), workers(2) as pool:
        pool.submit(os.kill, 0, 0).result()
        pool.submit(_die).result()


SCRIPT = """
import sys, time
from pathlib import Path
from anytime.workers import workers
from tests.test_workers import begin
if __name__ == "__main__":
    with workers(1) as pool:
        pool.submit(begin, Path(sys.argv[1]), 60).result()
"""


def test_they_end_with_one_who_was_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    started = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "begun")], env=env)
    while not (tmp_path / "begun").exists():
        assert started.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    started.kill()
    started.wait()
    deadline = time.monotonic() + 20
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "a process outlived who started it"
        time.sleep(0.05)


UNGUARDED = """
from anytime.workers import workers
with workers(1) as pool:
    pool.submit(print, 1).result()
"""


def test_a_script_that_guards_nothing_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run([sys.executable, str(tmp_path / "script.py")], env=env, capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1].endswith(
        f'what {tmp_path / "script.py"} runs must stand under if __name__ == "__main__": each process imports it anew'
    )


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_else_all_answers_come():
    with workers(2) as pool:
        assert [f.result() for f in [pool.submit(pow, 2, i) for i in range(5)]] == [1, 2, 4, 8, 16]


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
