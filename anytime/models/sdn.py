"""Shallow-Deep Networks: internal classifiers on the common trunks for CIFAR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor, nn

from anytime.layers import BasicBlock, MixedPool2d, he_normal
from anytime.model import AnytimeModel, ModelSpec, need_shape

Trunk = Literal["resnet20", "resnet32", "resnet44", "resnet56", "vgg16_bn", "mobilenet", "wrn32_4"]

# After which blocks an internal classifier sits, counted from 0: those nearest to 15, 30, 45, 60, 75 and 90 % of the MACs.
_TAPS: dict[str, tuple[int, ...]] = {
    "resnet20": (0, 2, 3, 4, 6, 7),
    "resnet32": (1, 3, 6, 8, 10, 13),
    "resnet44": (2, 5, 8, 12, 15, 18),
    "resnet56": (3, 7, 11, 15, 19, 23),
    "vgg16_bn": (1, 3, 5, 6, 8, 9),
    "mobilenet": (2, 4, 6, 8, 11),
    "wrn32_4": (2, 4, 6, 8, 10, 12),
}
_LABELS = {
    "resnet20": "ResNet-20", "resnet32": "ResNet-32", "resnet44": "ResNet-44", "resnet56": "ResNet-56",
    "vgg16_bn": "VGG-16-BN", "mobilenet": "MobileNet", "wrn32_4": "WRN-32-4",
}  # fmt: skip


@dataclass(frozen=True)
class SDN(ModelSpec):
    """``trunk`` for 3x32x32 with an internal classifier near each sixth of its MACs: seven exits, MobileNet's six.

    | trunk | M MACs of the trunk alone | classifiers at this percentage of them | M parameters |
    |---|---|---|---|
    | resnet20 | 40.81 | 12.6 35.8 44.8 56.3 76.9 88.4 | 0.308 |
    | resnet32 | 69.12 | 14.3 27.9 46.9 60.6 72.7 93.2 | 0.503 |
    | resnet44 | 97.44 | 15.0 29.5 43.0 62.3 75.8 90.3 | 0.697 |
    | resnet56 | 125.75 | 15.4 30.4 44.5 59.6 73.7 88.7 | 0.892 |
    | vgg16_bn | 313.7 | 12.6 30.6 48.7 60.7 78.8 90.8 | 15.5 |
    | mobilenet | 46.35 | 21.6 35.6 49.5 67.9 90.9 | 3.48 |
    | wrn32_4 | 1185 | 16.8 29.6 45.7 58.4 74.5 87.3 | 7.5 |

    An internal classifier pools its map to 4x4 by MixedPool2d and reads it with one linear layer. The ResNets have
    projection shortcuts (option B). Convolutions start He-normal by fan-out, VGG's linear layers from N(0, 0.01), MobileNet
    as torch starts it. Inferred: the places on ResNet-20, 32 and 44, which the authors have not; they are the blocks
    nearest to 15, 30, 45, 60, 75 and 90 %, and the figures are counted here. Deviations: on maps of 4x4 the authors' mixed
    pooling has windows of one pixel, which is the identity whatever alpha is, and is left out; biases of WRN's layers start
    as He-normal and torch have them; classifiers of the ResNets read what the next block reads, behind the block's last ReLU,
    where the authors' code reads before it.
    Source: Kaya, Hong, Dumitras, "Shallow-Deep Networks", ICML 2019, arXiv:1810.07052, section 4; layers and places
    from the authors' architectures/SDNs and network_architectures.py.
    """

    trunk: Trunk = "resnet56"

    @property
    def label(self) -> str:
        return f"SDN {_LABELS.get(self.trunk, self.trunk)}"

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))
        taps, (parts, head) = _TAPS[self.trunk], _TRUNKS[self.trunk](n_classes)
        ends = [0, *(tap + 1 for tap in taps), len(parts)]
        model = AnytimeModel(
            stages=[nn.Sequential(*(part.block for part in parts[a:b])) for a, b in pairwise(ends)],
            heads=[*(_internal_classifier(parts[tap], n_classes) for tap in taps), head],
        )
        if self.trunk != "mobilenet":
            he_normal(model, "fan_out")
        if self.trunk == "vgg16_bn":
            for m in model.modules():
                if isinstance(m, nn.Linear):
                    nn.init.normal_(m.weight, 0, 0.01)
                    nn.init.zeros_(m.bias)
        return model


class _Part(NamedTuple):
    """One block of a trunk; ``channels`` x ``size`` x ``size`` is what it leaves."""

    block: nn.Module
    channels: int
    size: int


def _internal_classifier(part: _Part, n_classes: int) -> nn.Sequential:
    window = max(part.size // 4, 1)
    features = part.channels * (part.size // window) ** 2
    pool = [MixedPool2d(window)] if window > 1 else []
    return nn.Sequential(*pool, nn.Flatten(), nn.Linear(features, n_classes))


def _conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]


def _resnet(n: int, n_classes: int) -> tuple[list[_Part], nn.Module]:
    parts: list[_Part] = []
    c_in = 16
    for c_out, size in ((16, 32), (32, 16), (64, 8)):
        for _ in range(n):
            stride = 1 if c_in == c_out else 2
            project = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            block = BasicBlock(c_in, c_out, stride, nn.Identity() if c_in == c_out else project)
            stem = [] if parts else _conv_bn_relu(3, 16, 3)
            parts.append(_Part(nn.Sequential(*stem, block), c_out, size))
            c_in = c_out
    return parts, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_classes))


class _WideBlock(nn.Module):
    """Pre-activation: BatchNorm and ReLU stand before each convolution, and the shortcut reads what came before them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, 3, 1, 1), nn.Dropout(0.3)),
            *(nn.BatchNorm2d(c_out), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, stride, 1)),
        )
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shortcut(x)  # type: ignore[no-any-return]


def _wrn(n: int, n_classes: int) -> tuple[list[_Part], nn.Module]:
    parts: list[_Part] = []
    c_in = 16
    for c_out, size in ((64, 32), (128, 16), (256, 8)):
        for i in range(n):
            block = _WideBlock(c_in, c_out, 2 if i == 0 and size < 32 else 1)
            stem = [] if parts else [nn.Conv2d(3, 16, 3, 1, 1)]
            parts.append(_Part(nn.Sequential(*stem, block), c_out, size))
            c_in = c_out
    end = (nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, n_classes))
    return parts, nn.Sequential(*end)


def _mobilenet(n_classes: int) -> tuple[list[_Part], nn.Module]:
    parts: list[_Part] = []
    c_in, size = 32, 32
    for c_out in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024):
        stride = 2 if c_out > c_in and parts else 1
        size //= stride
        stem = [] if parts else _conv_bn_relu(3, 32, 3)
        depthwise = _conv_bn_relu(c_in, c_in, 3, stride, groups=c_in)
        parts.append(_Part(nn.Sequential(*stem, *depthwise, *_conv_bn_relu(c_in, c_out, 1)), c_out, size))
        c_in = c_out
    return parts, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, n_classes))


def _vgg(n_classes: int) -> tuple[list[_Part], nn.Module]:
    parts: list[_Part] = []
    c_in, size = 3, 32
    for c_out, n in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for i in range(n):
            pool = [nn.MaxPool2d(2)] if i == n - 1 else []
            size //= 1 + len(pool)
            parts.append(_Part(nn.Sequential(*_conv_bn_relu(c_in, c_out, 3, bias=True), *pool), c_out, size))
            c_in = c_out
    return parts, nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(512, 512), nn.Dropout(0.5), nn.Linear(512, n_classes)),
    )


_TRUNKS: dict[str, Callable[[int], tuple[list[_Part], nn.Module]]] = {
    "resnet20": partial(_resnet, 3),
    "resnet32": partial(_resnet, 5),
    "resnet44": partial(_resnet, 7),
    "resnet56": partial(_resnet, 9),
    "vgg16_bn": _vgg,
    "mobilenet": _mobilenet,
    "wrn32_4": partial(_wrn, 5),
}
