"""The depth-nested sparse ResNet: every stage interlaces new layers between those that have run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from anytime.errors import UsageError
from anytime.model import AnytimeModel, ModelSpec, State


class _Place(NamedTuple):
    """A layer's output; layer -1 is what its resolution starts from."""

    resolution: int
    layer: int

    def __str__(self) -> str:
        return f"resolution{self.resolution}_" + ("start" if self.layer < 0 else f"layer{self.layer}")


IMAGE = _Place(-1, 0)


@dataclass(frozen=True)
class SparseResNet(ModelSpec):
    """Sparse ResNet with nested depths: exit s has depth / 2^(exits-1-s) layers in every resolution; none runs twice.

    A layer is the residual branch of a pre-activated bottleneck: 1x1, 3x3 and 1x1 convolution, BN and ReLU before each, the
    middle ``squeeze`` times narrower. It reads a sum: layer i reads i-1, i-2, i-4, ... down to -1, what its resolution
    starts from. Layers are numbered 0 .. depth-1 in each resolution. The network of exit s has the layers
    that are multiples of u = 2^(exits-1-s); numbered by u they are 0, 1, 2, ... again, and what was i-2^j is i-2^j
    still, so it is a sparse ResNet by itself. Its new layers are the odd ones (all of them in the first stage) and read
    i-1 (old), i-2, i-4, ... (new). An even layer is older and keeps the sources that it had, i-2, i-4, ...: an old
    layer never reads a new one, so the longest path through a resolution is 1, 2, 3, 5 layers at depths 1, 2, 4, 8.

    Resolutions are nested separately. A stage runs its new layers at the first resolution, then a transition, then its
    new layers at the next one, to the head. Transition and head stand where the layer behind the last would stand, and
    read as it would: n-1, n-2, n-4, ... of n layers. Every stage has a transition of its own (BN, ReLU, AvgPool 2x2,
    1x1 convolution): it is a new layer, which may read everything, and what this stage's new layers take for the start
    of their resolution. Older layers keep the start of their own stage. The stem starts the first resolution for all.

    The state after a stage: the stem's output and every layer's so far, by resolution; after the last one only what
    the head reads. With the defaults 8.98, 17.08, 31.30 and 57.78 M MACs for 3x32x32, every head run, and 0.505 M parameters
    (counted here).
    Source: Wan et al., "Orthogonalized SGD and Nested Architectures for Anytime Neural Networks", ICML 2020,
    arXiv:2008.06635, on Zhu et al., "Sparsely Aggregated Convolutional Networks", ECCV 2018, arXiv:1801.05895 (as
    summed up in reference/anytime.md, c.2); the layer: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016,
    arXiv:1603.05027. Inferred, the papers' own text not being at hand: that a layer is such a branch, all about transitions,
    and the sizes.
    """

    version: ClassVar[int] = 2  # 1: a layer was a single convolution

    depth: int = 8
    widths: tuple[int, ...] = (32, 96, 192)
    exits: int = 4
    squeeze: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (*self.widths, self.squeeze, self.exits, self.depth)
        if not self.widths or min(sizes) < 1 or self.depth % 2 ** (self.exits - 1):
            raise UsageError(
                f"{self.label}: every exit has twice the depth of the one before it, so depth must be a multiple of "
                f"2^(exits-1), and widths positive, one per resolution, and squeeze; for example depth={2 ** max(0, self.exits - 1)}"
            )

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        factor = 2 ** (len(self.widths) - 1)
        if len(input_shape) != 3 or input_shape[1] % factor or input_shape[2] % factor:
            raise UsageError(
                f"{self.label} takes images whose sides are multiples of {factor}, the data set gives "
                f"{'x'.join(map(str, input_shape))}: choose another data set or model"
            )
        last = len(self.widths) - 1
        stages, heads = [], []
        takes: tuple[_Place, ...] = (IMAGE,)
        done: dict[int, list[_Place]] = {r: [] for r in range(len(self.widths))}  # layers that have run
        for s in range(self.exits):
            step = 2 ** (self.exits - 1 - s)
            n = self.depth // step
            stage = _Stage(takes)
            for r, width in enumerate(self.widths):
                start = _Place(r, -1)
                if r:
                    stage.add(start, _sources(r - 1, n, step), _transition(self.widths[r - 1], width))
                elif s == 0:
                    stage.add(start, (IMAGE,), nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False))
                for i in range(1 if s else 0, n, 2 if s else 1):
                    stage.add(_Place(r, i * step), _sources(r, i, step), _layer(width, max(1, width // self.squeeze)))
                    done[r].append(_Place(r, i * step))
            read = _sources(last, n, step)
            later = [_Place(0, -1), *(p for of_resolution in done.values() for p in sorted(of_resolution))]
            stage.gives = tuple(dict.fromkeys([*later, *read])) if s + 1 < self.exits else read
            stages.append(stage)
            heads.append(_Head([stage.gives.index(p) for p in read], self.widths[-1], n_classes))
            takes = stage.gives
        return AnytimeModel(stages, heads)


def _sources(resolution: int, i: int, step: int) -> tuple[_Place, ...]:
    """What the i-th layer of those that are ``step`` apart reads: i-1, i-2, i-4, ... down to -1."""
    offsets = (2**j for j in range((i + 1).bit_length()))
    return tuple(_Place(resolution, (i - o) * step if i >= o else -1) for o in offsets)


def _layer(width: int, inner: int) -> nn.Module:
    return nn.Sequential(
        *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, inner, 1, bias=False)),
        *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, inner, 3, padding=1, bias=False)),
        *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, width, 1, bias=False)),
    )


def _transition(width: int, wider: int) -> nn.Module:
    # A 1x1 convolution and an average commute, and behind the pooling it costs a quarter.
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(width, wider, 1, bias=False))


class _Stage(nn.Module):
    """Runs its new layers in the order in which they were added."""

    def __init__(self, takes: tuple[_Place, ...]) -> None:
        super().__init__()
        self.takes, self.gives = takes, takes
        self.reads: dict[_Place, tuple[_Place, ...]] = {}
        self.layers = nn.ModuleDict()

    def add(self, place: _Place, sources: tuple[_Place, ...], layer: nn.Module) -> None:
        self.reads[place] = sources
        self.layers[str(place)] = layer

    def forward(self, state: State) -> State:
        # By index, not by iteration: a tracer does not know how many tensors there are.
        held: dict[_Place, Tensor] = (
            {IMAGE: state} if self.takes == (IMAGE,) else {place: state[i] for i, place in enumerate(self.takes)}
        )
        for place, sources in self.reads.items():
            held[place] = self.layers[str(place)](reduce(add, [held[p] for p in sources]))
        return tuple(held[place] for place in self.gives)


class _Head(nn.Module):
    """Sums the parts of the state that it reads and classifies."""

    def __init__(self, reads: Sequence[int], width: int, n_classes: int) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.classify = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes)
        )

    def forward(self, state: State) -> Tensor:
        return self.classify(reduce(add, [state[i] for i in self.reads]))  # type: ignore[no-any-return]
