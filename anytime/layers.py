"""Layers that torch lacks or computes slowly, and blocks that several networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch's LRN over 3 channels, several times faster: sums of shifted squares instead of a 3-d pooling.

    x [B, C, ...] -> x / (k + alpha/3 * sum of x^2 over the channel and its two neighbours)^beta.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        if size != 3:
            raise ValueError(f"size {size}: this LRN is written for 3 channels; use torch.nn.LocalResponseNorm")
        super().__init__(size, alpha, beta, k)

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().square()
        padded = pad(square, (0,) * (2 * (x.ndim - 2)) + (1, 1))
        base = (padded[:, :-2] + square + padded[:, 2:]).mul(self.alpha / 3).add(self.k)
        # base^-0.75 by two square roots costs a fraction of pow
        factor = base.rsqrt() * base.sqrt().rsqrt() if self.beta == 0.75 else base.pow(-self.beta)
        return x * factor.to(x.dtype)


class ZeroPadShortcut(nn.Module):
    """Take every ``stride``-th pixel and add zero channels, ``front`` before and ``back`` behind: no parameters, no MACs.

    x [B, C, H, W] -> [B, front + C + back, ceil(H / stride), ceil(W / stride)].
    Source: He et al., CVPR 2016, arXiv:1512.03385, section 4.2, option A.
    """

    def __init__(self, stride: int, front: int, back: int) -> None:
        super().__init__()
        self.stride, self.front, self.back = stride, front, back

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, front={self.front}, back={self.back}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around which ``shortcut`` leads: relu(f(x) + shortcut(x)).

    x [B, c_in, H, W] -> [B, c_out, ceil(H / stride), ceil(W / stride)].
    Source: He et al., CVPR 2016, arXiv:1512.03385, figure 2.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut, self.relu = shortcut, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))  # type: ignore[no-any-return]


class MixedPool2d(nn.Module):
    """alpha * max pooling + (1 - alpha) * average pooling over windows of ``size``; alpha is learned, without bounds.

    x [B, C, H, W] -> [B, C, H // size, W // size]. alpha starts uniform in [0, 1].
    Source: Lee, Gallagher, Tu, AISTATS 2016, arXiv:1509.08985, section 3.1 (one alpha per layer); Kaya, Hong, Dumitras,
    ICML 2019, arXiv:1810.07052 (the start).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.alpha = nn.Parameter(torch.rand(1))
        self.max, self.avg = nn.MaxPool2d(size), nn.AvgPool2d(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * self.max(x) + (1 - self.alpha) * self.avg(x)  # type: ignore[no-any-return]


def he_normal(net: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Start every convolution from N(0, 2 / fan), every bias of one from 0.

    Source: He et al., ICCV 2015, arXiv:1502.01852, section 2.2.
    """
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class SlicedConv2d(nn.Module):
    """A convolution, stride 1 and no bias, whose weight is joined of slices that other convolutions may hold too.

    ``slices``: parameters of one shape, joined along ``dim`` of the weight [O, I/groups, k, k]. A network that uses
    only the first of another's channels holds only the slices that it multiplies, so its parameters and MACs are its
    own. The joining is a copy of the weight at every call; ``plain`` pays it once.
    """

    def __init__(self, slices: Sequence[nn.Parameter], dim: int = 0, padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.dim, self.padding, self.groups = dim, padding, groups
        for i, part in enumerate(slices):
            self.register_parameter(f"slice_{i}", part)

    @staticmethod
    def cut(conv: nn.Conv2d, n: int, dim: int = 0) -> list[nn.Parameter]:
        """The weight of ``conv`` in ``n`` equal slices."""
        return [nn.Parameter(part.clone()) for part in conv.weight.detach().chunk(n, dim)]

    @property
    def weight(self) -> Tensor:
        """[O, I/groups, k, k], made anew at every call."""
        return torch.cat(list(self.parameters()), self.dim)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, None, padding=self.padding, groups=self.groups)

    def plain(self) -> nn.Conv2d:
        """The same convolution with a weight of its own, shared with nobody."""
        weight = self.weight.detach()
        out, per_group, kernel, _ = weight.shape
        conv = nn.Conv2d(per_group * self.groups, out, kernel, padding=self.padding, groups=self.groups, bias=False)
        conv.weight = nn.Parameter(weight)
        return conv.train(self.training)

    def reset_parameters(self) -> None:
        """Draw all its slices as torch draws a whole convolution's weight; of those that share a slice the last one decides."""
        conv = self.plain()
        conv.reset_parameters()
        with torch.no_grad():
            for part, drawn in zip(self.parameters(), conv.weight.chunk(len(list(self.parameters())), self.dim), strict=True):
                part.copy_(drawn)
