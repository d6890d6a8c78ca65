"""What exit decisions are worth: arithmetic on predictions and on the exits that samples take.

Letters: E exits, N test samples, V val samples, K classes, G operating points, R resamples.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from anytime.errors import Unsupported
from anytime.metrics import Bools, Floats, Ints, Predictions, auroc, brier, ece, nll, softmax

RESAMPLES = 500
SEED = 0
HOTTEST = 64.0  # a temperature lies within 1/64 and 64: where every sample is right there is no best one


def temperatures(p: Predictions) -> Floats:
    """[E]: the temperature of each exit that minimises the mean NLL of logits / T; the labels of ``p`` are used.

    Bisection on log T: the NLL is convex in 1/T, its slope the mean of (expected logit - logit of the truth). Unsupported without
    samples.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    if not len(p.labels):  # else all would be alike, and an arm that divides by their ratios would be the kept one
        raise Unsupported(f"temperatures need samples, and the {p.part} part has none: give the data set some, as tune=1000")
    z = p.logits.astype(np.float64) - p.logits.max(-1, keepdims=True)
    truth = np.take_along_axis(z, p.labels[None, :, None], axis=-1)[..., 0].mean(-1)  # [E]
    lo, hi = np.full(p.n_exits, -np.log(HOTTEST)), np.full(p.n_exits, np.log(HOTTEST))
    for _ in range(40):
        middle = (lo + hi) / 2
        expected = (softmax(z / np.exp(middle)[:, None, None]) * z).sum(-1).mean(-1)
        colder = expected < truth  # the slope in 1/T is negative: 1/T is too small
        lo, hi = np.where(colder, lo, middle), np.where(colder, middle, hi)
    return np.asarray(np.exp((lo + hi) / 2))


def confidence(logits: Floats, labels: Ints) -> dict[str, float | None]:
    """NLL, Brier score, ECE and AUROC of logits [N, K]; None where nothing can be said."""
    if not len(labels):
        return dict.fromkeys(("nll", "brier", "ece", "auroc"))
    return {
        "nll": nll(logits, labels),
        "brier": brier(logits, labels),
        "ece": ece(logits, labels),
        "auroc": auroc(logits, labels),
    }


def reached(p: Predictions, exits: Ints, uses: tuple[int, ...]) -> dict[str, list[float | None]]:
    """The same of each exit [E], of the samples that reach it: those that leave there or later, exits [N]; None unless read."""
    nobody = np.zeros(len(exits), bool)
    who = [exits >= k if k in uses else nobody for k in range(p.n_exits)]
    each = [confidence(p.logits[k][w], p.labels[w]) for k, w in enumerate(who)]
    return {f"{name}_reached": [said[name] for said in each] for name in each[0]}


def overthinking(right: Bools) -> Floats:
    """[E]: share of samples that are right at an exit and wrong at the last; right [E, N].

    Source: Kaya, Hong, Dumitras, "Shallow-Deep Networks", ICML 2019, section 3 (the destructive effect), exit by exit.
    """
    return np.asarray((right & ~right[-1]).mean(-1))


def flips(exits: Ints, before: Ints, right: Bools, right_there: Bools) -> dict[str, float]:
    """Shares of samples whose exit [N] is not the one taken ``before``.

    ``right``: the answer given; ``right_there``: the answer that this same network would give at the exit taken before, so that
    a harmful flip is the decision's harm and not the weights'.
    """
    flipped = exits != before
    return {
        "exit_flips": float(flipped.mean()),
        "earlier_flips": float((exits < before).mean()),
        "later_flips": float((exits > before).mean()),
        "harmful_flips": float((flipped & ~right & right_there).mean()),
        "helpful_flips": float((flipped & right & ~right_there).mean()),
    }


class Curve(NamedTuple):
    """Accuracy against mean cost: operating points by rising cost, joined by straight lines, flat beyond both ends.

    A point between two neighbours is what sending each sample to one of their two policies by a coin gives.
    """

    cost: Floats
    accuracy: Floats

    def at(self, cost: float) -> float:
        """Accuracy at a mean cost."""
        return float(np.interp(cost, self.cost, self.accuracy))

    def area(self, least: float, most: float) -> float:
        """Mean accuracy over the costs from ``least`` to ``most``."""
        if not least < most:
            return self.at(least)
        inside = self.cost[(self.cost > least) & (self.cost < most)]
        x = np.concatenate([[least], inside, [most]])
        return float(np.trapezoid(np.interp(x, self.cost, self.accuracy), x) / (most - least))


def curve(cost: Floats, accuracy: Floats) -> Curve:
    """Operating points [G] in any order; those of equal cost are averaged."""
    unique, where = np.unique(cost, return_inverse=True)
    return Curve(unique, np.bincount(where, accuracy) / np.bincount(where))


class Family(NamedTuple):
    """One policy at G operating points, by rising cost on val: what it does to the test samples of one network.

    ``costs`` are those of leaving at each exit of that network; ``val_cost`` is what each val sample costs on the network that
    the points were fitted on.
    """

    exits: Ints  # [G, N]
    right: Bools  # [G, N]
    costs: Floats  # [G, E]
    val_cost: Floats  # [G, V]

    def spent(self) -> Floats:
        """[G, N]: what each test sample costs."""
        return np.take_along_axis(self.costs, self.exits.astype(np.intp), axis=1)

    def curve(self) -> Curve:
        """Accuracy against cost on test."""
        return curve(self.spent().mean(1), self.right.mean(1))


@lru_cache(maxsize=4)
def weights(n: int, part: Literal["val", "test"]) -> Floats:
    """[R, n] float32: how often each resample draws each of n samples of a part, over n.

    The same for whoever asks, so resamples are paired; val and test are drawn apart, of whatever size they are.
    """
    seed = (SEED, 1) if part == "val" else SEED
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.asarray(drawn / n, dtype=np.float32)


def resampled(values: Any, part: Literal["val", "test"] = "test") -> Floats:
    """values [G, N] of samples -> their means [R, G] over every resample."""
    return np.asarray(weights(values.shape[1], part) @ values.T.astype(np.float32), dtype=np.float64)


def places(val_cost: Floats, chosen: int) -> Floats:
    """[R]: where on 0 ... G-1 a fit would come to lie on each resample of val, its own place on the whole of val being ``chosen``.

    The place between two operating points is the one that spends, on the resample, what the chosen point spends on val.
    """
    spent = np.maximum.accumulate(resampled(val_cost, "val"), axis=1)
    target = val_cost[chosen].astype(np.float32).mean(dtype=np.float64)
    points = np.arange(len(val_cost), dtype=np.float64)
    return np.array([np.interp(target, row, points) for row in spent])


def between(values: Floats, at: Floats) -> Floats:
    """values [R, G] at places [R] between the operating points -> [R]."""
    low = np.minimum(at.astype(int), values.shape[1] - 1)
    high, rows = np.minimum(low + 1, values.shape[1] - 1), np.arange(len(values))
    share = at - low
    return np.asarray((1 - share) * values[rows, low] + share * values[rows, high])


def mixed_flips(arm: Family, at: Floats, there: Family, at_there: Floats) -> Floats:
    """[R]: share of the test samples of each resample whose exits differ between two families at their places [R].

    One coin mixes the neighbouring points of both, so that families that move alike stay alike.
    """
    low, there_low = at.astype(int), at_there.astype(int)
    high, there_high = np.minimum(low + 1, len(arm.exits) - 1), np.minimum(there_low + 1, len(there.exits) - 1)
    share, there_share = at - low, at_there - there_low
    both, one = np.minimum(share, there_share), np.abs(share - there_share)
    ahead = share > there_share  # the coin that moves but one of them moves the arm
    pairs = [
        np.stack([high, there_high], 1),
        np.stack([np.where(ahead, high, low), np.where(ahead, there_low, there_high)], 1),
        np.stack([low, there_low], 1),
    ]
    asked, which = np.unique(np.concatenate(pairs), axis=0, return_inverse=True)
    means = resampled(np.array([arm.exits[g] != there.exits[h] for g, h in asked]))
    rows = np.arange(len(at))
    split = [means[rows, w] for w in which.reshape(3, -1)]
    return np.asarray(both * split[0] + one * split[1] + (1 - both - one) * split[2])


def limits(arm: Family, chosen: int, own: Family, there: tuple[Family, int] | None = None) -> dict[str, tuple[float, float]]:
    """95 % limits of accuracy, spent, regret and exit flips of the ``chosen`` point of ``arm``.

    ``own`` is the family of the network's own curve, ``there`` that of the network that flips are counted against, with its point.
    Percentile bootstrap over val and test together: every one of R resamples draws both, the same samples for all three
    families, so that differences are paired. A policy is refitted on a resample of val by moving along its operating points,
    mixing two neighbours, to where it spends what it spent (``places``): exact for one threshold but for the width of the
    grid, and no more costly for a policy that learns.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; the moving is this project's.
    """
    at, costs = places(arm.val_cost, chosen), arm.spent()
    spent, right = resampled(costs), resampled(arm.right)
    found = {"accuracy": between(right, at), "spent": between(spent, at)}
    value = {"accuracy": arm.right[chosen].mean(), "spent": costs[chosen].mean()}
    x, y = (spent, right) if own is arm else (resampled(own.spent()), resampled(own.right))
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    best = np.array([np.interp(s, *row) for s, *row in zip(found["spent"], x, y, strict=True)])
    found["regret"] = best - found["accuracy"]
    value["regret"] = own.curve().at(value["spent"]) - value["accuracy"]
    if there is not None:
        found["exit_flips"] = mixed_flips(arm, at, there[0], places(there[0].val_cost, there[1]))
        value["exit_flips"] = (arm.exits[chosen] != there[0].exits[there[1]]).mean()
    ends = {name: np.percentile(values, [2.5, 97.5]) for name, values in found.items()}
    # Rounding must not leave the estimate itself outside.
    return {name: (float(min(lo, value[name])), float(max(hi, value[name]))) for name, (lo, hi) in ends.items()}
