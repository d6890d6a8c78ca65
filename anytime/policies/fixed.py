"""One exit for everyone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anytime import stops
from anytime.errors import UsageError
from anytime.metrics import Bools, Floats, Predictions, correct
from anytime.policy import Listed, PathCost, Points, Policy


@dataclass(frozen=True)
class Fixed(Listed):
    """Everyone leaves at one exit, and no other head is run: the anytime curve, point by point.

    ``exit`` is an index; negative ones count from the last exit. ``fit`` picks, of the exits within the budget,
    the one that is most accurate on val; of equals the cheaper. UsageError where the network has no such exit.
    Source: this project.
    """

    least_exits = 1

    exit: int = -1

    def uses(self, n_exits: int) -> tuple[int, ...]:
        """Just that exit."""
        if not -n_exits <= self.exit < n_exits:
            raise UsageError(
                f"Fixed(exit={self.exit}): the network has {n_exits} exits; use 0 to {n_exits - 1}, or -1 for the last"
            )
        return (self.exit % n_exits,)

    def _stop(self, logits: Floats) -> Bools:
        return stops.at_first(logits)

    def _points(self, val: Predictions, cost: PathCost) -> Points:
        alone = np.array([cost.path((k,), k) for k in range(val.n_exits)])
        return Points(alone, correct(val).mean(-1), lambda k: replace(self, exit=k))

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        points = self._points(val, cost)
        within = np.flatnonzero(points.spent <= budget)
        if not len(within):
            raise self._infeasible(budget, float(points.spent.min()))
        return points.at(int(within[np.lexsort((points.spent[within], -points.accuracy[within]))[0]]))
