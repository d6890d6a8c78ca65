"""What holds for every policy, whatever the logits, the costs and the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime.errors import Infeasible
from anytime.metrics import Predictions
from anytime.policies.confidence import Entropy, Margin, MaxProb
from anytime.policies.eenet import EENet
from anytime.policies.fixed import Fixed
from anytime.policies.geometric import GeometricSplit
from anytime.policies.oracle import Oracle
from anytime.policies.patience import Patience
from anytime.policies.random import Random
from anytime.policies.risk import RiskControl
from anytime.policies.sdn import SDN
from anytime.policies.ztw import ZTW
from anytime.policy import Policy

ONE_NUMBER = [MaxProb(), Entropy(), Margin(), Patience(), SDN(), ZTW(), GeometricSplit(), Oracle(), Random(of=MaxProb())]
OTHERS = [Fixed(), MaxProb(per_exit=True), ZTW(per_exit=True), RiskControl(0.3), EENet(seed=0, steps=2)]


class Each:
    def __init__(self, of: list[float]) -> None:
        self.of = of

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return self.of[exit]


@pytest.mark.parametrize("policy", [*ONE_NUMBER, *OTHERS], ids=lambda p: p.label)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 9999), n=st.integers(5, 12), coarse=st.booleans(), data=st.data())
def test_none_spends_more_than_its_budget(policy: Policy, seed: int, n: int, coarse: bool, data: st.DataObject) -> None:
    of = data.draw(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), label="costs")  # in no order
    shares = data.draw(st.lists(st.floats(0, 1.2), min_size=3, max_size=3), label="budgets")
    rng = np.random.default_rng(seed)
    shape = (len(of), n, 3)
    logits = rng.integers(-1, 2, shape).astype(np.float32) if coarse else rng.normal(size=shape)
    val, cost = Predictions(logits, rng.integers(3, size=n), "val"), Each(of)
    spent = []
    for budget in sorted(min(of) + share * (max(of) - min(of)) for share in shares):
        try:
            fitted = policy.fit(val, cost, budget)
        except Infeasible as error:
            assert not spent and error.least > budget
            fitted = policy.fit(val, cost, error.least)
            assert fitted.spends(fitted.leave(val), len(of), cost) == error.least
            continue
        spent.append(fitted.spends(fitted.leave(val), len(of), cost))
        assert spent[-1] <= budget
    if policy in ONE_NUMBER:
        assert spent == sorted(spent), "growing budgets are not spent as growing costs"
