"""TensorRT on a board: graphs in FP32, FP16 or INT8 from which the board builds its engines; torch2trt for older JetPacks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from anytime.backend import FP32, Backend, BitMap, Bits, Deployable, Segment, Target, TorchNet, fake_quant_net
from anytime.dataset import Part
from anytime.errors import Unsupported, UsageError
from anytime.metrics import Floats
from anytime.model import AnytimeModel
from anytime.onnx_net import OnnxNet, missing
from anytime.peer import Calibration
from anytime.quant.fake import QuantizedLayer, check_tensors
from anytime.quant.graph import Widths, prepared
from anytime.quant.onnx_graph import OnnxChain
from anytime.quant.place import tensorrt_exclusions
from anytime.quant.tensorrt import for_tensorrt, one_sample
from anytime.quant.tensorrt_ranges import OBSERVERS, Calibrator, graph_scales, tensor_scales
from anytime.quant.trace import traced
from anytime.train import Trainer

Precision = Literal["", "fp32", "fp16", "int8"]
DEVICE = "cuda"  # where torch2trt builds and runs
LAST_WITH_FLAGS = 10  # TensorRT 11 has neither calibrators nor precision flags
LOGITS = "here ONNX Runtime runs the graphs that TensorRT is given; what TensorRT itself answers is in the board's records"


class TensorRTNet(OnnxNet):
    """Segments for engines that are built on a board; on this machine ONNX Runtime answers in their place, for scores.

    ``precision``: the lowest number type of the graphs, what trtexec's command line is made of. ``calibrated``: they are float and
    come with the scale of every activation, for a calibrator.
    """

    format = "tensorrt"
    execution = "TensorRT graph, scored by ONNX Runtime"  # until a board has answered

    def __init__(
        self, twin: AnytimeModel, bits: BitMap, graph: Callable[[Segment], bytes], facts: dict[str, str], precision: str,
        calibrated: Callable[[Segment], dict[str, bytes]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(twin, bits, graph, facts)
        self.precision, self._calibrated = precision, calibrated

    @property
    def calibrated(self) -> bool:
        """Whether its engines are built with a calibration cache."""
        return self._calibrated is not None

    def files(self, segment: Segment) -> dict[str, bytes]:
        """What a board needs of one segment: "onnx", for batch 1, and "scales.json" (tensor -> scale) for a calibrator."""
        import onnx

        if self._calibrated is not None:
            return self._calibrated(segment)
        return {"onnx": one_sample(onnx.ModelProto.FromString(self.graph(segment))).SerializeToString()}

    def save(self, folder: Path) -> list[Path]:
        """Write the files of every link, under the names of a bundle's segments."""
        paths = []
        for segment in self.plan(range(self.n_exits)):
            for kind, body in self.files(segment).items():
                paths.append(folder / f"link_{segment.head}.{kind}")
                paths[-1].write_bytes(body)
        return paths

    def executed(self, x: Floats) -> None:  # type: ignore[override]
        """None: what an engine runs is in the board's layer information."""


@dataclass(frozen=True)
class TensorRT(Backend):
    """What ``of`` makes, as one static graph per segment, batch 1, from which a board with TensorRT 8.0 to 11 builds its engines.

    ``precision``, "fp32", "fp16" or "int8", is the lowest in the graph; "": int8 where ``of`` has integers, else fp32. FP16 is
    written as Casts. INT8 are the ranges of ``PTQ(8)`` or ``QAT(8)``, symmetric, in Q/DQ pairs where TensorRT fuses them, and what they
    leave out is in FP16. With ``calibrator``, for ``Float32()`` and TensorRT up to 10, the graph stays float and TensorRT itself
    chooses what it runs in INT8, on the ranges that its calibrator of that name would find ("entropy2", "minmax"), which we
    write for it; the twin then has integers where Q/DQ would stand.
    Never executed where this was written: no TensorRT can be had there; the graphs are held against its rules (quant/tensorrt_rules.py).
    Source: NVIDIA TensorRT documentation, "Explicit quantization" and "Implicit quantization"; Migacz, GTC 2017, S7310.
    """

    of: Backend
    precision: Precision = ""
    calibrator: Literal["", "entropy2", "minmax"] = ""

    @property
    def column(self) -> str:
        if self.calibrator:
            return f"INT8 {self.calibrator}"
        return "FP16" if self.precision == "fp16" else self.of.column

    def why_not(self) -> str | None:
        return missing() or self.of.why_not()

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "s8s8") -> Deployable:
        inner = self.of.compress(model, calib, trainer, "s8s8")
        if not isinstance(inner, TorchNet) or inner.dtype != torch.float32 or inner.execution not in ("torch", "fake-quant"):
            raise Unsupported(
                f"TensorRT takes Float32(), PTQ(8) or QAT(8), not {self.of.label} ({inner.execution}): FP16 is precision='fp16'"
            )
        odd = sorted({f"W{b.weight}A{b.activation}" for b in inner.bits.values() if b != (8, 8)})
        if odd:
            raise Unsupported(
                f"TensorRT multiplies 8-bit integers, not {', '.join(odd)}: score {self.of.label} without the engine"
            )
        check_tensors(inner.twin, "TensorRT")
        integers, wanted = inner.execution == "fake-quant", self.precision
        if integers and (self.calibrator or wanted not in ("", "int8")):
            asked = f"calibrator={self.calibrator!r}" if self.calibrator else f"precision={wanted!r}"
            raise UsageError(
                f"TensorRT(of={self.of.label}) is INT8 already and cannot take {asked}: leave it out or take Float32()"
            )
        if not integers and not self.calibrator and wanted == "int8":
            raise UsageError(
                f"TensorRT(of={self.of.label}, precision='int8') has no ranges: take PTQ(8), QAT(8) or calibrator='entropy2'"
            )
        if self.calibrator and wanted not in ("", "int8"):
            raise UsageError(
                f"TensorRT: calibrator={self.calibrator!r} is for INT8, not precision={wanted!r}; leave one of them out"
            )
        shape = tuple(calib.x.shape[1:])
        facts = {k: v for k, v in inner.facts.items() if k != "simulated"} | {"logits": LOGITS}
        if self.calibrator:
            return _calibrated(inner.twin, calib, self.calibrator, shape, facts)
        fp16 = integers or wanted == "fp16"
        twin = _half_weights(inner.twin) if fp16 else inner.twin
        bits = {**inner.bits, **(_sixteen(twin) if fp16 else {})}
        chain = twin if integers else traced(twin)
        net = TensorRTNet(
            twin, bits, partial(_written, chain, shape, fp16), facts, "int8" if integers else "fp16" if fp16 else "fp32"
        )
        net.sqnr = inner.sqnr
        return net


def _written(chain: AnytimeModel, shape: tuple[int, ...], fp16: bool, segment: Segment) -> bytes:
    graph = OnnxChain(chain, shape, int_bias=False).write(segment)
    return bytes(for_tensorrt(graph, fp16).SerializeToString())


def _calibrated(
    model: AnytimeModel, calib: Part, calibrator: Calibrator, shape: tuple[int, ...], facts: dict[str, str]
) -> TensorRTNet:
    """A float network with the ranges of everything in it."""
    observer, chain = OBSERVERS[calibrator], traced(model)
    net = prepared(model, calib.x, Widths(8, 8), "s8s8", observer, "minmax", tensorrt_exclusions(chain))
    twin = fake_quant_net(net, "s8s8")
    facts = facts | {k: v for k, v in twin.facts.items() if k != "simulated"}
    facts["integers"] = "TensorRT chooses them; the twin has them where Q/DQ pairs would stand"
    files = partial(_calibrated_files, chain, shape, tensor_scales(chain, calib.x, observer))
    return TensorRTNet(twin.twin, twin.bits, partial(_written, twin.twin, shape, False), facts, "int8", files)


def _calibrated_files(chain: AnytimeModel, shape: tuple[int, ...], known: dict[str, float], segment: Segment) -> dict[str, bytes]:
    graph = OnnxChain(chain, shape, int_bias=False).write(segment)
    scales = _scales(chain, shape, known, segment)
    return {"onnx": one_sample(graph).SerializeToString(), "scales.json": json.dumps(scales, indent=1).encode()}


def _scales(chain: AnytimeModel, shape: tuple[int, ...], known: dict[str, float], segment: Segment) -> dict[str, float]:
    """Scale of every activation in the graph of a segment."""
    write = OnnxChain(chain, shape, int_bias=False).write
    entering = [known["x"]]
    if not segment.fresh(chain.restarts):
        before = Segment(0, segment.first, None)
        made = _scales(chain, shape, known, before)
        entering = [made[out.name] for out in write(before).graph.output]
    return graph_scales(write(segment).graph, known, entering)


def _half_weights(model: AnytimeModel) -> AnytimeModel:
    """A copy in which what TensorRT keeps in FP16 is rounded to it."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and not isinstance(m, QuantizedLayer):
            for values in (*m.parameters(recurse=False), *m.buffers(recurse=False)):
                if values.is_floating_point():
                    values.data.copy_(values.data.half())
    return model


def _sixteen(model: AnytimeModel) -> BitMap:
    kinds = (nn.Conv2d, nn.Linear)
    return {path: Bits(16, 16) for path, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, QuantizedLayer)}


@dataclass(frozen=True)
class Torch2TRT(Backend):
    """The float network converted link by link by NVIDIA's torch2trt, on a machine that has it: JetPack 4 to 6, TensorRT up to 10.

    The fields are its keyword arguments, with its own defaults. ``int8_calib_algorithm``: "entropy2", which it means to have by default
    (comparing versions as text, it takes an older one from TensorRT 10 on), or "minmax"; it calibrates each link on what
    enters it in calibration, one sample at a time. States of several tensors are Unsupported.
    Never executed where this was written.
    Source: NVIDIA-AI-IOT/torch2trt v0.5.0, torch2trt/torch2trt.py; v0.4.0 takes the same arguments.
    """

    fp16_mode: bool = False
    int8_mode: bool = False
    int8_calib_algorithm: Calibrator = "entropy2"
    max_workspace_size: int = 1 << 25
    strict_type_constraints: bool = False
    max_batch_size: int = 1

    @property
    def column(self) -> str:
        return f"INT8 {self.int8_calib_algorithm}" if self.int8_mode else "FP16" if self.fp16_mode else "FP32"

    def why_not(self) -> str | None:
        if find_spec("tensorrt") is None:
            return "tensorrt is not installed here: torch2trt runs on a Jetson with JetPack 4 to 6, or use TensorRT(of=...)"
        import tensorrt

        if int(tensorrt.__version__.split(".")[0]) > LAST_WITH_FLAGS:
            return (
                f"torch2trt cannot work on TensorRT {tensorrt.__version__}, which has neither BuilderFlag.FP16 and INT8 nor "
                "IInt8Calibrator any more: use TensorRT(of=...)"
            )
        if find_spec("torch2trt") is None:
            return (
                "torch2trt is not installed here, and PyPI does not have it: install it from github.com/NVIDIA-AI-IOT/torch2trt"
            )
        if not torch.cuda.is_available():
            return "torch2trt needs CUDA, and torch sees none here"
        return None

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "s8s8") -> Deployable:
        import tensorrt
        from torch2trt import torch2trt

        algorithms = {"entropy2": "ENTROPY_CALIBRATION_2", "minmax": "MINMAX_CALIBRATION"}
        said: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        said["int8_calib_algorithm"] = getattr(tensorrt.CalibrationAlgoType, algorithms[self.int8_calib_algorithm])
        given, chain = Calibration(traced(model), calib.x), traced(model)

        def convert(link: nn.Module, entering: Any, name: str) -> nn.Module:
            if not isinstance(entering, torch.Tensor):
                raise Unsupported(f"{name}: torch2trt takes one tensor between stages, this network hands on {len(entering)}")
            samples = [[sample.contiguous().to(DEVICE)] for sample in entering]
            example = [entering[: self.max_batch_size].contiguous().to(DEVICE)]
            data = {"int8_calib_dataset": samples} if self.int8_mode else {}
            return cast(nn.Module, torch2trt(link.to(DEVICE), example, **said, **data))

        stages, heads = [], []
        for k in range(chain.n_exits):
            before, behind = given.entering(Segment(k, k + 1, None)), given.entering(Segment(k + 1, k + 1, None))
            stages.append(convert(chain.stages[k], before, f"stages.{k}"))
            heads.append(convert(chain.heads[k], behind, f"heads.{k}"))
        bits = Bits(8, 8) if self.int8_mode else Bits(16, 16) if self.fp16_mode else FP32
        layers = [path for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        twin = copy.deepcopy(model).eval()
        facts = {
            "library": "torch2trt", "tensorrt": str(tensorrt.__version__), "twin": "the float network: TensorRT's grids are not read back",
            "batch": f"at most {self.max_batch_size}",
        }  # fmt: skip
        return Torch2TRTNet(twin, dict.fromkeys(layers, bits), facts, stages, heads)


class Torch2TRTNet(TorchNet):
    """Links as engines that torch2trt has built, on the GPU; its twin is the float network."""

    format = "torch2trt"

    def __init__(
        self, twin: AnytimeModel, bits: BitMap, facts: dict[str, str], stages: Sequence[nn.Module], heads: Sequence[nn.Module]
    ) -> None:
        super().__init__(twin, bits, simulated=False, execution="torch2trt", facts=facts)
        self._stages, self._heads = list(stages), list(heads)

    def start(self, x: Floats) -> Any:
        return super().start(x).to(DEVICE)

    @torch.inference_mode()
    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        entered = state
        for k in segment.stages(self.restarts):
            state = self._stages[k](state)
        if segment.head is None:
            return state, None
        logits = self._heads[segment.head](state).float().cpu().numpy()
        return (entered if self.restarts else state), logits

    def save(self, folder: Path) -> list[Path]:
        """Write the state of every engine, as torch2trt's TRTModule reads it back."""
        paths = []
        for kind, links in (("stage", self._stages), ("head", self._heads)):
            for k, link in enumerate(links):
                paths.append(folder / f"{kind}_{k}.pth")
                torch.save(link.state_dict(), paths[-1])
        return paths
