"""A chain as ONNX graphs, one per segment, and the engines that run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from anytime.backend import BitMap, Bits, Deployable, Segment, links, save_links
from anytime.engine import Graph, OnnxRuntimeGraph, OpenVINOGraph
from anytime.metrics import Floats
from anytime.model import AnytimeModel
from anytime.quant.fake import overflows
from anytime.quant.onnx_graph import OnnxChain

# Operators that only choose or move values, as quantizers write them: what they give lies on the grid of what they get.
MOVES = ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def missing() -> str | None:
    """Why graphs cannot run in ONNX Runtime here; None when they can."""
    there = find_spec("onnxruntime") and find_spec("onnx")
    return None if there else "onnxruntime or onnx is not installed: pip install onnx onnxruntime"


class GraphNet(Deployable, ABC):
    """A chain whose segments are ONNX graphs; each is given to the engine when it is first asked for.

    ``graph`` writes the file of a segment: inputs in the order of the state's tensors; outputs the logits, if it has a
    head, then the state. ``bits`` None: read back from the graphs, layers whose weight or input is float left out.
    ``float_biases``: see OnnxRuntimeGraph.
    """

    simulated = False

    def __init__(
        self,
        twin: AnytimeModel,
        bits: BitMap | None,
        graph: Callable[[Segment], bytes],
        facts: dict[str, str],
        float_biases: bool = False,
    ) -> None:
        self.twin, self.facts, self.float_biases = twin, facts, float_biases
        self._write = graph
        self._threads = 0  # the engine's own choice: every core
        self._bodies: dict[Segment, bytes] = {}
        self._graphs: dict[Segment, Graph] = {}
        self.bits = self._read_bits() if bits is None else dict(bits)

    def __getstate__(self) -> dict[str, Any]:
        # What an engine has made cannot be pickled; graphs can, and a process that times links shall not have to write them.
        for segment in (*links(self), *self.plan(range(self.n_exits))):
            self.graph(segment)
        return {**self.__dict__, "_graphs": {}}

    def open(self, threads: int) -> None:
        if threads != self._threads:
            self._threads, self._graphs = threads, {}

    @property
    def overflows(self) -> bool:
        """See ``quant.fake.overflows``."""
        return overflows(self.twin, self.bits)

    def graph(self, segment: Segment) -> bytes:
        """The ONNX file of a segment, written once."""
        if segment not in self._bodies:
            self._bodies[segment] = self._write(segment)
        return self._bodies[segment]

    def start(self, x: Floats) -> list[Any]:
        return [np.ascontiguousarray(x, dtype=np.float32)]

    def step(self, segment: Segment, state: list[Any]) -> tuple[Any, Floats | None]:
        run = self._graphs.get(segment)
        if run is None:
            run = self._graphs[segment] = self._made(self.graph(segment))
        return self._answer(segment, state, run(state))

    def save(self, folder: Path) -> list[Path]:
        return save_links(self, folder, "onnx", self.graph)

    def executed(self, x: Floats) -> dict[str, str]:
        found: dict[str, str] = {}
        state: Any = self.start(x)
        for segment in self.plan(range(self.n_exits)):
            out, kinds = self._made(self.graph(segment)).profile(state)
            state, _ = self._answer(segment, state, out)
            found |= kinds
        layers = (name for name, m in self.twin.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
        return {layer: found.get(layer, "fp32") for layer in layers}

    @abstractmethod
    def _made(self, body: bytes) -> Graph:
        """The engine's own form of a graph."""

    def _answer(self, segment: Segment, state: list[Any], out: list[Any]) -> tuple[list[Any], Floats | None]:
        if segment.head is None:
            return out, None
        return (state if self.restarts else out[1:]), out[0]

    def _read_bits(self) -> BitMap:
        found: dict[str, Bits] = {}
        for segment in self.plan(range(self.n_exits)):
            found |= multiplied(self.graph(segment))
        return {name: found[name] for name, _ in self.twin.named_modules() if name in found}


class OnnxNet(GraphNet):
    """Run by ONNX Runtime."""

    format = "onnx"
    execution = "ONNX Runtime"

    def _made(self, body: bytes) -> Graph:
        return OnnxRuntimeGraph(body, self._threads, self.float_biases)


class OpenVINONet(GraphNet):
    """Run by OpenVINO; what is not quantized in ``precision``."""

    format = "openvino"
    execution = "OpenVINO"
    precision: Literal["f32", "bf16"] = "f32"

    def _made(self, body: bytes) -> Graph:
        return OpenVINOGraph(body, self._threads, self.precision)


def written(chain: AnytimeModel, input_shape: tuple[int, ...], segment: Segment, channels_last: bool = False) -> bytes:
    """The graph of a segment of a traced ``chain``: integers where it carries quantizers. ``channels_last``: see OnnxChain."""
    chain_graph = OnnxChain(chain, input_shape, int_bias=True, channels_last=channels_last)
    return bytes(chain_graph.write(segment).SerializeToString())


def multiplied(graph: bytes) -> dict[str, Bits]:
    """Layers whose weight and input both come from integers -> how many bits these have."""
    import onnx

    nodes = onnx.ModelProto.FromString(graph).graph
    source = {out: node for node in nodes.node for out in node.output}
    kinds = {c.name: c.data_type for c in nodes.initializer}

    def bits(tensor: str) -> int | None:
        node = source.get(tensor)
        while node is not None and node.op_type in MOVES:
            node = source.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return 8 * onnx.helper.tensor_dtype_to_np_dtype(kinds[node.input[2]]).itemsize

    found = {}
    for node in nodes.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            activation, weight = bits(node.input[0]), bits(node.input[1])
            if activation is not None and weight is not None:
                found[node.name] = Bits(weight, activation)
    return found
