"""Where quantizers go in a chain, by the rules of each target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from anytime.errors import Unsupported, UsageError, near
from anytime.model import AnytimeModel
from anytime.quant.bits import Bits, Target
from anytime.quant.fake import FakeQuant, QConv2d, QLinear, QuantizedLayer
from anytime.quant.nodes import TENSORS, conv_before, is_add, is_relu, is_view, module_of, name_of, output_nodes, passes
from anytime.quant.trace import insert_after, links

# Functions and methods that multiply as a layer does, by name, as torch's autocast and its FLOP counter know them. Modules
# need no list: they multiply where they have a parameter of two dimensions or more, but for those that scale each value.
MULTIPLYING = (
    *("matmul", "mm", "bmm", "mv", "dot", "vdot", "vecdot", "inner", "addmm", "addmv", "addbmm", "baddbmm", "chain_matmul"),
    *("multi_dot", "matrix_power", "einsum", "tensordot", "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_tbc"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "scaled_dot_product_attention"),
    *("multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell"),
    *("rnn_relu_cell", "deform_conv2d"),
)
SCALING = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Widths:
    """Bits of weights and activations.

    ``edge``: those of the layers that read the image, pooled or normalised perhaps, and of each head's last one. ``add``: those
    of a tensor that something other than a layer reads too (an addition, a pooling); layers that want fewer bits of it read it
    rounded once more. 0: as ``activation``, and every reader shares one quantizer. ``layers``: path -> bits of single layers.
    """

    weight: int
    activation: int
    edge: int = 8
    add: int = 0
    layers: Mapping[str, Bits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        asked = {"weight": self.weight, "activation": self.activation, "edge": self.edge, "add": self.add or 8}
        for path, bits in self.layers.items():
            asked |= {f"{path} weight": bits.weight, f"{path} activation": bits.activation}
        for name, bits_asked in asked.items():
            if not (2 <= bits_asked <= 8 or bits_asked == 16):
                raise Unsupported(f"{name} bits {bits_asked}: this quantizer knows 2 to 8 and 16")

    def of(self, layer: str, edge: bool) -> Bits:
        """What a layer multiplies."""
        if layer in self.layers:
            return self.layers[layer]
        return Bits(max(self.weight, self.edge), max(self.activation, self.edge)) if edge else Bits(self.weight, self.activation)


class Placement:
    """Puts quantizers into every link of a traced chain, in its order.

    One per tensor, on what is produced, shared by all its readers: a tap that feeds the next stage and a head is rounded
    once. None between a layer and the BatchNorm and ReLU fused to it, on what only moves values, on logits.
    For "s8s8" and "u8s8-fused" what TensorRT and OpenVINO fuse too: of an addition only the skip side is rounded, so that the
    other convolution takes the addition in; sums of sums and what a ReLU6 reads stay in float. (With a quantizer there
    OpenVINO 2026.4.1 clips and does not round, and runs a ReLU6 apart from its convolution.) For "s8s8" what is
    concatenated shares one grid.
    ``sources``: layer path -> the quantizer of the tensor that it multiplies. UsageError for widths or exclusions of a
    layer that is not there.
    Source: ``reference/quantization.md`` section c; NVIDIA TensorRT documentation, "Explicit quantization", "Q/DQ placement".
    """

    def __init__(self, model: AnytimeModel, widths: Widths, target: Target, exclusions: tuple[str, ...]) -> None:
        names = [f"{path}.{n.target if n.op == 'call_module' else n.name}" for path, g in links(model) for n in g.graph.nodes]
        for name in (*widths.layers, *exclusions):
            if name not in names:
                raise UsageError(f"this network has no layer {name!r}; {near(name, names)}")
        self.widths, self.target, self.exclusions = widths, target, exclusions
        self.sources: dict[str, FakeQuant] = {}
        self._wishes: dict[FakeQuant, list[int]] = {}  # bits that the readers of a tensor want
        self._images: set[FakeQuant] = set()
        self._tied: list[list[FakeQuant]] = []
        self._reads: list[tuple[fx.GraphModule, fx.Node, str, int]] = []  # every layer: its link, node, path, wanted bits
        state: Any = None  # quantizer of the state, or a tuple of them; None: the input, not yet rounded
        self._edges = _first_layers(model)
        for k in range(model.n_exits):
            state = self._link(model.stages[k], f"stages.{k}", None if model.restarts else state, head=False)
            self._link(model.heads[k], f"heads.{k}", state, head=True)
        self._tie(model)
        self._size()
        for _, link in links(model):
            link.recompile()

    def _link(self, g: nn.Module, path: str, state: Any, head: bool) -> Any:
        """Put quantizers into one link; answer the quantizers of its output."""
        assert isinstance(g, fx.GraphModule)
        edges = self._edges | {_last_layer(g, path) if head else ""}
        held: dict[fx.Node, Any] = {}
        numbers: set[fx.Node] = set()
        outputs = output_nodes(g.graph)
        if head:  # the logits, whatever moves them on their way out
            for node in reversed(list(g.graph.nodes)):
                if node in outputs and passes(g, node) and len(node.all_input_nodes[0].users) == 1:
                    outputs.add(node.all_input_nodes[0])

        def put_after(node: fx.Node) -> None:
            q = FakeQuant(8, self.target == "s8s8", f"{path}:{node.name}")
            held[node] = held[insert_after(g, node, f"quant_{node.name}", q)] = q
            self._wishes[q] = []

        for node in list(g.graph.nodes):
            if node.op == "placeholder":
                held[node] = state
                if state is None:
                    put_after(node)
                    self._images.add(held[node])
            elif node.op == "get_attr" or asks_shape(node) or (node.all_input_nodes and numbers.issuperset(node.all_input_nodes)):
                held[node] = None
                if node.op != "get_attr":
                    numbers.add(node)  # of a shape, and what is made of such
            elif node.op == "output":
                continue
            elif node.op == "call_function" and node.target is getitem:
                of = held.get(node.args[0])
                held[node] = of[node.args[1]] if isinstance(of, tuple) else of
            elif passes(g, node):
                held[node] = held.get(node.args[0])
            elif node.target is torch.cat and self.target == "s8s8":
                held[node] = self._concatenate([held.get(n) for n in node.all_input_nodes])
            else:
                self._read(g, node, path, edges, held)
                if _gives_several(g, node):
                    raise Unsupported(
                        f"{path}.{node.target if node.op == 'call_module' else node.name} gives several tensors, which no quantizer "
                        "here knows; only chunk, split and unbind may"
                    )
                if not self._stays_float(g, node, outputs, head):
                    put_after(node)
        result: Any = g.graph.output_node().args[0]
        return tuple(held.get(n) for n in result) if isinstance(result, tuple | list) else held.get(result)

    def _read(self, g: fx.GraphModule, node: fx.Node, path: str, edges: set[str], held: dict[fx.Node, Any]) -> None:
        """Note what a node wants of the tensors that it reads; replace a conv or linear by its quantized form."""
        full, layer = f"{path}.{node.target}", module_of(g, node)
        source = held.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        bits = self.widths.of(full, full in edges)
        if isinstance(layer, nn.Conv2d | nn.Linear) and full not in self.exclusions:
            if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
                g.set_submodule(str(node.target), QConv2d(layer, bits.weight))
            elif type(layer) is nn.Linear:
                g.set_submodule(str(node.target), QLinear(layer, bits.weight))
            if not isinstance(module_of(g, node), QuantizedLayer):
                return  # whatever else multiplies is found by check_coverage
            if isinstance(source, FakeQuant):
                self.sources[full] = source
                self._wishes[source].append(bits.activation)
                self._reads.append((g, node, full, bits.activation))
        else:
            left_out = isinstance(layer, nn.Conv2d | nn.Linear)  # it shall not read less for being left in float
            for q in (held.get(n) for n in node.all_input_nodes):
                if isinstance(q, FakeQuant):
                    other = max(self.widths.add or self.widths.activation, self.widths.edge if q in self._images else 0)
                    self._wishes[q].append(bits.activation if left_out else other)

    def _stays_float(self, g: fx.GraphModule, node: fx.Node, outputs: set[fx.Node], head: bool) -> bool:
        """Whether what this node makes is fused into what reads it, or is the logits."""
        if node in outputs:
            return head
        if len(node.users) != 1:
            return False
        user = reader = next(iter(node.users))
        while isinstance(module_of(g, reader), nn.Dropout) and len(reader.users) == 1:
            reader = next(iter(reader.users))
        if is_relu(g, reader) or conv_before(g, reader) is node:
            return True
        bounds = module_of(g, reader)
        if self.target == "u8s8":  # at 8 bits rounding twice costs little, and records depend on it
            return isinstance(bounds, nn.Hardtanh) and bounds.min_val == 0 and self.widths.activation < 8
        return isinstance(bounds, nn.Hardtanh) or (is_add(user) and (is_add(node) or _main_branch(g, node, user)))

    def _concatenate(self, parts: list[Any]) -> Any:
        self._tied.append([q for q in parts if isinstance(q, FakeQuant)])
        return self._tied[-1][0] if self._tied[-1] else None

    def _tie(self, model: AnytimeModel) -> None:
        """Make one quantizer of all that are concatenated, directly or through one another."""
        instead: dict[FakeQuant, FakeQuant] = {}

        def root(q: FakeQuant) -> FakeQuant:
            while q in instead:
                q = instead[q]
            return q

        for group in self._tied:
            for q in group:
                if root(q) is not root(group[0]):
                    instead[root(q)] = root(group[0])
        for q in instead:
            self._wishes[root(q)] += self._wishes[q]
            root(q).shared = True
        for _, g in links(model):
            for name, m in list(g.named_modules(remove_duplicate=False)):
                if m in instead:
                    g.set_submodule(name, root(m))
        self.sources = {path: root(q) for path, q in self.sources.items()}

    def _size(self) -> None:
        """Give every quantizer the bits of its widest reader, and layers that want fewer one of their own."""
        for q, wishes in self._wishes.items():
            q.resize(max(wishes, default=self.widths.add or self.widths.activation))
        if not self.widths.add:
            return
        own: dict[tuple[fx.Node, int], str] = {}
        for g, node, full, bits in self._reads:
            if bits >= self.sources[full].bits:
                continue
            read: Any = node.args[0]
            if (read, bits) not in own:
                q = FakeQuant(bits, self.target == "s8s8", f"{full}:input")
                own[read, bits] = f"quant_{node.name}_input"
                g.add_module(own[read, bits], q)
            with g.graph.inserting_before(node):
                node.replace_input_with(read, g.graph.call_module(own[read, bits], (read,)))
            self.sources[full] = g.get_submodule(own[read, bits])  # type: ignore[assignment]


def left_out(model: AnytimeModel, keep_float: tuple[str, ...], target: Target) -> tuple[str, ...]:
    """Layers of a traced chain left in float: ``keep_float``, and for "s8s8" what TensorRT runs faster so."""
    return tuple(dict.fromkeys((*keep_float, *(tensorrt_exclusions(model) if target == "s8s8" else ()))))


def tensorrt_exclusions(model: AnytimeModel) -> tuple[str, ...]:
    """Layers of a traced chain that are faster in TensorRT left out of INT8, by path.

    Every linear layer (at batch 1 a matrix times a vector, which Tensor Cores cannot help), and convolutions of fewer than 16
    channels in or out, but for these: square ones with a multiple of 8 channels on one side that have 16 or more on one side or
    read the input; grouped ones with a multiple of 8 channels out and kernels from 3x3 on.
    Source: NVIDIA Model Optimizer 0.47, modelopt/onnx/quantization/graph_utils.py, its rules for INT8.
    """
    out = []
    for path, g in links(model):
        for node in g.graph.nodes:
            layer = module_of(g, node)
            if isinstance(layer, nn.Linear):
                out.append(f"{path}.{node.target}")
            elif isinstance(layer, nn.Conv2d):
                made, read = layer.weight.shape[:2]
                of_input = (
                    path.startswith("stages.") and (path == "stages.0" or model.restarts) and node.args[0].op == "placeholder"
                )
                square = layer.groups == 1 and len(set(layer.kernel_size)) == 1
                if min(made, read) >= 16 or (
                    (square and (made % 8 == 0 or read % 8 == 0) and (of_input or max(made, read) >= 16))
                    or (layer.groups > 1 and made % 8 == 0 and min(layer.kernel_size) >= 3)
                ):
                    continue
                out.append(f"{path}.{node.target}")
    return tuple(out)


def _first_layers(model: AnytimeModel) -> set[str]:
    """Paths of the layers that read the image, or what was made of it without a layer."""
    found: set[str] = set()
    state: Any = True  # whether it is the image; for a state of several tensors a tuple
    for path, g in links(model):
        held: dict[fx.Node, Any] = {}
        for node in g.graph.nodes:
            read = [held[n] for n in node.all_input_nodes]
            layer = isinstance(module_of(g, node), nn.Conv2d | nn.Linear)
            if node.op == "placeholder":
                held[node] = state if path.startswith("heads") or not model.restarts else True
            elif node.target is getitem and isinstance(read[0], tuple):
                held[node] = read[0][node.args[1]]
            else:
                image = all(r is True for r in read)
                found |= {f"{path}.{node.target}"} if layer and image else set()
                held[node] = image and not layer
        if path.startswith("stages"):
            state = fx.node.map_arg(g.graph.output_node().args[0], held.__getitem__)
            state = tuple(state) if isinstance(state, list) else state
    return found


def _last_layer(g: fx.GraphModule, path: str) -> str:
    layers = _layers(g)
    return f"{path}.{layers[-1]}" if layers else ""


def _layers(g: nn.Module) -> list[str]:
    assert isinstance(g, fx.GraphModule)
    return [str(n.target) for n in g.graph.nodes if isinstance(module_of(g, n), nn.Conv2d | nn.Linear)]


def _conv_of(g: fx.GraphModule, node: Any) -> fx.Node | None:
    """The convolution whose result this is, BatchNorm between them or not."""
    conv = node if isinstance(module_of(g, node), nn.Conv2d) else conv_before(g, node) if isinstance(node, fx.Node) else None
    return conv if isinstance(node, fx.Node) and conv is not None else None


def _main_branch(g: fx.GraphModule, node: fx.Node, add: fx.Node) -> bool:
    """Whether TensorRT fuses this addition into the convolution that made ``node``: the later one of two."""
    mine = _conv_of(g, node)
    if mine is None:
        return False
    other = next((n for n in add.all_input_nodes if n is not node), None)
    theirs = _conv_of(g, _behind(g, other)) if other is not None and len(other.users) == 1 else None
    if theirs is None:
        return True
    order = list(g.graph.nodes)
    mine_at, theirs_at = (order.index(c.args[0]) for c in (mine, theirs))
    return (mine_at, -order.index(mine)) > (theirs_at, -order.index(theirs))


def _behind(g: fx.GraphModule, node: fx.Node) -> Any:
    """What a quantizer stands on."""
    return node.args[0] if isinstance(module_of(g, node), FakeQuant) else node


def asks_shape(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape, not its values."""
    if node.target is getattr:
        return node.args[1] not in TENSORS
    return node.op == "call_method" and node.target in ("size", "dim")


def _gives_several(g: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what a node makes is a tuple: the module is known for it, or its items are read. (The batch's items never are.)"""
    if isinstance(module_of(g, node), nn.RNNBase | nn.LSTMCell | nn.MultiheadAttention):
        return True
    reads = [user.args[1] for user in node.users if user.target in (getitem, getattr)]
    return any(isinstance(i, int) or i in ("values", "indices") for i in reads) and not (
        is_view(g, node) or name_of(node) == "stack"
    )


def uncovered(model: AnytimeModel, sources: Mapping[str, FakeQuant]) -> Iterator[tuple[str, str]]:
    """(layer path, why) of every layer that multiplies without calibrated quantizers."""
    for path, g in links(model):
        for node in g.graph.nodes:
            name = f"{path}.{node.target if node.op == 'call_module' else node.name}"
            layer = module_of(g, node)
            if isinstance(layer, QConv2d | QLinear):
                if name not in sources or not sources[name].calibrated:
                    yield name, "its input has no calibrated quantizer"
                elif not bool(torch.isfinite(layer.weight_scale).all()):
                    yield name, "its weight is not calibrated"
            elif layer is not None and not isinstance(layer, SCALING) and any(p.ndim >= 2 for p in layer.parameters()):
                mode = getattr(layer, "padding_mode", "zeros")
                yield (
                    name,
                    f"no quantizer for {type(layer).__name__}" + (f" with padding_mode={mode!r}" if mode != "zeros" else ""),
                )
            elif node.op in ("call_function", "call_method") and name_of(node) in MULTIPLYING:
                yield name, f"no quantizer for the {node.op.removeprefix('call_')} {name_of(node)}"
            elif node.op == "call_function" and not _known(node.target):
                yield name, f"what the function {name_of(node)} multiplies cannot be seen, as torch.fx.wrap hides it"


def _known(function: Any) -> bool:
    """Whether a function is torch's, torchvision's or Python's own: of these MULTIPLYING has the names. torch's built-in ones have
    no module."""
    owner = (getattr(function, "__module__", None) or "torch").split(".")[0]
    return owner in ("torch", "torchvision", "_operator", "math", "builtins")
