"""Leave as early as a guarantee allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from anytime.errors import UsageError
from anytime.metrics import Floats, Predictions, correct, take
from anytime.policy import Listed, PathCost, Points, Policy
from anytime.threshold import BEYOND, Threshold

LADDER = 500  # thresholds that are tried
SUREST = 16.0  # log-odds of the first of them


@dataclass(frozen=True)
class RiskControl(Threshold, Listed):
    """Leave when the largest softmax probability reaches a threshold that keeps the risk at ``epsilon`` or less.

    With probability ``1 - delta`` over the draw of val, the risk on samples of the same distribution is at most ``epsilon``.
    ``against`` "last": the share of samples that are answered with another class than the last exit's (no labels are needed);
    "labels": the accuracy of the last exit minus that of the policy. The guarantee belongs to the network whose val it
    was fitted on: after compression it must be fitted again, and ``matched`` or ``tempered`` copies have none.
    ``fit`` takes the cheapest threshold with the guarantee, and is Infeasible when that spends more than the budget;
    ``fit_accuracy`` the cheapest with it that is accurate enough on val. Where nothing can be shown nobody leaves early.
    Source: Jazbec et al., "Fast yet Safe: Early-Exiting with Risk Control", NeurIPS 2024 (arXiv 2405.20915), consistency
    and performance-gap risk. Deviations: thresholds of a ladder that was laid before val was seen are tested from the
    strictest on until one fails (fixed-sequence testing: Angelopoulos et al., "Learn then Test", 2021), which needs no risk
    that is monotone in the threshold; the test against the last exit is the exact binomial one, as its losses are 0 or 1;
    the other, with losses of -1 to 1, is the paper's: by betting (Waudby-Smith and Ramdas, JRSS B 2024).
    """

    promises = True

    epsilon: float = 0.05
    delta: float = 0.1
    against: Literal["last", "labels"] = "last"

    @property
    def label(self) -> str:
        """The name of the question."""
        sure = "" if self.delta == RiskControl.delta else f" (delta {self.delta:g})"
        return f"{super().label} {self.epsilon:g}" + (" of accuracy" if self.against == "labels" else "") + sure

    def losses(self, p: Predictions) -> Floats:
        """What is lost when sample n leaves at exit e [E, N]; at the last exit nothing."""
        if self.against == "last":
            said = p.logits.argmax(-1)
            return np.asarray(said != said[-1], dtype=np.float64)
        right = correct(p).astype(np.float64)
        return np.asarray(right[-1] - right)

    def _points(self, val: Predictions, cost: PathCost) -> Points:
        if not (0 < self.epsilon < 1 and 0 < self.delta < 1):
            raise UsageError(f"{self.label}: epsilon and delta must lie between 0 and 1, not {self.epsilon} and {self.delta}")
        links, losses, shown = val.n_exits - 1, self.losses(val), [1.0 + BEYOND]  # who never leaves early loses nothing
        test = binomial_p if self.against == "last" else betting_p
        passes = self.scores(val.logits[:-1])
        for threshold in ladder(val.logits.shape[-1]):
            leave = np.concatenate([passes >= threshold, np.ones((1, len(val.labels)), bool)]).argmax(0)
            if test(take(losses, leave), self.epsilon, self.delta) > self.delta:
                break
            shown.append(float(threshold))
        curve = self.curve(val, cost, np.array(shown))
        return Points(curve.spent, curve.accuracy, lambda i: replace(self, thresholds=(shown[i],) * links))

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        points = self._points(val, cost)
        cheapest = int(np.argmin(points.spent))
        if not points.spent[cheapest] <= budget:
            raise self._infeasible(budget, float(points.spent[cheapest]))
        return points.at(cheapest)


def ladder(n_classes: int) -> Floats:
    """Thresholds, the strictest first, even in log-odds down to equal probabilities, where everyone leaves."""
    return np.append(1 / (1 + np.exp(-np.linspace(SUREST, -np.log(n_classes - 1), LADDER - 1))), 0.0)


def binomial_p(losses: Floats, risk: float, delta: float) -> float:
    """How likely losses [N] of 0 and 1 are so few, or fewer, if the true share is ``risk`` or more; ``delta`` is not used."""
    from scipy.stats import binom

    return float(binom.cdf(int(losses.sum()), len(losses), risk))


def betting_p(losses: Floats, risk: float, delta: float) -> float:
    """A p-value of "the mean of losses [N] in [-1, 1] is ``risk`` or more": one over the most that betting against it won.

    Bets are sized to win 1 / ``delta``; the p-value is valid whatever their size, if losses come in random order. A folder of
    images lists class by class, so they are shuffled, always alike.
    Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", section 4, predictable
    plug-in bets; Ville's inequality lets one stop at the best moment.
    """
    losses = np.random.default_rng(0).permutation(losses)
    x, m, n = (losses + 1) / 2, (risk + 1) / 2, len(losses)
    t = np.arange(1, n + 1)
    mean = (0.5 + x.cumsum()) / (t + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum()) / (t + 1)
    before = np.concatenate([[0.25], variance[:-1]])  # a bet may know only what came before it
    # The variance is tiny where losses are rare: a bet may win much, but never lose all.
    bet = np.minimum(np.sqrt(2 * np.log(1 / delta) / (n * before)), 0.5 / (1 - m))
    return float(min(1.0, np.exp(-np.log1p(-bet * (x - m)).cumsum().max())))
