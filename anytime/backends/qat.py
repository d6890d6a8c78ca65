"""Quantization-aware training with fake quantizers and the straight-through estimator."""

from __future__ import annotations

from dataclasses import dataclass

from anytime.backend import Backend, Bits, Deployable, Target, fake_quant_net, integer_column
from anytime.dataset import Part
from anytime.model import AnytimeModel
from anytime.quant.graph import Widths, prepared
from anytime.quant.ranges import Observer
from anytime.spec import key
from anytime.train import TUNE_LR_SCALE, Trainer


@dataclass(frozen=True)
class QAT(Backend):
    """Calibrated as PTQ is, then trained for ``epochs`` with every rounding in the forward pass.

    BatchNorm is folded before; the grids stay as they were calibrated, the weights move on them. What is
    trained is what is exported, for its target. Learns at ``lr_scale`` times the recipe's rate, in FP32.
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, section 3; STE: Bengio et al. 2013, arXiv:1308.3432. Deviation:
    ranges are frozen from the start, where Jacob et al. keep a moving average.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    epochs: int = 3
    lr_scale: float = TUNE_LR_SCALE
    observer: Observer = "mse"
    weight_observer: Observer = "mse"
    edge_bits: int = 8
    keep_float: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        return integer_column(Bits(self.weight_bits, self.activation_bits), "QAT")

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        widths = Widths(self.weight_bits, self.activation_bits, self.edge_bits)
        net = prepared(model, calib.x, widths, target, self.observer, self.weight_observer, self.keep_float)
        trainer.fit(net.model, name=f"{key(self)}-{target}", epochs=self.epochs, lr_scale=self.lr_scale, precision="fp32")
        return fake_quant_net(net, target)
