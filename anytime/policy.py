"""The promise every exit policy keeps. numpy only; the exit tests themselves are in stops.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from anytime.errors import Infeasible, Leak, UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions, take
from anytime.spec import Spec


class PathCost(Protocol):
    """What a policy knows of cost: any unit, one number per path."""

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        """Cost of leaving at ``exit`` when the heads of ``uses`` up to it are run."""


@dataclass(frozen=True)
class Policy(Spec, ABC):
    """Decides, sample by sample, at which exit to answer.

    A policy without fitted parameters is a question; ``fit`` returns the answer: a copy that carries them,
    as plain Python numbers, so that a record holds them exactly.
    """

    @property
    def label(self) -> str:
        """The name of the question, which tables group by: nothing fitted is in it."""
        return type(self).__name__

    def uses(self, n_exits: int) -> tuple[int, ...]:
        """Exits that it reads, ascending; the last of them takes what is left. Heads of others are never run."""
        return tuple(range(n_exits))

    def fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        """A copy whose mean cost on ``val`` (see ``spends``) is at most ``budget``, in the unit of ``cost``.

        Raises Leak on any part but val, and on samples that the network has learned from; Infeasible when
        the budget lies under the least that it can spend; UsageError when there are too few samples.
        """
        if val.part != "val":
            raise Leak(f"{self.label}: policies are fitted on val, not on {val.part}")
        if seen := val.sources & val.trained_on:
            raise Leak(
                f"{self.label}: the network was trained on the samples of this val part (digest {min(seen)}); "
                "fit policies for weights that were trained on the split"
            )
        if not len(val.labels):
            raise UsageError(f"{self.label}: the val part has no samples to fit on; give the data set a larger val")
        least = self._least(val.n_exits, cost)
        # Not "budget < least": NaN must not pass.
        if not budget >= least:
            raise self._infeasible(budget, least)
        return self._fit(val, cost, budget)

    def _least(self, n_exits: int, cost: PathCost) -> float:
        return float(self.costs(n_exits, cost).min())

    def _infeasible(self, budget: float, least: float) -> Infeasible:
        # Digits in full: the least that is named must itself be a budget that works.
        return Infeasible(
            f"{self.label}: a budget of {budget} is too small; the least possible is {least}, give that or more", least
        )

    @abstractmethod
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy: ...

    def _most(self, spent: Floats, accuracy: Floats, budget: float) -> int:
        """Which of the candidates spends most within the budget; of equals the most accurate, then the first."""
        within = np.flatnonzero(spent <= budget)
        if not len(within):
            raise self._infeasible(budget, float(spent.min()))
        return int(within[np.lexsort((-accuracy[within], -spent[within]))[0]])

    @abstractmethod
    def stop(self, logits: Floats) -> Bools:
        """Logits [k+1, B, K] of the exits that were read so far -> leave now? [B]. Calls a function of stops.py."""

    def exits(self, logits: Floats) -> Ints:
        """[E, N, K] -> the exit that each sample takes [N]; the last exit in use takes what is left."""
        n_exits, n, _ = logits.shape
        used = self.uses(n_exits)
        out = np.full(n, used[-1])
        going = np.ones(n, bool)
        for i, k in enumerate(used[:-1]):
            leave = going & self.stop(logits[list(used[: i + 1])])
            out[leave] = k
            going &= ~leave
        return out

    def answer(self, logits: Floats, exits: Ints) -> Floats:
        """The logits that are answered [N, K]: those of the exit taken."""
        return take(logits, exits)

    def costs(self, n_exits: int, cost: PathCost) -> Floats:
        """Cost of leaving at each exit [E] under this policy's own heads; infinite where it never leaves."""
        used = self.uses(n_exits)
        return np.array([cost.path(used, k) if k in used else np.inf for k in range(n_exits)])

    def spends(self, logits: Floats, cost: PathCost) -> float:
        """Mean cost of a sample of logits [E, N, K] in the unit of ``cost``: what a budget limits."""
        n_exits = len(logits)
        return float(mean_cost(np.bincount(self.exits(logits), minlength=n_exits), self.costs(n_exits, cost)))


def mean_cost(counts: Ints, costs: Floats) -> Floats:
    """Mean cost of a sample [...] when counts [..., E] samples leave at each exit, at costs [E].

    Exact, up to the last division, for costs that are whole numbers.
    """
    taken = counts > 0
    total = (counts * np.where(taken, costs, 0)).sum(-1)  # an exit that nobody takes may cost infinity
    # All at one exit cost exactly that exit: rounding must not carry a mean out of the range of its values.
    least, most = np.where(taken, costs, np.inf).min(-1), np.where(taken, costs, -np.inf).max(-1)
    return np.asarray(np.clip(total / counts.sum(-1), least, most))
