"""Processes side by side, that end with the one who started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context

from anytime.errors import AnytimeError


@contextmanager
def workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """``n`` fresh processes. When the block is left by an error or Ctrl-C, what they have begun ends and nothing else begins; they
    are killed with the one who started them.

    AnytimeError where one of them was killed. Not threads: torch.fx can trace but one network at a time.
    """
    pool = ProcessPoolExecutor(n, mp_context=get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            main, more = sys.modules["__main__"], ""
            if getattr(main, "__file__", None) and getattr(main, "__spec__", None) is None:  # a script, not python -m
                more = f'; what {main.__file__} runs must stand under if __name__ == "__main__": each process imports it anew'
            raise AnytimeError(
                f"one of {n} processes was killed, most likely for want of memory: run again with fewer side by side (JOBS){more}"
            ) from error
        raise
    pool.shutdown()


def _end_with(parent: int) -> None:
    """Whoever outlived it would hold the locks that the same command, given again, waits for."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended since
        os._exit(1)
