"""OpenVINO on the CPU: float graphs, and 8-bit Q/DQ graphs for real."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch

from anytime import cpu
from anytime.backend import INT8_WIDTHS, Backend, Deployable, Target, TorchNet
from anytime.dataset import Part
from anytime.errors import Unsupported, install
from anytime.model import AnytimeModel
from anytime.onnx_net import GraphNet, OpenVINONet, written
from anytime.quant.fake import check_tensors, overflows
from anytime.quant.trace import links, traced
from anytime.train import Trainer


@dataclass(frozen=True)
class OpenVINO(Backend):
    """What ``of`` makes, executed by OpenVINO on the CPU: FP32, BF16 of ``BFloat16()``, or INT8 with u8 activations and s8 weights.

    The same graphs as under ONNX Runtime, but for the layout of the state (see OnnxChain) and for additions that OpenVINO
    fuses into a convolution, which round only their skip side (see Placement); a peer's graphs (``OpenVINO(of=NNCF())``) are
    taken as they are. In BF16 the state between segments is float32, and the twin computes in
    float32 with weights rounded to bfloat16. On an x86 CPU without VNNI its INT8 adds two products in 16 bits, where they
    saturate: other answers come out, the column "agreement" says how many, and ``PTQ(weight_bits=7, edge_bits=7)`` is the cure.
    Source: OpenVINO's documentation, "CPU Device", sections on inference precision and on quantized models; ONNX operators
    QuantizeLinear and DequantizeLinear, opset 13.
    """

    version: ClassVar[int] = 2  # 1 had ONNX Runtime's quantizers at additions

    of: Backend

    @property
    def column(self) -> str:
        return self.of.column

    def why_not(self) -> str | None:
        if find_spec("openvino") is None or find_spec("onnx") is None:
            return f"openvino or onnx is not installed: {install('peers')}"
        return self.of.why_not()

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        inner = self.of.compress(model, calib, trainer, "u8s8-fused")
        facts = {k: v for k, v in inner.facts.items() if k != "simulated"}
        if not isinstance(inner, TorchNet | GraphNet) or inner.format not in ("torch", "onnx"):
            raise Unsupported(f"{self.of.label} brings its own engine ({inner.execution}): leave OpenVINO out")
        if cpu.saturates() and overflows(inner.twin, inner.bits):
            facts["saturates"] = "no VNNI on this CPU: two products are added in 16 bits and saturate; 7 bits of weights do not"
        if isinstance(inner, GraphNet):
            return OpenVINONet(inner.twin, inner.bits, inner.graph, facts, inner.float_biases)
        bf16 = inner.dtype == torch.bfloat16
        odd = set(inner.bits.values()) - INT8_WIDTHS if not bf16 else set()
        if odd:
            said = ", ".join(sorted(f"W{b.weight}A{b.activation}" for b in odd))
            raise Unsupported(
                f"OpenVINO's CPU kernels are FP32, W8A8, W7A8 and, where the CPU multiplies it, BF16, not {said}: "
                f"score {self.of.label} without the engine"
            )
        check_tensors(inner.twin, "OpenVINO")
        twin = copy.deepcopy(inner.twin).float() if bf16 else inner.twin
        chain = twin if inner.bits and not bf16 else traced(twin)
        net = OpenVINONet(twin, inner.bits, partial(written, chain, tuple(calib.x.shape[1:])), facts)
        net.sqnr = inner.sqnr
        if bf16:
            net.precision, net.needs = "bf16", inner.needs
        elif net.bits and any(node.target is torch.cat for _, link in links(chain) for node in link.graph.nodes):
            _compile_apart(net)
        return net


def _compile_apart(net: OpenVINONet) -> None:
    """Unsupported where OpenVINO dies of a network: in a process of its own, else it would end ours.

    OpenVINO 2026.4.1 gets a segmentation fault in INT8 where layers concatenate what others have concatenated and something in float
    reads it, as BatchNorm of DenseNets did (``quant.channelwise`` has cured those); that of 2021 had one too (its pull request 9464).
    """
    with TemporaryDirectory() as folder:
        files = [str(path) for path in net.save(Path(folder))]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        code = subprocess.run([sys.executable, "-P", "-c", _COMPILE, *files], env=env, capture_output=True).returncode
    if code < 0:
        raise Unsupported(
            f"OpenVINO itself is killed by signal {-code} when it compiles this network's integers; use OnnxRuntime(of=...)"
        )


_COMPILE = """
import sys
from anytime.engine import OpenVINOGraph
for name in sys.argv[1:]:
    OpenVINOGraph(open(name, "rb").read(), 1)._request(1)
"""
