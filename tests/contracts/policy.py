"""What every policy promises. Each check raises AssertionError with a message of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from anytime.errors import Infeasible, Leak
from anytime.metrics import Floats, PartName, Predictions, accuracy
from anytime.policy import PathCost, Policy
from anytime.spec import plain

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


def _raises_leak(policy: Policy, seen: Predictions, cost: PathCost, message: str) -> None:
    try:
        policy.fit(seen, cost, 1e9)
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
        assert fitted.spends(val.logits, cost) == smallest, f"the least budget {smallest} is not the least: it is not all spent"


def stays_within_the_budget(policy: Policy) -> None:
    for fitted, val, cost, budget in fits(policy):
        exits = fitted.exits(val.logits)
        spent = fitted.costs(val.n_exits, cost)[exits].mean()
        assert spent <= budget, f"it spends {spent} of a budget of {budget} on val"
        assert fitted.spends(val.logits, cost) == spent, (
            f"spends() says {fitted.spends(val.logits, cost)}, its exits cost {spent}"
        )


def reads_only_the_heads_that_it_uses(policy: Policy) -> None:
    for fitted, val, _, _ in fits(policy):
        uses = fitted.uses(val.n_exits)
        assert uses and list(uses) == sorted(set(uses)) and 0 <= uses[0] <= uses[-1] < val.n_exits, f"uses() says {uses}"
        exits = fitted.exits(val.logits)
        assert np.isin(exits, uses).all(), f"it leaves at exit {set(exits) - set(uses)}, whose head it does not use ({uses})"
        other = val.logits.copy()
        for k in set(range(val.n_exits)) - set(uses):
            other[k] = np.random.default_rng(k).permuted(other[k], axis=0)
        assert (fitted.exits(other) == exits).all(), f"its exits follow logits of heads that it does not use ({uses})"


def decides_each_sample_alone(policy: Policy) -> None:
    """As a board does: one sample, one head after the other, nothing known of what comes."""
    for fitted, val, _, _ in fits(policy):
        uses = fitted.uses(val.n_exits)
        exits = fitted.exits(val.logits)
        for n in range(0, len(val.labels), 7):
            read = (k for i, k in enumerate(uses[:-1]) if fitted.stop(val.logits[list(uses[: i + 1]), n : n + 1])[0])
            alone = next(read, uses[-1])
            assert exits[n] == alone, f"sample {n} leaves at exit {exits[n]} in a batch, at {alone} when it is run alone"


def spends_no_less_when_it_may_spend_more(policy: Policy) -> None:
    """Only for policies that are fitted by one number: more numbers may save what they spent elsewhere."""
    if any(len(_numbers(policy, fitted)) > 1 for fitted, _, _, _ in fits(policy)):
        return
    for shape in SHAPES:
        val, cost = predictions(*shape), costs(shape[0])
        spent = [policy.fit(val, cost, b).spends(val.logits, cost) for b in budgets(policy, val, cost, 25)]
        assert spent == sorted(spent), f"it is not monotone: growing budgets are spent as {spent}"


def _numbers(question: Policy, answer: Policy) -> set[Any]:
    """The distinct numbers that fitting put in."""
    before, after = plain(question), plain(answer)
    new = [after[name] for name in after if after[name] != before[name]]
    return set(np.concatenate([np.ravel(v) for v in new]).tolist()) if new else set()


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


def serves_a_static_network(policy: Policy) -> None:
    val, cost = predictions(1, 40, 3), costs(1)
    only = cost.path((0,), 0)
    assert least(policy, val, cost) == only, (
        f"a network of one exit costs {only}, but the least budget is {least(policy, val, cost)}"
    )
    for budget in (only, 10 * only):
        fitted = policy.fit(val, cost, budget)
        assert (fitted.exits(val.logits) == 0).all(), "a network of one exit is left elsewhere"


def answers_one_row_per_sample(policy: Policy) -> None:
    for fitted, val, _, _ in fits(policy):
        exits = fitted.exits(val.logits)
        answer = fitted.answer(val.logits, exits)
        assert answer.shape == val.logits.shape[1:], f"answers of shape {answer.shape} to {val.logits.shape[1:]}"
        assert np.isfinite(answer).all(), "an answer is not finite"
        assert 0 <= accuracy(val, exits) <= 1


CHECKS = (
    refuses_what_it_may_not_see,
    accepts_the_least_that_it_names,
    stays_within_the_budget,
    reads_only_the_heads_that_it_uses,
    decides_each_sample_alone,
    spends_no_less_when_it_may_spend_more,
    answers_with_a_record_of_its_numbers,
    serves_a_static_network,
    answers_one_row_per_sample,
)
