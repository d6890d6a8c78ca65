"""A checker of TensorRT's rules for graphs with Q/DQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from anytime.quant.tensorrt import MULTIPLIERS

# What the writer of graphs knows, all of it in TensorRT's list of ONNX operators; If by the rule for its boundary.
KNOWN = {
    *("Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Flatten", "Gemm"),
    *(
        "GlobalAveragePool",
        "Identity",
        "If",
        "LRN",
        "MaxPool",
        "Mul",
        "Pad",
        "QuantizeLinear",
        "Relu",
        "Sigmoid",
        "Slice",
        "Tanh",
    ),
}
LATEST_OPSET, LATEST_IR = 13, 8  # TensorRT 8.0's
INTEGERS = (TensorProto.INT8, TensorProto.UINT8)


def broken_rules(model: onnx.ModelProto) -> list[str]:
    """What TensorRT would refuse, or run otherwise than it was meant: a sentence for each, naming the node; [] for a good graph.

    Source: NVIDIA TensorRT documentation, "Explicit quantization", "Q/DQ placement recommendations" and the operators' pages;
    ``reference/quantization.md``, sections c and d. Not executed: no TensorRT can be had where this is built.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    said = []
    if opset != LATEST_OPSET:
        said.append(f"opset {opset}: Q/DQ per channel begin with 13, and TensorRT 8.0 reads no later one")
    if model.ir_version > LATEST_IR:
        said.append(f"IR version {model.ir_version}: old parsers read up to {LATEST_IR}")
    for info in (*model.graph.input, *model.graph.output):
        kind = info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if shape[:1] != [1] or not all(shape):
            said.append(f"{info.name}: an engine of a segment takes one sample of a static shape, not {shape}")
        if kind.elem_type != TensorProto.FLOAT:
            said.append(f"{info.name}: tensors at the border are float32, trtexec would make them so")
    return said + [sentence for rule in RULES for sentence in rule(_View(model.graph))] + _in_branches(model.graph, set())


class _View:
    """A graph, ready to be asked."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        self.made = {out: node for node in self.nodes for out in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def of(self, *kinds: str) -> Iterator[onnx.NodeProto]:
        """Nodes of these kinds."""
        return (node for node in self.nodes if node.op_type in kinds)

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """Who makes a tensor, if it is of one of these kinds."""
        node = self.made.get(name)
        return node if node is not None and node.op_type in kinds else None

    def quantized(self, node: onnx.NodeProto) -> bool:
        """Whether a layer's weight comes from integers."""
        return len(node.input) > 1 and self.maker(node.input[1], "DequantizeLinear") is not None

    def behind_pair(self, name: str) -> str | None:
        """What a DQ's float tensor was before its Q; None where there is no such pair."""
        dq = self.maker(name, "DequantizeLinear")
        q = None if dq is None else self.maker(dq.input[0], "QuantizeLinear")
        return None if q is None else str(q.input[0])


def _operators(v: _View) -> Iterator[str]:
    for node in v.nodes:
        if node.op_type not in KNOWN or node.domain not in ("", "ai.onnx"):
            yield f"{node.name}: the operator {node.op_type} is not one that these graphs are known to run with"
        for a in node.attribute:
            if node.op_type == "MaxPool" and a.name == "dilations" and set(a.ints) - {1}:
                yield f"{node.name}: TensorRT pools without dilations"


def _grids(v: _View) -> Iterator[str]:
    for node in v.of("QuantizeLinear", "DequantizeLinear"):
        scale, zero = (v.constants.get(name) for name in (*node.input[1:3], "", "")[:2])
        if scale is None or zero is None:
            yield f"{node.name}: scale and zero point must be constants"
            continue
        if scale.dtype != np.float32 or not (np.isfinite(scale) & (scale > 0)).all():
            yield f"{node.name}: scales must be float32, positive and finite"
        if zero.dtype != np.int8 or zero.any():
            yield f"{node.name}: zero points must be int8 and 0"
        if zero.shape != scale.shape:
            yield f"{node.name}: {scale.size} scales and {zero.size} zero points"


def _pairs(v: _View) -> Iterator[str]:
    for node in v.of("QuantizeLinear"):
        readers = v.readers.get(node.output[0], [])
        if not readers or any(r.op_type != "DequantizeLinear" or list(r.input[1:]) != list(node.input[1:]) for r in readers):
            yield f"{node.name}: a Q must be followed by a DQ of the same scale"
    for node in v.of("DequantizeLinear"):
        if v.maker(node.input[0], "QuantizeLinear") is None:
            yield f"{node.name}: a DQ must stand behind a Q (weights too: TensorRT 8 takes no integer constants)"
    for name, readers in v.readers.items():
        if sum(r.op_type == "QuantizeLinear" and r.input[0] == name for r in readers) > 1:
            yield f"{name}: one pair for all its readers, or it is kept twice"


def _layers(v: _View) -> Iterator[str]:
    for node in v.of(*MULTIPLIERS):
        read = v.maker(node.input[0], "DequantizeLinear") is not None
        if v.quantized(node) and not read:
            yield f"{node.name}: its weight is quantized and its input is not, so it would run in float"
        if not v.quantized(node):
            continue
        flipped = node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
        axis, weight = int(flipped), v.made[node.input[1]]
        source = v.behind_pair(node.input[1])
        if source not in v.constants:
            yield f"{node.name}: its weight is no constant"
            continue
        for half in (weight, v.made[weight.input[0]]):
            scale = v.constants.get(half.input[1], np.ones(0))
            at = next((a.i for a in half.attribute if a.name == "axis"), 1)
            if scale.ndim != 1 or at != axis or len(scale) != v.constants[source].shape[axis]:
                yield f"{half.name}: weights take one scale for each channel out, along axis {axis}"
        if len(node.input) > 2 and v.maker(node.input[2], "DequantizeLinear") is not None:
            yield f"{node.name}: TensorRT keeps biases in float"


def _activations(v: _View) -> Iterator[str]:
    for node in v.of("QuantizeLinear"):
        if node.input[0] not in v.constants and v.constants.get(node.input[1], np.ones(())).ndim:
            yield f"{node.name}: an activation takes one scale"


def _fusions(v: _View) -> Iterator[str]:
    for node in v.of("Relu", "BatchNormalization", "Clip"):
        before = v.behind_pair(node.input[0])
        conv = None if before is None else v.maker(before, *MULTIPLIERS)
        if conv is not None and len(v.readers[conv.output[0]]) == len(v.readers[node.input[0]]) == 1:
            yield f"{node.name}: a Q/DQ pair between {conv.name} and it keeps them from being fused"


def _additions(v: _View) -> Iterator[str]:
    for node in v.of("Add"):
        pairs = [v.behind_pair(name) for name in node.input]
        # A convolution that others read too is rounded for them anyway, and so is one whose result goes from link to link.
        alone = [
            conv
            for name, before in zip(node.input, pairs, strict=True)
            if before is not None and (conv := v.maker(before, "Conv")) is not None and v.quantized(conv)
            if len(v.readers[before]) == len(v.readers[name]) == 1 and _link(conv) == _link(node)
        ]
        if alone and None not in pairs:
            yield f"{node.name}: both its inputs are quantized, so {alone[0].name} cannot take the addition in"
        direct = [conv for name in node.input if (conv := v.maker(name, "Conv")) is not None and v.quantized(conv)]
        if direct and pairs.count(None) == len(pairs) and not any(v.maker(name, "Add") for name in node.input):
            yield f"{node.name}: its skip side is not quantized, so {direct[0].name} leaves in float"


def _link(node: onnx.NodeProto) -> str:
    """ "stages.0" of "stages.0.conv"."""
    return ".".join(node.name.split(".")[:2])


def _concatenations(v: _View) -> Iterator[str]:
    for node in v.of("Concat"):
        grids = {tuple(dq.input[1:]) if (dq := v.maker(name, "DequantizeLinear")) is not None else None for name in node.input}
        after = {tuple(r.input[1:]) for r in v.readers.get(node.output[0], []) if r.op_type == "QuantizeLinear"}
        if len(grids) > 1 or (grids != {None} and after != grids):
            yield f"{node.name}: what is concatenated, and the whole, must share one scale"


RULES: tuple[Callable[[_View], Iterator[str]], ...] = (
    *(_operators, _grids, _pairs, _layers, _activations, _fusions, _additions, _concatenations),
)


def _in_branches(graph: onnx.GraphProto, outer: set[str]) -> list[str]:
    """No tensor of integers goes into a branch of an If, or comes out of it."""
    integers = outer | {n.output[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    integers |= {c.name for c in graph.initializer if c.data_type in INTEGERS}
    said = []
    for node in graph.node:
        for branch in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
            own = {n.output[0] for n in branch.node if n.op_type == "QuantizeLinear"}
            read = {name for n in branch.node for name in n.input}
            for name in sorted((read & integers) | ({o.name for o in branch.output} & own)):
                said.append(f"{node.name}: TensorRT's If takes no integers across its border, and {name} is some")
            said += _in_branches(branch, integers)
    return said
