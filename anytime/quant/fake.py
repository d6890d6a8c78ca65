"""Modules that round as integers would, with a straight-through gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from anytime.errors import Unsupported
from anytime.quant.bits import BitMap
from anytime.quant.ranges import Grid, Histogram

MOST_BIAS = 2.0**30  # integers of a bias: half of what int32 holds, so that what is added to it has room


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """float32 x, rounded: clamp(round(x / scale) + zero_point, qmin, qmax), back in real numbers; no gradient.

    Equal to torch.fake_quantize_per_tensor_affine, whose CPU kernel takes ten times as long.
    """
    low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    scale = x.new_tensor(grid.scale)  # in float32 before it is inverted, as torch does: exact halves round alike
    return x.mul(scale.reciprocal()).round_().clamp_(low, high).mul_(scale)


class Straight(torch.autograd.Function):
    """``on_grid`` with a gradient of 1 where a value rounds to an integer of the grid (above 0 where the grid begins at 0), else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low = 0.0 if grid.zero_point == grid.qmin else (grid.qmin - grid.zero_point - 0.5) * grid.scale
        ctx.high = (grid.qmax - grid.zero_point + 0.5) * grid.scale
        return on_grid(x, grid)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(dy, x, ctx.low, ctx.high), None


class _StraightPerChannel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        v = w / scale
        ctx.save_for_backward((v >= qmin - 0.5) & (v <= qmax + 0.5))
        return v.round_().clamp_(qmin, qmax).mul_(scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy * ctx.saved_tensors[0], None, None, None


class ActivationLearner(nn.Module, ABC):
    """Rounds an activation in a way that learns; lives in a FakeQuant until that settles."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x, rounded."""

    @abstractmethod
    def grid(self) -> Grid:
        """What was learned."""


class Settled(NamedTuple):
    """A weight [O, ...] on its grid: ``weight / scale`` per output channel are integers in qmin..qmax."""

    weight: Tensor
    scale: Tensor  # [O], positive
    qmin: int
    qmax: int


class WeightLearner(nn.Module, ABC):
    """Rounds a weight in a way that learns; lives in a layer until that settles."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The weight, rounded."""

    @abstractmethod
    def settle(self, weight: Tensor) -> Settled:
        """What was learned, equal to ``forward(weight)``."""


class FakeQuant(nn.Module):
    """One Q/DQ pair on an activation, shared by everything that reads the tensor.

    ``name``: the tensor, as calibration knows it. ``mode``: "off" passes, "extremes" and "values" only watch
    (calibration's two passes), "on" rounds. Inside the range the gradient is 1, outside 0 (STE). Rounding is half to
    even, as in ONNX. A ``learner`` rounds in its place while it is trained.
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, section 3; Bengio et al. 2013 (STE).
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, signed: bool, name: str = "") -> None:
        super().__init__()
        self.signed, self.name = signed, name
        self.resize(bits)
        self.register_buffer("scale", torch.tensor(float("nan")))  # NaN until calibrated
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.shared = False  # by several tensors
        self.mode: Literal["off", "extremes", "values", "on"] = "off"
        self.seen: Histogram | None = None
        self.learner: ActivationLearner | None = None

    def resize(self, bits: int) -> None:
        """Take another width, before calibration."""
        self.bits = bits
        self.qmin: int = -(2 ** (bits - 1)) if self.signed else 0
        self.qmax: int = 2 ** (bits - 1) - 1 if self.signed else 2**bits - 1

    @property
    def calibrated(self) -> bool:
        """Whether it has a grid."""
        return bool(torch.isfinite(self.scale))

    @property
    def grid(self) -> Grid:
        """Its grid."""
        return Grid(float(self.scale), int(self.zero_point), self.qmin, self.qmax)

    def set(self, grid: Grid) -> None:
        """Take a grid and start to round."""
        self.scale.fill_(grid.scale)
        self.zero_point.fill_(grid.zero_point)
        self.qmin, self.qmax = grid.qmin, grid.qmax
        self.seen, self.mode = None, "on"

    def settle(self) -> None:
        """Take over what the learner has learned, and let go of it."""
        if self.learner is not None:
            self.set(self.learner.grid())
            self.learner = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "on":
            if self.learner is not None:
                return self.learner(x)  # type: ignore[no-any-return]
            return Straight.apply(x.float(), self.grid)  # type: ignore[no-any-return, no-untyped-call]
        if self.mode != "off":
            if not isinstance(x, Tensor):
                raise Unsupported(f"{self.name} gives {type(x).__name__}, not one tensor: no quantizer knows it")
            assert self.seen is not None
            (self.seen.see_extremes if self.mode == "extremes" else self.seen.see_values)(x)
        return x

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class QuantizedLayer(nn.Module):
    """What QConv2d and QLinear share: weights [O, ...] on a symmetric grid per output channel.

    ``weight_qmin`` .. ``weight_qmax`` are its integers: without the lowest one, unless a learner settled on a wider grid.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_bits: int
    on: bool  # False while calibration watches the float network

    def _take(self, bits: int) -> None:
        self.weight_bits, self.on = bits, False
        self.weight_qmax = (1 << (bits - 1)) - 1
        self.weight_qmin = -self.weight_qmax
        self.learner: WeightLearner | None = None
        self.register_buffer("weight_scale", torch.full((self.weight.shape[0],), float("nan")))

    def rounded(self) -> Tensor:
        """The weight on its grid; the weight as it is until it is calibrated."""
        if not self.on:
            return self.weight
        if self.learner is not None:
            return self.learner(self.weight)  # type: ignore[no-any-return]
        scale = per_channel(self.weight_scale, self.weight)
        return _StraightPerChannel.apply(self.weight.float(), scale, self.weight_qmin, self.weight_qmax)  # type: ignore[no-any-return, no-untyped-call]

    def settle(self) -> None:
        """Take over what the learner has learned, and let go of it."""
        if self.learner is not None:
            self.put(self.learner.settle(self.weight))
            self.learner = None

    def put(self, settled: Settled) -> None:
        """Take a weight and its grid."""
        with torch.no_grad():
            self.weight.copy_(settled.weight)
            self.weight_scale.copy_(settled.scale)
        self.weight_qmin, self.weight_qmax = settled.qmin, settled.qmax

    def make_room(self, bias: Tensor, input_scale: Tensor) -> None:
        """Widen the weight scale of channels whose bias [O] is too many steps; where all weights are 0 the bias alone chooses it."""
        least = bias.abs() / (input_scale * MOST_BIAS)
        zero = (self.weight == 0).flatten(1).all(1) & (least > 0)
        self.weight_scale.copy_(torch.where(zero, least, self.weight_scale.maximum(least)))

    def integers(self) -> Tensor:
        """The weight as integers in [weight_qmin, weight_qmax], float dtype, same shape."""
        return (self.weight / per_channel(self.weight_scale, self.weight)).round().clamp(self.weight_qmin, self.weight_qmax)


def check_tensors(model: nn.Module, engine: str) -> None:
    """Unsupported where a tensor between layers is kept in other than 8 bits, which no integer kernel here reads."""
    if odd := sorted({q.bits for q in model.modules() if isinstance(q, FakeQuant)} - {8}):
        raise Unsupported(
            f"{engine} keeps tensors in 8 bits, not in {', '.join(map(str, odd))}: leave out add_bits, or score without the engine"
        )


def overflows(model: nn.Module, bits: BitMap) -> bool:
    """Whether two products of a weight and 8 bits can be more than 16 bits hold: of weights beyond 64, as 8 bits and DoReFa's 7 are."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    return any(b.weight == 8 for b in bits.values()) or any(float(m.integers().abs().max()) > 64 for m in layers)


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """[O] shaped so that it multiplies a weight [O, ...] channel by channel."""
    return values.view(-1, *(1,) * (weight.ndim - 1))


class QConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution that multiplies rounded weights."""

    def __init__(self, of: nn.Conv2d, bits: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(
            {k: v for k, v in of.__dict__.items() if not k.startswith("_") or k == "_reversed_padding_repeated_twice"}
        )
        self.weight, self.bias = of.weight, of.bias
        self._take(bits)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.rounded(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class QLinear(QuantizedLayer, nn.Linear):
    """A linear layer that multiplies rounded weights."""

    def __init__(self, of: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        self._take(bits)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.rounded(), self.bias)
