"""ONNX Runtime on the CPU: float graphs, and 8-bit Q/DQ graphs for real."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from anytime.backend import INT8_WIDTHS, Backend, Deployable, Target, TorchNet
from anytime.dataset import Part
from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.onnx_net import OnnxNet, missing, written
from anytime.quant.fake import check_tensors
from anytime.quant.trace import traced
from anytime.train import Trainer


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """What ``of`` makes, executed by ONNX Runtime on the CPU: FP32 graphs, or INT8 with u8 activations and s8 weights.

    Its answers are the same on every x86 CPU; one without VNNI runs slower kernels for it (EXACT_INT8 in anytime/engine.py).
    Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 13; ONNX Runtime's documentation, "Quantize ONNX
    models", section "Method selection" (u8s8 on x86).
    """

    of: Backend

    @property
    def column(self) -> str:
        return self.of.column

    def why_not(self) -> str | None:
        return missing() or self.of.why_not()

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        inner = self.of.compress(model, calib, trainer, "u8s8")
        if not isinstance(inner, TorchNet) or inner.format != "torch":
            raise Unsupported(f"{self.of.label} brings its own graphs and engine ({inner.execution}): leave OnnxRuntime out")
        odd = set(inner.bits.values()) - INT8_WIDTHS
        if odd:
            said = ", ".join(sorted(f"W{b.weight}A{b.activation}" for b in odd))
            raise Unsupported(
                f"ONNX Runtime's CPU kernels here are FP32, W8A8 and W7A8, not {said}: score {self.of.label} without the engine"
            )
        check_tensors(inner.twin, "ONNX Runtime")
        chain = inner.twin if inner.bits else traced(inner.twin)
        graph = partial(written, chain, tuple(calib.x.shape[1:]), channels_last=True)
        net = OnnxNet(inner.twin, inner.bits, graph, {k: v for k, v in inner.facts.items() if k != "simulated"})
        net.sqnr = inner.sqnr
        return net
