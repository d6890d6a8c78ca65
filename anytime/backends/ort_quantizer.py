"""ONNX Runtime's own quantizer, as a peer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from anytime import peer
from anytime.backend import Backend, Deployable, Segment, Target
from anytime.dataset import Part
from anytime.model import AnytimeModel
from anytime.onnx_net import OnnxNet, missing, written
from anytime.quant.trace import traced
from anytime.train import Trainer


@dataclass(frozen=True)
class OrtQuantizer(Backend):
    """quantize_static after quant_pre_process on our float graph of every segment, executed by ONNX Runtime.

    Calibrated on the float states that enter the segment. Defaults are the library's, but for the activations: unsigned
    on "u8s8", which its documentation advises on x86 and the one choice whose convolutions run in 8 bits there, and
    the library's own default, signed, on "s8s8". ``percentile`` is read by the observer of that name. "entropy" has 128
    bins for 128 levels in this library, so it cuts nothing off. Both hold every activation of every sample in memory
    (ResNet-20: 2 MB a sample). ``keep_float``: layers left out, by path.
    Source: ONNX Runtime 1.31, onnxruntime.quantization; its documentation, "Quantize ONNX models".
    """

    observer: Literal["minmax", "entropy", "percentile"] = "minmax"
    percentile: float = 99.999
    per_channel: bool = False
    reduce_range: bool = False
    keep_float: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        return "INT8 ORT"

    def why_not(self) -> str | None:
        return missing()

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        calibration = peer.Calibration(traced(model), calib.x)
        calibration.check_layers(self.keep_float)
        graph = partial(self._graph, calibration, target)
        return peer.alive(OnnxNet(calibration.chain, None, graph, peer.facts(self, "onnxruntime") | {"target": target}), calib)

    def _graph(self, calibration: peer.Calibration, target: Target, segment: Segment) -> bytes:
        float_graph = written(calibration.chain, tuple(calibration.x.shape[1:]), segment)
        states = [t.numpy() for t in peer.tensors(calibration.entering(segment))]
        with peer.library("ONNX Runtime's quantizer", segment), tempfile.TemporaryDirectory() as folder:
            import onnx
            from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
            from onnxruntime.quantization.shape_inference import quant_pre_process

            plain, ready, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "done"))
            plain.write_bytes(float_graph)
            quant_pre_process(plain, ready)
            quantize_static(
                ready, done, _Reader([i.name for i in onnx.load(plain).graph.input], states),
                activation_type=QuantType.QInt8 if target == "s8s8" else QuantType.QUInt8,
                per_channel=self.per_channel, reduce_range=self.reduce_range, nodes_to_exclude=list(self.keep_float),
                calibrate_method={
                    "minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy,
                    "percentile": CalibrationMethod.Percentile,
                }[self.observer],
                extra_options={"CalibPercentile": self.percentile} if self.observer == "percentile" else {},
            )  # fmt: skip
            return done.read_bytes()


class _Reader:
    """What quantize_static asks for its next batch; batches of one size, for its histograms take no others."""

    def __init__(self, names: list[str], states: list[Any]) -> None:
        n = len(states[0])
        size = max(d for d in range(1, 65) if n % d == 0)
        self._batches = iter([dict(zip(names, (s[i : i + size] for s in states), strict=True)) for i in range(0, n, size)])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by input name; None after the last."""
        return next(self._batches, None)
