"""Shallow-Deep Networks: published figures, the places of their classifiers, mixed pooling, and 8 bits."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from anytime.backend import TorchNet
from anytime.errors import UsageError
from anytime.layers import MixedPool2d
from anytime.models.sdn import SDN
from anytime.models.static import Static
from anytime.quant.graph import traced
from tests.test_resnet import SHAPE, cost_of, eight_bits, settled

FIGURES = [  # reference/anytime.md b.5; ResNet-20, 32 and 44 counted here, as the authors have none
    ("resnet20", "40.81", "0.308", "12.6 35.8 44.8 56.3 76.9 88.4"),
    ("resnet32", "69.12", "0.503", "14.3 27.9 46.9 60.6 72.7 93.2"),
    ("resnet44", "97.44", "0.697", "15.0 29.5 43.0 62.3 75.8 90.3"),
    ("resnet56", "125.75", "0.892", "15.4 30.4 44.5 59.6 73.7 88.7"),
    ("vgg16_bn", "313.7", "15.5", "12.6 30.6 48.7 60.7 78.8 90.8"),
    ("mobilenet", "46.35", "3.48", "21.6 35.6 49.5 67.9 90.9"),
    ("wrn32_4", "1185", "7.5", "16.8 29.6 45.7 58.4 74.5 87.3"),
]


def said(number, like):
    return f"{number:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("trunk, macs, params, shares", FIGURES, ids=[f[0] for f in FIGURES])
def test_published_figures(trunk, macs, params, shares):
    model = SDN(trunk).build(SHAPE, 10)
    cost, alone = cost_of(model), cost_of(Static(SDN(trunk)).build(SHAPE, 10)).macs[0]
    assert said(alone / 1e6, macs) == macs
    assert said(sum(p.numel() for p in model.parameters()) / 1e6, params) == params
    percent = 100 * cost.stage.macs.cumsum()[:-1] / alone
    assert [said(p, "1.0") for p in percent] == shares.split()
    assert alone == cost.stage.macs.sum() + cost.head.macs[-1]


def test_parameters_of_resnet56_by_hand():
    model = SDN().build(SHAPE, 10)
    heads = 2 * (16 * 16 * 10 + 10) + 2 * (32 * 16 * 10 + 10) + 2 * (64 * 16 * 10 + 10) + 6
    assert sum(p.numel() for h in model.heads[:-1] for p in h.parameters()) == heads
    trunk = Static(SDN()).build(SHAPE, 10)
    assert said(sum(p.numel() for p in trunk.parameters()) / 1e6, "0.856") == "0.856"


@pytest.mark.parametrize("trunk, n", [("resnet20", 3), ("resnet32", 5), ("resnet44", 7), ("resnet56", 9)])
def test_on_resnets_the_classifiers_sit_at_the_nearest_blocks(trunk, n):
    model = SDN(trunk).build(SHAPE, 10)
    macs: Counter[str] = Counter()
    for layer in cost_of(model).layers:
        if not layer.head:
            macs[".".join(layer.layer.split(".")[:3])] += layer.macs  # "stages.0.2": a block
    shares = np.cumsum(list(macs.values())) / (macs.total() + 640)
    nearest = [int(np.abs(shares - target).argmin()) for target in (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)]
    ends = np.cumsum([len(stage) for stage in model.stages])[:-1] - 1
    assert nearest == ends.tolist() and len(shares) == 3 * n
    group = 9 * 16 * 16 * 32 * 32  # a 3x3 convolution of any group; the first of the last two reads half the channels
    projections = 16 * 32 * 16**2 + 32 * 64 * 8**2
    assert macs.total() == 27 * 16 * 32 * 32 + 6 * n * group - group + projections


def test_mixed_pooling_is_its_formula():
    pool = MixedPool2d(4)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    blocks = x.reshape(2, 3, 2, 4, 2, 4).transpose(3, 4).flatten(4)
    for alpha in (0.0, 0.3, 1.0, 1.7):
        nn.init.constant_(pool.alpha, alpha)
        assert torch.allclose(pool(x), alpha * blocks.amax(-1) + (1 - alpha) * blocks.mean(-1), atol=1e-6)
    pool(x).sum().backward()
    assert torch.allclose(pool.alpha.grad, (blocks.amax(-1) - blocks.mean(-1)).sum(), atol=1e-4)


def test_static_is_the_trunk_with_its_last_head():
    torch.manual_seed(1)
    whole = SDN("resnet20").build(SHAPE, 10).eval()
    torch.manual_seed(1)
    trunk = Static(SDN("resnet20")).build(SHAPE, 10).eval()
    x = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        assert torch.equal(whole(x)[-1], trunk(x)[0])


def test_an_unknown_trunk_is_named():
    with pytest.raises(UsageError, match="SDN: trunk='resnet65' must be one of 'resnet20', .* did you mean 'resnet56'"):
        SDN("resnet65").build(SHAPE, 10)


def test_batch_norm_is_folded_through_dropout():
    """WRN has dropout between a convolution and its BatchNorm: in eval mode the identity."""
    torch.manual_seed(0)
    model = SDN("wrn32_4").build(SHAPE, 10).eval()
    graph = traced(model)
    left = [name for name, m in graph.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == 16 and not [name for name in left if name.endswith("inner.4")]  # 15 before a block, one at the end


def test_every_layer_runs_in_eight_bits():
    """Convolutions and linear layers; mixed pooling takes its average and its sum in FP32."""
    net, x = eight_bits(settled(SDN("resnet20")))
    executed = net.executed(x[:1])
    assert len(executed) == 19 + 2 + 7 and set(executed.values()) == {"int8"}
    got, want = net.predict(x), TorchNet(net.twin, {}, simulated=True).predict(x)
    assert (np.abs(got - want).max((1, 2)) <= 0.05 * np.abs(want).max((1, 2))).all()
