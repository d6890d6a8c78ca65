"""The handwritten digits that come with scikit-learn: real, small, and there without a download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from anytime.augment import affine
from anytime.dataset import Augment, DatasetSpec, Preprocessing, Raw, digest, enlarge
from anytime.errors import DataError

_DIGEST = "abecfd0572dbb442"  # of images and labels as uint8; scikit-learn publishes no hash of its copy


@dataclass(frozen=True)
class Digits(DatasetSpec):
    """Read 1,797 real digits of 8x8 pixels, brought to 1x28x28.

    The set is published without a split: test is every fifth digit of each class (359), the same for every seed.
    ``augment`` as in MNIST.

    Source: scikit-learn's ``load_digits``, the test part of Alpaydin and Kaynak 1998, "Optical Recognition of
    Handwritten Digits" (UCI). Split and size are this project's, so its scores compare with no other's.
    """

    calib: int = 128
    tune: int = 100
    val: int = 250
    hold: int = 100
    augment: bool = True

    @property
    def preprocessing(self) -> Preprocessing:
        """Mean and deviation of all training pixels."""
        return Preprocessing((0.3052,), (0.3244,))

    def read(self) -> Raw:
        """Read the set from the installed scikit-learn."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        small, y = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
        if digest(small, y) != _DIGEST:
            raise DataError(
                "Digits: load_digits of the installed scikit-learn gives other digits than it did: install another version"
            )
        x = (enlarge(small, 28) / 16).astype(np.float32)[:, None]
        test = np.zeros(len(y), dtype=bool)
        for c in range(10):
            test[np.flatnonzero(y == c)[2::5]] = True
        return Raw(x[~test], y[~test], x[test], y[test], tuple("0123456789"))

    def augmentation(self) -> Augment | None:
        """A mild affine map; black comes in from outside."""
        return partial(affine, fill=self.preprocessing.black) if self.augment else None
