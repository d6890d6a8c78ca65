"""What a long command shows while it works: a bar per step with the time left, plain lines where there is no terminal."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_S = 10.0  # without a terminal, at most one line in so many seconds


class Bars:
    """Shows steps by their name; a step that reaches its total is finished."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal, transient=False,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._said = monotonic()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def step(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` of the step ``what``."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
            self._started[what] = monotonic()
        self._bars.update(self._tasks[what], completed=done, total=total)
        if not self._console.is_terminal and total > 1 and monotonic() - self._said > QUIET_S:
            left = (monotonic() - self._started[what]) / max(done, 1) * (total - done)
            print(f"{what}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)
            self._said = monotonic()
        if done >= total:
            self._tasks.pop(what)

    def log(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
