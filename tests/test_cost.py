"""Costs against hand counts, published figures and two other counters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anytime.backend import Bits, TorchNet
from anytime.cost import In, account
from anytime.errors import AnytimeError, Unsupported
from anytime.model import AnytimeModel
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.iresnext import IResNeXt
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


def test_16_bit_floats_have_biases_of_16_bits_and_integers_have_not():
    model = AnytimeModel([nn.Identity()], [nn.Sequential(nn.Flatten(), nn.Linear(12, 5))])
    assert account(net(model, {"heads.0.1": Bits(16, 16)}), (3, 2, 2)).head.packed_bytes[0] == 2 * (60 + 5)
    q = quantized(model, Widths(16, 16), "u8s8")
    assert account(net(q.model, q.bits), (3, 2, 2)).head.packed_bytes[0] == 2 * 60 + 4 * 5


class Residual(nn.Module):
    """x, a convolution of it added, ReLU: in three modules and an addition that is none."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


def small_chain():
    first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)) for _ in range(2)]
    return AnytimeModel([first, Residual()], heads).eval()


IN, OUT, POOLED = 3 * 8 * 8, 6 * 8 * 8, 6 * 4 * 4


@pytest.mark.parametrize(
    "widths, stages",
    [
        (Widths(8, 8), [OUT + OUT, POOLED + POOLED]),  # the ReLU
        # Of 4 bits are what the ReLUs and the second convolution make and read; the image and what the heads read have 8.
        (Widths(4, 4), [IN + OUT / 2, POOLED]),
        # What the pooling and the addition read has 8 bits.
        (Widths(4, 4, add=8), [OUT + OUT, POOLED + POOLED]),
    ],
    ids=["W8A8", "W4A4", "W4A4 add 8"],
)
@pytest.mark.parametrize("target", ["u8s8", "s8s8", "u8s8-fused"])
def test_activation_bytes_of_a_quantized_chain_by_hand(widths, stages, target):
    q = quantized(small_chain(), widths, target)
    cost = account(net(q.model, q.bits), (3, 8, 8))
    assert cost.stage.activation_bytes.tolist() == stages
    assert cost.head.activation_bytes[0] == POOLED + 6  # the pooling: a head's last layer reads 8 bits
    assert account(net(small_chain()), (3, 8, 8)).stage.activation_bytes.tolist() == [4 * 2 * OUT, 4 * 2 * POOLED]


def test_activation_bytes_where_the_twin_has_no_quantizers():
    bits = {name: Bits(8, 8) for name, m in small_chain().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    cost = account(net(small_chain(), bits), (3, 8, 8))
    assert cost.stage.activation_bytes.tolist() == [OUT + OUT, POOLED + POOLED]
    kept = {name: b for name, b in bits.items() if name != "stages.1.conv"}  # that one in float: 8 bits in, 32 out
    assert account(net(small_chain(), kept), (3, 8, 8)).stage.activation_bytes.tolist() == [OUT + OUT, 4 * 2 * POOLED]


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


D, T, H = 16, 10, 4  # width, tokens, attention heads
ATTENTION = T * D * 3 * D + 2 * T * T * D + T * D * D


class SDPA(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(1, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class MHA(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.pairs = nn.Linear(D, D), nn.Bilinear(D, D, 3)

    def forward(self, x):
        return self.pairs(self.plain(x), x)


def sequence(stage):
    return net(AnytimeModel([stage], [nn.Flatten()]).eval())


@pytest.mark.parametrize(
    "stage, macs",
    [
        (SDPA(), T * D * 3 * D + 2 * T * T * D),
        (MHA(), ATTENTION),
        (nn.TransformerEncoderLayer(D, H, 32, batch_first=True), ATTENTION + 2 * T * D * 32),
    ],
    ids=["SDPA", "MHA", "encoder layer"],
)
def test_attention_by_hand(stage, macs):
    cost = account(sequence(stage), (T, D))
    assert cost.stage.macs.tolist() == [macs] == [sum(layer.macs for layer in cost.layers)]
    assert torch.backends.mha.get_fastpath_enabled()  # as it was


def test_a_layer_that_the_counter_does_not_see_is_refused_by_name():
    with pytest.raises(Unsupported, match=r"stages\.0\.pairs \(Bilinear\) multiplies and counts 0 MACs"):
        account(sequence(Pairs()), (T, D))


def test_what_several_links_hold_is_held_once():
    model = IResNeXt().build((3, 32, 32), 10)
    cost = account(net(model), (3, 32, 32))
    n = sum(p.numel() for p in model.parameters())
    assert cost.every("params")[-1] == n == 390_608 and cost.every("packed_bytes")[-1] == 4 * n
    alone = sum(p.numel() for m in (model.stages[7], model.heads[7]) for p in m.parameters())
    assert cost.path((7,), 7, "params") == alone == cost.stage.params[7] + cost.head.params[7]
    assert cost.every("macs")[-1] == cost.stage.macs.sum() + cost.head.macs.sum()  # each multiplies anew


def test_tied_weights_are_held_once():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    model = AnytimeModel([nn.Sequential(nn.Flatten(), one, other)], [nn.Linear(4, 4)])
    model.heads[0].weight = one.weight
    cost = account(net(model), (4,))
    assert cost.stage.packed_bytes[0] == 4 * (16 + 4 + 4) and cost.stage.params[0] == 24
    assert cost.every("params").tolist() == [28] and cost.every("packed_bytes").tolist() == [4 * 28]
