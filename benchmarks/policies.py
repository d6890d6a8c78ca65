"""How long 1,000 operating points of a policy take on 10,000 samples x 7 exits x 10 classes, and one exit test on one sample.

All points at once against one exit test per sample, exit and point, which is timed on a part of the points and samples
and must give the same answers there. CPU seconds of one thread. Run: OMP_NUM_THREADS=1 python benchmarks/policies.py
With files of cached logits as arguments (NAME=results/cache/predictions/KEY.npz): how often the promise of risk control, against
the last exit, holds over 200 random splits of them. It speaks of the distribution that val was drawn from, which here is all
samples of the file; "on the rest" is judged by those that were not drawn, which is harder: few losses drawn leave many.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

import numpy as np
from keep import keep

from anytime.metrics import Floats, Predictions, take
from anytime.policies.confidence import Entropy, Margin, MaxProb
from anytime.policies.eenet import EENet
from anytime.policies.geometric import GeometricSplit
from anytime.policies.risk import RiskControl
from anytime.policies.sdn import SDN
from anytime.policies.ztw import ZTW
from anytime.policy import Policy
from anytime.threshold import Searched, Threshold

POINTS, E, N, K = 1000, 7, 10_000, 10
PART_POINTS, PART_N = 10, 300
EPSILONS, DELTA, SPLITS, DRAWN = (0.01, 0.02, 0.05), 0.1, 200, 2000


@dataclass(frozen=True)
class Chain:
    """A link costs 100, a head 7."""

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return 100.0 * (exit + 1) + 7.0 * sum(k <= exit for k in uses)


class Many(NamedTuple):
    """Operating points: the policy at each, and what it spends and scores."""

    at: Callable[[int], Policy]
    spent: Floats
    accuracy: Floats


def made_up() -> Predictions:
    """Logits of a network that is surer and more often right the deeper it is read."""
    rng = np.random.default_rng(0)
    labels = rng.integers(K, size=N)
    logits = rng.normal(size=(E, N, K)).astype(np.float32)
    logits[:, np.arange(N), labels] += (np.arange(1, E + 1)[:, None] * rng.exponential(1.0, N)).astype(np.float32)
    return Predictions(logits, labels, "val")


def many(policy: Threshold, val: Predictions, cost: Chain) -> Many:
    """Its points on val: those of a shared threshold, or of q."""
    if isinstance(policy, GeometricSplit):
        points = policy._points(val, cost)
        return Many(points.at, points.spent, points.accuracy)
    thresholds = np.linspace(0, policy.largest(K), POINTS)
    curve = policy.curve(val, cost, thresholds)
    return Many(lambda i: replace(policy, thresholds=(float(thresholds[i]),) * (E - 1)), curve.spent, curve.accuracy)


def loop(policies: Sequence[Policy], val: Predictions, cost: Chain) -> tuple[list[float], list[float]]:
    """Mean cost and accuracy of each, one sample and one exit after the other."""
    n_exits, n, _ = val.logits.shape
    uses = tuple(range(n_exits))
    spent, accuracy = [], []
    for one in policies:
        paid, right = 0.0, 0
        for i in range(n):
            sample = val.logits[:, i : i + 1]
            k = next((k for k in range(n_exits - 1) if one.stop(sample[: k + 1])[0]), n_exits - 1)
            paid += cost.path(uses, k)
            right += int(one.answer(sample, np.array([k])).argmax() == val.labels[i])
        spent.append(paid / n)
        accuracy.append(right / n)
    return spent, accuracy


def main() -> int:
    """Print a line for each policy; 1 where answers differ."""
    val, cost = made_up(), Chain()
    part = replace(val, logits=val.logits[:, :PART_N], labels=val.labels[:PART_N])
    print(
        f"{POINTS} points x {N} samples x {E} exits x {K} classes; median of 5; the loop on {PART_POINTS} x {PART_N}, scaled; "
        "stop() on one sample at exits 1, 4 and 6"
    )
    asked = [MaxProb(), Entropy(), Margin(), SDN(), GeometricSplit(), RiskControl(), ZTW(), EENet(seed=0, steps=50)]
    values: dict[str, float] = {}
    for question in asked:
        started = process_time()
        policy = question.fit(val, cost, 600.0)
        fit_s = process_time() - started
        assert isinstance(policy, Threshold)
        seconds = float(np.median([timed(partial(many, policy, val, cost)) for _ in range(5)]))
        few = many(policy, part, cost)
        tried = range(0, POINTS, POINTS // PART_POINTS)
        started = process_time()
        spent, accuracy = loop([few.at(i) for i in tried], part, cost)
        loop_s = (process_time() - started) * (POINTS / len(tried)) * (N / PART_N)
        same = few.spent[tried].tolist() == spent and few.accuracy[tried].tolist() == accuracy
        own = ""
        if isinstance(question, Searched):
            own = f", of {E - 1}: {timed(partial(replace(question, per_exit=True).fit, val, cost, 350.0)):.2f} s"
        stops = ", ".join(f"{shortest(partial(policy.stop, val.logits[:k, :1])):.1f}" for k in (1, 4, 6))
        print(
            f"{policy.label:16} points {seconds:6.3f} s   loop {loop_s:8.0f} s   ratio {loop_s / seconds:9,.0f}   "
            f"answers {'equal' if same else 'DIFFER'}   stop {stops} us   fit {fit_s:.3f} s{own}"
        )
        if not same:
            return 1
        values |= {f"{policy.label} points_s": seconds, f"{policy.label} ratio": loop_s / seconds}
    keep("policies", values)
    return 0


def risk(files: Sequence[str]) -> int:
    """Print how often the promise was broken, and what it saved; 1 where it was broken more often than promised."""
    print(f"the share of samples answered unlike the last exit, promised <= epsilon in {1 - DELTA:.0%} of {SPLITS} splits")
    broken = 0
    values: dict[str, float] = {}
    for file in files:
        name, _, path = file.rpartition("=")
        name = name or Path(path).stem
        with np.load(path) as held:
            logits = np.concatenate([held["val"], held["test"]], axis=1)
        n_exits, n, _ = logits.shape
        for epsilon in EPSILONS:
            rng, found = np.random.default_rng(0), []
            question = RiskControl(epsilon, DELTA)
            whole = Predictions(logits, logits[-1].argmax(-1), "val")
            losses = question.losses(whole)
            for _ in range(SPLITS):
                drawn = np.zeros(n, bool)
                drawn[rng.choice(n, min(DRAWN, n // 2), replace=False)] = True
                fitted = question.fit(replace(whole, logits=logits[:, drawn], labels=whole.labels[drawn]), Chain(), np.inf)
                exits = fitted.exits(logits)
                lost = take(losses, exits)
                found.append((lost.mean(), lost[~drawn].mean(), (exits < n_exits - 1).mean()))
            risks, on_the_rest, early = np.array(found).T
            share, share_rest = float((risks > epsilon).mean()), float((on_the_rest > epsilon).mean())
            values |= {
                f"{name} epsilon {epsilon:.2f} broken": share,
                f"{name} epsilon {epsilon:.2f} broken on the rest": share_rest,
            }
            broken += share > DELTA
            print(
                f"{name} n {n} epsilon {epsilon:.2f}: broken in {share:.3f} of the splits (on the rest {share_rest:.3f}), mean risk "
                f"{risks.mean():.4f}, {early.mean():.1%} leave early",
                flush=True,
            )
    keep("risk", values)
    return int(broken > 0)


def timed(what: Callable[[], object]) -> float:
    """CPU seconds."""
    started = process_time()
    what()
    return process_time() - started


def shortest(what: Callable[[], object]) -> float:
    """Microseconds: the shortest of many short loops, which a busy machine leaves alone."""
    best = np.inf
    for _ in range(300):
        started = perf_counter()
        for _ in range(40):
            what()
        best = min(best, (perf_counter() - started) / 40)
    return best * 1e6


if __name__ == "__main__":
    sys.exit(risk(sys.argv[1:]) if sys.argv[1:] else main())
