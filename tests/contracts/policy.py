"""What every policy promises. Each check raises AssertionError with a message of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from anytime.errors import Infeasible, Leak, Unsupported, UsageError
from anytime.metrics import Floats, PartName, Predictions, take
from anytime.policies.reading import Reading
from anytime.policy import PathCost, Policy
from anytime.spec import plain
from anytime.threshold import Threshold

SHAPES = ((2, 200, 10), (3, 150, 4), (5, 80, 2))  # E, N, K


@dataclass(frozen=True)
class Costs:
    """Whole-number costs of a chain, so that every mean is exact."""

    stage: tuple[int, ...]
    head: tuple[int, ...]

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        return float(sum(self.stage[: exit + 1]) + sum(self.head[k] for k in uses if k <= exit))


def costs(n_exits: int) -> Costs:
    """Stages that grow, and heads that cost something."""
    return Costs(tuple(100 + 70 * k for k in range(n_exits)), tuple(10 + 3 * k for k in range(n_exits)))


def predictions(n_exits: int, n: int, n_classes: int, seed: int = 0, part: PartName = "val") -> Predictions:
    """Logits [E, N, K] of a made-up network that is surer and more often right the deeper it is read."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    easy = rng.exponential(1.0, size=n)
    logits = rng.normal(size=(n_exits, n, n_classes)).astype(np.float32)
    logits[:, np.arange(n), labels] += ((1 + np.arange(n_exits))[:, None] * easy).astype(np.float32)
    return Predictions(logits, labels, part, sources=frozenset({"these", "published"}), trained_on=frozenset({"others"}))


def budgets(policy: Policy, val: Predictions, cost: PathCost, n: int = 9) -> Floats:
    """From the least that the policy says it can do with to more than the dearest path."""
    most = max(cost.path(tuple(range(k + 1)), k) for k in range(val.n_exits))
    return np.linspace(least(policy, val, cost), 1.1 * most, n)


def least(policy: Policy, val: Predictions, cost: PathCost) -> float:
    """The smallest budget that it says it accepts."""
    try:
        policy.fit(val, cost, 1e-9)
    except Infeasible as error:
        assert f"{error.least}" in str(error), f"the sentence of Infeasible does not name the least budget {error.least}: {error}"
        return error.least
    raise AssertionError("a budget under the cheapest path does not raise Infeasible")


def fits(policy: Policy) -> Iterator[tuple[Policy, Predictions, PathCost, float]]:
    """The policy fitted to several networks at several budgets."""
    for n_exits, n, n_classes in SHAPES:
        val, cost = predictions(n_exits, n, n_classes), costs(n_exits)
        for budget in budgets(policy, val, cost):
            yield policy.fit(val, cost, budget), val, cost, budget


def refuses_what_it_may_not_see(policy: Policy) -> None:
    val, cost = predictions(3, 50, 4), costs(3)
    for part in get_args(PartName):
        if part != "val":
            _raises_leak(policy, replace(val, part=part), cost, f"it can be fitted on the {part} part")
    _raises_leak(policy, replace(val, trained_on=frozenset({"these"})), cost, "it can be fitted on samples of the training")
    _raises_leak(
        policy,
        replace(val, trained_on=frozenset({"published"})),
        cost,
        "it can be fitted on a part of a set that was trained on whole",
    )


def _raises_leak(policy: Policy, seen: Predictions, cost: PathCost, message: str, accuracy: float | None = None) -> None:
    try:
        policy.fit(seen, cost, 1e9) if accuracy is None else policy.fit_accuracy(seen, cost, accuracy)
    except Leak:
        return
    raise AssertionError(message)


def accepts_the_least_that_it_names(policy: Policy) -> None:
    for shape in SHAPES:
        val, cost = predictions(*shape), costs(shape[0])
        smallest = least(policy, val, cost)
        try:
            fitted = policy.fit(val, cost, smallest)
        except Infeasible as error:
            raise AssertionError(f"the least budget {smallest} that Infeasible names is refused") from error
        spent = fitted.spends(fitted.leave(val), val.n_exits, cost)
        assert spent == smallest, f"the least budget {smallest} is not the least: it is not all spent"


def stays_within_the_budget(policy: Policy) -> None:
    for fitted, val, cost, budget in fits(policy):
        exits = fitted.leave(val)
        spent = fitted.costs(val.n_exits, cost)[exits].mean()
        assert spent <= budget, f"it spends {spent} of a budget of {budget} on val"
        said = fitted.spends(exits, val.n_exits, cost)
        assert said == spent, f"spends() says {said}, its exits cost {spent}"


def right(policy: Policy, p: Predictions) -> float:
    """Its accuracy, by what it answers."""
    exits = policy.leave(p)
    return float((policy.answer(p.logits, exits).argmax(-1) == p.labels).mean())


def reaches_the_accuracy_that_is_wanted(policy: Policy) -> None:
    for n_exits, n, n_classes in SHAPES:
        val, cost = predictions(n_exits, n, n_classes), costs(n_exits)
        try:
            policy.fit_accuracy(val, cost, 1.1)
        except Infeasible as error:
            best = error.best
            assert f"{best}" in str(error), f"the sentence of Infeasible does not name the best accuracy {best}: {error}"
        else:
            raise AssertionError("an accuracy of more than 1 does not raise Infeasible")
        spent = []
        for wanted in (0.0, 0.8 * best, best):
            fitted = policy.fit_accuracy(val, cost, wanted)
            assert right(fitted, val) >= wanted, f"it is right in {right(fitted, val)} of val where {wanted} was wanted"
            spent.append(fitted.spends(fitted.leave(val), n_exits, cost))
        assert spent == sorted(spent), f"it is not monotone: growing accuracies cost {spent}"
    _raises_leak(policy, replace(val, part="test"), cost, "it can be fitted to an accuracy on the test part", 0.0)


def knows_whether_it_is_right(policy: Policy) -> None:
    for fitted, val, _, _ in fits(policy):
        exits = fitted.leave(val)
        said, true = take(fitted.right(val), exits).mean(), right(fitted, val)
        assert said == true, f"right() says {said}, its answers are right in {true}"


def needs_only_what_a_board_knows(policy: Policy) -> None:
    """Logits of one sample; what needs more says that it is a bound."""
    for fitted, val, _, _ in fits(policy):
        if policy.bound:
            try:
                fitted.stop(val.logits[:1, :1])
            except Unsupported:
                continue
            raise AssertionError("it is a bound, and stop() answers")
        blind = replace(val, labels=np.zeros_like(val.labels))
        assert (fitted.leave(blind) == fitted.leave(val)).all(), "its exits follow the labels, and it is no bound"


def reads_only_the_heads_that_it_uses(policy: Policy) -> None:
    for fitted, val, _, _ in fits(policy):
        uses = fitted.uses(val.n_exits)
        assert uses and list(uses) == sorted(set(uses)) and 0 <= uses[0] <= uses[-1] < val.n_exits, f"uses() says {uses}"
        exits = fitted.leave(val)
        assert np.isin(exits, uses).all(), f"it leaves at exit {set(exits) - set(uses)}, whose head it does not use ({uses})"
        other = val.logits.copy()
        for k in set(range(val.n_exits)) - set(uses):
            other[k] = np.random.default_rng(k).permuted(other[k], axis=0)
        same = (fitted.leave(replace(val, logits=other)) == exits).all()
        assert same, f"its exits follow logits of heads that it does not use ({uses})"


def decides_each_sample_alone(policy: Policy) -> None:
    """As a board does: one sample, one head after the other, nothing known of what comes; what is not read is not answered."""
    for fitted, val, _, _ in () if policy.bound else fits(policy):
        uses = fitted.uses(val.n_exits)
        exits = fitted.exits(val.logits)
        answers = fitted.answer(val.logits, exits)
        for n in range(0, len(val.labels), 7):
            read = (k for i, k in enumerate(uses[:-1]) if fitted.stop(val.logits[list(uses[: i + 1]), n : n + 1])[0])
            alone = next(read, uses[-1])
            assert exits[n] == alone, f"sample {n} leaves at exit {exits[n]} in a batch, at {alone} when it is run alone"
            seen = np.full_like(val.logits[:, n : n + 1], np.nan)
            seen[[k for k in uses if k <= alone]] = val.logits[[k for k in uses if k <= alone], n : n + 1]
            answered = fitted.answer(seen, exits[n : n + 1])[0]
            assert (answered == answers[n]).all(), f"sample {n} is answered with {answers[n]} in a batch, {answered} alone"


def spends_no_less_when_it_may_spend_more(policy: Policy) -> None:
    """Only for policies that are fitted by one number: more numbers may save what they spent elsewhere."""
    if any(len(_numbers(policy, fitted)) > 1 for fitted, _, _, _ in fits(policy)):
        return
    for shape in SHAPES:
        val, cost = predictions(*shape), costs(shape[0])
        fitted = [policy.fit(val, cost, b) for b in budgets(policy, val, cost, 25)]
        spent = [f.spends(f.leave(val), val.n_exits, cost) for f in fitted]
        assert spent == sorted(spent), f"it is not monotone: growing budgets are spent as {spent}"


def _numbers(question: Policy, answer: Policy) -> set[Any]:
    """The distinct numbers that fitting put in."""
    before, after = plain(question), plain(answer)
    return set(_flat([after[name] for name in after if after[name] != before[name]]))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _flat(v)
    else:
        yield value


def answers_with_a_record_of_its_numbers(policy: Policy) -> None:
    asked = copy.deepcopy(policy)
    for fitted, val, cost, budget in fits(policy):
        assert type(fitted) is type(policy), f"fit answers with a {type(fitted).__name__}"
        assert fitted.label == policy.label, f"the label changes by fitting, from {policy.label!r} to {fitted.label!r}"
        try:
            json.dumps(plain(fitted), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"what was fitted cannot stand in a record: {error}") from error
        before = val.logits.copy()
        assert policy.fit(val, cost, budget) == fitted, "fitting twice to the same val gives two answers"
        assert (val.logits == before).all(), "fitting changes the predictions that it is fitted on"
    assert policy == asked, "fitting changes the question"


def has_something_to_decide(policy: Policy) -> None:
    """A network of one exit is served by who chooses an exit, and refused by who chooses among exits."""
    val, cost = predictions(1, 40, 3), costs(1)
    if policy.least_exits == 1:
        assert (policy.fit(val, cost, 1e9).leave(val) == 0).all(), "a network of one exit is left elsewhere"
        return
    for fit in (policy.fit, policy.fit_accuracy):
        try:
            fit(val, cost, 1e9)
        except UsageError as error:
            assert "one exit" in str(error), f"a network of one exit is refused for another reason: {error}"
        else:
            raise AssertionError("a network of one exit is decided upon")


def answers_one_row_per_sample(policy: Policy) -> None:
    for fitted, val, _, _ in fits(policy):
        answer = fitted.answer(val.logits, fitted.leave(val))
        assert answer.shape == val.logits.shape[1:], f"answers of shape {answer.shape} to {val.logits.shape[1:]}"
        assert np.isfinite(answer).all(), "an answer is not finite"


def takes_temperatures(policy: Policy) -> None:
    """They divide logits before anything is decided, and change no class that an exit says alone."""
    for fitted, val, _, _ in () if policy.bound else fits(policy):
        steps = np.linspace(0.5, 3, val.n_exits)
        cooled = fitted.tempered(steps.tolist())
        divided = val.logits / steps[:, None, None]
        assert cooled.exits(val.logits).tolist() == fitted.exits(divided).tolist(), "temperatures do not divide the logits"
        assert cooled.label == fitted.label, "a temperature changes the label"
        together = fitted.answers_as == "ZTW"  # several exits say the class, each at its own temperature
        for k in fitted.uses(val.n_exits)[:-1]:
            at = np.full(len(val.labels), k)
            before, after = fitted.answer(val.logits, at), cooled.answer(val.logits, at)
            assert together or (before.argmax(-1) == after.argmax(-1)).all(), (
                f"a temperature changes the class that exit {k + 1} says"
            )
            assert not (before == after).all(), f"the temperature is not in the answer of exit {k + 1}"


def matches_shares(policy: Policy) -> None:
    """To the sample, where its scores do not tie; or says that it cannot."""
    for fitted, val, _, _ in fits(policy):
        n_exits, n = val.n_exits, len(val.labels)
        for wanted in (np.arange(n_exits)[::-1], np.ones(n_exits), np.eye(n_exits)[n_exits // 2], np.eye(n_exits)[-1]):
            wanted = np.where(np.isin(np.arange(n_exits), fitted.uses(n_exits)), wanted, 0.0)
            if not wanted.any():
                continue
            try:
                matched = fitted.matched((wanted / wanted.sum()).tolist(), val.logits)
            except Unsupported:
                return
            left = np.bincount(matched.leave(val), minlength=n_exits)
            missed = np.abs(left.cumsum() - n * wanted.cumsum() / wanted.sum()).max()
            assert missed <= 0.5 * ties(matched, val) + 1e-9, (
                f"of {n} samples {left} leave at the exits, where the shares were {wanted / wanted.sum()}"
            )
            assert matched.label == fitted.label, "matching shares changes the label"


def ties(policy: Policy, val: Predictions) -> int:
    """How many samples have the same score at an exit, at most."""
    if isinstance(policy, Reading) and policy.of is not None:
        return ties(policy.of, replace(val, logits=val.logits[list(policy.uses(val.n_exits))]))
    scores = policy.scores(val.logits[:-1]) if isinstance(policy, Threshold) else np.zeros((0, 0))
    return max((int(np.unique(s, return_counts=True)[1].max()) for s in scores), default=1)


CHECKS = (
    refuses_what_it_may_not_see,
    accepts_the_least_that_it_names,
    stays_within_the_budget,
    reaches_the_accuracy_that_is_wanted,
    knows_whether_it_is_right,
    needs_only_what_a_board_knows,
    reads_only_the_heads_that_it_uses,
    decides_each_sample_alone,
    spends_no_less_when_it_may_spend_more,
    answers_with_a_record_of_its_numbers,
    has_something_to_decide,
    answers_one_row_per_sample,
    takes_temperatures,
    matches_shares,
)
