"""The user's own images, one folder per class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytime.augment import compose, crop, flip
from anytime.dataset import Augment, DatasetSpec, Preprocessing, Raw, torchvision
from anytime.errors import DataError, UsageError, first_line


@dataclass(frozen=True)
class ImageFolder(DatasetSpec):
    """Read ``path``/train/<class>/* and ``path``/test/<class>/*, all of it into memory.

    Every image is resized until its shorter side is ``size`` and cropped about its centre to ``size`` x ``size``; it must have
    8 bits for each channel of a pixel, or fewer.
    ``mean`` and ``std`` have three values for colour or one for grey. ``augment`` crops from a frame padded by an
    eighth of ``size`` and mirrors every second image.

    Source: this project, by torchvision's ``ImageFolder``, ``Resize`` and ``CenterCrop``.
    """

    path: str = ""
    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    augment: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or len(self.mean) not in (1, 3) or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UsageError(
                f"ImageFolder: size={self.size}, mean={self.mean}, std={self.std}: use size >= 1, and three values of mean "
                f"and std each for colour or one each for grey, every std above 0"
            )

    @property
    def label(self) -> str:
        """The folder's name and the size."""
        return f"{Path(self.path).name or 'ImageFolder'} at {self.size}x{self.size}"

    @property
    def own(self) -> bool:
        """Yes."""
        return True

    @property
    def preprocessing(self) -> Preprocessing:
        """``mean`` and ``std``."""
        return Preprocessing(self.mean, self.std)

    def read(self) -> Raw:
        """Read every image; DataError names one that cannot be read."""
        if not self.path:
            raise UsageError("ImageFolder: path is empty; give the folder that holds train/ and test/")
        root = Path(self.path).expanduser()
        x_train, y_train, classes = self._side(root / "train")
        x_test, y_test, test_classes = self._side(root / "test")
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise DataError(
                f"ImageFolder: {root}/train and {root}/test do not have the same classes ({', '.join(odd)}); make them agree"
            )
        return Raw(x_train, y_train, x_test, y_test, classes)

    def augmentation(self) -> Augment | None:
        """Crop and mirror; the mean colour comes in from outside."""
        return compose(partial(crop, padding=max(1, self.size // 8)), flip) if self.augment else None

    def _side(self, folder: Path) -> tuple[NDArray[Any], NDArray[Any], tuple[str, ...]]:
        vision = torchvision()
        from PIL import Image

        resize = vision.transforms.Compose([vision.transforms.Resize(self.size), vision.transforms.CenterCrop(self.size)])
        try:
            found = vision.datasets.ImageFolder(folder)
        except OSError as error:
            raise DataError(
                f"ImageFolder: {folder} cannot be used ({first_line(error)}): it must hold one folder per class, images in each"
            ) from error
        x = np.empty((len(found.samples), len(self.mean), self.size, self.size), dtype=np.uint8)
        for i, (file, _) in enumerate(found.samples):
            try:
                with Image.open(file) as image:
                    mode = image.mode
                    pixels = np.asarray(resize(image.convert("L" if len(self.mean) == 1 else "RGB")))
            except Exception as error:  # Pillow's decoders raise all kinds on broken files
                raise DataError(
                    f"ImageFolder: {file} cannot be read as an image ({first_line(error)}): repair or remove it"
                ) from error
            if mode.startswith(("I", "F")):  # Pillow cuts such pixels off at 255, and floats in [0, 1] become 0 and 1
                raise DataError(
                    f"ImageFolder: {file} holds more than 8 bits for each pixel (Pillow's mode {mode}), which would be cut off at 255: "
                    "convert it to 8 bits, or give floats in [0, 1] by Npz"
                )
            x[i] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return x, np.array(found.targets), tuple(found.classes)
