"""Policies by arm: fitted on one network, used on it or on another, and what a record says of their decisions."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from anytime.config import Cell, Experiment
from anytime.cost import Cost, In
from anytime.decisions import RESAMPLES, Family, confidence, flips, limits, reached, temperatures
from anytime.errors import Infeasible, Leak, Unsupported
from anytime.facts import Fact, measured
from anytime.metrics import Floats, Ints, Predictions, correct, take
from anytime.policy import PathCost, Policy
from anytime.record import Record
from anytime.scoring import int8_share, recorded_cost
from anytime.spec import key, plain
from anytime.workshop import USUAL, Workshop

GRID = 25  # budgets, evenly spaced over the costs of a network, at which a policy is fitted for its curve ...
SEEDED_GRID = 9  # ... and one that has a seed: such a one may learn, and take seconds to fit


class Points(NamedTuple):
    """A policy fitted on one network: its operating points by rising cost on val, which is val_cost [G, V] sample by sample."""

    policies: tuple[Policy, ...]
    val_cost: Floats
    of: dict[float, int]  # asked budget -> point


class Decider:
    """Fits an experiment's policies from what was predicted and recorded: no network is run for what is there.

    ``record`` finds the record of a fact, or None.
    """

    def __init__(self, exp: Experiment, shop: Workshop, record: Callable[[str], Record | None]) -> None:
        self.exp, self.shop, self.record = exp, shop, record
        self.fits: dict[str, Policy] = {}
        self.costs: dict[str, Cost] = {}
        self.forget()

    def forget(self) -> None:
        """Let go of predictions and of what was made of them; fitted policies and costs are small, and kept."""
        self._predictions: dict[str, dict[Any, Predictions]] = {}
        self._points: dict[str, Points] = {}
        self._families: dict[str, tuple[tuple[Policy, ...], Family]] = {}
        self._hot: dict[str, Floats] = {}
        self._answers: dict[str, dict[str, Floats]] = {}

    # What decisions need to know of a network ------------------------------------------------------------------

    def predictions(self, cell: Cell, *more: str) -> dict[Any, Predictions]:
        """Of the usual parts and those named; read once."""
        name = key(cell)
        if name not in self._predictions or not set(more) <= self._predictions[name].keys():
            self._predictions[name] = dict(self.shop.predictions(cell, (*USUAL, *more)))  # type: ignore[arg-type]
        return self._predictions[name]

    def said(self, fact: Fact, cell: Cell) -> dict[Any, Predictions]:
        """Of the usual parts; val and test as the fact's board answered, where its engine is one of its own."""
        found = self.predictions(cell)
        if fact.board is None:
            return found
        name = measured(cell, fact.board)
        if name not in self._answers:
            self._answers[name] = self.shop.answers(name)
        return found | {part: replace(found[part], logits=logits) for part, logits in self._answers[name].items()}

    def cost(self, cell: Cell) -> Cost:
        """From the network's eval record; counted on the network where there is none."""
        name = key(("eval", cell))
        if name not in self.costs:
            record = self.record(name)
            if record is None or record.kind != "eval":
                self.costs[name] = self.shop.cost(cell)
            else:
                parts = self.shop.data(cell.data, cell.seed)
                restarts = not cell.backend.own_exits and cell.model.build(parts.input_shape, parts.n_classes).restarts
                self.costs[name] = recorded_cost(record, restarts)
        return self.costs[name]

    def reference(self, cell: Cell) -> Cost:
        """What the budgets of a cell are fractions of."""
        model = self.exp.reference_model(cell)
        name = key((cell.data, model, cell.seed))
        if name not in self.costs:
            self.costs[name] = self.shop.untrained_cost(cell.data, model, cell.seed)
        return self.costs[name]

    def currency(self, fact: Fact, cell: Cell) -> tuple[PathCost, float]:
        """What a path costs in the experiment's currency, and the cost that budgets are multiples of (1 ms for ms)."""
        if self.exp.currency == "ms":
            assert fact.board is not None
            timing = self.shop.timing(measured(cell, fact.board))
            if timing is None:
                raise Unsupported(f"a budget in ms needs {cell.backend.label} measured on {fact.board.name}, and it was not")
            return timing, 1.0
        what = "macs" if self.exp.currency == "accuracy" else self.exp.currency
        return In(self.cost(cell), what), float(self.reference(cell).every(what)[-1])

    def _temperatures(self, cell: Cell) -> Floats:
        name = key(cell)
        if name not in self._hot:
            tune = self.predictions(cell)["tune"]
            if seen := tune.sources & tune.trained_on:
                raise Leak(f"temperatures: the network was trained on the samples of this tune part (digest {min(seen)})")
            self._hot[name] = temperatures(tune)
        return self._hot[name]

    # Fitting ---------------------------------------------------------------------------------------------------

    def fitted(self, fact: Fact) -> Policy:
        """The policy of this fact: its budget, its arm; fitted once."""
        return self._adapted(fact, (self._fit(fact, source_of(fact)),))[0]

    def _fit(self, fact: Fact, cell: Cell) -> Policy:
        """Fitted on the val part of ``cell``."""
        assert fact.policy is not None
        name = key((cell, fact.policy, fact.budget, fact.board))
        if name not in self.fits:
            asked_of, total = self.currency(fact, cell)
            val = self.said(fact, cell)["val"]
            try:
                if self.exp.currency == "accuracy":
                    self.fits[name] = fact.policy.fit_accuracy(val, asked_of, fact.budget)
                else:
                    self.fits[name] = fact.policy.fit(val, asked_of, fact.budget * total)
            except Infeasible as error:  # in the user's terms: fractions of the reference, or ms
                if not error.least >= 0:
                    raise
                raise Infeasible(
                    f"{fact.policy.label}: a budget of {fact.budget:g} lies under the cheapest path; the least possible is "
                    f"{ceil(1e4 * error.least / total) / 1e4:.4f} {'ms' if self.exp.currency == 'ms' else 'of the reference'}",
                    error.least / total,
                ) from error
        return self.fits[name]

    def _adapted(self, fact: Fact, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        """Policies of ``fact.against``, as the arm uses them on ``fact.cell``."""
        if fact.arm == "temperature":
            assert fact.against is not None
            ratio = (self._temperatures(fact.cell) / self._temperatures(fact.against)).tolist()
            return tuple(policy.tempered(ratio) for policy in policies)
        if fact.arm == "share-matched":
            assert fact.against is not None
            there, here = (self.predictions(cell, "calib")["calib"] for cell in (fact.against, fact.cell))
            shares = [np.bincount(p.leave(there), minlength=there.n_exits) / len(there.labels) for p in policies]
            return tuple(p.matched(share.tolist(), here.logits) for p, share in zip(policies, shares, strict=True))
        return tuple(policies)

    def _grid(self, fact: Fact, cell: Cell) -> Points:
        """Every operating point of the policy that is fitted on ``cell``: at the budgets asked, and all over its costs."""
        name = key((cell, fact.policy, fact.board))
        if name not in self._points:
            assert fact.policy is not None
            asked_of, _ = self.currency(fact, cell)
            val = self.said(fact, cell)["val"]
            found: dict[str, Policy] = {}
            names: dict[float, str] = {}
            for budget in self.exp.budgets:
                try:
                    policy = self._fit(replace(fact, budget=budget), cell)
                except Infeasible:
                    continue
                names[budget] = key(policy)
                found[names[budget]] = policy
            for budget in np.linspace(*ends(asked_of, val.n_exits), SEEDED_GRID if hasattr(fact.policy, "seed") else GRID):
                try:
                    policy = fact.policy.fit(val, asked_of, float(budget))
                except Infeasible:
                    continue
                found.setdefault(key(policy), policy)
            costs = [p.costs(val.n_exits, asked_of)[p.leave(val)] for p in found.values()]
            order = np.argsort([c.mean() for c in costs], kind="stable")
            rank = {name: int(np.flatnonzero(order == i)[0]) for i, name in enumerate(found)}
            policies = list(found.values())
            self._points[name] = Points(
                tuple(policies[i] for i in order), np.array([costs[i] for i in order]), {b: rank[n] for b, n in names.items()}
            )
        return self._points[name]

    def _family(self, fact: Fact) -> tuple[tuple[Policy, ...], Family]:
        """What the arm's policies do to the test samples of ``fact.cell``."""
        source = source_of(fact)
        name = key((fact.cell, fact.policy, fact.board, fact.arm, source))
        if name not in self._families:
            points = self._grid(fact, source)
            asked_of, _ = self.currency(fact, fact.cell)
            test = self.said(fact, fact.cell)["test"]
            policies = self._adapted(fact, points.policies)
            exits = np.array([p.leave(test).astype(np.uint8) for p in policies])
            right = np.array([p.answer(test.logits, e).argmax(-1) == test.labels for p, e in zip(policies, exits, strict=True)])
            costs = np.array([p.costs(test.n_exits, asked_of) for p in policies])
            self._families[name] = policies, Family(exits, right, costs, points.val_cost)
        return self._families[name]

    # What a record says ----------------------------------------------------------------------------------------

    def point(self, fact: Fact) -> dict[str, Any]:
        """The row of a decide record."""
        cell, exp = fact.cell, self.exp
        assert fact.policy is not None
        val, test = (self.said(fact, cell)[part] for part in ("val", "test"))
        cost, (asked_of, total) = self.cost(cell), self.currency(fact, cell)
        self._fit(fact, source_of(fact))  # or says why this budget cannot be had
        policies, family = self._family(fact)
        chosen = self._grid(fact, source_of(fact)).of[fact.budget]
        fitted, taken, right = policies[chosen], family.exits[chosen].astype(np.intp), family.right[chosen]
        answers, read = fitted.answer(test.logits, taken), replace(test, logits=fitted.tempered_all(test.logits))
        uses, share = fitted.uses(test.n_exits), np.bincount(taken, minlength=test.n_exits) / len(taken)
        evaluated, reference = self.record(key(("eval", cell))), self.reference(cell)
        point: dict[str, Any] = {
            "policy": plain(fitted), "policy_label": fact.policy.label, "arm": fact.arm, "budget": fact.budget, "currency": exp.currency,
            "policy_position": exp.policies.index(fact.policy), "parts": parts_of(fact), "tolerance": 0.0,
            "bound": fact.policy.bound, "budgets_of": exp.budgets_of,
            "n": len(taken), "n_right": int(right.sum()), "accuracy": float(right.mean()), "share": share.tolist(),
            "budget_cost": None if exp.currency == "accuracy" else fact.budget * total,
            "spent": fitted.spends(taken, test.n_exits, asked_of) / total,
            "spent_val": fitted.spends(fitted.leave(val), val.n_exits, asked_of) / total,
            "macs": fitted.spends(taken, test.n_exits, In(cost, "macs")), "bops": fitted.spends(taken, test.n_exits, In(cost, "bops")),
            "reference": {what: float(reference.every(what)[-1]) for what in ("macs", "bops")},
            "int8_macs_share": int8_share(cost, evaluated.layers if evaluated else [], uses, share), "exit_flips": None,
            **confidence(answers, test.labels), **reached(read, taken, uses), "taken": packed(taken.astype(np.uint8)),
        }  # fmt: skip
        if (right != take(correct(test), taken)).any():
            point["right"] = packed(np.packbits(right))  # these are not the answers of the exits taken
        point |= self._flips(fact, fitted, taken, answers) | self._regret(fact, chosen, point["accuracy"], point["spent"])
        return point | (self._curve(fact) if fact.arm == "refitted" else {})

    def _there(self, fact: Fact) -> tuple[Policy, Family, int] | None:
        """What the network that the fact is held against does under its own policy; None where it cannot have this budget."""
        if fact.against is None:
            return None
        policies, family = self._family(replace(fact, cell=fact.against, arm="refitted"))
        chosen = self._grid(fact, fact.against).of.get(fact.budget)
        return None if chosen is None else (policies[chosen], family, chosen)

    def _flips(self, fact: Fact, fitted: Policy, taken: Ints, answers: Floats) -> dict[str, Any]:
        """What is decided otherwise than there."""
        there = self._there(fact)
        if fact.against is None or there is None:
            return {}
        test, other = (self.said(fact, cell)["test"] for cell in (fact.cell, fact.against))
        before = there[1].exits[there[2]].astype(np.intp)
        at_before = fitted.answer(test.logits, before).argmax(-1)
        said, said_before = answers.argmax(-1), there[0].answer(other.logits, before).argmax(-1)
        flipped = flips(taken, before, said == test.labels, at_before == test.labels)
        return {**flipped, "prediction_flips": float((said != said_before).mean())}

    def _regret(self, fact: Fact, chosen: int, accuracy: float, spent: float) -> dict[str, Any]:
        """Regret, violation, and the limits of both and of exit flips."""
        _, family = self._family(fact)
        _, own = self._family(replace(fact, arm="refitted"))
        asked_of, total = self.currency(fact, fact.cell)
        curve = own.curve()
        point: dict[str, Any] = {"regret": curve.at(spent * total) - accuracy}
        point["area"] = curve.area(*ends(asked_of, family.costs.shape[1]))
        there = self._there(fact)
        found = limits(family, chosen, own, there[1:] if there else None)
        found["spent"] = (found["spent"][0] / total, found["spent"][1] / total)
        if self.exp.currency != "accuracy":
            point["budget_violation"] = spent / fact.budget - 1
            found["budget_violation"] = (found["spent"][0] / fact.budget - 1, found["spent"][1] / fact.budget - 1)
        return point | {"limits": found, "resamples": RESAMPLES}

    def _curve(self, fact: Fact) -> dict[str, Any]:
        """The operating points on test, for whoever wants to price them otherwise."""
        policies, family = self._family(fact)
        n_exits, cost = family.costs.shape[1], self.cost(fact.cell)
        taken = [exits.astype(np.intp) for exits in family.exits]
        curve: dict[str, Any] = {"n_right": family.right.sum(1).tolist()}
        for what in ("macs", "bops"):
            curve[what] = [p.spends(exits, n_exits, In(cost, what)) for p, exits in zip(policies, taken, strict=True)]
        if all(p.uses(n_exits) == tuple(range(n_exits)) for p in policies):  # else times to exits are not what it pays
            curve["counts"] = [np.bincount(exits, minlength=n_exits).tolist() for exits in taken]
        return {"curve": curve}


def source_of(fact: Fact) -> Cell:
    """The network that the fact's policy is fitted on."""
    return fact.cell if fact.arm == "refitted" or fact.against is None else fact.against


def ends(cost: PathCost, n_exits: int) -> tuple[float, float]:
    """Cost of the cheapest exit with its own head alone, and of the last with every head: no policy can spend less or more."""
    every = tuple(range(n_exits))
    return min(cost.path((k,), k) for k in every), max(cost.path(every, k) for k in every)


def parts_of(fact: Fact) -> dict[str, str]:
    """Which parts were used to fit, and for what."""
    source = source_of(fact)
    other = "" if source == fact.cell else f" on {source.backend.label}, training seed {source.train_seed}"
    parts = {"val": f"thresholds{other}"}
    if fact.arm == "temperature":
        parts["tune"] = "temperatures"
    if fact.arm == "share-matched":
        parts["calib"] = "exit shares, without labels"
    return parts


def packed(values: Any) -> str:
    """Bytes of an array as text."""
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()
