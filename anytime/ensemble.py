"""What backends that make ensembles share: training members, joining them, and facts about how much they differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from anytime.backend import Backend, Deployable, Target
from anytime.combiners import Fit, Vote, fitted
from anytime.cost import account
from anytime.dataset import Part
from anytime.ensemble_net import EnsembleNet, answers, links
from anytime.errors import AnytimeError, Leak, Unsupported, UsageError, first_line
from anytime.metrics import Floats, disagreement, double_fault, ece
from anytime.model import AnytimeModel, ModelSpec
from anytime.train import Others, Trainer


class Made(NamedTuple):
    """A member: its name, what its backend made of it, and the seconds that training it took, where something tells."""

    label: str
    net: Deployable
    trained_s: float | None


@dataclass(frozen=True)
class Ensemble(Backend, ABC):
    """Several networks as one chain, with an exit behind each.

    With ``inner_exits`` the members' own exits are exits of the ensemble too: each says what the members that are done say
    together with what the running one says there.
    """

    own_exits: ClassVar[bool] = True

    inner_exits: bool = field(default=False, kw_only=True)

    def hold(self, trainer: Trainer) -> Part:
        """What combiners learn from; UsageError where there is none."""
        if trainer.hold is None or not len(trainer.hold):
            raise UsageError(f"{self.label} learns from a hold part that no member saw: give the data set one, as hold=500")
        return trainer.hold

    def joined(
        self, made: Sequence[Made], combiner: Callable[[int], nn.Module] | Fit, calib: Part, trainer: Trainer
    ) -> EnsembleNet:
        """The chain of ``made``; ``combiner`` gives that of m members, or names one that learns from the hold part.

        Unsupported for members that do not take the same inputs or know the same classes; UsageError for a combiner that
        learns without a hold part, Leak where a member has seen it.
        """
        nets = [m.net for m in made]
        n_classes = _common(made, calib.x[:1].numpy())
        where = links(nets, self.inner_exits)
        if callable(combiner):
            combiners = [combiner(link.member + 1) for link in where]
        else:
            hold = self.hold(trainer)
            seen = [one.label for one in made if hold.sources & one.net.twin.trained_on]
            if seen:
                raise Leak(
                    f"{self.label}: {seen[0]} was trained on samples of the hold part: give it weights trained on the split"
                )
            said = answers(nets, hold.x.numpy(), self.inner_exits)
            combiners = [fitted(combiner, torch.from_numpy(z), hold.y.numpy(), trainer.train_seed) for z in said]
        net = EnsembleNet(nets, combiners, n_classes, self.inner_exits)
        if not callable(combiner):
            net.twin.trained_on |= {self.hold(trainer).digest}
        shape = tuple(calib.x.shape[1:])
        for i, one in enumerate(made, 1):
            took = "" if one.trained_s is None else f", trained in {one.trained_s:.0f} s"
            net.facts[f"member {i}"] = f"{one.label}, {_cost(one.net, shape, 'macs') / 1e6:.2f} M MACs{took}"
        if all(one.trained_s is not None for one in made):
            net.facts["trained_s"] = f"{sum(one.trained_s or 0 for one in made):.1f}"
        if trainer.tune is not None and len(trainer.tune):
            net.facts |= _diversity(net, trainer.tune, self.inner_exits)
        return net


Trained = tuple[AnytimeModel, Trainer, float | None]  # a float member, the trainer that its backend may use, seconds that it took


@dataclass(frozen=True)
class Alike(Ensemble):
    """``members`` networks of one kind, each compressed by ``of``, run in the order in which they were trained.

    What the trainer keeps of the members lies under their own names: each goes on by itself where it was interrupted.
    """

    how: ClassVar[str]  # what a table's column calls it

    of: Backend
    members: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members < 1:
            raise UsageError(f"{type(self).__name__}: members={self.members} is no number of networks; use 1 or more")

    @property
    def column(self) -> str:
        return f"{self.members} x {self.of.column}, {self.how}"

    def why_not(self) -> str | None:
        return self.of.why_not()

    def exits_early(self, model: ModelSpec) -> bool:
        return self.members > 1 or (self.inner_exits and model.exits_early)

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        if others(self, trainer)(fresh=True)[0].trained_on:
            raise Unsupported(f"{self.label}: the network's weights are published ones, so every member would be the same")
        made = []
        for i, (net, own, seconds) in enumerate(self.floats(model, trainer), 1):
            made.append(Made(f"member {i}, {self.of.label}", self.of.compress(net, calib, own, target), seconds))
        return self.joined(made, self.combiner, calib, trainer)

    @abstractmethod
    def floats(self, model: AnytimeModel, trainer: Trainer) -> Iterator[Trained]:
        """Train the members."""

    def combiner(self, m: int) -> nn.Module:
        """What m members say together."""
        return Vote([1 / m] * m)

    def fresh(self, trainer: Trainer, i: int, name: str) -> tuple[AnytimeModel, Trainer]:
        """Member i before any training, and a trainer that keeps what it does under ``name``."""
        net, own = others(self, trainer)(i, recipe=replace(trainer.recipe, start="scratch", trunk_epochs=0), fresh=True)
        return net, replace(own, key=f"{own.key}-{name}")


def others(backend: Backend, trainer: Trainer) -> Others:
    """Where members come from; UsageError for a trainer that knows of none."""
    if trainer.others is None:
        raise UsageError(f"{backend.label}: this trainer knows of no other networks; take one that a workshop makes")
    return trainer.others


def cheapest_first(made: Sequence[Made], shape: tuple[int, ...]) -> list[Made]:
    """Members by the BOPs of their last exit."""
    return sorted(made, key=lambda one: _cost(one.net, shape, "bops"))


def _cost(net: Deployable, shape: tuple[int, ...], what: str) -> float:
    last = net.n_exits - 1
    return account(net, shape).path((last,), last, what)


def _common(made: Sequence[Made], x: Floats) -> int:
    """The number of classes that every member knows."""
    counts = []
    for one in made:
        try:
            counts.append(one.net.predict(x).shape[-1])
        except AnytimeError:
            raise
        except Exception as error:  # engines share no base class
            shape, said = "x".join(map(str, x.shape[1:])), first_line(error)
            raise Unsupported(f"{one.label} does not take inputs of {shape} as the other members do: {said}") from error
        if counts[-1] != counts[0]:
            raise Unsupported(f"{one.label} knows {counts[-1]} classes, {made[0].label} {counts[0]}: members need the same ones")
    return int(counts[0])


def _diversity(net: EnsembleNet, tune: Part, inner_exits: bool) -> dict[str, str]:
    """On tune: the calibration of every exit, and of the members' last exits ``disagreement`` and ``double_fault``."""
    y = tune.y.numpy()
    said = [torch.from_numpy(z) for z in answers(net.members, tune.x.numpy(), inner_exits)]
    with torch.no_grad():
        exits = [combine(z).numpy() for combine, z in zip(net.combiners, said, strict=True)]
    facts = {"ECE on tune, exit by exit": ", ".join(f"{ece(z, y):.4f}" for z in exits)}
    if len(net.members) > 1:
        alone = said[-1].argmax(-1).T.numpy()
        facts["right alone on tune"] = ", ".join(f"{share:.4f}" for share in (alone == y).mean(1))
        facts["disagreement on tune"] = f"{disagreement(alone):.4f}"
        facts["double fault on tune"] = f"{double_fault(alone, y):.4f}"
    return facts
