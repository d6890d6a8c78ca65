"""Policies of one rule against a straightforward reference, one sample, one exit, one threshold after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anytime import stops
from anytime.errors import Infeasible, Leak, Unsupported, UsageError
from anytime.metrics import Floats, Predictions, accuracy, correct
from anytime.policies.confidence import Entropy, Margin, MaxProb
from anytime.policies.eenet import EENet
from anytime.policies.fixed import Fixed
from anytime.policies.patience import Patience
from anytime.policies.random import Random
from anytime.policies.reading import Reading
from anytime.policies.risk import RiskControl
from anytime.policy import PathCost, Policy, mean_cost
from anytime.spec import key
from anytime.threshold import Searched
from tests.contracts.policy import Costs, costs, predictions, right


@dataclass(frozen=True)
class AnyCosts:
    """A whole number per exit, in no order: costs need not grow along a chain."""

    of: tuple[int, ...]

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return float(self.of[exit])


class Case(NamedTuple):
    val: Predictions
    cost: AnyCosts
    budget: float


@st.composite
def cases(draw: st.DrawFn, max_exits: int = 5, grows: bool = False) -> Case:
    """Small networks; half of them with coarse logits, whose scores tie within and between exits."""
    n_exits, n, k = draw(st.integers(2, max_exits)), draw(st.integers(1, 14)), draw(st.integers(2, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = draw(st.booleans())
    logits = rng.integers(-1, 2, (n_exits, n, k)).astype(np.float32) if coarse else rng.normal(size=(n_exits, n, k))
    of = draw(st.lists(st.integers(1, 50), min_size=n_exits, max_size=n_exits))
    cost = AnyCosts(tuple(sorted(of) if grows else of))
    budget = draw(st.integers(min(of) * n, (max(of) + 1) * n)) / n  # many budgets are the mean of some decision exactly
    return Case(Predictions(logits, rng.integers(k, size=n), "val"), cost, budget)


def one_by_one(policy: Policy, logits: Floats) -> list[int]:
    """The exits that it takes, by the definition of each rule, one sample and one exit after the other."""
    exits = []
    for n in range(logits.shape[1]):
        run, taken = 0, len(logits) - 1
        for k, row in enumerate(logits[:, n]):
            run = run + 1 if k and row.argmax() == logits[k - 1, n].argmax() else 0
            leaves = {
                Fixed: lambda k=k: k == policy.exit % len(logits),
                Patience: lambda run=run: run == policy.patience,
                MaxProb: lambda row=row, k=k: stops.max_probability(row) >= policy.thresholds[k],
                Entropy: lambda row=row, k=k: stops.entropy(row) < policy.thresholds[k],
                Margin: lambda row=row, k=k: stops.margin(row) >= policy.thresholds[k],
            }[type(policy)]
            if k == len(logits) - 1 or leaves():
                taken = k
                break
        exits.append(taken)
    return exits


def spends(policy: Policy, val: Predictions, cost: PathCost) -> float:
    return policy.spends(policy.leave(val), val.n_exits, cost)


def scored(case: Case, exits: list[int] | Floats) -> tuple[Fraction, int]:
    """Mean cost, exactly, and how many samples are right. A budget is a float, and compared with the nearest float."""
    right = correct(case.val)
    spent = Fraction(sum(case.cost.of[e] for e in exits), len(exits))
    return spent, sum(int(right[e, n]) for n, e in enumerate(exits))


def best(case: Case, candidates: list[Policy]) -> tuple[Fraction, int]:
    """Of the candidates within the budget the one that spends most, then is right most often."""
    all_scored = [scored(case, one_by_one(c, case.val.logits)) for c in candidates]
    return max(s for s in all_scored if float(s[0]) <= case.budget)


def every_threshold(policy: Searched, case: Case, exits: tuple[int, ...]) -> list[float]:
    """One for each way of dividing the scores of those exits: each score, and one beyond the largest."""
    scores = policy.scores(case.val.logits)[list(exits)]
    return [0.0, *np.unique(scores).tolist(), 5.0]


THRESHOLDS: list[Searched] = [MaxProb(), Entropy(), Margin()]


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
@settings(deadline=None)
@given(case=cases())
def test_one_threshold_is_the_best_of_all(policy: Searched, case: Case) -> None:
    links = case.val.n_exits - 1
    candidates = [replace(policy, thresholds=(t,) * links) for t in every_threshold(policy, case, tuple(range(links)))]
    cheapest = min(scored(case, one_by_one(c, case.val.logits))[0] for c in candidates)
    try:
        fitted = policy.fit(case.val, case.cost, case.budget)
    except Infeasible as error:
        assert case.budget < float(cheapest) and error.least == float(cheapest)
        return
    assert fitted.exits(case.val.logits).tolist() == one_by_one(fitted, case.val.logits)
    assert scored(case, fitted.exits(case.val.logits)) == best(case, candidates)


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
@settings(deadline=None)
@given(case=cases())
def test_a_curve_says_what_every_threshold_does(policy: Searched, case: Case) -> None:
    # Thresholds that scores meet exactly are among them.
    asked = every_threshold(policy, case, tuple(range(case.val.n_exits)))
    curve = policy.curve(case.val, case.cost, np.array(asked))
    assert curve.thresholds.tolist() == asked
    for t, counts, spent, share in zip(asked, curve.counts, curve.spent, curve.accuracy, strict=True):
        one = replace(policy, thresholds=(t,) * (case.val.n_exits - 1))
        exits = one.exits(case.val.logits)
        assert exits.tolist() == one_by_one(one, case.val.logits)
        assert counts.tolist() == np.bincount(exits, minlength=case.val.n_exits).tolist()
        assert spent == one.spends(exits, case.val.n_exits, case.cost)
        assert share == accuracy(case.val, exits)


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
@settings(deadline=None)
@given(case=cases(grows=True))
def test_a_curve_has_each_decision_once(policy: Searched, case: Case) -> None:
    curve = policy.curve(case.val, case.cost)
    assert (np.diff(curve.thresholds) > 0).all()
    assert (np.diff(curve.counts, axis=0) != 0).any(axis=1).all(), "two thresholds decide alike"
    assert (np.diff(curve.spent) * (1 if policy.high else -1) >= 0).all(), "costs that grow are not monotone in the threshold"


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
@settings(deadline=None)
@given(case=cases(max_exits=3))
def test_thresholds_of_their_own_are_the_best_of_all_where_all_can_be_tried(policy: Searched, case: Case) -> None:
    own = replace(policy, per_exit=True)
    links = case.val.n_exits - 1
    if len(case.val.labels) < links:
        with pytest.raises(UsageError, match=f"{links} thresholds cannot be fitted on {len(case.val.labels)} val samples"):
            own.fit(case.val, case.cost, case.budget)
        return
    fitted = own.fit(case.val, case.cost, case.budget)
    spent, right = scored(case, fitted.exits(case.val.logits))
    assert float(spent) <= case.budget and fitted.exits(case.val.logits).tolist() == one_by_one(fitted, case.val.logits)
    ways = product(*(every_threshold(policy, case, (k,)) for k in range(links)))
    all_scored = [scored(case, one_by_one(replace(own, thresholds=way), case.val.logits)) for way in ways]
    assert (right, -spent) == max((r, -s) for s, r in all_scored if float(s) <= case.budget)


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
@settings(deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0.05, 1), n_exits=st.integers(2, 7))
def test_thresholds_of_their_own_are_never_worse_than_one(policy: Searched, seed: int, share: float, n_exits: int) -> None:
    val, cost = predictions(n_exits, 60, 5, seed), costs(n_exits)
    cheap, dear = cost.path((0,), 0), cost.path(tuple(range(n_exits)), n_exits - 1)
    budget = cheap + share * (dear - cheap)
    one = policy.fit(val, cost, budget)
    own = replace(policy, per_exit=True).fit(val, cost, budget)
    assert spends(own, val, cost) <= budget
    assert accuracy(val, own.exits(val.logits)) >= accuracy(val, one.exits(val.logits))


def test_thresholds_of_their_own_gain_where_an_exit_is_sure_and_wrong() -> None:
    # Exit 1 is sure of everything and always wrong, exits 2 and 3 are right: one threshold must trust or distrust all.
    labels = np.zeros(40, int)
    logits = np.zeros((3, 40, 2))
    logits[0, :, 1] = np.linspace(6, 7, 40)
    logits[1, :, 0] = np.linspace(1, 2, 40)
    logits[2, :, 0] = 1
    val, cost = Predictions(logits, labels, "val"), Costs((10, 10, 10), (0, 0, 0))
    one, own = (MaxProb(per_exit=p).fit(val, cost, 20.0) for p in (False, True))
    assert accuracy(val, one.exits(logits)) == 0.5  # half of them go on, to the last exit, for what the other half saves
    assert accuracy(val, own.exits(logits)) == 1 and spends(own, val, cost) == 20


def test_costs_that_fall_along_the_chain() -> None:
    val = predictions(3, 30, 4)
    val = replace(val, labels=val.logits[0].argmax(-1))  # the dearest exit is always right
    cost = AnyCosts((9, 2, 5))
    own = Entropy(per_exit=True).fit(val, cost, 2.0)
    assert own.exits(val.logits).tolist() == [1] * 30
    with pytest.raises(Infeasible) as caught:  # one threshold that sends everyone past exit 1 sends nobody out at exit 2
        Entropy().fit(val, cost, 2.0)
    assert 2 < caught.value.least < 9
    assert spends(Entropy().fit(val, cost, caught.value.least), val, cost) == caught.value.least
    with pytest.raises(Infeasible) as lower:  # and a budget below every path is told the same
        Entropy().fit(val, cost, 1.0)
    assert lower.value.least == caught.value.least


def test_a_threshold_lies_midway_so_that_rounding_flips_nothing() -> None:
    p = np.array([0.6, 0.7, 0.9, 0.99])
    logits = np.log(np.stack([np.stack([p, 1 - p], -1)] * 2))
    val, cost = Predictions(logits, np.zeros(4, int), "val"), AnyCosts((1, 2))
    fitted = MaxProb().fit(val, cost, 1.5)
    assert fitted.thresholds == (pytest.approx(0.8),)
    h = stops.entropy(logits[0])
    assert Entropy().fit(val, cost, 1.5).thresholds == (pytest.approx((h[1] + h[2]) / 2),)
    noise = np.random.default_rng(0).normal(scale=1e-6, size=logits.shape)
    assert (fitted.exits(logits + noise) == fitted.exits(logits)).all()


def test_thresholds_at_the_ends_hold_for_every_logit() -> None:
    seen, unseen = predictions(3, 50, 4), predictions(3, 50, 4, seed=1)
    sure = replace(unseen, logits=1e4 * unseen.logits)
    flat = replace(unseen, logits=0 * unseen.logits)
    cost = costs(3)
    for policy in THRESHOLDS:
        first, last = policy.fit(seen, cost, cost.path((0,), 0)), policy.fit(seen, cost, 1e9)
        for p in (unseen, sure, flat):
            assert (first.exits(p.logits) == 0).all() and (last.exits(p.logits) == 2).all()
    assert Margin().fit(seen, cost, 1e9).thresholds == (pytest.approx(1, abs=1e-5),) * 2
    assert MaxProb().fit(seen, cost, 1e9).thresholds == (pytest.approx(1, abs=1e-5),) * 2
    assert Entropy().fit(seen, cost, 1e9).thresholds == (0, 0)


def shuffled(seed: int) -> Floats:
    """Logits [2, 60, 12] of one row with its classes shuffled: its sums differ by rounding alone."""
    rng = np.random.default_rng(seed)
    row = rng.normal(size=12)
    return np.stack([[rng.permutation(row) for _ in range(60)]] * 2)


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
def test_scores_that_differ_in_their_last_bit_are_told_apart(policy: Searched) -> None:
    def hard(scores: Floats) -> bool:  # the middle of two neighbours rounds to the lower one
        return bool(((scores[:-1] + scores[1:]) / 2 == scores[:-1]).any())

    logits = next(z for z in map(shuffled, range(60)) if hard(np.unique(policy.scores(z)[0])))
    scores = np.unique(policy.scores(logits)[0])
    val, cost = Predictions(logits, np.zeros(60, int), "val"), AnyCosts((1, 61))
    curve = policy.curve(val, cost)
    assert len(curve.thresholds) == len(scores) + 1
    for spent in curve.spent:
        assert spends(policy.fit(val, cost, spent), val, cost) == spent


@settings(deadline=None)
@given(case=cases())
def test_patience_is_the_best_of_all(case: Case) -> None:
    candidates: list[Policy] = [Patience(p) for p in range(case.val.n_exits)]
    cheapest = min(scored(case, one_by_one(c, case.val.logits))[0] for c in candidates)
    try:
        fitted = Patience().fit(case.val, case.cost, case.budget)
    except Infeasible as error:
        assert case.budget < float(cheapest) and error.least == float(cheapest)
        return
    assert fitted.exits(case.val.logits).tolist() == one_by_one(fitted, case.val.logits)
    assert scored(case, fitted.exits(case.val.logits)) == best(case, candidates)


@settings(deadline=None)
@given(case=cases(), patience=st.integers(0, 6))
def test_patience_counts_as_the_paper_does(case: Case, patience: int) -> None:
    policy = Patience(patience)
    assert policy.exits(case.val.logits).tolist() == one_by_one(policy, case.val.logits)


@settings(deadline=None)
@given(case=cases())
def test_fixed_is_the_most_accurate_affordable_exit(case: Case) -> None:
    fitted = Fixed().fit(case.val, case.cost, case.budget)
    assert isinstance(fitted, Fixed)
    n = len(case.val.labels)
    right = correct(case.val).sum(1)
    affordable = [(int(right[k]), -c, -k) for k, c in enumerate(case.cost.of) if c <= case.budget]
    assert fitted.exit == -max(affordable)[2]
    assert fitted.exits(case.val.logits).tolist() == one_by_one(fitted, case.val.logits) == [fitted.exit] * n


def test_fixed_pays_no_other_head() -> None:
    cost = Costs((100, 100, 100), (10, 20, 30))
    val = predictions(3, 20, 4)
    assert Fixed(1).uses(3) == (1,) and Fixed().uses(3) == (2,)
    assert Fixed(1).costs(3, cost).tolist() == [np.inf, 220, np.inf]
    assert spends(Fixed(1), val, cost) == 220 and spends(Fixed(-1), val, cost) == 330
    assert MaxProb().costs(3, cost).tolist() == [110, 230, 360]
    with pytest.raises(UsageError, match="has 3 exits; use 0 to 2, or -1 for the last"):
        Fixed(3).uses(3)


@pytest.mark.parametrize("policy", [*THRESHOLDS, Patience()], ids=lambda p: p.label)
def test_a_question_is_no_answer(policy: Policy) -> None:
    with pytest.raises(UsageError, match=f"{policy.label}.*call fit"):
        policy.exits(predictions(3, 5, 4).logits)


def test_an_answer_for_fewer_exits_is_refused() -> None:
    fitted = Entropy().fit(predictions(2, 30, 4), costs(2), 1e9)
    with pytest.raises(UsageError, match="Entropy: exit 2 has no threshold, 1 are fitted"):
        fitted.exits(predictions(3, 30, 4).logits)


def test_labels_name_the_question() -> None:
    asked = [Fixed(), Patience(), MaxProb(), MaxProb(per_exit=True), Entropy(), Entropy(per_exit=True)]
    said = ["Fixed", "Patience", "MaxProb", "MaxProb per exit", "Entropy", "Entropy per exit"]
    assert [p.label for p in asked] == said
    assert [p.fit(predictions(3, 40, 4), costs(3), 250.0).label for p in asked] == said
    said_apart = {
        EENet(seed=0): "EENet", EENet(seed=1): "EENet, seed 1", EENet(seed=0, steps=5): "EENet, 5 steps",
        RiskControl(): "RiskControl 0.05", RiskControl(delta=0.01): "RiskControl 0.05 (delta 0.01)",
        RiskControl(0.1, 0.01, "labels"): "RiskControl 0.1 of accuracy (delta 0.01)",
        Random(of=Entropy()): "Random as Entropy", Random(of=Entropy(), seed=2): "Random as Entropy, seed 2",
    }  # fmt: skip
    assert {p: p.label for p in said_apart} == said_apart


def test_sentences() -> None:
    val, cost = predictions(3, 40, 4), costs(3)
    with pytest.raises(Infeasible) as caught:
        Entropy().fit(val, cost, 109.5)
    assert str(caught.value) == "Entropy: a budget of 109.5 is too small; the least possible is 110.0, give that or more"
    assert caught.value.least == 110
    with pytest.raises(Leak, match="^Fixed: policies are fitted on val, not on test$"):
        Fixed().fit(replace(val, part="test"), cost, 500.0)
    with pytest.raises(Leak, match="was trained on the samples of this val part \\(digest these\\)"):
        Fixed().fit(replace(val, trained_on=frozenset({"these"})), cost, 500.0)
    with pytest.raises(UsageError, match="val part has no samples"):
        Fixed().fit(Predictions(val.logits[:, :0], val.labels[:0], "val"), cost, 500.0)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_budgets_that_buy_nothing(budget: float) -> None:
    for policy in (MaxProb(), MaxProb(per_exit=True), Entropy(), Patience(), Fixed()):
        with pytest.raises(Infeasible, match="too small; the least possible is 110.0"):
            policy.fit(predictions(3, 40, 4), costs(3), budget)


def test_no_limit_is_a_budget() -> None:
    val = predictions(3, 40, 4)
    assert (Entropy().fit(val, costs(3), float("inf")).exits(val.logits) == 2).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=9).filter(any), st.data())
def test_mean_cost_is_exact(counts: list[int], data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 2**30), min_size=len(counts), max_size=len(counts)))
    got = float(mean_cost(np.array(counts), np.array(costs, float)))
    # The nearest float to the exact mean: no budget under the mean is met, and none over it is missed.
    assert got == float(Fraction(sum(a * b for a, b in zip(counts, costs, strict=True)), sum(counts)))
    assert mean_cost(np.array([counts] * 3), np.array(costs, float)).tolist() == [got] * 3


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(1e-3, 1e3))
def test_everyone_at_one_exit_costs_just_that_exit(n: int, ms: float) -> None:
    assert mean_cost(np.array([n, 0]), np.array([ms, np.inf])) == ms


@pytest.mark.parametrize("policy", [*THRESHOLDS, Patience(), Fixed()], ids=lambda p: p.label)
@settings(deadline=None)
@given(times=st.lists(st.floats(0.01, 9), min_size=4, max_size=4), share=st.floats(0, 1.2))
def test_budgets_in_milliseconds(policy: Policy, times: list[float], share: float) -> None:
    class Measured:
        def path(self, uses: tuple[int, ...], exit: int) -> float:
            return sum(times[: exit + 1])

    val, cost = predictions(4, 30, 3), Measured()
    least, most = cost.path((), 0), cost.path((), 3)
    budget = least + share * (most - least)
    assume(budget >= least)
    assert spends(policy.fit(val, cost, budget), val, cost) <= budget
    assert spends(policy.fit(val, cost, least), val, cost) == least


@pytest.mark.parametrize("policy", [*THRESHOLDS, Patience()], ids=lambda p: p.label)
@settings(deadline=None)
@given(case=cases(), share=st.floats(0, 1))
def test_the_cheapest_that_is_accurate_enough(policy: Policy, case: Case, share: float) -> None:
    links = case.val.n_exits - 1
    if isinstance(policy, Searched):
        every = every_threshold(policy, case, tuple(range(links)))
        candidates: list[Policy] = [replace(policy, thresholds=(t,) * links) for t in every]
    else:
        candidates = [Patience(p) for p in range(links + 1)]
    n = len(case.val.labels)
    tried = [scored(case, one_by_one(c, case.val.logits)) for c in candidates]
    best = max(r for _, r in tried)
    wanted = round(share * n)
    if wanted > best:
        with pytest.raises(Infeasible, match="out of reach") as caught:
            policy.fit_accuracy(case.val, case.cost, wanted / n)
        assert caught.value.best == best / n and np.isnan(caught.value.least)
        wanted = best
    fitted = policy.fit_accuracy(case.val, case.cost, wanted / n)
    spent, right = scored(case, fitted.exits(case.val.logits))
    assert (spent, -right) == min((s, -r) for s, r in tried if r >= wanted)


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
@pytest.mark.parametrize("wanted", [0.5, 0.6, 0.7])
def test_thresholds_of_their_own_are_never_dearer_than_one(policy: Searched, wanted: float) -> None:
    val, cost = predictions(4, 150, 5), costs(4)
    one, own = (replace(policy, per_exit=p).fit_accuracy(val, cost, wanted) for p in (False, True))
    assert spends(own, val, cost) <= spends(one, val, cost) and accuracy(val, own.exits(val.logits)) >= wanted


@pytest.mark.parametrize("policy", [Random(of=MaxProb()), EENet(seed=0, steps=5)], ids=lambda p: p.label)
def test_an_accuracy_that_only_less_than_the_most_reaches(policy: Policy) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=400)
    logits = rng.normal(size=(3, 400, 3))
    logits[:, np.arange(400), labels] += np.array([[1.0], [4.0], [0.3]])  # the last exit undoes what the second had right
    val, cost = Predictions(logits, labels, "val"), costs(3)
    most = float(policy.costs(3, cost).max())
    assert right(policy.fit(val, cost, most), val) < 0.6
    fitted = policy.fit_accuracy(val, cost, 0.6)
    assert right(fitted, val) >= 0.6
    spent = fitted.spends(fitted.leave(val), 3, cost)
    tried = (policy.fit(val, cost, budget) for budget in np.linspace(110, most, 13))  # as coarse as its grid
    reached = [p.spends(p.leave(val), 3, cost) for p in tried if right(p, val) >= 0.6]
    assert spent <= min(reached) < most
    with pytest.raises(Infeasible, match="an accuracy of 1.1 on val is out of reach") as caught:
        policy.fit_accuracy(val, cost, 1.1)
    assert right(policy.fit_accuracy(val, cost, caught.value.best), val) >= caught.value.best


def test_fixed_is_the_cheapest_accurate_exit() -> None:
    val, cost = predictions(4, 300, 5), costs(4)
    right = correct(val).mean(1)
    assert (np.diff(right) > 0).all()
    assert [Fixed().fit_accuracy(val, cost, r) for r in right] == [Fixed(k) for k in range(4)]
    with pytest.raises(Infeasible, match="^Fixed: an accuracy of 1.0 on val is out of reach; the best found is 0.7766"):
        Fixed().fit_accuracy(val, cost, 1.0)
    with pytest.raises(Infeasible):
        Fixed().fit_accuracy(val, cost, float("nan"))


@pytest.mark.parametrize("policy", THRESHOLDS, ids=lambda p: p.label)
@settings(deadline=None)
@given(case=cases(), raw=st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(lambda r: any(r[:2])))
def test_matching_shares_goes_threshold_by_threshold(policy: Searched, case: Case, raw: list[int]) -> None:
    n_exits, n, _ = case.val.logits.shape
    shares = np.array(raw[:n_exits]) / sum(raw[:n_exits])
    matched = policy.matched(shares.tolist(), case.val.logits)
    going, missed = list(range(n)), 0.0
    for k in range(n_exits - 1):
        scores = policy.scores(case.val.logits)[k]
        surest_first = sorted((-scores[i] if policy.high else scores[i]) for i in going)
        # Every way of parting those still going, none between equals: the nearest to what is wanted, of two the fewer.
        ways = [m for m in range(len(going) + 1) if m in (0, len(going)) or surest_first[m - 1] < surest_first[m]]
        wanted = n * shares[k] + missed
        distance = min(abs(m - wanted) for m in ways)
        left = [i for i in going if matched.passes(scores[i], np.array(matched.thresholds[k]))]
        assert len(left) == min(m for m in ways if abs(m - wanted) <= distance + 1e-9)
        missed = wanted - len(left)
        going = [i for i in going if i not in left]
    assert matched.exits(case.val.logits).tolist() == one_by_one(matched, case.val.logits)


def test_shares_that_are_none() -> None:
    logits = predictions(3, 20, 4).logits
    for shares in ((0.5, 0.5), (0.5, 0.6, -0.1), (0.2, 0.2, 0.2)):
        with pytest.raises(UsageError, match="3 shares that sum to 1 are needed"):
            MaxProb().matched(shares, logits)
    with pytest.raises(UsageError, match="no samples"):
        MaxProb().matched((0.5, 0.2, 0.3), logits[:, :0])
    with pytest.raises(UsageError, match="not finite"):
        MaxProb().matched((0.5, 0.2, 0.3), logits * np.where(logits > 2, np.nan, 1))
    for policy in (Fixed(), Patience()):
        with pytest.raises(Unsupported, match=f"{policy.label} has no threshold at each exit"):
            policy.matched((0.5, 0.2, 0.3), logits)


def test_shares_of_one_network_hold_on_another() -> None:
    """What a user in the field can do: FP32's exit shares on unlabelled images, whatever compression did to confidences."""
    val, cost = predictions(3, 500, 5), costs(3)
    kept = MaxProb().fit(val, cost, 300.0)
    wanted = np.bincount(kept.exits(val.logits), minlength=3) / 500
    compressed = 0.5 * val.logits
    assert (np.bincount(kept.exits(compressed), minlength=3) / 500)[2] > wanted[2] + 0.2
    matched = kept.matched(wanted.tolist(), compressed)
    assert (np.bincount(matched.exits(compressed), minlength=3) / 500).tolist() == wanted.tolist()


def test_shares_that_sum_to_a_hair_over_one_are_matched() -> None:
    shares = [281 / 500, 171 / 500, 48 / 500, 0.0]
    assert np.cumsum(shares)[2] > 1, "as floats do"
    logits = predictions(4, 500, 5).logits
    matched = Reading(of=MaxProb(), reads=(0, 1, 2, 3)).fit(predictions(4, 500, 5), costs(4), 1e9).matched(shares, logits)
    assert np.bincount(matched.exits(logits), minlength=4).tolist() == [281, 171, 48, 0]


def test_temperatures_undo_what_they_measure() -> None:
    val, cost = predictions(3, 200, 5), costs(3)
    kept = MaxProb().fit(val, cost, 300.0)
    scaled = val.logits * np.array([2.0, 0.5, 4.0])[:, None, None].astype(np.float32)
    cooled = kept.tempered((2.0, 0.5, 4.0))
    assert cooled.exits(scaled).tolist() == kept.exits(val.logits).tolist() != kept.exits(scaled).tolist()
    exits = kept.exits(val.logits)
    assert (cooled.answer(scaled, exits) == kept.answer(val.logits, exits)).all()
    for wrong in ((0.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (float("inf"), 1.0, 1.0)):
        with pytest.raises(UsageError, match="temperatures must be finite and over 0"):
            kept.tempered(wrong)
    with pytest.raises(UsageError, match="1 temperatures are given and exit 2 is read"):
        kept.tempered((2.0,)).exits(scaled)


def test_one_exit_leaves_nothing_to_decide() -> None:
    for policy in (MaxProb(), Patience()):
        with pytest.raises(UsageError, match="a network of one exit leaves nothing to decide; use Fixed"):
            policy.fit(predictions(1, 20, 4), costs(1), 1e9)


def test_records_keep_their_keys() -> None:
    """Fields came and files moved since the first records were written."""
    asked = [Fixed(), Fixed(2), Patience(), MaxProb(), MaxProb(per_exit=True), Entropy(), Entropy(per_exit=True)]
    before = ["985dbedba37e", "a70f7f57508a", "d29f29538367", "d240e2102c71", "0a37f1c31d72", "307ed2fb7576", "144a3ffac76f"]
    assert [key(p) for p in asked] == before
