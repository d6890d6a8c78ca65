"""A chain that TensorFlow Lite's interpreter executes: one flat file and one interpreter per segment."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from anytime.backend import BitMap, Bits, Deployable, Segment, links, save_links
from anytime.metrics import Floats
from anytime.model import AnytimeModel
from anytime.tf import tensorflow

MULTIPLIERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
SAME_GRID = 1e-5  # two scales that differ by less, relatively, are one


class Port(NamedTuple):
    """Where a tensor enters or leaves an interpreter: integers are (values - zero_point) * scale, floats have scale 0."""

    tensor: int
    scale: float
    zero_point: int


def moved(values: NDArray[Any], have: Port | None, want: Port | None) -> NDArray[Any]:
    """Values of one port as another one takes them (None: floats); as they are, where both have one grid."""
    here, there = have.scale if have else 0.0, want.scale if want else 0.0
    if abs(here - there) <= SAME_GRID * there and (have.zero_point if have else 0) == (want.zero_point if want else 0):
        return values
    if have and here:
        values = (values.astype(np.float32) - np.float32(have.zero_point)) * np.float32(here)
    if want and there:
        counts = values * np.float32(1 / there) + np.float32(want.zero_point)
        values = np.clip(np.rint(counts), -128, 127).astype(np.int8)
    return values


class TFLiteNet(Deployable):
    """One interpreter per segment, made when it is first asked for.

    ``flat`` writes the file of a segment: its inputs x_0, x_1 ... are the state's tensors, its outputs out_0, out_1 ... the
    logits, if it has a head, then the state. ``bits`` None: read back from the files. States of integers cross segments as they
    are where both have one grid, else they are rounded again on the host. Integer logits come home as float32 on their
    grid of 256 values.
    """

    format = "tflite"
    execution = "TFLite"
    simulated = False

    def __init__(self, twin: AnytimeModel, bits: BitMap | None, flat: Callable[[Segment], bytes], facts: dict[str, str]) -> None:
        self.twin, self.facts = twin, facts
        self._write = flat
        self._threads = 1
        self._files: dict[Segment, bytes] = {}
        self._engines: dict[Segment, _Engine] = {}
        self.bits = self._read_bits() if bits is None else dict(bits)

    def __getstate__(self) -> dict[str, Any]:
        # Interpreters cannot be pickled; files can, and a process that times links shall not have to convert them.
        for segment in links(self):
            self._file(segment)
        return {**self.__dict__, "_engines": {}}

    def open(self, threads: int) -> None:
        if threads != self._threads:
            self._threads, self._engines = threads, {}
        for segment in self.plan(range(self.n_exits)):
            self._engine(segment)

    def start(self, x: Floats) -> list[NDArray[Any]]:
        rows = np.asarray(x, dtype=np.float32)
        return [np.ascontiguousarray(rows.transpose(0, 2, 3, 1) if rows.ndim == 4 else rows)]

    def step(self, segment: Segment, state: list[NDArray[Any]]) -> tuple[Any, Floats | None]:
        engine = self._engine(segment)
        entering = [None] if segment.fresh(self.restarts) else self._between(segment.first)
        out = engine.run([moved(v, have, want) for v, have, want in zip(state, entering, engine.inputs, strict=True)])
        logits = None if segment.head is None else moved(out.pop(0), engine.outputs[0], None)
        if logits is not None and self.restarts:
            return state, logits
        left = engine.outputs[len(engine.outputs) - len(out) :]
        between = self._between(segment.stop) if out else []
        return [moved(v, have, want) for v, have, want in zip(out, left, between, strict=True)], logits

    def _between(self, k: int) -> list[Port]:
        """The grids on which states wait before stage k: those of the segment of all plans that reads them."""
        alone = self.restarts or k == self.n_exits
        return self._engine(Segment(k, k, k - 1) if alone else Segment(k, k + 1, k)).inputs

    def save(self, folder: Path) -> list[Path]:
        return save_links(self, folder, "tflite", self._file)

    def executed(self, x: Floats) -> dict[str, str]:
        """As the interpreter lists its operators: "int8" where weights are 8-bit integers (of activations in float it
        rounds each batch by itself). A layer that it does not list by name is left out."""
        return {layer: "int8" if weight == "int8" else "fp32" for layer, weight in self._weights().items()}

    def _read_bits(self) -> BitMap:
        known = {"int8": Bits(8, 8), "float16": Bits(16, 32)}
        return {layer: known[weight] for layer, weight in self._weights().items() if weight in known}

    def _weights(self) -> dict[str, str]:
        """Layer path -> number type of its weight in the file, in the order of the chain."""
        layers = [name for name, m in self.twin.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        found: dict[str, str] = {}
        for segment in self.plan(range(self.n_exits)):
            found |= self._engine(segment).weights(set(layers))
        return {name: found[name] for name in layers if name in found}

    def _file(self, segment: Segment) -> bytes:
        if segment not in self._files:
            self._files[segment] = self._write(segment)
        return self._files[segment]

    def _engine(self, segment: Segment) -> _Engine:
        if segment not in self._engines:
            self._engines[segment] = _Engine(self._file(segment), self._threads)
        return self._engines[segment]


class _Engine:
    """One interpreter, at the batch size that it was last given."""

    def __init__(self, file: bytes, threads: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its place will be another package
            self.interpreter = tensorflow().lite.Interpreter(model_content=file, num_threads=threads)
        self.interpreter.allocate_tensors()
        runner = self.interpreter.get_signature_runner()
        self.inputs = _ports(runner.get_input_details())
        self.outputs = _ports(runner.get_output_details())
        self.batch = 1

    def run(self, given: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """What the segment makes of tensors on its own grids."""
        if len(given[0]) != self.batch:
            self.batch = len(given[0])
            for port, values in zip(self.inputs, given, strict=True):
                self.interpreter.resize_tensor_input(port.tensor, values.shape)
            self.interpreter.allocate_tensors()
        for port, values in zip(self.inputs, given, strict=True):
            self.interpreter.set_tensor(port.tensor, values)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(port.tensor) for port in self.outputs]

    def weights(self, layers: set[str]) -> dict[str, str]:
        """Layer path -> number type of its weight, from the names of what its operator reads."""
        tensors = {t["index"]: t for t in self.interpreter.get_tensor_details()}
        made = {i: op for op in self.interpreter._get_ops_details() if op["op_name"] == "DEQUANTIZE" for i in op["outputs"]}
        found = {}
        for op in self.interpreter._get_ops_details():
            if op["op_name"] in MULTIPLIERS:
                weight = op["inputs"][1]
                names = [part for i in op["inputs"][1:] if i in tensors for part in re.split("[/;]", tensors[i]["name"])]
                layer = next((name for name in names if name in layers), None)
                if layer is not None:
                    stored = made[weight]["inputs"][0] if weight in made else weight
                    found[layer] = np.dtype(tensors[stored]["dtype"]).name
        return found


def _ports(details: dict[str, Any]) -> list[Port]:
    """In the order of their numbers."""
    ordered = [details[name] for name in sorted(details, key=lambda name: int(name.rpartition("_")[2]))]
    return [Port(d["index"], *d["quantization"]) for d in ordered]
