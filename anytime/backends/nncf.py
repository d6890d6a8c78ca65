"""Intel's NNCF, as a peer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

from anytime import peer
from anytime.backend import Backend, Deployable, Segment, Target
from anytime.dataset import Part
from anytime.errors import Unsupported, install
from anytime.model import AnytimeModel
from anytime.onnx_net import OnnxNet, written
from anytime.quant.trace import traced
from anytime.train import Trainer


@dataclass(frozen=True)
class NNCF(Backend):
    """nncf.quantize on our float ONNX graph of every segment, executed by ONNX Runtime.

    Calibrated on the float states that enter the segment: the first ``subset_size`` of the part, one by one. Defaults
    are the library's. ``ranges``: its RangeEstimatorParametersSet for activations. ``fast_bias_correction=False``: its slower
    and more accurate correction, on inputs that are quantized already.
    ``keep_float``: layers left out, by path. Its graphs leave biases in float: ONNX Runtime's pass that quantizes them
    is on, without it no convolution would run in 8 bits. The linear layer before the logits has no quantizer behind
    it, and ONNX Runtime runs it in float. Made for OpenVINO, which may run more in 8 bits.
    Source: NNCF 3.4, nncf.quantize, backend ONNX.
    """

    preset: Literal["performance", "mixed"] = "performance"
    subset_size: int = 300
    fast_bias_correction: bool = True
    ranges: Literal["minmax", "mean_minmax", "median_minmax", "mean_no_outliers_minmax", "mean_quantile", "histogram"] = (
        "mean_minmax"
    )
    keep_float: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        return "INT8 NNCF"

    def why_not(self) -> str | None:
        missing = [name for name in ("nncf", "onnx", "onnxruntime") if find_spec(name) is None]
        return f"{', '.join(missing)} is not installed: {install('peers')}" if missing else None

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        if target == "s8s8":
            raise Unsupported(f"NNCF chooses the integers of its graphs for CPU engines, not {target}: leave the wrapper out")
        calibration = peer.Calibration(traced(model), calib.x)
        calibration.check_layers(self.keep_float)
        net = OnnxNet(calibration.chain, None, partial(self._graph, calibration), peer.facts(self, "nncf"), float_biases=True)
        return peer.alive(net, calib)

    def _graph(self, calibration: peer.Calibration, segment: Segment) -> bytes:
        float_graph = written(calibration.chain, tuple(calibration.x.shape[1:]), segment)
        states = [t.numpy() for t in peer.tensors(calibration.entering(segment))]
        # It reports its runs over the network unless this package is missing; its own switch still writes to the home folder.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        with peer.library("NNCF", segment):
            import nncf
            import onnx
            from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
            from nncf.quantization.range_estimator import RangeEstimatorParametersSet

            graph = onnx.ModelProto.FromString(float_graph)
            names, kept = [i.name for i in graph.graph.input], [n.name for n in graph.graph.node if n.name in self.keep_float]
            samples = [dict(zip(names, (s[i : i + 1] for s in states), strict=True)) for i in range(len(states[0]))]
            ranges = getattr(RangeEstimatorParametersSet, self.ranges.upper())
            made = nncf.quantize(
                graph, nncf.Dataset(samples), preset=nncf.QuantizationPreset(self.preset), subset_size=self.subset_size,
                fast_bias_correction=self.fast_bias_correction, ignored_scope=nncf.IgnoredScope(names=kept),
                advanced_parameters=AdvancedQuantizationParameters(activations_range_estimator_params=ranges),
            )  # fmt: skip
            return bytes(made.SerializeToString())
