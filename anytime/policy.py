"""The promise every exit policy keeps. numpy only; the exit tests themselves are in stops.py."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from anytime import stops
from anytime.errors import Infeasible, Leak, Unsupported, UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions, take
from anytime.spec import Spec

HALVINGS = 12  # of the range of budgets, where a wanted accuracy is searched for: 1/4096 of it; and steps of the grid over it

P = TypeVar("P", bound="Policy")


class PathCost(Protocol):
    """What a policy knows of cost: any unit, one number per path."""

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        """Cost of leaving at ``exit`` when the heads of ``uses`` up to it are run."""


@dataclass(frozen=True)
class Policy(Spec, ABC):
    """Decides, sample by sample, at which exit to answer.

    A policy without fitted parameters is a question; ``fit`` returns the answer: a copy that carries them,
    as plain Python numbers, so that a record holds them exactly.
    ``temperatures`` [E], where given, divide the logits of each exit before anything is decided: see ``tempered``.
    """

    bound: ClassVar[bool] = False  # True: it knows what no board can know (a label, a sample's place), and is none's to run
    promises: ClassVar[bool] = False  # True: it guarantees something against the last exit, which must stay the network's
    least_exits: ClassVar[int] = 2  # networks with fewer leave it nothing to decide

    temperatures: tuple[float, ...] = field(default=(), kw_only=True)

    @property
    def label(self) -> str:
        """The name of the question, which tables group by: nothing fitted is in it."""
        return type(self).__name__

    def uses(self, n_exits: int) -> tuple[int, ...]:
        """Exits that it reads, ascending; the last of them takes what is left. Heads of others are never run."""
        return tuple(range(n_exits))

    @property
    def answers_as(self) -> str:
        """ "exit taken", or the name of the policy that answers with other logits than those of the exit taken."""
        return "exit taken" if type(self).answer is Policy.answer else type(self).__name__

    # Fitting ---------------------------------------------------------------------------------------------------

    def fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        """A copy whose mean cost on ``val`` (see ``spends``) is at most ``budget``, in the unit of ``cost``.

        Raises Leak on any part but val, and on samples that the network has learned from; Infeasible when
        the budget lies under the least that it can spend; UsageError when there are too few samples or exits.
        """
        self._may_see(val)
        return self._learned(val)._fit(val, cost, budget)

    def fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        """The cheapest copy whose accuracy on ``val``, a share in [0, 1], is at least ``accuracy``.

        Exact where a policy's settings can be listed (see ``Listed``); else the cheapest that was found by halving the range of
        budgets. Errors as ``fit``; Infeasible, with the best accuracy that was found in its field ``best``.
        """
        self._may_see(val)
        return self._learned(val)._fit_accuracy(val, cost, accuracy)

    def _may_see(self, val: Predictions) -> None:
        if val.part != "val":
            raise Leak(f"{self.label}: policies are fitted on val, not on {val.part}")
        if seen := val.sources & val.trained_on:
            raise Leak(
                f"{self.label}: the network was trained on the samples of this val part (digest {min(seen)}); "
                "fit policies for weights that were trained on the split"
            )
        if not len(val.labels):
            raise UsageError(f"{self.label}: the val part has no samples to fit on; give the data set a larger val")
        if val.n_exits < self.least_exits:
            raise UsageError(f"{self.label}: a network of one exit leaves nothing to decide; use Fixed, or a network with more")

    def _infeasible(self, budget: float, least: float) -> Infeasible:
        # Digits in full: the least that is named must itself be a budget that works.
        return Infeasible(
            f"{self.label}: a budget of {budget} is too small; the least possible is {least}, give that or more", least
        )

    def _out_of_reach(self, accuracy: float, best: float) -> Infeasible:
        return Infeasible(
            f"{self.label}: an accuracy of {accuracy} on val is out of reach; the best found is {best}, ask for that or less",
            best=best,
        )

    def _learned(self, val: Predictions) -> Policy:
        """A copy with all that is fitted whatever the budget."""
        return self

    @abstractmethod
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy: ...

    def _affords(self, n_exits: int, cost: PathCost, budget: float) -> None:
        """Infeasible unless the budget pays for the cheapest path."""
        least = float(self.costs(n_exits, cost).min())
        # Not "budget < least": NaN must not pass.
        if not budget >= least:
            raise self._infeasible(budget, least)

    def _fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        costs = self.costs(val.n_exits, cost)
        return self._halve(val, cost, accuracy, float(costs[np.isfinite(costs)].max()))

    def _halve(self, val: Predictions, cost: PathCost, accuracy: float, high: float) -> Policy:
        """The cheapest that is found by halving the budgets under ``high``, or where that fails under the least of a grid that does."""
        low, best = float(self.costs(val.n_exits, cost).min()), -math.inf
        found: list[tuple[float, Policy]] = []

        def reaches(budget: float) -> bool:
            nonlocal best
            try:
                fitted = self._fit(val, cost, budget)
            except Infeasible:
                return False
            exits = fitted.leave(val)
            right = float(take(fitted.right(val), exits).mean())
            best = max(best, right)
            # Not "right < accuracy": NaN must not pass.
            if right >= accuracy:
                found.append((fitted.spends(exits, val.n_exits, cost), fitted))
            return right >= accuracy

        if not reaches(high):  # a deep exit may undo what one before it had right, so less may do
            grid = np.linspace(low, high, HALVINGS + 1)[:-1].tolist()
            enough = next((i for i, budget in enumerate(grid) if reaches(budget)), None)
            if enough is None:
                raise self._out_of_reach(accuracy, best)
            low, high = grid[max(enough - 1, 0)], grid[enough]
        for _ in range(HALVINGS if low < high else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return min(found, key=lambda f: f[0])[1]

    # Deciding --------------------------------------------------------------------------------------------------

    def stop(self, logits: Floats) -> Bools:
        """Logits [k+1, B, K] of the exits that were read so far -> leave now? [B]."""
        return self._stop(self._tempered(logits))

    @abstractmethod
    def _stop(self, logits: Floats) -> Bools:
        """``stop`` with the temperatures already in the logits: calls a function of stops.py."""

    def exits(self, logits: Floats) -> Ints:
        """[E, N, K] -> the exit that each sample takes [N]; the last exit in use takes what is left."""
        n_exits, n, _ = logits.shape
        used = self.uses(n_exits)
        out = np.full(n, used[-1])
        going = np.ones(n, bool)
        for i, k in enumerate(used[:-1]):
            leave = going & self.stop(logits[list(used[: i + 1])])
            out[leave] = k
            going &= ~leave
        return out

    def leave(self, p: Predictions) -> Ints:
        """The exit that each sample takes [N]; a bound may look at more of ``p`` than its logits."""
        return self.exits(p.logits)

    @property
    def tempers(self) -> bool:
        """Whether what it answers is divided by temperatures."""
        return bool(self.temperatures)

    def answer(self, logits: Floats, exits: Ints) -> Floats:
        """The logits that are answered [N, K]: those of the exit taken, with its temperature."""
        answered = take(logits, exits)
        return answered / np.array(self.temperatures)[exits, None] if self.temperatures else answered

    def right(self, p: Predictions) -> Bools:
        """Whether its answer is right when sample n leaves at exit e: [E, N]."""
        n = len(p.labels)
        return np.stack([self.answer(p.logits, np.full(n, k)).argmax(-1) == p.labels for k in range(p.n_exits)])

    # Arms ------------------------------------------------------------------------------------------------------

    def tempered(self: P, temperatures: Sequence[float]) -> P:
        """A copy that divides the logits of exit k by ``temperatures[k]`` before it decides.

        The class that an exit says stays the same (that of several together need not); how sure it says to be does not.
        UsageError unless all are over 0.
        """
        if not all(0 < t < math.inf for t in temperatures):
            raise UsageError(f"{self.label}: temperatures must be finite and over 0, not {tuple(temperatures)}")
        return replace(self, temperatures=tuple(float(t) for t in temperatures))

    def matched(self, shares: Sequence[float], logits: Floats) -> Policy:
        """A copy that sends these shares [E] of unlabelled samples, logits [E, N, K], out of each exit.

        As nearly as the scores can be divided. Unsupported for policies without thresholds of their own at each exit.
        """
        raise Unsupported(f"{self.label} has no threshold at each exit, so it cannot be made to send given shares out of them")

    def tempered_all(self, logits: Floats) -> Floats:
        """Logits [E, N, K] of every exit, with the temperatures in them."""
        return logits / np.array(self.temperatures)[:, None, None] if self.temperatures else logits

    def _tempered(self, logits: Floats) -> Floats:
        if not self.temperatures:
            return logits
        used = self.uses(len(self.temperatures))
        if len(used) < len(logits):
            raise UsageError(
                f"{self.label}: {len(self.temperatures)} temperatures are given and exit {len(logits)} is read; give one per exit"
            )
        return stops.tempered(logits, tuple(self.temperatures[k] for k in used[: len(logits)]))

    # Cost ------------------------------------------------------------------------------------------------------

    def costs(self, n_exits: int, cost: PathCost) -> Floats:
        """Cost of leaving at each exit [E] under this policy's own heads; infinite where it never leaves."""
        used = self.uses(n_exits)
        return np.array([cost.path(used, k) if k in used else np.inf for k in range(n_exits)])

    def spends(self, exits: Ints, n_exits: int, cost: PathCost) -> float:
        """Mean cost, in the unit of ``cost``, of samples that leave at ``exits`` [N]: what a budget limits."""
        return float(mean_cost(np.bincount(exits, minlength=n_exits), self.costs(n_exits, cost)))


class Points(NamedTuple):
    """What the settings of a policy do on val, P of them, and the policy at each."""

    spent: Floats  # [P]: mean cost of a sample
    accuracy: Floats  # [P]: share in [0, 1]
    at: Callable[[int], Policy]


@dataclass(frozen=True)
class Listed(Policy):
    """A policy whose settings can be listed, with what each spends and how accurate it is on val.

    ``fit`` picks the one that spends most within the budget; of equals the most accurate, then the first. ``fit_accuracy``
    picks the cheapest that is accurate enough; of equals the most accurate, then the first.
    """

    @abstractmethod
    def _points(self, val: Predictions, cost: PathCost) -> Points: ...

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        points = self._points(val, cost)
        within = np.flatnonzero(points.spent <= budget)
        if not len(within):
            raise self._infeasible(budget, float(points.spent.min()))
        return points.at(int(within[np.lexsort((-points.accuracy[within], -points.spent[within]))[0]]))

    def _fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        points = self._points(val, cost)
        enough = np.flatnonzero(points.accuracy >= accuracy)
        if not len(enough):
            raise self._out_of_reach(accuracy, float(points.accuracy.max()))
        return points.at(int(enough[np.lexsort((-points.accuracy[enough], points.spent[enough]))[0]]))


def listed(candidates: Sequence[Policy], val: Predictions, cost: PathCost) -> Points:
    """The points of policies that are tried one by one."""
    exits = [c.leave(val) for c in candidates]
    spent = np.array([c.spends(e, val.n_exits, cost) for c, e in zip(candidates, exits, strict=True)])
    right = np.array([take(c.right(val), e).mean() for c, e in zip(candidates, exits, strict=True)])
    return Points(spent, right, candidates.__getitem__)


def mean_cost(counts: Ints, costs: Floats) -> Floats:
    """Mean cost of a sample [...] when counts [..., E] samples leave at each exit, at costs [E].

    Exact, up to the last division, for costs that are whole numbers.
    """
    taken = counts > 0
    total = (counts * np.where(taken, costs, 0)).sum(-1)  # an exit that nobody takes may cost infinity
    # All at one exit cost exactly that exit: rounding must not carry a mean out of the range of its values.
    least, most = np.where(taken, costs, np.inf).min(-1), np.where(taken, costs, -np.inf).max(-1)
    return np.asarray(np.clip(total / counts.sum(-1), least, most))
