"""Engines that run one ONNX graph on this machine's CPU. numpy only; a vendor is imported when a graph is made."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anytime import cpu
from anytime.errors import AnytimeError, UsageError

Arrays = Sequence[NDArray[Any]]
Kinds = dict[str, str]  # name of a node -> number type of the kernel that ran it: "int8", "fp32", "bf16"

INT8_KERNELS = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
PRECISIONS = {"u8": "int8", "i8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}


class Graph(ABC):
    """One graph, ready to run: inputs in the graph's order to outputs in the graph's order, which belong to the caller."""

    @abstractmethod
    def __call__(self, inputs: Arrays) -> list[NDArray[Any]]: ...

    @abstractmethod
    def profile(self, inputs: Arrays) -> tuple[list[NDArray[Any]], Kinds]:
        """Run it once; answer the outputs, and what the engine says of its multiplying kernels."""


# An x86 CPU without VNNI adds two products of u8 and s8 in 16 bits, where they saturate. Told this, ONNX Runtime turns weights
# into u8, whose kernels widen first. It does so on some CPUs with VNNI too (ONNX Runtime 1.32, AVX512-VNNI without AVX-VNNI), which
# gain nothing and take more than twice as long: they are not told.
EXACT_INT8 = ("session.x64quantprecision", "1")
# This pass of ONNX Runtime also quantizes the weights of a layer that was kept in float between two Q/DQ pairs.
WEIGHT_BIAS = "WeightBiasQuantization"
INEXACT = "Attempt to replace the existing tensor"  # so ONNX Runtime 1.32 fails at some graphs of its own quantizer then


class OnnxRuntimeGraph(Graph):
    """A session of ONNX Runtime on ``threads`` threads (0: every core).

    ``run`` with a plain dictionary: IO binding, with OrtValues bound once, was at most 2 us of 50 faster at batch 1, a fixed batch
    in the graph not at all. ``float_biases``: the graph leaves biases in float, and they are to be quantized as for anybody; the
    pass that does so (``WEIGHT_BIAS``) is off otherwise. Its INT8 is exact on every CPU (``EXACT_INT8``).
    """

    def __init__(self, body: bytes, threads: int, float_biases: bool = False) -> None:
        self._body, self._threads, self._float_biases = body, threads, float_biases
        self._session = self._made()
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]

    def __call__(self, inputs: Arrays) -> list[NDArray[Any]]:
        try:
            return self._session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))  # type: ignore[no-any-return]
        except Exception as error:  # shapes are looked at only now: its own words for them take several lines
            for port, given in zip(self._session.get_inputs(), inputs, strict=False):
                known = [isinstance(d, int) for d in port.shape]
                if len(known) != given.ndim or any(k and d != n for k, d, n in zip(known, port.shape, given.shape, strict=True)):
                    raise UsageError(f"an input of shape {given.shape} where the graph takes {tuple(port.shape)}") from error
            raise

    def profile(self, inputs: Arrays) -> tuple[list[NDArray[Any]], Kinds]:
        with tempfile.TemporaryDirectory() as folder:
            session = self._made(f"{folder}/profile")
            out = session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))
            events = json.loads(Path(session.end_profiling()).read_text())
        kernels = (e for e in events if e.get("cat") == "Node" and e["args"].get("op_name") in INT8_KERNELS)
        # ONNX Runtime keeps a layer's name on the kernel that replaces it, with a suffix of its own.
        return out, {re.sub(r"(_token_\d+)?_kernel_time$", "", event["name"]): "int8" for event in kernels}

    def _made(self, profile: str = "") -> Any:
        try:
            return self._session_of(profile, exact=True)
        except Exception as error:
            if INEXACT not in str(error):
                raise
            warnings.warn(
                "ONNX Runtime fails to make products of this graph exact on this CPU without VNNI (a tensor is turned into u8 twice): "
                "its INT8 saturates here",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._session_of(profile, exact=False)

    def _session_of(self, profile: str, exact: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        if exact and not cpu.has_any(cpu.VNNI):
            options.add_session_config_entry(*EXACT_INT8)
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        session = onnxruntime.InferenceSession(
            self._body, options, providers=["CPUExecutionProvider"],
            disabled_optimizers=[] if self._float_biases else [WEIGHT_BIAS],
        )  # fmt: skip
        if session.get_providers() != ["CPUExecutionProvider"]:
            raise AnytimeError(f"ONNX Runtime chose {session.get_providers()}, not the CPU: its rows would carry the wrong name")
        return session


class OpenVINOGraph(Graph):
    """A model of OpenVINO on ``threads`` threads (0: every core), what is not quantized in ``precision``.

    The precision is always said: where the CPU has bfloat16, OpenVINO's own default is that. Batch 1 is compiled for its shape,
    which is 10 % faster than the model of any batch that runs the others. One request each, whose inputs are bound once and
    copied into: handing arrays to ``infer`` costs 50 us a call, this 1 us. So threads take turns.
    """

    def __init__(self, body: bytes, threads: int, precision: Literal["f32", "bf16"] = "f32") -> None:
        import openvino

        self._core = openvino.Core()
        self._body = body
        self._core.read_model(body)  # a file that is none must fail here
        self._options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # a board says where its processes run
            # Its compiler of element-wise code rounds ties otherwise than its own quantizer, and runs only on fixed shapes: a
            # sample would be another one alone than in a batch. It costs nothing to do without.
            "SNIPPETS_MODE": "DISABLE",
        }
        self._lock = threading.Lock()
        self._single: _Request | None = None
        self._any: _Request | None = None

    def __call__(self, inputs: Arrays) -> list[NDArray[Any]]:
        with self._lock:
            return self._request(len(inputs[0])).run(inputs)

    def profile(self, inputs: Arrays) -> tuple[list[NDArray[Any]], Kinds]:
        out, request = self(inputs), self._request(len(inputs[0]))
        kinds: Kinds = {}
        for op in request.compiled.get_runtime_model().get_ordered_ops():
            said = op.get_rt_info()
            kind = PRECISIONS.get(said["runtimePrecision"].astype(str))
            if kind is not None and said["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul"):
                # It appends to a layer's name what it split off it, and lists what it fused into it.
                names = (op.get_friendly_name(), *said["originalLayersNames"].astype(str).split(","))
                kinds |= {name.partition("/")[0]: kind for name in names}
        return out, kinds

    def _request(self, batch: int) -> _Request:
        if batch == 1:
            self._single = self._single or self._made(1)
            return self._single
        self._any = self._any or self._made(None)
        return self._any

    def _made(self, batch: int | None) -> _Request:
        model = self._core.read_model(self._body)
        if batch is not None:
            model.reshape({port: [batch, *port.get_partial_shape()[1:]] for port in model.inputs})
        return _Request(self._core.compile_model(model, "CPU", self._options))


class _Request:
    """An infer request and the memory of its inputs."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._inputs: list[NDArray[Any]] = []

    def run(self, inputs: Arrays) -> list[NDArray[Any]]:
        bound = self._inputs
        if not bound or len(bound[0]) != len(inputs[0]):
            bound = self._bind(inputs)
        for own, given in zip(bound, inputs, strict=True):
            if own.shape != given.shape:  # numpy would repeat the smaller one
                raise UsageError(f"an input of shape {given.shape} where the graph takes {own.shape}")
            np.copyto(own, given, casting="no")
        out = list(self._request.infer().values())  # copies: the request's own memory is written over
        if any(len(o) != len(inputs[0]) for o in out):  # out of memory it says nothing, and gives what it had answered before
            self._inputs = []
            raise MemoryError(f"OpenVINO has no memory for {len(inputs[0])} samples at once: give fewer")
        return out

    def _bind(self, inputs: Arrays) -> list[NDArray[Any]]:
        self._inputs = []  # memory that a new shape, or one that fails, takes away
        for i, port in enumerate(self.compiled.inputs):
            if port.get_partial_shape().is_dynamic:
                self._request.get_input_tensor(i).shape = [len(inputs[i]), *port.get_partial_shape()[1:].to_shape()]
        self._inputs = [self._request.get_input_tensor(i).data for i in range(len(self.compiled.inputs))]
        return self._inputs
