"""What thresholds on a score can do, exactly: the room beside policy.py for keepers that compare one with the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np

from anytime import stops
from anytime.errors import Infeasible, UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions
from anytime.policy import Listed, PathCost, Points, Policy, mean_cost

LEVELS = 32  # steps between the quantiles of its scores that an exit's own threshold may take
BEYOND = 1e-6  # how far above the largest possible score a threshold lies that no score reaches
TIE = 1e-9  # samples: a half that sums of shares have missed by rounding is still a half

T = TypeVar("T", bound="Threshold")


class Curve(NamedTuple):
    """What one shared threshold does on val, at P operating points in the order of ``thresholds``."""

    thresholds: Floats  # [P]
    counts: Ints  # [P, E]: samples that leave at each exit
    spent: Floats  # [P]: mean cost of a sample
    accuracy: Floats  # [P]: share in [0, 1]


@dataclass(frozen=True)
class Threshold(Policy):
    """Compares a score of what was read so far with a threshold of the exit.

    ``thresholds`` [E-1] are fitted, midway between neighbouring scores, so that another engine's rounding flips few decisions.
    UsageError with fewer val samples than thresholds that are fitted.
    """

    thresholds: tuple[float, ...] = field(default=(), kw_only=True)

    high: ClassVar[bool] = True  # True: a score leaves at or over its threshold; False: under it

    def scores(self, logits: Floats) -> Floats:
        """[E, N, K] -> [E, N]: what is compared with the thresholds; row k follows logits[:k+1] alone, and is never under 0."""
        return self._scores(self._tempered(logits))

    def _scores(self, logits: Floats) -> Floats:
        """``scores`` with the temperatures already in the logits; default: the largest softmax probability."""
        return stops.max_probability(logits)

    def _stop(self, logits: Floats) -> Bools:
        return stops.by_max_probability(logits, self.thresholds)

    def largest(self, n_classes: int) -> float:
        """The largest possible score."""
        return 1.0

    def stop(self, logits: Floats) -> Bools:
        """Logits [k+1, B, K] of the exits that were read so far -> leave now? [B]."""
        if len(logits) > len(self.thresholds):
            raise UsageError(
                f"{self.label}: exit {len(logits)} has no threshold, {len(self.thresholds)} are fitted; "
                "call fit with val predictions of this very network first"
            )
        return super().stop(logits)

    def passes(self, scores: Floats, thresholds: Floats) -> Bools:
        """Which scores leave, under thresholds that they are broadcast with."""
        return np.asarray(scores >= thresholds if self.high else scores < thresholds)

    def curve(self, val: Predictions, cost: PathCost, thresholds: Floats | None = None) -> Curve:
        """Every operating point of one shared threshold; default: all, ascending, that decide differently on val."""
        n_exits, n, n_classes = val.logits.shape
        score = self.scores(val.logits[:-1])
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

        right = self.right(val)
        counts = np.stack([leave(np.ones(n, bool), k) for k in range(n_exits)], axis=-1)
        accuracy = np.sum([leave(right[k], k) for k in range(n_exits)], axis=0) / n
        return Curve(points, counts, mean_cost(counts, self.costs(n_exits, cost)), accuracy)

    def matched(self: T, shares: Sequence[float], logits: Floats) -> T:
        """A copy that sends these shares [E] of unlabelled samples, logits [E, N, K], out of each exit.

        Threshold by threshold from the first exit on, each as near to its share of all samples as the scores of those still
        going can be divided; what one exit missed, the next makes up for. UsageError for shares that are none.
        """
        n_exits, n, n_classes = logits.shape
        wanted = np.asarray(shares, dtype=np.float64)
        if len(wanted) != n_exits or (wanted < 0).any() or not abs(wanted.sum() - 1) < 1e-6:
            raise UsageError(f"{self.label}: {n_exits} shares that sum to 1 are needed, one per exit, not {tuple(shares)}")
        if not n:
            raise UsageError(f"{self.label}: there are no samples whose exits could be matched to shares")
        if not np.isfinite(logits).all():
            raise UsageError(f"{self.label}: logits that are not finite cannot be matched to shares; look at the network")
        return replace(self, thresholds=Divider(self, self.scores(logits[:-1]), n_classes).divide(wanted * n).thresholds)

    def _enough(self, val: Predictions) -> None:
        """UsageError unless there is a sample for every threshold."""
        if len(val.labels) < val.n_exits - 1:
            raise UsageError(
                f"{self.label}: {val.n_exits - 1} thresholds cannot be fitted on {len(val.labels)} val samples; "
                "give the data set a larger val, or use one shared threshold"
            )

    def _cuts(self, scores: Floats, n_classes: int) -> Floats:
        """Every threshold that divides ``scores`` differently, ascending: midway between neighbours, and past both ends."""
        s = np.unique(scores)
        return np.concatenate([[0.0], _between(s[:-1], s[1:]), [self.largest(n_classes) + BEYOND]])


def _between(lower: Floats, upper: Floats) -> Floats:
    """Thresholds that divide two scores. Neighbouring floats have no middle; the upper one divides them, for >= as for <."""
    middle = (lower + upper) / 2
    return np.where(middle > lower, middle, upper)


def lower(rows: Sequence[Sequence[float]]) -> Floats:
    """Rows that grow by one, as a matrix [E-1, ...] with zeros after their ends."""
    matrix = np.zeros((len(rows), max(map(len, rows), default=0)))
    for k, row in enumerate(rows):
        matrix[k, : len(row)] = row
    return matrix


class Divided(NamedTuple):
    """Samples, sent out by thresholds."""

    thresholds: tuple[float, ...]  # [E-1]
    exits: Ints  # [N]


class Divider:
    """Finds thresholds that send wanted numbers of samples, whose scores are [E-1, N], out of each exit."""

    def __init__(self, policy: Threshold, scores: Floats, n_classes: int) -> None:
        self.order = np.argsort(-scores if policy.high else scores, axis=1, kind="stable")  # surest first
        self.sorted = np.take_along_axis(scores, self.order, axis=1)
        everyone, nobody = 0.0, policy.largest(n_classes) + BEYOND
        self.everyone, self.nobody = (everyone, nobody) if policy.high else (nobody, everyone)

    def divide(self, wanted: Floats) -> Divided:
        """For the wanted numbers [E] of samples; equal scores leave together, and of two ways as near fewer do."""
        links, n = self.order.shape
        exits, here, missed, thresholds = np.full(n, links), np.ones(n, bool), 0.0, []
        for k in range(links):
            going = here.take(self.order[k]).nonzero()[0]  # places among the sorted, surest first
            leave = _whole(self.sorted[k], going, wanted[k] + missed)
            if leave == 0:
                thresholds.append(self.nobody)
            elif leave == len(going):
                thresholds.append(self.everyone)
            else:
                border = self.sorted[k][going[leave - 1 : leave + 1]]
                thresholds.append(float(_between(border.min(), border.max())))
            who = self.order[k].take(going[:leave])
            exits[who], here[who] = k, False
            missed += wanted[k] - leave
        return Divided(tuple(thresholds), exits)


def _whole(scores: Floats, going: Ints, wanted: float) -> int:
    """How many of ``going``, places in the sorted scores, to send out: the number nearest to ``wanted`` that parts no equal scores."""
    n = min(max(math.ceil(wanted - 0.5 - TIE), 0), len(going))
    if n in (0, len(going)) or scores[going[n - 1]] != scores[going[n]]:
        return n
    same = np.flatnonzero(scores[going] == scores[going[n]])
    fewer, more = int(same[0]), int(same[-1]) + 1
    return fewer if wanted - fewer <= more - wanted + TIE else more


@dataclass(frozen=True)
class Searched(Threshold, Listed):
    """Thresholds that are searched for: one for all exits, or with ``per_exit`` one for each.

    One shared threshold spends, of all that decide differently on val, most within the budget; of equals the most
    accurate. With ``per_exit`` each exit has its own, and they are the most accurate on val that were found within
    the budget: from the shared one, every pair of exits in turn takes the best pair of quantiles of its scores
    (a budget that is used up leaves a single threshold no way to move: what one exit spends another must save),
    until no pair gains accuracy, or saves cost at the same. That is deterministic, never less accurate on val than the
    shared one, and no promise of the global optimum.
    Source: this project, both searches.
    """

    per_exit: bool = False

    @property
    def label(self) -> str:
        """The name of the question."""
        return super().label + (" per exit" if self.per_exit else "")

    def _points(self, val: Predictions, cost: PathCost) -> Points:
        curve = self.curve(val, cost)
        links = val.n_exits - 1
        return Points(curve.spent, curve.accuracy, lambda i: replace(self, thresholds=(float(curve.thresholds[i]),) * links))

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        if not self.per_exit:
            return super()._fit(val, cost, budget)
        self._enough(val)
        self._affords(val.n_exits, cost, budget)
        return replace(self, thresholds=self._own(val, cost, budget))

    def _fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        if not self.per_exit:
            return super()._fit_accuracy(val, cost, accuracy)
        try:  # thresholds of their own start from the shared one, and go on to what is cheaper
            shared = super()._fit_accuracy(val, cost, accuracy)
            return self._halve(val, cost, accuracy, shared.spends(shared.leave(val), val.n_exits, cost))
        except Infeasible:
            return self._halve(val, cost, accuracy, float(self.costs(val.n_exits, cost).max()))

    def _own(self, val: Predictions, cost: PathCost, budget: float) -> tuple[float, ...]:
        n_exits, n, n_classes = val.logits.shape
        costs = self.costs(n_exits, cost)
        score = self.scores(val.logits[:-1])
        start: tuple[float, ...]
        try:
            shared = super()._fit(val, cost, budget)
            assert isinstance(shared, Threshold)
            start = shared.thresholds
        except Infeasible:  # the first exit is not the cheapest: only thresholds of their own send everyone elsewhere
            ends = (0.0, self.largest(n_classes) + BEYOND)
            always, never = ends if self.high else ends[::-1]
            start = tuple(always if k == costs.argmin() else never for k in range(n_exits - 1))
        grids = [np.union1d(self._quantiles(score[k], n_classes), start[k]) for k in range(n_exits - 1)]
        passes = [self.passes(s, g[:, None]) for s, g in zip(score, grids, strict=True)]  # each [G, N]
        # What a sample brings by leaving at an exit: [E, N, 1 + E], whether it is right there, and one to the exit's count.
        one = np.broadcast_to(np.eye(n_exits)[:, None], (n_exits, n, n_exits))
        brings = np.concatenate([self.right(val)[..., None], one], axis=-1)

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

    def _quantiles(self, scores: Floats, n_classes: int) -> Floats:
        cuts = self._cuts(scores, n_classes)
        return np.asarray(cuts[np.linspace(0, len(cuts) - 1, LEVELS + 1).round().astype(int)])
