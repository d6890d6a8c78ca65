"""Operations that torch's exporter writes: the same answers as the chain, at any batch, in floats and in integers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anytime.dataset import torchvision
from anytime.errors import Unsupported
from anytime.model import AnytimeModel, Segment
from anytime.quant.graph import Widths, prepared, traced
from anytime.quant.onnx_graph import OnnxChain
from anytime.quant.onnx_writer import OPSET
from tests.test_onnx_graph import session_of

SHAPE = (4, 9, 9)


class Gate(nn.Module):
    """Squeeze and excitation, as MobileNetV3, EfficientNet and RegNet have it."""

    def __init__(self):
        super().__init__()
        self.less, self.more = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.more(F.silu(self.less(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    """ShuffleNet's: sizes are asked of the tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        y = torch.cat((a, self.conv(b)), dim=1)
        n, c, h, w = y.size()
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Tokens(nn.Module):
    """ConvNeXt's block: linear layers over the channels of every place."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x):
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


class Class(nn.Module):
    """ViT's: a parameter repeated for each sample, then cut out again."""

    def __init__(self):
        super().__init__()
        self.token, self.mix = nn.Parameter(torch.rand(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x):
        rows = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).mT], dim=1)
        return self.mix(rows)[:, 0, :, None, None]


class Attention(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.many = way, nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2)
        if self.way == "module":
            out, _ = self.many(rows, rows, rows, need_weights=False)
        else:
            out = F.scaled_dot_product_attention(rows, rows, rows)
        return out.transpose(1, 2).reshape(x.shape)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


INTEGERS = {
    "gate": Gate,
    "shuffle": Shuffle,
    "tokens": Tokens,
    "class token": Class,
    "an even kernel, same padding": lambda: nn.Conv2d(4, 4, (4, 2), padding="same", dilation=(1, 3)),
    "valid padding": lambda: nn.Conv2d(4, 4, 3, padding="valid"),
    "hardswish": nn.Hardswish,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": nn.PReLU,
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "pooled to 3x3": lambda: nn.AdaptiveAvgPool2d(3),
    "a window that may start in the padding": lambda: nn.MaxPool2d(2, 2, 1, ceil_mode=True),
    "averages, ceil_mode": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "upsampled": lambda: nn.Upsample(scale_factor=2),
    "flattened in part": lambda: nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (9, 9))),
    "a part cut out by indices": lambda: Called(lambda x: torch.cat([x[:, :1], x[:, 1:, :, ::1]], 1)),
    "a factor inside an addition": lambda: Called(lambda x: torch.add(x, x, alpha=0.25) + 1.0),
    "softmax": lambda: nn.Softmax(1),
    "pooled by a function": lambda: Called(lambda x: F.max_pool2d(x, 3, 2)),
    "split and stacked": lambda: Called(lambda x: torch.stack(torch.split(x, 2, dim=1), 1).flatten(1, 2)),
}
FLOATS = {
    "attention, a module": lambda: Attention("module"),
    "attention, a function": lambda: Attention("function"),
    "reflecting padding": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "the batch on another axis": lambda: Called(lambda x: x.flatten(1).T.softmax(0).T.reshape(x.shape)),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
}


def chain(first):
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(4, 4, 1), first)
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)) for _ in range(2)]
    return AnytimeModel([stage, nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())], heads).eval()


def answers(written, x):
    """Logits [2, N, K], link by link: what enters the second stage has crossed a border."""
    state, logits = x.numpy(), []
    for k in range(2):
        proto = written.write(Segment(k, k + 1, k))
        assert proto.opset_import[0].version == OPSET
        assert {t.name for t in proto.graph.initializer} <= {name for node in proto.graph.node for name in node.input}
        session = session_of(proto)
        out, *rest = session.run(None, {session.get_inputs()[0].name: state})
        logits.append(out)
        state = rest[0] if rest else None
    return np.stack(logits)


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("batch", [1, 5])
def test_in_floats(name, batch):
    plain, x = chain((INTEGERS | FLOATS)[name]()), torch.randn(batch, *SHAPE)
    with torch.inference_mode():
        want = plain(x).numpy()
    assert np.allclose(answers(OnnxChain(traced(plain), SHAPE, True), x), want, atol=1e-5)


@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
@pytest.mark.parametrize("name", INTEGERS)
def test_in_integers(name, target):
    """The logits of the twin, but for a few values that lie between two steps."""
    x = torch.randn(64, *SHAPE)
    net = prepared(chain(INTEGERS[name]()), x, Widths(8, 8), target, "minmax", "minmax")
    twin = net.freeze(round_bias=target == "u8s8")
    with torch.inference_mode():
        want = twin(x).numpy()
    off = np.abs(answers(OnnxChain(twin, SHAPE, target == "u8s8"), x) - want)
    assert off.max() <= 0.02 * np.abs(want).max() and off.mean() <= 0.001 * np.abs(want).max()


def test_what_only_moves_values_crosses_in_integers():
    net = prepared(
        chain(Called(lambda x: x.permute(0, 1, 3, 2))), torch.randn(8, *SHAPE), Widths(8, 8), "u8s8", "minmax", "minmax"
    )
    (out,) = [o for o in OnnxChain(net.freeze(True), SHAPE, True).write(Segment(0, 1, None)).graph.output]
    assert out.type.tensor_type.elem_type == 2, "uint8"


@pytest.mark.parametrize(
    "first, said",
    [
        (Called(torch.special.i0), "stages.0.*: no ONNX form is known for special_i0"),
        (nn.LocalResponseNorm(2), "stages.0.1: no ONNX form is known for LocalResponseNorm"),
        (nn.AdaptiveAvgPool2d(4), "stages.0.1: no ONNX form is known for AdaptiveAvgPool2d"),
        (Called(torch.rand_like), "stages.0.*: the ONNX form of rand_like answers otherwise than torch"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(first, said, capsys):
    with pytest.raises(Unsupported, match=said):
        OnnxChain(traced(chain(first)), SHAPE, True).write(Segment(0, 1, 0))
    assert capsys.readouterr() == ("", ""), "the exporter prints what it has traced"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "swin_t"])
def test_torchvisions_classifiers(name):
    torch.manual_seed(0)
    net, x = torchvision().models.get_model(name, weights=None).eval(), torch.randn(2, 3, 64, 64)
    proto = OnnxChain(traced(AnytimeModel([net], [nn.Identity()])), (3, 64, 64), True).write(Segment(0, 1, 0))
    with torch.inference_mode():
        want = net(x).numpy()
    assert np.abs(session_of(proto).run(None, {"x": x.numpy()})[0] - want).max() < 1e-5 * np.abs(want).max()


class Swaps(nn.Module):
    def forward(self, x):
        return torch.cat(x.chunk(2, 1)[::-1], 1)


@pytest.mark.parametrize("bits", [32, 8])
def test_parts_that_are_joined_in_another_order(bits):
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(4, 4, 1), Swaps()), nn.Conv2d(4, 4, 1)]
    chain = AnytimeModel(stages, [nn.Sequential(nn.Flatten(), nn.Linear(324, 4)) for _ in stages]).eval()
    x = torch.rand(3, *SHAPE)
    ready = traced(chain) if bits == 32 else prepared(chain, x, Widths(8, 8), "u8s8", "minmax", "minmax").freeze(round_bias=True)
    proto = OnnxChain(ready, SHAPE, True).write(Segment(0, 2, 1))
    got = session_of(proto).run(None, {proto.graph.input[0].name: x.numpy()})[0]
    assert np.allclose(got, ready(x)[1].detach().numpy(), atol=1e-4)
