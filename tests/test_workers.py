"""Processes side by side: an interruption ends them, and one that was killed is a sentence."""

import os
import signal
import time
from multiprocessing import active_children

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
    for process in active_children():
        process.join(20)
        assert process.exitcode is not None
    assert len(list(tmp_path.iterdir())) <= 3 and not list(tmp_path.glob("*.end"))


def test_a_process_that_was_killed_is_said():
    with pytest.raises(AnytimeError, match="one of 2 processes was killed, .* fewer side by side"), workers(2) as pool:
        pool.submit(os.kill, 0, 0).result()
        pool.submit(_die).result()


def test_else_all_answers_come():
    with workers(2) as pool:
        assert [f.result() for f in [pool.submit(pow, 2, i) for i in range(5)]] == [1, 2, 4, 8, 16]


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
