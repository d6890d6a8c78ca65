"""MSDNet's geometric split against its loop: q after q, exit after exit, the surest of those still going."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime.errors import Infeasible, UsageError
from anytime.metrics import Predictions, correct
from anytime.policies.geometric import GeometricSplit, shares
from anytime.policies.sdn import SDN
from anytime.policy import Policy
from tests.contracts.policy import costs, predictions


@dataclass(frozen=True)
class Each:
    of: tuple[int, ...]

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return float(self.of[exit])


def split(val: Predictions, share: np.ndarray) -> list[int]:
    """The exits that samples with different scores take."""
    n_exits, n, _ = val.logits.shape
    p = np.exp(val.logits.astype(float))
    sure = (p / p.sum(-1, keepdims=True)).max(-1)
    exits, missed = [n_exits - 1] * n, 0.0
    for k in range(n_exits - 1):
        going = sorted((i for i in range(n) if exits[i] == n_exits - 1), key=lambda i: -sure[k, i])
        wanted = n * share[k] + missed
        leave = min(range(len(going) + 1), key=lambda m: (abs(m - wanted), m))
        missed = wanted - leave
        for i in going[:leave]:
            exits[i] = k
    return exits


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9999), st.integers(2, 5), st.integers(4, 14), st.integers(2, 6), st.data())
def test_it_is_the_best_q_of_all(seed: int, n_exits: int, n: int, k: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    val = Predictions(rng.normal(size=(n_exits, n, k)), rng.integers(k, size=n), "val")
    of = tuple(data.draw(st.lists(st.integers(1, 50), min_size=n_exits, max_size=n_exits)))
    budget = data.draw(st.integers(min(of) * n, (max(of) + 1) * n)) / n
    right = correct(val)
    scored = []
    for share in shares(n_exits):
        exits = split(val, share)
        scored.append((Fraction(sum(of[e] for e in exits), n), sum(int(right[e, i]) for i, e in enumerate(exits))))
    try:
        fitted = GeometricSplit().fit(val, Each(of), budget)
    except Infeasible as error:
        assert error.least == float(min(scored)[0]) > budget
        return
    exits = fitted.exits(val.logits)
    got = (Fraction(sum(of[e] for e in exits), n), sum(int(right[e, i]) for i, e in enumerate(exits)))
    assert got == max(s for s in scored if float(s[0]) <= budget)


def test_shares_grow_by_one_factor() -> None:
    all_shares = shares(4, steps=10)
    assert all_shares[0].tolist() == [1, 0, 0, 0] and all_shares[-1].tolist() == [0, 0, 0, 1]
    assert all_shares[5] == pytest.approx([0.25] * 4)
    for t, share in zip(np.linspace(0, 1, 11)[1:-1], all_shares[1:-1], strict=True):
        assert share[1:] / share[:-1] == pytest.approx([t / (1 - t)] * 3)
        assert share.sum() == pytest.approx(1)


@pytest.mark.parametrize("policy", [GeometricSplit(), SDN()], ids=lambda p: p.label)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9999), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_more_budget_is_spent(policy: Policy, seed: int, raw: list[float]) -> None:
    val, cost = predictions(4, 60, 5, seed), costs(4)
    spent = []
    for budget in sorted(110 + 1000 * r for r in raw):
        fitted = policy.fit(val, cost, budget)
        spent.append(fitted.spends(fitted.leave(val), 4, cost))
        assert spent[-1] <= budget
    assert spent == sorted(spent)


def test_thresholds_need_samples() -> None:
    with pytest.raises(UsageError, match="GeometricSplit: 4 thresholds cannot be fitted on 3 val samples"):
        GeometricSplit().fit(predictions(5, 3, 4), costs(5), 1e9)
