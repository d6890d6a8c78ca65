"""The user's own arrays, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor

from anytime.augment import compose, crop, flip
from anytime.dataset import Augment, DatasetSpec, Preprocessing, Raw
from anytime.errors import DataError, UsageError, first_line

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Npz(DatasetSpec):
    """Read x_train, y_train, x_test and y_test from the npz file ``path``.

    Images are NCHW, NHWC or NHW, uint8 or floats in [0, 1]; of axes 1 and 3 the shorter one holds the channels, the
    first if they are equal. Labels are whole numbers from 0, each class at least once in y_train. ``mean`` and ``std``
    have one value per channel or one for all. ``augment`` as in ImageFolder.

    Source: this project.
    """

    path: str = ""
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augment: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UsageError(
                f"Npz: mean={self.mean}, std={self.std}: give as many of each, one or one per channel, every std above 0"
            )

    @property
    def label(self) -> str:
        """The file's name."""
        return Path(self.path).stem or "Npz"

    @property
    def own(self) -> bool:
        """Yes."""
        return True

    @property
    def preprocessing(self) -> Preprocessing:
        """``mean`` and ``std``."""
        return Preprocessing(self.mean, self.std)

    def read(self) -> Raw:
        """Read the four arrays; pickled objects are refused."""
        if not self.path:
            raise UsageError("Npz: path is empty; give the .npz file")
        path = Path(self.path).expanduser()
        given = _arrays(path)
        x_train, x_test = (_images(given[name], f"{name} of {path}") for name in ("x_train", "x_test"))
        if x_train.shape[1:] != x_test.shape[1:]:
            raise DataError(
                f"Npz: images of {path} are {x_train.shape[1:]} in x_train and {x_test.shape[1:]} in x_test; they must be equal"
            )
        if len(self.mean) not in (1, x_train.shape[1]):
            raise UsageError(
                f"Npz: mean has {len(self.mean)} values, images of {path} have {x_train.shape[1]} channels; give one or as many"
            )
        y_train, y_test = (_labels(given[name], f"{name} of {path}") for name in ("y_train", "y_test"))
        seen = np.unique(y_train)
        if not np.array_equal(seen, np.arange(len(seen))):
            raise DataError(
                f"Npz: y_train of {path} holds {len(seen)} labels from {seen[0]} to {seen[-1]}; count them from 0 without a gap"
            )
        return Raw(x_train, y_train, x_test, y_test, tuple(map(str, seen)))

    def augmentation(self) -> Augment | None:
        """Crop and mirror; the mean colour comes in from outside."""
        return compose(_crop_an_eighth, flip) if self.augment else None


def _crop_an_eighth(x: Tensor, generator: Generator) -> Tensor:
    return crop(x, generator, padding=max(1, min(x.shape[2:]) // 8))


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in _ARRAYS}
    except FileNotFoundError as error:
        raise DataError(f"Npz: {path} is missing; give the path of an npz file with {', '.join(_ARRAYS)}") from error
    except KeyError as error:
        raise DataError(f"Npz: {path} lacks an array ({error.args[0]}); it needs {', '.join(_ARRAYS)}") from error
    except Exception as error:  # numpy, zipfile and zlib raise all kinds on broken files
        raise DataError(f"Npz: {path} cannot be read ({first_line(error)}): write it again with numpy.savez") from error


def _images(x: NDArray[Any], where: str) -> NDArray[Any]:
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or 0 in x.shape:
        raise DataError(f"Npz: {where} has the shape {x.shape}; it must be NCHW, NHWC or NHW")
    if x.shape[3] < x.shape[1]:
        x = x.transpose(0, 3, 1, 2)
    if x.dtype == np.uint8:
        return x
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"Npz: {where} is of type {x.dtype}; it must be uint8, or floats in [0, 1]")
    if (outside := (x < 0) | (x > 1)).any():
        raise DataError(f"Npz: {where} holds {x[outside][0]:g}; floats must lie in [0, 1]: divide by the largest pixel value")
    return x.astype(np.float32)


def _labels(y: NDArray[Any], where: str) -> NDArray[np.int64]:
    if y.ndim != 1 or len(y) == 0 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"Npz: {where} has the shape {y.shape} and type {y.dtype}; it must be one whole number for each image")
    return y.astype(np.int64)
