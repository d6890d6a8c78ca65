"""What a long command shows while it works: a bar per step with the time left, plain lines where there is no terminal."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_S = 10.0  # without a terminal, at most one line in so many seconds


class Bars:
    """Shows the steps that are under way by their name; a step that reaches its total is finished, and said if it was long.

    ``quiet`` shows nothing. Colours and bars need a terminal (standard error), and NO_COLOR takes the colours away.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._lines = not quiet and not self._console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self._console, disable=quiet or self._lines,
        )  # fmt: skip
        self._tasks: dict[str, tuple[TaskID, float]] = {}  # step -> its bar and when it began
        self._left: dict[str, str] = {}
        self._said = monotonic()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def step(self, what: str, done: int, total: int, left_s: float | None = None) -> None:
        """``done`` of ``total`` of the step ``what``; ``left_s`` seconds are left, or by default as many as its pace says."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total), monotonic()
        task, began = self._tasks[what]
        self._bars.update(task, completed=done, total=total)
        took = monotonic() - began
        if left_s is None and done:
            left_s = took / done * (total - done)
        self._left[what] = f"{what}: {done} of {total}" + ("" if left_s is None else f", {span(left_s)} left")
        if self._lines and monotonic() - self._said > QUIET_S:
            print("; ".join(self._left.values()), file=sys.stderr, flush=True)
            self._said = monotonic()
        if done >= total:
            self._bars.remove_task(task)  # else the bars of a long run outgrow the screen
            del self._tasks[what], self._left[what]
            if took > QUIET_S:
                self.log(f"{what}: {span(took)}")

    def log(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def span(seconds: float) -> str:
    """``seconds`` as people say it."""
    unit, size = next(((unit, size) for unit, size in (("h", 3600), ("min", 60)) if seconds >= 2 * size), ("s", 1))
    return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
