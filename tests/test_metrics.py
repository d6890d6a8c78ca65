"""Numbers from predictions, against scipy, scikit-learn and hand counts."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import log_loss

from anytime import metrics
from anytime.errors import AnytimeError
from anytime.metrics import Predictions

LOGITS = np.log([[[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]], [[0.1, 0.8, 0.1], [0.05, 0.9, 0.05]]])  # [E = 2, N = 2, K = 3]
LABELS = np.array([0, 1])


def test_exits_taken_are_looked_up() -> None:
    p = Predictions(LOGITS, LABELS, "val")
    assert p.n_exits == 2
    assert metrics.correct(p).tolist() == [[True, True], [False, True]]
    assert metrics.take(np.array([[1, 2], [3, 4]]), np.array([1, 0])).tolist() == [3, 2]
    assert metrics.take(LOGITS, np.array([1, 0])).tolist() == [LOGITS[1, 0].tolist(), LOGITS[0, 1].tolist()]
    assert metrics.accuracy(p, np.array([0, 1])) == 1
    assert metrics.accuracy(p, np.array([1, 1])) == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = LOGITS.copy()
    logits[1, 0, 2] = bad
    with pytest.raises(AnytimeError, match="logits of exit 2 for test sample 0 are not finite"):
        Predictions(logits, LABELS, "test")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        Predictions(LOGITS, np.array([0, 1, 2]), "val")
    with pytest.raises(ValueError, match="must be"):
        Predictions(LOGITS[0], LABELS, "val")


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 30), st.integers(2, 12), st.sampled_from([1.0, 30.0]))
def test_softmax_and_nll_are_scipys_and_sklearns(seed: int, n: int, k: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = scale * rng.normal(size=(n, k)), rng.integers(k, size=n)
    p = softmax(logits, axis=-1)
    np.testing.assert_allclose(metrics.softmax(logits), p, rtol=1e-12)
    if p[np.arange(n), labels].min() > 1e-15:  # sklearn clips there
        assert metrics.nll(logits, labels) == pytest.approx(log_loss(labels, p, labels=range(k)), rel=1e-9)


def test_nll_of_what_underflows_is_finite() -> None:
    assert metrics.nll(np.array([[0.0, 2000.0]]), np.array([0])) == 2000


def test_ece_by_hand() -> None:
    # Two bins: two samples at 0.6 with one right, one at 0.9 and right: (2 * |0.5 - 0.6| + |1 - 0.9|) / 3.
    logits = np.log([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1]])
    assert metrics.ece(logits, np.array([0, 0, 0])) == pytest.approx(0.3 / 3)
    # In one bin their errors make up for each other: |2/3 - 0.7|.
    assert metrics.ece(logits, np.array([0, 0, 0]), bins=1) == pytest.approx(abs(2 / 3 - 0.7))
    # Certain, and half of the time right.
    assert metrics.ece(np.array([[900.0, 0.0]] * 4), np.array([0, 0, 1, 1])) == pytest.approx(0.5)


def test_a_confidence_on_an_edge_belongs_to_the_bin_under_it() -> None:
    # Guo et al.: bins ((m-1)/M, m/M]. At M = 2 0.5 shares no bin with 0.75.
    logits = np.array([[0.0, 0.0], [math.log(3), 0.0]])
    assert metrics.ece(logits, np.array([1, 0]), bins=2) == pytest.approx((0.5 + 0.25) / 2)
    assert metrics.ece(logits, np.array([1, 0]), bins=1) == pytest.approx(0.5 - 0.375)


@settings(deadline=None)
@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(right_of: tuple[int, int]) -> None:
    got = metrics.wilson(*right_of)
    wanted = binomtest(*right_of).proportion_ci(method="wilson")
    assert got.lo == pytest.approx(wanted.low, abs=1e-12) and got.hi == pytest.approx(wanted.high, abs=1e-12)
    assert 0 <= got.lo <= got.value <= got.hi <= 1


def test_no_samples_have_no_share() -> None:
    with pytest.raises(ValueError, match="no samples"):
        metrics.wilson(0, 0)
    with pytest.raises(ValueError, match="paired"):
        metrics.paired_loss(np.array([], bool), np.array([], bool))
    with pytest.raises(ValueError, match="paired"):
        metrics.paired_loss(np.ones(3, bool), np.ones(2, bool))


@cache
def _discordant(lost: int, won: int, n: int) -> metrics.Loss:
    which = np.arange(n)
    return metrics.paired_loss((which < lost) | (which >= lost + won), which >= lost)


def test_paired_loss_is_the_published_interval() -> None:
    # Airway reactivity before and after transplantation, 1 and 7 discordant pairs of 21: Fagerland, Lydersen and Laake,
    # "Recommended tests and confidence intervals for paired binomial proportions", 2014, Tango's interval.
    got = _discordant(1, 7, 21)
    assert (round(got.value, 3), round(got.lo, 3), round(got.hi, 3)) == (-0.286, -0.517, -0.026)


def test_paired_loss_by_hand() -> None:
    # Nothing discordant of 100: the variance under a true loss d > 0 is d (1 - d) / 100, so d / sqrt(d (1 - d) / 100) = z.
    same, z2 = _discordant(0, 0, 100), 1.6448536**2
    assert same.value == 0 and same.upper == pytest.approx(z2 / (100 + z2))
    assert (-same.lo, same.hi) == (pytest.approx(1.959964**2 / (100 + 1.959964**2)),) * 2
    # 8 lost, 3 won of 100: whoever put in its own limit must come out z standard errors away from 0.05.
    got = _discordant(8, 3, 100)
    assert got.value == pytest.approx(0.05)
    for d, z in ((got.lo, -1.959964), (got.hi, 1.959964), (got.upper, 1.6448536)):
        assert (d - 0.05) / math.sqrt((_likeliest_discordance(8, 3, 100, d) - d * d) / 100) == pytest.approx(z, rel=1e-4)


def _likeliest_discordance(lost: int, won: int, n: int, d: float) -> float:
    """Share of discordant samples that maximises the likelihood when the true loss is d, by search."""

    def surprise(s: float) -> float:
        return -(lost * math.log((s + d) / 2) + won * math.log((s - d) / 2) + (n - lost - won) * math.log(1 - s))

    return float(minimize_scalar(surprise, bounds=(abs(d) + 1e-9, 1 - 1e-9), method="bounded", options={"xatol": 1e-10}).x)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_paired_loss_bounds_itself_and_mirrors(case: tuple[int, int, int]) -> None:
    lost, won, n = case[0], min(case[1], case[2] - case[0]), case[2]
    loss, gain = _discordant(lost, won, n), _discordant(won, lost, n)
    assert loss.value == (lost - won) / n
    assert -1 <= loss.lo <= loss.value <= loss.upper <= loss.hi <= 1 and loss.lo < loss.hi
    assert loss.lo == pytest.approx(-gain.hi, abs=1e-12) and loss.value == -gain.value


@pytest.mark.parametrize(("n", "lost", "won"), [(60, 0.08, 0.03), (1000, 0.02, 0.015), (10_000, 0.002, 0.0001)])
def test_paired_loss_covers_the_truth_as_often_as_it_says(n: int, lost: float, won: float) -> None:
    trials = 4000
    counts = np.random.default_rng(7).multinomial(n, (lost, won, 1 - lost - won), size=trials)
    losses = [_discordant(int(a), int(b), n) for a, b, _ in counts]
    truth = lost - won
    # Four standard errors of 4,000 trials are 1.4 points.
    assert np.mean([x.lo <= truth <= x.hi for x in losses]) == pytest.approx(0.95, abs=0.014)
    assert np.mean([truth <= x.upper for x in losses]) == pytest.approx(0.95, abs=0.014)
    assert np.mean([x.value for x in losses]) == pytest.approx(truth, abs=4 * math.sqrt((lost + won) / n / trials))


def test_the_glossary_has_every_number_of_the_table() -> None:
    wanted = "accuracy accuracy_lo accuracy_hi macs bops params size_bytes latency_ms_p50 latency_ms_p90 latency_ms_p99"
    assert metrics.METRICS.keys() >= {*wanted.split(), "cpu_ms", "speedup", "agreement", "int8_macs_share"}
    assert all(m.meaning and m.digits >= 0 for m in metrics.METRICS.values())
