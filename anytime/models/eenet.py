"""EENet's CIFAR networks: a bottleneck ResNet and a thin DenseNet-121, with convolutional exits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anytime.model import AnytimeModel, ModelSpec, need_shape


def _conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out)


def _bn_relu_conv(c_in: int, c_out: int, kernel: int) -> tuple[nn.Module, ...]:
    return nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)


def _last(c_in: int, n_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, n_classes))


def _exit(c_in: int, n_classes: int) -> nn.Sequential:
    """Three 3x3 convolutions; the first leaves a quarter of the channels."""
    c = c_in // 4
    convs = (layer for a in (c_in, c, c) for layer in (*_conv_bn(a, c, 3), nn.ReLU()))
    return nn.Sequential(*convs, *_last(c, n_classes))


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(c_in, c, 1), nn.ReLU(), *_conv_bn(c, c, 3, stride), nn.ReLU(), *_conv_bn(c, 4 * c, 1)
        )  # fmt: skip
        fits = stride == 1 and c_in == 4 * c
        self.shortcut = nn.Identity() if fits else nn.Sequential(*_conv_bn(c_in, 4 * c, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


class _Dense(nn.Module):
    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_bn_relu_conv(c_in, 4 * growth, 1), *_bn_relu_conv(4 * growth, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x), x], 1)


@dataclass(frozen=True)
class EENetResNet56(ModelSpec):
    """Nine bottlenecks of 16, 32 and 64 planes each, an exit after each group, for 3x32x32.

    54.97, 112.38 and 155.63 M MACs with every head run, 0.939 M parameters (10 classes).
    The authors call it ResNet-56 (``resnet56_3``); counted by its convolutions it has 83 layers. Inferred: weights begin as
    torch draws them.
    Source: Ilhan, Chow, Hu, Huang, Tekin, Wei, Wu, Lee, Pan, Latapie, Kompella, Liu, "Adaptive Deep Neural Network
    Inference Optimization with EENet", WACV 2024, arXiv:2301.07099; layers from the authors' code.
    """

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))

        def group(c_in: int, c: int, stride: int) -> Iterator[nn.Module]:
            yield _Bottleneck(c_in, c, stride)
            for _ in range(8):
                yield _Bottleneck(4 * c, c, 1)

        return AnytimeModel(
            stages=[
                nn.Sequential(*_conv_bn(3, 16, 3), nn.ReLU(), *group(16, 16, 1)),
                nn.Sequential(*group(64, 32, 2)),
                nn.Sequential(*group(128, 64, 2)),
            ],
            heads=[_exit(64, n_classes), _exit(128, n_classes), _last(256, n_classes)],
        )


@dataclass(frozen=True)
class EENetDenseNet121(ModelSpec):
    """DenseNet-121 of growth 12, an exit after each transition and the last one, for 3x32x32.

    55.15, 94.60, 126.53 and 131.36 M MACs with every head run, 1.208 M parameters (100 classes, as published).
    Inferred: weights begin as torch draws them.
    Source: as EENetResNet56 (``densenet121_4``): Ilhan et al., "Adaptive Deep Neural Network Inference Optimization
    with EENet", WACV 2024, arXiv:2301.07099; layers from the authors' code.
    """

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))
        growth = 12
        c = 2 * growth
        stages: list[nn.Sequential] = []
        heads: list[nn.Sequential] = []
        for n in (6, 12, 24, 16):
            layers: list[nn.Module] = [] if stages else [nn.Conv2d(3, c, 3, padding=1, bias=False)]
            layers += [_Dense(c + i * growth, growth) for i in range(n)]
            c += n * growth
            if n == 16:
                layers += [nn.BatchNorm2d(c), nn.ReLU()]
                heads.append(_last(c, n_classes))
            else:
                layers += [*_bn_relu_conv(c, c // 2, 1), nn.AvgPool2d(2)]
                c //= 2
                heads.append(_exit(c, n_classes))
            stages.append(nn.Sequential(*layers))
        return AnytimeModel(stages, heads)
