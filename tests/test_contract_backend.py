"""The backend contract over every keeper, and the saboteurs that it must catch."""

import copy
import importlib
import pkgutil
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

import anytime.backends
from anytime import cpu
from anytime.backend import Backend, Bits, TorchNet
from anytime.backends.ensembles import GradientBoosting, Stack
from anytime.backends.float import BFloat16, Float32
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.backends.torch_compile import TorchCompile
from anytime.cost import account
from anytime.ensemble import Ensemble
from tests.contracts.backend import backend_keeps_its_promise
from tests.worlds import Restarting, Tiny, data, family, trained, trainer


def keepers():
    for info in pkgutil.iter_modules(anytime.backends.__path__, "anytime.backends."):
        for cls in vars(importlib.import_module(info.name)).values():
            if isinstance(cls, type) and issubclass(cls, Backend) and cls.__module__ == info.name:
                yield cls


def test_the_walk_finds_the_keepers():
    assert {"PTQ", "QAT", "MixedPrecision", "OnnxRuntime", "OpenVINO", "NNCF", "TorchAO", "QKeras", "TFLite", "Stack"} <= {
        cls.__name__ for cls in keepers()
    }


# What OpenVINO computes truly on this CPU.
SIXTEEN = (BFloat16(),) if cpu.has_any(cpu.BF16_KERNELS) else ()
EIGHT = PTQ(weight_bits=7, edge_bits=7) if cpu.saturates() else PTQ()


def variants(spec):
    """Each keeper at its defaults; ensembles of two, a stack that begins with ``spec``.

    A wrapper around float, around calibrated and around trained integers, as far as it takes them.
    """
    for cls in keepers():
        names = {f.name: str(f.type) for f in fields(cls)}
        if "of" in names:
            several = names["of"].startswith("tuple")
            inners = {
                TorchCompile: (Float32(),),
                OpenVINO: (Float32(), *SIXTEEN, EIGHT),
                GradientBoosting: (Float32(), PTQ()),
            }.get(cls, (Float32(), PTQ(), QAT(epochs=1)))
            few = {"members": 2} if "members" in names else {}
            yield from (cls(of=(inner,) if several else inner, **few) for inner in inners)
        elif cls is Stack:
            yield Stack(members=((spec, Float32()), (Tiny(width=4), PTQ())), combine="mlp")
        else:
            yield cls(epochs=1) if "epochs" in names else cls()


@pytest.mark.parametrize("backend", list(variants(Tiny())), ids=lambda b: b.label)
def test_backend(backend):
    if reason := backend.why_not():
        pytest.skip(reason)
    if isinstance(backend, TorchCompile):
        pytest.skip("seconds for every segment that it compiles: the smaller world below is enough")
    backend_keeps_its_promise(backend, trained(), data(), family())


@pytest.mark.parametrize("backend", list(variants(Restarting())), ids=lambda b: b.label)
def test_stages_that_restart(backend):
    if reason := backend.why_not():
        pytest.skip(reason)
    net = backend_keeps_its_promise(backend, trained(Restarting()), data(), family(Restarting()))
    cost = account(net, (3, 16, 16))
    if isinstance(backend, Ensemble):
        return  # its members do not start again from each other
    assert cost.path((1,), 1) == cost.stage.macs[1] + cost.head.macs[1]  # jumped to
    assert cost.macs[1] == cost.macs[0] + cost.path((1,), 1)  # one after another


@dataclass(frozen=True)
class EatsItsInput(Backend):
    """Source: a saboteur."""

    def compress(self, model, calib, trainer, target="u8s8"):
        with torch.no_grad():
            model.stages[0][0].weight.zero_()
        return TorchNet(copy.deepcopy(model), {}, False)


class Negated(TorchNet):
    def step(self, segment, state):
        state, z = super().step(segment, state)
        return state, None if z is None else -z


class BatchDependent(TorchNet):
    """Right in large batches, so that only smaller ones show it."""

    def predict(self, x, batch=256):
        return super().predict(x, batch) * (1 if batch > 7 else -1)


class OtherPlan(TorchNet):
    def start(self, x):
        return super().start(x if len(x) != 5 else -x)


class Moody(TorchNet):
    def __setstate__(self, state):
        self.__dict__.update(state)
        self.twin = copy.deepcopy(self.twin)
        torch.nn.init.zeros_(next(iter(self.twin.heads[0].parameters())))


class Doubles(TorchNet):
    def predict(self, x, batch=256):
        return super().predict(x, batch).astype(np.float64)


class Thin(TorchNet):
    def predict(self, x, batch=256):
        return super().predict(x, batch)[:1]


class SavesNothing(TorchNet):
    def save(self, folder):
        return []


@dataclass(frozen=True)
class Makes(Backend):
    """Source: a saboteur."""

    what: str = ""

    def compress(self, model, calib, trainer, target="u8s8"):
        twin = copy.deepcopy(model)
        if self.what == "forgets":
            twin.trained_on = frozenset()
        if self.what == "mute":
            return TorchNet(twin, {}, simulated=True)
        if self.what == "odd bits":
            return TorchNet(twin, {"stages.9.9": Bits(8, 8)}, False)
        kind = {
            "negated": Negated, "batch": BatchDependent, "thin": Thin, "unsaved": SavesNothing, "other plan": OtherPlan,
            "moody": Moody, "doubles": Doubles,
        }.get(self.what, TorchNet)  # fmt: skip
        return kind(twin, {}, False)


@pytest.mark.parametrize(
    "saboteur, said",
    [
        (EatsItsInput(), "changed its input"),
        (Makes("negated"), "disagree"),
        (Makes("batch"), "depend on batch size"),
        (Makes("other plan"), "a plan gives other answers"),
        (Makes("moody"), "when another process gets it"),
        (Makes("doubles"), "float32"),
        (Makes("thin"), r"\[E, N, K\]"),
        (Makes("odd bits"), "do not exist"),
        (Makes("forgets"), "forgot what it was trained on"),
        (Makes("unsaved"), "nothing was saved"),
        (Makes("mute"), "does not say why"),
    ],
    ids=lambda v: v.label if isinstance(v, Backend) else "",
)
def test_the_contract_catches(saboteur, said):
    with pytest.raises(AssertionError, match=said):
        backend_keeps_its_promise(saboteur, copy.deepcopy(trained()), data(), trainer())
