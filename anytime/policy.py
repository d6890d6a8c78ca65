"""The promise every exit policy keeps. numpy only; the exit tests themselves are in stops.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from anytime.errors import Infeasible, Leak
from anytime.metrics import Bools, Floats, Ints, Predictions, take
from anytime.spec import Spec


class PathCost(Protocol):
    """What a policy knows of cost: any unit, one number per path."""

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        """Cost of leaving at ``exit`` when the heads of ``uses`` up to it are run."""


@dataclass(frozen=True)
class Policy(Spec, ABC):
    """Decides, sample by sample, at which exit to answer.

    A policy without fitted parameters is a question; ``fit`` returns the answer: a copy that carries them.
    """

    def uses(self, n_exits: int) -> tuple[int, ...]:
        """Exits that it reads, ascending, the last one always among them; heads of others are never run."""
        return tuple(range(n_exits))

    def fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        """A copy whose mean cost on ``val`` is at most ``budget``, in the unit of ``cost``.

        Raises Leak on any part but val, and on samples that the network has learned from; Infeasible when
        the budget lies under the cheapest path.
        """
        if val.part != "val":
            raise Leak(f"{self.label}: policies are fitted on val, not on {val.part}")
        if seen := val.sources & val.trained_on:
            raise Leak(
                f"{self.label}: the network was trained on the samples of this val part (digest {min(seen)}); "
                "fit policies for weights that were trained on the split"
            )
        if not np.isfinite(budget) or budget <= 0:
            raise Infeasible(f"{self.label}: a budget of {budget:g} buys nothing; give a positive one", self._least(val, cost))
        least = self._least(val, cost)
        if budget < least:
            raise Infeasible(
                f"{self.label}: a budget of {budget:g} lies under the cheapest path; the least possible is {least:g}", least
            )
        return self._fit(val, cost, budget)

    def _least(self, val: Predictions, cost: PathCost) -> float:
        return min(self.costs(val.n_exits, cost))

    @abstractmethod
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy: ...

    @abstractmethod
    def stop(self, logits: Floats) -> Bools:
        """Logits [k+1, B, K] of the exits that were read so far -> leave now? [B]. Calls a function of stops.py."""

    def exits(self, logits: Floats) -> Ints:
        """[E, N, K] -> the exit that each sample takes [N]; the last exit takes what is left."""
        n_exits, n, _ = logits.shape
        out = np.full(n, n_exits - 1)
        going = np.ones(n, bool)
        used = self.uses(n_exits)
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
