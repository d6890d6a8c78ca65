"""Post-training quantization: calibrated ranges, repaired and rounded without training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from anytime.backend import Deployable, IntegerBackend, Target, fake_quant_net
from anytime.dataset import Part
from anytime.errors import Unsupported, UsageError
from anytime.model import AnytimeModel
from anytime.quant.bias import correct_bias, reestimate_bn
from anytime.quant.diagnose import diagnosed
from anytime.quant.equalize import equalize
from anytime.quant.graph import quantized
from anytime.quant.place import left_out
from anytime.quant.ranges import NEEDS_VALUES
from anytime.quant.trace import traced
from anytime.reach import Reach
from anytime.rounding import NAMES, Rounding, learn_rounding
from anytime.spec import key
from anytime.train import Trainer


@dataclass(frozen=True)
class PTQ(IntegerBackend):
    """Calibrated, not trained.

    In this order: ``equalize`` evens out the ranges of neighbouring layers (quant/equalize.py); the grids are calibrated, with
    ``reach`` every stage on the samples that reach it (anytime/reach.py); ``rounding`` other than to nearest is learned in
    ``iterations`` a unit (anytime/rounding.py), and kept as trainings are; ``reestimate_bn`` folds BatchNorm only then, its
    statistics moved by as much as rounding has moved them on the calibration images; ``correct_bias`` takes the mean error out
    of every bias (both quant/bias.py). A network of which an exit falls to chance raises Collapsed.
    benchmarks/repair.py: SDN ResNet-20, to nearest, tune and val, KL x 1000 from float at the first, middle and last exit: W4A8
    14 44 40, with correct_bias 6 19 87, with reestimate_bn 6 14 15, with both 7 20 20; W3A8 115 626 529, 25 137 1671, 28 53 63,
    28 94 137. Biases alone leave the variance that rounding takes: the last exit falls from 76 to 31 % in W3A8 (BatchNorm: 89 %).
    Behind QDrop neither gains anything (W4A4, 300 iterations: 8 15 20, then 9 16 23, then 9 17 27).
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342, section 3; Nagel et al., "A White
    Paper on Neural Network Quantization", 2021, arXiv:2106.08295, section 3 (the order).
    Deviation: BatchNorm is measured against the float network on the same images, not by itself.
    """

    method: ClassVar[str] = "PTQ"

    rounding: Rounding = "nearest"
    iterations: int = 2000
    equalize: bool = False
    correct_bias: bool = False
    reach: Reach | None = None
    reestimate_bn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reestimate_bn and (self.equalize or self.reach):
            other = "equalize, which needs BatchNorm folded" if self.equalize else "reach: it measures BatchNorm on all images"
            raise UsageError(f"PTQ cannot take reestimate_bn together with {other}; leave one of them out")

    @property
    def column(self) -> str:
        said = [
            *(["CLE"] if self.equalize else []),
            *([NAMES[self.rounding]] if self.rounding != "nearest" else []),
            *(["BN"] if self.reestimate_bn else []),
            *(["BC"] if self.correct_bias else []),
            *(["reached"] if self.reach else []),
        ]
        return f"{super().column} ({', '.join(said)})" if said else super().column

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        chain = traced(model, fold_bn=not self.reestimate_bn)
        if self.reestimate_bn and not any(isinstance(m, _BatchNorm) for m in chain.modules()):
            raise Unsupported("PTQ: this network has no BatchNorm to measure anew; leave reestimate_bn out")
        facts = {}
        if self.equalize:
            done = equalize(chain)
            facts["equalized"] = f"{len(done.pairs)} pairs of layers; the outputs of {len(done.refused)} layers could not be"
        reached = None if self.reach is None else torch.from_numpy(self.reach.of(model, calib))
        net = quantized(chain, self.widths, target, left_out(chain, self.keep_float, target), fold_bn=not self.reestimate_bn)
        seen = net.observe(calib.x, reached, values=self.observer in NEEDS_VALUES)
        net.calibrate(seen, self.observer, self.weight_observer)
        net.check_coverage()
        name = f"{key(self)}-{target}"
        facts |= learn_rounding(net, chain, calib.x, self.rounding, self.iterations, trainer, name, reached)
        if self.reestimate_bn:
            _match_bn(net.model, chain, calib.x)
        if self.correct_bias:
            facts["biases corrected"] = str(correct_bias(net, chain, calib.x, reached))
        deployable = fake_quant_net(net, target)
        deployable.facts |= facts
        folded = traced(model) if self.reestimate_bn else chain
        deployable.sqnr = diagnosed(deployable.twin, folded, calib.x[:256], calib.y[:256])
        return deployable


def _match_bn(net: AnytimeModel, chain: AnytimeModel, x: Tensor) -> None:
    """Give every BatchNorm of a rounded chain the statistics with which its output has on x the float one's mean and variance.

    Not simply those of x, which differ from those of training in float too.
    """
    floats = copy.deepcopy(chain)
    reestimate_bn(floats, x)
    reestimate_bn(net, x)
    norms: list[list[Any]] = [[m for m in c.modules() if isinstance(m, _BatchNorm)] for c in (net, chain, floats)]
    for bn, trained, now in zip(*norms, strict=True):
        wider = ((bn.running_var + bn.eps) / (now.running_var + bn.eps)).sqrt()
        bn.running_mean += wider * (trained.running_mean - now.running_mean)
        bn.running_var.copy_(wider.square() * (trained.running_var + bn.eps) - bn.eps)
