"""Builds one ONNX graph: nodes, constants, and Q/DQ on the grids of quantizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from anytime.quant.fake import FakeQuant

OPSET, IR = 13, 7  # they load on every board that we know


class Q(NamedTuple):
    """The grid that a tensor lies on, as names in the graph; ``integers`` is the tensor behind the DQ."""

    quant: FakeQuant
    scale: str
    zero_point: str
    integers: str


class Value(NamedTuple):
    """A float tensor of the graph; ``q`` when a DQ made it."""

    name: str
    q: Q | None = None


@dataclass
class Writer:
    """Builds one graph."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    grids: dict[int, tuple[str, str]] = field(default_factory=dict)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Name of an initializer."""
        self.initializers.setdefault(name, numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node; answer the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}:out"], name, **attributes))
        return f"{name}:out"

    def quantize(self, value: str, quant: FakeQuant, name: str) -> Value:
        """Q and DQ behind a float tensor."""
        scale, zero_point = self.grid(quant, name)
        integers = self.op("QuantizeLinear", [value, scale, zero_point], f"{name}/Q")
        return self.dequantize(Q(quant, scale, zero_point, integers), name)

    def dequantize(self, q: Q, name: str) -> Value:
        """A float tensor from integers."""
        return Value(self.op("DequantizeLinear", [q.integers, q.scale, q.zero_point], f"{name}/DQ"), q)

    def keep(self, out: str, x: Value, name: str) -> Value:
        """``out``, which is x whose values were only moved, in integers: the same grid behind it, so that an engine runs it
        between Q and DQ."""
        if x.q is None or out == x.name:
            return Value(out, x.q)
        return self.dequantize(
            x.q._replace(integers=self.op("QuantizeLinear", [out, x.q.scale, x.q.zero_point], f"{name}/Q")), name
        )

    def grid(self, quant: FakeQuant, name: str) -> tuple[str, str]:
        """Names of a grid's scale and zero point; tensors that share it share them."""
        if id(quant) not in self.grids:
            scale = self.constant(f"{name}/scale", np.array(quant.scale.item(), np.float32))
            zero = self.constant(f"{name}/zero_point", np.array(quant.zero_point.item(), integer_type(quant)))
            self.grids[id(quant)] = (scale, zero)
        return self.grids[id(quant)]


def integer_type(quant: FakeQuant) -> type[np.generic]:
    """numpy type that holds this grid's integers."""
    if quant.bits <= 8:
        return np.int8 if quant.signed else np.uint8
    return np.int16 if quant.signed else np.uint16
