"""Post-training quantization: calibrated ranges, round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anytime.backend import Deployable, IntegerBackend, Target, fake_quant_net
from anytime.dataset import Part
from anytime.model import AnytimeModel
from anytime.quant.graph import prepared
from anytime.train import Trainer


@dataclass(frozen=True)
class PTQ(IntegerBackend):
    """Calibrated, not trained.

    Source: Jacob et al., CVPR 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342, section 3.
    """

    method: ClassVar[str] = "PTQ"

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        net = prepared(model, calib.x, self.widths, target, self.observer, self.weight_observer, self.keep_float)
        return fake_quant_net(net, target)
