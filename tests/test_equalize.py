"""Cross-layer equalization: what the chain computes stays, ranges meet, every reader counts, and what cannot be is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anytime.errors import Unsupported
from anytime.layers import LocalResponseNorm, MixedPool2d, ZeroPadShortcut
from anytime.model import AnytimeModel
from anytime.models.branchynet import BAlexNet, BLeNet, BResNet110
from anytime.models.course import ThreeExitMLP
from anytime.models.eenet import EENetResNet56
from anytime.models.msdnet import MSDNet
from anytime.models.resnet import ResNet20
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.quant.equalize import equalize
from anytime.quant.graph import Widths, prepared, quantized
from anytime.quant.trace import traced
from tests.worlds import Restarting, Tiny


def uneven(model, seed=0):
    """Weights and BatchNorm as after a long training: channel ranges apart by orders of magnitude, statistics not 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2, generator=g)
            m.running_var.uniform_(0.1, 3, generator=g)
            m.weight.data.log_normal_(-1, 1.5, generator=g)
            m.bias.data.normal_(0, 0.3, generator=g)
        elif isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data *= torch.empty(len(m.weight), *(1,) * (m.weight.ndim - 1)).log_normal_(0, 0.5, generator=g)
            if m.bias is not None:
                m.bias.data.normal_(0, 0.2, generator=g)
    return traced(model).double()  # 110 layers of wild statistics make a float32's last bit visible


def outputs(model, shape, n=3):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return model(x)


def same(got, want, tolerance=1e-6):
    """Whether every exit is the same, relative to its largest logit."""
    return all(((g - w).abs().max() <= tolerance * w.abs().max()).item() for g, w in zip(got, want, strict=True))


def layer(model, path):
    return model.get_submodule(path)


def written(m):
    return m.weight.detach().abs().flatten(1).amax(1)


def read(m, channels):
    """r2 of a layer that reads all of one tensor's channels: dense, depthwise, or linear over a flattened map."""
    w = m.weight.detach().abs()
    if isinstance(m, nn.Linear):
        return w.amax(0).view(channels, -1).amax(1)
    return w.amax((1, 2, 3)) if m.groups > 1 else w.amax((0, 2, 3))


# The chain computes what it did --------------------------------------------------------------------------------

NETWORKS = [  # spec, input, pairs counted by hand, or None
    # its block, the head with a convolution, and the last stage; the residual stream and logits are left
    (Tiny(), (3, 16, 16), 3),
    (Restarting(), (3, 16, 16), 2),
    # 13 convolutions read one another and the first linear layer, 6 heads read one too, 2 pairs of linear layers
    (SDN("vgg16_bn"), (3, 32, 32), 13 + 6 + 2),
    # 27 convolutions, every second one depthwise, the last linear layer, 5 heads
    (SDN("mobilenet"), (3, 32, 32), 26 + 1 + 5),
    (SDN("resnet20"), (3, 32, 32), 9),  # only inside each block
    (ResNet20(), (3, 32, 32), 9),
    (ThreeExitMLP(), (1, 28, 28), 5),  # the last layer has one reader, the others two
    (BLeNet(), (1, 28, 28), 6),
    (BAlexNet(), (3, 32, 32), 1 + 1 + 1 + 2 + 2),  # behind LRN nothing is equalized
    (BResNet110(), (3, 32, 32), 54 + 1 + 2),  # its blocks, that of head 2, head 1 behind its LRN
    (EENetResNet56(), (3, 32, 32), 2 * 27 + 2 * 3 + 2),
    (MSDNet(blocks=3, base=2, step=1), (3, 32, 32), None),
    (SparseResNet(depth=4, exits=2), (3, 32, 32), 2 * 12),  # inside its layers; sums all over
]


@pytest.mark.parametrize("spec, shape, n_pairs", NETWORKS, ids=lambda v: getattr(v, "label", ""))
def test_no_exit_changes(spec, shape, n_pairs):
    torch.manual_seed(0)
    model = uneven(spec.build(shape, 10))
    before, want = copy.deepcopy(model.state_dict()), outputs(model, shape)
    done = equalize(model)
    assert same(outputs(model, shape), want)
    layers = {p for p, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    writers = {w for w, _ in done.pairs}
    assert writers | set(done.refused) == layers and not writers & set(done.refused)  # each is accounted for, once
    assert len(done.pairs) == n_pairs if n_pairs is not None else len(done.pairs) > 20
    moved = {k.rsplit(".", 1)[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {path for pair in done.pairs for path in pair}  # and nothing else was touched


@pytest.mark.parametrize(
    "spec, shape",
    [(SDN("mobilenet"), (3, 32, 32)), (BLeNet(), (1, 28, 28)), (BAlexNet(), (3, 32, 32)), (ResNet20(), (3, 32, 32))],
    ids=lambda v: getattr(v, "label", ""),
)
def test_ranges_meet(spec, shape):
    torch.manual_seed(0)
    model = uneven(spec.build(shape, 10))
    done = equalize(model)
    readers = {w: [r for v, r in done.pairs if v == w] for w, _ in done.pairs}
    for w, rs in readers.items():
        r1 = written(layer(model, w))
        r2 = torch.stack([read(layer(model, r), len(r1)) for r in rs]).amax(0)
        assert (r1 / r2).log().abs().max() < 0.02, w  # the tolerance of two sweeps


def chain(stage, head, *more):
    """A traced chain of links given as lists of modules: stage, head, stage, head, ..."""
    parts = [nn.Sequential(*p) if isinstance(p, list) else p for p in (stage, head, *more)]
    return traced(AnytimeModel(parts[::2], parts[1::2]))


def put(m, weight, bias=None):
    with torch.no_grad():
        m.weight.copy_(torch.tensor(weight).view_as(m.weight))
        if bias is not None:
            m.bias.copy_(torch.tensor(bias))
    return m


def test_one_pair_by_hand():
    # r1 = (8, 2), r2 = (2, 8): s = sqrt(r1 r2) / r2 = (2, 1/2), and both ranges are 4.
    first = put(nn.Linear(2, 2), [[8.0, -1.0], [2.0, 0.5]], [1.0, -1.0])
    second = put(nn.Linear(2, 1), [[-2.0, 8.0]], [3.0])
    model = chain([first, nn.ReLU()], [second])
    done = equalize(model)
    a, b = layer(model, "stages.0.0"), layer(model, "heads.0.0")
    assert a.weight.tolist() == [[4.0, -0.5], [4.0, 1.0]] and a.bias.tolist() == [0.5, -2.0]
    assert b.weight.tolist() == [[-4.0, 4.0]] and b.bias.tolist() == [3.0]
    assert done == ((("stages.0.0", "heads.0.0"),), {"heads.0.0": "is the logits of exit 1"}, 2)


def test_of_two_readers_the_larger_counts():
    # r1 = 4; the head reads with 1, the next stage with 16: s = sqrt(4 * 16) / 16 = 1/2.
    model = chain(
        [put(nn.Linear(1, 1), [[4.0]])], [put(nn.Linear(1, 1), [[1.0]])], [put(nn.Linear(1, 1), [[16.0]])], [nn.Identity()]
    )
    assert equalize(model).pairs == (("stages.0.0", "heads.0.0"), ("stages.0.0", "stages.1.0"))
    assert [layer(model, p).weight.item() for p in ("stages.0.0", "heads.0.0", "stages.1.0")] == [8.0, 0.5, 8.0]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(1e-2, 1e2), min_size=3, max_size=3), st.integers(0, 999))
def test_how_channels_were_scaled_before_does_not_matter(factors, seed):
    torch.manual_seed(seed)
    plain, other = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1)
    scaled, read_scaled = copy.deepcopy(plain), copy.deepcopy(other)
    f = torch.tensor(factors)
    with torch.no_grad():
        scaled.weight *= f.view(3, 1, 1, 1)
        scaled.bias *= f
        read_scaled.weight /= f.view(1, 3, 1, 1)
    models = [chain([a, nn.ReLU()], [b]) for a, b in ((plain, other), (scaled, read_scaled))]
    for m in models:
        equalize(m)
    for (name, want), got in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.allclose(want, got, rtol=1e-4), name


# Every reader counts -------------------------------------------------------------------------------------------


def tapped():
    """A convolution whose output a head and the next stage read."""
    torch.manual_seed(0)
    return uneven(
        AnytimeModel(
            [nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2)), nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU())],
            [
                nn.Sequential(nn.Flatten(), nn.Linear(6 * 25, 5)),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
            ],
        )
    )


def equalize_next_layer_only(model):
    """The saboteur: the pair of the tap and the next stage, as a tool does it that sees one consumer."""
    a, b = layer(model, "stages.0.0"), layer(model, "stages.1.0")
    s = (written(a) / read(b, 6)).sqrt()
    with torch.no_grad():
        a.weight /= s.view(-1, 1, 1, 1)
        a.bias /= s
        b.weight *= s.view(1, -1, 1, 1)


def test_a_head_that_is_forgotten_answers_otherwise():
    model, want = tapped(), outputs(tapped(), (3, 12, 12))
    equalize(model)
    assert same(outputs(model, (3, 12, 12)), want)
    spoilt = tapped()
    equalize_next_layer_only(spoilt)
    got = outputs(spoilt, (3, 12, 12))
    assert same(got[1:], want[1:]) and not same(got[:1], want[:1], 0.05)


class Fork(nn.Module):
    """x -> a tuple of two maps; the second is joined of both, of zeros and of the first again."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.pad, self.mixed = ZeroPadShortcut(1, front=1, back=2), MixedPool2d(2)

    def forward(self, x):
        a, b = self.a(x).relu(), torch.relu(self.b(x))
        return self.mixed(a), torch.cat([self.pad(self.mixed(b)), self.mixed(a), self.mixed(b)], dim=1)


class Pick(nn.Module):
    """One tensor of the state, through a layer; the state goes on."""

    def __init__(self, i, layer, on=False):
        super().__init__()
        self.i, self.layer, self.on = i, layer, on

    def forward(self, state):
        y = self.layer(state[self.i])
        return (state[1], y) if self.on else y


def test_tuples_and_concatenations_are_followed():
    torch.manual_seed(0)
    model = uneven(
        AnytimeModel(
            [Fork(), Pick(0, nn.Conv2d(4, 3, 1), on=True)],
            [
                Pick(-1, nn.Sequential(nn.Conv2d(11, 6, 3), nn.Flatten(1), nn.Linear(6 * 36, 5))),
                Pick(0, nn.Sequential(nn.Conv2d(11, 5, 8), nn.Flatten())),
            ],
        )
    )
    want = outputs(model, (3, 16, 16))
    done = equalize(model)
    assert same(outputs(model, (3, 16, 16)), want)
    assert set(done.pairs) == {
        *(("stages.0.a", "stages.1.layer"), ("stages.0.a", "heads.0.layer.0"), ("stages.0.a", "heads.1.layer.0")),
        *(("stages.0.b", "heads.0.layer.0"), ("stages.0.b", "heads.1.layer.0")),
        ("heads.0.layer.0", "heads.0.layer.2"),
    }
    assert done.refused["stages.1.layer"] == "no layer reads it"
    # the channels of b lie at 1, 2 and, behind two zeros and the four of a, at 9, 10
    where = torch.tensor([[1, 9], [2, 10]])
    r2 = torch.stack([layer(model, f"heads.{k}.layer.0").weight.detach().abs().amax((0, 2, 3))[where].amax(1) for k in (0, 1)])
    assert torch.allclose(written(layer(model, "stages.0.b")), r2.amax(0), rtol=0.02)


def test_a_grouped_convolution_reads_its_own_channels():
    # Four channels in two groups: outputs 0, 1 read channels 0, 1; outputs 2, 3 read channels 2, 3.
    first = put(nn.Conv2d(1, 4, 1, bias=False), [1.0, 1.0, 1.0, 1.0])
    second = put(nn.Conv2d(4, 4, 1, groups=2, bias=False), [[1.0, 4.0], [2.0, 16.0], [25.0, 1.0], [9.0, 36.0]])
    model = chain([first, second], [nn.Flatten()])
    equalize(model)
    assert layer(model, "stages.0.0").weight.flatten().tolist() == pytest.approx([2**0.5, 4.0, 5.0, 6.0])
    got = layer(model, "stages.0.1").weight.flatten().tolist()
    assert got == pytest.approx([2**-0.5, 1.0, 2**0.5, 4.0, 5.0, 1 / 6, 9 / 5, 6.0])


# Where it is not valid -----------------------------------------------------------------------------------------


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Sum(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)

    def forward(self, x):
        return x + self.conv(x)


REFUSED = {
    "ReLU6": nn.ReLU6(),
    "Hardtanh": nn.Hardtanh(),
    "Sigmoid": nn.Sigmoid(),
    "sigmoid": Call(torch.sigmoid),
    "LocalResponseNorm": LocalResponseNorm(3),
    "BatchNorm2d": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)),  # stands before its convolution: not folded
    "an addition": Sum(3),
    "view": Call(lambda x: x.view(-1, 3, 14, 14)),
    "transpose": Call(lambda x: x.transpose(2, 3)),
    "softmax": Call(lambda x: x.softmax(1)),
    "ConvTranspose2d": nn.ConvTranspose2d(3, 3, 1),
    "getitem": Call(lambda x: x[:, :3]),
    "cat": Call(lambda x: torch.cat([x, x], 2)),  # along another axis
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_lets_no_factor_through_is_refused(said):
    torch.manual_seed(0)
    model = uneven(
        AnytimeModel(
            [nn.Sequential(nn.Conv2d(2, 3, 3), copy.deepcopy(REFUSED[said]))], [nn.Sequential(nn.Conv2d(3, 5, 14), nn.Flatten())]
        )
    )
    want = outputs(model, (2, 16, 16))
    done = equalize(model)
    assert said in done.refused["stages.0.0"] and "stages.0.0" not in {w for w, _ in done.pairs}
    assert same(outputs(model, (2, 16, 16)), want)


def test_one_reader_that_cannot_is_enough():
    """The next stage could be scaled, the head's sigmoid could not."""
    model = chain([nn.Conv2d(1, 2, 1)], [nn.Sigmoid(), nn.Flatten()], [nn.Conv2d(2, 2, 1), nn.Flatten()], [nn.Linear(32, 2)])
    done = equalize(model)
    assert done.pairs == (("stages.1.0", "heads.1.0"),)
    assert done.refused["stages.0.0"] == "is read by Sigmoid (heads.0.0)"


class Beside(nn.Module):
    """Two maps of different sizes, flattened, side by side: which features are whose is not known without the sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.pool = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1), nn.AvgPool2d(2)

    def forward(self, x):
        return torch.cat([self.a(x).flatten(1), self.pool(self.b(x)).flatten(1)], 1)


ODD_AXES = [  # what follows a layer with as many outputs as something else has, and the input
    ([nn.Conv2d(1, 8, 1), nn.Linear(8, 4), nn.Flatten()], (1, 8, 8), "along another axis (stages.0.1)"),  # over the width
    ([nn.Conv2d(1, 4, 1), nn.Flatten(2), nn.Linear(16, 4), nn.Flatten()], (1, 4, 4), "Flatten (stages.0.1)"),  # over the pixels
    ([nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 2)], (3, 4), "along another axis (stages.0.2)"),  # features of 3 tokens
    (
        [nn.Linear(4, 6), nn.MaxPool2d(3, 1, 1), nn.Linear(6, 2), nn.Flatten()],
        (1, 3, 4),
        "MaxPool2d (stages.0.1)",
    ),  # over features
    ([Beside(), nn.Linear(24, 2)], (1, 4, 4), "cat (stages.0.cat)"),
]


@pytest.mark.parametrize("layers, shape, said", ODD_AXES, ids=lambda v: v if isinstance(v, str) else "")
def test_another_axis_than_the_channels_is_refused(layers, shape, said):
    torch.manual_seed(0)
    model = uneven(AnytimeModel([nn.Sequential(*copy.deepcopy(layers))], [nn.Flatten()]))
    want = outputs(model, shape)
    done = equalize(model)
    assert next(iter(done.refused.values())).endswith(said)
    assert same(outputs(model, shape), want)


def test_dead_channels_are_left_alone():
    # Channel 0 writes nothing, channel 1 is off (as weight decay leaves it), channel 2 is not read.
    first = put(nn.Linear(1, 4), [[0.0], [1e-9], [1.0], [4.0]], [1.0, 1.0, 1.0, 1.0])
    model = chain([first, nn.ReLU()], [put(nn.Linear(4, 1), [[1.0, 1.0, 0.0, 1.0]])])
    equalize(model)
    assert layer(model, "stages.0.0").weight.flatten().tolist() == pytest.approx([0.0, 1e-9, 1.0, 2.0])
    assert layer(model, "stages.0.0").bias.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5])
    assert layer(model, "heads.0.0").weight.flatten().tolist() == pytest.approx([1.0, 1.0, 0.0, 2.0])


def test_only_the_float_chain_is_taken():
    model = Tiny().build((3, 16, 16), 4)
    with pytest.raises(Unsupported, match="traced"):
        equalize(model)
    with pytest.raises(Unsupported, match="before quantizers"):
        equalize(quantized(model, Widths(8, 8), "u8s8").model)


def test_it_is_worth_it_at_four_bits():
    """One tensor with channels that lie apart by 64 loses the small ones to its only step; equalized it does not."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        f = 2.0 ** torch.arange(-3, 5)[:8]
        first.weight *= f.view(-1, 1, 1, 1)
        first.bias *= f
        second.weight /= f.view(1, -1, 1, 1)
    x = torch.randn(64, 3, 8, 8)

    def error(model):
        net = quantized(model, Widths(8, 4, edge=4), "u8s8")
        net.calibrate(net.observe(x), "minmax", "minmax")
        with torch.no_grad():
            return float((net.model(x) - model(x)).square().mean())

    model = chain([first, nn.ReLU()], [second, nn.Flatten()])
    before = error(model)
    equalize(model)
    assert error(model) < before / 4


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        a = self.a(x)
        return torch.relu(self.b(a)) + a.mT


def test_a_tensor_that_an_attribute_turns_is_left_alone():
    torch.manual_seed(0)
    model, x = AnytimeModel([Turned()], [nn.Sequential(nn.Flatten(), nn.Linear(256, 3))]).eval(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        model.stages[0].a.weight[0] *= 20
        want, chain = model(x), traced(model)
        done = equalize(chain)
        assert torch.allclose(chain(x), want, atol=1e-5)
    assert done.refused["stages.0.a"] == "is read by getattr (stages.0.getattr_1)"


def test_a_layer_behind_mT_is_quantized():

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(self.a(x).mT)

    net = prepared(
        AnytimeModel([Mixer()], [nn.Sequential(nn.Flatten(), nn.Linear(48, 3))]).eval(),
        torch.randn(8, 6, 8),
        Widths(8, 8),
        "u8s8",
        "minmax",
        "minmax",
    )
    assert set(net.bits) == {"stages.0.a", "stages.0.b", "heads.0.1"}
    assert net.sources["stages.0.b"].name == "stages.0:a"
