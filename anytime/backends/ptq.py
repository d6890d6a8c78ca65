"""Post-training quantization: calibrated ranges, repaired and rounded without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from anytime.backend import Deployable, IntegerBackend, Target, fake_quant_net
from anytime.dataset import Part
from anytime.model import AnytimeModel
from anytime.quant.bias import correct_bias
from anytime.quant.diagnose import check_collapse, layer_sqnr
from anytime.quant.equalize import equalize
from anytime.quant.graph import quantized
from anytime.quant.ranges import NEEDS_VALUES
from anytime.quant.reconstruct import Reconstruction, reconstruct
from anytime.quant.trace import traced
from anytime.reach import Reach
from anytime.train import Trainer

Rounding = Literal["nearest", "adaround", "brecq", "qdrop"]


@dataclass(frozen=True)
class PTQ(IntegerBackend):
    """Calibrated, not trained.

    In this order: ``equalize`` evens out the ranges of neighbouring layers (quant/equalize.py); the grids are calibrated, with
    ``reach`` every stage on the samples that reach it (anytime/reach.py); ``rounding`` other than to nearest is learned in
    ``iterations`` a unit (quant/reconstruct.py); ``correct_bias`` takes the mean error out of every bias (quant/bias.py).
    A network of which an exit falls to chance raises Collapsed.
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342, section 3; Nagel et al., "A White
    Paper on Neural Network Quantization", 2021, arXiv:2106.08295, section 3 (the order).
    """

    method: ClassVar[str] = "PTQ"

    rounding: Rounding = "nearest"
    iterations: int = 2000
    equalize: bool = False
    correct_bias: bool = False
    reach: Reach | None = None

    @property
    def column(self) -> str:
        said = [
            *(["CLE"] if self.equalize else []),
            *([_NAMES[self.rounding]] if self.rounding != "nearest" else []),
            *(["BC"] if self.correct_bias else []),
            *(["reached"] if self.reach else []),
        ]
        return f"{super().column} ({', '.join(said)})" if said else super().column

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        chain = traced(model)
        facts = {}
        if self.equalize:
            done = equalize(chain)
            facts["equalized"] = f"{len(done.pairs)} pairs of layers; the outputs of {len(done.refused)} layers could not be"
        reached = None if self.reach is None else torch.from_numpy(self.reach.of(model, calib))
        net = quantized(chain, self.widths, target, self.exclusions(chain, target))
        seen = net.observe(calib.x, reached, values=self.observer in NEEDS_VALUES)
        net.calibrate(seen, self.observer, self.weight_observer)
        net.check_coverage()
        if self.rounding != "nearest":
            how = Reconstruction(**_HOW[self.rounding], iterations=self.iterations)
            units = reconstruct(net, chain, calib.x, how, trainer.train_seed, reached, trainer.progress)
            facts["reconstructed"] = f"{len(units)} units, {self.iterations} iterations each"
        if self.correct_bias:
            facts["biases corrected"] = str(correct_bias(net, chain, calib.x, reached))
        check_collapse(net, chain, calib.x[:256], calib.y[:256])
        sqnr = layer_sqnr(net, chain, calib.x[:128])
        deployable = fake_quant_net(net, target)
        deployable.facts |= facts
        deployable.sqnr = sqnr
        return deployable


_NAMES = {"adaround": "AdaRound", "brecq": "BRECQ", "qdrop": "QDrop"}
_HOW: dict[str, dict[str, Any]] = {
    "adaround": {"unit": "layer", "drop": 0.0, "learn_steps": False},
    "brecq": {"unit": "block", "drop": 0.0, "learn_steps": True},
    "qdrop": {"unit": "block", "drop": 0.5, "learn_steps": True},
}
