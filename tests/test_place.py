"""Where quantizers stand, by the rules of each target; what observation, folding and widths make of them."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anytime.backends.ptq import PTQ
from anytime.dataset import Part
from anytime.errors import Unsupported, UsageError
from anytime.layers import BasicBlock
from anytime.model import AnytimeModel
from anytime.models.eenet import EENetDenseNet121
from anytime.models.msdnet import MSDNet
from anytime.models.resnet import ResNet20
from anytime.models.sdn import SDN
from anytime.quant.bits import Bits
from anytime.quant.fake import FakeQuant, QConv2d, QLinear, Settled, per_channel
from anytime.quant.graph import Widths, prepared, quantized, traced
from anytime.quant.nodes import module_of
from anytime.quant.place import left_out, tensorrt_exclusions, uncovered
from anytime.quant.reconstruct import Reconstruction, reconstruct
from anytime.quant.units import partition
from tests.worlds import Restarting, Tiny, data

TARGETS = ("u8s8", "u8s8-fused", "s8s8")


def placed(stage, head=None, target="u8s8", widths=Widths(8, 8), **kw):  # noqa: B008
    """A chain of one stage, whose input is rounded, with quantizers."""
    head = head or nn.Flatten()
    return quantized(AnytimeModel([nn.Sequential(nn.Identity(), stage)], [nn.Sequential(head)]), widths, target, **kw)


def tiny():
    torch.manual_seed(0)
    return Tiny().build((3, 16, 16), 4)


def rounded(g):
    """Names of the nodes that a quantizer stands on, without the link's own path."""
    return {n.args[0].name.removeprefix("_1_") for n in g.graph.nodes if isinstance(module_of(g, n), FakeQuant)}


def calibrated(net, x):
    net.calibrate(net.observe(x), "minmax", "minmax")
    net.check_coverage()
    return net


# How many there are, counted by hand ---------------------------------------------------------------------------

COUNTS = [
    # image, stem; inner ReLU, second convolution, sum of the block; last stage; an average in two heads, a ReLU, an average
    (Tiny(), (3, 16, 16), 2 + 3 + 1 + 1 + 2 + 1, *(2 + 2 + 1 + 1 + 2 + 1,) * 2),
    # image, stem; 9 blocks as above; the average
    (ResNet20(), (3, 32, 32), 2 + 9 * 3 + 1, *(2 + 9 * 2 + 1,) * 2),
    # image; 58 layers: 2 ReLU, and in u8s8 what is appended and what comes of it; 3 transitions: ReLU, convolution, and in
    # u8s8 the average (in s8s8 that lies on the grid of the block behind it: 4 of those); the stem likewise; the last ReLU;
    # 3 heads with 3 ReLU and an average, one with an average.
    (EENetDenseNet121(), (3, 32, 32), *(1 + 58 * 4 + 3 * 3 + 1 + 1 + 3 * 4 + 1,) * 2, 1 + 58 * 2 + 3 * 2 + 4 + 1 + 3 * 4 + 1),
]


@pytest.mark.parametrize("spec, shape, u8s8, fused, s8s8", COUNTS, ids=[type(c[0]).__name__ for c in COUNTS])
def test_as_many_as_counted_by_hand(spec, shape, u8s8, fused, s8s8):
    model = traced(spec.build(shape, 10))
    assert [len(quantized(model, Widths(8, 8), t).quantizers()) for t in TARGETS] == [u8s8, fused, s8s8]


# One per tensor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_tap_has_one_for_its_head_and_the_next_stage(target):
    net = quantized(tiny(), Widths(8, 8), target)
    assert net.sources["heads.1.0"] is net.sources["stages.2.0"]
    assert net.sources["heads.1.0"] is not net.sources["stages.1.0.a"]
    for link in (*net.model.heads, *net.model.stages[1:]):  # the saboteur: a pair of its own where a state enters a link
        state = next(n for n in link.graph.nodes if n.op == "placeholder")
        assert not any(isinstance(module_of(link, user), FakeQuant) for user in state.users)


@pytest.mark.parametrize("target", TARGETS)
def test_average_pools_have_them_on_both_sides_and_what_moves_values_has_none(target):
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.AvgPool2d(2), nn.MaxPool2d(2))
    net = placed(stage, nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), target)
    assert rounded(net.model.stages[0]) == {"input_1", "1", "4"}
    assert not rounded(net.model.heads[0])  # neither the flatten nor the logits
    assert net.sources["heads.0.0.1"].name.endswith(":_1_4")


def test_the_shape_of_a_tensor_is_no_tensor():
    class View(nn.Module):
        def forward(self, x):
            return x.view(x.size(0), -1)

    net = placed(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), View(), nn.Linear(8, 3)))
    x = torch.rand(4, 1, 4, 4)
    assert calibrated(net, x).model(x).shape == (1, 4, 3)


class Call(nn.Module):
    """f(self, x), with two convolutions and a matrix at hand."""

    def __init__(self, f):
        super().__init__()
        self.f, self.conv, self.other, self.matrix = f, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.f(self, x)


@pytest.mark.parametrize("split", [torch.chunk, torch.split, lambda x, *how: x.chunk(*how), lambda x, *how: x.split(*how)])
@pytest.mark.parametrize("target", TARGETS)
def test_parts_of_a_tensor_lie_on_its_grid(target, split):
    def halves(m, x):
        parts = split(torch.relu(m.conv(x)), 2, 1)
        y = m.other(torch.cat([parts[1], parts[1]], 1))
        return y + torch.cat([parts[0], parts[0]], 1) + torch.stack(x.unbind(1), 1)

    model, x = AnytimeModel([Call(halves)], [nn.Sequential(nn.Flatten(), nn.Linear(64, 3))]), torch.randn(16, 4, 4, 4)
    net = calibrated(quantized(model, Widths(4, 4), target), x)
    assert not {name for name in rounded(net.model.stages[0]) if name.startswith(("chunk", "split", "unbind", "getitem"))}
    if target == "s8s8":  # what is joined of parts lies there too
        assert net.sources["stages.0.other"].name == "stages.0:relu"
    reconstruct(net, traced(model), x, Reconstruction("layer", iterations=1, batch=8), seed=0)


@pytest.mark.parametrize(
    "stage, said",
    [
        (Call(lambda m, x: m.conv(x).max(1)[0]), r"stages\.0\.max_1 gives several tensors"),
        (Call(lambda m, x: m.conv(x).sort(1).values), r"stages\.0\.sort gives several tensors"),
        (nn.Sequential(nn.Flatten(2), nn.LSTM(16, 4)), r"stages\.0\.1 gives several tensors"),
    ],
    ids=["max", "sort", "LSTM"],
)
def test_other_tuples_are_refused_by_name(stage, said):
    with pytest.raises(Unsupported, match=said):
        quantized(AnytimeModel([stage], [nn.Flatten()]), Widths(8, 8), "u8s8")


def shuffled(m, x):
    n, c, h, w = x.size()
    y = m.conv(x).view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
    return m.other(y)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_computed_of_a_shape_is_not_rounded(target):
    model, x = AnytimeModel([Call(shuffled)], [nn.Sequential(nn.Flatten(), nn.Linear(64, 3))]), torch.randn(16, 4, 4, 4)
    net = calibrated(quantized(model, Widths(8, 8), target), x)
    assert not {name for name in rounded(net.model.stages[0]) if name.startswith(("floordiv", "size", "getitem"))}
    assert set(net.bits) == {"stages.0.conv", "stages.0.other", "heads.0.1"}


# Layers that would stay in float --------------------------------------------------------------------------------

MULTIPLY = {
    "stages.0.matmul": lambda m, x: x @ m.matrix,
    "stages.0.conv_transpose2d": lambda m, x: F.conv_transpose2d(x, m.matrix[:, :, None, None]),
    "stages.0.scaled_dot_product_attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "stages.0.tensordot": lambda m, x: torch.tensordot(x, m.matrix, 1),
    "stages.0.mv": lambda m, x: x.flatten().view(-1, 4).mv(m.matrix[0]),
    "stages.0.baddbmm": lambda m, x: torch.baddbmm(x.flatten(1, 2), x.flatten(1, 2), m.matrix.expand(2, 4, 4)),
    "stages.0.matmul_1": lambda m, x: (x * m.matrix).matmul(x) + (x.sigmoid() + m.matrix) @ x,
}


@pytest.mark.parametrize("name", MULTIPLY)
def test_functions_that_multiply_are_named(name):
    model = AnytimeModel([Call(MULTIPLY[name])], [nn.Flatten()])
    model.stages[0].up = nn.ConvTranspose1d(4, 4, 1)
    net = quantized(model, Widths(8, 8), "u8s8")
    assert name.replace("conv", "up") in dict(uncovered(net.model, net.sources)) or name in dict(
        uncovered(net.model, net.sources)
    )


@torch.fx.wrap
def hidden(x, weight):
    return F.conv2d(x, weight[:, :, None, None])


def test_a_function_that_torch_fx_does_not_look_into_is_named():
    net = quantized(AnytimeModel([Call(lambda m, x: hidden(x, m.matrix))], [nn.Flatten()]), Widths(8, 8), "u8s8")
    assert list(dict(uncovered(net.model, net.sources))) == ["stages.0.hidden"]


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose1d(4, 4, 1), nn.ConvTranspose3d(4, 4, 1), nn.GRUCell(4, 4), nn.Conv1d(4, 4, 1)],
    ids=lambda m: type(m).__name__,
)
def test_modules_with_a_weight_are_named(layer):
    net = quantized(AnytimeModel([nn.Sequential(layer)], [nn.Flatten()]), Widths(8, 8), "u8s8")
    assert dict(uncovered(net.model, net.sources)) == {"stages.0.0": f"no quantizer for {type(layer).__name__}"}


def test_what_scales_value_by_value_is_no_layer():
    norms = (
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm((4, 8, 8)),
        Call(lambda m, x: x * m.matrix[:, :1, None]),
    )
    net = quantized(AnytimeModel([nn.Sequential(*norms)], [nn.Flatten()]), Widths(8, 8), "u8s8")
    assert not dict(uncovered(net.model, net.sources))


# Additions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, block", [("u8s8", {"relu", "b", "last"}), ("u8s8-fused", {"relu", "last"}), ("s8s8", {"relu", "last"})]
)
def test_of_a_residual_addition_only_the_skip_is_rounded_where_it_is_fused(target, block):
    net = quantized(tiny(), Widths(8, 8), target)
    assert {name.removeprefix("_0_") for name in rounded(net.model.stages[1])} == block
    # The skip: the tensor that the block reads, rounded in the stage before.
    assert net.sources["stages.1.0.a"].name == "stages.0:_2"


def projecting():
    return nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))


class ShortcutFirst(BasicBlock):
    """The same block, written the other way round."""

    def forward(self, x):
        shortcut = self.shortcut(x)
        return self.relu(shortcut + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


@pytest.mark.parametrize("block", [BasicBlock, ShortcutFirst])
@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize("target", ["u8s8-fused", "s8s8"])
def test_of_a_downsampling_block_the_shortcuts_convolution_is_rounded(block, fold_bn, target):
    net = placed(block(4, 8, 2, projecting()), target=target, fold_bn=fold_bn)
    shortcut, main = ("shortcut_0", "conv2") if fold_bn else ("shortcut_1", "bn2")
    assert rounded(net.model.stages[0]) == {"input_1", "relu", shortcut, "relu_1"}
    both = placed(block(4, 8, 2, projecting()), target="u8s8", fold_bn=fold_bn)
    assert rounded(both.model.stages[0]) == {"input_1", "relu", shortcut, main, "relu_1"}


class Sums(nn.Module):
    """x + a(x) + b(x), and twice two convolutions of one tensor."""

    def __init__(self, two):
        super().__init__()
        self.two, self.a, self.b = two, nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.a(x) + self.b(x) if self.two else x + self.a(x) + self.b(x)


def test_sums_of_sums_stay_float_where_they_are_fused():
    for target in ("u8s8-fused", "s8s8"):
        assert rounded(placed(Sums(False), target=target).model.stages[0]) == {"input_1", "add_1"}
    assert rounded(placed(Sums(False), target="u8s8").model.stages[0]) == {"input_1", "a", "add", "b", "add_1"}


def test_of_two_convolutions_of_one_tensor_one_takes_the_addition_in():
    assert rounded(placed(Sums(True), target="s8s8").model.stages[0]) == {"input_1", "b", "add"}


# Concatenations ------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """As a DenseNet grows, without its BatchNorm."""

    def __init__(self, c, growth):
        super().__init__()
        self.conv = nn.Conv2d(c, growth, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.conv(x), x], 1)


def dense():
    """Two blocks grow one tensor through two links; a pooling begins another."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), Dense(2, 1), Dense(3, 1)),
        nn.Sequential(nn.MaxPool2d(2), Dense(4, 1), nn.AvgPool2d(2), Dense(5, 1)),
    ]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3)) for c in (4, 6)]
    return AnytimeModel(stages, heads)


def test_what_is_concatenated_shares_one_quantizer_through_one_another_and_across_links():
    net = quantized(dense(), Widths(8, 8), "s8s8")
    one = net.sources["stages.0.2.conv"]
    assert all(net.sources[f"stages.{path}"] is one for path in ("0.3.conv", "1.1.conv"))
    other = net.sources["stages.1.3.conv"]
    assert other is not one
    assert len(net.quantizers()) == 1 + 2 + 2  # the image, the two grown tensors, an average in each head
    # In u8s8 each part and each result has one, so have the stem and the average between the blocks.
    assert len(quantized(dense(), Widths(8, 8), "u8s8").quantizers()) == 1 + 1 + 4 * 2 + 1 + 2


class Overlapping(nn.Module):
    """a, b and c; a joined with b, c with b; a layer reads b alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.alone = (nn.Conv2d(1, 1, 1) for _ in range(4))
        self.ab, self.cb = nn.Conv2d(2, 1, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x):
        a, b, c = self.a(x), self.b(x), self.c(x)
        return self.ab(torch.cat([a, b], 1)), self.cb(torch.cat([c, b], 1)), self.alone(b)


def test_groups_that_share_a_part_are_one_and_its_widest_reader_counts():
    own = {"stages.0.alone": Bits(4, 7)}
    model = AnytimeModel([Overlapping()], [nn.Flatten()])
    net = quantized(model, Widths(4, 4, edge=4, layers=own), "s8s8")
    assert len({id(net.sources[f"stages.0.{name}"]) for name in ("ab", "cb", "alone")}) == 1
    assert len(net.quantizers()) == 1 + 1 + 3  # the image, the parts, what is returned
    assert net.bits["stages.0.ab"] == (4, 7)


def test_tied_parts_lie_on_one_grid():
    x = torch.rand(8, 1, 12, 12)
    net = calibrated(quantized(dense(), Widths(8, 8), "s8s8"), x)
    with torch.no_grad():
        state = net.model.stages[0](x)
    steps = state / net.sources["stages.0.2.conv"].scale
    assert torch.allclose(steps, steps.round(), atol=1e-3) and len(steps.round().unique()) > 50
    fresh = quantized(dense(), Widths(8, 8), "s8s8")
    with torch.no_grad():
        float_state = dense().eval().stages[0](x)
    assert fresh.observe(x)[fresh.sources["stages.0.2.conv"].name].amax == pytest.approx(
        float(float_state.abs().max())
    )  # the range of all that it stands on


def test_msdnet_has_one_grid_per_scale():
    """States are tuples. What the stem and every layer append to a scale is tied, across links too, up to the transition."""
    net = quantized(MSDNet(blocks=2, base=1, step=1).build((3, 32, 32), 10), Widths(8, 8), "s8s8")
    stands = Counter(id(m) for _, m in net.model.named_modules(remove_duplicate=False) if isinstance(m, FakeQuant))
    # The finest scale: what stem and first layer make. The others: the stem's, and two parts of each layer.
    assert sorted(n for n in stands.values() if n > 1) == [2, 5, 5]


@pytest.mark.parametrize("activation, u8s8", [(8, {"input_1", "0", "1"}), (4, {"input_1", "1"})])
def test_what_a_relu6_reads_is_rounded_at_8_bits_only(activation, u8s8):
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6())
    assert rounded(placed(stage, widths=Widths(4, activation)).model.stages[0]) == u8s8
    assert rounded(placed(stage, target="s8s8", widths=Widths(4, activation)).model.stages[0]) == {"input_1", "1"}
    both = placed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh()), widths=Widths(4, activation))
    assert rounded(both.model.stages[0]) == {"input_1", "0", "1"}  # it keeps negative values: no ReLU


def test_a_relu6_is_learned_with_its_layer():
    model, x = AnytimeModel([nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6())], [nn.Flatten()]), torch.randn(8, 3, 5, 5)
    net = calibrated(quantized(model, Widths(4, 4), "u8s8"), x)
    _, (stage,) = partition(net, traced(model), "layer", with_exits=False)
    assert [[op.node.name for op in u.ops] for u in stage.units if u.layers] == [["_0", "_1", "quant__1"]]


# BatchNorm left where it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_between_convolution_batch_norm_and_relu_there_is_none(target):
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Dropout(),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
    ]
    net = placed(nn.Sequential(*layers), target=target, fold_bn=False)
    assert rounded(net.model.stages[0]) == {"input_1", "2", "5"}
    assert len(net.quantizers()) == len(placed(nn.Sequential(*layers), target=target).quantizers())


@pytest.mark.parametrize("spec", [Tiny(), SDN("resnet20")], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_folding_before_or_after_makes_no_difference_to_the_places(spec, target):
    shape = (3, 16, 16) if isinstance(spec, Tiny) else (3, 32, 32)
    model = spec.build(shape, 10)
    before, after = (quantized(model, Widths(8, 8), target, fold_bn=fold) for fold in (True, False))
    after.settle()
    assert [len(rounded(g)) for g in (*before.model.stages, *before.model.heads)] == [
        len(rounded(g)) for g in (*after.model.stages, *after.model.heads)
    ]
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in net.model.modules()) for net in (before, after)]
    assert norms[0] == norms[1]  # only those that stand before their convolution


def trained_with_noise(seed=0):
    """Tiny as an odd training leaves it: any statistics, gammas that are negative and 0."""
    torch.manual_seed(seed)
    model = Tiny().build((3, 16, 16), 4).eval()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.2, 4)
        bn.weight.data.normal_()
        bn.weight.data[:2] = torch.tensor([0.0, -1.5])
        bn.bias.data.normal_()
    return model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [3, 8])
def test_settling_folds_exactly_and_keeps_the_integers(target, bits):
    x = data().calib.x
    net = prepared(trained_with_noise(), x, Widths(bits, bits, edge=bits), target, "minmax", "mse", fold_bn=False)
    layers = dict(net.layers())
    gammas = {"stages.0.0": net.model.stages[0].get_submodule("1").weight.detach().clone()}
    integers = {p: m.integers().detach() for p, m in layers.items()}
    with torch.no_grad():
        want = net.model(x)
        net.settle()
        got = net.model(x)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.model.modules())
    sign = per_channel(gammas["stages.0.0"].sign(), integers["stages.0.0"])
    assert (sign == 0).sum() == 1 and (sign < 0).sum() >= 1  # a gamma of 0 leaves only the bias, a negative one turns the channel
    assert torch.equal(layers["stages.0.0"].integers(), integers["stages.0.0"] * sign)
    assert torch.equal(layers["stages.1.0.a"].integers(), integers["stages.1.0.a"])  # it has none
    assert all((m.weight_scale > 0).all() for m in layers.values())
    with torch.no_grad():
        frozen = net.freeze(round_bias=False)(x)
    assert torch.allclose(frozen, got, atol=1e-4 * float(want.abs().max()))


def test_settling_folds_into_a_convolution_that_was_left_in_float_too():
    net = quantized(tiny(), Widths(8, 8), "u8s8", exclusions=("stages.0.0",), fold_bn=False)
    calibrated(net, torch.randn(8, 3, 16, 16))
    x = torch.randn(4, 3, 16, 16)
    was = net.model(x)
    net.settle()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.model.modules())
    assert torch.allclose(net.model(x), was, atol=1e-5)


def test_a_turned_channel_keeps_the_lowest_integer():
    """A learned weight may stand on -4 of -4..3; a negative gamma makes 4 of it, which must not be cut to 3."""
    model = AnytimeModel([nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))], [nn.Flatten()])
    with torch.no_grad():
        model.stages[0][1].weight.copy_(torch.tensor([-1.0, 1.0]))
    net = calibrated(quantized(model, Widths(3, 8, edge=3), "u8s8", fold_bn=False), torch.rand(4, 1, 2, 2))
    layer = dict(net.layers())["stages.0.0"]
    layer.put(Settled(torch.tensor([-4.0, 3.0]).view(2, 1, 1, 1), torch.ones(2), -4, 3))
    net.settle()
    assert layer.integers().flatten().tolist() == [4, 3]


def test_a_fold_that_forgets_the_scale_is_seen():
    """The saboteur: the factor goes into the weight and its scale stays, so that rounding rounds anew."""
    x = data().calib.x
    net = prepared(trained_with_noise(), x, Widths(3, 3, edge=3), "u8s8", "minmax", "mse", fold_bn=False)
    scales = {p: m.weight_scale.clone() for p, m in net.layers()}
    with torch.no_grad():
        want = net.model(x)
        net.settle()
        for p, m in net.layers():
            m.weight_scale.copy_(scales[p])
        assert (net.model(x) - want).abs().max() > 1e-2 * want.abs().max()


# Widths --------------------------------------------------------------------------------------------------------


def test_the_first_layer_and_each_heads_last_one_are_at_the_edge():
    bits = quantized(tiny(), Widths(4, 4), "u8s8").bits
    assert {p for p, b in bits.items() if b.weight == 8} == {"stages.0.0", "heads.0.2", "heads.1.4", "heads.2.3"}
    # heads.1.0 and stages.2.0 read one tensor at 4 bits; a head's only layer pulls what it reads to 8
    assert bits["heads.1.0"] == bits["stages.2.0"] == (4, 4) and bits["heads.0.2"] == (8, 8)
    assert set(quantized(tiny(), Widths(4, 4, edge=4), "u8s8").bits.values()) == {Bits(4, 4)}
    assert set(quantized(tiny(), Widths(8, 8, edge=2), "u8s8").bits.values()) == {Bits(8, 8)}  # never under the others


def test_all_layers_that_read_the_image_are_at_the_edge_in_whichever_link_they_are():
    def fork(m, x):
        return m.conv(x) + m.other(torch.relu(m.conv(x)))

    def head(*more):
        return nn.Sequential(*more, nn.Flatten(), nn.LazyLinear(3), nn.LazyLinear(3))

    model = AnytimeModel(
        [nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(2)), Call(fork), nn.Sequential(nn.Conv2d(4, 4, 1))],
        [head(nn.Conv2d(4, 4, 1)), head(), head()],
    )
    model(torch.randn(2, 4, 8, 8))
    bits = quantized(model, Widths(4, 4, 8, 8), "u8s8").bits
    first = {"heads.0.0", "stages.1.conv", "stages.1.conv_again"}
    assert {p for p, b in bits.items() if b.weight == 8} == first | {"heads.0.3", "heads.1.2", "heads.2.2"}
    assert bits["stages.1.other"] == bits["stages.2.0"] == (4, 4)


def test_each_call_of_a_layer_has_its_own_bits_and_bias_grid():
    """Called on the image at 8 bits and on a ReLU; once, the last call's grid was that of both."""
    model = AnytimeModel(
        [nn.Sequential(nn.Conv2d(4, 4, 1)), Call(lambda m, x: m.conv(torch.relu(m.conv(x))) + x)], [nn.Flatten()] * 2
    )
    x = torch.randn(16, 4, 4, 4)
    net = calibrated(quantized(model, Widths(4, 4, 8, 8), "u8s8"), x)
    assert net.bits["stages.1.conv"] == net.bits["stages.1.conv_again"] == (4, 4)
    net.freeze(round_bias=True)
    held = {}
    for path, layer in net.layers():
        layer.register_forward_pre_hook(lambda _m, args, path=path: held.__setitem__(path, args[0]))
    net.model(x)
    for path, layer in net.layers():
        q = net.sources[path]
        steps = layer.bias / (q.scale * layer.weight_scale)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert len(held[path].unique()) <= 2**q.bits and torch.equal(q(held[path]), held[path])


def test_stages_that_restart_each_have_a_first_layer_and_round_the_image():
    net = quantized(Restarting().build((3, 16, 16), 4), Widths(4, 4), "u8s8")
    assert net.bits == dict.fromkeys(("stages.0.0", "heads.0.2", "stages.1.0", "heads.1.2"), Bits(8, 8))
    assert [rounded(g) for g in net.model.stages] == [{"input_1", "_1"}] * 2


def test_a_wide_residual_stream_is_rounded_once_more_for_the_layers():
    """ResNet-20: stem, 9 sums, 9 second convolutions, image and average at 8 bits; 9 inner tensors and 9 readings at 4."""
    net = quantized(ResNet20().build((3, 32, 32), 10), Widths(4, 4, add=8), "u8s8")
    assert Counter(q.bits for q in net.quantizers()) == {8: 1 + 9 + 9 + 1 + 1, 4: 9 + 9}
    inner = {p: b for p, b in net.bits.items() if "layer" in p}
    assert len(inner) == 18 and set(inner.values()) == {Bits(4, 4)}
    shared = quantized(ResNet20().build((3, 32, 32), 10), Widths(4, 4), "u8s8")
    assert Counter(q.bits for q in shared.quantizers()) == {4: 28, 8: 2}  # without ``add`` everything is shared


def test_the_stream_keeps_its_own_grid_and_the_layer_reads_a_coarser_one():
    x = data().calib.x
    net = calibrated(quantized(tiny(), Widths(4, 4, add=8), "u8s8"), x)
    held: dict[str, torch.Tensor] = {}
    stage = net.model.stages[1]
    block = stage.get_submodule("0.a")
    block.register_forward_pre_hook(lambda _m, args: held.__setitem__("layer", args[0]))
    with torch.no_grad():
        stream = net.model.stages[0](x)
        stage(stream)
    assert len(held["layer"].unique()) <= 16 < len(stream.unique()) <= 256
    assert net.bits["stages.1.0.a"] == (4, 4) and net.sources["stages.1.0.a"].bits == 4
    assert net.model.stages[0].get_submodule("quant__2").bits == 8


def test_single_layers_have_their_own_widths():
    own = {"stages.1.0.b": Bits(2, 3), "stages.0.0": Bits(5, 6), "stages.2.0": Bits(4, 7)}
    bits = quantized(tiny(), Widths(4, 4, layers=own), "u8s8").bits
    assert bits["stages.1.0.b"] == (2, 3) and bits["stages.0.0"] == (5, 6)  # also against the edge
    assert bits["stages.2.0"] == (4, 7) and bits["heads.1.0"] == (4, 7)  # the tap is shared: its widest reader counts
    assert quantized(tiny(), Widths(4, 4, add=8, layers=own), "u8s8").bits["heads.1.0"] == (4, 4)  # here not


def test_widths_and_exclusions_of_layers_that_are_not_there_are_said():
    with pytest.raises(UsageError, match="no layer 'stages.0.1.a'; did you mean .*'stages.1.0.a'"):
        quantized(tiny(), Widths(4, 4, layers={"stages.0.1.a": Bits(4, 4)}), "u8s8")
    with pytest.raises(UsageError, match="no layer 'heads.0.3'"):
        quantized(tiny(), Widths(8, 8), "u8s8", exclusions=("heads.0.3",))
    with pytest.raises(Unsupported, match="stages.2.0 weight bits 9"):
        Widths(8, 8, layers={"stages.2.0": Bits(9, 8)})


def test_an_excluded_layer_is_a_float_one_among_the_others():
    net = quantized(tiny(), Widths(8, 8), "u8s8", exclusions=("stages.1.0.a",))
    kinds = {p: type(m) for p, m in net.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert kinds.pop("stages.1.0.a") is nn.Conv2d and set(kinds.values()) == {QConv2d, QLinear}
    assert rounded(net.model.stages[1]) == {f"_0_{name}" for name in ("relu", "b", "last")}  # what it makes is rounded as before


def test_logits_stay_float_whatever_moves_them_on_their_way_out():
    """SqueezeNet's head: the last convolution, pooled and flattened."""
    head = nn.Sequential(nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = placed(nn.Conv2d(3, 4, 3), head, widths=Widths(4, 4))
    assert rounded(net.model.heads[0]) == {"_0_0"}, "what the pooling reads"
    calibrated(net, torch.randn(16, 3, 6, 6))
    assert len(net.model(torch.randn(64, 3, 6, 6)).unique()) > 100


def test_a_layer_left_in_float_reads_no_less_for_it_and_the_image_keeps_the_edge_s_bits():
    def bits(net):
        return {name: q.bits for name, q in ((q.name, q) for q in net.quantizers())}

    left_out = ("stages.0.0", "heads.2.3")
    every = bits(quantized(tiny(), Widths(4, 4), "u8s8"))
    assert bits(quantized(tiny(), Widths(4, 4), "u8s8", left_out)) == every and 8 in every.values()
    normed = placed(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), widths=Widths(4, 4))
    assert next(b for name, b in bits(normed).items() if name.startswith("stages.0")) == 8


def test_a_grid_of_several_tensors_has_no_moving_average_of_them_in_turn():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return torch.cat([self.a(x), 0.1 * self.b(x)], 1)

    torch.manual_seed(0)
    x = torch.randn(256, 3, 4, 4)
    grids = []
    for observer in ("moving", "minmax"):
        torch.manual_seed(1)
        net = placed(Cat(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten()), "s8s8")
        net.calibrate(net.observe(x), observer, "minmax")
        grids.append({q.name: float(q.scale) for q in net.quantizers() if q.shared})
    assert grids[0] == grids[1] and len(grids[0]) == 1


# Observation ---------------------------------------------------------------------------------------------------


def lines():
    """Two stages y = x + 1 and y = 2 x, heads that give their input."""

    def line(weight, bias):
        m = nn.Linear(1, 1)
        with torch.no_grad():
            m.weight.fill_(weight)
            m.bias.fill_(bias)
        return m

    return AnytimeModel(
        [nn.Sequential(line(1, 1)), nn.Sequential(line(2, 0))], [nn.Sequential(line(1, 0), nn.ReLU()) for _ in range(2)]
    )


def ranges(seen):
    return {name: (h.low, h.high) for name, h in seen.items()}


def test_a_stage_sees_the_samples_that_reach_it():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]).view(5, 1)
    net = quantized(lines(), Widths(8, 8), "u8s8")
    everyone = ranges(net.observe(x))
    assert everyone == {"stages.0:input_1": (1, 9), "stages.0:_0": (2, 10), "stages.1:_0": (4, 20)}
    for batch in (1, 2, 256):  # 2 and 3 enter stage 1; 9 leaves before anything runs
        seen = net.observe(x, torch.tensor([0, 1, 1, 0, -1]), batch=batch)
        assert ranges(seen) == {"stages.0:input_1": (1, 4), "stages.0:_0": (2, 5), "stages.1:_0": (6, 8)}
    assert seen["stages.1:_0"].counts.sum() == 2 and seen["stages.0:_0"].counts.sum() == 4


def test_stages_that_restart_see_their_samples_too():
    x = torch.rand(6, 3, 8, 8)
    net = quantized(Restarting().build((3, 16, 16), 4), Widths(8, 8), "u8s8")
    seen = net.observe(x, torch.tensor([0, 1, 0, 1, 0, 0]), batch=4)
    assert seen["stages.0:input_1"].high == float(x.max())
    assert seen["stages.1:input_1"].high == float(x[[1, 3]].max()) and seen["stages.1:input_1"].counts.sum() == 2 * 3 * 64


def test_a_stage_that_nobody_reaches_cannot_be_calibrated():
    net = quantized(lines(), Widths(8, 8), "u8s8")
    seen = net.observe(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(Unsupported, match="never seen"):
        net.calibrate(seen, "minmax", "minmax")


def test_tensorrt_leaves_out_what_model_optimizer_does():
    def conv(c_in, c_out, kernel=3, groups=1):
        return nn.Conv2d(c_in, c_out, kernel, groups=groups)

    stage = nn.Sequential(
        conv(3, 8),  # reads the input, 8 out: in
        conv(8, 8),  # fewer than 16 on both sides: out
        conv(8, 16),  # 8 in, 16 out, square: in
        conv(16, 16, (1, 3)),  # 16 on both sides: in
        conv(16, 12, (1, 3)),  # not square: out
        conv(12, 16, 1),  # 16 out, a multiple of 8 on one side: in
        conv(16, 16, 3, 16),  # depthwise, 16 out: in
        conv(16, 16, 1, 16),  # depthwise 1x1: out
        conv(16, 10, 1),  # in, by 16 in
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4))
    chain = traced(AnytimeModel([stage], [head]))
    assert tensorrt_exclusions(chain) == ("stages.0.1", "stages.0.4", "stages.0.7", "heads.0.2")
    assert left_out(chain, ("stages.0.0",), "s8s8") == ("stages.0.0", *tensorrt_exclusions(chain)) and not left_out(
        chain, (), "u8s8"
    )
    net = PTQ().compress(
        AnytimeModel([stage], [head]), Part(torch.randn(8, 3, 24, 24), torch.arange(8) % 4, "calib", "d"), None, "s8s8"
    )
    assert "heads.0.2" in net.facts["exclusions"] and "heads.0.2" not in net.bits and "stages.0.0" in net.bits
