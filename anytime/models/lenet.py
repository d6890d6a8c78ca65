"""LeNet-5 for colour images, the member that ensembles of small networks are usually shown with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from anytime.errors import UsageError
from anytime.model import AnytimeModel, ModelSpec, need_shape


@dataclass(frozen=True)
class LeNet5(ModelSpec):
    """LeNet-5 for 3x32x32, one exit: 0.65 M MACs and 62,006 parameters; ``width`` multiplies every layer's outputs but the last.

    ReLU and pooling by maximum, where LeCun et al. have tanh and trainable averages, and all maps of the first layer are read.
    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998, section II-B; this form is
    torchensemble's example on CIFAR-10 and PyTorch's tutorial.
    """

    exits_early: ClassVar[bool] = False

    width: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.width > 0:
            raise UsageError(f"LeNet5: width={self.width} is no factor of widths; use one above 0")

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))
        a, b, c, d = (max(1, round(self.width * n)) for n in (6, 16, 120, 84))
        trunk = nn.Sequential(
            *(nn.Conv2d(3, a, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(a, b, 5), nn.ReLU(), nn.MaxPool2d(2)),
        )
        head = nn.Sequential(nn.Flatten(), nn.Linear(25 * b, c), nn.ReLU(), nn.Linear(c, d), nn.ReLU(), nn.Linear(d, n_classes))
        return AnytimeModel([trunk], [head])
