"""EMNIST: handwritten letters and digits in MNIST's form, six splits."""

from __future__ import annotations

import gzip
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anytime.augment import affine
from anytime.dataset import Augment, DatasetSpec, Preprocessing, Raw, data_root, ensure_published, torchvision


@dataclass(frozen=True)
class EMNIST(DatasetSpec):
    """Read handwritten letters and digits, 1x28x28, from ``EMNIST/raw/gzip.zip`` of the data folder.

    Only the zip has a published md5, so the zip itself is read, and an unpacked copy beside it is not.
    The published images lie on their side: they are transposed. ``split`` "letters" counts its labels from 0 here, not
    from 1. ``augment`` as in MNIST.

    Source: Cohen et al. 2017, arXiv 1702.05373. It could not be had where this was written: names, labels and layout
    follow torchvision's reader and were checked on a zip made by the tests; no score was. Mean and deviation are MNIST's.
    """

    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced"
    augment: bool = True

    @property
    def preprocessing(self) -> Preprocessing:
        """MNIST's mean and deviation."""
        return Preprocessing((0.1307,), (0.3081,))

    def read(self) -> Raw:
        """Read the four idx files of the split out of the published zip."""
        datasets = torchvision().datasets
        reader = datasets.EMNIST
        folder = data_root() / "EMNIST" / "raw"
        path = folder / "gzip.zip"
        ensure_published(
            "EMNIST", {path: reader.md5}, lambda: datasets.utils.download_url(reader.url, folder, path.name, reader.md5)
        )
        classes = tuple(reader.classes_split_dict[self.split])
        first = 1 if self.split == "letters" else 0  # torchvision's class 0 of the letters is "N/A"
        x_train, y_train, x_test, y_test = (
            _idx(path, f"gzip/emnist-{self.split}-{part}-{what}-ubyte.gz")
            for part in ("train", "test")
            for what in ("images-idx3", "labels-idx1")
        )
        return Raw(
            x_train.transpose(0, 2, 1)[:, None],
            y_train.astype(np.int64) - first,
            x_test.transpose(0, 2, 1)[:, None],
            y_test.astype(np.int64) - first,
            classes[first:],
        )

    def augmentation(self) -> Augment | None:
        """A mild affine map; black comes in from outside."""
        return partial(affine, fill=self.preprocessing.black) if self.augment else None


def _idx(path: Path, member: str) -> NDArray[Any]:
    with zipfile.ZipFile(path) as archive:
        body = gzip.decompress(archive.read(member))
    n_axes = body[3]
    return np.frombuffer(body, np.uint8, offset=4 + 4 * n_axes).reshape(np.frombuffer(body, ">i4", n_axes, 4))
