"""How long 1,000 operating points of one shared threshold take on 10,000 samples x 7 exits x 10 classes.

The whole curve at once against one exit test per sample, exit and threshold, which is timed on a part of the points
and samples and must give the same answers there. Run: OMP_NUM_THREADS=1 python benchmarks/policies.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np

from anytime.metrics import Floats, Predictions
from anytime.policies.threshold import Entropy, MaxProb, Threshold

POINTS, E, N, K = 1000, 7, 10_000, 10
PART_POINTS, PART_N = 10, 300


@dataclass(frozen=True)
class Chain:
    """A link costs 100, a head 7."""

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return 100.0 * (exit + 1) + 7.0 * sum(k <= exit for k in uses)


def made_up() -> Predictions:
    """Logits of a network that is surer and more often right the deeper it is read."""
    rng = np.random.default_rng(0)
    labels = rng.integers(K, size=N)
    logits = rng.normal(size=(E, N, K)).astype(np.float32)
    logits[:, np.arange(N), labels] += (np.arange(1, E + 1)[:, None] * rng.exponential(1.0, N)).astype(np.float32)
    return Predictions(logits, labels, "val")


def loop(
    policy: Threshold, val: Predictions, cost: Chain, thresholds: Floats
) -> tuple[list[list[int]], list[float], list[float]]:
    """Counts, mean cost and accuracy at each threshold, one sample and one exit after the other."""
    n_exits, n, _ = val.logits.shape
    uses = policy.uses(n_exits)
    all_counts, spent, accuracy = [], [], []
    for t in thresholds:
        one = replace(policy, thresholds=(float(t),) * (n_exits - 1))
        counts, paid, right = [0] * n_exits, 0.0, 0
        for i in range(n):
            k = next((k for k in range(n_exits - 1) if one.stop(val.logits[: k + 1, i : i + 1])[0]), n_exits - 1)
            counts[k] += 1
            paid += cost.path(uses, k)
            right += int(val.logits[k, i].argmax() == val.labels[i])
        all_counts.append(counts)
        spent.append(paid / n)
        accuracy.append(right / n)
    return all_counts, spent, accuracy


def main() -> int:
    val, cost = made_up(), Chain()
    part = replace(val, logits=val.logits[:, :PART_N], labels=val.labels[:PART_N])
    print(
        f"{POINTS} thresholds x {N} samples x {E} exits x {K} classes; median of 5; the loop on {PART_POINTS} x {PART_N}, scaled"
    )
    for policy in (MaxProb(), Entropy()):
        thresholds = np.linspace(0, policy.largest(K), POINTS)
        curve_s = float(np.median([timed(partial(policy.curve, val, cost, thresholds)) for _ in range(5)]))
        few = thresholds[:: POINTS // PART_POINTS]
        started = perf_counter()
        counts, spent, accuracy = loop(policy, part, cost, few)
        loop_s = (perf_counter() - started) * (POINTS / len(few)) * (N / PART_N)
        curve = policy.curve(part, cost, few)
        same = curve.counts.tolist() == counts and curve.spent.tolist() == spent and curve.accuracy.tolist() == accuracy
        fit_s = timed(partial(policy.fit, val, cost, 350.0))
        own_s = timed(partial(replace(policy, per_exit=True).fit, val, cost, 350.0))
        print(
            f"{policy.label:8} curve {curve_s:6.3f} s   loop {loop_s:8.0f} s   ratio {loop_s / curve_s:9,.0f}   "
            f"answers {'equal' if same else 'DIFFER'}   fit of one threshold {fit_s:.3f} s, of {E - 1}: {own_s:.2f} s"
        )
        if not same:
            return 1
    return 0


def timed(what: Callable[[], object]) -> float:
    """Seconds."""
    started = perf_counter()
    what()
    return perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
