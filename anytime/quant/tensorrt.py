"""Graphs in the form that TensorRT takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anytime.errors import Unsupported

MULTIPLIERS = ("Conv", "Gemm")


def for_tensorrt(written: onnx.ModelProto, fp16: bool) -> onnx.ModelProto:
    """A graph of OnnxChain with float biases and s8 grids -> the same arithmetic in the form that TensorRT 8.0 to 11 takes.

    Weights in integers become float ones behind Q/DQ, as NVIDIA's own tools write them. Tensors between segments are float32, on
    their grid: trtexec would turn integers at the border into floats by itself. With ``fp16`` whatever is not fed by integers
    computes in FP16 between Casts, but for LRN, whose sums of squares overflow it. (Price: a state crosses in 4 bytes a value.)
    Source: NVIDIA/TensorRT, samples/common/sampleEngines.cpp (borders); NVIDIA Model Optimizer 0.47, AutoCast (FP16 by Casts).
    """
    model: onnx.ModelProto = onnx.ModelProto.FromString(written.SerializeToString())
    edit = _Edit(model.graph)
    edit.float_weights()
    edit.float_borders()
    if fp16:
        edit.half()
    edit.finish()
    onnx.checker.check_model(model)
    return model


def one_sample(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for batch 1, its shapes static."""
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    for info in (*copy.graph.input, *copy.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 1
    return copy


class _Edit:
    """Changes one graph: every pass puts new nodes where they belong in the order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.constants = {c.name: c for c in graph.initializer}

    def finish(self) -> None:
        """Write the nodes back, and only the constants that are read."""
        read = {name for node in self.nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(c for name, c in self.constants.items() if name in read)

    def float_weights(self) -> None:
        done = []
        for node in self.nodes:
            if node.op_type == "DequantizeLinear" and node.input[0] in self.constants:
                name, scale, zero = node.input
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
                q, step = self._value(name), self._value(scale)
                shape = [-1 if d == axis else 1 for d in range(q.ndim)] if step.ndim else []
                self._put(name, q.astype(np.float32) * step.reshape(shape))
                done.append(helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}/Q:out"], f"{name}/Q", axis=axis))
                node.input[0] = f"{name}/Q:out"
            done.append(node)
        self.nodes = done

    def float_borders(self) -> None:
        dequantized = {node.input[0]: node for node in self.nodes if node.op_type == "DequantizeLinear"}
        entered = []
        for info in self.graph.input:
            if self._is_integer(info):
                name, grid = info.name, dequantized[info.name].input[1:]
                for node in self.nodes:
                    for i, read in enumerate(node.input):
                        if read == name:
                            node.input[i] = f"{name}/Q:out"
                dequantized[f"{name}/Q:out"] = dequantized[name]
                entered.append(helper.make_node("QuantizeLinear", [name, *grid], [f"{name}/Q:out"], f"{name}/Q"))
        self.nodes = [*entered, *self.nodes]
        made = {out: node for node in self.nodes for out in node.output}
        for info in self.graph.output:
            if self._is_integer(info):
                identity = made[info.name]
                source = identity.input[0]
                if source not in dequantized:
                    grid = made[source].input[1:]
                    dequantized[source] = helper.make_node(
                        "DequantizeLinear", [source, *grid], [f"{info.name}/DQ:out"], f"{info.name}/DQ"
                    )
                    self.nodes.insert(self.nodes.index(identity), dequantized[source])
                identity.input[0] = dequantized[source].output[0]

    def half(self) -> None:
        made = {out: node for node in self.nodes for out in node.output}
        borders = {info.name for info in self.graph.output}
        wide: set[str] = {info.name for info in self.graph.input}  # tensors in float32 that are not to be touched
        full: set[int] = set()
        for node in self.nodes:
            by_integers = node.op_type in MULTIPLIERS and any(
                read in made and made[read].op_type == "DequantizeLinear" for read in node.input[1:2]
            )
            follows = node.op_type not in MULTIPLIERS and any(id(made[read]) in full for read in node.input if read in made)
            if (
                by_integers or follows or node.op_type in ("QuantizeLinear", "DequantizeLinear", "LRN")
                or borders & set(node.output)
            ):  # fmt: skip
                full.add(id(node))
                wide |= set(node.output)
        done: list[onnx.NodeProto] = []
        cast: set[str] = set()

        def as_(kind: str, name: str) -> str:
            to = TensorProto.FLOAT16 if kind == "fp16" else TensorProto.FLOAT
            if f"{name}/{kind}" not in cast:
                cast.add(f"{name}/{kind}")
                done.append(helper.make_node("Cast", [name], [f"{name}/{kind}"], f"{name}/{kind}", to=to))
            return f"{name}/{kind}"

        for node in self.nodes:
            for i, read in enumerate(node.input):
                if read in self.constants:
                    if id(node) not in full and self.constants[read].data_type == TensorProto.FLOAT:
                        self._put(f"{read}/fp16", self._value(read).astype(np.float16))
                        node.input[i] = f"{read}/fp16"
                elif read in wide and id(node) not in full:
                    node.input[i] = as_("fp16", read)
                elif read and read not in wide and id(node) in full:
                    node.input[i] = as_("fp32", read)
            done.append(node)
        self.nodes = done

    def _is_integer(self, info: onnx.ValueInfoProto) -> bool:
        """Whether a border tensor is in integers; from now on it is not."""
        kind = info.type.tensor_type
        if kind.elem_type in (TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT16):
            raise Unsupported(f"{info.name}: TensorRT's integers are symmetric and of 8 bits; compress for the target s8s8")
        if kind.elem_type != TensorProto.INT8:
            return False
        kind.elem_type = TensorProto.FLOAT
        return True

    def _value(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self.constants[name])

    def _put(self, name: str, value: NDArray[Any]) -> None:
        self.constants[name] = numpy_helper.from_array(value, name)
