"""Leave when an exit is sure enough of itself."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar, NamedTuple

import numpy as np

from anytime import stops
from anytime.errors import Infeasible, UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions, correct
from anytime.policy import PathCost, Policy, mean_cost

LEVELS = 32  # steps between the quantiles of its scores that an exit's own threshold may take
BEYOND = 1e-6  # how far above the largest possible score a threshold lies that no score reaches


class Curve(NamedTuple):
    """What one shared threshold does on val, at P operating points in the order of ``thresholds``."""

    thresholds: Floats  # [P]
    counts: Ints  # [P, E]: samples that leave at each exit
    spent: Floats  # [P]: mean cost of a sample
    accuracy: Floats  # [P]: share in [0, 1]


@dataclass(frozen=True)
class Threshold(Policy):
    """Compares a score of each exit's logits with a threshold.

    One shared threshold spends, of all that decide differently on val, most within the budget; of equals the most
    accurate. With ``per_exit`` each exit has its own, and they are the most accurate on val that were found within
    the budget: from the shared one, every pair of exits in turn takes the best pair of quantiles of its scores
    (a budget that is used up leaves a single threshold no way to move: what one exit spends another must save),
    until no pair gains accuracy, or saves cost at the same. That is deterministic, never less accurate on val than the
    shared one, and no promise of the global optimum. UsageError with fewer val samples than thresholds.
    Source: this project, both searches.
    ``thresholds`` [E-1] are fitted, midway between neighbouring scores, so that another engine's rounding flips few decisions.
    """

    per_exit: bool = False
    thresholds: tuple[float, ...] = ()

    high: ClassVar[bool]  # True: a score leaves at or over its threshold; False: under it

    @property
    def label(self) -> str:
        """The name of the question."""
        return super().label + (" per exit" if self.per_exit else "")

    @abstractmethod
    def score(self, logits: Floats) -> Floats:
        """[..., K] -> [...]: what is compared with the threshold; never under 0."""

    @abstractmethod
    def largest(self, n_classes: int) -> float:
        """The largest possible score."""

    def curve(self, val: Predictions, cost: PathCost, thresholds: Floats | None = None) -> Curve:
        """Every operating point of one shared threshold; default: all, ascending, that decide differently on val."""
        n_exits, n, n_classes = val.logits.shape
        score = self.score(val.logits[:-1])
        # A sample has left by exit k when the surest of its exits so far passes: one sort per exit serves every threshold.
        surest = (np.maximum if self.high else np.minimum).accumulate(score, axis=0)
        points = self._cuts(surest, n_classes) if thresholds is None else np.asarray(thresholds, dtype=np.float64)

        def going(who: Bools, after: int) -> Ints:  # [P]: how many of them have not left by exit ``after``
            if after < 0 or after == n_exits - 1:
                return np.full(len(points), who.sum() if after < 0 else 0)
            below = np.searchsorted(np.sort(surest[after, who]), points)
            return below if self.high else who.sum() - below

        def leave(who: Bools, at: int) -> Ints:
            return going(who, at - 1) - going(who, at)

        right = correct(val)
        counts = np.stack([leave(np.ones(n, bool), k) for k in range(n_exits)], axis=-1)
        accuracy = np.sum([leave(right[k], k) for k in range(n_exits)], axis=0) / n
        return Curve(points, counts, mean_cost(counts, self.costs(n_exits, cost)), accuracy)

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        if not self.per_exit or val.n_exits == 1:
            return replace(self, thresholds=self._shared(val, cost, budget))
        if len(val.labels) < val.n_exits - 1:
            raise UsageError(
                f"{self.label}: {val.n_exits - 1} thresholds cannot be fitted on {len(val.labels)} val samples; "
                "give the data set a larger val, or use one shared threshold"
            )
        return replace(self, thresholds=self._own(val, cost, budget))

    def _shared(self, val: Predictions, cost: PathCost, budget: float) -> tuple[float, ...]:
        curve = self.curve(val, cost)
        best = self._most(curve.spent, curve.accuracy, budget)
        return (float(curve.thresholds[best]),) * (val.n_exits - 1)

    def _own(self, val: Predictions, cost: PathCost, budget: float) -> tuple[float, ...]:
        n_exits, n, n_classes = val.logits.shape
        costs = self.costs(n_exits, cost)
        score = self.score(val.logits[:-1])
        try:
            start = self._shared(val, cost, budget)
        except Infeasible:  # the first exit is not the cheapest: only thresholds of their own send everyone elsewhere
            ends = (0.0, self.largest(n_classes) + BEYOND)
            always, never = ends if self.high else ends[::-1]
            start = tuple(always if k == costs.argmin() else never for k in range(n_exits - 1))
        grids = [np.union1d(self._quantiles(score[k], n_classes), start[k]) for k in range(n_exits - 1)]
        passes = [s >= g[:, None] if self.high else s < g[:, None] for s, g in zip(score, grids, strict=True)]  # each [G, N]
        # What a sample brings by leaving at an exit: [E, N, 1 + E], whether it is right there, and one to the exit's count.
        one = np.broadcast_to(np.eye(n_exits)[:, None], (n_exits, n, n_exits))
        brings = np.concatenate([correct(val)[..., None], one], axis=-1)

        def along(at: list[int], free: int) -> tuple[Floats, Floats]:
            """Right and spent [G], exit ``free`` at every level of its grid, the others at levels ``at``."""
            leave = np.stack([*(p[g] for p, g in zip(passes, at, strict=True)), np.ones(n, bool)])
            leave[free] = True
            passed = brings[leave.argmax(0), np.arange(n)]
            leave[free] = False
            stayed = brings[leave.argmax(0), np.arange(n)]
            total = stayed.sum(0) + passes[free] @ (passed - stayed)
            return total[:, 0], mean_cost(total[:, 1:], costs)

        at = [int(np.searchsorted(g, t)) for g, t in zip(grids, start, strict=True)]
        right, spent = along(at, 0)
        best, gained = (right[at[0]], -spent[at[0]]), True
        pairs = list(combinations(range(n_exits - 1), 2)) or [(0, 0)]  # a lone threshold is varied by itself
        while gained:
            gained = False
            for other, free in pairs:
                for level in range(len(grids[other])):
                    trial = [level if k == other else g for k, g in enumerate(at)]
                    right, spent = along(trial, free)
                    trial[free] = top = int(np.lexsort((spent, -np.where(spent <= budget, right, -1)))[0])
                    if spent[top] <= budget and (right[top], -spent[top]) > best:
                        at, best, gained = trial, (right[top], -spent[top]), True
        return tuple(float(g[i]) for g, i in zip(grids, at, strict=True))

    def _cuts(self, scores: Floats, n_classes: int) -> Floats:
        """Every threshold that divides ``scores`` differently, ascending: midway between neighbours, and past both ends."""
        s = np.unique(scores)
        middle = (s[:-1] + s[1:]) / 2
        # Between neighbouring floats there is no middle; the upper one divides them, whether ">=" or "<" leaves.
        middle = np.where(middle > s[:-1], middle, s[1:])
        return np.concatenate([[0.0], middle, [self.largest(n_classes) + BEYOND]])

    def _quantiles(self, scores: Floats, n_classes: int) -> Floats:
        cuts = self._cuts(scores, n_classes)
        return np.asarray(cuts[np.linspace(0, len(cuts) - 1, LEVELS + 1).round().astype(int)])

    def _fitted(self, n_read: int) -> Floats:
        if n_read > len(self.thresholds):
            raise UsageError(
                f"{self.label}: exit {n_read} has no threshold, {len(self.thresholds)} are fitted; "
                "call fit with val predictions of this very network first"
            )
        return np.asarray(self.thresholds)


@dataclass(frozen=True)
class MaxProb(Threshold):
    """Leave when the largest softmax probability reaches the threshold.

    Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (MSDNet), ICLR 2018,
    budgeted batch classification. Deviation: thresholds are fitted to the budget itself, not to geometric shares of
    the samples.
    """

    high = True

    def score(self, logits: Floats) -> Floats:
        return stops.max_probability(logits)

    def largest(self, n_classes: int) -> float:
        return 1.0

    def stop(self, logits: Floats) -> Bools:
        return stops.by_max_probability(logits, self._fitted(len(logits)))


@dataclass(frozen=True)
class Entropy(Threshold):
    """Leave when the entropy of the softmax, in nats, lies under the threshold.

    Source: Teerapittayanon et al., "BranchyNet", ICPR 2016, section III, algorithm 1. Deviation: thresholds are fitted
    on val to a budget; the paper reads them off a grid.
    """

    high = False

    def score(self, logits: Floats) -> Floats:
        return stops.entropy(logits)

    def largest(self, n_classes: int) -> float:
        return math.log(n_classes)

    def stop(self, logits: Floats) -> Bools:
        return stops.by_entropy(logits, self._fitted(len(logits)))
