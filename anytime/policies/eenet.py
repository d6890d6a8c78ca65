"""EENet's learned scheduler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from anytime import stops
from anytime.errors import UsageError
from anytime.metrics import Bools, Floats, Predictions, correct, softmax
from anytime.policy import PathCost, Policy
from anytime.threshold import Divider, Threshold, lower

TURN = 10  # steps after which scores and assignment take turns
RATE = 0.01  # of Adam
TILT = 40.0  # asinh of the steepest tilt of shares towards the cheapest or the dearest exit
HALVINGS = 50  # of the range of tilts


@dataclass(frozen=True)
class EENet(Threshold):
    """Leave when a learned score of the exits read so far reaches the threshold of this exit.

    The score of exit k weighs its probabilities (``classes`` [E-1][K]), the largest of them, its confidence by entropy, and the
    scores of the exits before (``features`` [E-1][2+k]). It learns to say whether the exit is right, most of all about the
    samples that a second net, used for this alone, would assign to the exit; the mean assignment gives the exits' shares, and
    thresholds are set in turn to keep them. ``seed`` draws the start: UsageError without one. ``fit_accuracy`` learns anew for
    each of the 13 to 25 budgets that it tries.
    Source: Ilhan et al., "Adaptive Deep Neural Network Inference Optimization with EENet", WACV 2024, and its code, whose
    released form does not run. Deviations: scores are clamped to [0, 1] where they are learned and where later exits read them,
    and compared unclamped, as most of a sure network's samples would tie at 1 and could not be divided; so the budget is met,
    not aimed at within 10 %: of all shares that spend it, those are taken that are nearest to the learned ones (in relative
    entropy: each times exp(-t x cost), t found on val); scores start from the largest probability plus noise and are learned in
    ``steps`` full-batch steps of Adam at 0.01, not in 1,000 epochs at 3e-5 from ten random starts; one start; all of it on val.
    """

    version: ClassVar[int] = 2  # 1 compared clamped scores

    seed: int | None = None
    steps: int = 600
    classes: tuple[tuple[float, ...], ...] = ()
    features: tuple[tuple[float, ...], ...] = ()

    @property
    def label(self) -> str:
        """The name of the question; its seed and steps where they are not 0 and 600."""
        steps = "" if self.steps == EENet.steps else f", {self.steps} steps"
        return super().label + (f", seed {self.seed}" if self.seed else "") + steps

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats]:
        if not self.classes:
            raise UsageError(f"{self.label}: no scheduler is learned; call fit with val predictions of this very network first")
        return np.array(self.classes), lower(self.features)

    def _scores(self, logits: Floats) -> Floats:
        return stops.scheduled(logits, *self._arrays)

    def _stop(self, logits: Floats) -> Bools:
        return stops.by_schedule(logits, *self._arrays, self.thresholds)

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        if self.seed is None:
            raise UsageError(f"{self.label}: a learned policy needs a seed; give one, as in EENet(seed=0)")
        self._enough(val)
        self._affords(val.n_exits, cost, budget)
        costs = self.costs(val.n_exits, cost)
        wanted = min(max(budget, float(costs.min())), float(costs.max()))
        p = softmax(self._tempered(val.logits))
        classes, features, shares = _learn(p, correct(val), costs / wanted, self.seed, self.steps)
        learned = replace(self, classes=classes, features=features)
        return learned._spend(val, cost, budget, shares)

    def _spend(self, val: Predictions, cost: PathCost, budget: float, shares: Floats) -> EENet:
        """The copy whose shares spend the budget on val and are nearest to ``shares`` [E]."""
        n_exits, n, n_classes = val.logits.shape
        costs = self.costs(n_exits, cost)
        dearer = (costs - costs.min()) / max(float(np.ptp(costs)), np.finfo(float).tiny)
        divider = Divider(self, self.scores(val.logits[:-1]), n_classes)

        def tilted(steepness: float) -> tuple[float, tuple[float, ...]]:
            logs = np.log(shares) - np.sinh(steepness) * dearer
            wanted = np.exp(logs - logs.max())
            divided = divider.divide(n * wanted / wanted.sum())
            return self.spends(divided.exits, n_exits, cost), divided.thresholds

        dear, cheap = -TILT, TILT
        best = max((t for t in (tilted(cheap), tilted(dear)) if t[0] <= budget), default=None)
        assert best is not None  # the steepest tilt sends everyone out at the cheapest exit
        for _ in range(HALVINGS):
            middle = (dear + cheap) / 2
            trial = tilted(middle)
            if trial[0] <= budget:
                cheap, best = middle, max(best, trial)
            else:
                dear = middle
        return replace(self, thresholds=best[1])


def _learn(
    p: Floats, right: Bools, costs: Floats, seed: int, steps: int
) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...], Floats]:
    """Weights of the scores of all exits but the last, and the mean assignment to every exit [E].

    From probabilities [E, N, K], who is right [E, N], and costs [E] as multiples of the budget.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy

    n_exits, _, n_classes = p.shape
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    said, hit, price = torch.from_numpy(p), torch.from_numpy(right).double(), torch.from_numpy(costs)
    sure = 1 + torch.special.xlogy(said, said).sum(-1) / np.log(n_classes)
    seen = torch.cat([said, said.max(-1, keepdim=True).values, sure[..., None]], -1)  # [E, N, K + 2]
    size = [n_classes + 2 + k for k in range(n_exits)]
    scoring = [drawn(d, scale=0.01) for d in size]
    for weights in scoring:
        weights[n_classes] += 1.0  # starts as the largest probability
    hidden = [(drawn(d, d // 2, scale=d**-0.5), drawn(d // 2, scale=0.1)) for d in size]
    output = [(drawn(d // 2, scale=(d // 2) ** -0.5), drawn(1, scale=0.1)) for d in size]
    assigning = [t for pair in hidden + output for t in pair]
    for t in scoring + assigning:
        t.requires_grad_()
    optimizers = [torch.optim.AdamW(w, lr=RATE, weight_decay=0.01, foreach=True) for w in (scoring, assigning)]

    def scored() -> tuple[list[torch.Tensor], torch.Tensor]:
        """What each exit's nets read, and the scores [E, N]; a score learns nothing from those of later exits."""
        read: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        for k in range(n_exits):
            read.append(torch.cat([seen[k], *(q.detach()[:, None] for q in scores)], 1))
            scores.append((read[k] @ scoring[k]).clamp(0, 1))
        return read, torch.stack(scores)

    def assigned_by(read: list[torch.Tensor]) -> torch.Tensor:
        """Assignment [E, N]."""
        each = [torch.sigmoid(torch.sigmoid(x @ h + a) @ o + b) for x, (h, a), (o, b) in zip(read, hidden, output, strict=True)]
        return torch.stack(each).softmax(0)

    def loss_of(q: torch.Tensor, assigned: torch.Tensor) -> torch.Tensor:
        weight = assigned / assigned.sum(1, keepdim=True)
        loss = (weight * binary_cross_entropy(q, hit, reduction="none")).sum()
        shown = q.clamp(min=1e-6) / q.clamp(min=1e-6).sum(0)
        loss = loss + 1e-3 * (assigned * (assigned / shown).log()).sum(0).mean()
        return loss + 1e-2 * ((price[:, None] * assigned).sum(0).mean() - 1).abs()

    for step in range(steps):
        turn = step // TURN % 2  # what the other net says is a constant meanwhile
        if turn == 0:
            read, q = scored()
            with torch.no_grad():
                assigned = assigned_by(read)
        else:
            if step % TURN == 0:
                with torch.no_grad():
                    read, q = scored()
            assigned = assigned_by(read)
        optimizers[turn].zero_grad()
        loss_of(q, assigned).backward()  # type: ignore[no-untyped-call]
        optimizers[turn].step()
    with torch.no_grad():
        shares = assigned_by(scored()[0]).mean(1).numpy()
    rows = [weights.tolist() for weights in scoring[:-1]]
    return tuple(tuple(r[:n_classes]) for r in rows), tuple(tuple(r[n_classes:]) for r in rows), shares
