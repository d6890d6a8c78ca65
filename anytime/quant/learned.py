"""Rounding that learns while the network is trained: LSQ, PACT, DoReFa."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from anytime.errors import Unsupported
from anytime.quant.fake import (
    ActivationLearner,
    FakeQuant,
    QuantizedLayer,
    Settled,
    Straight,
    WeightLearner,
    on_grid,
    per_channel,
)
from anytime.quant.graph import Quantized
from anytime.quant.ranges import TINY, Grid

Method = Literal["ste", "lsq", "pact", "dorefa"]


def learn(net: Quantized, method: Method, at_8_bits: bool = True) -> None:
    """Give the quantizers of a calibrated net learners, which begin at its grids; ``settle`` makes plain grids of them.

    "ste": none, the grids stay and the weights move on them. "lsq": a step per tensor, and per output channel of a weight;
    ``at_8_bits`` False leaves weights and tensors of 8 bits their grids.
    "pact": a clipping level per activation that is never negative, weights as DoReFa's. "dorefa": activations clipped to
    [0, 1]. PACT's and DoReFa's forms hold under 8 bits, as their papers leave first and last layers alone: an 8-bit
    layer and, for DoReFa, an 8-bit tensor keep their grids, and so does a tensor with negative values for both.
    Unsupported where a target's activations are signed, of which neither has a form.
    """
    if method == "ste":
        return
    for q in net.quantizers():
        if q.signed and method in ("pact", "dorefa"):
            raise Unsupported(
                f"{method} clips activations at 0, and this target's are signed: use learns='lsq' or 'ste', or an engine with unsigned ones"
            )
        low = q.bits < 8
        if method == "lsq" and (low or at_8_bits):
            q.learner = LSQActivation(q)
        elif method == "pact" and q.grid.zero_point == q.grid.qmin:
            q.learner = PACTActivation(q)
        elif method == "dorefa" and low and q.grid.zero_point == q.grid.qmin:
            q.learner = DoReFaActivation(q)
    for _, layer in net.layers():
        if method == "lsq":
            if at_8_bits or layer.weight_bits < 8:
                layer.learner = LSQWeight(layer)
        elif layer.weight_bits < 8:
            layer.learner = DoReFaWeight(layer)


class LSQActivation(ActivationLearner):
    """A learned step; the zero point stays.

    d x_hat / d step = round(x/step) - x/step inside, the clipped integer outside, times 1 / sqrt(N Q_P) with N the elements
    of one sample. Source: Esser et al., ICLR 2020, arXiv:1902.08153, sections 2.1 and 2.2. Deviations: it begins at the
    calibrated step, not at 2 <|x|> / sqrt(Q_P); a tensor with negative values keeps its zero point, so that Q_N = zero point.
    """

    def __init__(self, q: FakeQuant) -> None:
        super().__init__()
        self.step = nn.Parameter(q.scale.detach().clone())
        self.zero, self.qmin, self.qmax = q.grid[1:]

    def forward(self, x: Tensor) -> Tensor:
        gain = (x[0].numel() * max(self.qmax - self.zero, 1)) ** -0.5
        return _LSQ.apply(x.float(), self.step, self.grid(), gain)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self) -> Grid:
        return Grid(max(abs(float(self.step.detach())), TINY), self.zero, self.qmin, self.qmax)


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid, gain: float) -> Tensor:
        y = on_grid(x, grid)
        ctx.save_for_backward(x, y, step)
        ctx.low, ctx.high = ((q - grid.zero_point) * grid.scale for q in (grid.qmin, grid.qmax))
        ctx.gain = gain
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, y, step = ctx.saved_tensors
        dx = torch.ops.aten.hardtanh_backward(dy, x, ctx.low, ctx.high)
        # Inside, dy (y - x) / step; outside, dy times the clipped integer, which is y / step: two sums are enough.
        return dx, (_dot(dy, y) - _dot(dx, x)) / step * ctx.gain, None, None


class PACTActivation(ActivationLearner):
    """A learned clipping level alpha: round(clip(x, 0, alpha)); the recipe's weight decay is its L2 term.

    d x_hat / d alpha = 1 where x >= alpha. Source: Choi et al. 2018, arXiv:1805.06085, section 3.
    Deviation: alpha begins at the calibrated range, not at 10.
    """

    def __init__(self, q: FakeQuant) -> None:
        super().__init__()
        self.steps = q.qmax - q.qmin
        self.qmin, self.qmax = q.qmin, q.qmax
        self.alpha = nn.Parameter(q.scale.detach() * self.steps)

    def forward(self, x: Tensor) -> Tensor:
        return _PACT.apply(x.float(), self.alpha, self.steps)  # type: ignore[no-any-return, no-untyped-call]

    def grid(self) -> Grid:
        return Grid(max(float(self.alpha.detach()), TINY) / self.steps, self.qmin, self.qmin, self.qmax)


class _PACT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.top = max(float(alpha.detach()), TINY)
        return on_grid(x, Grid(ctx.top / steps, 0, 0, steps))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(dy, x, 0.0, ctx.top), (dy * (x >= ctx.top)).sum(), None


class DoReFaActivation(ActivationLearner):
    """clip(x, 0, 1) on 2^bits - 1 steps; nothing is learned but what the network makes of it.

    Source: Zhou et al. 2016, arXiv:1606.06160, section 2.5. Deviation: the gradient is 1 up to half a step above 1, as of all that
    rounds to the last integer here.
    """

    def __init__(self, q: FakeQuant) -> None:
        super().__init__()
        self.qmin, self.qmax = q.qmin, q.qmax

    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x.float(), self.grid())  # type: ignore[no-any-return, no-untyped-call]

    def grid(self) -> Grid:
        return Grid(1 / (self.qmax - self.qmin), self.qmin, self.qmin, self.qmax)


class LSQWeight(WeightLearner):
    """A learned step per output channel on -2^(bits-1) ... 2^(bits-1) - 1.

    Source: Esser et al., ICLR 2020, arXiv:1902.08153, section 2. Deviations: one step per output channel (N in the
    gradient's gain counts a channel's weights); it begins at the calibrated steps; at 8 bits the lowest integer is left out,
    as the engines' kernels want it.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.step = nn.Parameter(layer.weight_scale.detach().clone())
        self.qmax = (1 << (layer.weight_bits - 1)) - 1
        self.qmin = -self.qmax if layer.weight_bits >= 8 else -self.qmax - 1

    def forward(self, weight: Tensor) -> Tensor:
        gain = (weight[0].numel() * self.qmax) ** -0.5
        step = self._positive()
        step = per_channel((step - step * gain).detach() + step * gain, weight)
        v = (weight / step).clamp(self.qmin, self.qmax)
        return (v + (v.round() - v).detach()) * step

    def settle(self, weight: Tensor) -> Settled:
        with torch.no_grad():
            return Settled(self(weight), self._positive().detach(), self.qmin, self.qmax)

    def _positive(self) -> Tensor:
        return self.step.abs().clamp_min(TINY)


class DoReFaWeight(WeightLearner):
    """2 Q(tanh w / (2 max |tanh w|) + 1/2) - 1: 2^bits levels between -1 and 1, none of them 0.

    On the integers of a symmetric grid these are the odd numbers up to 2^bits - 1. Source: Zhou et al. 2016,
    arXiv:1606.06160, section 2.3. Deviation: times the factor per layer that keeps it nearest to the weight that it began
    with (least squares, fixed), since a network that is trained already begins from it.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.steps = (1 << layer.weight_bits) - 1
        with torch.no_grad():
            unit = self._unit(layer.weight)
            self.register_buffer("factor", (layer.weight * unit).sum() / unit.square().sum().clamp_min(TINY))

    def _unit(self, weight: Tensor) -> Tensor:
        t = weight.tanh()
        share = t / (2 * t.abs().max().clamp_min(TINY)) + 0.5
        return 2 * (share + ((share * self.steps).round() / self.steps - share).detach()) - 1

    def forward(self, weight: Tensor) -> Tensor:
        return self.get_buffer("factor") * self._unit(weight)

    def settle(self, weight: Tensor) -> Settled:
        with torch.no_grad():
            scale = (self.get_buffer("factor").abs() / self.steps).clamp_min(TINY).expand(len(weight))
            return Settled(self(weight), scale, -self.steps, self.steps)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of two tensors of one shape, without a third one where their layouts agree."""
    if a.stride() != b.stride():
        return (a * b).sum()
    order = sorted(range(a.ndim), key=a.stride, reverse=True)
    flat_a, flat_b = a.permute(order), b.permute(order)
    return torch.dot(flat_a.reshape(-1), flat_b.reshape(-1))
