"""EENet's scheduler: its scores in plain Python, its budget, and that it learns whom not to trust."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from anytime.errors import Infeasible, UsageError
from anytime.metrics import Predictions, correct, softmax
from anytime.policies.confidence import MaxProb
from anytime.policies.eenet import EENet
from tests.contracts.policy import Costs, costs, predictions


@settings(deadline=None)
@given(st.integers(0, 9999), st.integers(2, 6), st.integers(2, 10), st.floats(0.1, 0.9))
def test_a_score_is_the_papers_sum(seed: int, n_exits: int, k: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(n_exits, 12, k))
    classes = tuple(tuple(rng.normal(scale=0.5, size=k).tolist()) for _ in range(n_exits - 1))
    features = tuple(tuple(rng.normal(scale=0.5, size=2 + m).tolist()) for m in range(n_exits - 1))
    policy = EENet(classes=classes, features=features, thresholds=(threshold,) * (n_exits - 1))
    exits, scores = policy.exits(logits), policy.scores(logits[:-1])
    for n in range(12):
        before: list[float] = []
        compared: list[float] = []
        for e in range(n_exits - 1):
            weights = [math.exp(z - max(logits[e, n])) for z in logits[e, n]]
            p = [w / sum(weights) for w in weights]
            sure = 1 + sum(x * math.log(x) for x in p if x) / math.log(k)
            q = sum(u * x for u, x in zip(classes[e], p, strict=True))
            q += sum(v * x for v, x in zip(features[e], [max(p), sure, *before], strict=True))
            before.append(min(max(q, 0.0), 1.0))
            compared.append((1 + q / (1 + abs(q))) / 2)
        assert scores[:, n].tolist() == pytest.approx(compared)
        assert exits[n] == next((e for e, q in enumerate(compared) if q >= threshold), n_exits - 1)


@pytest.mark.parametrize("budget", [120.0, 200.0, 300.0, 400.0, 500.0])
def test_it_spends_the_budget_and_no_more(budget: float) -> None:
    val, cost = predictions(4, 300, 5), costs(4)
    fitted = EENet(seed=0, steps=30).fit(val, cost, budget)
    spent = fitted.spends(fitted.exits(val.logits), 4, cost)
    assert budget - 2 < spent <= budget  # a step of one sample from one exit to the next costs 1


def sure(n_exits: int, n: int, k: int, scale: float, seed: int) -> Predictions:
    """A network that is so sure of most samples that clamped scores tie at 1."""
    rng = np.random.default_rng(seed)
    labels, hard = rng.integers(k, size=n), rng.normal(size=(n, 1))
    lead = np.eye(k)[labels] * scale * np.clip(1.5 - 0.9 * hard, 0.05, None)
    logits = np.stack([lead * (1 + e / 2) + rng.normal(size=(n, k)) for e in range(n_exits)])
    return Predictions(logits.astype(np.float32), labels, "val")


@pytest.mark.parametrize("budget", [120.0, 150.0])
def test_it_spends_the_budget_where_clamped_scores_tie(budget: float) -> None:
    val, cost = sure(2, 800, 10, 8.0, seed=0), Costs((100, 100), (0, 0))
    fitted = EENet(seed=0, steps=200).fit(val, cost, budget)
    assert isinstance(fitted, EENet)
    q = 2 * fitted.scores(val.logits[:-1])[0] - 1
    assert (q / (1 - q) > 1).mean() > 0.3  # these would tie
    spent = fitted.spends(fitted.exits(val.logits), 2, cost)
    assert budget - 100 / 800 < spent <= budget


def sure_and_wrong() -> Predictions:
    """The first exit is sure of class 0 whatever it sees; of the others it is unsure and mostly right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=2000)
    logits = rng.normal(size=(3, 2000, 4)).astype(np.float32)
    logits[:, np.arange(2000), labels] += 2
    logits[0, rng.random(2000) < 0.4, 0] += 5
    logits[2, np.arange(2000), labels] += 3
    return Predictions(logits, labels, "val")


def test_it_learns_whom_not_to_trust() -> None:
    val, cost = sure_and_wrong(), costs(3)
    learned = EENet(seed=0, steps=300).fit(val, cost, 300.0)
    plain = MaxProb().fit(val, cost, 300.0)
    assert isinstance(learned, EENet) and isinstance(plain, MaxProb)
    right = correct(val)
    before, after = (roc_auc_score(right[0], p.scores(val.logits[:1])[0]) for p in (plain, learned))
    p = softmax(val.logits[0])
    regression = LogisticRegression(max_iter=500).fit(p, right[0]).decision_function(p)
    assert before < 0.5 < roc_auc_score(right[0], regression) - 0.01 < after
    assert (
        right[learned.exits(val.logits), np.arange(2000)].mean() > right[plain.exits(val.logits), np.arange(2000)].mean() + 0.05
    )
    assert learned.classes[0][0] < min(learned.classes[0][1:])


def test_its_seed_draws_the_start() -> None:
    val, cost = predictions(3, 100, 4), costs(3)
    one, again, other = (EENet(seed=s, steps=20).fit(val, cost, 250.0) for s in (0, 0, 1))
    assert one == again != other


def test_sentences() -> None:
    val, cost = predictions(3, 100, 4), costs(3)
    with pytest.raises(UsageError, match=r"EENet: a learned policy needs a seed; give one, as in EENet\(seed=0\)"):
        EENet().fit(val, cost, 250.0)
    with pytest.raises(UsageError, match="EENet: no scheduler is learned; call fit"):
        EENet(seed=0).curve(val, cost)
    with pytest.raises(UsageError, match="EENet: 4 thresholds cannot be fitted on 3 val samples"):
        EENet(seed=0).fit(predictions(5, 3, 4), costs(5), 1e9)
    with pytest.raises(Infeasible, match="the least possible is 110.0"):
        EENet(seed=0).fit(val, cost, float("nan"))
