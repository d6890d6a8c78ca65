"""Numbers from predictions. numpy only; letters: E exits, N samples, B batch, K classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anytime.errors import AnytimeError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
PartName = Literal["train", "calib", "tune", "val", "hold", "test"]

Z95 = 1.959963984540054  # two-sided 95 %
Z95_ONE_SIDED = 1.6448536269514722


@dataclass(frozen=True)
class Predictions:
    """All that a network says about one part: logits [E, N, K], labels [N].

    ``sources`` are the digests of the part and of every published set that it was drawn from;
    ``trained_on`` the digests of the parts that the network has learned from. A policy compares the two.
    """

    logits: Floats
    labels: Ints
    part: PartName
    sources: frozenset[str] = frozenset()
    trained_on: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or self.logits.shape[1] != len(self.labels):
            raise ValueError(f"logits {self.logits.shape} must be [E, N, K] with N = {len(self.labels)}")
        if not np.isfinite(self.logits).all():
            e, n = (int(i) for i in np.argwhere(~np.isfinite(self.logits))[0][:2])
            raise AnytimeError(f"the logits of exit {e + 1} for {self.part} sample {n} are not finite")

    @property
    def n_exits(self) -> int:
        """E."""
        return int(self.logits.shape[0])


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis, in float64."""
    z = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    p = np.exp(z)
    return np.asarray(p / p.sum(-1, keepdims=True))


def correct(p: Predictions) -> Bools:
    """Whether exit e is right about sample n: [E, N]."""
    return np.asarray(p.logits.argmax(-1) == p.labels)


def take(values: NDArray[Any], exits: Ints) -> NDArray[Any]:
    """values [E, N, ...] at the exit of each sample [N] -> [N, ...]."""
    return np.asarray(values[exits, np.arange(len(exits))])


def accuracy(p: Predictions, exits: Ints) -> float:
    """Top-1 share in [0, 1] when sample n leaves at exits[n]."""
    return float(take(correct(p), exits).mean())


def nll(logits: Floats, labels: Ints) -> float:
    """Mean negative log-likelihood in nats of logits [N, K]."""
    z = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(-1)) - take(np.moveaxis(z, -1, 0), labels)))


def ece(logits: Floats, labels: Ints, bins: int = 15) -> float:
    """Expected calibration error in [0, 1] of logits [N, K], equal-width bins.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2, M = 15.
    """
    p = softmax(logits)
    confidence, right = p.max(-1), p.argmax(-1) == labels
    which = np.ceil(confidence * bins).astype(int) - 1  # bins are open below and closed above
    total = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)


def brier(logits: Floats, labels: Ints) -> float:
    """Mean squared distance, summed over the classes, between probabilities and truth: in [0, 2], of logits [N, K].

    Source: Brier, "Verification of forecasts expressed in terms of probability", 1950, eq. 2.
    """
    p = softmax(logits)
    told = take(np.moveaxis(p, -1, 0), labels)
    return float(np.mean((p * p).sum(-1) - 2 * told + 1))


def auroc(logits: Floats, labels: Ints) -> float | None:
    """How well confidence, the largest probability, tells right from wrong: in [0, 1], 0.5 is chance, of logits [N, K].

    The share of pairs of a right and a wrong answer in which the right one is surer, ties counted half; None without both.
    Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve", 1982.
    """
    confidence, right = softmax(logits).max(-1), logits.argmax(-1) == labels
    wrong, sure = np.sort(confidence[~right]), confidence[right]
    if not len(wrong) or not len(sure):
        return None
    below = np.searchsorted(wrong, sure, "left") + np.searchsorted(wrong, sure, "right")
    return float(below.sum() / (2 * len(sure) * len(wrong)))


def disagreement(said: Ints) -> float:
    """Share of samples about which two members say different classes [m, N], meant over the pairs.

    Source: Kuncheva and Whitaker, "Measures of diversity in classifier ensembles", 2003, section 2.1.3, with "different
    classes" for "one right, one wrong".
    """
    return float(np.mean([(a != b).mean() for a, b in combinations(said, 2)]))


def double_fault(said: Ints, labels: Ints) -> float:
    """Share of samples about which two members [m, N] are both wrong, meant over the pairs.

    Source: Kuncheva and Whitaker 2003, section 2.1.4 (Giacinto and Roli 2001).
    """
    wrong = said != labels
    return float(np.mean([(a & b).mean() for a, b in combinations(wrong, 2)]))


class Interval(NamedTuple):
    """An estimate with its two-sided 95 % limits."""

    value: float
    lo: float
    hi: float


def wilson(n_right: int, n: int) -> Interval:
    """Share with its 95 % score interval.

    Source: Wilson 1927; Brown, Cai, DasGupta, "Interval Estimation for a Binomial Proportion", 2001, eq. 4.
    """
    if n <= 0:
        raise ValueError("no samples, no share")
    p, z2 = n_right / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Rounding must not leave the share itself outside, at 0 and at 1.
    return Interval(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


class Loss(NamedTuple):
    """A paired loss in accuracy, reference minus candidate, in shares: positive is worse. All within [-1, 1]."""

    value: float
    lo: float
    hi: float
    upper: float  # the upper one-sided 95 % limit: "within x of the reference" means upper <= x


def paired_loss(reference: Bools, candidate: Bools) -> Loss:
    """Loss of ``candidate`` against ``reference`` on the same samples: both [N]. Only the discordant samples carry it.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", 1998. Not a Wald interval, adjusted or not: these pull towards 0, so that at the few discordant samples of a
    well quantized network (20 lost, 1 won of 10,000) their upper limit holds in 93 % of cases instead of 95.
    """
    n = len(reference)
    if n == 0 or len(candidate) != n:
        raise ValueError(f"paired samples are needed, got {n} and {len(candidate)}")
    lost = int((reference & ~candidate).sum())
    won = int((~reference & candidate).sum())
    lo, hi, upper = (_score_limit(lost, won, n, z) for z in (-Z95, Z95, Z95_ONE_SIDED))
    return Loss((lost - won) / n, lo, hi, upper)


def _score_limit(lost: int, won: int, n: int, z: float) -> float:
    """The true loss from which the observed one lies z of the standard errors that it would have itself."""
    value = (lost - won) / n
    lo, hi = (-1.0, value) if z < 0 else (value, 1.0)
    for _ in range(60):
        d = (lo + hi) / 2
        b = (2 * n - lost + won) * d - lost - won
        q = (math.sqrt(b * b + 8 * n * won * d * (1 - d)) - b) / (4 * n)  # the likeliest share of samples won, if d is true
        if n * (d - value) > z * math.sqrt(max(0.0, n * (2 * q + d * (1 - d)))):
            hi = d
        else:
            lo = d
    return (lo + hi) / 2


class Metric(NamedTuple):
    """What a column means: the report's headers and its glossary come from here."""

    unit: str
    better: Literal["higher", "lower", ""]
    digits: int
    meaning: str

    def said(self, value: float) -> str:
        """A value in the unit, which is left out."""
        scale = {"%": 100, "points": 100, "M": 1e-6, "G": 1e-9, "MB": 1e-6}.get(self.unit, 1)
        return f"{value * scale:.{self.digits}f}"


METRICS: dict[str, Metric] = {
    "accuracy": Metric("%", "higher", 2, "top-1 share of the test part that is right"),
    "accuracy_lo": Metric("%", "", 2, "lower 95 % limit: Wilson's for one seed, t over seeds for several"),
    "accuracy_hi": Metric("%", "", 2, "upper 95 % limit, likewise"),
    "loss": Metric("points", "lower", 2, "paired: accuracy of FP32 minus accuracy of this row, same test samples"),
    "loss_upper": Metric("points", "lower", 2, "upper one-sided 95 % limit of the paired loss"),
    "static_loss": Metric(
        "points", "lower", 2, "paired: accuracy of the same network without exits in FP32 minus that of this row"
    ),
    "static_loss_upper": Metric("points", "lower", 2, "upper one-sided 95 % limit of it"),
    "static_macs": Metric("%", "lower", 1, "MACs of this row as a share of those of the same network without exits"),
    "macs": Metric(
        "M", "lower", 3, "multiply-accumulates of convolutions and linear layers a sample, every head that ran included"
    ),
    "bops": Metric("G", "lower", 3, "bit operations a sample: MACs x weight bits x activation bits"),
    "params": Metric("M", "lower", 3, "parameters of everything that ran to leave there"),
    "size_bytes": Metric("MB", "lower", 3, "bytes of the files that a board needs, 1 MB = 1e6"),
    "packed_bytes": Metric("MB", "lower", 3, "bytes of the parameters at their true bit widths"),
    "latency_ms_p50": Metric(
        "ms", "lower", 3, "median wall time of a sample at the board's batch size, heads on the way included"
    ),
    "latency_ms_p90": Metric("ms", "lower", 3, "90th percentile of the same"),
    "latency_ms_p99": Metric("ms", "lower", 3, "99th percentile of the same; absent under 662 samples"),
    "latency_ms_mean": Metric(
        "ms",
        "lower",
        3,
        "mean of the same: a policy's median is just the latency of one of its exits. Policies are executed on a few hundred test "
        "samples, which records from December 2026 on weigh by the exits that the whole test part takes",
    ),
    "latency_ms_spread": Metric("ms", "lower", 3, "largest minus smallest median over repeated measurements"),
    "cpu_ms": Metric("ms", "lower", 3, "mean process CPU time a sample, all threads: compares work on a noisy machine"),
    "energy_mj": Metric(
        "mJ", "lower", 3, "of the module above idle, one sample, batch 1, heads on the way included; the facts state the window"
    ),
    "speedup": Metric(
        "x", "higher", 2, "mean latency of speedup_over divided by this row's, within sessions that timed both if any"
    ),
    "board_accuracy": Metric(
        "%", "higher", 2, "top-1 share of the test part that is right by the engine on the board, where no other machine has it"
    ),
    "board_agreement": Metric(
        "%", "higher", 2, "share of test samples on which that engine says the class that was scored on this machine"
    ),
    "agreement": Metric(
        "%", "higher", 2, "share of test samples on which the engine and its twin in torch say the same class, worst exit"
    ),
    "int8_macs_share": Metric(
        "%",
        "higher",
        1,
        "share of the MACs that ran in 8-bit kernels, by the engine's own profile, weighted by the probability of reaching them",
    ),
    "ece": Metric("", "lower", 4, "expected calibration error, 15 equal bins; of a policy, of the answers that it gives"),
    "nll": Metric("nats", "lower", 4, "mean negative log-likelihood, likewise"),
    "brier": Metric("", "lower", 4, "mean squared distance between probabilities and truth, summed over the classes, likewise"),
    "auroc": Metric("", "higher", 4, "share of pairs of a right and a wrong answer in which the right one is surer, likewise"),
    "overthinking": Metric("%", "lower", 2, "share of test samples that are right at this exit and wrong at the last"),
    "spent": Metric("", "", 3, "mean cost on test as a fraction of the reference's last exit, in ms where budgets are"),
    "budget_violation": Metric(
        "%",
        "lower",
        2,
        "spent on test over the budget asked, as a share of the budget: over 0 is too much; bootstrapped 95 % limits",
    ),
    "exit_flips": Metric(
        "%",
        "lower",
        2,
        "share of test samples that leave at another exit than the reference: the same network in FP32 under its own policy for "
        "this budget, whatever the arm here; for the arm retrained, another training of it under the policy that both share",
    ),
    "earlier_flips": Metric("%", "", 2, "share of test samples that leave earlier than there"),
    "later_flips": Metric("%", "", 2, "share of test samples that leave later than there"),
    "harmful_flips": Metric(
        "%",
        "lower",
        2,
        "share that leaves elsewhere, is answered wrong, and would be right at the reference's exit of this network",
    ),
    "helpful_flips": Metric(
        "%",
        "higher",
        2,
        "share that leaves elsewhere, is answered right, and would be wrong there; all but harmful ones are harmless",
    ),
    "prediction_flips": Metric(
        "%", "lower", 2, "share of test samples that are answered with another class than the reference's"
    ),
    "regret": Metric(
        "points",
        "lower",
        2,
        "accuracy of this network's own curve at the cost that was spent, minus the accuracy here; bootstrapped 95 % limits. The "
        "curve: the same policy refitted on val at 25 budgets (9 if it has a seed) and those asked, on test, joined by straight lines",
    ),
    "recovered": Metric(
        "%", "higher", 0, "1 - regret / regret of the arm kept; absent where the lower limit of the latter is not over 0"
    ),
    "area": Metric(
        "%",
        "higher",
        2,
        "area under that curve from the cost of the cheapest exit to that of the last, over its width: a mean accuracy",
    ),
    "accuracy_at_macs": Metric("%", "higher", 2, "accuracy that the curve reads where the expected MACs are exactly the budget"),
    "accuracy_at_bops": Metric(
        "%", "higher", 2, "likewise at the budget's share of the BOPs of the reference's last exit in FP32"
    ),
    "accuracy_at_ms": Metric(
        "%", "higher", 2, "likewise at its share of the mean latency of the reference's last exit, by the exits' mean latencies"
    ),
    "gain": Metric(
        "points", "higher", 2, "paired: accuracy here minus that of the experiment's first policy, same network, budget, arm"
    ),
    "step_gain": Metric(
        "points",
        "higher",
        2,
        "paired: accuracy here minus that of the same network and exit or policy where this field is by default",
    ),
    "rival_gain": Metric(
        "points",
        "lower",
        2,
        "paired: accuracy of the rival, the largest network without exits that takes no longer here, minus that of this row",
    ),
    "rival_time": Metric("x", "", 2, "mean latency of the rival divided by this row's, within sessions that timed both if any"),
    "as_good_time": Metric(
        "x",
        "higher",
        2,
        "likewise of the fastest network without exits that has as much of the test part right; the range over several sessions",
    ),
    "max_error": Metric(
        "", "lower", 4, "largest absolute difference from the reference's logits, the same network in FP32, over the test samples"
    ),
    "max_error_share": Metric("%", "lower", 3, "likewise, as a share of the range of the reference's logits"),
    "answers": Metric(
        "", "", 0, "classes that are said at all over the test samples: where they are few, agreement shows little"
    ),
    "same_exits": Metric("%", "higher", 1, "share of executed samples that left at the exit that the policy takes offline"),
}
