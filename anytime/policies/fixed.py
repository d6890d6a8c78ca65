"""One exit for everyone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anytime import stops
from anytime.errors import UsageError
from anytime.metrics import Bools, Floats, Predictions, correct
from anytime.policy import PathCost, Policy


@dataclass(frozen=True)
class Fixed(Policy):
    """Everyone leaves at one exit, and no other head is run: the anytime curve, point by point.

    ``exit`` is an index; negative ones count from the last exit. ``fit`` picks, of the exits within the budget,
    the one that is most accurate on val; of equals the cheaper. UsageError where the network has no such exit.
    Source: this project.
    """

    exit: int = -1

    def uses(self, n_exits: int) -> tuple[int, ...]:
        """Just that exit."""
        if not -n_exits <= self.exit < n_exits:
            raise UsageError(
                f"Fixed(exit={self.exit}): the network has {n_exits} exits; use 0 to {n_exits - 1}, or -1 for the last"
            )
        return (self.exit % n_exits,)

    def stop(self, logits: Floats) -> Bools:
        return stops.at_first(logits)

    def _least(self, n_exits: int, cost: PathCost) -> float:
        return float(_alone(n_exits, cost).min())

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        costs = _alone(val.n_exits, cost)
        within = np.flatnonzero(costs <= budget)
        right = correct(val).sum(-1)
        return replace(self, exit=int(within[np.lexsort((costs[within], -right[within]))[0]]))


def _alone(n_exits: int, cost: PathCost) -> Floats:
    return np.array([cost.path((k,), k) for k in range(n_exits)])
