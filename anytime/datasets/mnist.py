"""MNIST and Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 pixels, ten classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from anytime.augment import affine, compose, crop, flip
from anytime.dataset import Augment, DatasetSpec, Preprocessing, Raw, data_root, ensure_published, torchvision

# Published are the md5 of the .gz files. These are those of the files inside, which are what is read: taken by
# `gunzip -c F.gz | md5sum` from .gz files whose own md5 were the published ones (torchvision's `resources`).
_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_FASHION_MNIST = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


@dataclass(frozen=True)
class MNIST(DatasetSpec):
    """Read the handwritten digits, 1x28x28, from ``MNIST/raw`` of the data folder.

    ``augment`` turns each image by up to 10 degrees, shifts it by up to 2 pixels and scales it by 0.9 to 1.1.

    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition". Mean and deviation are
    those of its training set, as in PyTorch's MNIST example; the augmentation is this project's.
    """

    augment: bool = True

    @property
    def preprocessing(self) -> Preprocessing:
        """Mean and deviation of all training pixels."""
        return Preprocessing((0.1307,), (0.3081,))

    def read(self) -> Raw:
        """Read the four idx files."""
        return _read("MNIST", _MNIST)

    def augmentation(self) -> Augment | None:
        """A mild affine map; black comes in from outside."""
        return partial(affine, fill=self.preprocessing.black) if self.augment else None


@dataclass(frozen=True)
class FashionMNIST(DatasetSpec):
    """Read the articles of clothing, 1x28x28, from ``FashionMNIST/raw`` of the data folder.

    ``augment`` shifts each image by up to 4 pixels and mirrors every second one.

    Source: Xiao et al. 2017, arXiv 1708.07747. Mean and deviation are those of its training set; the augmentation
    is CIFAR's, as in Zhong et al. 2017, "Random Erasing".
    """

    augment: bool = True

    @property
    def preprocessing(self) -> Preprocessing:
        """Mean and deviation of all training pixels."""
        return Preprocessing((0.2860,), (0.3530,))

    def read(self) -> Raw:
        """Read the four idx files."""
        return _read("FashionMNIST", _FASHION_MNIST)

    def augmentation(self) -> Augment | None:
        """Crop and mirror; black comes in from outside."""
        return compose(partial(crop, padding=4, fill=self.preprocessing.black), flip) if self.augment else None


def _read(name: str, md5s: dict[str, str]) -> Raw:
    datasets = torchvision().datasets
    reader = getattr(datasets, name)
    root = data_root()
    files = {root / name / "raw" / file: md5 for file, md5 in md5s.items()}
    ensure_published(name, files, lambda: reader(root, download=True))
    # Not reader(root): it would prefer ``processed/*.pt``, files of its earlier versions that nobody has published.
    read = datasets.mnist
    x_train, y_train, x_test, y_test = (
        (read.read_image_file if "images" in path.name else read.read_label_file)(path).numpy() for path in files
    )
    return Raw(x_train[:, None], y_train, x_test[:, None], y_test, tuple(reader.classes))
