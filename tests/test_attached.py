"""Exits on networks that have none: equal to the original at the last exit, and clear about what cannot be done."""

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from anytime.axes import axes_of
from anytime.backend import TorchNet
from anytime.cost import account
from anytime.dataset import torchvision
from anytime.datasets.synthetic import Synthetic
from anytime.errors import AnytimeError, Unsupported, UsageError
from anytime.model import AnytimeModel, Segment
from anytime.models.attached import Attached, _needed, _Shapes, _Tracer
from anytime.models.static import Static
from anytime.quant.graph import Widths, prepared, traced
from anytime.quant.onnx_graph import OnnxChain
from anytime.train import Recipe
from anytime.workshop import Workshop
from tests.test_onnx_graph import session_of

HERE = __name__  # backbones of this file are "tests.test_attached:factory"


def attached(factory, *at, **more):
    return Attached(f"{HERE}:{factory.__name__}", at, **more)


def in_turn(model, x):
    """What every stage hands on."""
    states = []
    for stage in model.stages:
        x = stage(x)
        states.append(x)
    return states


@pytest.mark.parametrize(
    "backbone, at, shape, live",
    [
        ("resnet18", ("layer1", "layer2.0", "layer3.1.conv1"), (3, 32, 32), [1, 1, 2, 1]),
        ("densenet121", ("features.transition1", "features.denseblock2.denselayer5"), (3, 32, 32), [1, 6, 1]),
        ("vgg16_bn", ("features.13", "features.23", "classifier.1"), (3, 32, 32), [1, 1, 1, 1]),
        ("mobilenet_v2", ("features.3", "features.10.conv.0", "features.13"), (3, 32, 32), [1, 2, 1, 1]),
        ("squeezenet1_1", ("features.5", "features.9.squeeze"), (3, 32, 32), [1, 1, 1]),
        ("alexnet", ("features.2", "features.5"), (3, 63, 63), [1, 1, 1]),
        ("googlenet", ("inception3b",), (3, 64, 64), [1, 1]),
        ("shufflenet_v2_x0_5", ("stage2", "stage3.1"), (3, 64, 64), [1, 1, 1]),
        ("resnet152", ("layer1", "layer3.20"), (3, 32, 32), [1, 1, 1]),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_the_last_exit_is_the_original_and_costs_the_same(backbone, at, shape, live):
    """Floats to accuracy, MACs exactly: no operation is lost, and none is run twice."""
    spec, x = Attached(backbone, at), torch.randn(2, *shape)
    torch.manual_seed(0)
    whole = torchvision().models.get_model(backbone, weights=None, num_classes=10).eval()
    torch.manual_seed(0)
    model = spec.build(shape, 10).eval()
    with torch.no_grad():
        want = whole(x)
        with FlopCounterMode(display=False) as counter:
            whole(x[:1])
        assert torch.allclose(model(x)[-1], want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
        assert [len(s) if isinstance(s, tuple) else 1 for s in in_turn(model, x)] == live
    last = model.n_exits - 1
    assert account(TorchNet(model, {}, simulated=False), shape).path((last,), last) == counter.get_total_flops() / 2


@pytest.mark.parametrize("backbone, weights, at", [
    ("resnet18", "ResNet18_Weights", "layer2"),
    ("mobilenet_v2", "MobileNet_V2_Weights", "features.6"),
    ("squeezenet1_1", "SqueezeNet1_1_Weights", "features.5"),
])  # fmt: skip
def test_it_costs_what_torchvision_publishes(backbone, weights, at):
    meta = getattr(torchvision().models, weights).DEFAULT.meta
    model = Attached(backbone, (at,)).build((3, 224, 224), 1000).eval()
    assert account(TorchNet(model, {}, simulated=False), (3, 224, 224)).path((1,), 1) / 1e9 == pytest.approx(
        meta["_ops"], abs=0.0055
    )
    own = [*model.stages.parameters(), *model.heads[-1].parameters()]
    assert sum(p.numel() for p in own) == meta["num_params"]


def test_an_exit_pays_only_for_what_it_needs():
    """The shortcut's projection is traced after the block's convolutions, and the tap before its sum needs none of it."""
    whole = account(TorchNet(Attached("resnet18", ("layer2",)).build((3, 32, 32), 10), {}, simulated=False), (3, 32, 32))
    inside = account(
        TorchNet(Attached("resnet18", ("layer2.0.downsample", "layer2")).build((3, 32, 32), 10), {}, simulated=False), (3, 32, 32)
    )
    # without the second block of layer2 and without the two 3x3 convolutions of its first, on maps of 4x4
    assert whole.stage.macs[0] - inside.stage.macs[0] == 16 * 9 * (64 * 128 + 3 * 128 * 128)
    assert inside.path((1,), 1) == whole.path((0,), 0)


def test_the_order_of_names_does_not_matter():
    a, b = (Attached(at=at).build((3, 32, 32), 10) for at in (("features.3", "features.6"), ("features.6", "features.3")))
    assert list(a.state_dict()) == list(b.state_dict())
    assert [h[-1].in_features for h in list(a.heads)[:2]] == [24, 32]


def test_a_network_without_exits_is_one_of_its_static_twins():
    torch.manual_seed(0)
    model = Static(Attached()).build((3, 32, 32), 10).eval()
    assert (model.n_exits, len(model.stages[0])) == (1, 4)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(traced(model)(x), model(x), atol=1e-5)


class Awkward(nn.Module):
    """In-place operations of every spelling, a parameter and a module used on both sides of any cut, a long shortcut."""

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.a(x)
        first = x
        x = self.relu(self.b(x) + self.shift)
        x *= 2
        x = F.relu(x - 1, inplace=True).add_(first)
        x = self.relu(self.b(x) * self.shift)
        x += first
        return self.fc(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def test_a_network_of_ones_own():
    spec = attached(Awkward, "a", "mul", "b", "add_1")
    torch.manual_seed(0)
    whole = Awkward(num_classes=10).eval()
    torch.manual_seed(0)
    model = spec.build((3, 16, 16), 10)
    assert model.training
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model(x)[-1], whole(x), atol=1e-6)
        states = in_turn(model, x)
        assert [len(s) if isinstance(s, tuple) else 1 for s in states] == [1, 2, 2, 1, 1]
        assert torch.equal(states[1][1], states[0])  # the shortcut is handed on as it was
    shared = [id(p) for stage in model.stages for p in set(stage.parameters())]
    assert len(set(shared)) < len(shared)  # weights used on both sides of a cut stay one


class Gated(nn.Module):
    """A value that hangs on no sample is used on both sides of any cut; its second argument stays what it is."""

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, num_classes)
        self.gate = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x, features=False):
        gate = torch.sigmoid(self.gate)
        x = F.relu(self.a(x) * gate)
        if features:
            return x
        return self.fc(F.relu(self.b(x) * gate).mean((2, 3)))


def test_the_state_holds_samples_only():
    torch.manual_seed(0)
    whole = Gated(num_classes=10).eval()
    torch.manual_seed(0)
    model, x = attached(Gated, "relu").build((3, 16, 16), 10).eval(), torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        (state, _), left = in_turn(model, x), torch.tensor([1, 4])
        assert state.shape == (6, 4, 14, 14)
        # Those that have not left go on alone.
        assert torch.allclose(model.heads[1](model.stages[1](state[left])), whole(x)[left], atol=1e-6)
    assert model.stages[0].gate is model.stages[1].gate


class Sized(nn.Module):
    """A size is read at the beginning and needed at the end."""

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3), nn.Linear(4 * 25, num_classes)

    def forward(self, x):
        x = self.a(x)
        n = x.shape[0]
        return self.fc(self.b(x.reshape(n, 4, 7, 7)).reshape(n, 4, 25).flatten(1))


class Hidden(Sized):
    """Changes in place what it reads again, and drops the answer."""

    def forward(self, x):
        x = self.a(x)
        x.add_(1)
        return self.fc(self.b(x).flatten(1))


class Choosy(Sized):
    """Its way depends on values."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Two(Sized):
    """Two inputs."""

    def forward(self, x, y=(1,)):
        return super().forward(x) * y[0]


class Awry(nn.Module):
    """Channels in two axes, windows joined with samples, axes cut across, in an order of their own, tokens before samples."""

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.a(x)
        heads = x.unflatten(1, (2, 2)).relu().flatten(1, 2)
        windows = x.view(-1, 4, 2, 8, 16).transpose(1, 2).reshape(-1, 4, 8, 16).tanh()
        windows = windows.reshape(-1, 2, 4, 8, 16).transpose(1, 2).reshape(-1, 4, 16, 16)
        across = x.view(-1, 32, 32).sigmoid().view(-1, 4, 16, 16)
        ordered = torch.einsum("bchw->bhcw", x).transpose(1, 2)
        x = x + heads + windows + across + ordered
        return self.fc(x.flatten(2).permute(2, 0, 1).exp().mean(0))


def features(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, num_classes))


def nothing(num_classes):
    return num_classes


def broken(num_classes):
    raise ValueError("no such network")


def maps(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.ReLU())


def vit(num_classes):
    return torchvision().models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=num_classes)


def swin(num_classes):
    return torchvision().models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=num_classes)


def convnext(num_classes):
    block = torchvision().models.convnext.CNBlockConfig
    return torchvision().models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=num_classes)


def maxvit(num_classes):
    """Maps whose windows are tokens inside its blocks, for images of one size only."""
    return torchvision().models.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 4, 0.0, num_classes=num_classes)


class Mixer(nn.Module):
    """Patches cut by reshaping, a layer that mixes them and one that mixes their channels."""

    def __init__(self, num_classes):
        super().__init__()
        self.patches, self.tokens, self.channels = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = x.reshape(-1, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 192)
        x = self.patches(x)
        x = x + F.relu(self.tokens(x.mT)).transpose(1, 2)
        x = x + F.relu(self.channels(x))
        return self.fc(x.mean(1))


class Rows(nn.Module):
    """A grey image as a sequence of its rows, with attention by hand."""

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.qkv, self.b, self.fc = nn.Linear(32, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.a(x.squeeze(1)).relu()
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.b((q @ k.mT).softmax(-1) @ v)
        return self.fc(x.relu().mean(1))


@pytest.mark.parametrize(
    "factory, at, places, colours",
    [
        (vit, "encoder.layers.encoder_layer_0", 1, 3),
        (swin, "features.1", (1, 2), 3),
        (swin, "features.2.reduction", (1, 2), 3),
        (convnext, "features.1", (2, 3), 3),
        (convnext, "features.1.0.block.3", (1, 2), 3),
        (Mixer, "channels", 1, 3),
        (Mixer, "tokens", 2, 3),
        (Rows, "a", 1, 1),
        (Rows, "b", 1, 1),
    ],
)
def test_an_exit_reads_the_mean_over_all_places_wherever_the_channels_are(factory, at, places, colours):
    shape = (colours, 32, 32)
    torch.manual_seed(0)
    whole, seen = factory(num_classes=10).eval(), []
    whole.get_submodule(at).register_forward_hook(lambda m, read, made: seen.append(made))
    torch.manual_seed(0)
    model, x, left = attached(factory, at).build(shape, 10).eval(), torch.randn(6, *shape), torch.tensor([1, 4])
    with torch.no_grad():
        want, got = whole(x), model(x)
        layer = model.heads[0][-1]
        assert torch.allclose(got[0], layer(seen[0].mean(places)), atol=1e-5)
        assert torch.allclose(got[1], want, atol=1e-5)
        assert torch.allclose(traced(model)(x), got, atol=1e-5)
        state = model.stages[0](x)  # those that have not left go on alone
        state = tuple(s[left] for s in state) if isinstance(state, tuple) else state[left]
        assert torch.allclose(model.heads[1](model.stages[1](state)), want[left], atol=1e-5)
    cost = account(TorchNet(model, {}, simulated=False), shape)
    assert cost.head.macs[0] == layer.in_features * 10
    one_piece = account(TorchNet(AnytimeModel([whole], [nn.Identity()]), {}, simulated=False), shape)
    assert cost.path((1,), 1) == one_piece.path((0,), 0)


def letters_of(spec, size, larger=None):
    """By the name of each value with more than two axes: their letters and sizes, in a larger image too; nothing is computed."""
    with torch.device("meta"):
        net, tracer = spec._backbone(10).eval(), _Tracer()
        shapes = spec._trace(tracer, net, torch.empty(2, 3, size, size))
        grown = _Shapes(fx.GraphModule(net, tracer.graph))
        grown.run(torch.empty(2, 3, larger or size, larger or size))
    nodes = [n for n in tracer.graph.nodes if n in _needed(tracer.graph.output_node())]
    letters, after = axes_of(net, nodes, shapes), {n.name: shape for n, shape in grown.of.items()}
    paths = {n: path for path, n in tracer.returned.items()}
    values = [n for n in nodes if n.op != "get_attr" and isinstance(shapes[n], torch.Size) and len(shapes[n]) > 2]
    return {paths.get(n, n.name): (letters.get(n), shapes[n], after[n.name]) for n in values}


@pytest.mark.parametrize(
    "spec", [attached(swin), attached(convnext), Attached("shufflenet_v2_x0_5")], ids=["swin", "convnext", "shufflenet"]
)
def test_the_places_are_the_axes_that_change_with_the_image(spec):
    for name, (letters, before, after) in letters_of(spec, 64, 128).items():
        moved = [m != n or m == 1 for m, n in zip(before, after, strict=True)]  # pooled places are one, whatever the image
        assert letters == "b" + "".join("s" if m else "c" for m in moved[1:]), name


@pytest.mark.parametrize(
    "spec, size, wanted",
    [
        (Attached("convnext_tiny"), 32, {"features.3": "bcss", "features.5.8.block.0": "bcss", "features.5.8.block.3": "bssc"}),
        (Attached("swin_t"), 32, {"features.1": "bssc", "features.5.3.attn": "bssc"}),
        (Attached("swin_v2_t"), 32, {"features.3": "bssc"}),
        (Attached("vit_b_16"), 224, {"conv_proj": "bcss", "encoder.layers.encoder_layer_5": "bsc"}),
        (attached(maxvit), 64, {"blocks.1": "bcss", "blocks.1.layers.0.layers.grid_attention.mlp_layer": "bssc"}),
    ],
    ids=["convnext", "swin", "swin v2", "vit", "maxvit"],
)
def test_where_the_networks_of_torchvision_keep_their_channels(spec, size, wanted):
    found = letters_of(spec, size)
    assert {name: found[name][0] for name in wanted} == wanted


@pytest.mark.parametrize("at", [("features.1", "features.1.0.block.3"), ("features.1.0.block.3",)])
def test_exits_on_channels_that_come_last_are_quantized(at):
    torch.manual_seed(0)
    model, x = attached(convnext, *at).build((3, 32, 32), 10).eval(), torch.randn(16, 3, 32, 32)
    net = prepared(model, x, Widths(8, 8), "u8s8", "minmax", "minmax")
    assert {path for path, _ in net.layers() if path.startswith("heads")} == {
        f"heads.{k}.{len(model.heads[k]) - 1}" if k < len(at) else f"heads.{k}.classifier.2" for k in range(len(at) + 1)
    }
    with torch.no_grad():
        want, got = model(x), net.freeze(round_bias=True)(x)
    assert 0 < (got - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize(
    "factory, at, no_integers",
    [
        (vit, "encoder.layers.encoder_layer_0", "encoder_layer_0.self_attention gives several tensors"),
        (Rows, "b", "no quantizer for the function matmul"),
        (swin, "features.1", r"in silence: stages.0.features.1.0.attn \(no quantizer for ShiftedWindowAttention\)"),
        (convnext, "features.1", ""),
    ],
)
def test_what_has_no_integers_is_said_by_its_name_and_runs_in_floats(factory, at, no_integers):
    shape = (1 if factory is Rows else 3, 32, 32)
    model, x = attached(factory, at).build(shape, 10).eval(), torch.randn(4, *shape)
    if no_integers:
        with pytest.raises(Unsupported, match=no_integers):
            prepared(model, x, Widths(8, 8), "u8s8", "minmax", "minmax")
    session = session_of(OnnxChain(traced(model), shape, True).write(Segment(0, 1, 0)))
    with torch.inference_mode():
        want = model(x)[0].numpy()
    assert np.allclose(session.run(["logits"], {"x": x.numpy()})[0], want, atol=1e-5)


def test_exits_on_features():
    model = attached(features, "2").build((3, 16, 16), 10)
    assert isinstance(model.heads[0], nn.Sequential) and [type(m) for m in model.heads[0]] == [nn.Linear]


@pytest.mark.parametrize(
    "spec, said",
    [
        (Attached("resnet1"), "'resnet1' is no classifier of torchvision.*did you mean 'resnet18'"),
        (Attached("nope.nowhere:net"), "'nope.nowhere' cannot be imported"),
        (Attached(f"{HERE}:awkward"), "has no factory 'awkward'; did you mean 'Awkward'"),
        (attached(nothing, "a"), "it made a int, not a torch.nn.Module"),
        (attached(broken, "a"), r"the call with num_classes=10 failed \(no such network\)"),
        (attached(maps, "0"), "gives 10x14x14 for each input, not 10 logits"),
        (Attached(at=()), "names no node"),
        (Attached(at=("features.33",)), "no module or node 'features.33'; did you mean 'features.3'"),
        (Attached(at=("zzz",)), "no module or node 'zzz'; there is features.0.0, "),
        (Attached(at=("classifier.1",)), "nothing is left to compute between 'classifier.1' and the last layer"),
        (Attached(at=("classifier.0",)), "nothing is left to compute"),
        (Attached(at=("features.3", "add")), "'features.3' and 'add' are the same value"),
        (attached(Sized, "b"), "goes through 'getitem', a int where only tensors"),
        (attached(Hidden, "a"), "gives other logits"),
        (attached(Choosy, "a"), "cannot be traced by torch.fx"),
        (attached(Two, "a"), "takes more than one input"),
        (
            attached(Awry, "relu"),
            "'relu' gives 2x2x2x16x16 for 2 inputs, and which one axis of it holds the channels cannot be told",
        ),
        (attached(Awry, "tanh"), "'tanh' gives 4x4x8x16 for 2 inputs, and which one axis"),
        (attached(Awry, "sigmoid"), "'sigmoid' gives 2x32x32 for 2 inputs, and which one axis"),
        (attached(Awry, "einsum"), "'einsum' gives 2x16x4x16 for 2 inputs, and which one axis"),
        (attached(Awry, "exp"), "goes through 'exp', whose first axis is not that of the samples.*batch_first=True"),
    ],
)
def test_what_cannot_be_done_is_said(spec, said):
    with pytest.raises(UsageError, match=said):
        spec.build((3, 16, 16) if ":" in spec.backbone else (3, 32, 32), 10)


def test_a_size_that_the_trunk_cannot_take():
    with pytest.raises(UsageError, match="alexnet cannot take inputs of 3x16x16"):
        Attached("alexnet", ("features.2",)).build((3, 16, 16), 10)


def test_weights_are_loaded_strictly_and_name_what_they_have_seen(tmp_path):
    torch.manual_seed(1)
    theirs = torchvision().models.squeezenet1_1(num_classes=10)
    path = tmp_path / "theirs.pt"
    torch.save(theirs.state_dict(), path)
    spec = Attached("squeezenet1_1", ("features.5",), weights=str(path), trained_on=("abc",))
    model, x = spec.build((3, 32, 32), 10).eval(), torch.randn(2, 3, 32, 32)
    assert model.trained_on == {"abc"}
    with torch.no_grad():
        assert torch.allclose(model(x)[-1], theirs.eval()(x), atol=1e-6)


class Grey(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.Linear(4 * 9, num_classes)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).flatten(1))


def test_new_exits_on_a_trained_network_are_trained_and_its_static_twin_is_taken_as_it_is(tmp_path):
    path = tmp_path / "theirs.pt"
    torch.save(Grey(4).state_dict(), path)
    spec = attached(Grey, "a", weights=str(path), trained_on=("elsewhere",))
    shop, data = Workshop(tmp_path), Synthetic(n=800, size=16, n_classes=4)
    net, twin = (shop.trained(data, model, Recipe(epochs=1), 0, 0) for model in (spec, Static(spec)))
    assert net.trained_on == {"elsewhere", shop.data(data, 0).train.digest}
    as_built = shop._built(data, spec, 0, 0)
    assert not torch.equal(net.heads[0][-1].weight, as_built.heads[0][-1].weight)
    assert twin.trained_on == {"elsewhere"}
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(twin(x)[-1], as_built.eval()(x)[-1])


@pytest.mark.parametrize(
    "content, said",
    [
        (b"no checkpoint", "no state dict that loads with weights_only=True"),
        ({"epoch": 3}, "holds no state dict"),
        (nn.Linear(2, 2), "no state dict that loads with weights_only=True"),
        ({"fc.weight": torch.zeros(3, 4), "fd.weight": torch.zeros(1)}, "do not fit.*5 missing.*1 unknown .fd.w.*1 of another shape .fc.w"),
    ],
    ids=["bytes", "no tensors", "a pickled network", "another network"],
)  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, content, said):
    path = tmp_path / "w.pt"
    with pytest.raises(AnytimeError, match="there is no file .*w.pt: give"):  # no wrong question: a row that fails
        attached(Sized, "a", weights=str(path), trained_on=("abc",)).build((3, 16, 16), 10)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=said):
        attached(Sized, "a", weights=str(path), trained_on=("abc",)).build((3, 16, 16), 10)
    with pytest.raises(UsageError, match="say by trained_on"):
        attached(Sized, "a", weights=str(path)).build((3, 16, 16), 10)


@pytest.mark.parametrize(
    "spec", [Attached(), Attached("densenet121", ("features.denseblock2.denselayer5",))], ids=["mobilenet", "dense"]
)
def test_it_is_written_as_onnx_and_quantized(spec):
    torch.manual_seed(0)
    model, x = spec.build((3, 32, 32), 10), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for _ in range(10):
            model(x)  # BatchNorm has seen something, else nothing is left of the signal
    chain = prepared(model.eval(), x, Widths(8, 8), "u8s8", "minmax", "minmax").freeze(round_bias=True)
    with torch.inference_mode():
        want = chain(x).numpy()
    writer, state = OnnxChain(chain, (3, 32, 32), True), [x.numpy()]
    for k in range(chain.n_exits):
        proto = writer.write(Segment(k, k + 1, k))
        session = session_of(proto)
        logits, *state = session.run(None, dict(zip([i.name for i in proto.graph.input], state, strict=True)))
        # A value that falls to the other side of a step of some grid moves the logits of its sample (AVX2: 0.055 of DenseNet's).
        assert np.abs(logits - want[k]).max() <= 0.08 * np.abs(want[k]).max()


class Folded(nn.Module):
    """Channels that are folded into the axis of the samples, and read on both sides of a cut."""

    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, num_classes)

    def forward(self, x):
        folded = self.a(x).flatten(0, 1).softmax(-1)
        x = F.relu(self.b(folded.unflatten(0, (-1, 8))))
        return self.fc((self.b(x) + folded.unflatten(0, (-1, 8))).mean((2, 3)))


def test_a_value_with_samples_folded_into_its_first_axis_crosses_no_cut():
    with pytest.raises(UsageError, match="goes through 'softmax', whose first axis is not that of the samples"):
        attached(Folded, "relu").build((3, 16, 16), 10)
