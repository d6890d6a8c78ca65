"""What a training minimises: strategies that a recipe names.

A loss answers with its terms, in the order of the exits; their sum is minimised (OSGD takes them one by one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from anytime.errors import UsageError
from anytime.model import AnytimeModel
from anytime.spec import Spec

State = dict[str, float]  # what a loss carries from batch to batch; it lies in the checkpoint


@dataclass(frozen=True, kw_only=True)
class Loss(Spec, ABC):
    """Terms from the logits of every exit.

    ``label_smoothing`` is that of every cross-entropy in it.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"{type(self).__name__}: label_smoothing={self.label_smoothing} must lie in [0, 1)")

    @abstractmethod
    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        """logits [E, B, K] float32, y [B], ``done`` in [0, 1) of the training by epochs (1 where a trained network is trained
        on) -> terms [T]; may write ``state``."""

    def begin(self, model: AnytimeModel) -> None:
        """Before the optimizer is made: which parameters learn."""

    def epoch(self, model: AnytimeModel) -> None:
        """At the start of each epoch, in training mode."""

    def end(self, model: AnytimeModel) -> None:
        """After the training."""

    def each(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of every exit [E]."""
        return torch.stack([cross_entropy(z, y, label_smoothing=self.label_smoothing) for z in logits])


@dataclass(frozen=True)
class Joint(Loss):
    """Weighted sum of the exits' cross-entropies; weights () count every exit the same.

    A network of one exit takes weight 1. Sub-networks that restart (IResNeXt) train so too: their gradients add up.
    Source: BranchyNet, arXiv:1709.01686, section III-B; IResNeXt, Lee and Shin 2018, section 3.
    """

    weights: tuple[float, ...] = ()

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        each = self.each(logits, y)
        weights = self.weights if len(logits) > 1 else ()
        if weights and len(weights) != len(each):
            raise UsageError(
                f"recipe.loss.weights has {len(weights)} numbers for a network of {len(each)} exits: give one per exit, or ()"
            )
        return each * each.new_tensor(weights) if weights else each


@dataclass(frozen=True)
class FrozenTrunk(Loss):
    """Only the side heads learn; trunk and last head stay as they are, BatchNorm statistics too (IC-only).

    A network of one exit learns whole, from its labels: with ``start`` "static" that is the trunk's own training. UsageError for
    a trunk that nothing has trained.
    Source: SDN, Kaya et al., ICML 2019, arXiv:1810.07052, section 4.2.
    """

    def begin(self, model: AnytimeModel) -> None:
        if _trunk(model) and not model.trained_on:
            raise UsageError(
                "FrozenTrunk teaches side heads alone, and nothing has trained the trunk that they stand on: "
                "begin from one that is trained, with recipe.start='static', or take another loss"
            )
        for part in _trunk(model):
            part.requires_grad_(False)

    def epoch(self, model: AnytimeModel) -> None:
        for part in _trunk(model):
            part.eval()

    def end(self, model: AnytimeModel) -> None:
        model.requires_grad_(True)

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        return self.each(logits[:-1] if len(logits) > 1 else logits, y)


def _trunk(model: AnytimeModel) -> tuple[nn.Module, ...]:
    """What side heads stand on; nothing in a network without any."""
    return (model.stages, model.heads[-1]) if model.n_exits > 1 else ()


@dataclass(frozen=True)
class TrunkThenJoint(Loss):
    """The last exit alone for the first ``share`` of the epochs, then all exits jointly, each counted the same.

    Source: Kubaty et al. 2024, "How to Train Your Multi-Exit Model?", arXiv:2407.14320, the "mixed" regime. Deviation: one
    optimizer and one schedule run through both phases.
    """

    share: float = 0.5

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        each = self.each(logits, y)
        return each[-1:] if done < self.share else each


@dataclass(frozen=True)
class Rising(Loss):
    """The last exit with weight 1, side exits with weights that rise over the training to 0.15, 0.3, ... 0.9.

    tau_i = min(C_i, 0.01 + done * C_i), C spread evenly up to ``most`` over the side exits. Deviation: with fewer than six side
    exits the authors take the first of 0.15, 0.3, ... 0.9 (MobileNet's five end at 0.75); they count epochs from 1, here ``done``
    begins at 0.
    Source: SDN, Kaya et al., ICML 2019, arXiv:1810.07052, section 4.2 and the authors' aux_funcs.py (100 epochs, six side exits).
    """

    most: float = 0.9

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        each, n = self.each(logits, y), len(logits) - 1
        if n == 0:
            return each
        top = torch.linspace(self.most / n, self.most, n, device=each.device)
        return torch.cat([torch.minimum(top, 0.01 + done * top) * each[:-1], each[-1:]])


@dataclass(frozen=True)
class LinearWithLateKL(Loss):
    """Exit j of K weighs j / (K (K + 1)); from ``late`` of the training on, side exits also imitate the last one.

    The imitation is ``strength`` T^2 KL(softmax(z_K / T) || softmax(z_j / T)) / C for C classes, T = ``temperature``: the authors'
    KLDivLoss() takes the mean over classes as over samples, and lets the last exit be pulled towards the side exits too.
    Source: EENet, Ilhan et al., WACV 2024, arXiv:2301.07099, and its train.py and config.py (git-disl/EENet).
    """

    version: ClassVar[int] = 2  # 1 had the KL the other way round, summed over the classes

    late: float = 0.75
    strength: float = 0.01
    temperature: float = 3.0

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        n = len(logits)
        terms = self.each(logits, y) * torch.arange(1, n + 1, device=logits.device) / (n * (n + 1))
        if done >= self.late and n > 1:
            t = self.temperature
            last = log_softmax(logits[-1] / t, -1)
            pulls = [kl_div(log_softmax(z / t, -1), last, reduction="none", log_target=True).mean() for z in logits[:-1]]
            terms = torch.cat([terms[:-1] + self.strength * t**2 * torch.stack(pulls), terms[-1:]])
        return terms


@dataclass(frozen=True)
class Distilled(Loss):
    """Side exits learn from the labels and from the last exit's softened answer; the temperature rises as it grows sure.

    scale [(1 - C) sum_k CE_k + C T^2 sum_{k<K} H(softmax(z_K / T), softmax(z_k / T))], scale = 2 x 5 / K, C = ``share``. T starts
    at 1 and is multiplied by ``growth`` after each batch in which the last exit's mean largest probability at T exceeds
    ``sure``; T is part of the checkpoint. Where a trained network is trained on it starts at 1 again.
    Source: Phuong and Lampert, "Distillation-based Training for Multi-Exit Architectures", ICCV 2019, section 4, and main.py.
    """

    share: float = 0.5
    growth: float = 1.05
    sure: float = 0.5

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        n, t = len(logits), state.setdefault("temperature", 1.0)
        teacher = softmax(logits[-1].detach() / t, -1)
        soft = [-(teacher * log_softmax(z / t, -1)).sum(-1).mean() for z in logits[:-1]]
        terms = (1 - self.share) * self.each(logits, y)
        if soft:
            terms = torch.cat([terms[:-1] + self.share * t**2 * torch.stack(soft), terms[-1:]])
        if float(teacher.max(-1).values.mean()) > self.sure:
            state["temperature"] = t * self.growth
        return terms * (10 / n)


@dataclass(frozen=True)
class FromTeacher(Loss):
    """A student's own loss ``of`` and, exit by exit, its distance to a teacher; the logits are the student's, then the teacher's.

    Term k is (1 - share) of(z)_k + share T^2 KL(softmax(t_k / T) || softmax(z_k / T)), for every exit k that ``of`` has a term for.
    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2; Mishra and Marr, ICLR 2018, arXiv:1711.05852 (a float
    teacher for a network that is quantized).
    """

    of: Loss = Joint()
    share: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing:
            raise UsageError("FromTeacher: label_smoothing is that of its own loss: give it to ``of``")

    def begin(self, model: AnytimeModel) -> None:
        self.of.begin(model)
        if not getattr(model, "taught", False):
            raise UsageError(
                "FromTeacher reads a teacher's logits behind the student's, which only QAT(teach=...) gives it: "
                "in a recipe take another loss, such as Distilled()"
            )

    def epoch(self, model: AnytimeModel) -> None:
        self.of.epoch(model)

    def end(self, model: AnytimeModel) -> None:
        self.of.end(model)

    def __call__(self, logits: Tensor, y: Tensor, done: float, state: State) -> Tensor:
        student, teacher = logits.chunk(2)
        t = self.temperature
        pulls = [
            kl_div(log_softmax(z / t, -1), log_softmax(w.detach() / t, -1), reduction="batchmean", log_target=True)
            for z, w in zip(student, teacher, strict=True)
        ]
        own = self.of(student, y, done, state)
        return (1 - self.share) * own + self.share * t**2 * torch.stack(pulls[: len(own)])
