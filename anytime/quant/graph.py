"""Quantizers on every link of a chain: where they go, how they are calibrated, and that none is missing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from operator import add, getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anytime.errors import Unsupported
from anytime.layers import MixedPool2d, SlicedConv2d, ZeroPadShortcut
from anytime.model import AnytimeModel
from anytime.quant.bits import Bits, Target
from anytime.quant.fake import FakeQuant, QConv2d, QLinear
from anytime.quant.ranges import Observer, activation_grid, weight_scales

# Operations that only choose or move values: their output lies on the grid of their input.
PASS_MODULES = (nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity, ZeroPadShortcut)  # 0 is on every grid
PASS_CALLS = (torch.flatten, F.max_pool2d, F.dropout)
PASS_METHODS = ("flatten", "view", "reshape", "contiguous", "detach")
ADD_CALLS = (add, torch.add)
LEAVES = (nn.LocalResponseNorm, MixedPool2d, ZeroPadShortcut, FakeQuant, QConv2d, QLinear)
MULTIPLIERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
MULTIPLYING_CALLS = (
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.linear,
    F.bilinear,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.addmm,
    torch.einsum,
)


class LinkTracer(fx.Tracer):
    """Traces a stage or a head down to the modules that a quantizer or a writer knows."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return super().is_leaf_module(m, qualified_name) or isinstance(m, LEAVES)


def trace(link: nn.Module, path: str) -> fx.GraphModule:
    """Graph of one link; submodules keep their paths. Unsupported when its Python depends on values."""
    if isinstance(link, fx.GraphModule):
        return link
    try:
        return fx.GraphModule(link, LinkTracer().trace(link), type(link).__name__)
    except Exception as error:
        raise Unsupported(f"{path} cannot be traced ({str(error).splitlines()[0]}): a link must be a static graph") from error


def traced(model: AnytimeModel) -> AnytimeModel:
    """A copy in eval mode whose links are graphs, with BatchNorm folded into the convolution before it.

    No two links share weights in it: each is folded and rounded by itself.
    """
    model = copy.deepcopy(model).eval()
    for path, links in (("stages", model.stages), ("heads", model.heads)):
        for k in range(len(links)):
            links[k] = _fold_bn(trace(_unshared(links[k]), f"{path}.{k}"))
    return model


def _unshared(link: nn.Module) -> nn.Module:
    link = copy.deepcopy(link)
    for name, m in list(link.named_modules()):
        if isinstance(m, SlicedConv2d):
            link.set_submodule(name, m.plain())
    return link


def _fold_bn(g: fx.GraphModule) -> fx.GraphModule:
    modules = dict(g.named_modules())
    for node in list(g.graph.nodes):
        bn = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(bn, nn.BatchNorm2d):
            continue
        before = source = node.args[0]
        while source.op == "call_module" and isinstance(modules[source.target], nn.Dropout) and len(source.users) == 1:
            source = source.args[0]  # the identity, where BatchNorm is folded
        conv = modules.get(source.target) if source.op == "call_module" else None
        calls = [n for n in g.graph.nodes if n.op == "call_module" and n.target == source.target]
        if not isinstance(conv, nn.Conv2d) or len(source.users) != 1 or len(calls) != 1:
            continue  # a pre-activation BatchNorm stays, as an operation of its own
        fused = fuse_conv_bn_eval(conv, bn)
        g.set_submodule(source.target, fused)
        modules[source.target] = fused
        node.replace_all_uses_with(before)
        g.graph.erase_node(node)
    g.graph.eliminate_dead_code()
    g.delete_all_unused_submodules()
    g.recompile()
    return g


@dataclass(frozen=True)
class Widths:
    """Bits of weights and activations; ``edge`` those of the first layer and of each head's last one."""

    weight: int
    activation: int
    edge: int = 8

    def __post_init__(self) -> None:
        for name in ("weight", "activation", "edge"):
            bits = getattr(self, name)
            if not (2 <= bits <= 8 or bits == 16):
                raise Unsupported(f"{name} bits {bits}: this quantizer knows 2 to 8 and 16")


class Quantized:
    """A chain with quantizers in it, not yet calibrated.

    ``sources``: layer path -> the quantizer of the tensor that it reads. ``exclusions``: layers left in FP32 on purpose.
    """

    def __init__(self, model: AnytimeModel, sources: dict[str, FakeQuant], exclusions: tuple[str, ...]) -> None:
        self.model, self.sources, self.exclusions = model, sources, exclusions

    @property
    def bits(self) -> dict[str, Bits]:
        """Layer path -> what it multiplies."""
        return {path: Bits(layer.weight_bits, self.sources[path].bits) for path, layer in self.layers()}

    def layers(self) -> Iterator[tuple[str, QConv2d | QLinear]]:
        """Every quantized layer with its path, in the order of the chain."""
        for path, m in self.model.named_modules():
            if isinstance(m, QConv2d | QLinear):
                yield path, m

    def quantizers(self) -> list[FakeQuant]:
        """Every activation quantizer."""
        return [m for m in self.model.modules() if isinstance(m, FakeQuant)]

    def calibrate(self, x: Tensor, observer: Observer, weight_observer: Observer, batch: int = 256) -> None:
        """Choose every grid from x [N, C, H, W], float passes through all links: nothing can be left out by an early exit."""
        if len(x) == 0:
            raise Unsupported("calibration has no samples: give the data set a calib part")
        quantizers = self.quantizers()
        self.model.eval()
        for _, layer in self.layers():
            layer.on = False
        for mode in ("extremes", "values"):
            for q in quantizers:
                q.mode = mode
            with torch.inference_mode():
                for i in range(0, len(x), batch):
                    self.model(x[i : i + batch])
        with torch.no_grad():
            for q in quantizers:
                assert q.seen is not None
                q.set(activation_grid(q.seen, observer, q.bits, q.signed))
            for _, layer in self.layers():
                layer.on = True
                layer.weight_scale.copy_(weight_scales(layer.weight, layer.weight_bits, weight_observer))

    def check_coverage(self) -> None:
        """Unsupported unless every layer that multiplies is calibrated, weight and activation, or excluded by name."""
        missing = []
        for path, link in links(self.model):
            for name, why in _uncovered(link, path, self.sources):
                if name not in self.exclusions:
                    missing.append(f"{name} ({why})")
        if missing:
            raise Unsupported(
                f"these layers would stay in FP32 in silence: {', '.join(missing)}; exclude them by name or use a backend that knows them"
            )

    def freeze(self, round_bias: bool) -> AnytimeModel:
        """Put weights on their grids, and biases on the int32 grid of input scale x weight scale where an engine
        computes with such biases; return the chain in eval mode."""
        with torch.no_grad():
            for path, layer in self.layers():
                layer.weight.copy_(layer.rounded())
                if layer.bias is not None and round_bias:
                    step = self.sources[path].scale * layer.weight_scale
                    layer.bias.copy_((layer.bias / step).round().clamp(-(2.0**31), 2.0**31 - 1) * step)
        for p in self.model.parameters():
            p.requires_grad_(False)
        return self.model.eval()


def links(model: AnytimeModel) -> Iterator[tuple[str, fx.GraphModule]]:
    """("stages.0", graph), ("heads.0", graph), ..."""
    for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        yield f"stages.{k}", stage  # type: ignore[misc]
        yield f"heads.{k}", head  # type: ignore[misc]


def quantized(model: AnytimeModel, widths: Widths, target: Target, exclusions: tuple[str, ...] = ()) -> Quantized:
    """A copy of a float chain with a quantizer on every tensor that a layer reads.

    One quantizer per tensor, shared by all its readers: a tap that feeds the next stage and a head is rounded
    once. Every produced tensor has one, except what a ReLU is fused to, what only moves values, and logits.
    """
    model = traced(model)
    signed = target == "s8s8"
    sources: dict[str, FakeQuant] = {}
    state: Any = None  # quantizer of the state, or a tuple of them; None: the input, not yet rounded
    first = _first_layer(model, 0)
    for k in range(model.n_exits):
        if model.restarts:
            state, first = None, _first_layer(model, k)
        state = _insert(model.stages[k], f"stages.{k}", state, widths, signed, first, exclusions, sources, head=False)
        _insert(model.heads[k], f"heads.{k}", state, widths, signed, first, exclusions, sources, head=True)
    return Quantized(model, sources, exclusions)


def prepared(
    model: AnytimeModel, calib: Tensor, widths: Widths, target: Target, observer: Observer, weight_observer: Observer,
    exclusions: tuple[str, ...] = (),
) -> Quantized:  # fmt: skip
    """``quantized``, calibrated on calib [N, C, H, W], every layer covered; Unsupported names the layer that is not."""
    net = quantized(model, widths, target, exclusions)
    net.calibrate(calib, observer, weight_observer)
    net.check_coverage()
    return net


def _first_layer(model: AnytimeModel, k: int) -> str:
    stage = model.stages[k]
    for node in stage.graph.nodes:  # type: ignore[union-attr]
        if node.op == "call_module" and isinstance(stage.get_submodule(node.target), nn.Conv2d | nn.Linear):
            return f"stages.{k}.{node.target}"
    return ""


def _last_layer(g: fx.GraphModule, path: str) -> str:
    layers = [
        n.target for n in g.graph.nodes if n.op == "call_module" and isinstance(g.get_submodule(n.target), nn.Conv2d | nn.Linear)
    ]
    return f"{path}.{layers[-1]}" if layers else ""


def _insert(
    link: nn.Module, path: str, state: Any, widths: Widths, signed: bool, first: str,
    exclusions: tuple[str, ...], sources: dict[str, FakeQuant], head: bool,
) -> Any:  # fmt: skip
    """Put quantizers into one link; answer the quantizers of its output."""
    assert isinstance(link, fx.GraphModule)
    g, graph = link, link.graph
    edges = {first, _last_layer(g, path) if head else ""}
    by_node: dict[fx.Node, Any] = {}
    outputs = _output_nodes(graph)

    def put_after(node: fx.Node) -> None:
        bits = max([widths.activation, *(widths.edge for n in _readers(g, node) if f"{path}.{n.target}" in edges)])
        q = FakeQuant(bits, signed)
        name = f"quant_{node.name}"
        g.add_module(name, q)
        with graph.inserting_after(node):
            new = graph.call_module(name, (node,))
        node.replace_all_uses_with(new, lambda user: user is not new)
        by_node[node] = by_node[new] = q

    for node in list(graph.nodes):
        if node.op == "placeholder":
            by_node[node] = state
            if state is None:
                put_after(node)
        elif node.op == "get_attr":
            by_node[node] = None
        elif node.op == "output":
            continue
        elif node.op == "call_function" and node.target is getitem:
            held = by_node.get(node.args[0])
            by_node[node] = held[node.args[1]] if isinstance(held, tuple) else held
        elif _passes(g, node):
            by_node[node] = by_node.get(node.args[0])
        else:
            if node.op == "call_module":
                _swap(g, node, path, widths, edges, exclusions, by_node.get(node.args[0]), sources)
            fused = len(node.users) == 1 and _is_relu(g, next(iter(node.users))) and node not in outputs
            if not fused and not (head and node in outputs):
                put_after(node)
    g.recompile()
    result: Any = graph.output_node().args[0]
    if isinstance(result, tuple | list):
        return tuple(by_node.get(n) for n in result)
    return by_node.get(result)


def _swap(
    g: fx.GraphModule, node: fx.Node, path: str, widths: Widths, edges: set[str],
    exclusions: tuple[str, ...], source: FakeQuant | None, sources: dict[str, FakeQuant],
) -> None:  # fmt: skip
    """Replace a conv or linear by its quantized form."""
    full = f"{path}.{node.target}"
    layer = g.get_submodule(str(node.target))
    if full in exclusions or isinstance(layer, QConv2d | QLinear):
        return
    bits = max(widths.weight, widths.edge) if full in edges else widths.weight
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        g.set_submodule(str(node.target), QConv2d(layer, bits))
    elif type(layer) is nn.Linear:
        g.set_submodule(str(node.target), QLinear(layer, bits))
    else:
        return  # whatever else multiplies is found by check_coverage
    if isinstance(source, FakeQuant):
        sources[full] = source


def _passes(g: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(g.get_submodule(str(node.target)), PASS_MODULES)
    return (node.op == "call_function" and node.target in PASS_CALLS) or (
        node.op == "call_method" and node.target in PASS_METHODS
    )


def _is_relu(g: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(g.get_submodule(str(node.target)), nn.ReLU)
    return (node.op == "call_function" and node.target in (torch.relu, F.relu)) or (
        node.op == "call_method" and node.target == "relu"
    )


def _readers(g: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Who computes with this tensor within the link, through operations that only move it."""
    for user in node.users:
        if _passes(g, user):
            yield from _readers(g, user)
        else:
            yield user


def _output_nodes(graph: fx.Graph) -> set[fx.Node]:
    result = graph.output_node().args[0]
    return set(result) if isinstance(result, tuple | list) else {result}  # type: ignore[arg-type]


def _uncovered(g: fx.GraphModule, path: str, sources: dict[str, FakeQuant]) -> Iterator[tuple[str, str]]:
    for node in g.graph.nodes:
        name = f"{path}.{node.target if node.op == 'call_module' else node.name}"
        if node.op == "call_module":
            layer = g.get_submodule(node.target)
            if isinstance(layer, QConv2d | QLinear):
                if name not in sources or not sources[name].calibrated:
                    yield name, "its input has no calibrated quantizer"
                elif not bool(torch.isfinite(layer.weight_scale).all()):
                    yield name, "its weight is not calibrated"
            elif isinstance(layer, MULTIPLIERS):
                yield name, f"no quantizer for {type(layer).__name__}"
        elif node.op == "call_function" and node.target in MULTIPLYING_CALLS:
            yield name, f"no quantizer for the function {node.target.__name__}"
        elif node.op == "call_method" and node.target in ("matmul", "bmm", "mm", "addmm"):
            yield name, f"no quantizer for the method {node.target}"
