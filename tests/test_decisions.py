"""The arithmetic of decisions, against loops over samples, scipy, scikit-learn and true refits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from anytime import decisions, metrics
from anytime.errors import Unsupported
from anytime.metrics import Ints, Predictions, take
from anytime.policies.confidence import MaxProb
from anytime.policy import Policy

seeds = st.integers(0, 10_000)


class Costs:
    """1, 2, 3 ... at exits 1, 2, 3 ..."""

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return float(exit + 1)


def predictions(n: int = 400, n_exits: int = 4, n_classes: int = 5, seed: int = 0, part: str = "test") -> Predictions:
    """Exits that get better."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n_exits, n, n_classes))
    logits[:, np.arange(n), labels] += np.linspace(0.8, 2.5, n_exits)[:, None] * rng.uniform(0.2, 1.8, n)
    return Predictions(logits, labels, part)  # type: ignore[arg-type]


def test_temperatures_of_no_samples_are_none() -> None:
    with pytest.raises(Unsupported, match="the tune part has none"):
        decisions.temperatures(predictions(n=0, part="tune"))


def test_temperatures_are_scipys() -> None:
    p = predictions()
    p = Predictions(p.logits * np.array([0.2, 1.0, 3.0, 9.0])[:, None, None], p.labels, "tune")
    for z, got in zip(p.logits, decisions.temperatures(p), strict=True):
        best = minimize_scalar(lambda t, z=z: metrics.nll(z / np.exp(t), p.labels), bounds=(-4, 4), options={"xatol": 1e-10})
        assert got == pytest.approx(np.exp(best.x), rel=1e-5)


def test_a_network_that_is_always_right_has_a_temperature_all_the_same() -> None:
    z = np.array([[[9.0, 0.0], [0.0, 9.0]], [[0.0, 9.0], [9.0, 0.0]]])
    hot = decisions.temperatures(Predictions(z, np.array([0, 1]), "tune"))
    assert hot == pytest.approx([1 / 64, 64])


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 60), st.integers(3, 6), st.booleans())
def test_confidence_is_scikit_learns(seed: int, n: int, n_classes: int, ties: bool) -> None:
    p = predictions(n, 1, n_classes, seed)
    z = np.round(p.logits[0]) if ties else p.logits[0]
    said = decisions.confidence(z, p.labels)
    q, right = metrics.softmax(z), z.argmax(-1) == p.labels
    assert said["nll"] == pytest.approx(log_loss(p.labels, q, labels=range(n_classes)))
    assert said["brier"] == pytest.approx(brier_score_loss(p.labels, q, labels=range(n_classes), scale_by_half=False))
    assert 0 <= said["brier"] <= 2 and 0 <= said["ece"] <= 1  # type: ignore[operator]
    if right.all() or not right.any():
        assert said["auroc"] is None
    else:
        assert said["auroc"] == pytest.approx(roc_auc_score(right, q.max(-1))) and 0 <= said["auroc"] <= 1


def test_those_that_reach_an_exit_are_those_that_leave_there_or_later() -> None:
    p = predictions(90, 3)
    exits = np.repeat([0, 1, 0], 30)
    said = decisions.reached(p, exits, (0, 1, 2))
    assert said["nll_reached"][0] == metrics.nll(p.logits[0], p.labels)
    middle = slice(30, 60)
    for name in ("nll", "brier", "ece", "auroc"):
        assert said[f"{name}_reached"][1] == getattr(metrics, name)(p.logits[1, middle], p.labels[middle])
        assert said[f"{name}_reached"][2] is None, "nobody comes there"
    assert decisions.reached(p, exits, (1, 2))["ece_reached"][0] is None, "that head is never run"


def test_overthinking_by_hand() -> None:
    right = np.array([[True, True, False, False], [False, True, True, False], [False, True, False, True]])
    assert decisions.overthinking(right).tolist() == [0.25, 0.25, 0.0]


@given(seeds, st.integers(1, 80), st.integers(2, 5))
def test_flips_are_those_of_a_loop_over_samples(seed: int, n: int, n_exits: int) -> None:
    rng = np.random.default_rng(seed)
    exits, before = rng.integers(n_exits, size=(2, n))
    right, there = rng.random((2, n)) < 0.6
    wanted = dict.fromkeys(("exit_flips", "earlier_flips", "later_flips", "harmful_flips", "helpful_flips"), 0)
    for e, b, r, t in zip(exits, before, right, there, strict=True):
        if e != b:
            wanted["exit_flips"] += 1
            wanted["earlier_flips" if e < b else "later_flips"] += 1
            if t and not r:
                wanted["harmful_flips"] += 1
            if r and not t:
                wanted["helpful_flips"] += 1
    said = decisions.flips(exits, before, right, there)
    assert said == pytest.approx({name: count / n for name, count in wanted.items()})
    assert said["earlier_flips"] + said["later_flips"] == pytest.approx(said["exit_flips"])
    assert said["harmful_flips"] + said["helpful_flips"] <= said["exit_flips"] + 1e-12


def test_a_curve_by_hand() -> None:
    c = decisions.curve(np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.9, 0.5, 0.6, 0.8]))
    assert c.cost.tolist() == [1, 2, 3] and c.accuracy == pytest.approx([0.5, 0.7, 0.9])
    assert [c.at(x) for x in (0.0, 1.5, 3.0, 9.0)] == pytest.approx([0.5, 0.6, 0.9, 0.9])
    assert c.area(1, 3) == pytest.approx(0.7)
    assert c.area(0, 4) == pytest.approx((0.5 + 2 * 0.7 + 0.9) / 4), "flat beyond its ends"
    assert c.area(2.5, 2.5) == pytest.approx(0.8)


@given(seeds, st.integers(1, 9))
def test_an_area_is_a_mean_accuracy(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    c = decisions.curve(rng.integers(1, 6, n).astype(float), rng.random(n))
    fine = np.linspace(0, 7, 70_001)
    assert c.area(0, 7) == pytest.approx(np.mean([c.at(x) for x in fine[::100]]), abs=0.02)
    assert c.accuracy.min() - 1e-12 <= c.area(0, 7) <= c.accuracy.max() + 1e-12


# The bootstrap ---------------------------------------------------------------------------------------------------


def family(
    policies: list[Policy], p: Predictions, val: Predictions, of: list[Policy] | None = None
) -> tuple[decisions.Family, list[Ints]]:
    """What policies, fitted on ``val``, do to ``p``."""
    exits = [policy.leave(p) for policy in of or policies]
    costs = np.tile(np.arange(1.0, p.n_exits + 1), (len(policies), 1))
    right = np.array([take(metrics.correct(p), e) for e in exits])
    val_cost = np.array([policy.leave(val) + 1.0 for policy in policies])
    return decisions.Family(np.array(exits, np.uint8), right, costs, val_cost), exits


def fits(val: Predictions, budgets: np.ndarray) -> list[Policy]:  # type: ignore[type-arg]
    return [MaxProb().fit(val, Costs(), float(b)) for b in budgets]


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_a_refitted_policy_lies_on_its_own_curve(seed: int) -> None:
    val, test = predictions(120, seed=seed, part="val"), predictions(150, seed=seed + 1)
    own, _ = family(fits(val, np.linspace(1.2, 4, 9)), test, val)
    for chosen in range(9):
        spent = own.spent()[chosen].mean()
        if (own.spent().mean(1) == spent).sum() == 1:
            assert own.curve().at(spent) == pytest.approx(own.right[chosen].mean(), abs=1e-12)
        found = decisions.limits(own, chosen, own)
        assert set(found) == {"accuracy", "spent", "regret"}
        assert found["spent"][0] <= spent <= found["spent"][1]


def test_resamples_are_the_same_for_everyone_and_draw_as_many() -> None:
    w = decisions.weights(30, "test")
    assert w.shape == (decisions.RESAMPLES, 30) and w is decisions.weights(30, "test")
    together = np.corrcoef(w.ravel(), decisions.weights(30, "val").ravel())[0, 1]
    assert abs(together) < 0.05, "val and test are drawn apart, whatever their sizes"
    assert w.sum(1) == pytest.approx(1) and np.allclose(np.round(w * 30), w * 30, atol=1e-4)
    values = np.random.default_rng(0).random((2, 30))
    assert decisions.resampled(values) == pytest.approx(w @ values.T, abs=1e-6)


def test_limits_are_those_of_true_refits() -> None:
    """Every resample refitted for real: the same draws of val and test, the same budget."""
    val, test = predictions(500, seed=5, part="val"), predictions(800, seed=6)
    noisy = Predictions(test.logits * 0.8 + np.random.default_rng(7).normal(0, 0.4, test.logits.shape), test.labels, "test")
    noisy_val = Predictions(val.logits * 0.8 + np.random.default_rng(8).normal(0, 0.4, val.logits.shape), val.labels, "val")
    budgets = np.unique(np.append(np.linspace(1, 4, 25), 2.4))
    chosen = int(np.flatnonzero(budgets == 2.4)[0])
    policies = fits(val, budgets)
    there, before = family(policies, test, val)
    kept, taken = family(policies, noisy, val)
    own, _ = family(fits(noisy_val, budgets), noisy, noisy_val)
    found = decisions.limits(kept, chosen, own, (there, chosen))
    refitted = decisions.limits(own, chosen, own, (there, chosen))
    parts = (("val", 500), ("test", 800))
    draws = [
        np.repeat(np.arange(n), np.rint(decisions.weights(n, part) * n).astype(int)[r]) for r in range(200) for part, n in parts
    ]
    true: dict[str, list[float]] = {"accuracy": [], "spent": [], "exit_flips": [], "refitted": []}
    for v, t in zip(draws[::2], draws[1::2], strict=True):
        policy = MaxProb().fit(Predictions(val.logits[:, v], val.labels[v], "val"), Costs(), 2.4)
        exits, was = policy.leave(noisy)[t], policy.leave(test)[t]
        true["accuracy"].append(float((noisy.logits[exits, t].argmax(-1) == noisy.labels[t]).mean()))
        true["spent"].append(float(exits.mean() + 1))
        true["exit_flips"].append(float((exits != was).mean()))
        again = MaxProb().fit(Predictions(noisy_val.logits[:, v], val.labels[v], "val"), Costs(), 2.4)
        true["refitted"].append(float((again.leave(noisy)[t] != was).mean()))
    found["refitted"] = refitted["exit_flips"]
    for name, values in true.items():
        lo, hi = np.percentile(values, [2.5, 97.5])
        assert found[name][1] - found[name][0] == pytest.approx(hi - lo, rel=0.25), name
        assert sum(found[name]) / 2 == pytest.approx((lo + hi) / 2, abs=0.15 * (hi - lo)), name
    assert found["regret"][0] < found["regret"][1]
    assert (taken[chosen] != before[chosen]).any()


def test_a_place_between_two_points_is_their_mixture() -> None:
    values = np.array([[0.0, 1.0, 4.0], [0.0, 1.0, 4.0]])
    assert decisions.between(values, np.array([0.25, 2.0])).tolist() == [0.25, 4.0]
    # Costs 1, 2, 3 for everyone: no resample moves the fit.
    assert decisions.places(np.tile([[1.0], [2.0], [3.0]], (1, 20)), 1) == pytest.approx(np.ones(decisions.RESAMPLES), abs=1e-5)


def test_two_families_that_are_one_never_differ() -> None:
    val, test = predictions(200, part="val"), predictions(200, seed=1)
    own, _ = family(fits(val, np.linspace(1, 4, 9)), test, val)
    at = np.random.default_rng(0).uniform(0, 8, decisions.RESAMPLES)
    assert decisions.mixed_flips(own, at, own, at) == pytest.approx(np.zeros(len(at)), abs=1e-6)
    ends = np.zeros(len(at)), np.full(len(at), 8.0)
    apart = decisions.resampled(own.exits[[0]] != own.exits[[8]])[:, 0]
    assert decisions.mixed_flips(own, ends[0], own, ends[1]) == pytest.approx(apart)
    half = decisions.mixed_flips(own, ends[0], own, ends[0] + 0.5)
    assert half == pytest.approx(decisions.resampled(own.exits[[0]] != own.exits[[1]])[:, 0] / 2)
