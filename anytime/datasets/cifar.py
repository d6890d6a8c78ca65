"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32x32 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from anytime.augment import compose, crop, flip
from anytime.dataset import Augment, DatasetSpec, Preprocessing, Raw, data_root, ensure_published, torchvision

_IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class CIFAR10(DatasetSpec):
    """Read the ten-class set, 3x32x32, from ``cifar-10-batches-py`` of the data folder.

    ``augment`` crops from a frame padded by 4 pixels and mirrors every second image. ``statistics`` names whose
    mean and deviation normalise the pixels: "imagenet" is for published weights that were trained so.

    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; augmentation: He et al. 2015.
    """

    augment: bool = True
    statistics: Literal["cifar10", "imagenet"] = "cifar10"

    @property
    def preprocessing(self) -> Preprocessing:
        """Mean and deviation per channel."""
        if self.statistics == "imagenet":
            return _IMAGENET
        return Preprocessing((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

    def read(self) -> Raw:
        """Read the six batches."""
        return _read("CIFAR10")

    def augmentation(self) -> Augment | None:
        """Crop and mirror; the mean colour comes in from outside."""
        return compose(partial(crop, padding=4), flip) if self.augment else None


@dataclass(frozen=True)
class CIFAR100(DatasetSpec):
    """Read the hundred-class set (fine labels), 3x32x32, from ``cifar-100-python`` of the data folder.

    ``augment`` as in CIFAR10.

    Source: Krizhevsky 2009, as CIFAR10. This project's machines have no copy of it: its files are known here by
    the published md5 only.
    """

    augment: bool = True

    @property
    def preprocessing(self) -> Preprocessing:
        """Mean and deviation per channel of its training set."""
        return Preprocessing((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

    def read(self) -> Raw:
        """Read both batches."""
        return _read("CIFAR100")

    def augmentation(self) -> Augment | None:
        """Crop and mirror; the mean colour comes in from outside."""
        return compose(partial(crop, padding=4), flip) if self.augment else None


def _read(name: str) -> Raw:
    reader = getattr(torchvision().datasets, name)
    root = data_root()
    published = dict([*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])])
    files = {root / reader.base_folder / file: md5 for file, md5 in published.items()}
    # Before anything is read: the batches are pickles, and a tampered pickle runs code.
    ensure_published(name, files, lambda: reader(root, download=True))
    train, test = reader(root, train=True), reader(root, train=False)
    x_train, x_test = (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test))
    return Raw(x_train, np.array(train.targets), x_test, np.array(test.targets), tuple(train.classes))
