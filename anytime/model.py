"""The promise every network keeps: a chain of stages with one head each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from anytime.errors import UsageError
from anytime.spec import Spec

State = Any  # a Tensor, or a tuple of Tensors: what one stage hands to the next


class Segment(NamedTuple):
    """What runs without asking anybody: stages[first:stop] in their order, then one head or none.

    Without a head the state after them is what that head reads.
    """

    first: int
    stop: int
    head: int | None

    def stages(self, restarts: bool) -> range:
        """The stages that run: of those that restart only the last one."""
        return range(self.first, self.stop)[-1:] if restarts else range(self.first, self.stop)

    def fresh(self, restarts: bool) -> bool:
        """Whether it reads the input itself."""
        return self.first == 0 or (restarts and self.stop > self.first)

    def hands_on(self, n_exits: int, restarts: bool) -> bool:
        """Whether a state comes out of it that another segment reads."""
        return self.stop > self.first and (self.head is None or (self.stop < n_exits and not restarts))


Plan = tuple[Segment, ...]


class AnytimeModel(nn.Module):
    """Stage k maps state to state, head k maps state to logits [B, K]; the input is state 0.

    ``restarts``: every stage starts again from x, nothing before it can be reused (IResNeXt): the state that goes from
    segment to segment is x itself, and a stage maps it to what its own head reads.
    ``trained_on``: digests of the parts whose samples it has learned from; imported weights name the
    whole published training set. ``fresh_heads``: some heads have learned nothing yet, so it is trained all the same.
    """

    def __init__(self, stages: Iterable[nn.Module], heads: Iterable[nn.Module], restarts: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        if len(self.stages) != len(self.heads) or not self.heads:
            raise ValueError(f"{len(self.stages)} stages and {len(self.heads)} heads: one head per stage, at least one")
        self.restarts = restarts
        self.trained_on: frozenset[str] = frozenset()
        self.fresh_heads = False

    @property
    def n_exits(self) -> int:
        """E."""
        return len(self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> logits of every exit [E, B, K]."""
        return torch.stack(self.exits(x))

    def exits(self, x: Tensor) -> list[Tensor]:
        """x [B, ...] -> logits of each exit [B, K]."""
        logits, state = [], x
        for stage, head in zip(self.stages, self.heads, strict=True):
            state = stage(x if self.restarts else state)
            logits.append(head(state))
        return logits


@dataclass(frozen=True)
class ModelSpec(Spec, ABC):
    """A network that is not built yet.

    ``exits_early`` is False for a network of one exit: policies have nothing to decide there.
    """

    exits_early: ClassVar[bool] = True

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        """Untrained network for inputs [B, *input_shape]; UsageError when it cannot take them."""


def need_shape(spec: ModelSpec, got: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise UsageError unless the inputs have the one shape that the paper's network takes."""
    if tuple(got) != tuple(wanted):
        say = "x".join
        raise UsageError(
            f"{type(spec).__name__} takes inputs of {say(map(str, wanted))}, the data set gives {say(map(str, got))}: "
            f"choose a data set of that shape or another model"
        )
