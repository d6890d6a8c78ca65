"""Links of a chain as ONNX graphs, with Q/DQ where the chain carries quantizers.

One static graph per segment. Nodes bear their layer's path ("stages.0.0"), so a profile or a viewer reads
like the network.
"""

from __future__ import annotations

from functools import partial
from operator import getitem
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from anytime.model import AnytimeModel, Segment
from anytime.quant import onnx_ops
from anytime.quant.channelwise import channelwise
from anytime.quant.fake import FakeQuant
from anytime.quant.nodes import passes
from anytime.quant.onnx_torch import BATCHES, exported, is_tensor
from anytime.quant.onnx_writer import IR, OPSET, Q, Value, Writer, integer_type


class OnnxChain:
    """A chain ready to be written, segment by segment; its links must be traced (``quant.graph.traced`` or ``quantized``).

    ``int_bias`` writes the biases of quantized layers as int32 (CPU engines), else float (TensorRT).
    ``channels_last``: integer images cross segments as [B, H, W, C]. ONNX Runtime computes in that layout, and turns what comes as
    [B, C, H, W] around slowly (of ResNet-56, batch 64: a fifth of a segment's time); OpenVINO is slower by as much the other way.
    """

    def __init__(self, model: AnytimeModel, input_shape: tuple[int, ...], int_bias: bool, channels_last: bool = False) -> None:
        self.model, self.int_bias, self.channels_last = model, int_bias, channels_last
        # states[k] is what enters stage k: (shape without batch, its FakeQuant or None), nested as the state is.
        x = [torch.zeros(batch, *input_shape) for batch in BATCHES]
        states: Any = x
        quant: Any = None
        self.states = [_describe(x[0], None)]
        with torch.inference_mode():
            for stage, head in zip(model.stages, model.heads, strict=True):
                assert isinstance(stage, fx.GraphModule) and isinstance(head, fx.GraphModule)
                states, quant = _propagate(stage, x if model.restarts else states), _out_quant(stage, quant)
                self.states.append(_describe(states[0], quant))
                self.n_classes = _propagate(head, states)[0].shape[-1]

    def write(self, segment: Segment) -> onnx.ModelProto:
        """The graph of one segment.

        Inputs "x" or "state" (with an index when there are several), integers where the state is quantized;
        outputs "logits" (with a head) and "state_out" (unless nothing can follow).
        """
        w = Writer()
        head, restarts = segment.head, self.model.restarts
        fresh = segment.fresh(restarts)
        inputs, value = _enter(w, self.states[0 if fresh else segment.first], "x" if fresh else "state", self.channels_last)
        for k in segment.stages(restarts):
            value = _link(w, self.model.stages[k], f"stages.{k}", value, self.int_bias)
        outputs = []
        if head is not None:
            logits = _link(w, self.model.heads[head], f"heads.{head}", value, self.int_bias)
            w.nodes.append(helper.make_node("Identity", [logits.name], ["logits"], "logits"))
            outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", self.n_classes]))
        if segment.hands_on(self.model.n_exits, restarts):
            outputs += _leave(w, value, self.states[segment.stop], self.channels_last)
        read = {name for node in w.nodes for name in node.input}
        constants = [tensor for name, tensor in w.initializers.items() if name in read]
        graph = helper.make_graph(w.nodes, _title(segment), inputs, outputs, constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="anytime")
        proto.ir_version = IR
        onnx.checker.check_model(proto)
        return proto


def _title(segment: Segment) -> str:
    stages = "" if segment.stop == segment.first else f"stages {segment.first + 1} to {segment.stop}"
    return ", ".join(filter(None, [stages, "" if segment.head is None else f"head {segment.head + 1}"]))


def _propagate(link: fx.GraphModule, states: list[Any]) -> list[Any]:
    """What a link makes of states of BATCHES samples; each of its nodes that makes tensors notes its shapes, None for several."""
    out = []
    for batch, state in zip(BATCHES, states, strict=True):
        out.append(ShapeProp(link).propagate(state))
        for node in link.graph.nodes:
            if (said := node.meta.get("tensor_meta")) is not None:
                node.meta.setdefault("shapes", {})[batch] = tuple(said.shape) if isinstance(said, TensorMetadata) else None
    return out


def _describe(state: Any, quant: Any) -> Any:
    if isinstance(state, Tensor):
        return (tuple(state.shape[1:]), quant if isinstance(quant, FakeQuant) else None)
    each = quant if isinstance(quant, tuple) else (quant,) * len(state)
    return [_describe(s, q) for s, q in zip(state, each, strict=True)]


def _out_quant(stage: fx.GraphModule, entering: Any) -> Any:
    """Quantizers of what a stage returns, followed through operations that only move values."""

    def of(node: Any) -> Any:
        if isinstance(node, tuple | list):
            return tuple(of(n) for n in node)
        if node.op == "placeholder":
            return entering
        if node.op == "call_function" and node.target is getitem:
            held = of(node.args[0])
            return held[node.args[1]] if isinstance(held, tuple) else held
        if node.target is torch.cat:
            grids = of(node.args[0])  # the parts of one tensor, handed over as they came, share its grid
            return onnx_ops.one_grid(set(grids)) if isinstance(grids, tuple) else grids
        module = stage.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, FakeQuant):
            return module
        return of(node.args[0]) if passes(stage, node) else None

    return of(stage.graph.output_node().args[0])


def _enter(w: Writer, described: Any, name: str, channels_last: bool) -> tuple[list[onnx.ValueInfoProto], Any]:
    if isinstance(described, list):
        parts = [_enter(w, d, f"{name}_{i}", channels_last) for i, d in enumerate(described)]
        return [info for infos, _ in parts for info in infos], tuple(value for _, value in parts)
    _, quant = described
    info, turned = _border(described, name, channels_last)
    if quant is None:
        return [info], Value(name)
    integers = w.op("Transpose", [name], f"{name}/NCHW", perm=[0, 3, 1, 2]) if turned else name
    scale, zero_point = w.grid(quant, name)
    return [info], w.dequantize(Q(quant, scale, zero_point, integers), name)


def _leave(w: Writer, value: Any, described: Any, channels_last: bool, name: str = "state") -> list[onnx.ValueInfoProto]:
    if isinstance(described, list):
        return [info for i, d in enumerate(described) for info in _leave(w, value[i], d, channels_last, f"{name}_{i}")]
    source = value.name if value.q is None else value.q.integers
    out = f"{name}_out"  # an input may be called "state" too
    info, turned = _border(described, out, channels_last)
    node = partial(helper.make_node, "Transpose", perm=[0, 2, 3, 1]) if turned else partial(helper.make_node, "Identity")
    w.nodes.append(node([source], [out], out))
    return [info]


def _border(described: Any, name: str, channels_last: bool) -> tuple[onnx.ValueInfoProto, bool]:
    """Type and shape of a tensor between segments, and whether its channels come last."""
    shape, quant = described
    turned = channels_last and quant is not None and len(shape) == 3
    kind = TensorProto.FLOAT if quant is None else helper.np_dtype_to_tensor_dtype(np.dtype(integer_type(quant)))
    return helper.make_tensor_value_info(name, kind, ["batch", *(shape[1:] + shape[:1] if turned else shape)]), turned


def _link(w: Writer, link: nn.Module, path: str, value: Any, int_bias: bool) -> Any:
    assert isinstance(link, fx.GraphModule)
    values: dict[fx.Node, Any] = {}

    def get(arg: Any) -> Any:
        if isinstance(arg, tuple | list):
            return [get(a) for a in arg]
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            return Value(w.constant(f"{path}.{arg.name}", _attribute(link, str(arg.target)).detach().numpy()))
        return values.get(arg) if isinstance(arg, fx.Node) else arg

    for node in link.graph.nodes:
        name = f"{path}.{node.target if node.op == 'call_module' else node.name}"
        if node.op == "placeholder":
            values[node] = value
        elif node.op == "output":
            out = node.args[0]
            return tuple(get(n) for n in out) if isinstance(out, tuple | list) else get(out)
        elif node.op == "get_attr" or not is_tensor(node):
            continue  # parameters, numbers, and what is asserted of them: whoever reads them takes them along
        elif node.op == "call_function" and node.target is getitem and not isinstance(get(node.args[0]), Value):
            values[node] = get(node.args[0])[node.args[1]]
        elif node.op == "call_module":
            module, given = link.get_submodule(node.target), get(node.args[0])
            once = sum(n.op == "call_module" and n.target == node.target for n in link.graph.nodes) == 1
            name = name if once else f"{path}.{node.name}"
            if int_bias and isinstance(given, Value) and given.q is not None:
                module = channelwise(module, given.q.quant, node.args[0].meta["shapes"][BATCHES[0]][1])
            values[node] = onnx_ops.module(w, module, node, name, given, int_bias) or exported(w, link, node, name, values)
        else:
            made = onnx_ops.call(w, node, name, [get(a) for a in node.args], {k: get(v) for k, v in node.kwargs.items()})
            values[node] = made or exported(w, link, node, name, values)
    raise AssertionError("a graph without an output")


def _attribute(root: nn.Module, target: str) -> Tensor:
    parent, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)  # type: ignore[no-any-return]
