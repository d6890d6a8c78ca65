"""Costs against hand counts, published figures and two other counters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anytime.backend import Bits, TorchNet
from anytime.cost import In, account
from anytime.errors import AnytimeError
from anytime.model import AnytimeModel
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.static import Static
from anytime.quant.graph import Widths, quantized
from tests.worlds import Restarting, Tiny


def net(model, bits=()):
    return TorchNet(model, dict(bits), simulated=False)


@pytest.mark.parametrize(
    "spec, shape, macs, params",
    [
        # BranchyNet's networks, counted from the layer lists of reference/anytime.md c.3
        (BLeNet(), (1, 28, 28), ["0.220", "1.248"], 74_694),
        (BAlexNet(), (3, 32, 32), ["17.34", "21.32", "30.47"], 605_886),
        (Static(BLeNet()), (1, 28, 28), ["1.140"], None),
        (Static(BAlexNet()), (3, 32, 32), ["28.25"], None),
    ],
    ids=lambda v: v.label if hasattr(v, "label") else "",
)
def test_published_figures_to_the_digits_given(spec, shape, macs, params):
    model = spec.build(shape, 10)
    cost = account(net(model), shape)
    for got, want in zip(cost.macs, macs, strict=True):
        assert f"{got / 1e6:.{len(want.partition('.')[2])}f}" == want
    if params:
        assert cost.every("params")[-1] == sum(p.numel() for p in model.parameters()) == params


def test_b_lenet_by_hand():
    cost = account(net(BLeNet().build((1, 28, 28), 10)), (1, 28, 28))
    assert cost.stage.macs.tolist() == [30 * 30 * 5 * 25, 17 * 17 * 10 * 125 + 11 * 11 * 20 * 250]
    assert cost.head.macs.tolist() == [15 * 15 * 10 * 45 + 6400, 720 * 84 + 840]
    assert cost.path((1,), 1) == 1_140_070  # without the first head: the static LeNet
    assert cost.path((0, 1), 0) == cost.path((0,), 0) == 220_150


@pytest.mark.parametrize(
    "spec, shape", [(BLeNet(), (1, 28, 28)), (BAlexNet(), (3, 32, 32)), (Tiny(), (3, 16, 16))], ids=lambda v: str(v)[:6]
)
def test_torch_and_ptflops_count_the_same(spec, shape):
    from anytime.scoring import ptflops_macs

    model = spec.build(shape, 10).eval()
    ours = account(net(model), shape).macs[-1]
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    assert ours == counter.get_total_flops() / 2
    theirs = ptflops_macs(model, shape)
    # ptflops adds biases, and its module counter BatchNorm, pooling and ReLU, which weigh more the smaller the network.
    assert theirs["aten"] == pytest.approx(ours, rel=0.06)
    assert ours <= theirs["pytorch"] <= 1.2 * ours


def test_bops_are_macs_times_bits():
    model = Tiny().build((3, 16, 16), 4)
    bits = {"stages.0.0": Bits(4, 8), "heads.2.3": Bits(2, 2)}
    cost = account(net(model, bits), (3, 16, 16))
    by_layer = {layer.layer: layer for layer in cost.layers}
    assert by_layer["stages.0.0"].bops == by_layer["stages.0.0"].macs * 32
    assert by_layer["heads.2.3"].bops == by_layer["heads.2.3"].macs * 4
    assert by_layer["stages.2.0"].bops == by_layer["stages.2.0"].macs * 1024
    assert sum(layer.macs for layer in cost.layers) == cost.stage.macs.sum() + cost.head.macs.sum()
    assert In(cost, "bops").path((2,), 2) == cost.path((2,), 2, "bops") < cost.every("bops")[2]


def test_packed_bytes_are_at_the_true_width():
    model = AnytimeModel([nn.Identity()], [nn.Sequential(nn.Flatten(), nn.Linear(12, 5))])
    assert account(net(model), (3, 2, 2)).head.packed_bytes[0] == 4 * (60 + 5)
    assert account(net(model, {"heads.0.1": Bits(4, 8)}), (3, 2, 2)).head.packed_bytes[0] == 60 / 2 + 4 * 5


def test_quantized_networks_count_as_their_float_twins():
    model = Tiny().build((3, 16, 16), 4).eval()
    q = quantized(model, Widths(8, 8), "u8s8")
    assert np.array_equal(account(net(q.model, q.bits), (3, 16, 16)).macs, account(net(model), (3, 16, 16)).macs)


def test_stages_that_restart_are_not_added_up():
    cost = account(net(Restarting().build((3, 16, 16), 4)), (3, 16, 16))
    first, second = 27 * 8 * 64 + 8 * 4, 27 * 16 * 64 + 16 * 4
    assert cost.path((1,), 1) == second  # jumped to
    assert cost.path((0, 1), 1) == cost.macs[1] == first + second  # one after another


def test_it_refuses_to_say_zero():
    hidden = AnytimeModel([nn.Identity()], [nn.Flatten()])
    hidden.register_parameter("p", nn.Parameter(torch.zeros(1)))
    with pytest.raises(AnytimeError, match="counts 0 MACs"):
        account(net(hidden), (1, 2, 2))
