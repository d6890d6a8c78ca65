"""How far samples go, against the policy itself; and whom it may ask."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from anytime.backend import TorchNet
from anytime.cost import In, account
from anytime.errors import Infeasible, Leak, Unsupported
from anytime.metrics import Predictions
from anytime.models.static import Static
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.fixed import Fixed
from anytime.policies.patience import Patience
from anytime.reach import Reach
from anytime.spec import key
from tests.worlds import Restarting, Tiny, data, fresh, trained


@pytest.mark.parametrize(
    "policy, budget", [(MaxProb(), 0.8), (Entropy(per_exit=True), 0.7), (Patience(), 1.0)], ids=["max", "entropy", "patience"]
)
def test_it_is_what_the_policy_does(policy, budget):
    model, calib = trained(), data().calib
    with torch.no_grad():
        logits = model(calib.x).numpy()
    cost = account(TorchNet(model, {}, True), (3, 16, 16))
    fitted = policy.fit(Predictions(logits, calib.y.numpy(), "val"), In(cost, "macs"), budget * cost.macs[-1])
    got = Reach(policy, budget).estimate(model, calib)
    assert np.array_equal(got.last, fitted.exits(logits))
    assert cost.macs[got.last].mean() <= budget * cost.macs[-1]
    assert got.leaves.sum() == pytest.approx(1) and got.stage[0] == 1
    assert got.stage == pytest.approx(got.leaves[::-1].cumsum()[::-1])
    assert np.array_equal(got.head, got.stage)
    assert np.array_equal(Reach(policy, budget).of(model, calib), got.last)


def test_more_budget_goes_farther():
    shares = [Reach(MaxProb(), b).estimate(trained(), data().calib).stage for b in (0.65, 0.8, 1.0)]
    assert np.all(np.diff(shares, axis=0) >= 0)
    assert shares[0][-1] < 1 and shares[-1].tolist() == [1, 1, 1]


def test_heads_that_are_not_read_are_not_run():
    got = Reach(Fixed(), 1.0).estimate(trained(), data().calib)
    assert got.stage.tolist() == [1, 1, 1] and got.head.tolist() == [0, 0, 1]
    jumps = Reach(Fixed(), 1.0).estimate(trained(Restarting()), data().calib)
    assert jumps.stage.tolist() == [0, 1]  # a stage that restarts needs none before it
    assert jumps.last.tolist() == [1] * len(data().calib)


@pytest.mark.parametrize("part", ["train", "val", "hold", "test"])
def test_other_parts_are_refused(part):
    with pytest.raises(Leak, match=f"calib or tune, not on {part}"):
        Reach(MaxProb(), 0.8).of(trained(), getattr(data(), part))


def test_samples_that_the_network_knows_are_refused():
    model, calib = trained(Restarting()), data().calib
    before = model.trained_on
    try:
        for seen in (calib.origins, {calib.digest}):  # published weights have seen the whole published set
            model.trained_on = frozenset(seen)
            with pytest.raises(Leak, match="was trained on the samples of this calib part"):
                Reach(MaxProb(), 1.0).of(model, calib)
    finally:
        model.trained_on = before


def test_a_part_in_disguise_still_meets_the_policys_own_guard():
    """Named calib, the training part passes the first look; its digest does not."""
    with pytest.raises(Leak):
        Reach(MaxProb(), 0.8).of(trained(), replace(data().train, name="calib"))


def test_budgets_that_leave_stages_without_samples():
    model, calib = trained(), data().calib
    with pytest.raises(Infeasible, match=r"budget of 0\.01 .* least possible is 0\.\d+ of the network's last exit") as error:
        Reach(MaxProb(), 0.01).of(model, calib)
    with pytest.raises(Unsupported, match="goes beyond stage 1 of 3.*raise the budget"):
        Reach(MaxProb(), error.value.least * (1 + 1e-9)).of(model, calib)


def test_its_key_names_policy_and_budget():
    assert len({key(Reach(p, b)) for p in (MaxProb(), Entropy()) for b in (0.5, 0.6)}) == 4


def test_a_network_of_one_exit_is_reached_by_all():
    got = Reach(MaxProb(), 0.6).estimate(fresh(Static(Tiny())).eval(), data().calib)
    assert got.last.tolist() == [0] * len(data().calib)
    assert [a.tolist() for a in got[1:]] == [[1.0]] * 3
