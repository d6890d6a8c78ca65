"""An ensemble as one chain: members run one after the other, and every exit says what those that have run say together."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from anytime.backend import Backend, Deployable, Segment, Target
from anytime.cost import account
from anytime.dataset import Part
from anytime.errors import AnytimeError, Leak, Unsupported, UsageError
from anytime.metrics import Floats, Ints, ece
from anytime.model import AnytimeModel, ModelSpec
from anytime.train import Others, Trainer

T = TypeVar("T")
Fit = Literal["weighted", "mlp", "logistic", "gradient_boosting"]  # combiners that learn from labels
ROUNDS = 200  # of expectation-maximization over the weights of a vote
HIDDEN = 32  # neurons of the MLP


# What several members say together: logits [B, m, K] -> logits [B, K]


class Vote(nn.Module):
    """The members' probabilities averaged with ``weights`` [m] of sum 1.

    Answers log(sum_i w_i p_i) + sum_i w_i lse_i: its softmax is the average, and the logits of equal members are theirs. In numpy,
    which takes a third of torch's time for a sample.
    Source: torchensemble 0.2.0, VotingClassifier, strategy "soft"; with weights the linear opinion pool (Stone 1961).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights: Floats = np.array(weights)

    def forward(self, said: Tensor) -> Tensor:
        if len(self.weights) == 1:
            return said[:, 0]
        z = said.detach().numpy().astype(np.float64)
        top = z.max(-1, keepdims=True)
        p = np.exp(z - top)
        total = p.sum(-1, keepdims=True)
        mean = np.maximum(self.weights @ (p / total), np.finfo(np.float64).tiny)  # what is impossible keeps a logarithm
        return torch.from_numpy((np.log(mean) + self.weights @ (top + np.log(total))).astype(np.float32))


class Sum(nn.Module):
    """The members' logits added up with ``weights`` [m].

    Source: torchensemble 0.2.0, FusionClassifier (weights 1/m) and GradientBoostingClassifier (weights ``shrinkage_rate``).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights: Floats = np.array(weights)

    def forward(self, said: Tensor) -> Tensor:
        return torch.from_numpy((self.weights @ said.detach().numpy().astype(np.float64)).astype(np.float32))


class Stacked(nn.Module):
    """A small network ``of`` on the members' probabilities side by side [B, m x K]."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, said: Tensor) -> Tensor:
        z: Tensor = self.of(probabilities(said))
        return z


class Trees(nn.Module):
    """What a fitted scikit-learn classifier makes of the members' probabilities; it multiplies nothing, so it counts no MAC."""

    def __init__(self, fitted: Any) -> None:
        super().__init__()
        self.fitted = fitted

    def forward(self, said: Tensor) -> Tensor:
        scores = self.fitted.decision_function(probabilities(said).detach().numpy())
        if scores.ndim == 1:  # two classes: what speaks for the second
            scores = np.stack([np.zeros_like(scores), scores], -1)
        return torch.from_numpy(scores).float()


def probabilities(said: Tensor) -> Tensor:
    """Logits [B, m, K] -> the members' softmaxes side by side [B, m x K], float32."""
    return said.double().softmax(-1).flatten(1).float()


def fitted(how: Fit, said: Tensor, y: Ints, seed: int) -> nn.Module:
    """The combiner ``how`` learned from logits [N, m, K] and labels [N].

    "weighted": the weights of a Vote that make the labels likeliest, by expectation-maximization; "mlp": one hidden layer of
    32 neurons; "logistic" and "gradient_boosting": scikit-learn's classifiers at their defaults. One member answers alone.
    Source: Wolpert, "Stacked generalization", 1992; scikit-learn's MLPClassifier, LogisticRegression and
    GradientBoostingClassifier; EM for mixture weights: Dempster, Laird, Rubin 1977, section 4.3.
    """
    n_members, n_classes = said.shape[1:]
    if n_members == 1:
        return Vote([1.0])
    if how == "weighted":
        p = said.double().softmax(-1)[torch.arange(len(y)), :, torch.from_numpy(y)].clamp_min(1e-300)
        w = torch.full((n_members,), 1 / n_members, dtype=torch.float64)
        for _ in range(ROUNDS):
            w = (w * p / (p @ w)[:, None]).mean(0)
        return Vote((w / w.sum()).tolist())
    if absent := sorted(set(range(n_classes)) - set(y.tolist())):
        raise UsageError(f"the hold part has no sample of class {absent[0]}, so no combiner can learn it: give a larger hold")
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    x = probabilities(said).numpy()
    if how == "gradient_boosting":
        return Trees(GradientBoostingClassifier(random_state=seed).fit(x, y))
    if how == "logistic":
        linear = LogisticRegression(max_iter=1000).fit(x, y)
        return Stacked(_linear(linear.coef_.T, linear.intercept_, n_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a thousand rounds are enough
        mlp = MLPClassifier((HIDDEN,), max_iter=1000, random_state=seed).fit(x, y)
    (into, out), (b_into, b_out) = mlp.coefs_, mlp.intercepts_
    return Stacked(nn.Sequential(_linear(into, b_into, HIDDEN), nn.ReLU(), _linear(out, b_out, n_classes)))


def _linear(weight: Floats, bias: Floats, n_out: int) -> nn.Linear:
    """A layer from scikit-learn's weight [in, out]; of two classes it has only what speaks for the second."""
    if weight.shape[1] < n_out:
        weight, bias = np.pad(weight, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    layer = nn.Linear(*weight.shape).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight.T)))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


# The chain


class Link(NamedTuple):
    """Stage and exit of an ensemble: stages [first, stop) of a member; ``last``: then the member has answered."""

    member: int
    first: int
    stop: int
    last: bool


def links(members: Sequence[Deployable], inner_exits: bool) -> list[Link]:
    """The exits of an ensemble: one per member, or one per exit of every member.

    Of a member whose stages restart only the last one runs. Unsupported where its inner exits are wanted: they share nothing.
    """
    found = []
    for i, member in enumerate(members):
        n = member.n_exits
        if not inner_exits:
            found.append(Link(i, n - 1 if member.restarts else 0, n, True))
        elif member.restarts and n > 1:
            raise Unsupported(f"member {i + 1} starts again from the input at every stage: leave inner_exits out")
        else:
            found += [Link(i, k, k + 1, k == n - 1) for k in range(n)]
    return found


class _Part(nn.Module):
    """State (x, logits of the members that are done [B, m, K], the running member's own state if it has one)."""

    def __init__(self, member: AnytimeModel, link: Link, n_classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(list(member.stages)[link.first : link.stop])
        self.head = member.heads[-1] if link.last else None
        self.begins = member.restarts or link.first == 0
        self.n_classes, self.dtype = n_classes, next(member.parameters()).dtype

    def forward(self, state: Any) -> Any:
        x, said, *inner = state if isinstance(state, tuple) else (state, state.new_zeros(len(state), 0, self.n_classes).float())
        here = x.to(self.dtype) if self.begins else inner[0]
        for stage in self.stages:
            here = stage(here)
        return (x, said, here) if self.head is None else (x, _and(said, self.head(here)))


class _Exit(nn.Module):
    """What the members say together; with ``head``, one of them by an exit on its way."""

    def __init__(self, combine: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.combine, self.head = combine, head

    def forward(self, state: Any) -> Tensor:
        _, said, *inner = state
        z: Tensor = self.combine(said if self.head is None else _and(said, self.head(inner[0])))
        return z


def _and(said: Tensor, logits: Tensor) -> Tensor:
    return torch.cat([said, logits.float()[:, None]], 1)


class EnsembleNet(Deployable):
    """Members, each as its own backend made it, in the order given; exit e says what ``combiners[e]`` makes of their logits.

    State: (x, logits of the members that are done [B, m, K], the running member's state if it is on its way). The format is the
    members'; of different ones it names them all ("onnx+torch"), and no board has both.
    """

    def __init__(self, members: Sequence[Deployable], combiners: Sequence[nn.Module], n_classes: int, inner_exits: bool) -> None:
        self.members, self.links, self.n_classes = list(members), links(members, inner_exits), n_classes
        self.combiners = [c.eval() for c in combiners]
        self.twin = AnytimeModel(
            [_Part(members[link.member].twin, link, n_classes) for link in self.links],
            [
                _Exit(combine, None if link.last else members[link.member].twin.heads[link.first])
                for link, combine in zip(self.links, self.combiners, strict=True)
            ],
        ).eval()
        self.twin.trained_on = frozenset().union(*(m.twin.trained_on for m in members))
        self.format = "+".join(sorted({m.format for m in members}))  # type: ignore[misc]
        self.execution = " + ".join(dict.fromkeys(m.execution for m in members))
        self.simulated = any(m.simulated for m in members)
        if len(needs := {m.needs for m in members if m.needs}) > 1:
            raise Unsupported(f"its members need different CPU kernels ({needs}): give them one 16-bit format")
        self.needs = next(iter(needs), ())
        self.bits = self._renamed([m.bits for m in members])
        self.sqnr = self._renamed([m.sqnr for m in members])
        self.facts = {k: v for m in reversed(members) for k, v in m.facts.items() if k in ("simulated", "twin", "target")}

    def _renamed(self, of: Sequence[Mapping[str, T]]) -> dict[str, T]:
        """What is said of the members' layers, by the layers' names in the ensemble; of heads that it never runs nothing."""
        found = {}
        for e, link in enumerate(self.links):
            head = f"stages.{e}.head" if link.last else f"heads.{e}.head"
            names = {f"stages.{k}": f"stages.{e}.stages.{k - link.first}" for k in range(link.first, link.stop)}
            names[f"heads.{link.stop - 1}"] = head
            for path, value in of[link.member].items():
                kind, k, *rest = path.split(".", 2)
                if f"{kind}.{k}" in names:
                    found[".".join([names[f"{kind}.{k}"], *rest])] = value
        return found

    def open(self, threads: int) -> None:
        super().open(threads)
        for member in self.members:
            member.open(threads)

    def start(self, x: Floats) -> Any:
        return np.asarray(x, dtype=np.float32), np.empty((len(x), 0, self.n_classes), np.float32)

    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        x, said, *inner = state
        logits: Floats | None = None
        e = segment.first
        while e < segment.stop:
            i, first, stop, last = self.links[e]
            while not last and e + 1 < segment.stop:  # one run of the member as far as the segment goes
                e += 1
                _, _, stop, last = self.links[e]
            member = self.members[i]
            asked = last or (segment.head == e and e + 1 == segment.stop)
            here = inner[0] if inner else member.start(x)
            here, logits = member.step(Segment(first, stop, stop - 1 if asked else None), here)
            inner = [here]
            if last:
                said, inner, logits = _append(said, logits), [], None
            e += 1
        state = (x, said, *inner)
        if segment.head is None:
            return state, None
        link = self.links[segment.head]
        if not link.last:
            if logits is None:
                _, logits = self.members[link.member].step(Segment(link.stop, link.stop, link.stop - 1), inner[0])
            said = _append(said, logits)
        with torch.inference_mode():
            return state, self.combiners[segment.head](torch.from_numpy(said)).numpy()

    def save(self, folder: Path) -> list[Path]:
        """A folder per member, and the combiners."""
        paths = []
        for i, member in enumerate(self.members):
            own = folder / f"member_{i}"
            own.mkdir()
            paths += member.save(own)
        torch.save(self.combiners, folder / "combiners.pt")
        return [*paths, folder / "combiners.pt"]

    def executed(self, x: Floats) -> dict[str, str] | None:
        said = [member.executed(x) for member in self.members]
        return None if all(one is None for one in said) else self._renamed([one or {} for one in said])


def _append(said: Floats, logits: Floats | None) -> Floats:
    assert logits is not None
    return np.concatenate([said, logits[:, None]], 1)


# The backends' common part


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
        net, own = others(self, trainer)(i, recipe=replace(trainer.recipe, start="scratch"), fresh=True)
        return net, replace(own, key=f"{own.key}-{name}")


def others(backend: Backend, trainer: Trainer) -> Others:
    """Where members come from; UsageError for a trainer that knows of none."""
    if trainer.others is None:
        raise UsageError(f"{backend.label}: this trainer knows of no other networks; take one that a workshop makes")
    return trainer.others


def answers(members: Sequence[Deployable], x: Floats, inner_exits: bool) -> list[Floats]:
    """What each exit's combiner reads of x [N, ...]: logits [N, m, K], exit by exit."""
    found = []
    done: list[Floats] = []
    for member in members:
        logits = member.predict(x)
        found += [np.stack([*done, z], 1) for z in (logits if inner_exits else logits[-1:])]
        done.append(logits[-1])
    return found


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
            shape, said = "x".join(map(str, x.shape[1:])), (str(error).strip() or type(error).__name__).splitlines()[0]
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


def disagreement(said: Ints) -> float:
    """Share of samples about which two members say different classes [m, N], meant over the pairs.

    Source: Kuncheva and Whitaker, "Measures of diversity in classifier ensembles", 2003, section 2.1.3, with "different
    classes" for "one right, one wrong".
    """
    return float(np.mean([(a != b).mean() for a, b in combinations(said, 2)]))


def double_fault(said: Ints, labels: Ints) -> float:
    """Share of samples about which two members [m, N] are both wrong, meant over the pairs.

    Source: Kuncheva and Whitaker 2003, section 2.1.4 (Giacinto and Roli 2001).
    """
    wrong = said != labels
    return float(np.mean([(a & b).mean() for a, b in combinations(wrong, 2)]))
