"""EENet's networks against their published costs and hand counts."""

import pytest
import torch
from torch import nn

from anytime.backend import TorchNet
from anytime.cost import account
from anytime.errors import UsageError
from anytime.models.eenet import EENetDenseNet121, EENetResNet56

SHAPE = (3, 32, 32)


def cost_of(spec, n_classes):
    return account(TorchNet(spec.build(SHAPE, n_classes).eval(), {}, simulated=False), SHAPE)


@pytest.mark.parametrize(
    "spec, n_classes, macs, params",
    [
        # reference/anytime.md b.6; the ResNet is the authors' CIFAR-10 network, the DenseNet their CIFAR-100 one
        (EENetResNet56(), 10, "54.97 112.38 155.63", "0.939"),
        (EENetDenseNet121(), 100, "55.15 94.60 126.53 131.36", "1.208"),
    ],
    ids=lambda v: v.label if hasattr(v, "label") else "",
)
def test_published_figures_to_the_digits_given(spec, n_classes, macs, params):
    cost = cost_of(spec, n_classes)
    assert " ".join(f"{m / 1e6:.2f}" for m in cost.macs) == macs
    assert f"{cost.every('params')[-1] / 1e6:.3f}" == params


def test_exits_by_hand():
    """Three 3x3 convolutions, the first to a quarter of the channels, at the size of the map that they read."""
    resnet, dense = cost_of(EENetResNet56(), 10), cost_of(EENetDenseNet121(), 10)

    def convs(c, size):
        return 9 * (c // 4) * (c + 2 * (c // 4)) * size**2 + (c // 4) * 10

    assert resnet.head.macs.tolist() == [convs(64, 32), convs(128, 16), 256 * 10]
    # 24 + 6 x 12 = 96, halved; 48 + 12 x 12, halved; 96 + 24 x 12, halved; 192 + 16 x 12
    assert dense.head.macs.tolist() == [convs(48, 16), convs(96, 8), convs(192, 4), 384 * 10]


@pytest.mark.parametrize("spec, shapes", [
    (EENetResNet56(), [(64, 32, 32), (128, 16, 16), (256, 8, 8)]),
    (EENetDenseNet121(), [(48, 16, 16), (96, 8, 8), (192, 4, 4), (384, 4, 4)]),
], ids=lambda v: v.label if hasattr(v, "label") else "")  # fmt: skip
def test_exits_sit_behind_groups_and_transitions(spec, shapes):
    model, state = spec.build(SHAPE, 10).eval(), torch.zeros(1, *SHAPE)
    for stage, shape in zip(model.stages, shapes, strict=True):
        with torch.no_grad():
            state = stage(state)
        assert tuple(state.shape[1:]) == shape


def test_it_is_as_deep_as_its_bottlenecks():
    stages = EENetResNet56().build(SHAPE, 10).stages
    convs = [m for m in stages.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 1 + 27 * 3 + 3  # the stem, 27 bottlenecks, and a projection where each group begins


@pytest.mark.parametrize("spec", [EENetResNet56(), EENetDenseNet121()], ids=lambda s: s.label)
def test_they_take_cifar_only(spec):
    with pytest.raises(UsageError, match="takes inputs of 3x32x32, the data set gives 3x64x64"):
        spec.build((3, 64, 64), 10)
