"""BatchNorm behind no convolution and average pooling, in integers: the same answers as the chain, and no float kernel left."""

from functools import partial

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.dataset import Part
from anytime.engine import OnnxRuntimeGraph
from anytime.model import AnytimeModel, Segment
from anytime.models.sparse_resnet import SparseResNet
from anytime.quant.graph import Widths, prepared
from anytime.quant.onnx_graph import OnnxChain
from tests.test_onnx_graph import SHAPE, runners

IMAGES = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
eight = partial(st.lists, min_size=8, max_size=8)


def rounded(layer):
    """A chain whose first stage ends in ``layer``, which reads 8 channels that were rounded; its graph; what each makes, in steps."""
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer, nn.ReLU())
    chain = AnytimeModel([stage], [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))]).eval()
    net = prepared(chain, IMAGES, Widths(8, 8), "u8s8", "minmax", "minmax").freeze(round_bias=True)
    writer = OnnxChain(net, SHAPE, int_bias=True)
    proto = writer.write(Segment(0, 1, None))
    _, quant = writer.states[1]
    with torch.inference_mode():
        want = (net.stages[0](IMAGES) / quant.scale).round().numpy() + quant.zero_point.item()
    return proto, {engine: run(None, {"x": IMAGES.numpy()})[0] - want for engine, run in runners(proto)}


def operators(proto):
    return [n.op_type for n in proto.graph.node]


@settings(max_examples=25, deadline=None)
@given(
    eight(st.sampled_from([-3.0, -0.5, 0.0, 1e-6, 0.25, 1.0, 7.0])),
    eight(st.sampled_from([-2.0, -0.1, 0.0, 0.3, 5.0])),
    eight(st.sampled_from([1e-8, 0.01, 1.0, 90.0])),
)
def test_a_batchnorm_behind_no_convolution_is_computed_in_integers(gamma, beta, variance):
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        for tensor, values in ((norm.weight, gamma), (norm.bias, beta), (norm.running_var, variance)):
            tensor.copy_(torch.tensor(values))
        norm.running_mean.copy_(torch.linspace(-1, 1, 8))
    proto, off = rounded(norm)
    assert "BatchNormalization" not in operators(proto) and operators(proto).count("Conv") == 2
    for engine, steps in off.items():
        # The shift is rounded to 1/127 of a step of the input, which tips a value over now and then.
        assert (steps != 0).mean() < 0.02 and (np.abs(steps) > 1).mean() < 1e-3, engine


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, eps=0.1)], ids=["no gamma", "large eps"])
def test_of_a_batchnorm_all_that_it_has_counts(norm):
    _, off = rounded(norm)
    assert all((steps != 0).mean() < 0.02 for steps in off.values())


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d((3, 2), (1, 2), (1, 0))], ids=["2", "padded", "uneven"]
)
def test_an_average_is_a_convolution_by_channel(pool):
    proto, off = rounded(pool)
    assert "AveragePool" not in operators(proto)
    assert all((steps != 0).mean() < 1e-3 for steps in off.values())


def test_an_average_that_leaves_out_its_padding_is_none():
    proto, off = rounded(nn.AvgPool2d(3, 2, 1, count_include_pad=False))
    assert operators(proto).count("AveragePool") == 1
    assert all((steps != 0).mean() < 1e-3 for steps in off.values())


def test_a_preactivated_network_runs_without_a_float_kernel():
    model = SparseResNet(depth=4, widths=(8, 16), exits=2).build(SHAPE, 4).eval()
    part = Part(IMAGES, torch.zeros(len(IMAGES), dtype=torch.int64), "calib", "d")
    net = OnnxRuntime(of=PTQ()).compress(model, part, None)
    state, norms = net.start(part.x[:1].numpy()), set()
    for segment in net.plan([0, 1]):
        out, kinds = OnnxRuntimeGraph(net.graph(segment), 1).profile(state)
        state = out[1:]
        written = {n.name for n in onnx.ModelProto.FromString(net.graph(segment)).graph.node}
        mine = {n for n, m in net.twin.named_modules() if isinstance(m, nn.BatchNorm2d | nn.AvgPool2d)} & written
        assert mine and all(kinds.get(name) == "int8" for name in mine)
        norms |= mine
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d | nn.AvgPool2d) for m in net.twin.modules())
