"""Quantization-aware training: fake quantizers whose gradient goes straight through, or that learn themselves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from anytime.backend import Deployable, IntegerBackend, Target, fake_quant_net
from anytime.dataset import Part
from anytime.errors import UsageError
from anytime.losses import FromTeacher
from anytime.model import AnytimeModel
from anytime.quant.diagnose import diagnosed
from anytime.quant.graph import prepared
from anytime.quant.learned import Method, learn
from anytime.quant.place import left_out
from anytime.quant.trace import traced
from anytime.spec import key
from anytime.train import TUNE_LR_SCALE, Trainer


@dataclass(frozen=True)
class QAT(IntegerBackend):
    """Calibrated as PTQ is, then trained for ``epochs`` with every rounding in the forward pass.

    What is trained is what is exported, for its target. Learns at ``lr_scale`` times the recipe's rate. ``learns``: "ste" keeps
    the calibrated grids, "lsq", "pact" and "dorefa" learn theirs (quant/learned.py). ``fold_bn`` folds BatchNorm before;
    else it stays behind its rounded convolution, its statistics move for the first ``freeze_bn`` of the epochs, and it
    is folded exactly afterwards. ``learn_8bit`` False leaves what has 8 bits its calibrated grid under "lsq": with so many
    levels a step feels hardly anything but the values that it cuts off, and may run away. ``teach``: share of the loss that
    is the distance to the float network's answers; it bends more than cross-entropy does where the network is sure, and once BatchNorm
    is frozen a learning rate that was right may be too high for it: freeze late, when the rate is low.
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, section 3; STE: Bengio et al. 2013, arXiv:1308.3432. Deviation: with
    "ste" ranges are frozen from the start, where Jacob et al. keep a moving average.
    """

    method: ClassVar[str] = "QAT"

    epochs: int = 3
    lr_scale: float = TUNE_LR_SCALE
    learns: Method = "ste"
    fold_bn: bool = True
    freeze_bn: float = 0.5
    teach: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    learn_8bit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("freeze_bn", "teach"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"QAT: {name}={getattr(self, name)} is a share: give 0 to 1")

    @property
    def column(self) -> str:
        said = [*([_NAMES[self.learns]] if self.learns != "ste" else []), *(["taught"] if self.teach else [])]
        return f"{super().column} ({', '.join(said)})" if said else super().column

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        floats = left_out(traced(model), self.keep_float, target)
        net = prepared(model, calib.x, self.widths, target, self.observer, self.weight_observer, floats, self.fold_bn)
        learn(net, self.learns, self.learn_8bit)
        student = _Taught(net.model, model) if self.teach else net.model
        name = f"{key(self)}-{target}"
        trainer.fit(
            student, name=name, epochs=self.epochs, lr_scale=self.lr_scale, precision=self.precision,
            loss=FromTeacher(of=trainer.recipe.loss, share=self.teach) if self.teach else None, each_epoch=self._freeze,
        )  # fmt: skip
        net.model.trained_on = student.trained_on
        deployable = fake_quant_net(net, target)
        diagnosed(deployable.twin, traced(model), calib.x[:256], calib.y[:256])  # noise is none of its training's: not kept
        said = trainer.said(name)
        facts = {"trained_in": said.get("precision"), "trained_s": said.get("wall_s")}  # of all sessions that it took
        deployable.facts |= {fact: value for fact, value in facts.items() if value}
        return deployable

    def _freeze(self, model: AnytimeModel, done: float) -> None:
        if done >= self.freeze_bn:
            for m in model.modules():
                if isinstance(m, _BatchNorm):
                    m.eval()


_NAMES = {"lsq": "LSQ", "pact": "PACT", "dorefa": "DoReFa"}


class _Taught(AnytimeModel):
    """A student that in training gives its own logits, then its teacher's; the teacher is no part of its weights."""

    taught = True  # what FromTeacher asks for

    def __init__(self, student: AnytimeModel, teacher: AnytimeModel) -> None:
        super().__init__(student.stages, student.heads, student.restarts)
        self.trained_on = student.trained_on
        self._teacher = (copy.deepcopy(teacher).eval(),)  # a tuple hides it from state_dict and from the optimizer

    def exits(self, x: Tensor) -> list[Tensor]:
        logits = super().exits(x)
        if self.training:
            with torch.no_grad():
                logits += self._teacher[0].to(x.device).exits(x)
        return logits
