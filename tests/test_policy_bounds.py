"""Oracle against every way of leaving, Random against the shares that it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime.errors import Infeasible, Unsupported, UsageError
from anytime.metrics import Predictions, correct
from anytime.policies.confidence import MaxProb
from anytime.policies.oracle import Oracle
from anytime.policies.patience import Patience
from anytime.policies.random import Random
from anytime.policies.sdn import SDN
from tests.contracts.policy import costs, predictions


@dataclass(frozen=True)
class Each:
    of: tuple[int, ...]

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return float(self.of[exit])


def right_at(val: Predictions, exits: tuple[int, ...]) -> int:
    return sum(int(correct(val)[e, i]) for i, e in enumerate(exits))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 9999), st.integers(2, 4), st.integers(1, 5), st.data())
def test_nobody_is_more_accurate_at_the_cost(seed: int, n_exits: int, n: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    val = Predictions(rng.normal(size=(n_exits, n, 2)), rng.integers(2, size=n), "val")
    of = tuple(data.draw(st.lists(st.integers(1, 9), min_size=n_exits, max_size=n_exits)))
    every = [(Fraction(sum(of[e] for e in way), n), right_at(val, way)) for way in product(range(n_exits), repeat=n)]
    budget = data.draw(st.integers(min(of) * n, max(of) * n)) / n
    fitted = Oracle().fit(val, Each(of), budget)
    exits = tuple(fitted.leave(val))
    assert float(Fraction(sum(of[e] for e in exits), n)) <= budget
    assert right_at(val, exits) == max(r for c, r in every if float(c) <= budget)
    wanted = data.draw(st.integers(0, n)) / n
    enough = [c for c, r in every if r / n >= wanted]
    if not enough:
        with pytest.raises(Infeasible) as caught:
            Oracle().fit_accuracy(val, Each(of), wanted)
        assert caught.value.best == max(r for _, r in every) / n
        return
    cheapest = Oracle().fit_accuracy(val, Each(of), wanted)
    exits = tuple(cheapest.leave(val))
    assert Fraction(sum(of[e] for e in exits), n) == min(enough) and right_at(val, exits) / n >= wanted


def test_without_a_limit_it_is_the_first_exit_that_is_right() -> None:
    val = predictions(4, 200, 5)
    right = correct(val)
    fitted = Oracle().fit(val, costs(4), float("inf"))
    first = [next((k for k in range(4) if right[k, n]), 0) for n in range(200)]
    assert fitted.leave(val).tolist() == first
    other = predictions(4, 300, 5, seed=1)  # on other samples it is the optimum of those
    assert (correct(other)[fitted.leave(other), np.arange(300)] == correct(other).any(0)).all()


def test_it_is_no_policy_for_boards() -> None:
    val = predictions(3, 30, 4)
    fitted = Oracle().fit(val, costs(3), 300.0)
    with pytest.raises(Unsupported, match="Oracle looks at the labels"):
        fitted.exits(val.logits)
    with pytest.raises(UsageError, match="prices for 3 exits and not for 2"):
        fitted.leave(replace(val, logits=val.logits[:2]))
    with pytest.raises(UsageError, match="prices for 0 exits"):
        Oracle().leave(val)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.integers(0, 99), st.floats(0, 1.2), st.integers(2, 5))
def test_random_leaves_as_many_at_each_exit(seed: int, lots: int, share: float, n_exits: int) -> None:
    val, cost = predictions(n_exits, 130, 4, seed), costs(n_exits)
    least = cost.path((0,), 0)
    budget = least + share * (cost.path(tuple(range(n_exits)), n_exits - 1) - least)
    inner = MaxProb().fit(val, cost, budget)
    fitted = Random(of=MaxProb(), seed=lots).fit(val, cost, budget)
    exits = fitted.leave(val)
    assert np.bincount(exits, minlength=n_exits).tolist() == np.bincount(inner.leave(val), minlength=n_exits).tolist()
    assert fitted.spends(exits, n_exits, cost) == inner.spends(inner.leave(val), n_exits, cost) <= budget
    assert fitted.exits(val.logits[:, :50]).tolist() == exits[:50].tolist(), "a lot follows what comes after it"
    assert fitted.exits(val.logits[:, ::-1]).tolist() == exits.tolist(), "a lot follows the sample"


def test_its_shares_hold_on_other_parts() -> None:
    val, cost = predictions(4, 1000, 5), costs(4)
    inner = MaxProb().fit(val, cost, 400.0)
    shares = np.bincount(inner.leave(val), minlength=4) / 1000
    for seed in range(5):
        fitted = Random(of=MaxProb(), seed=seed).fit(val, cost, 400.0)
        got = np.bincount(fitted.exits(np.zeros((4, 10_000, 5))), minlength=4) / 10_000
        assert got == pytest.approx(shares, abs=0.01)  # within one of each hundred


def test_two_seeds_draw_apart() -> None:
    val, cost = predictions(3, 400, 4), costs(3)
    one, other = (Random(of=MaxProb(), seed=s).fit(val, cost, 250.0).leave(val) for s in (0, 1))
    left = np.bincount(one, minlength=3) / 400
    assert (one == other).mean() == pytest.approx((left**2).sum(), abs=0.08)  # as independent draws agree


def test_it_answers_as_the_policy_that_it_imitates() -> None:
    val, cost = predictions(3, 200, 4), costs(3)
    fitted = Random(of=SDN()).fit(val, cost, 300.0)
    assert isinstance(fitted, Random) and fitted.of is not None
    last = np.full(200, 2)
    assert (fitted.answer(val.logits, last) == fitted.of.answer(val.logits, last)).all()
    assert not (fitted.answer(val.logits, last) == val.logits[2]).all()


def test_random_needs_somebody_to_imitate() -> None:
    with pytest.raises(UsageError, match="Random needs a policy whose exit shares it takes"):
        Random().fit(predictions(3, 20, 4), costs(3), 300.0)
    assert Random(of=Patience()).label == "Random as Patience"
    fitted = Random(of=MaxProb()).fit(predictions(3, 20, 4), costs(3), 300.0)
    with pytest.raises(UsageError, match="2 cuts are fitted for 2 exits"):
        fitted.exits(np.zeros((2, 5, 4)))
    with pytest.raises(Unsupported, match="no board can run it"):
        fitted.stop(np.zeros((1, 1, 4)))
