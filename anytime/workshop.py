"""Makes what a cell needs, and keeps it: data, trained networks, compressed ones, predictions."""

from __future__ import annotations

import copy
import io
import shutil
import zlib
from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch

from anytime.backend import Deployable, TorchNet
from anytime.board import Timing
from anytime.config import Cell
from anytime.contents import digests_of
from anytime.cost import Cost, account
from anytime.dataset import Data, DatasetSpec, Part
from anytime.errors import AnytimeError, WriteError
from anytime.files import write_atomically
from anytime.metrics import Floats, Predictions
from anytime.model import AnytimeModel, ModelSpec
from anytime.models.static import Static
from anytime.probe import check_answers, check_links
from anytime.quant.bias import reestimate_bn
from anytime.spec import key
from anytime.train import Progress, Recipe, Trainer, silent

Predicted = Literal["tune", "val", "hold", "test", "calib"]
PREDICTED: tuple[Predicted, ...] = get_args(Predicted)
USUAL = PREDICTED[:4]  # calib came later: what was predicted before lacks it, and does well without until it is asked for

MEMBER_SEEDS = 1000  # between the training seeds of the members of an ensemble: more than an experiment has of its own


class Workshop:
    """Everything expensive, made once.

    ``results/cache`` holds what can be made again: trainings (with a checkpoint per epoch), predictions, raw times.
    A finished or interrupted training is found there by key, else finished weights in ``results/zoo``, else in that of the
    checkout that this file lies in, wherever ``results`` are.
    """

    def __init__(self, results: Path, progress: Progress = silent) -> None:
        self.cache, self.progress = results / "cache", progress
        self.zoos = (results / "zoo", Path(__file__).parent.parent / "results" / "zoo")
        self.wall_s: dict[str, dict[str, float]] = {}  # cell key -> step -> seconds
        self._nets: dict[str, Deployable] = {}

    def data(self, spec: DatasetSpec, seed: int) -> Data:
        """The six parts."""
        return _loaded(spec, seed)

    def content(self, cell: Cell) -> str:
        """What names the samples and weights that a user may change under one name; "" for a cell of published ones alone."""
        digests = list(digests_of(cell))
        if cell.data.own:
            parts = self.data(cell.data, cell.seed)
            digests = [parts.train.digest, parts.test.digest, *digests]
        return key(tuple(digests)) if digests else ""

    def changeable(self, cell: Cell) -> str:
        """What ``content`` names, in words."""
        samples = [f"the samples of {cell.data.label}"] if cell.data.own else []
        return " or ".join(samples + [f"the weights or the code of {cell.model.label}"] * bool(digests_of(cell)))

    def trained(self, data: DatasetSpec, model: ModelSpec, recipe: Recipe, train_seed: int, seed: int) -> AnytimeModel:
        """The float network of a cell, from the cache or trained now.

        Without epochs nothing is trained: weights that were not published are as they were drawn, and then BatchNorm alone is
        measured, on train, so that activations are of the size that they have behind a training.
        With ``recipe.start`` "static" every network of a suite begins from the same weights: those of the network
        without exits, trained by the recipe from scratch; so the static twin too is trained twice as long.
        """
        net = self._built(data, model, train_seed, seed)
        if net.trained_on and not net.fresh_heads:
            return net.eval()  # published weights are taken as they are
        if not recipe.epochs:
            if not net.trained_on:
                reestimate_bn(net, self.data(data, seed).train.x, batch=32)
            return net.eval()
        trainer, facts = self.trainer(data, model, recipe, train_seed, seed), dict[str, str]()
        if not trainer.finished():
            x = torch.randn(2, *self.data(data, seed).input_shape, generator=torch.Generator().manual_seed(0))
            check_links(net, x)  # now, rather than when it has trained for hours
        if recipe.start == "static" and not trainer.finished():  # else nobody needs what it began from
            trunk = _trunk(model)
            base = self.trained(data, trunk, recipe.from_scratch(), train_seed, seed)
            _inherit(net, base, alike=trunk == model)
            wall_s = self.trainer(data, trunk, recipe.from_scratch(), train_seed, seed).wall_s()
            facts |= {} if wall_s is None else {"trunk_wall_s": f"{wall_s:.1f}"}
        return trainer.fit(net, facts=facts)

    def _built(self, data: DatasetSpec, model: ModelSpec, train_seed: int, seed: int) -> AnytimeModel:
        parts = self.data(data, seed)
        torch.manual_seed(train_seed * 1000)
        net = model.build(parts.input_shape, parts.n_classes)
        check_answers(net, model.label, parts)
        return net

    def trainer(self, data: DatasetSpec, model: ModelSpec, recipe: Recipe, train_seed: int, seed: int) -> Trainer:
        """The trainer of a cell; its key names the training."""
        parts = self.data(data, seed)
        # The content too: a user's own folder or file may change under the same name.
        name = key(("training", data, model, recipe, train_seed, seed, parts.train.digest, *digests_of(model)))

        def say(what: str, done: int, total: int, left_s: float | None = None) -> None:
            self.progress(f"train {model.label} on {data.label}" + ("" if what == "base" else " again"), done, total)

        own_model, own_recipe = model, recipe

        def other(
            i: int = 0, model: ModelSpec | None = None, recipe: Recipe | None = None, fresh: bool = False
        ) -> tuple[AnytimeModel, Trainer]:
            model, recipe, its_seed = model or own_model, recipe or own_recipe, train_seed + MEMBER_SEEDS * i
            trainer = self.trainer(data, model, recipe, its_seed, seed)
            if fresh:
                return self._built(data, model, its_seed, seed), trainer
            return self.trained(data, model, recipe, its_seed, seed), trainer

        folder = self.cache / "trained"
        return Trainer(
            recipe, parts.train, train_seed, parts.augment, folder, self.zoos, name, say, parts.tune, parts.hold, other
        )

    def net(self, cell: Cell) -> Deployable:
        """The compressed network of a cell; kept while the workshop lives."""
        name = key(cell)
        if name not in self._nets:
            parts = self.data(cell.data, cell.seed)
            t0 = perf_counter()
            model = self.trained(cell.data, cell.model, cell.recipe, cell.train_seed, cell.seed)
            t1 = perf_counter()
            trainer = self.trainer(cell.data, cell.model, cell.recipe, cell.train_seed, cell.seed)
            net = cell.backend.compress(model, parts.calib, trainer)
            if not isinstance(net, Deployable):
                raise AnytimeError(
                    f"{cell.backend.label}: compress gave a {type(net).__name__}: return a Deployable, as "
                    "TorchNet(network, {}, simulated=False)"
                )
            self._nets[name] = net
            self.wall_s[name] = {"train": t1 - t0, "compress": perf_counter() - t1}
        return self._nets[name]

    def forget(self) -> None:
        """Let go of the networks."""
        self._nets.clear()

    def predictions(self, cell: Cell, wanted: tuple[Predicted, ...] = USUAL) -> dict[Predicted, Predictions]:
        """What the cell's network says about the ``wanted`` parts, and maybe more; predicted once."""
        path = self.cache / "predictions" / f"{key(cell)}.npz"
        parts = self.data(cell.data, cell.seed)
        held = _read_arrays(path) or {}
        digests = {name: getattr(parts, name).digest for name in PREDICTED}
        learned = key((parts.train.digest, *digests_of(cell)))  # what else the network hangs on that may change under one name
        known = dict(zip((*PREDICTED, "learned"), map(str, held.get("content", ())), strict=False))
        if known.get("learned", "" if cell.data.own else learned) != learned:  # published samples need not have said it
            held = {}
        there = [name for name in PREDICTED if name in held and known.get(name) == digests[name]]
        if not set(wanted) <= set(there):
            net = self.net(cell)
            t0 = perf_counter()
            held["trained_on"] = np.array(sorted(net.twin.trained_on), dtype=np.str_)
            lacking = [name for name in PREDICTED if name not in there]
            for i, name in enumerate(lacking, 1):
                x = getattr(parts, name).x.numpy()
                held[name] = net.predict(x) if len(x) else np.empty((net.n_exits, 0, parts.n_classes), np.float32)
                self.progress(f"predict with {cell.model.label} {cell.backend.label}", i, len(lacking))
            there = list(PREDICTED)
            held["content"] = np.array([*digests.values(), learned])
            self.wall_s.setdefault(key(cell), {})["predict"] = perf_counter() - t0
            _write_arrays(path, held)
        seen = frozenset(str(s) for s in held["trained_on"])
        return {name: _predictions(held[name], getattr(parts, name), seen) for name in there}

    def agreement(self, cell: Cell, predicted: Floats) -> Floats:
        """[E]: share of test samples on which the engine and its twin say the same class."""
        net = self.net(cell)
        if isinstance(net, TorchNet):
            return np.ones(net.n_exits)
        twin = TorchNet(net.twin, net.bits, simulated=True).predict(self.data(cell.data, cell.seed).test.x.numpy())
        return np.asarray((twin.argmax(-1) == predicted.argmax(-1)).mean(1))

    def cost(self, cell: Cell) -> Cost:
        """Counted on the cell's network."""
        return account(self.net(cell), self.data(cell.data, cell.seed).input_shape)

    def untrained_cost(self, data: DatasetSpec, model: ModelSpec, seed: int) -> Cost:
        """In FP32, of a network that nobody has trained."""
        parts = self.data(data, seed)
        net = model.build(parts.input_shape, parts.n_classes)
        return account(TorchNet(net, {}, simulated=False), parts.input_shape)

    def keep_timing(self, fact: str, timing: Timing) -> None:
        """Keep raw times: records hold only their percentiles."""
        arrays = {n: getattr(timing, n) for n in ("stage_ms", "head_ms", "stage_cpu_ms", "head_cpu_ms")}
        flags = {n: np.array(getattr(timing, n)) for n in ("launches", "restarts")}
        _write_arrays(self.cache / "timings" / f"{fact}.npz", arrays | flags)

    def timing(self, fact: str) -> Timing | None:
        """Raw times that were kept, or None."""
        held = _read_arrays(self.cache / "timings" / f"{fact}.npz")
        if held is None:
            return None
        return Timing(
            held["stage_ms"], held["head_ms"], held["stage_cpu_ms"], held["head_cpu_ms"], int(held["launches"]), {},
            restarts=bool(held.get("restarts", False)),
        )  # fmt: skip

    def keep_answers(self, fact: str, logits: dict[str, Floats]) -> None:
        """Keep what a board's own engine answered when ``fact`` was measured: part -> logits [E, N, K]."""
        _write_arrays(self.cache / "answers" / f"{fact}.npz", dict(logits))

    def answers(self, fact: str) -> dict[str, Floats]:
        """What was kept of them; empty where this machine's answers stand for the board's."""
        return dict(_read_arrays(self.cache / "answers" / f"{fact}.npz") or {})

    def kept_of(self, cell: Cell) -> set[Path]:
        """What the cache holds of a cell: files, and folders of trainings."""
        recipes = {cell.recipe, cell.recipe.from_scratch()}
        names = [
            self.trainer(cell.data, model, recipe, cell.train_seed, cell.seed).key
            for model, recipe in product((cell.model, _trunk(cell.model)), recipes)
        ]
        trained = {folder for name in names for folder in (self.cache / "trained").glob(f"{name}-*")}
        return trained | {self.cache / "predictions" / f"{key(cell)}.npz"}


def delete(kept: Iterable[Path]) -> None:
    """Delete files and folders of the cache. WriteError where that may not be."""
    for path in kept:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"cannot delete {error.filename}: {error.strerror or error}") from error


@lru_cache(maxsize=4)
def _loaded(spec: DatasetSpec, seed: int) -> Data:
    return spec.load(seed)


def _trunk(model: ModelSpec) -> ModelSpec:
    """The network without exits that it begins from; itself where it has none."""
    return Static(model) if model.exits_early else model


def _inherit(net: AnytimeModel, base: AnytimeModel, alike: bool) -> None:
    """Take the trunk's weights from the same network without exits (models/static.py)."""
    if alike:
        net.load_state_dict(copy.deepcopy(base.state_dict()))
    else:
        trunk = base.stages[0]
        if net.restarts:  # the last sub-network, whose slices the others share
            net.stages[-1].load_state_dict(copy.deepcopy(trunk.state_dict()))
        else:
            for k, stage in enumerate(net.stages):
                stage.load_state_dict(copy.deepcopy(trunk[k].state_dict()))  # type: ignore[index]
        net.heads[-1].load_state_dict(copy.deepcopy(base.heads[0].state_dict()))
    net.trained_on = base.trained_on


def _predictions(logits: Floats, part: Part, trained_on: frozenset[str]) -> Predictions:
    return Predictions(logits, part.y.numpy(), part.name, part.sources, trained_on)


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    body = io.BytesIO()
    np.savez(body, **arrays)  # type: ignore[arg-type]
    write_atomically(path, body.getvalue())


def _read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What ``_write_arrays`` wrote; None when it is absent or unreadable: it is only a cache, and made again."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return dict(f)
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error):
        return None
