"""What a chain costs, counted operator by operator on the twin and priced at its bit widths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anytime.backend import FP32, Deployable
from anytime.errors import AnytimeError
from anytime.metrics import Floats


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
    activation_bytes: Floats  # largest input + output of one layer, at the layer's activation bits


@dataclass(frozen=True)
class Cost:
    """Stage and head costs kept apart; any path is a sum. ``restarts``: no stage can reuse one before it."""

    stage: LinkCost
    head: LinkCost
    layers: tuple[LayerCost, ...]
    restarts: bool = False

    def path(self, uses: tuple[int, ...], exit: int, what: str = "macs") -> float:
        """Cost of leaving at ``exit`` when the heads of ``uses`` up to it are run."""
        stage, head = getattr(self.stage, what), getattr(self.head, what)
        heads = [k for k in uses if k <= exit]
        stages = heads if self.restarts else list(range(exit + 1))
        return float(stage[stages].sum() + head[heads].sum())

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
    children's, and the shares must sum to the total. Raises AnytimeError when a network counts 0.
    Source: BOPs as in qonnx inference_cost (MACs x bits x bits); MAC convention as in fvcore.
    """
    twin = net.twin
    dtype = next(twin.parameters()).dtype
    x = torch.zeros(1, *input_shape, dtype=dtype)
    state: Any = x
    layers: list[LayerCost] = []
    stages: list[dict[str, float]] = []
    heads: list[dict[str, float]] = []
    for k in range(twin.n_exits):
        after, found, priced = _count(twin.stages[k], f"stages.{k}", x if twin.restarts else state, net, k, head=False)
        layers += found
        stages.append(priced)
        state = after
        _, found, priced = _count(twin.heads[k], f"heads.{k}", state, net, k, head=True)
        layers += found
        heads.append(priced)
    if not sum(layer.macs for layer in layers):
        raise AnytimeError("the network counts 0 MACs: its layers are hidden from the counter, so no cost of it can be trusted")

    def link(rows: list[dict[str, float]]) -> LinkCost:
        return LinkCost(*(np.array([r[f] for r in rows], dtype=np.float64) for f in LinkCost._fields))

    return Cost(link(stages), link(heads), tuple(layers), twin.restarts)


def _count(
    module: nn.Module, path: str, state: Any, net: Deployable, k: int, head: bool
) -> tuple[Any, list[LayerCost], dict[str, float]]:
    sizes: dict[str, int] = {}  # elements in and out of every leaf module
    hooks = [
        m.register_forward_hook(lambda _m, i, o, name=name: sizes.__setitem__(name, _elements(i) + _elements(o)))
        for name, m in module.named_modules(prefix=path)
        if not list(m.children())
    ]
    try:
        # FlopCounterMode names modules by the class of the root; a holder gives ours their own paths.
        holder = _Holder(module)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            after = holder(state)
    finally:
        for hook in hooks:
            hook.remove()
    inclusive = {
        name.removeprefix("_Holder.it").removeprefix("."): sum(ops.values()) // 2
        for name, ops in counter.get_flop_counts().items()
        if name.startswith("_Holder.it")
    }
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
    packed = 0.0
    for name, m in module.named_modules(prefix=path):
        bits = net.bits.get(name, FP32)
        for which, p in m.named_parameters(recurse=False):
            # Biases and what belongs to no quantized layer stay at 32 bits, or at the dtype that they have.
            width = bits.weight if which == "weight" and name in net.bits else p.element_size() * 8
            packed += p.numel() * width / 8
    activation = max((n * net.bits.get(name, FP32).activation / 8 for name, n in sizes.items()), default=0.0)
    return (
        after,
        layers,
        {
            "macs": float(total),
            "bops": float(sum(layer.bops for layer in layers)),
            "params": float(sum(p.numel() for p in _unique(module.parameters()))),
            "packed_bytes": packed,
            "activation_bytes": activation,
        },
    )


class _Holder(nn.Module):
    def __init__(self, it: nn.Module) -> None:
        super().__init__()
        self.it = it

    def forward(self, state: Any) -> Any:
        return self.it(state)


def _elements(values: Any) -> int:
    if isinstance(values, Tensor):
        return values.numel()
    return sum(_elements(v) for v in values) if isinstance(values, tuple | list) else 0


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())
