"""A network without its exits: the honest baseline of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from anytime.model import AnytimeModel, ModelSpec


@dataclass(frozen=True)
class Static(ModelSpec):
    """The trunk of ``of`` with its last head: one stage, one exit, no branch.

    Its stages keep their order inside ``stages.0``, so that ``of`` can begin from its weights (BranchyNet does); of stages that
    restart ``stages.0`` is the last one.
    Source: this project.
    """

    exits_early: ClassVar[bool] = False

    of: ModelSpec

    @property
    def label(self) -> str:
        return f"{self.of.label} static"

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        whole = self.of.build(input_shape, n_classes)
        # Of stages that restart the last sub-network alone is the whole network.
        trunk = whole.stages[-1] if whole.restarts else nn.Sequential(*whole.stages)
        model = AnytimeModel([trunk], [whole.heads[-1]])
        model.trained_on = whole.trained_on
        return model
