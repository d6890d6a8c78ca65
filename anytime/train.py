"""One training loop for every network; interrupted anywhere, it ends with the same weights."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from anytime import cpu
from anytime.augment import cutout
from anytime.dataset import Augment, Part
from anytime.errors import CorruptFile, Diverged, UsageError, first_line, near
from anytime.files import locked, write_atomically
from anytime.losses import Joint, Loss
from anytime.model import AnytimeModel, ModelSpec
from anytime.osgd import OSGD, apart
from anytime.spec import Spec
from anytime.weights import load_weights, metadata, save_weights

TUNE_LR_SCALE = 0.1  # of the recipe's learning rate, wherever a trained network is trained on
RUNAWAY = 10.0  # times the mean loss of the first epoch, of at least 0.1: then a trained network is being destroyed
PER_BATCH_SCHEDULES = ("OneCycleLR", "CyclicLR")
RATES = ("base_lr", "max_lr", "eta_min")  # arguments of schedules that are learning rates


class Progress(Protocol):
    """Is told that ``done`` of ``total`` steps of ``what`` are done, and the seconds left where steps are too unlike to tell."""

    def __call__(self, what: str, done: int, total: int, left_s: float | None = None) -> None: ...


def silent(what: str, done: int, total: int, left_s: float | None = None) -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True)
class Recipe(Spec):
    """How a network is trained.

    ``optimizer`` and ``schedule`` are torch's own names, with further arguments as ((name, value), ...). A schedule steps once an
    epoch, OneCycleLR and CyclicLR once a batch; both cycle the momentum too (Adam's first beta), from 0.95 to 0.85 or from 0.9 to
    0.8 and back, whatever ``optimizer_args`` say, unless ("cycle_momentum", False) forbids it.
    ``loss`` is a strategy of losses.py. ``orthogonal`` takes off each later exit's gradient what lies along the earlier ones'
    (OSGD), the whole parameter vector that both touch or each tensor by itself. ``start`` "static" begins from the weights of the same
    network without its exits, trained by the same recipe for ``trunk_epochs`` (0: as many as ``epochs``): BranchyNet's way, and
    the mixed regime of arXiv:2407.14320 (the trunk first, then all jointly).
    ``cutout`` paints a square of so many pixels over every image, after the data set's own augmentation.
    ``precision`` "bf16" is autocast where the device multiplies bfloat16, else fp32 (a CPU that imitates bf16 takes ten times
    as long); the weights say which it was. ``device`` "auto" is CUDA where there is some, else the CPU; "cpu", "cuda" and
    "cuda:1" are taken at their word. ``compile`` trains through torch.compile: other last digits, and a minute before the
    first step.
    """

    epochs: int = 30
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: str = "AdamW"
    optimizer_args: tuple[tuple[str, float | bool], ...] = ()
    schedule: str = "CosineAnnealingLR"
    schedule_args: tuple[tuple[str, float | int | bool | tuple[int, ...]], ...] = ()
    loss: Loss = Joint()
    orthogonal: Literal["no", "vector", "tensor"] = "no"
    start: Literal["scratch", "static"] = "scratch"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    device: str = "auto"
    compile: bool = False
    cutout: int = 0
    trunk_epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.trunk_epochs, self.cutout) < 0 or self.batch < 1 or not self.lr > 0:
            raise UsageError(
                f"recipe: epochs={self.epochs}, trunk_epochs={self.trunk_epochs}, batch={self.batch}, lr={self.lr}, "
                f"cutout={self.cutout}: use epochs >= 0, trunk_epochs >= 0, batch >= 1, lr > 0, cutout >= 0"
            )
        if self.trunk_epochs and self.start != "static":
            raise UsageError(
                f"recipe: trunk_epochs={self.trunk_epochs} are those that start='static' begins with, and start is 'scratch'"
            )
        for args, arg in (("optimizer_args", "lr"), ("schedule_args", "max_lr" if self.schedule == "OneCycleLR" else "")):
            if arg in dict(getattr(self, args)):
                raise UsageError(f"recipe.{args}: {arg} is what recipe.lr says: leave it out")
        _torch_name(torch.optim, self.optimizer, torch.optim.Optimizer, "optimizer")
        if self.schedule != "constant":
            _torch_name(torch.optim.lr_scheduler, self.schedule, torch.optim.lr_scheduler.LRScheduler, "schedule")

    def from_scratch(self) -> Recipe:
        """How the network without exits is trained that ``start`` "static" begins from."""
        return replace(self, start="scratch", epochs=self.trunk_epochs or self.epochs, trunk_epochs=0)


class Others(Protocol):
    """Makes another network for the same data, and its trainer: what a member of an ensemble comes from."""

    def __call__(
        self, i: int = 0, model: ModelSpec | None = None, recipe: Recipe | None = None, fresh: bool = False
    ) -> tuple[AnytimeModel, Trainer]:
        """The network of training seed ``i`` (0: the experiment's own), of another ``model`` or ``recipe`` where given; trained,
        or with ``fresh`` as it was built."""


@dataclass(frozen=True)
class Trainer:
    """All that a backend may learn from: val and test cannot be reached from it.

    ``folder`` holds checkpoints and finished weights, one subfolder per named training; None keeps nothing.
    ``zoos`` hold finished weights that came with the repository, by the same names.
    ``key`` says whose training this is (data, model, recipe, seeds), so that a name within it is unique.
    ``tune`` is for choices that are not weights: bits, observers, which of several. ``hold`` is for what is learned from the
    answers of finished networks (stackers). ``others`` makes the other members of an ensemble; None where nobody knows of any.
    """

    recipe: Recipe
    train: Part
    train_seed: int
    augment: Augment | None = None
    folder: Path | None = None
    zoos: tuple[Path, ...] = ()
    key: str = ""
    progress: Progress = field(default=silent, compare=False)
    tune: Part | None = None
    hold: Part | None = None
    others: Others | None = field(default=None, compare=False)

    def fit(
        self,
        model: AnytimeModel,
        *,
        name: str = "base",
        epochs: int | None = None,
        lr_scale: float = 1.0,
        precision: Literal["fp32", "bf16"] | None = None,
        loss: Loss | None = None,
        each_epoch: Callable[[AnytimeModel, float], None] | None = None,
        facts: dict[str, str] | None = None,
    ) -> AnytimeModel:
        """Train in place, on the recipe's device, and return the model on the CPU in eval mode.

        A training of this ``name`` that is already finished is loaded, an interrupted one goes on; what ends
        is equal to the uninterrupted run's weights bit by bit on the same CPU and thread count.
        With ``epochs`` a network that is trained already goes on for so many, at ``lr_scale`` times the recipe's learning rates
        and under its loss as it is at the end of a training. ``each_epoch`` is called in training mode with the share of the
        epochs that is done. What is given here instead of the recipe's must be named by ``name``. ``facts`` are what its weights
        shall say beside their own ``wall_s``, ``device`` and ``precision``.
        Raises Diverged on a loss or on weights that are not finite.
        """
        recipe = replace(
            self.recipe,
            epochs=self.recipe.epochs if epochs is None else epochs,
            lr=self.recipe.lr * lr_scale,
            schedule_args=tuple(
                (arg, value * lr_scale if arg in RATES and isinstance(value, float | int) else value)
                for arg, value in self.recipe.schedule_args
            ),
            precision=precision or self.recipe.precision,
            loss=loss or self.recipe.loss,
        )
        ended = epochs is not None
        if self.folder is None:
            _run(model, recipe, self, name, None, each_epoch, ended, {})
        else:
            place = self.folder / self.place(name)
            with locked(place):
                if found := self.finished(name):
                    load_weights(model, found)
                else:
                    _run(model, recipe, self, name, place, each_epoch, ended, facts or {})
        return model.eval()

    def once(self, model: AnytimeModel, name: str, change: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Let ``change`` work on the model in place and return the facts it gives; the next time load what it left, and them.

        For what takes minutes and is no training by labels (learned rounding).
        """
        if self.folder is None:
            return change()
        with locked(self.folder / self.place(name)):
            if found := self.finished(name):
                return load_weights(model, found)
            facts = change()
            save_weights(model, self.folder / self.place(name) / "weights.safetensors", facts)
            return facts

    def place(self, name: str) -> str:
        """What a training of this name is called on disk."""
        return f"{self.key}-{name}"

    def wall_s(self, name: str = "base") -> float | None:
        """Seconds that the finished training of this name took; None where nothing tells."""
        said = self.said(name).get("wall_s")
        return None if said is None else float(said)

    def said(self, name: str = "base") -> dict[str, str]:
        """What the finished training of this name says of itself (wall_s, device, precision, and trunk_wall_s where it began
        from a trunk); empty where nothing tells."""
        found = self.finished(name)
        return metadata(found.read_bytes()) if found else {}

    def finished(self, name: str = "base") -> Path | None:
        """Where weights of a finished training of this name lie; None where it is none."""
        place = self.place(name)
        kept = [] if self.folder is None else [self.folder / place / "weights.safetensors"]
        kept += [zoo / f"{place}.safetensors" for zoo in self.zoos]
        return next((path for path in kept if path.exists()), None)


def _run(
    model: AnytimeModel, recipe: Recipe, trainer: Trainer, name: str, place: Path | None,
    each_epoch: Callable[[AnytimeModel, float], None] | None, ended: bool, facts: dict[str, str],
) -> None:  # fmt: skip
    """``ended``: the loss's own schedule is over, as it is where a trained network is trained on."""
    x, y = trainer.train.x, trainer.train.y  # stay on the host, and augmentation does: batches are moved
    device = _device(recipe.device)
    layout = torch.channels_last if recipe.channels_last and x.ndim == 4 else torch.contiguous_format
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    recipe.loss.begin(model)
    sizes = _batch_sizes(len(y), recipe.batch)
    steps, seed = len(sizes), trainer.train_seed * 1000
    optimizer, schedule = _optimizer(model, recipe, steps)
    started = time.perf_counter()
    first, spent = 0, 0.0
    bf16 = recipe.precision == "bf16" and _multiplies_bf16(device)
    computed = ["bf16" if bf16 else "fp32"]
    carried: dict[str, float] = {}  # what the loss remembers from batch to batch
    together = OSGD(optimizer, per_tensor=recipe.orthogonal == "tensor") if recipe.orthogonal != "no" else None
    forward = _compiled(model) if recipe.compile else model if together is None else apart(model.exits)
    began = 0.0  # mean loss of the first epoch; 0: not known yet
    if place is not None and (place / "checkpoint.pt").exists():
        first, spent, before, began = _resume(place / "checkpoint.pt", model, optimizer, schedule, carried)
        computed = list(dict.fromkeys([*(before or [recipe.precision]), *computed]))
    for epoch in range(first, recipe.epochs):
        # Everything random in an epoch comes from (seed, epoch), so a resumed epoch is the same epoch.
        torch.manual_seed(seed * 100_003 + epoch)
        draw = torch.Generator().manual_seed(seed * 100_003 + epoch)
        model.train()
        recipe.loss.epoch(model)
        if each_epoch is not None:
            each_epoch(model, epoch / recipe.epochs)
        mean = 0.0
        for step, i in enumerate(torch.split(torch.randperm(len(y), generator=draw), sizes)):
            batch = x[i]
            if trainer.augment is not None:
                batch = trainer.augment(batch, draw)
            if recipe.cutout:
                batch = cutout(batch, draw, recipe.cutout)
            batch = batch.contiguous(memory_format=layout).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = forward(batch)
            terms = recipe.loss(logits.float(), y[i].to(device), 1.0 if ended else epoch / recipe.epochs, carried)
            loss = terms.sum()
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(
                    f"training {name!r} met a loss of {value} at epoch {epoch + 1}, step {step + 1}: lower recipe.lr (now {recipe.lr:g})"
                )
            mean += value / steps
            optimizer.zero_grad(set_to_none=True)
            if together is None:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                together.backward(list(terms))
            optimizer.step()
            if schedule is not None and recipe.schedule in PER_BATCH_SCHEDULES:
                schedule.step()
            trainer.progress(name, epoch * steps + step + 1, recipe.epochs * steps)
        began = began or mean
        if ended and mean > RUNAWAY * max(began, 0.1):  # before that the loss itself may change on its schedule
            raise Diverged(
                f"training {name!r} ran away: its mean loss was {began:.3g} in the first epoch and is {mean:.3g} in epoch {epoch + 1}: "
                f"lower recipe.lr (now {recipe.lr:g})"
            )
        if schedule is not None and recipe.schedule not in PER_BATCH_SCHEDULES:
            schedule.step()
        if place is not None:
            state = {
                "epoch": epoch + 1,
                "began": began,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict() if schedule is not None else {},
                "loss": carried,
                "computed": computed,
                "spent_s": spent + time.perf_counter() - started,
            }
            body = io.BytesIO()
            torch.save(state, body)
            write_atomically(place / "checkpoint.pt", body.getvalue())
    if not all(bool(p.isfinite().all()) for p in model.parameters()):  # no loss has seen the last step
        raise Diverged(f"training {name!r} ended with weights that are not finite: lower recipe.lr (now {recipe.lr:g})")
    recipe.loss.end(model)
    # In the layout that loaded weights have: another one is faster or slower, and differs in the last digit.
    model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    model.trained_on = model.trained_on | {trainer.train.digest}
    if place is not None:
        wall_s = f"{spent + time.perf_counter() - started:.1f}"
        said = {"wall_s": wall_s, "device": _device_name(device), "precision": ", then ".join(computed)}
        save_weights(model, place / "weights.safetensors", facts | said)
        (place / "checkpoint.pt").unlink(missing_ok=True)


def _batch_sizes(n: int, batch: int) -> list[int]:
    """Whole batches and the rest; a rest of one goes with the batch before it, for BatchNorm has no variance of one value."""
    whole, rest = divmod(n, batch)
    if rest == 1 and whole:
        return [batch] * (whole - 1) + [batch + 1]
    return [batch] * whole + [rest] * (rest > 0)


def _device(name: str) -> torch.device:
    """UsageError for one that this machine has not."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    here = ["auto", "cpu", *(["cuda"] if gpus else []), *gpus]
    if name not in here:
        raise UsageError(f"recipe.device={name!r} is not on this machine: use one of {', '.join(here)}")
    return torch.device(("cuda" if gpus else "cpu") if name == "auto" else name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu.has_any(cpu.BF16_KERNELS)


def _compiled(model: AnytimeModel) -> Callable[[Tensor], Tensor]:
    # torch gives up after 8 networks of one class and goes on uncompiled; earlier ones are done here and count no more.
    torch.compiler.reset()
    return torch.compile(model)


def _torch_name(module: Any, name: str, base: type, what: str) -> Any:
    takes = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base)]
    # The first two are what others derive from, the last waits for a score that no training here computes.
    names = [n for n in takes if n not in ("Optimizer", "LRScheduler", "ReduceLROnPlateau") and not n.startswith("_")]
    if name not in names:
        why = "cannot be used here" if name in takes else "is not in torch"
        raise UsageError(f"recipe.{what}={name!r} {why}; {near(name, names)}")
    return getattr(module, name)


def _optimizer(model: nn.Module, recipe: Recipe, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    make = _torch_name(torch.optim, recipe.optimizer, torch.optim.Optimizer, "optimizer")
    args = {"lr": recipe.lr, "weight_decay": recipe.weight_decay} | dict(recipe.optimizer_args)
    what = "optimizer"
    try:
        optimizer = make([p for p in model.parameters() if p.requires_grad], **args)
        what = "schedule"
        if recipe.schedule == "constant":
            return optimizer, None
        given: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.schedule_args}
        if recipe.schedule == "CosineAnnealingLR":
            given.setdefault("T_max", max(1, recipe.epochs))
        if recipe.schedule == "OneCycleLR":
            given = {"max_lr": recipe.lr, "total_steps": max(1, recipe.epochs * steps)} | given
        return optimizer, getattr(torch.optim.lr_scheduler, recipe.schedule)(optimizer, **given)
    except (TypeError, ValueError, NotImplementedError) as error:
        said = f"recipe.{what}={getattr(recipe, what)!r} with {what}_args={getattr(recipe, f'{what}_args')}"
        raise UsageError(f"{said} cannot train this network: {first_line(error)}") from error


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, carried: dict[str, float]
) -> tuple[int, float, list[str], float]:
    """Epochs done, seconds spent, in what precisions, and the first epoch's mean loss (empty and 0: from before that was kept)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if schedule is not None:
            schedule.load_state_dict(state["schedule"])
        carried.update(state["loss"])
        return int(state["epoch"]), float(state["spent_s"]), list(state.get("computed", ())), state.get("began", 0.0)
    except Exception as error:
        raise CorruptFile(f"the checkpoint {path} cannot be read ({first_line(error)}): delete it and start again") from error
