"""The promise every data set keeps: six parts, drawn once and for all before anything is trained."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anytime.errors import DataError, UsageError
from anytime.metrics import PartName
from anytime.spec import Spec

Augment = Callable[[Tensor, torch.Generator], Tensor]  # a whole batch [B, C, H, W] -> the same shape


class Preprocessing(NamedTuple):
    """How a pixel in [0, 1] becomes a network input: (pixel - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def black(self) -> tuple[float, ...]:
        """What a pixel of 0 becomes, per channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))


@dataclass(frozen=True)
class Part:
    """Samples of one role: x float32 [N, C, H, W], normalised; y int64 [N].

    ``digest`` names these very samples; ``origins`` every published set that they were drawn from.
    """

    x: Tensor
    y: Tensor
    name: PartName
    digest: str
    origins: frozenset[str] = frozenset()

    @property
    def sources(self) -> frozenset[str]:
        """What a network must not have been trained on, if these samples are to judge it."""
        return self.origins | {self.digest}

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """train fits weights; calib ranges; tune checkpoints, bits and temperatures; val policies; hold stackers; test is looked at once."""

    train: Part
    calib: Part
    tune: Part
    val: Part
    hold: Part
    test: Part
    n_classes: int
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    augment: Augment | None = field(default=None, compare=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return tuple(self.train.x.shape[1:])


class Raw(NamedTuple):
    """A published data set as it was read: uint8 or float pixels [N, C, H, W] (floats in [0, 1]), int labels [N]."""

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec(Spec, ABC):
    """A data set that is not read yet.

    ``calib``, ``tune``, ``val`` and ``hold`` are sample counts, drawn by the seed, class by class, from the
    published training set; the rest is ``train``. ``test`` is the published one. ``limit`` keeps only so many
    samples of each published set, class by class in proportion, for a quick trial; 0 keeps all.
    """

    calib: int = 1024
    tune: int = 1000
    val: int = 2000
    hold: int = 976
    limit: int = 0

    @abstractmethod
    def read(self) -> Raw:
        """Read the published sets; every file is checked. DataError names the file and the fix."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How the pixels are normalised, before any augmentation."""

    @property
    def own(self) -> bool:
        """Whether its samples are the user's, who may change them under one name; published ones are checked."""
        return False

    @property
    def labelled(self) -> bool:
        """Whether the labels are the classes that its networks answer with."""
        return True

    def augmentation(self) -> Augment | None:
        """What training does to each batch; None does nothing."""
        return None

    def load(self, seed: int) -> Data:
        """Read and split; the same seed draws the same parts."""
        raw = self.read()
        n_classes = len(raw.classes)
        _check(raw, type(self).__name__)
        published = digest(raw.x_train, raw.y_train)  # of the whole set: what imported weights say that they have seen
        raw = self._limited(raw)
        parts = draw(
            raw.y_train, {"calib": self.calib, "tune": self.tune, "val": self.val, "hold": self.hold}, seed, type(self).__name__
        )
        if self.own:  # a folder is read class by class: of calib some take the first samples, or batches as they come
            parts["calib"] = np.random.default_rng(seed).permutation(parts["calib"])

        def part(name: PartName, x: NDArray[Any], y: NDArray[Any], origins: frozenset[str] = frozenset()) -> Part:
            return Part(normalise(x, self.preprocessing), torch.from_numpy(y.astype(np.int64)), name, digest(x, y), origins)

        drawn: dict[str, Part] = {
            name: part(cast(PartName, name), raw.x_train[i], raw.y_train[i], frozenset({published})) for name, i in parts.items()
        }
        test = part("test", raw.x_test, raw.y_test)
        return Data(
            **drawn, test=test, n_classes=n_classes, classes=raw.classes, preprocessing=self.preprocessing,
            augment=self.augmentation(),
        )  # fmt: skip

    def _limited(self, raw: Raw) -> Raw:
        if self.limit < 0:
            raise UsageError(f"{type(self).__name__}: limit={self.limit} is no number of samples; use 1 or more, or 0 for all")
        if not self.limit:
            return raw
        train, test = _thin(raw.y_train, self.limit), _thin(raw.y_test, self.limit)
        return Raw(raw.x_train[train], raw.y_train[train], raw.x_test[test], raw.y_test[test], raw.classes)


def _thin(y: NDArray[Any], n: int) -> NDArray[np.intp]:
    n = min(n, len(y))
    return np.sort(np.argsort(y, kind="stable")[np.arange(n) * len(y) // max(n, 1)])


def normalise(x: NDArray[Any], p: Preprocessing) -> Tensor:
    """Pixels [N, C, H, W], uint8 or floats in [0, 1] -> float32 network inputs."""
    t = torch.from_numpy(np.ascontiguousarray(x))
    t = t.float().div_(255) if t.dtype == torch.uint8 else t.to(torch.float32, copy=True)
    shape = (1, -1, *(1,) * (t.ndim - 2))
    return t.sub_(torch.tensor(p.mean).view(shape)).div_(torch.tensor(p.std).view(shape))


def draw(y: NDArray[Any], counts: dict[str, int], seed: int, name: str) -> dict[str, NDArray[np.intp]]:
    """Indices of each part, class by class in proportion, plus ``train`` with the rest; ascending.

    UsageError when the parts would leave fewer than half of the samples to train on.
    """
    for part, n in counts.items():
        if n < 0:
            raise UsageError(f"{name}: {part}={n} is no number of samples; use 0 or more")
    wanted = sum(counts.values())
    if wanted > len(y) // 2:
        said = ", ".join(f"{p}={n}" for p, n in counts.items())
        raise UsageError(f"{name}: {said} take {wanted} of {len(y)} training samples; leave at least half, by smaller parts")
    order = np.random.default_rng(seed).permutation(len(y))
    # Interleave the classes evenly, so that every stretch of the order holds them in proportion.
    place = np.empty(len(y))
    for c in np.unique(y):
        mine = np.flatnonzero(y[order] == c)
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    order = order[np.argsort(place, kind="stable")]
    out, start = {}, 0
    for part, n in counts.items():
        out[part] = np.sort(order[start : start + n])
        start += n
    out["train"] = np.sort(order[start:])
    return out


def enlarge(x: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """Bring images [..., S, S] to [..., size, size] of at least S, bilinearly, edges repeated.

    Computed in integers up to the last division, so that every machine gets the same bits and the same digests.
    """
    old = x.shape[-1]
    # Twice each output pixel's place in input pixels, times size: a whole number.
    place = np.clip((2 * np.arange(size) + 1) * old - size, 0, 2 * size * (old - 1))
    weight = np.maximum(0, 2 * size - np.abs(place[:, None] - 2 * size * np.arange(old)))  # rows sum to 2 * size
    sums: NDArray[np.int64] = weight @ x.astype(np.int64) @ weight.T
    return sums / (2 * size) ** 2


def digest(*arrays: NDArray[Any]) -> str:
    """16 hex digits of the content."""
    h = hashlib.sha256()
    for a in arrays:
        h.update(f"{a.dtype}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).data)
    return h.hexdigest()[:16]


def data_root() -> Path:
    """Where data sets lie: ``ANYTIME_DATA``, else a cache folder in the user's home."""
    said = os.environ.get("ANYTIME_DATA")
    return Path(said).expanduser() if said else Path.home() / ".cache" / "anytime" / "data"


def md5(path: Path) -> str:
    """md5 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_published(path: Path, wanted: str, fix: str) -> None:
    """DataError unless the file is, byte for byte, the published one."""
    if not path.is_file():
        raise DataError(f"{path} is missing: {fix}")
    got = md5(path)
    if got != wanted:
        raise DataError(f"{path} is not the published file (md5 {got}, published {wanted}): delete it, then {fix}")


def ensure_published(name: str, files: Mapping[Path, str], get: Callable[[], object]) -> None:
    """Make sure that every file (path: md5) is there and is, byte for byte, the published one.

    Missing ones are fetched by ``get``: torchvision's own download, which only unpacks what lies there packed.
    DataError says what is missing or wrong, where it was looked for, and how to get it.
    """
    if all(path.is_file() and md5(path) == wanted for path, wanted in files.items()):
        return
    root = data_root()
    fix = "set ANYTIME_DATA to a folder that holds it, laid out as torchvision does, or run once with network access"
    before = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as f:  # another process may be unpacking these very files
            fcntl.flock(f, fcntl.LOCK_EX)
            if not all(path.is_file() for path in files):
                socket.setdefaulttimeout(20)  # torchvision sets none, and a dead connection would hang
                get()
    except Exception as error:  # network, disk and archive errors share no base class
        missing = [path for path in files if not path.is_file()]
        if missing:
            why = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise DataError(f"{name}: {missing[0]} is missing and could not be downloaded ({why}): {fix}") from error
    finally:
        socket.setdefaulttimeout(before)
    for path, wanted in files.items():
        check_published(path, wanted, fix)


def torchvision() -> Any:
    """The torchvision package, also beside a CPU build of torch.

    Its wheel is linked against CUDA; beside a CPU torch its C++ operators do not load and the import stops at
    the missing ``torchvision::nms``. Declaring the schema of the two operators is enough: nothing here calls them.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for op in ("nms", "qnms"):
            library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _KEEP.append(library)  # the schema lives as long as this object
        return importlib.import_module("torchvision")


_KEEP: list[Any] = []


def _check(raw: Raw, name: str) -> None:
    for which, x, y in (("training", raw.x_train, raw.y_train), ("test", raw.x_test, raw.y_test)):
        if len(x) == 0 or len(x) != len(y):
            raise DataError(
                f"{name}: the {which} set has {len(x)} samples and {len(y)} labels; both must be equal and more than 0"
            )
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            n = int(np.argwhere(~np.isfinite(x))[0][0])
            raise DataError(f"{name}: {which} sample {n} holds NaN or infinity; remove or repair it")
        outside = (y < 0) | (y >= len(raw.classes))
        if outside.any():
            n = int(np.flatnonzero(outside)[0])
            raise DataError(f"{name}: label {int(y[n])} of {which} sample {n} is not in 0..{len(raw.classes) - 1}")
    if len(raw.classes) < 2 or len(np.unique(raw.y_train)) < 2:
        raise DataError(f"{name}: its training set has one class; a classifier needs at least two")
