"""The residual networks: published figures, published weights, and 8 bits in ONNX Runtime."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anytime.backend import TorchNet
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.cost import account
from anytime.dataset import Part, digest, normalise
from anytime.datasets.cifar import CIFAR10
from anytime.errors import AnytimeError, UsageError
from anytime.layers import BasicBlock, ZeroPadShortcut
from anytime.models.branchynet import BResNet110
from anytime.models.resnet import CIFAR10_TRAIN, ResNet20, ResNet32, ResNet44, ResNet56, ResNet110
from anytime.models.static import Static

SHAPE = (3, 32, 32)


def cost_of(model):
    return account(TorchNet(model, {}, simulated=False), SHAPE)


def settled(spec):
    """Built, with BatchNorm statistics of some batches, so that activations are of a trained network's size."""
    torch.manual_seed(0)
    model = spec.build(SHAPE, 10).train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(16, *SHAPE))
    return model.eval()


def eight_bits(model):
    part = Part(torch.randn(16, *SHAPE), torch.zeros(16, dtype=torch.int64), "calib", "d")
    return OnnxRuntime(of=PTQ()).compress(model, part, None), part.x.numpy()


@pytest.mark.parametrize(
    "spec, macs, params",
    [  # parameters as He et al. table 6; MACs: 125.49 as reference/anytime.md b.5, the others by the rule below
        (ResNet20(), "40.55", "0.27"),
        (ResNet32(), "68.86", "0.46"),
        (ResNet44(), "97.17", "0.66"),
        (ResNet56(), "125.49", "0.85"),
        (ResNet110(), "252.89", "1.7"),
    ],
    ids=lambda v: getattr(v, "label", v),
)
def test_published_figures(spec, macs, params):
    model = spec.build(SHAPE, 10)
    cost = cost_of(model)
    assert f"{cost.macs[0] / 1e6:.2f}" == macs
    assert f"{cost.every('params')[0] / 1e6:.{len(params) - 2}f}" == params
    n = spec.n
    assert [len(getattr(model.stages[0], f"layer{i}")) for i in (1, 2, 3)] == [n] * 3
    # Every 3x3 convolution of a group costs 9 c^2 hw; the first of groups 2 and 3 reads half the channels.
    group = 9 * 16 * 16 * 32 * 32
    assert cost.macs[0] == 27 * 16 * 32 * 32 + 2 * n * group + 2 * (2 * n * group - group // 2) + 640


def test_b_resnet110_to_the_digits_published():
    model = BResNet110().build(SHAPE, 10)
    cost = cost_of(model)
    assert [f"{m / 1e6:.2f}" for m in cost.macs] == ["48.60", "127.54", "284.91"]
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == "2.227"
    assert f"{cost_of(Static(BResNet110()).build(SHAPE, 10)).macs[0] / 1e6:.1f}" == "232.4"  # reference/anytime.md b.3
    state, shapes = torch.zeros(1, *SHAPE), []
    for stage in model.stages:
        state = stage(state)
        shapes.append(tuple(state.shape[1:]))
    assert shapes == [(16, 30, 30), (16, 30, 30), (64, 8, 8)]
    assert {(m.front, m.back) for m in model.modules() if isinstance(m, ZeroPadShortcut)} == {(16, 0), (32, 0)}


def test_the_shortcut_takes_every_second_pixel_and_adds_zero_channels():
    x = torch.arange(2 * 3 * 5 * 5.0).reshape(2, 3, 5, 5) + 1
    out = ZeroPadShortcut(2, front=4, back=1)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 4:7], x[:, :, [0, 2, 4]][..., [0, 2, 4]])
    assert not out[:, :4].any() and not out[:, 7:].any()
    assert torch.equal(out[:, 4:7], nn.functional.avg_pool2d(x, 1, 2))  # BranchyNet's code pools 1x1 windows


def test_a_block_is_its_formula():
    block = BasicBlock(4, 4, 1, nn.Identity()).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), torch.relu(x))  # what is left of it when the convolutions say nothing


# Weights -------------------------------------------------------------------------------------------------------


def published(model, prefix="module."):
    """A state dict in akamaster's layout."""
    state = {**model.stages[0].state_dict(), **model.heads[0].state_dict()}
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def saved(tmp_path):
    model = ResNet20().build(SHAPE, 10)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
    path = tmp_path / "weights.th"
    torch.save({"state_dict": published(model), "best_prec1": 91.7}, path)
    return model.eval(), path


def test_weights_load_and_are_said_to_have_seen_the_training_set(saved):
    model, path = saved
    assert "module.layer2.0.conv1.weight" in published(model) and "module.linear.bias" in published(model)
    loaded = ResNet20(str(path)).build(SHAPE, 10).eval()
    x = torch.randn(2, *SHAPE)
    assert torch.equal(loaded(x), model(x)) and loaded.trained_on == {CIFAR10_TRAIN}
    bare = {k: t for k, t in published(model, "").items() if not k.endswith("num_batches_tracked")}  # as old torch saved it
    torch.save(bare, path)
    assert torch.equal(ResNet20(str(path)).build(SHAPE, 10).eval()(x), model(x))


def test_weights_of_another_network_are_named(saved):
    model, path = saved
    with pytest.raises(UsageError, match=r"does not fit ResNet-32.*has no layer1.3.conv1.weight, .* and \d+ more; give"):
        ResNet32(str(path)).build(SHAPE, 10)
    with pytest.raises(UsageError, match=r"another shape of linear.weight, linear.bias; give"):
        ResNet20(str(path)).build(SHAPE, 100)
    torch.save({**published(model), "module.extra": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=r"has, in excess, extra; give"):
        ResNet20(str(path)).build(SHAPE, 10)


def test_unreadable_weights_are_said(tmp_path):
    path = tmp_path / "weights.th"
    with pytest.raises(AnytimeError, match="there is no file") as told:
        ResNet20(str(path)).build(SHAPE, 10)
    assert not isinstance(told.value, UsageError)  # a run goes on without the network, and the row says why
    path.write_bytes(b"no such thing")
    with pytest.raises(UsageError, match="cannot be read as torch weights"):
        ResNet20(str(path)).build(SHAPE, 10)
    for other in ([1, 2], {"state_dict": 3}, {"conv1.weight": "a"}):
        torch.save(other, path)
        with pytest.raises(UsageError, match="holds no state dict"):
            ResNet20(str(path)).build(SHAPE, 10)


def test_the_published_weights_score_what_was_published():
    """9,173 of the 10,000 test images (error 8.27 %), counted once by hand; here the first 1,000."""
    shared = Path(os.environ.get("ANYTIME_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "data/checkpoints/resnet20_cifar10/resnet20-12fca82f.th"
    if "ANYTIME_DATA" not in os.environ or not path.is_file():
        pytest.skip(f"needs CIFAR-10 in ANYTIME_DATA and the checkpoint in {path} (its root: ANYTIME_SHARED)")
    spec = CIFAR10(statistics="imagenet")
    raw = spec.read()
    assert digest(raw.x_train, raw.y_train) == CIFAR10_TRAIN
    model = ResNet20(str(path)).build(SHAPE, 10).eval()
    with torch.inference_mode():
        said = model(normalise(raw.x_test[:1000], spec.preprocessing))[0].argmax(-1).numpy()
    assert (said == raw.y_test[:1000]).sum() == 915


# Integers ------------------------------------------------------------------------------------------------------


def test_every_layer_runs_in_eight_bits():
    model = settled(ResNet20())
    net, x = eight_bits(model)
    executed = net.executed(x[:1])
    assert len(executed) == 20 and set(executed.values()) == {"int8"}
    got, want = net.predict(x), TorchNet(net.twin, {}, simulated=True).predict(x)
    with torch.inference_mode():
        plain = model(torch.from_numpy(x)).numpy()
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()  # a step of the grid may fall to the other side
    assert np.abs(got - plain).max() <= 0.1 * np.abs(plain).max()
