"""QKeras as a backend: its gradients are torch's, its twin answers as it does, its trainings go on where they stopped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anytime.backend import TorchNet
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.qkeras import QKeras, QKerasChain, _begin_epoch, _InKeras, fixed_point
from anytime.errors import Unsupported, UsageError
from anytime.keras_chain import KerasChain
from anytime.keras_layers import channels_last
from anytime.losses import Joint
from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant, QConv2d, QLinear
from anytime.quant.ranges import Histogram
from anytime.quant.trace import traced
from tests.worlds import data, trainer


@pytest.fixture(autouse=True)
def installed():
    if reason := QKeras().why_not():
        pytest.skip(reason)


def small(drop=0.0, groups=4):
    torch.manual_seed(0)
    return AnytimeModel(
        stages=[
            nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU()
            ),
        ],
        heads=[
            nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop), nn.Linear(6, 4)),
        ],
    ).eval()  # fmt: skip


def few(n=128):
    """A trainer of few images, and as few to calibrate on."""
    part = data().train
    return replace(trainer(), train=replace(part, x=part.x[:n], y=part.y[:n])), replace(part, x=part.x[:32], y=part.y[:32])


class Watched(QKerasChain):
    """Remembers what Keras says of the test images before its weights are taken home."""

    said = None

    def settle(self, net):
        x = channels_last(data().test.x[:40]).contiguous().numpy()
        Watched.said = self.whole()(x, training=False).numpy()
        Watched.names = {type(layer).__name__ for layer in self.layers.values()}
        super().settle(net)


@pytest.mark.parametrize(
    "backend, layers",
    [
        (QKeras(4, 3, epochs=1, lr_scale=1.0, fold_bn=False), {"QConv2DBatchnorm", "QDepthwiseConv2DBatchnorm", "QDense"}),
        (QKeras(2, 4, epochs=1, lr_scale=1.0), {"QConv2D", "QDepthwiseConv2D", "QActivation"}),
        (QKeras(1, 4, epochs=1, lr_scale=1.0, alpha="auto_po2"), {"QConv2D"}),
    ],
    ids=lambda v: v.label if isinstance(v, QKeras) else "",
)
def test_the_twin_answers_as_keras_does(backend, layers, monkeypatch):
    monkeypatch.setattr("anytime.backends.qkeras.QKerasChain", Watched)
    train, calib = few()
    model = small()
    net = backend.compress(model, calib, train)
    assert layers <= Watched.names
    assert np.abs(net.predict(data().test.x[:40].numpy()) - Watched.said).max() < 1e-4
    assert net.simulated and "biases are float" in net.facts["simulated"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.twin.modules())
    assert not torch.equal(net.twin.stages[1].get_submodule("3").weight, model.stages[1][3].weight)
    assert net.bits["stages.0.0"] == (8, 8) and net.bits["stages.1.3"] == (backend.weight_bits, backend.activation_bits)
    weight = net.twin.stages[1].get_submodule("3").weight  # [6, 4, 1, 1]: so many values of a channel that differ in size
    sizes = [set(np.round(channel.abs().flatten().numpy(), 6)) for channel in weight]
    most = {1: 1, 2: 2}.get(backend.weight_bits, 8)
    assert max(map(len, sizes)) <= most and (backend.weight_bits > 1 or all(0 not in s for s in sizes))
    for q in (m for m in net.twin.modules() if isinstance(m, FakeQuant)):
        assert float(torch.log2(q.scale)) % 1 == 0 and int(q.zero_point) == 0
    if backend.alpha == "auto_po2":
        scales = torch.cat([m.weight_scale for m in net.twin.modules() if isinstance(m, QConv2d | QLinear)])
        assert torch.equal(scales.log2(), scales.log2().round())
    assert "stages.1" in net.facts["qtools_energy_pj"] and "x" in net.facts["qtools_operations"]
    assert calib.digest in net.twin.trained_on or train.train.digest in net.twin.trained_on


def test_gradients_are_those_of_torch():
    chain = traced(small(), fold_bn=False).train()
    x, y = data().train.x[:16], data().train.y[:16]
    student = _InKeras(chain, KerasChain(chain, (3, 16, 16)), 1.0)
    _begin_epoch(student, 0.0)
    found = []
    for net in (student, chain):
        chain.zero_grad()
        logits = net(x)
        Joint()(logits, y, 0.0, {}).sum().backward()
        found.append((logits.detach(), {n: p.grad.clone() for n, p in chain.named_parameters()}))
    (theirs, their_grads), (ours, our_grads) = found
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert set(their_grads) == set(our_grads) and len(our_grads) == 13
    for name, grad in our_grads.items():
        assert torch.allclose(their_grads[name], grad, atol=1e-4), name
    # Both have seen the batch: the statistics that Keras moved, torch has moved once more.
    assert not torch.equal(chain.stages[0].get_submodule("1").running_mean, torch.zeros(4))


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path):
    backend = QKeras(4, 4, epochs=2, lr_scale=1.0, fold_bn=False)
    train, calib = few()
    whole = backend.compress(small(0.5), calib, replace(train, folder=tmp_path / "whole"))

    def stop(what, done, total):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.compress(small(0.5), calib, replace(train, folder=tmp_path / "parts", progress=stop))
    assert len(list((tmp_path / "parts").glob("*/checkpoint.pt"))) == 1
    parts = backend.compress(small(0.5), calib, replace(train, folder=tmp_path / "parts"))
    x = data().test.x[:20].numpy()
    assert np.array_equal(parts.predict(x), whole.predict(x))
    again = backend.compress(small(0.5), calib, replace(train, folder=tmp_path / "parts", progress=stop))  # trains nothing
    assert np.array_equal(again.predict(x), whole.predict(x))


def test_its_eight_bits_run_in_onnx_runtime():
    train, calib = few()
    backend, model = QKeras(8, 8, epochs=0), small()
    with torch.no_grad():
        model.stages[1][3].weight[2] = 0  # by whose largest weight QKeras would divide
    net, engine = (b.compress(model, calib, train) for b in (backend, OnnxRuntime(of=backend)))
    x = data().test.x[:60].numpy()
    assert np.abs(engine.predict(x) - net.predict(x)).max() < 0.05 * np.abs(net.predict(x)).max()
    assert not engine.simulated
    float_net = TorchNet(model, {}, simulated=False).predict(x)
    assert not net.twin.stages[1].get_submodule("3").weight[2].any()
    assert np.abs(net.predict(x) - float_net).max() < 0.1 * np.abs(float_net).max()


def test_groups_are_named_and_can_be_kept_in_float():
    train, calib = few()
    with pytest.raises(Unsupported, match=r"stages\.1\.0: .*2 groups.*keep_float"):
        QKeras(epochs=0).compress(small(groups=2), calib, train)
    with pytest.raises(UsageError, match="did you mean"):
        QKeras(epochs=0, keep_float=("stages.1.00",)).compress(small(groups=2), calib, train)
    net = QKeras(epochs=0, keep_float=("stages.1.0",)).compress(small(groups=2), calib, train)
    assert "stages.1.0" not in net.bits and net.facts["exclusions"] == "stages.1.0"
    with pytest.raises(UsageError, match="freeze_bn=2"):
        QKeras(freeze_bn=2)


@settings(max_examples=30)
@given(st.integers(2, 8), st.floats(-6, 6), st.booleans(), st.integers(0, 10_000))
def test_the_power_of_two_has_the_least_error(bits, log_size, negative, seed):
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(seed)) * 2.0**log_size
    x = x if negative else x.abs()
    seen = Histogram()
    seen.see_extremes(x)
    seen.see_values(x)
    q = FakeQuant(bits, signed=False)
    fixed_point(q, seen, signed=negative)
    assert (q.qmin < 0) == negative and q.mode == "on"

    def error(scale):
        return float(((x / scale).round().clamp(q.qmin, q.qmax) * scale - x).square().sum())

    best = min(error(2.0**e) for e in range(negative - bits, 10))
    assert error(float(q.scale)) <= 1.05 * best + 1e-12  # a histogram knows its values up to half a bin


def test_a_tensor_of_zeros_has_a_grid():
    seen = Histogram()
    seen.see_extremes(torch.zeros(1, 4))
    q = FakeQuant(4, signed=False)
    fixed_point(q, seen, signed=False)
    assert q.calibrated and torch.equal(q(torch.zeros(3)), torch.zeros(3))


def test_osgd_is_refused_with_a_sentence():
    train, calib = few()
    with pytest.raises(Unsupported, match="one gradient for all exits together.*recipe.orthogonal='no'"):
        QKeras(epochs=1).compress(small(), calib, replace(train, recipe=replace(train.recipe, orthogonal="vector")))
