"""Losses against hand-worked numbers, and what each of them lets learn."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from anytime.errors import UsageError
from anytime.losses import Distilled, FromTeacher, FrozenTrunk, Joint, LinearWithLateKL, Rising, TrunkThenJoint
from anytime.models.static import Static
from tests.worlds import Tiny, data, fresh, trained, trainer

# Two classes, two exits, one sample: probabilities 3/4 and 1/2 for the right class.
LOGITS = torch.tensor([[[math.log(3.0), 0.0]], [[0.0, 0.0]]])
Y = torch.tensor([0])
CE = [math.log(4 / 3), math.log(2)]


def terms(loss, logits=LOGITS, y=Y, done=0.0, state=None):
    return loss(logits, y, done, {} if state is None else state).tolist()


def test_joint_by_hand():
    assert terms(Joint()) == pytest.approx(CE)
    assert terms(Joint((0.3, 1.0))) == pytest.approx([0.3 * CE[0], CE[1]])
    assert terms(Joint((0.3, 1.0)), LOGITS[:1]) == pytest.approx(CE[:1])  # a network of one exit
    with pytest.raises(UsageError, match="3 numbers for a network of 2 exits"):
        terms(Joint((1.0, 1.0, 1.0)))


def test_frozen_trunk_leaves_the_last_exit_out():
    assert terms(FrozenTrunk()) == pytest.approx(CE[:1])
    assert terms(FrozenTrunk(), LOGITS[:1]) == pytest.approx(CE[:1])  # a network of one exit


def test_trunk_then_joint_by_hand():
    loss = TrunkThenJoint(0.5)
    assert terms(loss, done=0.49) == pytest.approx(CE[1:]) and terms(loss, done=0.5) == pytest.approx(CE)


def test_rising_is_sdns():
    six = torch.zeros(7, 1, 2)
    weights = [t / math.log(2) for t in terms(Rising(), six, done=0.0)]
    assert weights == pytest.approx([0.01] * 6 + [1.0], rel=1e-5)
    # epoch 50 of 100: min(C_i, 0.01 + 50 C_i / 100)
    weights = [t / math.log(2) for t in terms(Rising(), six, done=0.5)]
    assert weights == pytest.approx([0.085, 0.16, 0.235, 0.31, 0.385, 0.46, 1.0], rel=1e-5)
    weights = [t / math.log(2) for t in terms(Rising(), six, done=0.999)]
    assert weights == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0], rel=1e-2)


def test_eenets_weights_and_late_kl_by_hand():
    loss = LinearWithLateKL(temperature=1.0, strength=0.5)
    assert terms(loss) == pytest.approx([CE[0] / 6, 2 * CE[1] / 6])
    # KL of (1/2, 1/2) from (3/4, 1/4), the last exit's from the first's, over two classes
    kl = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert terms(loss, done=0.75) == pytest.approx([CE[0] / 6 + 0.5 * kl, 2 * CE[1] / 6])


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_eenets_late_kl_is_the_authors_line():
    z, t = torch.randn(3, 5, 4), 3.0
    y = torch.zeros(5, dtype=torch.int64)
    theirs = [
        torch.nn.KLDivLoss()(torch.log_softmax(side / t, -1), torch.softmax(z[-1] / t, -1)) * 0.01 * t * t for side in z[:-1]
    ]
    late, before = (torch.tensor(terms(LinearWithLateKL(), z, y, done=done)) for done in (0.75, 0.0))
    assert torch.allclose(late - before, torch.tensor([*theirs, 0.0]), atol=1e-6)


def test_distillation_by_hand_and_its_temperature():
    state = {}
    cross = -0.5 * (math.log(0.75) + math.log(0.25))  # H((1/2, 1/2), (3/4, 1/4))
    assert terms(Distilled(), state=state) == pytest.approx([5 * (0.5 * CE[0] + 0.5 * cross), 5 * 0.5 * CE[1]])
    assert state["temperature"] == 1.0  # the last exit is not surer than 1/2
    sure = LOGITS.flip(0)
    terms(Distilled(), sure, state=state)
    assert state["temperature"] == pytest.approx(1.05)


LOSSES = [Joint(), FrozenTrunk(), TrunkThenJoint(), Rising(), LinearWithLateKL(), Distilled()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda v: v.label)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_a_static_network_learns_from_the_labels_alone(loss, seed, n):
    logits = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n) % 3
    ce = cross_entropy(logits[0], y).item()
    factor = {LinearWithLateKL: 0.5, Distilled: 5.0}.get(type(loss), 1.0)
    assert sum(terms(loss, logits, y, done=0.9)) == pytest.approx(factor * ce, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda v: v.label)
def test_side_heads_learn_under_every_loss(loss):
    model = copy.deepcopy(trained())  # a trunk that is worth reading; its second head begins anew
    torch.manual_seed(0)
    for m in model.heads[1].modules():
        getattr(m, "reset_parameters", lambda: None)()

    def misfit():
        with torch.inference_mode():
            return cross_entropy(model.eval()(data().train.x)[1], data().train.y).item()

    before = misfit()
    trainer(loss=loss, epochs=8, lr=1e-2).fit(model)
    assert misfit() < before - 0.1
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_trunk_stays_as_it_was():
    model = trainer().fit(fresh())
    frozen = {**model.stages.state_dict(), **{f"last.{k}": v for k, v in model.heads[-1].state_dict().items()}}
    before = {k: v.clone() for k, v in frozen.items()}
    side = model.heads[0][2].weight.clone()
    trainer(loss=FrozenTrunk()).fit(model)
    assert all(torch.equal(before[k], v) for k, v in frozen.items())
    assert not torch.equal(side, model.heads[0][2].weight)


def test_osgd_in_a_recipe_learns_and_differs_from_the_joint_step():
    def fit(orthogonal):
        return trainer(orthogonal=orthogonal, epochs=3, lr=1e-2).fit(fresh())

    plain, vector, tensor = (fit(how) for how in ("no", "vector", "tensor"))
    with torch.inference_mode():
        assert (vector(data().test.x).argmax(-1) == data().test.y).float().mean(1).max() > 0.4
    weights = [m.stages[0][0].weight for m in (plain, vector, tensor)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_the_temperature_survives_an_interruption(tmp_path):
    from tests.test_train import Killed, kept, same

    def stop(what, done, total):
        if done == 16:
            raise Killed

    from dataclasses import replace

    want = kept(tmp_path / "a", loss=Distilled(sure=0.2)).fit(fresh())
    with pytest.raises(Killed):
        replace(kept(tmp_path / "b", loss=Distilled(sure=0.2)), progress=stop).fit(fresh())
    assert same(kept(tmp_path / "b", loss=Distilled(sure=0.2)).fit(fresh()), want)


def test_a_network_without_side_heads_is_trained_whole_under_a_frozen_trunk():
    before = fresh(Static(Tiny()))
    after = trainer(loss=FrozenTrunk()).fit(fresh(Static(Tiny())))
    assert not any(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))


def test_a_teachers_terms_are_the_exits_of_its_own_loss():
    logits, y = torch.randn(6, 5, 4), torch.zeros(5, dtype=torch.int64)
    whole = FromTeacher(of=Joint())(logits, y, 1.0, {})
    assert len(whole) == 3 and torch.equal(FromTeacher(of=FrozenTrunk())(logits, y, 1.0, {}), whole[:2])
    with pytest.raises(UsageError, match="give it to ``of``"):
        FromTeacher(label_smoothing=0.1)


@pytest.mark.parametrize(
    "loss", [Joint((1.0, 0.5, 0.3)), FrozenTrunk(), TrunkThenJoint(), Rising(), LinearWithLateKL()], ids=lambda v: v.label
)
@pytest.mark.parametrize("done", [0.0, 0.9])
def test_a_loss_stays_on_the_device_of_its_logits(loss, done):
    """On "meta" torch refuses to mix devices as it does on CUDA; a distillation's temperature is a number of the host's."""
    logits, y = torch.zeros(3, 2, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError):
        _ = logits.sum((1, 2)) * torch.ones(3)
    assert loss(logits, y, done, {}).device.type == "meta"
