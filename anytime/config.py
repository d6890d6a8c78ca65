"""What an experiment is made of: a question, and the cells that answer it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from anytime.backend import Backend
from anytime.board import Board
from anytime.dataset import DatasetSpec
from anytime.errors import UsageError
from anytime.model import ModelSpec
from anytime.policy import Policy
from anytime.spec import Spec, check_said
from anytime.train import Recipe

Arm = Literal["refitted", "kept", "temperature", "share-matched", "retrained"]
ARMS: tuple[Arm, ...] = get_args(Arm)


@dataclass(frozen=True)
class Cell(Spec):
    """One thing trained and compressed. ``train_seed`` draws weights and batches, ``seed`` the split and the calibration."""

    data: DatasetSpec
    model: ModelSpec
    recipe: Recipe
    backend: Backend
    train_seed: int
    seed: int


@dataclass(frozen=True)
class Suite(Spec):
    """One data set and the networks compared on it; the first network is the suite's reference.

    ``models`` are trained by the experiment's recipe, ``others`` each by the one that stands beside it. Suites of equal data are
    not compared with each other.
    """

    data: DatasetSpec
    models: tuple[ModelSpec, ...]
    others: tuple[tuple[ModelSpec, Recipe], ...] = ()


@dataclass(frozen=True)
class Experiment(Spec):
    """One question and everything that is run to answer it.

    ``reference`` is the backend that losses and kept thresholds refer to. ``budgets`` are fractions of the cost, in
    ``currency``, of the suite's first model in FP32 (its last exit, all heads run), or of each model's own with ``budgets_of``
    "own"; milliseconds when it is "ms"; when it is "accuracy", val accuracies in (0, 1] that are wanted at least MACs.
    ``arms``: where a policy's parameters on a compressed network come from. "refitted": fitted on its val; "kept": FP32's;
    "temperature": FP32's, each exit's logits divided by the ratio of the temperatures that both networks need on tune;
    "share-matched": FP32's, with thresholds that give its exit shares on calib, unlabelled; "retrained", a floor, on FP32
    itself: those of the next training seed's FP32.
    ``replay_samples`` test samples are executed under each fitted policy on each board.
    """

    name: str
    question: str
    suites: tuple[Suite, ...]
    recipe: Recipe
    backends: tuple[Backend, ...]
    policies: tuple[Policy, ...]
    budgets: tuple[float, ...]
    boards: tuple[Board, ...] = ()
    reference: Backend | None = None
    currency: Literal["macs", "bops", "ms", "accuracy"] = "macs"
    arms: tuple[Arm, ...] = ("refitted", "kept")
    budgets_of: Literal["first", "own"] = "first"
    train_seeds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    time_samples: int = 256
    replay_samples: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        check_said(self)
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise UsageError(f"experiment {self.name!r}: a name is of letters, digits, '_', '-' and '.', for files are called so")
        for field in ("suites", "backends", "train_seeds", "seeds", "arms"):
            if not getattr(self, field):
                raise UsageError(f"experiment {self.name!r}: {field} is empty; name at least one")
        if any(not suite.models for suite in self.suites):
            raise UsageError(f"experiment {self.name!r}: a suite has no models; name at least its reference")
        named = [(suite.data, *network) for suite in self.suites for network in self.networks(suite)]
        if len(set(named)) < len(named):
            data, model, _ = next(one for one in named if named.count(one) > 1)
            raise UsageError(
                f"experiment {self.name!r}: {model.label} on {data.label} is named twice; name it once, in one suite"
            )
        for field in ("budgets", "train_seeds", "seeds"):  # two backends may have become one by --set
            said = getattr(self, field)
            if again := [one for i, one in enumerate(said) if one in said[:i]]:
                raise UsageError(f"experiment {self.name!r}: {field} name {again[0]} twice; name it once")
        if self.time_samples < 1 or self.replay_samples < 1:
            raise UsageError(
                f"experiment {self.name!r}: time_samples={self.time_samples}, replay_samples={self.replay_samples}: use 1 or more"
            )
        if any(not b > 0 for b in self.budgets):
            raise UsageError(f"experiment {self.name!r}: budgets={self.budgets} must all be above 0")
        if self.currency == "accuracy" and any(b > 1 for b in self.budgets):
            raise UsageError(f"experiment {self.name!r}: budgets={self.budgets} are accuracies wanted, shares of at most 1")
        if len(set(self.arms)) < len(self.arms):
            raise UsageError(f"experiment {self.name!r}: arms={self.arms}: name each once")
        labels = [policy.label for policy in self.policies]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise UsageError(f"experiment {self.name!r}: two policies are called {twice!r} in tables; name it once")
        names = [board.name for board in self.boards]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(
                f"experiment {self.name!r}: two boards are called {twice!r} in tables; give each an experiment of its own"
            )
        if self.currency == "ms" and not self.boards:
            raise UsageError(f"experiment {self.name!r}: budgets in ms need a board to measure on; name one in boards")

    def cells(self) -> Iterator[Cell]:
        """Every cell, those that share a training next to each other."""
        for suite in self.suites:
            every = product(self.train_seeds, self.seeds, self.networks(suite), self.backends)
            for train_seed, seed, (model, recipe), backend in every:
                yield Cell(suite.data, model, recipe, backend, train_seed, seed)

    def networks(self, suite: Suite) -> list[tuple[ModelSpec, Recipe]]:
        """What a suite compares, each with its recipe."""
        return [*((model, self.recipe) for model in suite.models), *suite.others]

    def suite_of(self, cell: Cell) -> Suite:
        """The suite that a cell is compared in."""
        return next(s for s in self.suites if s.data == cell.data and (cell.model, cell.recipe) in self.networks(s))

    def reference_model(self, cell: Cell) -> ModelSpec:
        """The network whose cost the budgets of a cell are fractions of."""
        return cell.model if self.budgets_of == "own" else self.suite_of(cell).models[0]

    @property
    def reference_backend(self) -> Backend:
        """``reference``, by default the first backend."""
        return self.reference or self.backends[0]
