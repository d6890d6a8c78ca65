"""SDN and ZTW, who answer with other logits than those of the exit taken, one sample after the other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime.errors import UsageError
from anytime.metrics import Floats, Predictions, nll
from anytime.policies.confidence import MaxProb
from anytime.policies.sdn import SDN
from anytime.policies.ztw import ZTW
from anytime.stops import max_probability
from tests.contracts.policy import costs, predictions


def probabilities(row: Floats) -> list[float]:
    e = [math.exp(z - max(row)) for z in row]
    return [x / sum(e) for x in e]


@settings(deadline=None)
@given(st.integers(0, 9999), st.integers(2, 6), st.integers(2, 10), st.floats(0.1, 1))
def test_sdn_is_its_codes_loop(seed: int, n_exits: int, k: int, threshold: float) -> None:
    logits = np.random.default_rng(seed).normal(scale=2, size=(n_exits, 12, k))
    policy = SDN(thresholds=(threshold,) * (n_exits - 1))
    exits = policy.exits(logits)
    answers = policy.answer(logits, exits)
    for n in range(12):
        sure = []
        for e in range(n_exits):
            sure.append(max(probabilities(logits[e, n])))
            if sure[-1] >= threshold:
                break
        # The code lets the last exit fire as well; then it is the surest anyway.
        assert exits[n] == len(sure) - 1
        who = len(sure) - 1 if sure[-1] >= threshold else sure.index(max(sure))
        assert answers[n].tolist() == logits[who, n].tolist()


def test_the_fallback_counts_in_what_fit_looks_at() -> None:
    # The last exit is always wrong and unsure, the first right and surer: only the fallback is worth going on for.
    labels = np.zeros(30, int)
    logits = np.zeros((2, 30, 3))
    logits[0, :, 0] = np.linspace(1, 2, 30)
    logits[1, :, 1] = 0.5
    val = Predictions(logits, labels, "val")
    for policy, right in ((MaxProb(), 0.0), (SDN(), 1.0)):
        fitted = policy.fit(val, costs(2), 1e9)
        assert (fitted.exits(logits) == 1).all()
        assert fitted.right(val)[1].mean() == right
        assert policy.curve(val, costs(2)).accuracy.min() == right
    assert SDN().fit_accuracy(val, costs(2), 1.0).exits(logits).tolist() == [0] * 30


def test_temperatures_are_in_the_fallbacks_comparison() -> None:
    logits = np.array([[[2.0, 0, 0]], [[0, 3.0, 0]]])
    policy = SDN(thresholds=(0.999,))
    assert policy.answer(logits, np.array([1])).argmax() == 1
    assert policy.tempered((1.0, 4.0)).answer(logits, np.array([1])).argmax() == 0


@settings(deadline=None)
@given(st.integers(0, 9999), st.integers(2, 6), st.integers(2, 10), st.floats(0.1, 1))
def test_ztw_is_the_papers_product(seed: int, n_exits: int, k: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(n_exits, 12, k))
    weights = tuple(tuple(rng.random(m + 1).tolist()) for m in range(n_exits - 1))
    biases = tuple(tuple(rng.normal(size=k).tolist()) for _ in range(n_exits - 1))
    policy = ZTW(weights=weights, biases=biases, thresholds=(threshold,) * (n_exits - 1))
    exits = policy.exits(logits)
    answers = policy.answer(logits, exits)
    for n in range(12):
        for e in range(n_exits):
            if e == n_exits - 1:
                said = probabilities(logits[e, n])
                break
            q = [
                math.exp(biases[e][c]) * math.prod(probabilities(logits[j, n])[c] ** weights[e][j] for j in range(e + 1))
                for c in range(k)
            ]
            said = [x / sum(q) for x in q]
            if max(said) >= threshold:
                break
        assert exits[n] == e
        assert probabilities(answers[n]) == pytest.approx(said)


def test_ztw_answers_as_surely_as_it_decides() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 2000, 5)) * 2
    policy = ZTW(weights=((1.0,), (0.5, 0.5)), biases=((0.0,) * 5,) * 2, thresholds=(0.7, 0.6)).tempered((1.5, 0.7, 1.3))
    exits, scores = policy.exits(logits), policy.scores(logits[:-1])
    answers = policy.answer(logits, exits)
    for k in range(2):
        here = exits == k
        assert here.sum() > 100 and max_probability(answers[here]) == pytest.approx(scores[k, here])
    assert (answers[exits == 2] == logits[2, exits == 2] / 1.3).all()


def test_ztw_finds_the_optimum() -> None:
    val = predictions(3, 400, 4)
    fitted = ZTW().fit(val, costs(3), 300.0)
    assert isinstance(fitted, ZTW)
    plain = replace(fitted, weights=((1.0,), (0.5, 0.5)), biases=((0.0,) * 4,) * 2)
    rng = np.random.default_rng(0)
    for k in range(2):
        at = np.full(400, k)

        def loss(policy: ZTW, at: np.ndarray = at) -> float:
            return nll(policy.answer(val.logits, at), val.labels)

        best = loss(fitted)
        assert best < loss(plain) and best < nll(val.logits[k], val.labels)
        for _ in range(50):  # convex: what no small step betters is the optimum
            step = lambda row: tuple(max(0.0, x) for x in np.array(row) + rng.normal(scale=0.02, size=len(row)))  # noqa: E731
            moved = replace(fitted, weights=tuple(step(w) for w in fitted.weights))
            assert loss(moved) >= best - 1e-6


def test_ztw_weighs_by_what_an_exit_is_worth() -> None:
    """Logits that say four times what they know get a quarter of the weight; noise gets none."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=1.5, size=(3, 4000, 3))
    labels = np.array([rng.choice(3, p=probabilities(row)) for row in logits[0]])
    logits[1] = rng.normal(scale=1.5, size=(4000, 3))
    fitted = ZTW().fit(Predictions(logits * np.array([4, 1, 1])[:, None, None], labels, "val"), costs(3), 1e9)
    assert isinstance(fitted, ZTW)
    assert fitted.weights[0] == pytest.approx((0.25,), abs=0.02)
    assert fitted.weights[1] == pytest.approx((0.25, 0.0), abs=0.04)


def test_ztw_of_samples_that_can_be_told_apart_is_finite() -> None:
    labels = np.arange(40) % 2
    logits = np.stack([10.0 * np.eye(2)[labels]] * 3)
    fitted = ZTW().fit(Predictions(logits, labels, "val"), costs(3), 300.0)
    assert isinstance(fitted, ZTW) and max(map(max, fitted.weights)) <= 20
    assert fitted.right(Predictions(logits, labels, "val")).all()


def test_ztw_is_no_answer_before_it_is_fitted() -> None:
    with pytest.raises(UsageError, match="ZTW: no ensemble is fitted; call fit"):
        ZTW().curve(predictions(3, 20, 4), costs(3))
