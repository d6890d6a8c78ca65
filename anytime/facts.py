"""The facts that an experiment asks for, by name, and which of them are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from anytime.backend import Backend
from anytime.board import Board
from anytime.config import Arm, Cell, Experiment, Suite
from anytime.policy import Policy
from anytime.record import Kind, Record
from anytime.spec import key

State = Literal["todo", "done", "skip", "fail"]


@dataclass(frozen=True)
class Fact:
    """One question of an experiment. ``name`` is the same whenever and wherever it is asked.

    ``position`` orders cells as the experiment names them. A policy's ``arm`` is one of the experiment's; ``against`` is the
    network that all arms but "refitted" take the policy from, and whose exits theirs are compared with.
    """

    name: str
    of: Kind
    suite: Suite
    cell: Cell
    position: int
    board: Board | None = None
    policy: Policy | None = None
    budget: float = 0.0
    arm: Arm | Literal[""] = ""
    against: Cell | None = None
    needs: tuple[str, ...] = ()  # facts without which it cannot be: a replay's first one is its decide


def reference_cell(cell: Cell, backend: Backend) -> Cell:
    """The same network under the reference backend."""
    return replace(cell, backend=backend)


def retrained_cell(cell: Cell, exp: Experiment) -> Cell | None:
    """The same network trained with the experiment's next training seed; None where there is but one."""
    seeds = exp.train_seeds
    other = seeds[(seeds.index(cell.train_seed) + 1) % len(seeds)]
    return None if other == cell.train_seed else replace(cell, train_seed=other)


def arms_of(cell: Cell, exp: Experiment) -> Iterator[tuple[Arm, Cell | None]]:
    """The arms that a policy has on this network, each with the network that it is held against."""
    reference = reference_cell(cell, exp.reference_backend)
    if cell.backend.own_exits and cell != reference:  # no threshold of another network fits its exits
        yield "refitted", None
        return
    for arm in exp.arms:
        if cell != reference:
            if arm != "retrained":
                yield arm, reference
        elif arm == "refitted":
            yield arm, None
        elif arm == "retrained" and (other := retrained_cell(cell, exp)):
            yield arm, other


def measured(cell: Cell, board: Board) -> str:
    """Name of the fact that this network was timed on this board."""
    return key(("measure", cell, board))


def facts_of(exp: Experiment) -> Iterator[Fact]:
    """Every fact, cell by cell: what it predicts, what it costs on each board, what each policy makes of it, executed."""
    for position, cell in enumerate(exp.cells()):
        suite = exp.suite_of(cell)
        predicts = key(("eval", cell))
        yield Fact(predicts, "eval", suite, cell, position)
        for board in exp.boards:
            yield Fact(measured(cell, board), "measure", suite, cell, position, board, needs=(predicts,))
        if not cell.backend.exits_early(cell.model):
            continue
        arms = tuple(arms_of(cell, exp))
        # A budget in milliseconds belongs to a board; in MACs or BOPs it holds on every one.
        places: tuple[Board | None, ...] = exp.boards if exp.currency == "ms" else (None,)
        for policy in exp.policies:
            for budget in exp.budgets:
                for place in places:
                    asked = (cell, policy, budget, exp.currency, exp.reference_model(cell), exp.reference_backend, place)
                    # A bound is what it is on this very network.
                    for arm, against in (a for a in arms if a[0] == "refitted" or not policy.bound):
                        # Another training may take the place of the one that a retrained policy came from.
                        name = key(("decide", *asked, arm, against) if arm == "retrained" else ("decide", *asked, arm))
                        needs: tuple[str, ...] = (predicts, measured(cell, place)) if place else (predicts,)
                        yield Fact(name, "decide", suite, cell, position, place, policy, budget, arm, against, needs)
                        for board in exp.boards if arm == "refitted" and not policy.bound else ():
                            if place in (None, board):
                                executed = key(("replay", *asked, arm, board))
                                needs = (name, measured(cell, board), predicts)
                                yield Fact(executed, "replay", suite, cell, position, board, policy, budget, arm, against, needs)


def state(fact: Fact, known: Mapping[str, tuple[Record, Path]]) -> tuple[State, str]:
    """Whether the fact is there, and the reason where it is skipped or failed.

    A fact that needs a skipped or failed one shares its fate. What was skipped because something was missing on
    the machine is to do again once it is there.
    """
    if fact.name not in known:
        for name in fact.needs:
            if name in known and known[name][0].kind in ("skip", "fail"):
                return _state(known[name][0], fact)
        return "todo", ""
    return _state(known[fact.name][0], fact)


def _state(record: Record, fact: Fact) -> tuple[State, str]:
    if record.kind == "fail":
        return "fail", record.reason
    if record.kind == "skip":
        said, mended = record.facts, False
        if said.get("by") == "why_not":
            mended = fact.cell.backend.why_not() is None
        elif said.get("by") == "board" and fact.board is not None:
            mended = fact.board.lacks(said["form"], said["needs"]) is None
        return ("todo", "") if mended else ("skip", record.reason)
    return "done", ""
