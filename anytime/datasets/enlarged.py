"""The images of another data set, brought to the size that larger networks take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytime.dataset import Augment, Data, DatasetSpec, Preprocessing, Raw, digest, enlarge
from anytime.errors import UsageError

FROM_TRAINING = ("train", "calib", "tune", "val", "hold")


@dataclass(frozen=True)
class Enlarged(DatasetSpec):
    """Images of ``of``, [C, S, S], brought to [C, size, size] bilinearly, in 256 levels.

    With ``n_classes`` networks answer with so many classes and the labels mean nothing to them: real images for networks
    of other classes, ImageNet's say, where fidelity and latency are asked for and accuracy is not. All of it is held in memory, at
    size 224 and 3 channels 0.6 MB an image: give a ``limit`` (that of ``of`` is not used).
    Source: this project; pixels lie as in torch's ``interpolate`` with align_corners=False.
    """

    of: DatasetSpec
    size: int = 224
    n_classes: int = 0

    @property
    def label(self) -> str:
        """The data set and the size."""
        return f"{self.of.label} at {self.size}x{self.size}"

    @property
    def preprocessing(self) -> Preprocessing:
        """That of ``of``."""
        return self.of.preprocessing

    @property
    def own(self) -> bool:
        """As those of ``of``."""
        return self.of.own

    @property
    def labelled(self) -> bool:
        """Whether the classes are those of ``of``."""
        return not self.n_classes and self.of.labelled

    def augmentation(self) -> Augment | None:
        """That of ``of``, in pixels of the enlarged image."""
        return self.of.augmentation()

    def read(self) -> Raw:
        """Read ``of`` and enlarge it. UsageError where its images are not square, or larger already."""
        raw = replace(self.of, limit=self.limit)._limited(self.of.read())
        shape = raw.x_train.shape[1:]
        if shape[1] != shape[2] or self.size < shape[1]:
            raise UsageError(
                f"Enlarged: images of {self.of.label} are {'x'.join(map(str, shape))} and cannot be enlarged to "
                f"{self.size}x{self.size}: give square ones and a size of at least theirs"
            )
        classes = tuple(map(str, range(self.n_classes))) or raw.classes
        return Raw(self._large(raw.x_train), raw.y_train, self._large(raw.x_test), raw.y_test, classes)

    def load(self, seed: int) -> Data:
        """Read and split; parts name the published set of ``of`` among their origins too."""
        data, raw = super().load(seed), self.of.read()
        # Else weights that have seen the small images could be judged on the large ones.
        small = {digest(raw.x_train, raw.y_train)}
        parts = {name: getattr(data, name) for name in FROM_TRAINING}
        return replace(data, **{name: replace(part, origins=part.origins | small) for name, part in parts.items()})

    def _large(self, x: NDArray[Any]) -> NDArray[np.uint8]:
        levels = x if x.dtype == np.uint8 else np.rint(255 * x).astype(np.uint8)
        return np.rint(enlarge(levels, self.size)).astype(np.uint8)
