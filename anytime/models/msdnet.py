"""MSDNet: dense over layers and over scales, so that early exits see coarse features too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anytime.errors import UsageError
from anytime.layers import he_normal
from anytime.model import AnytimeModel, ModelSpec, need_shape

SCALES = 3  # of 32x32 images: the coarsest map is 8x8


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
    )  # fmt: skip


def _narrowed(c_in: int, c_out: int, stride: int, narrow: int) -> nn.Sequential:
    inner = min(c_in, narrow * c_out)
    return nn.Sequential(*_conv(c_in, inner, 1), *_conv(inner, c_out, 3, stride))


class _Stem(nn.Module):
    """Image -> one map per scale, from fine to coarse."""

    def __init__(self, c_in: int, widths: list[int]) -> None:
        super().__init__()
        steps = zip([c_in, *widths], widths, strict=False)
        self.scales = nn.ModuleList(_conv(a, b, 3, 2 if i else 1) for i, (a, b) in enumerate(steps))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        state = []
        for scale in self.scales:
            x = scale(x)
            state.append(x)
        return tuple(state)


class _Layer(nn.Module):
    """Each scale keeps its map and appends new ones, made from itself and from the finer scale.

    ``factors`` are those of the scales that enter; with ``drop`` the finest of them is read for the last time.
    """

    def __init__(self, c_in: int, growth: int, factors: tuple[int, ...], narrow: tuple[int, ...], drop: bool) -> None:
        super().__init__()
        self.first = int(drop)
        self.same, self.down = nn.ModuleList(), nn.ModuleList()
        for s in range(self.first, len(factors)):
            new = growth * factors[s]
            if s:
                self.down.append(_narrowed(c_in * factors[s - 1], new // 2, 2, narrow[s - 1]))
            self.same.append(_narrowed(c_in * factors[s], new // 2 if s else new, 1, narrow[s]))

    def forward(self, state: Any) -> tuple[Tensor, ...]:
        out = []
        for s, same in enumerate(self.same, self.first):  # not over the state: a traced one has no length
            finer = [self.down[s - 1](state[s - 1])] if s else []
            out.append(torch.cat([state[s], *finer, same(state[s])], 1))
        return tuple(out)


class _Transition(nn.Module):
    def __init__(self, c_in: int, c_out: int, factors: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_conv(c_in * f, c_out * f, 1) for f in factors)

    def forward(self, state: Any) -> tuple[Tensor, ...]:
        return tuple(scale(state[i]) for i, scale in enumerate(self.scales))


class _Coarsest(nn.Module):
    def forward(self, state: Any) -> Any:
        return state[-1]


@dataclass(frozen=True)
class MSDNet(ModelSpec):
    """MSDNet for 3x32x32, ``blocks`` exits; the state is one map per scale, from fine to coarse.

    The first block has ``base`` layers, block i (from 0) ``step`` more, or ``step`` x i + 1 when ``growing``. Scale s
    grows by ``growth`` x ``factors[s]`` maps a layer through a 1x1 bottleneck of at most ``narrow[s]`` times what it
    makes. The layers are cut into as many equal runs as there are scales; each run but the first drops the finest scale
    and takes ``reduction`` of the maps through a 1x1 transition. Presets, the constants of this module, every head run:

    | preset | M MACs | M parameters |
    |---|---|---|
    | CIFAR10_ANYTIME | 14.96 25.24 37.43 51.62 61.69 73.52 87.13 99.39 109.44 120.97; the last alone 78.94 | 4.84 |
    | CIFAR100_ANYTIME | 14.97 25.26 36.78 45.97 56.93 66.53 75.49 | 3.07 |
    | CIFAR10_BATCH | 6.78 14.19 27.01 48.01 75.84 108.12 136.48 | 3.89 |
    | CIFAR100_BATCH | 6.79 14.21 27.28 41.37 58.09 | 2.08 |

    Weights begin as in the Lua code (He, fan-out); the port to PyTorch means the same, but its loop does not reach the
    convolutions.
    Source: Huang, Chen, Li, Wu, van der Maaten, Weinberger, "Multi-Scale Dense Networks", ICLR 2018, arXiv:1703.09844,
    section 4 and appendix A; layers from the authors' Lua code and MSDNet-PyTorch (prune "max").
    """

    blocks: int = 10
    base: int = 4
    step: int = 2
    growing: bool = False
    channels: int = 16
    growth: int = 6
    factors: tuple[int, ...] = (1, 2, 4)
    narrow: tuple[int, ...] = (1, 2, 4)
    reduction: float = 0.5

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))
        self._check()
        steps = [self.base, *(self.step * i + 1 if self.growing else self.step for i in range(1, self.blocks))]
        run = -(-sum(steps) // len(self.factors))  # layers between two drops of a scale
        stages: list[nn.Module] = []
        heads: list[nn.Module] = []
        width, layer, gone = self.channels, 0, 0
        for n in steps:
            stage: list[nn.Module] = [] if stages else [_Stem(3, [width * f for f in self.factors])]
            for _ in range(n):
                drop = layer // run > gone
                stage.append(_Layer(width, self.growth, self.factors[gone:], self.narrow[gone:], drop))
                width, layer = width + self.growth, layer + 1
                if drop:
                    gone += 1
                    wide, width = width, int(width * self.reduction)
                    if not width:
                        raise UsageError(f"{self.label}: reduction={self.reduction} leaves none of {wide} maps; use more")
                    stage.append(_Transition(wide, width, self.factors[gone:]))
            stages.append(nn.Sequential(*stage))
            heads.append(
                nn.Sequential(
                    _Coarsest(), *_conv(width * self.factors[-1], 128, 3, 2), *_conv(128, 128, 3, 2),
                    nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, n_classes),
                )
            )  # fmt: skip
        model = AnytimeModel(stages, heads)
        he_normal(model, "fan_out")
        return model

    def _check(self) -> None:
        if self.blocks < 2 or min(self.base, self.step, self.channels) < 1:
            raise UsageError(f"{self.label}: use at least 2 blocks, and 1 or more for base, step and channels")
        if not len(self.factors) == len(self.narrow) == SCALES or min(self.factors + self.narrow) < 1:
            raise UsageError(
                f"{self.label}: factors={self.factors} and narrow={self.narrow} must name one number of 1 or more per scale, "
                f"of {SCALES} scales: an exit reads maps of 8x8"
            )
        if self.growth < 2 or self.growth % 2 or not 0 < self.reduction <= 1:
            raise UsageError(
                f"{self.label}: growth must be even, half of it comes from the finer scale; reduction over 0, up to 1"
            )


CIFAR10_ANYTIME = MSDNet()
CIFAR100_ANYTIME = MSDNet(blocks=7)
CIFAR10_BATCH = MSDNet(blocks=7, base=1, step=1, growing=True)
CIFAR100_BATCH = MSDNet(blocks=5, base=1, step=1, growing=True)
