"""What a chain costs, counted operator by operator on the twin and priced at its bit widths."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from anytime.backend import FP32, Bits, Deployable
from anytime.errors import AnytimeError, Unsupported
from anytime.metrics import Floats
from anytime.quant.fake import FakeQuant, QuantizedLayer
from anytime.quant.place import SCALING


class LayerCost(NamedTuple):
    """One module that multiplies. Counts are per sample."""

    layer: str  # "stages.0.0"
    exit: int  # the link that it belongs to
    head: bool
    macs: int  # one multiply-add = one MAC
    bops: int  # macs x weight bits x activation bits
    params: int
    weight_bits: int
    activation_bits: int


class LinkCost(NamedTuple):
    """Stages or heads, each array [E]: per sample, and bytes."""

    macs: Floats
    bops: Floats
    params: Floats
    packed_bytes: Floats  # parameters at their true bit widths
    activation_bytes: Floats  # largest input + output of one layer, at the bits that each tensor is kept in


class Shared(NamedTuple):
    """A parameter that several links hold."""

    stages: tuple[int, ...]
    heads: tuple[int, ...]
    params: int
    packed_bytes: float


@dataclass(frozen=True)
class Cost:
    """Stage and head costs kept apart; any path is a sum, in which what several links share is held once.

    ``restarts``: no stage can reuse one before it.
    """

    stage: LinkCost
    head: LinkCost
    layers: tuple[LayerCost, ...]
    restarts: bool = False
    shared: tuple[Shared, ...] = ()

    def path(self, uses: tuple[int, ...], exit: int, what: str = "macs") -> float:
        """Cost of leaving at ``exit`` when the heads of ``uses`` up to it are run."""
        stage, head = getattr(self.stage, what), getattr(self.head, what)
        heads = [k for k in uses if k <= exit]
        stages = heads if self.restarts else list(range(exit + 1))
        again = 0.0
        for shared in self.shared if what in Shared._fields else ():
            held = len({*stages} & {*shared.stages}) + len({*heads} & {*shared.heads})
            again += max(0, held - 1) * getattr(shared, what)
        return float(stage[stages].sum() + head[heads].sum() - again)

    def every(self, what: str = "macs") -> Floats:
        """[E]: cost of leaving at each exit when every head on the way is run."""
        n = len(self.stage.macs)
        return np.array([self.path(tuple(range(n)), k, what) for k in range(n)])

    @property
    def macs(self) -> Floats:
        """[E], every earlier head run."""
        return self.every("macs")


@dataclass(frozen=True)
class In:
    """A cost in one currency, as a policy wants it."""

    cost: Cost
    currency: str  # "macs" or "bops"

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        """Cost of that path in this currency."""
        return self.cost.path(uses, exit, self.currency)


def account(net: Deployable, input_shape: tuple[int, ...]) -> Cost:
    """Count ``net`` for one sample of ``input_shape`` [C, H, W].

    MACs are those of convolutions and matrix products (torch's FlopCounterMode halved: it counts 2 a MAC);
    element-wise work, pooling and normalisation are not MACs. Each module's own share is inclusive minus its
    children's, and the shares must sum to the total. Raises AnytimeError when a network counts 0, Unsupported when a layer
    with a matrix for a weight does.
    Source: BOPs as in qonnx inference_cost (MACs x bits x bits); MAC convention as in fvcore.
    """
    twin = net.twin
    dtype = next(twin.parameters()).dtype
    x = torch.zeros(1, *input_shape, dtype=dtype)
    state: Any = x
    widths = _Widths()
    stages: list[_Link] = []
    heads: list[_Link] = []
    for k in range(twin.n_exits):
        state, found = _count(twin.stages[k], f"stages.{k}", x if twin.restarts else state, net, k, False, widths)
        stages.append(found)
        heads.append(_count(twin.heads[k], f"heads.{k}", state, net, k, True, widths)[1])
    layers = tuple(layer for pair in zip(stages, heads, strict=True) for found in pair for layer in found.layers)
    if not sum(layer.macs for layer in layers):
        raise AnytimeError("the network counts 0 MACs: its layers are hidden from the counter, so no cost of it can be trusted")
    return Cost(_together(stages), _together(heads), layers, twin.restarts, _shared(stages, heads))


@dataclass(frozen=True)
class _Link:
    """What one link counts. ``held``: parameter -> its bytes, packed."""

    layers: list[LayerCost]
    macs: int
    activation_bytes: float
    held: dict[nn.Parameter, float] = field(default_factory=dict)


def _together(links: list[_Link]) -> LinkCost:
    rows = [
        (link.macs, sum(layer.bops for layer in link.layers), sum(p.numel() for p in link.held), sum(link.held.values()),
         link.activation_bytes)
        for link in links
    ]  # fmt: skip
    return LinkCost(*np.array(rows, dtype=np.float64).T)


def _shared(stages: list[_Link], heads: list[_Link]) -> tuple[Shared, ...]:
    held = {p: size for link in (*stages, *heads) for p, size in link.held.items()}
    where = {p: [tuple(k for k, link in enumerate(links) if p in link.held) for links in (stages, heads)] for p in held}
    return tuple(Shared(s, h, p.numel(), held[p]) for p, (s, h) in where.items() if len(s) + len(h) > 1)


def _count(module: nn.Module, path: str, state: Any, net: Deployable, k: int, head: bool, widths: _Widths) -> tuple[Any, _Link]:
    seen: list[list[tuple[int, _Kept]]] = []  # of every layer without layers inside: values in and out, and what keeps them
    ran: dict[str, nn.Module] = {}

    def watch(m: nn.Module, name: str) -> Any:
        def hook(m: nn.Module, read: Any, made: Any) -> None:
            ran[name] = m
            if isinstance(m, FakeQuant):
                widths.quantize(read[0], made, m.bits)
            elif not list(m.children()):
                seen.append(widths.of_layer(read, made, net.bits.get(name), _multiplies(m)))

        return m.register_forward_hook(hook)

    hooks = [watch(m, name) for name, m in module.named_modules(prefix=path)]
    try:
        # FlopCounterMode names modules by the class of the root; a holder gives ours their own paths.
        holder = _Holder(module)
        with torch.no_grad(), _unfused(), widths, FlopCounterMode(display=False) as counter:
            after = holder(state)
    finally:
        for hook in hooks:
            hook.remove()
    inclusive = {
        name.removeprefix("_Holder.it").removeprefix("."): sum(ops.values()) // 2
        for name, ops in counter.get_flop_counts().items()
        if name.startswith("_Holder.it")
    }
    for name, m in ran.items():
        if _multiplies(m) and not inclusive.get(name.removeprefix(path).removeprefix(".")):
            raise Unsupported(
                f"{name} ({type(m).__name__}) multiplies and counts 0 MACs: no cost of it can be trusted; build it of "
                "convolutions, linear layers or matrix products"
            )
    own = dict(inclusive)
    for name, macs in inclusive.items():
        if name:
            parent = name.rpartition(".")[0]
            while parent and parent not in own:
                parent = parent.rpartition(".")[0]
            own[parent] -= macs
    total = counter.get_total_flops() // 2
    if sum(own.values()) != total:
        raise AnytimeError(f"{path}: {total} MACs were counted but {sum(own.values())} shared out over its layers")
    layers = []
    for name, macs in own.items():
        full = f"{path}.{name}" if name else path
        if macs:
            bits = net.bits.get(full, FP32)
            m = module.get_submodule(name)
            params = sum(p.numel() for p in m.parameters(recurse=False))
            layers.append(LayerCost(full, k, head, macs, macs * bits.weight * bits.activation, params, *bits))
    activation = max((sum(n * kept.bits for n, kept in tensors) / 8 for tensors in seen), default=0.0)
    return after, _Link(layers, total, activation, _held(module, path, net))


def _held(module: nn.Module, path: str, net: Deployable) -> dict[nn.Parameter, float]:
    """Parameter -> its bytes at its true width; one that several layers hold is there once, at the widest."""
    held: dict[nn.Parameter, float] = {}
    for name, m in module.named_modules(prefix=path):
        bits = net.bits.get(name)
        for which, p in m.named_parameters(recurse=False):
            # Integers take biases of 32 bits, 16-bit floats biases of their own. What is of no such layer keeps its dtype.
            narrow = bits is not None and (which == "weight" or (bits.weight == 16 and not isinstance(m, QuantizedLayer)))
            width = bits.weight if bits is not None and narrow else p.element_size() * 8
            held[p] = max(held.get(p, 0.0), p.numel() * width / 8)
    return held


def _multiplies(m: nn.Module) -> bool:
    """Whether a module has a matrix for a weight, and not to look rows up in it or to scale values by it."""
    weights = (p for name, p in m.named_parameters(recurse=False) if "weight" in name)
    return any(p.squeeze().ndim > 1 for p in weights) and not isinstance(m, (*SCALING, nn.Embedding, nn.EmbeddingBag))


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention as the matrix products that it is: the counter does not know its fused forms."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class _Kept:
    """In how many bits each value of a tensor is kept; ``settled`` when a quantizer has said so."""

    bits: int
    settled: bool = False


class _Widths(TorchFunctionMode):
    """Follows in how many bits every tensor of a run is kept.

    What a layer that multiplies makes has the layer's activation bits (those of its dtype, if it is in float), until a quantizer
    takes it: that stands behind the BatchNorm and ReLU that are fused to the layer, and none of them is kept wider. Whatever
    else computes hands on the bits of the widest that it reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()

    def of(self, t: Tensor) -> _Kept:
        """What keeps a tensor: by default its dtype."""
        return self.kept.get(t) or _Kept(8 * t.element_size(), settled=True)

    def quantize(self, read: Tensor, made: Tensor, bits: int) -> None:
        """A quantizer rounds a tensor."""
        if not (source := self.of(read)).settled:
            source.bits, source.settled = bits, True
        self.kept[made] = _Kept(bits, settled=True)

    def of_layer(self, read: Any, made: Any, bits: Bits | None, multiplies: bool) -> list[tuple[int, _Kept]]:
        """Values that a layer reads and makes, and what keeps them."""
        for t in _tensors(made) if bits or multiplies else ():
            self.kept[t] = _Kept(bits.activation if bits else 8 * t.element_size())
        reads = [(t.numel(), _Kept(bits.activation) if bits else self.of(t)) for t in _tensors(read)]
        return reads + [(t.numel(), self.of(t)) for t in _tensors(made)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {id(kept): kept for t in _tensors((*args, *(kwargs or {}).values())) if (kept := self.kept.get(t))}
        for t in _tensors(out) if read else ():
            if t not in self.kept:
                first = next(iter(read.values()))
                alone = len(read) == 1 and not first.settled
                self.kept[t] = first if alone else _Kept(max(kept.bits for kept in read.values()))
        return out


class _Holder(nn.Module):
    def __init__(self, it: nn.Module) -> None:
        super().__init__()
        self.it = it

    def forward(self, state: Any) -> Any:
        return self.it(state)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for v in values:
            yield from _tensors(v)
