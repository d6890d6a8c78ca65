"""AdaRound: weights that learn whether to round down or up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anytime.quant.fake import QuantizedLayer, Settled, WeightLearner, per_channel
from anytime.quant.layout import channels_last

ZETA, GAMMA = 1.1, -0.1  # how far the sigmoid is stretched, so that 0 and 1 are reached


def rectified_sigmoid(v: Tensor) -> Tensor:
    """clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1): AdaRound's h(V)."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class AdaRoundWeight(WeightLearner):
    """Rounds down or up as h(V) says, from a start at the float weight; in eval mode, and settled, up where V >= 0.

    Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort, ICML 2020, arXiv:2004.10568, section 3.2, as in BRECQ's code.
    """

    floor: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.qmin, self.qmax = layer.weight_qmin, layer.weight_qmax
        weight = channels_last(layer.weight.detach())
        self.register_buffer("scale", per_channel(layer.weight_scale, weight))
        steps = weight / self.scale
        self.register_buffer("floor", steps.floor())
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (steps - self.floor - GAMMA) - 1))

    def forward(self, weight: Tensor) -> Tensor:
        up = rectified_sigmoid(self.v) if self.training else (self.v >= 0).float()
        return (self.floor + up).clamp(self.qmin, self.qmax) * self.scale

    def undecided(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h(V) - 1|^beta: how many weights are not yet rounded."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(beta)).sum()

    def settle(self, weight: Tensor) -> Settled:
        with torch.no_grad():
            return Settled(self.eval()(weight), self.scale.flatten(), self.qmin, self.qmax)
