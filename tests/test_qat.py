"""QAT as a backend: every method trains, is frozen exactly, and is found again by its name."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from anytime.backend import TorchNet, fake_quant_net
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT, _Taught
from anytime.errors import UsageError
from anytime.losses import FromTeacher, Joint
from anytime.quant.graph import prepared
from anytime.spec import key
from tests.worlds import data, trained, trainer


def accuracy(net):
    test = data().test
    return (net.predict(test.x.numpy()).argmax(-1) == test.y.numpy()).mean(1)


@pytest.mark.parametrize("learns", ["ste", "lsq", "pact", "dorefa"])
@pytest.mark.parametrize("fold_bn", [True, False])
def test_training_repairs_what_few_bits_break(learns, fold_bn):
    few = {"weight_bits": 2, "activation_bits": 2, "observer": "minmax", "weight_observer": "minmax"}
    rounded = prepared(trained(), data().calib.x, PTQ(**few).widths, "u8s8", "minmax", "minmax")
    before = accuracy(fake_quant_net(rounded, "u8s8"))
    qat = QAT(**few, epochs=10, lr_scale=1.0, learns=learns, fold_bn=fold_bn)
    net = qat.compress(trained(), data().calib, trainer())
    assert accuracy(net)[-1] > before[-1] + 0.05
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.twin.modules())
    assert net.bits["stages.2.0"] == (2, 2) and net.simulated


def test_eight_bits_learned_run_in_onnx_runtime():
    for learns in ("lsq", "pact"):
        net = OnnxRuntime(of=QAT(epochs=1, learns=learns, fold_bn=False)).compress(trained(), data().calib, trainer())
        assert set(net.executed(data().test.x[:8].numpy()).values()) == {"int8"}
        assert (accuracy(net) > accuracy(TorchNet(trained(), {}, simulated=False)) - 0.1).all()


def test_statistics_freeze_when_they_should():
    seen = []

    class Spy(QAT):
        def _freeze(self, model, done):
            super()._freeze(model, done)
            bns = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            seen.append((done, {m.training for m in bns}))

    Spy(epochs=4, fold_bn=False, freeze_bn=0.5).compress(trained(), data().calib, trainer())
    assert seen == [(0.0, {True}), (0.25, {True}), (0.5, {False}), (0.75, {False})]


def test_a_teacher_is_imitated_and_not_trained(tmp_path):
    model = trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    few = {"weight_bits": 2, "activation_bits": 2, "epochs": 3, "lr_scale": 1.0, "learns": "lsq"}
    x = data().test.x.numpy()
    with torch.inference_mode():
        want = log_softmax(model(torch.from_numpy(x)), -1)

    def distance(share):
        net = QAT(**few, teach=share).compress(model, data().calib, trainer())
        return float(kl_div(log_softmax(torch.from_numpy(net.predict(x)), -1), want, reduction="batchmean", log_target=True))

    assert distance(1.0) < distance(0.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert set(_Taught(model, model).state_dict()) == set(model.state_dict())


def test_a_student_taught_under_osgd_learns_at_all_its_exits():
    model = trained()
    student = _Taught(model, model).train()
    x = data().test.x[:4]
    assert len(student.exits(x)) == 2 * model.n_exits and len(student.eval().exits(x)) == model.n_exits
    taught = QAT(epochs=1, teach=0.5).compress(model, data().calib, trainer(orthogonal="vector")).twin
    before = PTQ().compress(model, data().calib, None).twin.state_dict()
    moved = {name for name, now in taught.state_dict().items() if name.endswith(".weight") and not torch.equal(now, before[name])}
    assert all(any(name.startswith(f"heads.{k}.") for name in moved) for k in range(model.n_exits))


def test_the_loss_from_a_teacher_by_hand():
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    y = torch.tensor([0, 1, 2, 0, 1])
    got = FromTeacher(of=Joint(), share=0.25, temperature=2.0)(torch.cat([student, teacher]), y, 0.0, {})
    p = (teacher / 2).softmax(-1)
    kl = (p * (p.log() - (student / 2).softmax(-1).log())).sum(-1).mean(-1)
    ce = torch.stack([cross_entropy(z, y) for z in student])
    assert torch.allclose(got, 0.75 * ce + 0.25 * 4 * kl, atol=1e-5)


def test_it_is_trained_once(tmp_path):
    from dataclasses import replace

    kept = replace(trainer(), folder=tmp_path, key="k")
    qat = QAT(4, 4, epochs=1, learns="lsq", fold_bn=False, teach=0.5)
    first = qat.compress(trained(), data().calib, kept).predict(data().test.x.numpy())
    assert (tmp_path / f"k-{key(qat)}-u8s8" / "weights.safetensors").exists()
    broken = replace(kept, train=replace(kept.train, x=kept.train.x * float("nan")))  # training again would say Diverged
    again = qat.compress(trained(), data().calib, broken).predict(data().test.x.numpy())
    assert np.array_equal(first, again)


@pytest.mark.parametrize("field, value", [("teach", 2.0), ("freeze_bn", -0.1)])
def test_shares_are_shares(field, value):
    with pytest.raises(UsageError, match=f"{field}={value} is a share"):
        QAT(**{field: value})


def test_columns():
    assert QAT().column == "INT8 QAT" and QAT(4, 8, learns="lsq").column == "W4A8 QAT (LSQ)" and PTQ(4, 4).column == "INT4 PTQ"
    assert QAT(teach=0.5).column == "INT8 QAT (taught)" and QAT(2, 2, learns="lsq", teach=0.5).column == "INT2 QAT (LSQ, taught)"
