"""Cross-layer equalization that counts every reader of a tensor, exit heads among them."""

from __future__ import annotations

from operator import getitem
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from anytime.errors import Unsupported
from anytime.layers import MixedPool2d, ZeroPadShortcut
from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant
from anytime.quant.nodes import is_add, is_relu, module_of
from anytime.quant.place import asks_shape
from anytime.quant.trace import links

# f(s x) = s f(x) for s > 0, value by value, or each channel of a map by itself (MixedPool2d: a sum of two such).
POINTWISE = (nn.Dropout, nn.Identity, F.dropout, "contiguous", "detach")  # and ReLU
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, MixedPool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
SWEEPS, TOLERANCE = 200, 1e-2  # over all layers, until no factor moves by more than 1 %
DEAD = 1e-5  # share of its layer's largest range under which a channel is off


class Equalized(NamedTuple):
    """What became of every layer's output.

    ``pairs``: (layer that writes, layer that reads), by path. ``refused``: writing layer -> why it was left as it is.
    """

    pairs: tuple[tuple[str, str], ...]
    refused: dict[str, str]
    sweeps: int


def equalize(model: AnytimeModel) -> Equalized:
    """Give each channel equal weight ranges where it is written and where it is read; what the chain computes stays.

    In place, on what ``traced`` made; Unsupported on anything else. r1 is a channel's largest |weight| in the layer that
    writes it, r2 the largest in all that read it: in the next layers, in the head of an exit, in a later link. The writer
    is divided by s = sqrt(r1 r2) / r2, its bias too, the readers are multiplied; over all layers until nothing moves. A
    tensor is left alone, with the reason, unless everything on the way to all its readers lets a positive factor per
    channel through and they are convolutions or linear layers.
    Source: Nagel, van Baalen, Blankevoort, Welling, ICCV 2019, arXiv:1906.04721, section 4.1. Deviations: several readers
    count by the largest of them, where the paper has one; a channel whose range is under 1e-5 of its layer's largest, on
    either side, keeps its scale (training has switched it off, its bias would be blown up); high biases are not absorbed
    (the paper's last step: it needs BatchNorm's statistics, and the ranges are calibrated afterwards here).
    """
    flow = _Flow(model)
    taken = {path: flow.reads[path] for path in flow.writers if path not in flow.refused}
    with torch.no_grad():
        weights = {path: _by_group(layer) for path, layer in flow.writers.items()}
        factors, sweeps = _factors({path: w.abs().amax(-1, keepdim=True) for path, w in weights.items()}, taken)
        for path, s in factors.items():
            _rescale(weights, path, s, taken[path])
        for path, layer in flow.writers.items():
            layer.weight.copy_(weights[path].reshape(layer.weight.shape))
            if layer.bias is not None and path in factors:
                layer.bias.div_(factors[path])
    pairs = dict.fromkeys((path, read.path) for path, reads in taken.items() for read in reads)
    return Equalized(tuple(pairs), {p: flow.refused[p] for p in flow.writers if p in flow.refused}, sweeps)


class _Read(NamedTuple):
    """A layer that has ``channels`` [n] of another one's output at its own inputs ``columns`` [n]."""

    path: str
    columns: Tensor
    channels: Tensor


class _Value(NamedTuple):
    """Who wrote each channel of a tensor.

    ``writers``: path of a layer -> (positions [n], the layer's channels that lie there [n]). ``width``: how many channels
    there are. ``form``: a map [B, width, H, W], one flattened to [B, width H W], or features [..., width].
    """

    writers: dict[str, tuple[Tensor, Tensor]]
    width: int
    form: Literal["map", "flat", "features"]


class _Flow:
    """Follows every layer's output through the whole chain, once.

    A tensor whose way is not known is None; what is not known to let a factor through refuses all that it reads.
    """

    def __init__(self, model: AnytimeModel) -> None:
        for _, link in links(model):
            if not isinstance(link, fx.GraphModule) or any(isinstance(m, FakeQuant) for m in link.modules()):
                raise Unsupported(
                    "equalization wants the float chain: call it on what traced() made, before quantizers are placed"
                )
        self.writers: dict[str, nn.Conv2d | nn.Linear] = {}
        self.reads: dict[str, list[_Read]] = {}
        self.refused: dict[str, str] = {}
        state: Any = None
        for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            state = self._link(stage, f"stages.{k}", None if model.restarts else state)  # type: ignore[arg-type]
            self._refuse(self._link(head, f"heads.{k}", state), f"is the logits of exit {k + 1}")  # type: ignore[arg-type]
        for path in self.writers:
            if not self.reads[path]:
                self.refused.setdefault(path, "no layer reads it")

    def _link(self, g: fx.GraphModule, path: str, state: Any) -> Any:
        """Follow one link; answer what it returns."""
        held: dict[fx.Node, Any] = {}
        for node in g.graph.nodes:
            if node.op == "placeholder":
                held[node] = state
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], held.__getitem__)
            else:
                held[node] = self._node(g, path, node, held)
        raise AssertionError(f"{path} returns nothing")

    def _node(self, g: fx.GraphModule, path: str, node: fx.Node, held: dict[fx.Node, Any]) -> Any:
        """What one node leaves of what it reads."""
        values = [held[n] for n in node.all_input_nodes]
        value, layer, module = values[0] if values else None, _layer_of(g, node), module_of(g, node)
        where = f"{path}.{node.target if node.op == 'call_module' else node.name}"
        if layer is not None:
            return self._layer(layer, where, value)
        if asks_shape(node):
            return None
        if node.target is getitem and isinstance(value, tuple | list) and isinstance(node.args[1], int):
            return value[node.args[1]]
        if _concatenates(node) and all(isinstance(v, _Value) and v.form != "flat" for v in values):
            return _joined([held[n] for n in node.args[0]])  # type: ignore[union-attr, index]
        if isinstance(value, _Value) and len(values) == 1:
            is_map = value.form == "map"
            if is_relu(g, node) or _among(POINTWISE, node, module) or (is_map and _among(POOLS, node, module)):
                return value
            if _flattens(node, module):
                return value._replace(form="flat") if is_map else value
            if isinstance(module, ZeroPadShortcut) and is_map:
                return _joined([module.front, value, module.back])
        kind = "an addition" if is_add(node) else type(module).__name__ if module is not None else _name(node)
        for v in values:
            self._refuse(v, f"is read by {kind} ({where})")
        return None

    def _layer(self, layer: nn.Conv2d | nn.Linear, where: str, value: Any) -> _Value | None:
        """Note that a layer reads a tensor; answer what it writes."""
        linear = isinstance(layer, nn.Linear)
        size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        if isinstance(value, _Value) and _fits(value, size, linear):
            block = torch.arange(size // value.width)  # the features of one channel of a flattened map
            for path, (positions, channels) in value.writers.items():
                columns = (positions[:, None] * len(block) + block).flatten()
                self.reads[path].append(_Read(where, columns, channels.repeat_interleave(len(block))))
        else:
            self._refuse(value, f"is read along another axis ({where})")
        self.writers[where], self.reads[where] = layer, []
        every = torch.arange(len(layer.weight))
        return _Value({where: (every, every)}, len(every), "features" if linear else "map")

    def _refuse(self, value: Any, why: str) -> None:
        if isinstance(value, _Value):
            for path in value.writers:
                self.refused.setdefault(path, why)
        elif isinstance(value, tuple | list):
            for v in value:
                self._refuse(v, why)


def _layer_of(g: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    module = module_of(g, node)
    return module if type(module) in (nn.Conv2d, nn.Linear) else None  # type: ignore[return-value]


def _fits(value: _Value, size: int, linear: bool) -> bool:
    """Whether a layer of ``size`` inputs reads this tensor along its channels."""
    if value.form == "flat":
        return linear and size % value.width == 0
    return linear == (value.form == "features") and size == value.width


def _among(known: tuple[Any, ...], node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node calls one of ``known``: classes of modules, functions, names of methods."""
    return bool((type(module) if module is not None else node.target) in known)


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node makes [B, features] of a map."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        dims = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return (dims.get("start_dim", 0), dims.get("end_dim", -1)) == (1, -1)
    return False


def _concatenates(node: fx.Node) -> bool:
    """Whether a node joins tensors channel by channel."""
    if node.target is not torch.cat or not isinstance(node.args[0], tuple | list):
        return False
    return bool((node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) == 1)


def _joined(parts: list[Any]) -> _Value:
    """Tensors side by side; a number stands for that many channels of zeros."""
    values = [p for p in parts if isinstance(p, _Value)]
    writers: dict[str, tuple[Tensor, Tensor]] = {}
    width = 0
    for part in parts:
        for path, (positions, channels) in part.writers.items() if isinstance(part, _Value) else ():
            before = writers.get(path, (positions[:0], channels[:0]))
            writers[path] = torch.cat([before[0], positions + width]), torch.cat([before[1], channels])
        width += part.width if isinstance(part, _Value) else part
    return _Value(writers, width, values[0].form)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _by_group(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight in float64 as [groups, outputs of one, inputs of one, kernel]."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return layer.weight.double().reshape(groups, len(layer.weight) // groups, layer.weight.shape[1], -1)


def _factors(magnitudes: dict[str, Tensor], taken: dict[str, list[_Read]]) -> tuple[dict[str, Tensor], int]:
    """s [O] of every layer in ``taken``, and after how many sweeps; |weights| as ``_by_group`` has them are scaled on the way."""
    live = {path: _live(_written(magnitudes, path)) & _live(_read(magnitudes, path, reads)) for path, reads in taken.items()}
    factors = {path: torch.ones(len(on), dtype=torch.float64) for path, on in live.items()}
    sweeps, farthest = 0, torch.inf
    while farthest > TOLERANCE and sweeps < SWEEPS:
        sweeps, farthest = sweeps + 1, 0.0
        for path, reads in taken.items():
            s = (_written(magnitudes, path) / _read(magnitudes, path, reads)).sqrt().where(live[path], 1.0)
            _rescale(magnitudes, path, s, reads)
            factors[path] *= s
            farthest = max(farthest, float(s.log().abs().max()))
    return factors, sweeps


def _written(weights: dict[str, Tensor], path: str) -> Tensor:
    """r1 [O]."""
    return weights[path].abs().amax((2, 3)).flatten()


def _read(weights: dict[str, Tensor], path: str, reads: list[_Read]) -> Tensor:
    """r2 [O]: the largest over everyone who reads the layer's channels."""
    r2 = torch.zeros_like(_written(weights, path))
    for reader, columns, channels in reads:
        r2.scatter_reduce_(0, channels, weights[reader].abs().amax((1, 3)).flatten()[columns], "amax")
    return r2


def _live(ranges: Tensor) -> Tensor:
    return ranges > DEAD * ranges.max()


def _rescale(weights: dict[str, Tensor], path: str, s: Tensor, reads: list[_Read]) -> None:
    """Divide what a layer writes by s [O], and multiply by it where that is read."""
    weights[path] /= s.view(*weights[path].shape[:2], 1, 1)
    for reader, columns, channels in reads:
        groups, _, inputs, _ = weights[reader].shape
        factor = s.new_ones(groups * inputs)
        factor[columns] = s[channels]
        weights[reader] *= factor.view(groups, 1, inputs, 1)
