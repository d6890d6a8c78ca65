"""The promise every compressor keeps, and the thing that it makes."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from anytime.dataset import Part
from anytime.errors import AnytimeError, UsageError
from anytime.metrics import Floats
from anytime.model import AnytimeModel, ModelSpec
from anytime.model import Plan as Plan
from anytime.model import Segment as Segment
from anytime.quant.bits import FP32 as FP32
from anytime.quant.bits import INT8_WIDTHS as INT8_WIDTHS
from anytime.quant.bits import BitMap as BitMap
from anytime.quant.bits import Bits as Bits
from anytime.quant.bits import Target as Target
from anytime.quant.graph import Quantized, Widths
from anytime.quant.ranges import Observer
from anytime.spec import Spec
from anytime.train import Trainer

AT_ONCE = 2**21  # input values that are predicted together, so that activations of large images fit into memory


class Deployable(ABC):
    """A network in the form that a board runs. It can be pickled: boards start processes of their own."""

    format: ClassVar[str]  # what a board must be able to run: "torch", "onnx", "openvino", "tflite", "tensorrt"
    execution: str  # what really runs, as the tables say it: "torch", "ONNX Runtime", "OpenVINO", "fake-quant"
    simulated: bool  # float kernels imitate the arithmetic: scored, never timed
    needs: tuple[str, ...] = ()  # CPU flags, any one of which makes the kernels real; () needs none
    devices: tuple[str, ...] = ("cpu",)  # where it can live: on others than the CPU after ``move``
    twin: AnytimeModel  # the same arithmetic in torch: what is counted, what fidelity is judged against
    bits: BitMap
    facts: dict[str, str]  # what a reader of the record should know: exclusions, epochs, why it is simulated
    sqnr: Mapping[str, float] = {}  # layer path -> signal to quantization noise of its output in dB, where it was measured

    @property
    def n_exits(self) -> int:
        """E."""
        return self.twin.n_exits

    @property
    def restarts(self) -> bool:
        """Whether every stage starts again from the input."""
        return self.twin.restarts

    def plan(self, exits: Sequence[int]) -> Plan:
        """Segments that read just the heads of ``exits``: each a fused run of stages and its head (stages that restart: one)."""
        segments, first = [], 0
        for k in sorted(exits):
            segments.append(Segment(k if self.restarts else first, k + 1, k))
            first = k + 1
        return tuple(segments)

    def open(self, threads: int) -> None:
        """Take ``threads`` threads from now on; what runs is made when it is first asked for. Default: torch's own threads."""
        torch.set_num_threads(threads)

    @abstractmethod
    def start(self, x: Floats) -> Any:
        """x float32 [B, ...] on the host -> state 0, where the network lives."""

    @abstractmethod
    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        """State before the segment -> (state after it, its logits [B, K] float32 on the host; None without a head)."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write what a board needs to run it; size_bytes is the sum of these files."""

    def executed(self, x: Floats) -> dict[str, str] | None:
        """Layer path -> number type ("int8", "fp32" ...) of the kernel that ran it, read from the engine's profile
        of one run over x; None when the engine has no profile to read."""
        return None

    def predict(self, x: Floats, batch: int = 256) -> Floats:
        """Every exit for every sample: [N, ...] -> [E, N, K]. Of large ones fewer than ``batch`` at once.

        UsageError without samples, AnytimeError where the engine does not answer each of them.
        """
        if not len(x):
            raise UsageError("there is no sample to predict: give at least one")
        blocks, batch = [], max(1, min(batch, AT_ONCE // x[0].size))
        plan = self.plan(range(self.n_exits))
        for i in range(0, len(x), batch):
            some = x[i : i + batch]
            state, rows = self.start(some), []
            for segment in plan:
                state, logits = self.step(segment, state)
                assert logits is not None  # every segment of this plan has a head
                if len(logits) != len(some):
                    raise AnytimeError(
                        f"{self.execution} answered {len(logits)} samples of {len(some)}: give a batch under {batch}"
                    )
                rows.append(logits)
            blocks.append(np.stack(rows))
        return np.concatenate(blocks, axis=1)


def links(net: Deployable) -> list[Segment]:
    """Stage and head of every link, apart."""
    return [s for k in range(net.n_exits) for s in (Segment(k, k + 1, None), Segment(k + 1, k + 1, k))]


def save_links(net: Deployable, folder: Path, ending: str, body: Callable[[Segment], bytes]) -> list[Path]:
    """Write one file per link, stage and head as one, as ``Deployable.save`` promises."""
    paths = []
    for segment in net.plan(range(net.n_exits)):
        paths.append(folder / f"link_{segment.head}.{ending}")
        paths[-1].write_bytes(body(segment))
    return paths


class TorchNet(Deployable):
    """A Deployable that torch runs as it stands: it is its own twin."""

    format = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    device = "cpu"

    def __init__(
        self,
        twin: AnytimeModel,
        bits: BitMap,
        simulated: bool,
        execution: str = "torch",
        dtype: torch.dtype = torch.float32,
        needs: tuple[str, ...] = (),
        facts: dict[str, str] | None = None,
    ) -> None:
        self.twin, self.bits, self.simulated, self.execution = twin.eval(), dict(bits), simulated, execution
        self.dtype, self.needs, self.facts = dtype, needs, facts or {}

    def move(self, device: str) -> None:
        """Live on ``device`` from now on, images as channels_last: parameters keep their type, states stay there, logits come back.

        On "cuda" FP32 is FP32: torch's default for convolutions there, TF32, is switched off in this process.
        """
        if device == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.device = device
        self.twin.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def start(self, x: Floats) -> Any:
        state = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        if self.device == "cpu":
            return state.to(self.dtype)
        layout = torch.channels_last if state.ndim == 4 else torch.preserve_format
        return state.to(self.device, self.dtype, memory_format=layout)

    @torch.inference_mode()
    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        entered = state
        for k in segment.stages(self.restarts):
            state = self.twin.stages[k](state)
        if segment.head is None:
            if self.device == "cuda":  # kernels were only asked for; with a head its logits are waited for
                torch.cuda.synchronize()
            return state, None
        logits = self.twin.heads[segment.head](state).float().cpu().numpy()
        return (entered if self.restarts else state), logits

    def save(self, folder: Path) -> list[Path]:
        body = io.BytesIO()
        torch.save(self.twin.state_dict(), body)
        path = folder / "weights.pt"
        path.write_bytes(body.getvalue())
        return [path]


def fake_quant_net(net: Quantized, target: Target) -> TorchNet:
    """Freeze a calibrated network into one that torch runs with float kernels: scored, never timed."""
    bits = net.bits
    facts = {"simulated": "float kernels imitate the integers", "exclusions": ", ".join(net.exclusions), "target": target}
    return TorchNet(net.freeze(round_bias=target != "s8s8"), bits, simulated=True, execution="fake-quant", facts=facts)


@dataclass(frozen=True)
class Backend(Spec, ABC):
    """Makes a trained float network smaller or faster; backends wrap backends through a field ``of``."""

    own_exits: ClassVar[bool] = False  # True: what it makes has exits of its own, whatever the network's (ensembles)

    def exits_early(self, model: ModelSpec) -> bool:
        """Whether what it makes of this network has exits to choose between."""
        return model.exits_early

    @property
    def column(self) -> str:
        """What a table's column calls its arithmetic: "FP32", "INT8 PTQ"; a wrapper passes its inner one on."""
        return self.label

    def why_not(self) -> str | None:
        """Why this backend cannot run on this machine; None when it can. Must be quick."""
        return None

    @abstractmethod
    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        """Trained float model -> deployable; ``model`` is left as it was. Raises Unsupported, naming the layer.

        A wrapper passes its own target down. Trainings inside are kept by the trainer under their name, so
        one QAT under three engines trains once.
        """


@dataclass(frozen=True)
class IntegerBackend(Backend, ABC):
    """Integers of ``weight_bits`` and ``activation_bits`` in every stage and every head.

    Weights per output channel and symmetric, on the 2^bits - 1 integers that engines' kernels want of 8 bits: at 2 bits they are
    ternary, where LSQ, PACT and DoReFa (quant/learned.py) have 2^bits levels below 8 bits. Activations per tensor, affine
    unsigned ("u8s8", "u8s8-fused") or symmetric signed ("s8s8"). ``edge_bits``: layers that read the image and each head's
    last one. ``add_bits``: tensors that an addition or a pooling reads too (0: as ``activation_bits``). ``keep_float``: layers
    left out, by path; any other layer that cannot be quantized raises Unsupported. For "s8s8" TensorRT's own exclusions are
    left out too, and listed.
    """

    method: ClassVar[str]  # "PTQ", "QAT"

    weight_bits: int = 8
    activation_bits: int = 8
    observer: Observer = "mse"
    weight_observer: Observer = "mse"
    edge_bits: int = 8
    keep_float: tuple[str, ...] = ()
    add_bits: int = 0

    @property
    def column(self) -> str:
        """ "INT8 PTQ" when weights and activations share a width, else "W4A8 PTQ"."""
        weight, activation = self.weight_bits, self.activation_bits
        return f"INT{weight} {self.method}" if weight == activation else f"W{weight}A{activation} {self.method}"

    @property
    def widths(self) -> Widths:
        """The bits that it asks for."""
        return Widths(self.weight_bits, self.activation_bits, self.edge_bits, self.add_bits)
