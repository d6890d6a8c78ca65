"""Boards by name: what one says of itself, and measuring an experiment on it without training anything again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from anytime.board import Board
from anytime.boards.ssh import Ssh
from anytime.boards.ssh.link import waited
from anytime.config import Experiment
from anytime.errors import UsageError, near
from anytime.find import folders, loaded
from anytime.run import Runner
from anytime.train import Progress, silent
from anytime.workers import workers


def names() -> list[str]:
    """Every board by name: the files of ``experiments/boards/``."""
    return sorted({p.stem for f in folders() for p in (f / "boards").glob("*.py") if not p.stem.startswith("_")})


def board(name: str) -> Board:
    """The BOARD of ``experiments/boards/NAME.py``, or of the file at a path. UsageError with the near misses."""
    paths = [Path(name)] if name.endswith(".py") else [f / "boards" / f"{name.replace('-', '_')}.py" for f in folders()]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise UsageError(f"there is no board {name!r} in experiments/boards; {near(name, names())}")
    found = getattr(loaded(path.resolve()), "BOARD", None)
    if not isinstance(found, Board):
        raise UsageError(f"{path} defines no BOARD: write BOARD = Ssh(...), as experiments/boards/agx_xavier.py does")
    return found


def check(asked: Sequence[str]) -> tuple[str, bool]:
    """A screen about each of these boards, all asked at once, and whether everything is as it is wanted."""
    boards = [(name, board(name)) for name in asked]
    for name, one in boards:
        if not isinstance(one, Ssh):
            raise UsageError(f"the board {name!r} is {one.label}: only boards over SSH are checked")

    async def every() -> list[list[str]]:
        return await asyncio.gather(*(one.inspect() for _, one in boards if isinstance(one, Ssh)))

    screens = waited(every())
    text = "\n\n".join("\n".join([f"{one.name} ({name})", *lines]) for (name, one), lines in zip(boards, screens, strict=True))
    fine = not any(line.startswith("WRONG") for lines in screens for line in lines)
    return text + ("\n\neverything is as it is wanted" if fine else ""), fine


def measure(
    exp: Experiment,
    asked: Sequence[str],
    results: Path,
    log: Callable[[str], None],
    debug: bool = False,
    progress: Progress = silent,
    quiet: bool = False,
) -> list[tuple[str, str, str]]:
    """What ``exp`` lacks on these boards; answer (board, state, reason) of what is missing still.

    Machines at once, boards of one machine in turn: they would take each other's time.

    What it lacks elsewhere is left as it is. Networks and predictions are those that are there; what was never predicted is
    predicted first, once.
    """
    exps = [replace(exp, boards=(board(name),)) for name in asked]
    for one in exps:
        if isinstance(one.boards[0], Ssh) and (reason := one.boards[0].lacks("onnx", ())):
            raise UsageError(reason)
    first = Runner(exps[0], results, progress, log, debug)
    first.predict_and_decide([f for f in first.todo() if f.of == "eval"])
    machines: dict[str, list[Experiment]] = {}
    for one in exps:
        own = one.boards[0]
        machines.setdefault(own.alias if isinstance(own, Ssh) else "", []).append(one)
    if len(machines) == 1:
        return [left for one in exps for left in _on_one(one, results, log, debug, progress)]
    with workers(len(machines)) as pool:
        futures = [pool.submit(_on_machine, its, results, debug, quiet) for its in machines.values()]
        return [left for future in futures for left in future.result()]


def _on_machine(exps: Sequence[Experiment], results: Path, debug: bool, quiet: bool) -> list[tuple[str, str, str]]:
    """One after the other, in a process of their own."""

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    return [left for exp in exps for left in _on_one(exp, results, say, debug)]


def _on_one(
    exp: Experiment, results: Path, log: Callable[[str], None], debug: bool, progress: Progress = silent
) -> list[tuple[str, str, str]]:
    runner = Runner(exp, results, progress, log, debug)
    runner.run()
    return [(exp.boards[0].name, state, reason) for state, reason in runner.states() if state in ("fail", "todo")]
