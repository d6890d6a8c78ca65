"""What exit shares alone are worth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anytime.errors import Unsupported, UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions
from anytime.policy import PathCost, Policy

BLOCK = 100  # neighbouring lots that are spread evenly


@dataclass(frozen=True)
class Random(Policy):
    """Leave by lot, with the exit shares of another policy: a lower bound for what it decides.

    ``of`` is fitted first; ``cuts`` [E-1] then divide val into just as many samples per exit, so that both spend the same.
    The lot of a sample is a number in [0, 1) that ``seed`` and its position in the part alone decide, every hundred of
    them evenly spread, so that the shares hold on other parts too; at an exit it answers as ``of`` does. UsageError
    without ``of``.
    Source: this project.
    """

    bound = True

    of: Policy | None = None
    seed: int = 0
    cuts: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """The name of the question."""
        return f"Random as {self._of.label}" + (f", seed {self.seed}" if self.seed else "")

    @property
    def _of(self) -> Policy:
        if self.of is None:
            raise UsageError("Random needs a policy whose exit shares it takes: give it one, as in Random(of=MaxProb())")
        return self.of

    def uses(self, n_exits: int) -> tuple[int, ...]:
        """What ``of`` uses."""
        return self._of.uses(n_exits)

    def exits(self, logits: Floats) -> Ints:
        """[E, N, K] -> the exit that each sample takes [N], by its position among the N."""
        if len(self.cuts) != len(logits) - 1:
            raise UsageError(f"{self.label}: {len(self.cuts)} cuts are fitted for {len(logits)} exits; call fit first")
        return np.searchsorted(np.array(self.cuts), self._lots(logits.shape[1]), side="right")

    def answer(self, logits: Floats, exits: Ints) -> Floats:
        """The logits that ``of`` answers [N, K]."""
        return self._of.answer(logits, exits)

    def _lots(self, n: int) -> Floats:
        rng = np.random.default_rng(self.seed)
        blocks = [(rng.permutation(BLOCK) + rng.random(BLOCK)) / BLOCK for _ in range(-(-n // BLOCK))]
        return np.concatenate(blocks)[:n]  # so the first of more are the same

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        fitted = self._of.fit(val, cost, budget)
        lots = np.concatenate([[0.0], np.sort(self._lots(len(val.labels))), [1.0]])
        left = np.bincount(fitted.leave(val), minlength=val.n_exits).cumsum()[:-1]
        # Past both ends a cut is 0 or 1 itself: who left nobody or everybody on val does so everywhere.
        middle = (lots[left] + lots[left + 1]) / 2
        cuts = np.where(left == 0, 0.0, np.where(left == len(val.labels), 1.0, middle))
        return replace(self, of=fitted, cuts=tuple(cuts.tolist()))

    def _stop(self, logits: Floats) -> Bools:
        raise Unsupported(f"{self.label}: its lots go by a sample's position, so no board can run it; ask exits(logits)")
