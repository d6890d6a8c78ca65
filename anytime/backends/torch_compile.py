"""torch.compile: what torch's own compiler makes of a float network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from anytime.backend import Backend, Deployable, Segment, Target, TorchNet
from anytime.dataset import Part
from anytime.errors import Unsupported
from anytime.metrics import Floats
from anytime.model import AnytimeModel
from anytime.peer import tensors, where
from anytime.quant.trace import trace, traced
from anytime.train import Trainer


@dataclass(frozen=True)
class TorchCompile(Backend):
    """What ``of`` makes in floating point, every segment compiled by torch.compile (inductor, weights frozen) at its first use.

    BatchNorm is folded before. A compilation takes seconds to a minute; batch 1 has one of its own.
    Source: Ansel et al., "PyTorch 2", ASPLOS 2024; torch's documentation, torch._inductor.config.freezing.
    """

    of: Backend

    @property
    def column(self) -> str:
        return self.of.column

    def why_not(self) -> str | None:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile needs a C++ compiler, and there is none here: apt-get install g++"
        return self.of.why_not()

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        inner = self.of.compress(model, calib, trainer, target)
        if not isinstance(inner, TorchNet) or inner.simulated or inner.format != "torch":
            raise Unsupported(
                f"torch.compile runs floating point, not {self.of.label}: leave TorchCompile out, or take Float32()"
            )
        return CompiledNet(
            traced(inner.twin), inner.bits, False, "torch.compile", inner.dtype, inner.needs, {**inner.facts, "frozen": "yes"}
        )


class CompiledNet(TorchNet):
    """Two compiled functions per segment: for batch 1, and for every other batch."""

    devices = ("cpu",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._compiled: dict[tuple[Segment, bool], Callable[[Any], Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    @torch.no_grad()  # frozen weights are refused by inference_mode
    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        entering = tensors(state)
        single = len(entering[0]) == 1
        if (segment, single) not in self._compiled:
            # A graph of its own: torch counts compilations per piece of Python code, and falls back to eager after 8 without a word.
            run = trace(_Run(self.twin, segment), where(segment))
            self._compiled[segment, single] = torch.compile(run, fullgraph=True, options={"freezing": True})
        if not single:
            for tensor in entering:
                torch._dynamo.mark_dynamic(tensor, 0)
        after, logits = self._compiled[segment, single](state)
        return (state if self.restarts and segment.head is not None else after), None if logits is None else logits.numpy()


class _Run(nn.Module):
    def __init__(self, twin: AnytimeModel, segment: Segment) -> None:
        super().__init__()
        self.stages = nn.ModuleList(twin.stages[k] for k in segment.stages(twin.restarts))
        self.head = None if segment.head is None else twin.heads[segment.head]

    def forward(self, state: Any) -> tuple[Any, Any]:
        for stage in self.stages:
            state = stage(state)
        return state, None if self.head is None else self.head(state).float()
