"""Floating point: the uncompressed reference, trained on, and the 16-bit formats."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anytime import cpu
from anytime.backend import Backend, BitMap, Bits, Deployable, Target, TorchNet
from anytime.dataset import Part
from anytime.model import AnytimeModel
from anytime.quant.trace import insert_after, links, traced
from anytime.spec import key
from anytime.train import TUNE_LR_SCALE, Trainer


@dataclass(frozen=True)
class Float32(Backend):
    """The network as it was trained, run by torch; with ``epochs``, trained on for so many.

    The training on uses the recipe at ``lr_scale`` times its learning rate, in FP32, as QAT does: give both
    the same ``epochs``, or QAT's gain is retraining's.
    Source: this project.
    """

    epochs: int = 0
    lr_scale: float = TUNE_LR_SCALE

    @property
    def column(self) -> str:
        return f"FP32 +{self.epochs} epochs" if self.epochs else "FP32"

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        model = copy.deepcopy(model)
        if self.epochs:
            trainer.fit(model, name=key(self), epochs=self.epochs, lr_scale=self.lr_scale, precision="fp32")
        return TorchNet(model, {}, simulated=False)


@dataclass(frozen=True)
class BFloat16(Backend):
    """Weights and activations in bfloat16.

    A CPU that does not multiply bfloat16 takes thirty times as long as for FP32 to imitate it: there every weight and every
    layer's output is rounded to it between FP32 kernels, scored and not timed.
    Source: Kalamkar et al. 2019, arXiv:1905.12322.
    """

    @property
    def column(self) -> str:
        return "BF16"

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        return _sixteen(model, torch.bfloat16, "BF16", cpu.BF16_KERNELS)


@dataclass(frozen=True)
class Float16(Backend):
    """Weights and activations in IEEE half precision.

    On a CPU without half-precision arithmetic every weight and every layer's output is rounded to FP16 between
    FP32 kernels, which is what kernels with FP32 accumulators do: scored, not timed.
    Source: Micikevicius et al., ICLR 2018, arXiv:1710.03740, section 3.3.
    """

    @property
    def column(self) -> str:
        return "FP16"

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        return _sixteen(model, torch.float16, "FP16", cpu.FP16_KERNELS)


def _sixteen(model: AnytimeModel, dtype: torch.dtype, name: str, kernels: tuple[str, ...]) -> Deployable:
    if cpu.has_any(kernels):
        twin = copy.deepcopy(model).to(dtype)
        return TorchNet(twin, _bits(twin), simulated=False, dtype=dtype, needs=kernels)
    twin = _rounded(model, dtype)
    why = f"this CPU has no {name} arithmetic (none of {', '.join(kernels)})"
    return TorchNet(twin, _bits(twin), simulated=True, execution=f"rounded to {name}", facts={"simulated": why})


def _bits(model: AnytimeModel) -> BitMap:
    return {path: Bits(16, 16) for path, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}


class _Round(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Any) -> Any:
        return x.to(self.dtype).float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _rounded(model: AnytimeModel, dtype: torch.dtype) -> AnytimeModel:
    """A copy whose parameters and every operation's output are rounded to ``dtype``."""
    model = traced(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype).float())
    for path, link in links(model):
        for node in list(link.graph.nodes):
            if node.op in ("output", "get_attr") or (node.op == "call_function" and node.target.__name__ == "getitem"):
                continue
            if node.op == "placeholder" and not (link is model.stages[0] or (model.restarts and path.startswith("stages"))):
                continue  # it was rounded where it was made
            insert_after(link, node, f"round_{node.name}", _Round(dtype))
        link.recompile()
    return model
