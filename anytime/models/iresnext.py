"""IResNeXt: sub-networks that share their first channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from anytime.errors import UsageError
from anytime.layers import SlicedConv2d, ZeroPadShortcut
from anytime.model import AnytimeModel, ModelSpec

STAGES = 3


@dataclass(frozen=True)
class IResNeXt(ModelSpec):
    """Anytime ResNeXt of ``subnets`` sub-networks, each with the first groups of all inner channels; 3x32x32 in the paper.

    | ``blocks`` per resolution | M MACs, jumped to | M parameters |
    |---|---|---|
    | 3 (L9) | 7.82 13.86 19.91 25.95 32.00 38.05 44.09 50.14 | 0.391 |
    | 7 (L21) | 15.88 29.99 44.09 58.20 72.31 86.41 100.52 114.63 | 0.876 |

    Inner width of sub-network k at resolution i of width ``width`` << i:
    (``bottleneck`` << i) x ``cardinality`` x (k+1) / ``subnets`` channels, in groups of ``bottleneck`` << i. Convolution
    weights are shared and sliced; BatchNorm and head belong to each sub-network. The residual stream has full width in
    all of them, so nothing but the weights is shared and every exit restarts from x: jumped to it costs its own MACs,
    after the others the sum. Truly sliced: the authors' code pads the inner channels with zeros and multiplies them in
    the last convolution (54.41 M MACs for the first of L21 instead of 15.88 M); the outputs are the same.
    Source: hankook/IResNeXt, models/anytime_resnext.py (as read in reference/anytime.md, c.1). Between resolutions
    AvgPool 2x2, then zero channels behind; the head pools whatever is left (8x8 of 32x32). Inferred: weights are drawn
    as torch draws the whole convolution's; L9's figures between the first and the last are counted here.
    """

    blocks: int = 3
    width: int = 64
    bottleneck: int = 4
    cardinality: int = 8
    subnets: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.blocks, self.width, self.bottleneck, self.cardinality, self.subnets)
        if min(sizes) < 1 or self.cardinality % self.subnets:
            raise UsageError(
                f"{self.label}: use positive numbers and a cardinality that is a multiple of subnets, "
                f"for example cardinality={8 * max(1, self.subnets)}"
            )

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        step = 2 ** (STAGES - 1)
        if len(input_shape) != 3 or input_shape[1] % step or input_shape[2] % step:
            raise UsageError(
                f"{self.label} takes images whose sides are multiples of {step}, the data set gives "
                f"{'x'.join(map(str, input_shape))}: choose another data set or model"
            )
        stem = SlicedConv2d.cut(nn.Conv2d(input_shape[0], self.width, 3, bias=False), 1)
        weights = [[_Weights(self, i) for _ in range(self.blocks)] for i in range(STAGES)]
        stages, heads = [], []
        for k in range(self.subnets):
            layers: list[nn.Module] = [SlicedConv2d(stem, padding=1)]
            for i, of_blocks in enumerate(weights):
                if i:
                    layers += [nn.AvgPool2d(2), ZeroPadShortcut(1, front=0, back=self.width << (i - 1))]
                layers += [_Block(w, k) for w in of_blocks]
            stages.append(nn.Sequential(*layers))
            last = self.width << (STAGES - 1)
            heads.append(
                nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, n_classes))
            )
        return AnytimeModel(stages, heads, restarts=True)


class _Weights:
    """What the sub-networks share of one block: each convolution's weight in ``subnets`` slices."""

    def __init__(self, spec: IResNeXt, resolution: int) -> None:
        self.width, per_group = spec.width << resolution, spec.bottleneck << resolution
        self.groups = spec.cardinality // spec.subnets  # of one slice
        self.inner = per_group * self.groups
        inner, n = per_group * spec.cardinality, spec.subnets
        self.into = SlicedConv2d.cut(nn.Conv2d(self.width, inner, 1, bias=False), n)
        self.grouped = SlicedConv2d.cut(nn.Conv2d(inner, inner, 3, groups=spec.cardinality, bias=False), n)
        self.out = SlicedConv2d.cut(nn.Conv2d(inner, self.width, 1, bias=False), n, dim=1)


class _Block(nn.Module):
    """Pre-activation residual block of sub-network k."""

    def __init__(self, w: _Weights, k: int) -> None:
        super().__init__()
        m = w.inner * (k + 1)
        self.residual = nn.Sequential(
            *(nn.BatchNorm2d(w.width), nn.ReLU(), SlicedConv2d(w.into[: k + 1])),
            *(nn.BatchNorm2d(m), nn.ReLU(), SlicedConv2d(w.grouped[: k + 1], padding=1, groups=w.groups * (k + 1))),
            *(nn.BatchNorm2d(m), nn.ReLU(), SlicedConv2d(w.out[: k + 1], dim=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)  # type: ignore[no-any-return]
