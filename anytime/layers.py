"""Layers that torch lacks or computes slowly."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad


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
