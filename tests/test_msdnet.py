"""MSDNet against its published costs, and its scales through ONNX."""

import dataclasses

import numpy as np
import pytest
import torch

from anytime.backend import TorchNet
from anytime.cost import account
from anytime.errors import UsageError
from anytime.model import Segment
from anytime.models.msdnet import CIFAR10_ANYTIME, CIFAR10_BATCH, CIFAR100_ANYTIME, CIFAR100_BATCH, MSDNet
from anytime.quant.graph import Widths, prepared, traced
from anytime.quant.onnx_graph import OnnxChain
from tests.test_onnx_graph import session_of

SHAPE = (3, 32, 32)


def cost_of(spec, n_classes):
    return account(TorchNet(spec.build(SHAPE, n_classes).eval(), {}, simulated=False), SHAPE)


@pytest.mark.parametrize(
    "spec, n_classes, macs, params",
    [
        # reference/anytime.md b.4: every earlier head is run
        (CIFAR10_ANYTIME, 10, "14.96 25.24 37.43 51.62 61.69 73.52 87.13 99.39 109.44 120.97", "4.84"),
        (CIFAR100_ANYTIME, 100, "14.97 25.26 36.78 45.97 56.93 66.53 75.49", "3.07"),
        (CIFAR10_BATCH, 10, "6.78 14.19 27.01 48.01 75.84 108.12 136.48", "3.89"),
        (CIFAR100_BATCH, 100, "6.79 14.21 27.28 41.37 58.09", "2.08"),
    ],
    ids=["CIFAR-10 anytime", "CIFAR-100 anytime", "CIFAR-10 batch", "CIFAR-100 batch"],
)
def test_published_figures_to_the_digits_given(spec, n_classes, macs, params):
    cost = cost_of(spec, n_classes)
    assert " ".join(f"{m / 1e6:.2f}" for m in cost.macs) == macs
    assert f"{cost.every('params')[-1] / 1e6:.2f}" == params


def test_heads_are_a_third_of_the_anytime_network():
    assert f"{cost_of(CIFAR10_ANYTIME, 10).path((9,), 9) / 1e6:.2f}" == "78.94"


def test_the_state_is_one_map_per_scale_and_scales_are_dropped_from_the_finest():
    """22 layers in runs of 8: the 9th and the 17th drop a scale and, with 6 maps a layer, halve 16 + 9 x 6 and 35 + 8 x 6."""
    model, state, seen = MSDNet().build(SHAPE, 10).eval(), torch.zeros(1, *SHAPE), []
    with torch.no_grad():
        for stage in model.stages:
            state = stage(state)
            seen.append([tuple(s.shape[1:]) for s in state])
    assert seen[0] == [(40, 32, 32), (80, 16, 16), (160, 8, 8)]
    assert seen[2] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert seen[3] == [(82, 16, 16), (164, 8, 8)]  # 35 + 6, at factors 2 and 4
    assert seen[7] == [(188, 8, 8)]  # (35 + 8 x 6) // 2 + 6, at factor 4
    assert [len(s) for s in seen] == [3, 3, 3, 2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("bits", [0, 8], ids=["float", "int8"])
def test_link_by_link_its_graphs_say_what_the_chain_says(bits):
    torch.manual_seed(0)
    model, x = CIFAR100_BATCH.build(SHAPE, 10), torch.randn(8, *SHAPE)
    with torch.no_grad():
        model(x)  # BatchNorm has seen something
    chain = prepared(model.eval(), x, Widths(8, 8), "u8s8", "minmax", "minmax").freeze(round_bias=True) if bits else traced(model)
    writer, state = OnnxChain(chain, SHAPE, True), [x.numpy()]
    with torch.inference_mode():
        want = chain(x).numpy()
    for k in range(chain.n_exits):
        proto = writer.write(Segment(k, k + 1, k))
        session = session_of(proto)
        logits, *state = session.run(None, dict(zip([i.name for i in proto.graph.input], state, strict=True)))
        assert np.abs(logits - want[k]).max() <= (0.05 if bits else 1e-4) * np.abs(want[k]).max()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"blocks": 1}, "at least 2 blocks"),
        ({"step": 0}, "1 or more"),
        ({"narrow": (1, 2)}, "one number of 1 or more per scale"),
        ({"factors": (1, 2), "narrow": (1, 2)}, "of 3 scales"),
        ({"reduction": 0.01}, "reduction=0.01 leaves none of 70 maps"),
        ({"growth": 5}, "growth must be even"),
        ({"reduction": 0.0}, "reduction over 0"),
    ],
)
def test_what_is_no_msdnet_is_said(change, said):
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(MSDNet(), **change).build(SHAPE, 10)


def test_it_takes_cifar_only():
    with pytest.raises(UsageError, match="MSDNet takes inputs of 3x32x32, the data set gives 1x28x28"):
        MSDNet().build((1, 28, 28), 10)
