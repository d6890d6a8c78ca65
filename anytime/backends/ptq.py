"""Post-training quantization: calibrated ranges, round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from anytime.backend import Backend, Bits, Deployable, Target, fake_quant_net, integer_column
from anytime.dataset import Part
from anytime.model import AnytimeModel
from anytime.quant.graph import Widths, prepared
from anytime.quant.ranges import Observer
from anytime.train import Trainer


@dataclass(frozen=True)
class PTQ(Backend):
    """Integers of ``weight_bits`` and ``activation_bits`` in every stage and every head, calibrated, not trained.

    Weights per output channel and symmetric; activations per tensor, affine unsigned ("u8s8") or symmetric signed
    ("s8s8"). ``edge_bits``: the first layer and each head's last one. ``keep_float``: layers left out, by path;
    any other layer that cannot be quantized raises Unsupported.
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342, section 3.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    observer: Observer = "mse"
    weight_observer: Observer = "mse"
    edge_bits: int = 8
    keep_float: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        return integer_column(Bits(self.weight_bits, self.activation_bits), "PTQ")

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        widths = Widths(self.weight_bits, self.activation_bits, self.edge_bits)
        net = prepared(model, calib.x, widths, target, self.observer, self.weight_observer, self.keep_float)
        return fake_quant_net(net, target)
