"""TensorFlow Lite: its converter and its interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import fx

from anytime import peer
from anytime.backend import Backend, Deployable, Segment, Target, TorchNet
from anytime.dataset import Part
from anytime.errors import Unsupported
from anytime.keras_chain import KerasChain
from anytime.keras_layers import channels_last
from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant, check_tensors
from anytime.quant.onnx_graph import OnnxChain
from anytime.quant.ranges import affine
from anytime.quant.trace import traced
from anytime.tf import missing
from anytime.tflite_net import TFLiteNet
from anytime.train import Trainer

Form = Literal["int8", "fp32", "fp16", "dynamic"]
_FORMS = {"int8": "INT8 TFLite PTQ", "fp32": "FP32", "fp16": "FP16 TFLite", "dynamic": "INT8 TFLite dynamic"}


@dataclass(frozen=True)
class TFLite(Backend):
    """What ``of`` makes, converted by TensorFlow and executed by its interpreter (XNNPACK) on the CPU.

    Of a float network: "int8" is the converter's own calibration, on the float states of the calibration part; "dynamic" has
    8-bit weights and rounds activations while it runs; "fp16" stores weights in half and multiplies in FP32. Of a network
    that is rounded to 8 bits already (QKeras, QAT, PTQ) "int8" takes over its grids, and the range of the logits that the
    calibration part shows: TFLite's logits are integers too. It rounds weights by each channel's largest: of a network that
    does otherwise (PTQ's "mse") some weights move by a part of a step.
    Source: Jacob et al., CVPR 2018, arXiv:1712.05877; TensorFlow 2.21, tf.lite.TFLiteConverter.
    """

    of: Backend
    form: Form = "int8"

    @property
    def column(self) -> str:
        return _FORMS[self.form] if self.of.column == "FP32" else self.of.column

    def why_not(self) -> str | None:
        return missing() or self.of.why_not()

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        inner = self.of.compress(model, calib, trainer, "u8s8")
        if not isinstance(inner, TorchNet) or inner.format != "torch":
            raise Unsupported(f"{self.of.label} brings its own graphs and engine ({inner.execution}): leave TFLite out")
        odd = {b for b in inner.bits.values() if b != (8, 8)}
        if odd or (inner.bits and self.form != "int8"):
            said = ", ".join(sorted({f"W{b.weight}A{b.activation}" for b in inner.bits.values()}))
            raise Unsupported(
                f"TFLite's integer kernels here are W8A8 and its other forms begin from FP32: not form={self.form!r} of {said}; "
                f"score {self.of.label} without the engine"
            )
        check_tensors(inner.twin, "TFLite")
        chain = inner.twin if inner.bits else traced(inner.twin)
        about = {"library": f"TensorFlow {version('tensorflow')}", "form": self.form}
        if not inner.bits and self.form in ("int8", "dynamic"):
            about["twin"] = "the float network: the converter's own grids are not read back"
        facts = about | {k: v for k, v in inner.facts.items() if k != "simulated"}
        net = TFLiteNet(inner.twin, None, Converter(chain, calib.x, self.form), facts)
        if inner.bits and (more := sorted(set(net.bits) - set(inner.bits))):
            raise Unsupported(
                f"TFLite's converter also quantizes what was left in float ({', '.join(more)}): leave keep_float out"
            )
        return net


class Converter:
    """Writes the flat file of any segment of a traced chain; x [N, C, H, W] are the samples that it is calibrated on."""

    def __init__(self, chain: AnytimeModel, x: torch.Tensor, form: Form) -> None:
        self.calibration, self.form = peer.Calibration(chain, x), form
        self.rounded = any(isinstance(m, FakeQuant) for m in chain.modules())
        self._keras: KerasChain | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keras": None}

    @property
    def keras(self) -> KerasChain:
        """The chain in Keras, logits rounded where the rest is."""
        if self._keras is None:
            chain = self.calibration.chain
            self._keras = KerasChain(
                _logits_rounded(chain, self.calibration.x) if self.rounded else chain, tuple(self.calibration.x.shape[1:])
            )
        return self._keras

    def __call__(self, segment: Segment) -> bytes:
        keras, states = self.keras, [channels_last(s) for s in peer.tensors(self.calibration.entering(segment))]
        grids: list[FakeQuant | None] = [None] * len(states)
        if self.rounded and not segment.fresh(keras.chain.restarts):
            described = OnnxChain(self.calibration.chain, tuple(self.calibration.x.shape[1:]), int_bias=True).states
            grids = list(_grids(described[segment.first]))

        def samples() -> Iterator[dict[str, np.ndarray]]:
            for i in range(len(states[0])):
                yield {f"x_{j}": s[i : i + 1].contiguous().numpy() for j, s in enumerate(states)}

        with peer.library("TensorFlow's converter", segment):
            tf, model = keras.tf, keras.segment(segment)

            def run(**given: Any) -> dict[str, Any]:
                xs = [given[f"x_{j}"] for j in range(len(states))]
                xs = [x if q is None else keras.quantizer(q, "state", x) for x, q in zip(xs, grids, strict=True)]
                out = tf.nest.flatten(model(xs[0] if len(xs) == 1 else xs))
                return {f"out_{j}": o for j, o in enumerate(out)}

            specs = {f"x_{j}": tf.TensorSpec((1, *s.shape[1:]), tf.float32, f"x_{j}") for j, s in enumerate(states)}
            converter = tf.lite.TFLiteConverter.from_concrete_functions([tf.function(run).get_concrete_function(**specs)], model)
            if self.form != "fp32":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if self.form == "fp16":
                converter.target_spec.supported_types = [tf.float16]
            if self.form == "int8":
                converter.inference_input_type = converter.inference_output_type = tf.int8
                if not self.rounded:
                    converter.representative_dataset = samples
            return bytes(converter.convert())


def _grids(described: Any) -> Iterator[FakeQuant | None]:
    """The quantizers of a state, as OnnxChain describes it."""
    if isinstance(described, list):
        for part in described:
            yield from _grids(part)
    else:
        yield described[1]


def _logits_rounded(chain: AnytimeModel, x: torch.Tensor) -> AnytimeModel:
    """A copy whose heads round their logits to the 256 values between the extremes that x gives."""
    chain = traced(chain)
    with torch.inference_mode():
        logits = torch.cat([chain(part) for part in torch.split(x, 256)], 1)
    for head, z in zip(chain.heads, logits, strict=True):
        assert isinstance(head, fx.GraphModule)
        q = FakeQuant(8, signed=False, name="logits")
        q.set(affine(float(z.min()), float(z.max()), 8))
        head.add_module("quant_logits", q)
        output = head.graph.output_node()
        with head.graph.inserting_before(output):
            output.args = (head.graph.call_module("quant_logits", (output.args[0],)),)
        head.recompile()
    return chain
