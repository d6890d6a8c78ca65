"""The networks of course notebooks on early exits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from anytime.errors import UsageError
from anytime.layers import he_normal
from anytime.model import AnytimeModel, ModelSpec, need_shape


class _Block(nn.Module):
    """He et al.'s basic block, with a projection where the shape changes."""

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()),
            *(nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)),
        )
        self.shortcut = (
            nn.Identity()
            if (c_in, stride) == (c, 1)
            else nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


@dataclass(frozen=True)
class EarlyExitResNet18(ModelSpec):
    """ResNet-18 as torchvision has it, with an exit after each of its four groups; grey or colour, sides of 28 or more.

    Every head run: 7.84, 16.23, 24.62 and 33.02 M MACs at 1x28x28, 11.85, 20.24, 28.63 and 37.02 M at 3x32x32, 11.2 M
    parameters (counted here); its trunk and last exit alone 1.81 G at 3x224x224, as torchvision's.
    Every exit is pooling and one linear layer, as the last one is (inferred: only the groups are published).
    Convolutions begin as torchvision's do (He, fan-out).
    Source: a course notebook on early exits over He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition",
    CVPR 2016, arXiv:1512.03385.
    """

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < 28:
            raise UsageError(
                f"{self.label} takes images of 1 or 3 channels and at least 28x28, the data set gives "
                f"{'x'.join(map(str, input_shape))}: choose another data set or model"
            )
        stem = (
            *(nn.Conv2d(input_shape[0], 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            nn.MaxPool2d(3, 2, 1),
        )
        model = AnytimeModel(
            stages=[
                nn.Sequential(*stem, _Block(64, 64, 1), _Block(64, 64, 1)),
                *(nn.Sequential(_Block(c // 2, c, 2), _Block(c, c, 1)) for c in (128, 256, 512)),
            ],
            heads=[nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n_classes)) for c in (64, 128, 256, 512)],
        )
        he_normal(model, "fan_out")
        return model


class _Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@dataclass(frozen=True)
class ThreeExitMLP(ModelSpec):
    """784-1024-1024-1024 with an exit after each hidden layer, for 1x28x28; ``width`` is the 1024.

    0.85, 1.95 and 3.04 M MACs with every head run and 3.05 M parameters for 47 classes; at ``width`` 512 and 10 classes
    0.41, 0.67 and 0.94 M, and 0.943 M parameters (counted here).
    The first two exits read their layer through a detach: only the last one teaches the trunk, so its answers are
    those of the plain network. The last exit is not detached (inferred: else nothing would).
    Source: a course notebook on early exits (EMNIST balanced, 47 classes).
    """

    width: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise UsageError(f"ThreeExitMLP: width={self.width} is no number of neurons; use 1 or more")

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (1, 28, 28))
        w = self.width
        return AnytimeModel(
            stages=[
                nn.Sequential(nn.Flatten(), nn.Linear(784, w), nn.ReLU()),
                nn.Sequential(nn.Linear(w, w), nn.ReLU()),
                nn.Sequential(nn.Linear(w, w), nn.ReLU()),
            ],
            heads=[
                nn.Sequential(_Detach(), nn.Linear(w, n_classes)),
                nn.Sequential(_Detach(), nn.Linear(w, n_classes)),
                nn.Sequential(nn.Linear(w, n_classes)),
            ],
        )
