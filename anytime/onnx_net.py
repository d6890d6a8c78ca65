"""A chain that ONNX Runtime executes: one graph and one session per segment."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from anytime.backend import BitMap, Bits, Deployable, Segment
from anytime.errors import AnytimeError
from anytime.metrics import Floats
from anytime.model import AnytimeModel
from anytime.quant.onnx_graph import OnnxChain

INT8_KERNELS = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
# Operators that only choose or move values, as quantizers write them: what they give lies on the grid of what they get.
MOVES = ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


class OnnxNet(Deployable):
    """One ONNX Runtime session per segment, made when it is first asked for.

    ``graph`` writes the file of a segment: inputs in the order of the state's tensors; outputs the logits, if it has a
    head, then the state. ``bits`` None: read back from the graphs, layers whose weight or input is float left out.
    ``float_biases``: the graphs leave biases in float, and ONNX Runtime is to quantize them as it would for anybody; its
    pass that does so, WeightBiasQuantization, also quantizes the weights of a layer that was kept in float between two
    Q/DQ pairs, so that it is off otherwise.
    """

    format = "onnx"
    execution = "ONNX Runtime"
    simulated = False

    def __init__(
        self,
        twin: AnytimeModel,
        bits: BitMap | None,
        graph: Callable[[Segment], bytes],
        facts: dict[str, str],
        float_biases: bool = False,
    ) -> None:
        self.twin, self.facts = twin, facts
        self._write, self._float_biases = graph, float_biases
        self._threads = 0  # ONNX Runtime's own choice: every core
        self._graphs: dict[Segment, bytes] = {}
        self._sessions: dict[Segment, Any] = {}
        self.bits = self._read_bits() if bits is None else dict(bits)

    def __getstate__(self) -> dict[str, Any]:
        # Sessions cannot be pickled; another process makes its own.
        return {**self.__dict__, "_sessions": {}}

    def open(self, threads: int) -> None:
        if threads != self._threads:
            self._threads, self._sessions = threads, {}
        for segment in self.plan(range(self.n_exits)):
            self._session(segment)

    def start(self, x: Floats) -> list[Any]:
        return [np.ascontiguousarray(x, dtype=np.float32)]

    def step(self, segment: Segment, state: list[Any]) -> tuple[Any, Floats | None]:
        session, names, outputs = self._session(segment)
        out = session.run(outputs, dict(zip(names, state, strict=True)))
        if segment.head is None:
            return out, None
        return (state if self.restarts else out[1:]), out[0]

    def save(self, folder: Path) -> list[Path]:
        """One file per link: stage and head as one graph."""
        paths = []
        for segment in self.plan(range(self.n_exits)):
            path = folder / f"link_{segment.head}.onnx"
            path.write_bytes(self._graph(segment))
            paths.append(path)
        return paths

    def executed(self, x: Floats) -> dict[str, str]:
        found: set[str] = set()
        state: Any = self.start(x)
        for segment in self.plan(range(self.n_exits)):
            with tempfile.TemporaryDirectory() as folder:
                session, names, outputs = self._make(segment, profile=f"{folder}/profile")
                out = session.run(outputs, dict(zip(names, state, strict=True)))
                events = json.loads(Path(session.end_profiling()).read_text())
            state = state if self.restarts else out[1:]
            # ONNX Runtime keeps a layer's name on the kernel that replaces it, with a suffix of its own.
            for event in events:
                if event.get("cat") == "Node" and event["args"].get("op_name") in INT8_KERNELS:
                    found.add(re.sub(r"(_token_\d+)?_kernel_time$", "", event["name"]))
        layers = (name for name, m in self.twin.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
        return {layer: "int8" if layer in found else "fp32" for layer in layers}

    def _read_bits(self) -> BitMap:
        found: dict[str, Bits] = {}
        for segment in self.plan(range(self.n_exits)):
            found |= multiplied(self._graph(segment))
        return {name: found[name] for name, _ in self.twin.named_modules() if name in found}

    def _graph(self, segment: Segment) -> bytes:
        if segment not in self._graphs:
            self._graphs[segment] = self._write(segment)
        return self._graphs[segment]

    def _session(self, segment: Segment) -> Any:
        if segment not in self._sessions:
            self._sessions[segment] = self._make(segment)
        return self._sessions[segment]

    def _make(self, segment: Segment, profile: str = "") -> tuple[Any, list[str], list[str]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        session = onnxruntime.InferenceSession(
            self._graph(segment), options, providers=["CPUExecutionProvider"],
            disabled_optimizers=[] if self._float_biases else ["WeightBiasQuantization"],
        )  # fmt: skip
        if session.get_providers() != ["CPUExecutionProvider"]:
            raise AnytimeError(f"ONNX Runtime chose {session.get_providers()}, not the CPU: its rows would carry the wrong name")
        return session, [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]


def written(chain: AnytimeModel, input_shape: tuple[int, ...], segment: Segment) -> bytes:
    """The graph of a segment of a traced ``chain``: integers where it carries quantizers."""
    return bytes(OnnxChain(chain, input_shape, int_bias=True).write(segment).SerializeToString())


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
