"""Every policy keeps the contract, and every way of breaking it that we thought of is caught by its own message."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pytest

import anytime.policies
from anytime.errors import Infeasible
from anytime.metrics import Bools, Floats, Ints, Predictions, correct, take
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.eenet import EENet
from anytime.policies.fixed import Fixed
from anytime.policies.random import Random
from anytime.policies.reading import Reading
from anytime.policies.risk import RiskControl
from anytime.policies.sdn import SDN
from anytime.policies.ztw import ZTW
from anytime.policy import PathCost, Policy
from tests.contracts import policy as contract

# What a keeper needs to be asked at all, and what makes its fit quick.
ARGUMENTS: dict[type[Policy], dict[str, Any]] = {
    EENet: {"seed": 0, "steps": 4},
    Random: {"of": Entropy()},
    Reading: {"of": Entropy()},
}


def keepers() -> Iterator[Policy]:
    """Every concrete policy of every file, as it stands and with each of its switches on."""
    for module in pkgutil.iter_modules(anytime.policies.__path__):
        room = importlib.import_module(f"anytime.policies.{module.name}")
        for _, cls in inspect.getmembers(room, inspect.isclass):
            if issubclass(cls, Policy) and not inspect.isabstract(cls) and cls.__module__ == room.__name__:
                given = ARGUMENTS.get(cls, {})
                yield cls(**given)
                yield from (cls(**(given | {f.name: True})) for f in dataclasses.fields(cls) if f.default is False)
    yield RiskControl(0.2, against="labels")
    yield Random(of=ZTW())
    yield Reading(of=SDN(), reads=(0, 1))
    yield Reading(of=ZTW(), most=2)


KEEPERS = {p.label: p for p in keepers()}


def test_the_walk_finds_them_all() -> None:
    named = {"Fixed", "Patience", "GeometricSplit", "EENet, 4 steps", "RiskControl 0.05", "RiskControl 0.2 of accuracy", "Oracle"}
    searched = ("MaxProb", "Entropy", "Margin", "SDN", "ZTW")
    named |= {*searched, *(f"{name} per exit" for name in searched), "Random as Entropy", "Random as ZTW"}
    named |= {"Entropy reading at most 3 exits", "SDN reading exits 1, 2", "ZTW reading at most 2 exits"}
    assert KEEPERS.keys() >= named
    assert len(KEEPERS) == len(list(keepers())), "two policies have one label"


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("policy", KEEPERS.values(), ids=KEEPERS)
def test_keeps_the_contract(policy: Policy, check: Callable[[Policy], None]) -> None:
    check(policy)


class Overspends(Entropy):
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        return super()._fit(val, cost, 1.2 * budget)


class ReadsTest(Entropy):
    def fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        return super().fit(replace(val, part="val"), cost, budget)


class ReadsTrain(Entropy):
    def fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        return super().fit(replace(val, trained_on=frozenset()), cost, budget)


class ForgetsOrigins(Entropy):
    def fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        return super().fit(replace(val, sources=val.sources - {"published"}), cost, budget)


class Thrifty(Entropy):
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        dear = budget > cost.path(self.uses(val.n_exits), val.n_exits - 1)
        return super()._fit(val, cost, cost.path((0,), 0) if dear else budget)


class LeavesElsewhere(Entropy):
    def uses(self, n_exits: int) -> tuple[int, ...]:
        return tuple(range(0, n_exits, 2))

    def exits(self, logits: Floats) -> Ints:
        return np.full(logits.shape[1], min(1, len(logits) - 1))


class PeeksAtOtherHeads(LeavesElsewhere):
    def exits(self, logits: Floats) -> Ints:
        read = self.uses(len(logits))
        return np.where(logits[len(logits) // 2].max(-1) > 2, read[0], read[-1])


class WaitsForTheBatch(MaxProb):
    def stop(self, logits: Floats) -> Bools:
        leave = super().stop(logits)
        return np.full(len(leave), leave.all())


class KnowsTheBatch(MaxProb):
    def stop(self, logits: Floats) -> Bools:
        leave = super().stop(logits)
        leave[1:] &= False
        return leave


class NeverInfeasible(Fixed):
    def fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        try:
            return super().fit(val, cost, budget)
        except Infeasible:
            return replace(self, exit=0)


class NamesTooLittle(Fixed):
    def _infeasible(self, budget: float, least: float) -> Infeasible:
        return super()._infeasible(budget, least / 2)


class NamesTooMuch(Fixed):
    def _infeasible(self, budget: float, least: float) -> Infeasible:
        return super()._infeasible(budget, least * 2)


class SaysNoNumber(Fixed):
    def _infeasible(self, budget: float, least: float) -> Infeasible:
        return Infeasible("too little", least)


class LabelsWhatIsFitted(Fixed):
    @property
    def label(self) -> str:
        return f"Fixed at exit {self.exit + 1}"


class KeepsNumpyNumbers(Fixed):
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        fitted = super()._fit(val, cost, budget)
        assert isinstance(fitted, Fixed)
        object.__setattr__(fitted, "exit", np.int64(fitted.exit))  # past the check of its type
        return fitted


class TurnsInto(MaxProb):
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        return MaxProb().fit(val, cost, budget)


@dataclass(frozen=True)
class Dice(Fixed):
    throw: int = 0

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        return replace(super()._fit(val, cost, budget), throw=next(_throws))  # type: ignore[call-arg]


_throws = count(1)


class Sharpens(MaxProb):
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        fitted = super()._fit(val, cost, budget)
        val.logits[:] *= 2
        return fitted


class Remembers(Fixed):
    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        fitted = super()._fit(val, cost, budget)
        assert isinstance(fitted, Fixed)
        object.__setattr__(self, "exit", fitted.exit)
        return fitted


class CountsItself(Fixed):
    def spends(self, exits: Ints, n_exits: int, cost: PathCost) -> float:
        return 0.9 * super().spends(exits, n_exits, cost)


class AimsLow(MaxProb):
    def _fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        return super()._fit_accuracy(val, cost, accuracy if accuracy > 1 else 0.9 * accuracy)


class KeepsTheBestToItself(MaxProb):
    def _out_of_reach(self, accuracy: float, best: float) -> Infeasible:
        return Infeasible("too much", best=best)


class AgreesToAnything(MaxProb):
    def _fit_accuracy(self, val: Predictions, cost: PathCost, accuracy: float) -> Policy:
        return super()._fit_accuracy(val, cost, min(accuracy, 0.5))


class BelievesTheExit(SDN):
    def right(self, p: Predictions) -> Bools:
        return correct(p)


class Cheats(MaxProb):
    def leave(self, p: Predictions) -> Ints:
        return np.where(p.labels > 0, self.exits(p.logits), 0)


class BoundThatStops(MaxProb):
    bound = True


class AnswersWithTheLast(MaxProb):
    def answer(self, logits: Floats, exits: Ints) -> Floats:
        return np.asarray(logits[-1])


class DecidesOnOneExit(MaxProb):
    least_exits = 2

    def _may_see(self, val: Predictions) -> None:
        if val.n_exits > 1:
            super()._may_see(val)


class MissesItsExit(Fixed):
    def exits(self, logits: Floats) -> Ints:
        return np.full(logits.shape[1], 1) if len(logits) == 1 else super().exits(logits)


class ForgetsTemperatures(MaxProb):
    def _tempered(self, logits: Floats) -> Floats:
        return logits


class AnswersUntempered(MaxProb):
    def answer(self, logits: Floats, exits: Ints) -> Floats:
        return take(logits, exits)


class TempersItsClass(MaxProb):
    def answer(self, logits: Floats, exits: Ints) -> Floats:
        return super().answer(logits, exits) if not self.temperatures else -super().answer(logits, exits)


class MatchesHalf(MaxProb):
    def matched(self, shares: Sequence[float], logits: Floats) -> MatchesHalf:
        return super().matched([*(0.5 * s for s in shares[:-1]), 1 - 0.5 * sum(shares[:-1])], logits)


class AnswersOnce(MaxProb):
    def answer(self, logits: Floats, exits: Ints) -> Floats:
        return super().answer(logits, exits)[:1]


class Divides(MaxProb):
    def answer(self, logits: Floats, exits: Ints) -> Floats:
        return super().answer(logits, exits) * np.inf


SABOTEURS = [
    (ReadsTest(), contract.refuses_what_it_may_not_see, "fitted on the train part"),
    (ReadsTrain(), contract.refuses_what_it_may_not_see, "fitted on samples of the training"),
    (ForgetsOrigins(), contract.refuses_what_it_may_not_see, "a part of a set that was trained on whole"),
    (NeverInfeasible(), contract.accepts_the_least_that_it_names, "does not raise Infeasible"),
    (NamesTooLittle(), contract.accepts_the_least_that_it_names, "that Infeasible names is refused"),
    (NamesTooMuch(), contract.accepts_the_least_that_it_names, "is not the least"),
    (SaysNoNumber(), contract.accepts_the_least_that_it_names, "does not name the least budget"),
    (Overspends(), contract.stays_within_the_budget, "it spends .* of a budget of"),
    (CountsItself(), contract.stays_within_the_budget, "spends\\(\\) says"),
    (LeavesElsewhere(), contract.reads_only_the_heads_that_it_uses, "whose head it does not use"),
    (PeeksAtOtherHeads(), contract.reads_only_the_heads_that_it_uses, "its exits follow logits"),
    (WaitsForTheBatch(), contract.decides_each_sample_alone, "when it is run alone"),
    (KnowsTheBatch(), contract.decides_each_sample_alone, "when it is run alone"),
    (Thrifty(), contract.spends_no_less_when_it_may_spend_more, "not monotone"),
    (LabelsWhatIsFitted(), contract.answers_with_a_record_of_its_numbers, "label changes by fitting"),
    (KeepsNumpyNumbers(), contract.answers_with_a_record_of_its_numbers, "cannot stand in a record"),
    (TurnsInto(), contract.answers_with_a_record_of_its_numbers, "fit answers with a MaxProb"),
    (Dice(), contract.answers_with_a_record_of_its_numbers, "gives two answers"),
    (Sharpens(), contract.answers_with_a_record_of_its_numbers, "changes the predictions"),
    (Remembers(), contract.answers_with_a_record_of_its_numbers, "changes the question"),
    (AimsLow(), contract.reaches_the_accuracy_that_is_wanted, "where .* was wanted"),
    (KeepsTheBestToItself(), contract.reaches_the_accuracy_that_is_wanted, "does not name the best"),
    (AgreesToAnything(), contract.reaches_the_accuracy_that_is_wanted, "more than 1 does not raise"),
    (BelievesTheExit(), contract.knows_whether_it_is_right, "right\\(\\) says"),
    (Cheats(), contract.needs_only_what_a_board_knows, "follow the labels"),
    (BoundThatStops(), contract.needs_only_what_a_board_knows, "stop\\(\\) answers"),
    (AnswersWithTheLast(), contract.decides_each_sample_alone, "is answered with"),
    (DecidesOnOneExit(), contract.has_something_to_decide, "is decided upon"),
    (MissesItsExit(), contract.has_something_to_decide, "is left elsewhere"),
    (ForgetsTemperatures(), contract.takes_temperatures, "do not divide"),
    (AnswersUntempered(), contract.takes_temperatures, "not in the answer"),
    (TempersItsClass(), contract.takes_temperatures, "changes the class"),
    (MatchesHalf(), contract.matches_shares, "where the shares were"),
    (AnswersOnce(), contract.answers_one_row_per_sample, "answers of shape"),
    (Divides(), contract.answers_one_row_per_sample, "not finite"),
]


@pytest.mark.parametrize(
    ("saboteur", "check", "message"), SABOTEURS, ids=lambda v: type(v).__name__ if isinstance(v, Policy) else ""
)
def test_catches(saboteur: Policy, check: Callable[[Policy], None], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(saboteur)


def test_every_check_catches_somebody() -> None:
    assert {check for _, check, _ in SABOTEURS} == set(contract.CHECKS)
