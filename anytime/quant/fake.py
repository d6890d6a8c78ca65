"""Modules that round as integers would, with a straight-through gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from anytime.quant.ranges import Grid, Histogram


class FakeQuant(nn.Module):
    """One Q/DQ pair on an activation, shared by everything that reads the tensor.

    ``mode``: "extremes" and "values" only watch (calibration's two passes), "on" rounds. Inside the range the
    gradient is 1, outside 0 (STE). Rounding is half to even, as in ONNX.
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, section 3; Bengio et al. 2013 (STE).
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.qmin: int = -(2 ** (bits - 1)) if signed else 0
        self.qmax: int = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.register_buffer("scale", torch.tensor(float("nan")))  # NaN until calibrated
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.mode: Literal["extremes", "values", "on"] = "extremes"
        self.seen: Histogram | None = Histogram()

    @property
    def calibrated(self) -> bool:
        """Whether it has a grid."""
        return bool(torch.isfinite(self.scale))

    def set(self, grid: Grid) -> None:
        """Take a grid and start to round."""
        self.scale.fill_(grid.scale)
        self.zero_point.fill_(grid.zero_point)
        self.seen = None
        self.mode = "on"

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "on":
            return torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, self.qmin, self.qmax)
        assert self.seen is not None
        (self.seen.see_extremes if self.mode == "extremes" else self.seen.see_values)(x)
        return x

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class _QuantWeight(nn.Module):
    """What QConv2d and QLinear share: weights [O, ...] on a symmetric grid per output channel."""

    weight: Tensor
    weight_scale: Tensor
    weight_bits: int
    on: bool  # False while calibration watches the float network

    def _take(self, bits: int) -> None:
        self.weight_bits, self.on = bits, False
        self.register_buffer("weight_scale", torch.full((self.weight.shape[0],), float("nan")))
        self.register_buffer("_zeros", torch.zeros(self.weight.shape[0], dtype=torch.int32), persistent=False)

    @property
    def weight_qmax(self) -> int:
        """Largest integer; the grid is symmetric, so -weight_qmax is the smallest."""
        return (1 << (self.weight_bits - 1)) - 1

    def rounded(self) -> Tensor:
        """The weight on its grid; the weight as it is until it is calibrated."""
        if not self.on:
            return self.weight
        q = self.weight_qmax
        zeros = self.get_buffer("_zeros")
        return torch.fake_quantize_per_channel_affine(self.weight.float(), self.weight_scale, zeros, 0, -q, q)

    def integers(self) -> Tensor:
        """The weight as integers in [-weight_qmax, weight_qmax], float dtype, same shape."""
        scale = self.weight_scale.view(-1, *(1,) * (self.weight.ndim - 1))
        return (self.weight / scale).round().clamp(-self.weight_qmax, self.weight_qmax)


class QConv2d(_QuantWeight, nn.Conv2d):
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


class QLinear(_QuantWeight, nn.Linear):
    """A linear layer that multiplies rounded weights."""

    def __init__(self, of: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        self._take(bits)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.rounded(), self.bias)
