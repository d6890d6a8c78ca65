"""Every data set keeps the contract, and the contract catches those that do not."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import anytime.datasets
from anytime.dataset import Augment, Data, DatasetSpec, Preprocessing, data_root
from anytime.datasets.enlarged import Enlarged
from anytime.datasets.image_folder import ImageFolder
from anytime.datasets.npz import Npz
from anytime.datasets.synthetic import Synthetic
from tests.contracts.dataset import check

CANNOT_BE_HAD = {"EMNIST": "EMNIST/raw/gzip.zip", "CIFAR100": "cifar-100-python"}
FILES = CANNOT_BE_HAD | {"MNIST": "MNIST", "FashionMNIST": "FashionMNIST", "CIFAR10": "cifar-10-batches-py"}


def keepers() -> Iterator[type[DatasetSpec]]:
    for module in pkgutil.iter_modules(anytime.datasets.__path__, "anytime.datasets."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, DatasetSpec) and cls.__module__ == module.name and not inspect.isabstract(cls):
                yield cls


def images(n: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(n) % 3
    return np.random.default_rng(n).integers(0, 200, (n, size, size, 3), dtype=np.uint8) + (y * 20).astype(np.uint8)[
        :, None, None, None
    ], y


def an_npz(folder: Path) -> Npz:
    (x, y), (x_test, y_test) = images(300), images(60)
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return Npz(path=str(folder / "data.npz"), mean=(0.45,), std=(0.25,), augment=True, calib=20, tune=20, val=40, hold=20)


def an_image_folder(folder: Path) -> ImageFolder:
    for side, n in (("train", 120), ("test", 30)):
        for i, (x, y) in enumerate(zip(*images(n), strict=True)):
            place = folder / side / "abc"[y]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(place / f"{i}.png")
    return ImageFolder(path=str(folder), size=10, augment=True, calib=10, tune=10, val=20, hold=10)


def enlarged(folder: Path) -> Enlarged:
    return Enlarged(Synthetic(size=12, channels=3), size=20, limit=400, calib=40, tune=40, val=60, hold=40)


MADE: dict[type[DatasetSpec], Callable[[Path], DatasetSpec]] = {Npz: an_npz, ImageFolder: an_image_folder, Enlarged: enlarged}


@pytest.mark.parametrize("cls", list(keepers()), ids=lambda c: c.__name__)
def test_keeper(cls: type[DatasetSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = cls.__name__
    if name in FILES:
        if name not in CANNOT_BE_HAD and "ANYTIME_DATA" not in os.environ:
            pytest.skip(f"{name} needs its published files: set ANYTIME_DATA")
        if name in CANNOT_BE_HAD and not (data_root() / FILES[name]).exists():
            pytest.skip(f"{name} cannot be had where this project is built, and is not in {data_root()}")
        spec = replace(cls(), limit=3000, calib=300, tune=300, val=400, hold=300)
        raw = spec.read()
        monkeypatch.setattr(cls, "read", lambda self: raw)  # reading the same files four times shows nothing more
    else:
        spec = MADE[cls](tmp_path) if cls in MADE else cls()
    check(spec)


def test_the_walk_finds_the_keepers() -> None:
    names = {cls.__name__ for cls in keepers()}
    assert {*FILES, "Digits", "ImageFolder", "Npz", "Synthetic", "Enlarged"} <= names


@dataclass(frozen=True)
class Overlap(Synthetic):
    """val is drawn again out of train."""

    def load(self, seed: int) -> Data:
        data = super().load(seed)
        n = len(data.val)
        return replace(data, val=replace(data.val, x=data.train.x[:n], y=data.train.y[:n]))


@dataclass(frozen=True)
class TestBySeed(Synthetic):
    """test is other samples under another seed."""

    __test__ = False

    def load(self, seed: int) -> Data:
        data = super().load(seed)
        i = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[:100]
        return replace(data, test=replace(data.test, x=data.test.x[i], y=data.test.y[i])) if seed else data


@dataclass(frozen=True)
class NaNInData(Synthetic):
    """A deviation of 0 in the normalisation."""

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing((0.5,), (0.0,))


@dataclass(frozen=True)
class Unnormalised(Synthetic):
    """Pixels of 0 to 255, as if they had been divided already."""

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing((0.0,), (1 / 255,))


@dataclass(frozen=True)
class Unstratified(Synthetic):
    """Parts cut out of a training set that is sorted by class."""

    def load(self, seed: int) -> Data:
        data = super().load(seed)
        x, y = (torch.cat([getattr(part, a) for part in (data.train, data.val)]) for a in ("x", "y"))
        i, n = y.argsort(stable=True), len(data.val)
        return replace(data, val=replace(data.val, x=x[i[:n]], y=y[i[:n]]), train=replace(data.train, x=x[i[n:]], y=y[i[n:]]))


@dataclass(frozen=True)
class Deaf(Synthetic):
    """Every seed draws the same parts."""

    def load(self, seed: int) -> Data:
        return super().load(0)


@dataclass(frozen=True)
class Nameless(Synthetic):
    """Parts that do not say where they come from: imported weights could be judged on what they have seen."""

    def load(self, seed: int) -> Data:
        data = super().load(seed)
        return replace(data, val=replace(data.val, origins=frozenset()))


@dataclass(frozen=True)
class Losing(Synthetic):
    """Some samples are in no part."""

    def load(self, seed: int) -> Data:
        data = super().load(seed)
        return replace(data, train=replace(data.train, x=data.train.x[1:], y=data.train.y[1:]))


@dataclass(frozen=True)
class Growing(Synthetic):
    """The augmentation pads and does not crop."""

    def augmentation(self) -> Augment:
        return lambda x, g: torch.nn.functional.pad(x, (1, 1, 1, 1)) + torch.rand(1, generator=g)


@dataclass(frozen=True)
class Unruly(Synthetic):
    """The augmentation draws from the global generator."""

    def augmentation(self) -> Augment:
        return lambda x, g: x + torch.rand(len(x), 1, 1, 1)


@dataclass(frozen=True)
class Scribbling(Synthetic):
    """The augmentation works in place."""

    def augmentation(self) -> Augment:
        return lambda x, g: x.add_(torch.rand(len(x), 1, 1, 1, generator=g))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Overlap(), "samples of val are in another part too"),
        (TestBySeed(), "test depends on the seed"),
        (NaNInData(), "train.x is not finite"),
        (Unnormalised(), "train.x is not normalised"),
        (Unstratified(), "train has no sample of class 0: it was not drawn class by class"),
        (Deaf(), "train is the same under another seed"),
        (Nameless(), "val.sources does not name the whole published training set"),
        (Losing(), "1 samples of the published training set are in no part"),
        (Growing(), r"augmentation turns \(32, 1, 28, 28\) into \(32, 1, 30, 30\)"),
        (Unruly(), "it differs under the same seed"),
        (Scribbling(), "augmentation writes into the batch"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, DatasetSpec) else "",
)
def test_saboteur(spec: DatasetSpec, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(spec)
