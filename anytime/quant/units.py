"""A quantized chain cut into the units that are reconstructed one by one: layers or blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from operator import attrgetter, getitem
from typing import Any, Literal, NamedTuple

from torch import Tensor, fx, nn

from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant, QuantizedLayer
from anytime.quant.graph import Quantized
from anytime.quant.nodes import is_relu, module_of
from anytime.quant.place import asks_shape
from anytime.quant.trace import links

MOST_LAYERS = 6  # of one unit; a longer piece that no single tensor cuts is learned layer by layer
Granularity = Literal["layer", "block"]


class Op(NamedTuple):
    """A node of a quantized link as both chains call it; where ``args`` names nodes, their values are meant."""

    node: fx.Node
    rounded: Callable[..., Any]
    plain: Callable[..., Any]
    args: Any
    kwargs: Any
    reads: tuple[fx.Node, ...]
    layer: str  # path of the quantized layer that this is, or ""


class Unit(NamedTuple):
    """Ops that follow one another; without ``layers`` there is nothing to learn in them.

    ``gives``: those of its values that are read later, by the next stage too. ``head``: the ops of the head that reads what
    it gives, and ``logits`` theirs: they count in its loss, in float.
    """

    ops: tuple[Op, ...]
    layers: tuple[str, ...]
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    head: tuple[Op, ...] = ()
    logits: fx.Node | None = None

    @property
    def name(self) -> str:
        """stages.0.layer3.2: what the names of its layers have in common."""
        return ".".join(p[0] for p in zip(*(layer.split(".") for layer in self.layers), strict=False) if len(set(p)) == 1)


class Stage(NamedTuple):
    """The units of a stage and its head, in order, and what the stage hands on."""

    units: tuple[Unit, ...]
    state: frozenset[fx.Node]


def partition(net: Quantized, model: AnytimeModel, unit: Granularity, with_exits: bool) -> tuple[fx.Node, list[Stage]]:
    """The name of the chain's input, and every stage's units; ``model`` is the traced float chain that ``net`` was made of.

    "layer": each layer by itself, with its BatchNorm, its ReLU (or ReLU6) and the quantizer behind them. "block": a link is cut
    wherever everything goes through one tensor, and what has no layer belongs to the layer before it: a residual block is one unit. A
    piece of more than six layers between two cuts (dense connections, states of several tensors) is learned layer by layer,
    each with what leads to it. A head's units follow those of its stage; ``with_exits``: the last of these that it reads knows
    the head.
    """
    plain = dict(links(model))
    alias: dict[fx.Node, Any] = {}
    entry: Any = None
    state: Any = None
    found: list[Stage] = []
    sizes: dict[fx.Node, Op] = {}
    for path, link in links(net.model):
        if entry is None:
            entry = state = next(n for n in link.graph.nodes if n.op == "placeholder")
        is_head = path.startswith("heads")
        begin = entry if net.model.restarts and not is_head else state
        ops, result = _ops(link, plain.get(path), path, begin, alias, sizes)
        if not is_head:
            body, state = ops, result
            continue
        leaves = frozenset(_nodes(state))
        if unit == "layer":
            units = _units(_layerwise([*body, *ops], leaves, alone=True), {*leaves, result}, sizes)
        else:
            units = _units([*_blocks(body, leaves), *_blocks(ops, {result})], {*leaves, result}, sizes)
            read = {n for op in ops for n in op.reads} - {op.node for op in ops}
            feeds = [i for i, u in enumerate(units) if u.layers and not read.isdisjoint(u.gives)]
            if feeds and with_exits:
                units[feeds[-1]] = _with_exit(units[feeds[-1]], _with_sizes(ops, sizes), result)
        found.append(Stage(tuple(units), leaves))
    return entry, found


def _ops(
    link: fx.GraphModule, plain: Any, path: str, begin: Any, alias: dict[fx.Node, Any], sizes: dict[fx.Node, Op]
) -> tuple[list[Op], Any]:
    """What a link computes from ``begin``, a node or a tuple of them, and what it returns.

    What only asks for shapes goes to ``sizes``: no tensor, so no unit hands it on; whoever reads it asks the tensor anew.
    """
    same = [n.name for n in link.graph.nodes if not isinstance(module_of(link, n), FakeQuant)]
    if not isinstance(plain, fx.GraphModule) or same != [n.name for n in plain.graph.nodes]:
        raise Unsupported(f"{path} of the float chain is not what was quantized: give the traced chain that the net was made of")
    ops: list[Op] = []

    def meant(value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: alias.get(n, n))

    for node in link.graph.nodes:
        module = module_of(link, node)
        if node.op == "placeholder":
            alias[node] = begin
        elif node.op == "get_attr":
            alias[node] = attrgetter(str(node.target))(link)
        elif node.target is getitem and not isinstance(meant(node.args[0]), fx.Node):
            alias[node] = meant(node.args[0])[node.args[1]]  # of a state of several tensors
        elif node.op != "output":
            rounded: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            twin: Any = rounded
            if module is not None:
                rounded, twin = module, _same if isinstance(module, FakeQuant) else module_of(plain, node)
            args, kwargs = meant(node.args), meant(node.kwargs)
            layer = f"{path}.{node.target}" if isinstance(module, QuantizedLayer) else ""
            direct = _nodes((args, kwargs))
            reads = tuple(dict.fromkeys(t for n in direct for t in (sizes[n].reads if n in sizes else (n,))))
            op = Op(node, rounded, twin, args, kwargs, reads, layer)
            if asks_shape(node) or (direct and sizes.keys() >= set(direct)):
                sizes[node] = op
            else:
                ops.append(op)
    return ops, meant(link.graph.output_node().args[0])


def _same(x: Tensor) -> Tensor:
    return x


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    """The nodes in a tree of arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return tuple(dict.fromkeys(found))


def _blocks(ops: list[Op], state: Set[fx.Node]) -> list[list[Op]]:
    """Ops cut where one tensor is all that is read later, every run with a layer or more."""
    last = {n: i for i, op in enumerate(ops) for n in op.reads} | dict.fromkeys(state, len(ops))
    unpacked = {n for op in ops if op.node.target is getitem for n in op.reads}  # a tuple, perhaps
    live = set(last) - {op.node for op in ops}
    runs: list[list[Op]] = [[]]
    piece: list[Op] = []
    for i, op in enumerate(ops):
        piece.append(op)
        live = {n for n in {*live, op.node} if last.get(n, -1) > i}
        if i + 1 == len(ops) or (len(live) == 1 and not live & unpacked):
            if _n_layers(piece) and _n_layers(runs[-1]):
                runs.append([])
            runs[-1] += piece
            piece = []
    return [r for run in runs for r in ([run] if _n_layers(run) <= MOST_LAYERS else _layerwise(run, state, alone=False))]


def _layerwise(ops: list[Op], state: Set[fx.Node], alone: bool) -> list[list[Op]]:
    """Ops cut behind each layer, its BatchNorm, its ReLU and their quantizer; ``alone``: before it too."""
    readers: dict[fx.Node, list[Op]] = {}
    for op in ops:
        for n in op.reads:
            readers.setdefault(n, []).append(op)
    runs: list[list[Op]] = []
    run: list[Op] = []
    taken: set[fx.Node] = set()
    for op in ops:
        if op.node in taken:
            continue
        if not op.layer:
            run.append(op)
            continue
        fused = [op]
        while len(after := readers.get(fused[-1].node, [])) == 1 and fused[-1].node not in state and _fuses(after[0]):
            fused += after
        taken |= {o.node for o in fused}
        runs += [r for r in (run, fused) if r] if alone else [run + fused]
        run = []
    if run and (alone or not runs):
        runs.append(run)
    else:
        runs[-1] += run
    return runs


def _fuses(op: Op) -> bool:
    return isinstance(op.rounded, FakeQuant | nn.BatchNorm2d | nn.Hardtanh) or is_relu(op.node.graph.owning_module, op.node)  # type: ignore[arg-type]


def _n_layers(ops: Iterable[Op]) -> int:
    return sum(bool(op.layer) for op in ops)


def _with_sizes(run: list[Op], sizes: dict[fx.Node, Op]) -> list[Op]:
    """A run with what it asks about shapes, each question before its first reader."""
    found: dict[fx.Node, Op] = {}

    def put(op: Op) -> None:
        for n in _nodes((op.args, op.kwargs)):
            if n in sizes and n not in found:
                put(sizes[n])
        found[op.node] = op

    for op in run:
        put(op)
    return list(found.values())


def _units(runs: list[list[Op]], later: Set[fx.Node], sizes: dict[fx.Node, Op]) -> list[Unit]:
    units: list[Unit] = []
    for run in reversed([_with_sizes(r, sizes) for r in runs if r]):
        own = [op.node for op in run]
        reads = dict.fromkeys(n for op in run for n in op.reads if n not in own)
        layers = tuple(op.layer for op in run if op.layer)
        units.append(Unit(tuple(run), layers, tuple(reads), tuple(n for n in own if n in later)))
        later = later | reads.keys()
    return units[::-1]


def _with_exit(unit: Unit, head: list[Op], logits: fx.Node) -> Unit:
    own = {op.node for op in (*unit.ops, *head)}
    reads = dict.fromkeys((*unit.reads, *(n for op in head for n in op.reads if n not in own)))
    return unit._replace(reads=tuple(reads), head=tuple(head), logits=logits)
