"""Processes side by side, that end with the one who started them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context

from anytime.errors import AnytimeError


@contextmanager
def workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """``n`` fresh processes. When the block is left by an error or Ctrl-C, what they have begun ends and nothing else begins.

    AnytimeError where one of them was killed. Not threads: torch.fx can trace but one network at a time.
    """
    pool = ProcessPoolExecutor(n, mp_context=get_context("spawn"))
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise AnytimeError(
                f"one of {n} processes was killed, most likely for want of memory: run again with fewer side by side (JOBS)"
            ) from error
        raise
    pool.shutdown()
