"""ONNX Runtime on the CPU: float graphs, and 8-bit Q/DQ graphs for real."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from anytime.backend import Backend, BitMap, Deployable, Segment, Target
from anytime.dataset import Part
from anytime.errors import AnytimeError, Unsupported
from anytime.metrics import Floats
from anytime.model import AnytimeModel
from anytime.quant.graph import traced
from anytime.quant.onnx_graph import OnnxChain
from anytime.train import Trainer

INT8_KERNELS = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)


class OnnxNet(Deployable):
    """One ONNX Runtime session per segment, made when it is first asked for; states stay integers between them."""

    format = "onnx"
    execution = "ONNX Runtime"
    simulated = False

    def __init__(
        self, twin: AnytimeModel, chain: AnytimeModel, bits: BitMap, input_shape: tuple[int, ...], facts: dict[str, str]
    ) -> None:
        self.twin, self.bits, self.facts = twin, dict(bits), facts
        self._chain, self._input_shape = chain, input_shape
        self._threads = 0  # ONNX Runtime's own choice: every core
        self._graphs: dict[Segment, bytes] = {}
        self._sessions: dict[Segment, Any] = {}

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
        return {layer: "int8" if layer in found else "fp32" for layer in self._layers()}

    def _layers(self) -> list[str]:
        return list(self.bits) or [n for n, m in self.twin.named_modules() if getattr(m, "weight", None) is not None]

    def _graph(self, segment: Segment) -> bytes:
        if segment not in self._graphs:
            chain = OnnxChain(self._chain, self._input_shape, int_bias=True)
            self._graphs[segment] = chain.write(segment).SerializeToString()
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
        # Left on, this pass quantizes on its own the weights of a layer that was kept in float between two Q/DQ pairs.
        session = onnxruntime.InferenceSession(
            self._graph(segment), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
        if session.get_providers() != ["CPUExecutionProvider"]:
            raise AnytimeError(f"ONNX Runtime chose {session.get_providers()}, not the CPU: its rows would carry the wrong name")
        return session, [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """What ``of`` makes, executed by ONNX Runtime on the CPU: FP32 graphs, or INT8 with u8 activations and s8 weights.

    Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 13; ONNX Runtime's documentation, "Quantize ONNX
    models", section "Method selection" (u8s8 on x86).
    """

    of: Backend

    @property
    def column(self) -> str:
        return self.of.column

    def why_not(self) -> str | None:
        if find_spec("onnxruntime") is None or find_spec("onnx") is None:
            return "onnxruntime or onnx is not installed: pip install onnx onnxruntime"
        return self.of.why_not()

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        inner = self.of.compress(model, calib, trainer, "u8s8")
        odd = {b for b in inner.bits.values() if b != (8, 8)}
        if odd:
            said = ", ".join(sorted(f"W{b.weight}A{b.activation}" for b in odd))
            raise Unsupported(
                f"ONNX Runtime's CPU kernels here are FP32 and W8A8, not {said}: score {self.of.label} without the engine"
            )
        chain = inner.twin if inner.bits else traced(inner.twin)
        return OnnxNet(
            inner.twin, chain, inner.bits, tuple(calib.x.shape[1:]), {k: v for k, v in inner.facts.items() if k != "simulated"}
        )
