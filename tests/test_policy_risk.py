"""Risk control: its p-values against counting, its guarantee against 200 splits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from anytime.errors import Infeasible, UsageError
from anytime.metrics import Floats, Predictions, correct, take
from anytime.policies.reading import Reading
from anytime.policies.risk import RiskControl, betting_p, binomial_p, ladder
from tests.contracts.policy import costs, predictions

Against = Literal["last", "labels"]


@given(st.integers(1, 60), st.data())
def test_the_binomial_p_value_is_counted(n: int, data: st.DataObject) -> None:
    lost, risk = data.draw(st.integers(0, n)), data.draw(st.floats(0.01, 0.99))
    losses = np.repeat([1.0, 0.0], [lost, n - lost])
    counted = sum(math.comb(n, i) * risk**i * (1 - risk) ** (n - i) for i in range(lost + 1))
    assert binomial_p(losses, risk, 0.1) == pytest.approx(counted)


def test_a_betting_p_value_by_hand() -> None:
    # On [0, 1] the first loss of -1 is 0 and the null mean 0.5: bets are worth sqrt(2 log 10 / (n / 4)) = 1, at most, each.
    assert betting_p(np.full(1, -1.0), 0.0, 0.1) == pytest.approx(1 / 1.5)
    assert betting_p(np.full(40, 1.0), 0.0, 0.1) == 1
    assert betting_p(np.full(2000, 0.0), 0.05, 0.1) < 1e-3


P = Callable[[Floats, float, float], float]


@pytest.mark.parametrize(("p", "risk"), [(binomial_p, 0.02), (binomial_p, 0.5), *((betting_p, r) for r in (0.0, 0.02, 0.1, 0.5))])
def test_p_values_are_valid_where_the_null_is_just_true(p: P, risk: float) -> None:
    rng = np.random.default_rng(0)
    low = 0 if p is binomial_p else -1
    found = []
    for _ in range(1000):  # losses of mean risk, rare as those of a good network are
        lost = rng.random(200)
        losses = np.where(lost < risk + 0.03, 1.0, np.where(lost > 1 - 0.03, -1.0, 0.0)) if low else (lost < risk) * 1.0
        found.append(p(losses, risk, 0.1))
    limit = binom.ppf(0.999, 1000, 0.1) / 1000
    assert np.mean(np.array(found) <= 0.1) <= limit
    assert np.mean(np.array(found) <= 0.5) <= binom.ppf(0.999, 1000, 0.5) / 1000


def test_samples_in_the_order_of_their_classes_are_no_proof() -> None:
    """500 of an easy class, then 500 of one where leaving costs 16 points: a bettor who came in that order would stop in time."""
    rng = np.random.default_rng(0)
    found = [betting_p(np.concatenate([np.zeros(500), (rng.random(500) < 0.16) * 1.0]), 0.05, 0.1) for _ in range(100)]
    assert np.mean(np.array(found) <= 0.1) <= binom.ppf(0.999, 100, 0.1) / 100


def population(harm: float = 0.0) -> Predictions:
    """5,000 samples of a network whose exits improve; with ``harm`` the surest of the first exit are often wrong."""
    p = predictions(4, 5_000, 5, seed=7)
    rng = np.random.default_rng(1)
    wrong = rng.random(5_000) < harm
    p.logits[0, wrong, (p.labels[wrong] + 1) % 5] += 6
    return p


@pytest.mark.parametrize("against", ["last", "labels"])
@pytest.mark.parametrize("harm", [0.0, 0.1])
def test_the_guarantee_holds_at_its_rate(against: Against, harm: float) -> None:
    epsilon, delta, splits = 0.05, 0.1, 200
    whole, rng = population(harm), np.random.default_rng(3)
    question = RiskControl(epsilon, delta, against)
    losses = question.losses(whole)
    broken, early = 0, []
    for _ in range(splits):
        drawn = rng.choice(5_000, 400, replace=False)
        fitted = question.fit(Predictions(whole.logits[:, drawn], whole.labels[drawn], "val"), costs(4), 1e9)
        exits = fitted.exits(whole.logits)
        broken += bool(take(losses, exits).mean() > epsilon)
        early.append((exits < 3).mean())
    assert broken <= binom.ppf(0.999, splits, delta), f"{broken} of {splits} splits break the promise of {delta}"
    assert np.mean(early) > (0.2 if harm == 0 else 0.02), "a guarantee that lets nobody leave is cheap"


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 9999), st.sampled_from(["last", "labels"]), st.floats(0.02, 0.5), st.integers(2, 4))
def test_it_is_the_ladder_climbed_step_by_step(seed: int, against: Against, epsilon: float, n_exits: int) -> None:
    val, cost = predictions(n_exits, 60, 4, seed), costs(n_exits)
    question = RiskControl(epsilon, 0.2, against)
    said, right = val.logits.argmax(-1), correct(val)
    best, spent = 2.0, None
    for threshold in [2.0, *ladder(4)]:
        exits = []
        for n in range(60):
            p = np.exp(val.logits[:, n].astype(float))
            sure = (p / p.sum(-1, keepdims=True)).max(-1)
            exits.append(next((k for k in range(n_exits - 1) if sure[k] >= threshold), n_exits - 1))
        if against == "last":
            losses = np.array([float(said[e, n] != said[-1, n]) for n, e in enumerate(exits)])
        else:
            losses = np.array([float(right[-1, n]) - float(right[e, n]) for n, e in enumerate(exits)])
        if threshold < 2 and (binomial_p if against == "last" else betting_p)(losses, epsilon, 0.2) > 0.2:
            break
        paid = float(np.mean([cost.path(tuple(range(n_exits)), e) for e in exits]))
        if spent is None or paid < spent:
            best, spent = threshold, paid
    fitted = question.fit(val, cost, 1e9)
    assert fitted.spends(fitted.exits(val.logits), n_exits, cost) == spent
    assert isinstance(fitted, RiskControl) and (best == 2.0 or fitted.thresholds[0] == best)
    with pytest.raises(Infeasible) as caught:
        question.fit(val, cost, spent * (1 - 1e-9))
    assert caught.value.least == spent


def test_few_samples_show_nothing() -> None:
    val, cost = predictions(3, 40, 4), costs(3)  # even without one loss of 40, a risk of 5 % is not refuted at 10 %
    assert 0.95**40 > 0.1
    assert (RiskControl(0.05).fit(val, cost, 1e9).exits(val.logits) == 2).all()


def test_accuracy_is_chosen_among_what_is_safe() -> None:
    val, cost = predictions(4, 400, 5), costs(4)
    question = RiskControl(0.2)
    cheapest = question.fit(val, cost, 1e9)
    right = float(take(cheapest.right(val), cheapest.exits(val.logits)).mean())
    more = question.fit_accuracy(val, cost, right + 0.03)
    assert isinstance(more, RiskControl) and isinstance(cheapest, RiskControl)
    assert take(more.right(val), more.exits(val.logits)).mean() >= right + 0.03
    assert more.thresholds[0] > cheapest.thresholds[0]


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"epsilon": 1.5}, {"delta": 0.0}])
def test_promises_that_mean_nothing(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must lie between 0 and 1, not"):
        RiskControl(**wrong).fit(predictions(3, 50, 4), costs(3), 1e9)  # type: ignore[arg-type]


@pytest.mark.parametrize("reads", [(), (0, 1)])
def test_reading_does_not_void_the_promise_in_silence(reads: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="what RiskControl 0.05 promises holds against the network's last exit"):
        Reading(of=RiskControl(0.05), reads=reads).fit(predictions(3, 400, 4), costs(3), 1e9)


def test_the_ladder_was_there_first() -> None:
    steps = ladder(10)
    assert (np.diff(steps) < 0).all() and steps[0] == pytest.approx(1, abs=1e-6) and steps[-1] == 0
    assert steps[-2] == pytest.approx(0.1)
