"""torchao's PT2E quantization for x86, as a peer."""

from __future__ import annotations

import copy
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from anytime import peer
from anytime.backend import Backend, Bits, Deployable, Segment, Target, save_links
from anytime.dataset import Part
from anytime.errors import AnytimeError, Unsupported, install
from anytime.metrics import Floats
from anytime.model import AnytimeModel, State
from anytime.quant.nodes import module_of
from anytime.quant.trace import links, traced
from anytime.train import Trainer

Program = tuple[bytes, dict[str, Bits]]  # an exported program, and the layers that multiply integers in it


@dataclass(frozen=True)
class TorchAO(Backend):
    """Export, prepare_pt2e and convert_pt2e with X86InductorQuantizer on every segment.

    Calibrated on the float states that enter the segment, in batches of 64. Defaults are the library's. Run by torch as
    the reference that PT2E makes, in float kernels, or with ``compile`` by Inductor in 8-bit kernels (its weights
    frozen; seconds for every segment and new batch size, in every process). ``keep_float``: layers left out, by path.
    PT2E fails on networks that call one nn.ReLU twice, as torchvision's residual blocks and ours do; ``own_relus``
    gives every call a module of its own first, which changes no number.
    Source: torchao 0.18, torchao.quantization.pt2e; PyTorch tutorial "PyTorch 2 Export Quantization with X86 Backend
    through Inductor".
    """

    observer: Literal["histogram", "minmax", "moving_average"] = "histogram"
    reduce_range: bool = False
    own_relus: bool = False
    keep_float: tuple[str, ...] = ()
    compile: bool = False

    @property
    def column(self) -> str:
        return "INT8 torchao"

    def why_not(self) -> str | None:
        if find_spec("torchao") is None:
            return f"torchao is not installed: {install('peers')}"
        compiler = os.environ.get("CXX", "g++")
        if self.compile and shutil.which(compiler) is None:
            return f"Inductor needs the C++ compiler {compiler}, which is not here: install it, or name another in CXX"
        return None

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        if target == "s8s8":
            raise Unsupported(f"X86InductorQuantizer makes u8s8, not {target}: leave the wrapper out")
        calibration = peer.Calibration(traced(model), calib.x)
        calibration.check_layers(self.keep_float)
        chain = own_relus(calibration.chain) if self.own_relus else calibration.chain
        program = partial(self._program, calibration, chain)
        return peer.alive(Pt2Net(calibration.chain, program, self.compile, peer.facts(self, "torchao")), calib)

    def _program(self, calibration: peer.Calibration, chain: AnytimeModel, segment: Segment) -> Program:
        state = calibration.entering(segment)
        # Two samples, as an export takes a dimension of size 1 for one that stays so.
        example = (peer.mapped(state, lambda t: t[:1].repeat(2, *[1] * (t.ndim - 1))),)
        batch = torch.export.Dim("batch")
        shapes = (peer.mapped(state, lambda t: {0: batch}),)
        run = _Run(chain, segment)
        with peer.library("torchao", segment), torch.no_grad():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            exported = torch.export.export(run, example, dynamic_shapes=shapes).module()
            assert isinstance(exported, fx.GraphModule)
            exported.graph.eliminate_dead_code()  # it looks for the readers of every layer
            exported.recompile()
            try:
                prepared = prepare_pt2e(exported, self._quantizer())
            except ValueError as error:
                shared = [name for _, name, _ in _repeated_relus(run)]
                if not shared:
                    raise
                raise AnytimeError(
                    f"torchao fails on {peer.where(segment)}: it cannot tell apart the calls of a ReLU that is called more than "
                    f"once, as {', '.join(dict.fromkeys(shared))} ({error}); give every call a module of its own, "
                    "or set own_relus=True"
                ) from error
            for i in range(0, len(calibration.x), 64):
                prepared(peer.mapped(state, lambda t, i=i: t[i : i + 64]))  # type: ignore[misc]
            converted = convert_pt2e(prepared)
            body = io.BytesIO()
            torch.export.save(torch.export.export(converted, example, dynamic_shapes=shapes), body)
        return body.getvalue(), _multiplied(converted)

    def _quantizer(self) -> Any:
        from torchao.quantization.pt2e import observer
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        config = x86.get_default_x86_inductor_quantization_config(reduce_range=self.reduce_range)
        if self.observer != "histogram":
            cls = observer.MinMaxObserver if self.observer == "minmax" else observer.MovingAverageMinMaxObserver
            spec = replace(config.input_activation, observer_or_fake_quant_ctr=cls.with_args(eps=2**-12))
            config = replace(config, input_activation=spec, output_activation=spec)
        quantizer = x86.X86InductorQuantizer().set_global(config)
        for name in self.keep_float:
            quantizer.set_module_name_qconfig(name, None)
        return quantizer


class _Run(nn.Module):
    """One segment as a module whose layers keep their paths: state -> (logits, if it has a head; the state, if it goes on)."""

    def __init__(self, chain: AnytimeModel, segment: Segment) -> None:
        super().__init__()
        head = segment.head
        self.stages = nn.ModuleDict({str(k): chain.stages[k] for k in segment.stages(chain.restarts)})
        self.heads = nn.ModuleDict({} if head is None else {str(head): chain.heads[head]})
        self.goes_on = segment.hands_on(chain.n_exits, chain.restarts)

    def forward(self, state: State) -> tuple[State, ...]:
        for stage in self.stages.values():
            state = stage(state)
        logits = [head(state) for head in self.heads.values()]
        return (*logits, state) if self.goes_on else tuple(logits)


class Pt2Net(Deployable):
    """One exported program per segment, made when it is first asked for, run by torch or compiled by Inductor."""

    format = "torch"

    def __init__(self, twin: AnytimeModel, program: Callable[[Segment], Program], compile: bool, facts: dict[str, str]) -> None:
        self.twin, self.simulated = twin, not compile
        self.execution = "Inductor" if compile else "PT2E reference"
        self.facts = facts if compile else facts | {"simulated": "float kernels run the graph that PT2E makes"}
        self._write = program
        self._programs: dict[Segment, Program] = {}
        self._modules: dict[Segment, Callable[[State], tuple[State, ...]]] = {}
        self._frozen: set[tuple[Segment, int]] = set()  # what Inductor has compiled, by batch size
        found: dict[str, Bits] = {}
        for segment in self.plan(range(self.n_exits)):
            found |= self._program(segment)[1]
        self.bits = {name: found[name] for name, _ in twin.named_modules() if name in found}

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code belongs to this process.
        return {**self.__dict__, "_modules": {}, "_frozen": set()}

    def open(self, threads: int) -> None:
        super().open(threads)
        for segment in self.plan(range(self.n_exits)):
            self._module(segment)

    def start(self, x: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    @torch.no_grad()
    def step(self, segment: Segment, state: State) -> tuple[State, Floats | None]:
        known = (segment, len(peer.tensors(state)[0]))
        if self.simulated or known in self._frozen:
            out = self._module(segment)(state)
        else:
            from torch._inductor import config

            # Read when it compiles: weights that are not frozen are not packed, and no 8-bit kernel takes them.
            with peer.library("Inductor", segment), config.patch(freezing=True):
                out = self._module(segment)(state)
            self._frozen.add(known)
        if segment.head is None:
            return out[0], None
        return (state if self.restarts else out[1] if len(out) > 1 else None), out[0].numpy()

    def save(self, folder: Path) -> list[Path]:
        return save_links(self, folder, "pt2", lambda segment: self._program(segment)[0])

    def executed(self, x: Floats) -> dict[str, str] | None:
        """Inductor's profile names kernels, not layers: where it counts fewer 8-bit ones of a kind than there are layers,
        each of them is called "2 of 3 int8"."""
        if self.simulated:
            return None
        said: dict[str, str] = {}
        state: State = self.start(x)
        for segment in self.plan(range(self.n_exits)):
            self.step(segment, state)
            with torch.autograd.profiler.profile(use_kineto=False) as profile:
                state, _ = self.step(segment, state)
            ran = Counter("conv" if "qconv" in e.name else "linear" for e in profile.function_events if "onednn::q" in e.name)
            layers = dict(_Run(self.twin, segment).named_modules())
            for kind, cls in (("conv", nn.Conv2d), ("linear", nn.Linear)):
                mine = [name for name, m in layers.items() if isinstance(m, cls)]
                kernel = "int8" if ran[kind] == len(mine) else f"{ran[kind]} of {len(mine)} int8" if ran[kind] else "fp32"
                said |= dict.fromkeys(mine, kernel)
        return said

    def _program(self, segment: Segment) -> Program:
        if segment not in self._programs:
            self._programs[segment] = self._write(segment)
        return self._programs[segment]

    def _module(self, segment: Segment) -> Callable[[State], tuple[State, ...]]:
        if segment not in self._modules:
            program = io.BytesIO(self._program(segment)[0])
            with peer.library("torchao", segment):
                import torchao.quantization.pt2e  # noqa: F401  # registers what its programs call; a fresh process has not

                module = torch.export.load(program).module()
            self._modules[segment] = module if self.simulated else torch.compile(module)
        return self._modules[segment]


def _multiplied(g: fx.GraphModule) -> dict[str, Bits]:
    """Layers whose weight and input both come from integers -> how many bits these have."""
    found = {}
    for node in g.graph.nodes:
        if getattr(node.target, "overloadpacket", None) in (torch.ops.aten.conv2d, torch.ops.aten.linear):
            activation, weight = (_integer_bits(n) for n in node.args[:2])
            if activation and weight:
                found[list(node.meta["nn_module_stack"].values())[-1][0]] = Bits(weight, activation)
    return found


def _integer_bits(node: fx.Node) -> int:
    """Of what a node dequantizes; 0 when it does not."""
    kinds = [a for a in node.args if isinstance(a, torch.dtype)] if "dequantize" in str(node.target) else []
    return 8 * kinds[0].itemsize if kinds else 0


def _repeated_relus(run: nn.Module) -> list[tuple[fx.GraphModule, str, fx.Node]]:
    """(link, name, call) of every call of an nn.ReLU but its first."""
    found = []
    for link in (m for m in run.modules() if isinstance(m, fx.GraphModule)):
        seen = set()
        for node in link.graph.nodes:
            if isinstance(module_of(link, node), nn.ReLU):
                if node.target in seen:
                    found.append((link, node.target, node))
                seen.add(node.target)
    return found


def own_relus(chain: AnytimeModel) -> AnytimeModel:
    """A copy of a traced chain in which every call of an nn.ReLU has a module of its own."""
    chain = copy.deepcopy(chain)
    for link, name, node in _repeated_relus(chain):
        node.target = f"{name}_{node.name}"
        link.add_submodule(node.target, nn.ReLU())
    for _, link in links(chain):
        link.recompile()
    return chain
