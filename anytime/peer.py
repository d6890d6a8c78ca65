"""What keepers that call another library's quantizer share."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from anytime.backend import Deployable, Segment, TorchNet
from anytime.dataset import Part
from anytime.errors import AnytimeError, Collapsed, Unsupported, UsageError, near
from anytime.model import AnytimeModel, State
from anytime.quant.diagnose import fallen
from anytime.spec import Spec


@dataclass(frozen=True)
class Calibration:
    """A traced float ``chain`` and the samples x [N, ...] that go through it; Unsupported without any."""

    chain: AnytimeModel
    x: Tensor

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise Unsupported("calibration has no samples: give the data set a calib part")

    def entering(self, segment: Segment) -> State:
        """What the float chain hands to a segment, [N, ...] per tensor; Unsupported when it is not finite."""
        state: Any = self.x
        if not segment.fresh(self.chain.restarts):
            net, before = TorchNet(self.chain, {}, simulated=False), Segment(0, segment.first, None)
            state = _join([net.step(before, part)[0] for part in torch.split(self.x, 256)])
        if not all(bool(t.isfinite().all()) for t in tensors(state)):
            raise Unsupported(f"NaN or infinity enters {where(segment)} in calibration: no range can be chosen from it")
        return state

    def check_layers(self, names: tuple[str, ...]) -> None:
        """UsageError unless each is the path of a convolution or a linear layer."""
        layers = [name for name, m in self.chain.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for name in names:
            if name not in layers:
                raise UsageError(f"keep_float: the network has no layer {name!r}; {near(name, layers)}")


def tensors(state: State) -> list[Tensor]:
    """The tensors of a state, in their order."""
    return [state] if isinstance(state, Tensor) else [t for part in state for t in tensors(part)]


def mapped(state: State, change: Callable[[Tensor], Any]) -> Any:
    """A state of the same form with ``change`` done to each of its tensors."""
    return change(state) if isinstance(state, Tensor) else tuple(mapped(part, change) for part in state)


def _join(parts: list[Any]) -> State:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(_join(list(each)) for each in zip(*parts, strict=True))


def where(segment: Segment) -> str:
    """ "stages.1, stages.2, heads.2"."""
    heads = [] if segment.head is None else [f"heads.{segment.head}"]
    return ", ".join([*(f"stages.{k}" for k in range(segment.first, segment.stop)), *heads])


def facts(spec: Spec, package: str) -> dict[str, str]:
    """What a record says of every peer: whose it is, how it was set, what its numbers are counted on."""
    return {
        "library": f"{package} {version(package)}",
        "knobs": ", ".join(f"{f.name}={getattr(spec, f.name)!r}" for f in fields(spec)),
        "twin": "the float network: the peer's own grids are not read back",
        "segments": "every segment that a plan asks for is quantized by itself; the states between them are float32",
    }


def alive(net: Deployable, calib: Part) -> Deployable:
    """``net``, none of whose exits has fallen to chance on calib samples, at most 256; else Collapsed, with the segment that has it.

    See ``fallen``; which layer is to blame cannot be said, as a peer's grids are not read back.
    """
    x, labels = calib.x[:256].numpy(), calib.y[:256].numpy()
    falls = fallen(TorchNet(net.twin, {}, simulated=False).predict(x), net.predict(x), labels)
    if falls:
        k, was, now, chance = falls[0]
        raise Collapsed(
            f"exit {k + 1} has fallen to chance: {now:.1%} of {len(x)} calibration samples are right, {was:.1%} in float "
            f"(chance {chance:.1%}); it is the first one that has, behind {where(net.plan(range(net.n_exits))[k])}: set "
            "other knobs, or leave layers of it in float (keep_float)"
        )
    return net


@contextmanager
def library(name: str, segment: Segment) -> Iterator[None]:
    """Run a library's code: what it prints, logs and warns is dropped; what it raises becomes an AnytimeError of one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except AnytimeError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or ["without a word"]
        raise AnytimeError(f"{name} fails on {where(segment)}: {type(error).__name__}: {said[0]}") from error
    finally:
        logging.disable(before)
