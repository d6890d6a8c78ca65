"""Send shares of the samples, that grow or fall by one factor, out of each exit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anytime.metrics import Floats, Predictions, take
from anytime.policy import Listed, PathCost, Points, mean_cost
from anytime.threshold import Divider, Threshold

STEPS = 1000  # of q / (1 + q) from 0, where everyone leaves at the first exit, to 1, where nobody leaves before the last


@dataclass(frozen=True)
class GeometricSplit(Threshold, Listed):
    """Leave when the largest softmax probability reaches the threshold of an exit, which keeps its share of the samples.

    Of the samples that reach it, exit k lets the surest go, so many that its share of all is proportional to q^k. ``fit``
    picks the q that spends most within the budget; of equals the most accurate on val, then the smallest.
    Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (MSDNet), ICLR 2018,
    section 5.1 and its code. Deviations: 1,001 values of q, 0 and infinity among them, where the code has 39 of 0.05 to 1.95;
    shares are rounded to the nearest number of samples, not down, and thresholds lie midway between two scores.
    """

    def _points(self, val: Predictions, cost: PathCost) -> Points:
        self._enough(val)
        n_exits, n, n_classes = val.logits.shape
        divider, right = Divider(self, self.scores(val.logits[:-1]), n_classes), self.right(val)
        divided = [divider.divide(n * share) for share in shares(n_exits)]
        counts = np.stack([np.bincount(d.exits, minlength=n_exits) for d in divided])
        spent = mean_cost(counts, self.costs(n_exits, cost))
        accuracy = np.array([take(right, d.exits).mean() for d in divided])
        return Points(spent, accuracy, lambda i: replace(self, thresholds=divided[i].thresholds))


def shares(n_exits: int, steps: int = STEPS) -> Floats:
    """Of all samples, what leaves at each exit [steps + 1, E], for q from 0 to infinity."""
    t = np.linspace(0, 1, steps + 1)[:, None]
    k = np.arange(n_exits)
    raw = t**k * (1 - t) ** (n_exits - 1 - k)  # q^k, for q = t / (1 - t)
    return np.asarray(raw / raw.sum(1, keepdims=True))
