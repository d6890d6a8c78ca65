"""QDrop: activations whose step learns while a random share of the values stays in float."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from anytime.quant.fake import ActivationLearner, FakeQuant, on_grid
from anytime.quant.layout import flat
from anytime.quant.ranges import Grid


class DropStep(ActivationLearner):
    """Rounds with a learned step, all but a random ``drop`` of the values; in eval mode all of them. The zero point stays.

    Source: Wei, Gong, Li, Liu, Yu, ICLR 2022, arXiv:2203.05740 (the drop); Esser et al., ICLR 2020, arXiv:1902.08153,
    section 2 (the step's gradient, scaled by 1 / sqrt(N Q_P), N the elements of one sample; QDrop's code counts the batch
    too, and calls a value inside that is clipped by less than half a step).
    """

    def __init__(self, q: FakeQuant, drop: float, generator: torch.Generator, learn: bool = True) -> None:
        super().__init__()
        grid = q.grid
        self.zero_point, self.qmin, self.qmax = grid.zero_point, grid.qmin, grid.qmax
        self.drop, self.generator = drop, generator
        self.step = nn.Parameter(torch.tensor(grid.scale), requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        keep = kept(x, self.drop, self.generator) if self.training and self.drop else None
        return _DropRound.apply(x, self.step, keep, self.grid())  # type: ignore[no-any-return, no-untyped-call]

    def grid(self) -> Grid:
        return Grid(float(self.step.detach()), self.zero_point, self.qmin, self.qmax)


class _DropRound(torch.autograd.Function):
    """Rounded where ``keep`` is 1, left where it is 0.

    d x_hat / d step = round(x / step) - x / step inside, the clipped integer, x_hat / step, outside: so <g, x_hat> - <g
    inside, x>, divided by the step, is all of it. What is dropped adds g x to both products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, keep: Tensor | None, grid: Grid) -> Tensor:
        out = on_grid(x, grid)
        if keep is not None:
            torch.lerp(x, out, keep, out=out)
        ctx.save_for_backward(x, keep, out)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, keep, out), grid = ctx.saved_tensors, ctx.grid
        low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
        dx = torch.ops.aten.hardtanh_backward(g, x, low * grid.scale, high * grid.scale)
        if keep is not None:
            torch.lerp(g, dx, keep, out=dx)
        dstep = None
        if ctx.needs_input_grad[1]:
            gain = 1 / math.sqrt(x[0].numel() * max(grid.qmax, 1))
            dstep = (flat(g).dot(flat(out)) - flat(dx).dot(flat(x))) * (gain / grid.scale)
        return dx, dstep, None, None


def kept(like: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """1 with probability 1 - drop, else 0, in the shape, type and layout of ``like``."""
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    ones = words.view(torch.uint8)[: like.numel()].to(like.dtype).ge_(round(256 * drop))  # a draw makes eight values
    return ones.as_strided(like.shape, torch.empty_like(like, dtype=torch.uint8).stride())
