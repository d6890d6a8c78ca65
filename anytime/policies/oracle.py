"""The most accurate that leaving could be at a cost, labels known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anytime.errors import Unsupported, UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions, correct
from anytime.policy import PathCost, Policy, mean_cost


@dataclass(frozen=True)
class Oracle(Policy):
    """Leave at the cheapest exit that is right, else at the cheapest of all, as far as the budget goes: a bound.

    Of all who leave at one exit, answer with it and run every head on the way, nobody spends less for as many right answers
    (who reads fewer heads, as Fixed and Reading, or answers with several exits, as ZTW, may): each sample that the cheapest
    exit gets wrong costs its own extra to get right, and the budget pays for the smallest extras first (of equals for the first
    sample). That optimum is found anew on whatever predictions it is asked about. ``fit`` only keeps ``budget`` and ``prices``
    [E], the cost of leaving at each exit. ``fit_accuracy`` keeps the least budget that reaches the accuracy on val.
    Source: this project; "first correct exit" is the oracle of Huang et al. (MSDNet) and Kaya et al. (SDN).
    """

    bound = True

    budget: float | None = None
    prices: tuple[float, ...] = ()

    def leave(self, p: Predictions) -> Ints:
        """The exit that each sample takes [N]."""
        if self.budget is None or len(self.prices) != p.n_exits:
            raise UsageError(f"{self.label}: it has prices for {len(self.prices)} exits and not for {p.n_exits}; call fit first")
        order, counts = self._bought(p)
        spent = mean_cost(counts, np.array(self.prices))
        paid = order[: int(np.flatnonzero(spent <= self.budget)[-1])] if spent[0] <= self.budget else order[:0]
        exits = np.full(len(p.labels), int(np.argmin(self.prices)))
        exits[paid] = self._goal(p)[paid]
        return exits

    def _goal(self, p: Predictions) -> Ints:
        """The cheapest exit that is right about each sample, the cheapest of all where none is [N]."""
        by_price = np.argsort(self.prices, kind="stable")
        return np.asarray(by_price[correct(p)[by_price].argmax(0)])

    def _bought(self, p: Predictions) -> tuple[Ints, Ints]:
        """Samples that money makes right, the cheapest first [M], and how many leave where after each of them [M + 1, E]."""
        prices, goal = np.array(self.prices), self._goal(p)
        order = np.argsort(prices[goal], kind="stable")
        start = np.bincount(np.full(len(goal), prices.argmin()), minlength=len(prices))
        moved = np.eye(len(prices), dtype=int)[goal[order]] - np.eye(len(prices), dtype=int)[prices.argmin()]
        return order, np.concatenate([start[None], start + moved.cumsum(0)])

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        self._affords(val.n_exits, cost, budget)
        return replace(self, budget=min(float(budget), float(np.finfo(float).max)), prices=self._priced(val, cost))

    def _fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        priced = replace(self, prices=self._priced(val, cost))
        order, counts = priced._bought(val)
        goal, start = priced._goal(val), correct(val)[int(np.argmin(priced.prices))]
        gained = correct(val)[goal, np.arange(len(goal))] & ~start
        right = (start.sum() + np.concatenate([[0], gained[order].cumsum()])) / len(goal)
        enough = np.flatnonzero(right >= accuracy)
        if not len(enough):
            raise self._out_of_reach(accuracy, float(right.max()))
        return replace(priced, budget=float(mean_cost(counts[enough[0]], np.array(priced.prices))))

    def _priced(self, val: Predictions, cost: PathCost) -> tuple[float, ...]:
        return tuple(self.costs(val.n_exits, cost).tolist())

    def _stop(self, logits: Floats) -> Bools:
        raise Unsupported(f"{self.label} looks at the labels, so no board can run it: it is a bound")

    def exits(self, logits: Floats) -> Ints:
        """Unsupported: logits alone do not tell it where to leave."""
        raise Unsupported(f"{self.label} looks at the labels, so logits alone do not do: ask leave(predictions)")
