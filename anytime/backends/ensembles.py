"""Ensembles over any backend: fusion, voting, bagging, boosting and snapshots of one network, and stacks of different ones."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softmax

from anytime.backend import Backend, Deployable, Target
from anytime.combiners import Fit, Sum, Vote
from anytime.dataset import Part
from anytime.ensemble import Alike, Ensemble, Made, Trained, cheapest_first, others
from anytime.errors import Unsupported, UsageError
from anytime.losses import Loss, State
from anytime.model import AnytimeModel, ModelSpec
from anytime.train import Recipe, Trainer


@dataclass(frozen=True)
class Voting(Alike):
    """Networks trained alone, from other weights and in another order; their probabilities are averaged.

    Member 1 is the network itself; member i is what another experiment trains with a training seed that is larger by 1000 (i - 1).
    Source: torchensemble 0.2.0, VotingClassifier, strategy "soft".
    """

    how: ClassVar[str] = "voting"

    def floats(self, model: AnytimeModel, trainer: Trainer) -> Iterator[Trained]:
        yield model, trainer, trainer.wall_s()
        for i in range(1, self.members):
            net, own = others(self, trainer)(i)
            yield net, own, own.wall_s()


@dataclass(frozen=True)
class Bagging(Alike):
    """Networks trained alone, each on as many samples as there are, drawn with replacement; their probabilities are averaged.

    Begins from weights drawn anew, whatever the recipe's ``start``. A member counts as trained on the whole train part.
    Source: torchensemble 0.2.0, BaggingClassifier; Breiman, "Bagging predictors", 1996.
    """

    how: ClassVar[str] = "bagging"

    def floats(self, model: AnytimeModel, trainer: Trainer) -> Iterator[Trained]:
        for i in range(self.members):
            net, own = self.fresh(trainer, i, "bagging")
            part = own.train
            drawn = torch.randint(len(part), (len(part),), generator=torch.Generator().manual_seed(own.train_seed))
            own = replace(own, train=replace(part, x=part.x[drawn], y=part.y[drawn]))
            own.fit(net)
            yield net, own, own.wall_s()


@dataclass(frozen=True)
class Fusion(Alike):
    """Networks trained together on the mean of their logits, exit by exit, which is also what they answer.

    Begins from weights drawn anew, whatever the recipe's ``start``. What ``of`` trains, it trains member by member.
    Source: torchensemble 0.2.0, FusionClassifier.
    """

    how: ClassVar[str] = "fusion"

    def floats(self, model: AnytimeModel, trainer: Trainer) -> Iterator[Trained]:
        name = f"fusion{self.members}"
        made = [self.fresh(trainer, i, name) for i in range(self.members)]
        whole, together = _Fused([net for net, _ in made]), made[0][1]
        together.fit(whole, name="together")
        seconds = together.wall_s("together")
        for net, own in made:
            net.trained_on = whole.trained_on
            yield net.eval(), own, None if seconds is None else seconds / self.members

    def combiner(self, m: int) -> nn.Module:
        return Sum([1 / m] * m)


class _Fused(AnytimeModel):
    """Several networks that answer with the mean of their logits."""

    def __init__(self, members: Sequence[AnytimeModel]) -> None:
        super().__init__(members[0].stages, members[0].heads, members[0].restarts)  # what a loss asks for; the same weights
        self.members = nn.ModuleList(members)

    def exits(self, x: Tensor) -> list[Tensor]:
        members: Any = self.members
        said = zip(*(member.exits(x) for member in members), strict=True)
        return [torch.stack(at_one).mean(0) for at_one in said]


@dataclass(frozen=True)
class GradientBoosting(Alike):
    """Each network learns, by squared error, what the sum of those before it lacks: one-hot labels minus its softmax.

    The answer is ``shrinkage`` times the sum of the logits, exit by exit. Begins from weights drawn anew, whatever the recipe's
    ``start`` and loss. ``of`` must not train: it would train a member towards the labels.
    Source: torchensemble 0.2.0, GradientBoostingClassifier. Deviations: the members before are in eval mode; the squared error is
    summed over the classes and meant over the batch, there summed over both; no early stopping.
    """

    how: ClassVar[str] = "boosting"

    shrinkage: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shrinkage <= 1:
            raise UsageError(f"GradientBoosting: shrinkage={self.shrinkage} must lie in (0, 1]")

    def floats(self, model: AnytimeModel, trainer: Trainer) -> Iterator[Trained]:
        done: list[AnytimeModel] = []
        for i in range(self.members):
            net, own = self.fresh(trainer, i, "boosting" if self.shrinkage == 1 else f"boosting{self.shrinkage:g}")
            learner = _Learner(net, done, self.shrinkage)
            own.fit(learner, loss=_Lack())
            net.trained_on = learner.trained_on
            for one in done:
                one.cpu()
            done.append(net.eval())
            yield net, _Settled(**{f.name: getattr(own, f.name) for f in fields(own)}), own.wall_s()

    def combiner(self, m: int) -> nn.Module:
        return Sum([self.shrinkage] * m)


class _Learner(AnytimeModel):
    """A network that in training gives its own logits, then what those before it say together."""

    def __init__(self, net: AnytimeModel, before: Sequence[AnytimeModel], shrinkage: float) -> None:
        super().__init__(net.stages, net.heads, net.restarts)
        self.shrinkage = shrinkage
        self._before = tuple(before)  # a tuple hides them from state_dict and from the optimizer

    def exits(self, x: Tensor) -> list[Tensor]:
        logits = super().exits(x)
        if not self.training:
            return logits
        with torch.no_grad():
            said = [torch.zeros_like(one) for one in logits]
            for before in self._before:
                said = [z + self.shrinkage * more for z, more in zip(said, before.to(x.device).exits(x), strict=True)]
        return logits + said


@dataclass(frozen=True)
class _Lack(Loss):
    """Squared distance of the first half of the logits to what the second half lacks.

    Source: torchensemble 0.2.0, pseudo_residual_classification.
    """

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        own, said = logits.chunk(2)
        lack = one_hot(y, own.shape[-1]) - softmax(said, -1)
        return (own - lack).square().sum(-1).mean(-1)


class _Settled(Trainer):
    """A trainer that trains no more."""

    def fit(self, model: AnytimeModel, **_: Any) -> AnytimeModel:
        raise Unsupported(
            "a member of GradientBoosting learned what others lack, and `of` would train it towards the labels: use PTQ"
        )


@dataclass(frozen=True)
class Snapshot(Alike):
    """One training of ``epochs`` (0: the recipe's) in ``members`` cycles of a cosine, with a member at the end of each.

    The last snapshot runs first: it answers best alone. Begins from weights drawn anew, whatever the recipe's ``start``.
    Source: torchensemble 0.2.0, SnapshotEnsembleClassifier; Huang et al., "Snapshot Ensembles", ICLR 2017, arXiv:1704.00109, section
    3. Deviations: the learning rate falls epoch by epoch, not batch by batch, and the optimizer begins every cycle without
    memory, so that every cycle is a training of its own that can be taken up where it was interrupted.
    """

    how: ClassVar[str] = "snapshots"

    epochs: int = 0

    @property
    def column(self) -> str:
        return f"{super().column} of {self.epochs} epochs" if self.epochs else super().column

    def floats(self, model: AnytimeModel, trainer: Trainer) -> Iterator[Trained]:
        total = self.epochs or trainer.recipe.epochs
        if total % self.members:
            raise UsageError(f"{self.label}: {total} epochs are not {self.members} cycles of equal length: give a multiple")
        cycle = total // self.members
        net, _ = self.fresh(trainer, 0, "")
        found: list[Trained] = []
        for i in range(self.members):
            _, own = self.fresh(trainer, i, f"snapshot{self.members}x{cycle}")
            recipe = replace(own.recipe, epochs=cycle, schedule="CosineAnnealingLR", schedule_args=())
            own = replace(own, recipe=recipe)
            own.fit(net)
            found.append((copy.deepcopy(net), own, own.wall_s()))
        yield from reversed(found)


@dataclass(frozen=True)
class Stack(Ensemble):
    """Different networks, each with its own backend, and with a recipe of its own where one stands beside it.

    A member without a recipe has that of the network in whose row the stack stands, which is no member of it unless it is named: so
    name stacks in experiments of one network. Equal members are trained from different weights. All run in the order of their
    BOPs. ``combine``: the members' probabilities averaged, or by weights, by an MLP, by logistic regression or by gradient
    boosting, all learned on the hold part (see ``fitted``), for every exit anew; the first member alone answers for itself.
    A stack of one is that network.
    Source: Wolpert, "Stacked generalization", 1992; the order, and the exits between members: this project.
    """

    members: tuple[tuple[ModelSpec, Backend] | tuple[ModelSpec, Backend, Recipe], ...] = ()
    combine: Literal["average"] | Fit = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members:
            raise UsageError("Stack: members is empty; name (model, backend) or (model, backend, recipe) of each")

    @property
    def label(self) -> str:
        said = " + ".join(f"{model.label} {backend.label}" for model, backend, *_ in self.members)
        return f"Stack({said}, {self.combine}{', inner exits' if self.inner_exits else ''})"

    @property
    def column(self) -> str:
        said = " + ".join(f"{model.label} {backend.column}" for model, backend, *_ in self.members)
        return f"{said}, {self.combine if len(self.members) > 1 else 'alone'}"

    def why_not(self) -> str | None:
        return next((reason for _, backend, *_ in self.members if (reason := backend.why_not())), None)

    def exits_early(self, model: ModelSpec) -> bool:
        return len(self.members) > 1 or (self.inner_exits and self.members[0][0].exits_early)

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        if self.combine != "average":
            self.hold(trainer)  # better now than after the trainings
        made: list[Made] = []
        seen: Counter[tuple[ModelSpec, Recipe | None]] = Counter()
        for i, (spec, backend, *given) in enumerate(self.members):
            recipe: Recipe | None = given[0] if given else None
            which, seen[spec, recipe] = seen[spec, recipe], seen[spec, recipe] + 1
            try:
                net, own = others(self, trainer)(which, spec, recipe)
            except UsageError as error:
                raise Unsupported(f"{self.label}: member {i + 1}, {spec.label}, cannot be built: {error}") from error
            made.append(Made(f"{spec.label} {backend.label}", backend.compress(net, calib, own, target), own.wall_s()))
        ordered = cheapest_first(made, tuple(calib.x.shape[1:]))
        return self.joined(ordered, (lambda m: Vote([1 / m] * m)) if self.combine == "average" else self.combine, calib, trainer)
