"""Read few exits: heads that nobody reads cost nothing, and links between them run as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from anytime.errors import Infeasible, UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions
from anytime.policy import PathCost, Policy


@dataclass(frozen=True)
class Within:
    """The cost of paths of a network of which only the exits ``reads`` are read."""

    cost: PathCost
    reads: tuple[int, ...]

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        """As the whole network's."""
        return self.cost.path(tuple(self.reads[k] for k in uses), self.reads[exit])


@dataclass(frozen=True)
class Reading(Policy):
    """What the policy ``of`` decides when it reads only some exits.

    ``reads``: these, from 0, the last of them takes what is left. By default ``fit`` chooses them, of all sets of 2 to ``most``
    exits: the set whose fitted policy is most accurate on val within the budget (``fit_accuracy``: cheapest at the accuracy); of
    equals the cheaper (the more accurate), then the first. ``chosen`` is what it found. UsageError without ``of``, with a bound
    or with one that promises a risk, and for exits that the network does not have.
    Source: this project; that heads are paid for is Huang et al.'s remark on MSDNet, ICLR 2018, section 4.
    """

    of: Policy | None = None
    reads: tuple[int, ...] = ()
    most: int = 3
    chosen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reads and (list(self.reads) != sorted(set(self.reads)) or len(self.reads) < 2 or self.reads[0] < 0):
            raise UsageError(f"Reading: reads={self.reads} must name at least two exits, from 0, ascending")
        if self.most < 2:
            raise UsageError(f"Reading: most={self.most} leaves nothing to decide; give 2 or more")

    @property
    def label(self) -> str:
        """The name of the question."""
        where = "exits " + ", ".join(str(k + 1) for k in self.reads) if self.reads else f"at most {self.most} exits"
        return f"{self._of.label} reading {where}"

    @property
    def answers_as(self) -> str:
        """As ``of``."""
        return self._of.answers_as

    @property
    def tempers(self) -> bool:
        """``of`` may."""
        return bool(self.temperatures) or self._of.tempers

    @property
    def _of(self) -> Policy:
        if self.of is None or self.of.bound:
            raise UsageError("Reading needs a policy that a board can run: give it one, as in Reading(of=MaxProb())")
        if self.of.promises:
            raise UsageError(
                f"Reading: what {self.of.label} promises holds against the network's last exit, read with all others; use it alone"
            )
        return self.of

    def uses(self, n_exits: int) -> tuple[int, ...]:
        """Those chosen; before that every one."""
        return self.chosen or tuple(range(n_exits))

    # Fitting ---------------------------------------------------------------------------------------------------

    def _sets(self, n_exits: int) -> Iterator[tuple[int, ...]]:
        if self.reads and self.reads[-1] >= n_exits:
            raise UsageError(f"{self.label}: the network has {n_exits} exits; name those from 0 to {n_exits - 1}")
        if self.reads:
            yield self.reads
        else:
            for n in range(2, min(self.most, n_exits) + 1):
                yield from combinations(range(n_exits), n)

    def _best(
        self,
        val: Predictions,
        cost: PathCost,
        fit: Callable[[Policy, Predictions, PathCost], Policy],
        rank: Callable[[float, float], tuple[float, float]],
    ) -> Policy | list[Infeasible]:
        """The set of exits whose fitted policy has the least ``rank(right, spent)``; why all were refused when none can be had."""
        found: list[tuple[tuple[float, float], int, Policy]] = []
        refused: list[Infeasible] = []
        for i, reads in enumerate(self._sets(val.n_exits)):
            some = replace(val, logits=self.tempered_all(val.logits)[list(reads)])
            try:
                inner = fit(self._of, some, Within(cost, reads))
            except Infeasible as error:
                refused.append(error)
                continue
            exits = inner.leave(some)
            right = float((inner.answer(some.logits, exits).argmax(-1) == val.labels).mean())
            spent = inner.spends(exits, len(reads), Within(cost, reads))
            found.append((rank(right, spent), i, replace(self, of=inner, chosen=reads)))
        return min(found, key=lambda f: f[:2])[2] if found else refused

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        best = self._best(val, cost, lambda p, some, within: p.fit(some, within, budget), lambda right, spent: (-right, spent))
        if isinstance(best, list):
            raise self._infeasible(budget, min(e.least for e in best))
        return best

    def _fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        best = self._best(
            val, cost, lambda p, some, within: p.fit_accuracy(some, within, accuracy), lambda right, spent: (spent, -right)
        )
        if isinstance(best, list):
            raise self._out_of_reach(accuracy, max(e.best for e in best))
        return best

    # Deciding --------------------------------------------------------------------------------------------------

    def _stop(self, logits: Floats) -> Bools:
        return self._of.stop(logits)

    def answer(self, logits: Floats, exits: Ints) -> Floats:
        """The logits [N, K] that ``of`` answers; at an exit that is not read its own."""
        if self._of.answers_as == "exit taken" and not self._of.tempers:
            return super().answer(logits, exits)
        reads = np.array(self.uses(len(logits)))
        read = np.isin(exits, reads)
        if read.all():
            inner = self._of.tempered([self.temperatures[k] for k in reads]) if self.temperatures else self._of
            return inner.answer(logits[reads], np.searchsorted(reads, exits))
        answered = super().answer(logits, exits).astype(np.float64)
        if read.any():
            answered[read] = self.answer(logits[:, read], exits[read])
        return answered

    def matched(self, shares: Sequence[float], logits: Floats) -> Policy:
        """As ``of``, whose exits these are: shares of others are given to the next one that is read."""
        reads = list(self.uses(len(logits)))
        upto = np.concatenate([np.asarray(shares, dtype=np.float64).cumsum()[reads[:-1]].clip(max=1.0), [1.0]])
        return replace(self, of=self._of.matched(np.diff(upto, prepend=0.0).tolist(), self.tempered_all(logits)[reads]))
