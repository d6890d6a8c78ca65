"""Made-up images, for tests of everything that needs data but no meaning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anytime.dataset import DatasetSpec, Preprocessing, Raw
from anytime.errors import UsageError


@dataclass(frozen=True)
class Synthetic(DatasetSpec):
    """Draw one mean image per class, and samples around it; always the same ones.

    ``n`` training and a quarter as many test samples [channels, size, size]; ``noise`` is the deviation of a
    pixel from its class's mean, which is uniform in [0.25, 0.75].

    Source: this project. No result on it says anything about a method.
    """

    calib: int = 64
    tune: int = 60
    val: int = 100
    hold: int = 60
    n: int = 1000
    size: int = 28
    channels: int = 1
    n_classes: int = 10
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_classes < 2 or self.n < 4 * self.n_classes or self.size < 1 or self.channels < 1 or self.noise < 0:
            raise UsageError(
                f"Synthetic: n={self.n}, size={self.size}, channels={self.channels}, n_classes={self.n_classes}, "
                f"noise={self.noise}: use at least 2 classes, 4 samples of each, 1 pixel, 1 channel and no negative noise"
            )

    @property
    def preprocessing(self) -> Preprocessing:
        """Roughly its mean and deviation."""
        return Preprocessing((0.5,) * self.channels, (0.2,) * self.channels)

    def read(self) -> Raw:
        """Draw all samples."""
        rng = np.random.default_rng(0)
        means = rng.uniform(0.25, 0.75, (self.n_classes, self.channels, self.size, self.size))
        y = np.arange(self.n + self.n // 4) % self.n_classes
        x = means[y] + rng.normal(0, self.noise, (len(y), *means.shape[1:]))
        pixels = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
        return Raw(pixels[: self.n], y[: self.n], pixels[self.n :], y[self.n :], tuple(map(str, range(self.n_classes))))
