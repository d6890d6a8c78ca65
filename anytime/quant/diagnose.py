"""Where rounding hurts: signal to noise of every layer, and exits that have fallen to chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anytime.errors import Collapsed, Unsupported
from anytime.metrics import Floats, Ints, paired_loss, wilson
from anytime.model import AnytimeModel
from anytime.quant.bias import LAYERS, check_same_layers
from anytime.quant.graph import Quantized

IMAGES_DB = 20.0  # what first_bad takes for the signal to noise of what the first layer reads


def layer_sqnr(net: Quantized | AnytimeModel, model: AnytimeModel, x: Tensor, batch: int = 64) -> dict[str, float]:
    """Signal to quantization noise of every layer's output in dB over x [N, C, H, W], in the order in which layers run.

    10 log10(E[z^2] / E[(z_hat - z)^2]); z from the float chain ``model``, z_hat from the rounded one, each on its own path.
    inf without an error, -inf where the rounded one makes NaN or infinity. Unsupported without samples, for the chain
    of another network, and for one whose answers are not finite.
    """
    return _compared(net, model, x, len(x), batch)[2]


def first_bad(sqnr: Mapping[str, float]) -> str:
    """The layer with the largest drop in SQNR, up to the first one under 0 dB if there is any.

    ``sqnr`` as ``layer_sqnr`` orders it. A drop is counted from the layer before it on its path: heads hang on their stage.
    The first one, which reads images, is counted from 20 dB; layers without an error do not count. A layer whose output is
    lost altogether stands at 0 dB itself, and only what is behind it drowns: hence not simply the first one under 0 dB.
    Source: this project.
    """
    trunk = IMAGES_DB
    before: dict[str, float] = {}  # of the layer that ran last in each head
    drops: dict[str, float] = {}
    for path, db in sqnr.items():
        if db == np.inf:
            continue
        kind, k, _ = path.split(".", 2)
        drops[path] = (trunk if kind == "stages" else before.get(k, trunk)) - db
        if kind == "stages":
            trunk = db
        else:
            before[k] = db
        if db < 0:
            break
    return max(drops, key=drops.__getitem__, default=next(iter(sqnr)))


class Fall(NamedTuple):
    """An exit (from 0) that has fallen to chance, with its accuracy in float and now."""

    exit: int
    accuracy_float: float
    accuracy: float
    chance: float


def fallen(reference: Floats, logits: Floats, labels: Ints) -> list[Fall]:
    """Exits at which ``logits`` [E, N, K] are no better than chance and those of the float network, ``reference``, are.

    Chance: the commonest label's share, never under 1/K. An exit is better than chance if its accuracy's lower 95 %
    limit (Wilson) lies over it; one that is not has fallen if the paired loss is above 0 too (Tango's lower 95 % limit), so
    that an early exit that was never much better does not fall by one sample. Logits that are not finite are wrong.
    """
    n = len(labels)
    _need(n)
    chance = float(np.unique(labels, return_counts=True)[1].max()) / n
    falls = []
    for k in range(len(logits)):
        was, now = (np.isfinite(z[k]).all(-1) & (z[k].argmax(-1) == labels) for z in (reference, logits))
        if wilson(int(was.sum()), n).lo > chance and wilson(int(now.sum()), n).lo <= chance and paired_loss(was, now).lo > 0:
            falls.append(Fall(k, float(was.mean()), float(now.mean()), chance))
    return falls


def diagnosed(
    net: Quantized | AnytimeModel, model: AnytimeModel, x: Tensor, y: Tensor, measured: int = 128, batch: int = 64
) -> dict[str, float]:
    """``layer_sqnr`` over the first ``measured`` samples, of a chain none of whose exits has fallen to chance on all of x.

    x [N, C, H, W], y [N] labels; see ``fallen`` and ``first_bad``. Both chains run once. Collapsed, with the first bad layer on
    its path, when an exit of the rounded chain is at chance and in float is not. Unsupported without samples.
    """
    reference, logits, sqnr = _compared(net, model, x, measured, batch)
    falls = fallen(reference, logits, y.numpy())
    if not falls:
        return sqnr
    k, was, now, chance = falls[0]
    on_path = {path: db for path, db in sqnr.items() if _leads_to(path, k, model.restarts)}
    bad = first_bad(on_path)
    raise Collapsed(
        f"exit {k + 1} has fallen to chance: {now:.1%} of {len(x)} calibration samples are right, {was:.1%} in float "
        f"(chance {chance:.1%}); the first bad layer is {bad} ({on_path[bad]:.1f} dB): give it more bits, another observer, or "
        "leave it in float"
    )


def _compared(
    net: Quantized | AnytimeModel, model: AnytimeModel, x: Tensor, measured: int, batch: int
) -> tuple[Floats, Floats, dict[str, float]]:
    """Logits [E, N, K] of the float chain and of the rounded one, and the SQNR of layers over the first ``measured`` samples."""
    rounded = net.model if isinstance(net, Quantized) else net
    _need(len(x))
    check_same_layers(rounded, model)
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    wanted: dict[str, list[Tensor]] = {}

    def keep(path: str, z: Tensor) -> None:
        wanted.setdefault(path, []).append(z.clone())  # a ReLU behind it may work in place

    def compare(path: str, z_hat: Tensor) -> None:
        z = wanted[path].pop(0)
        signal[path] = signal.get(path, 0.0) + float(z.square().sum(dtype=torch.float64))
        noise[path] = noise.get(path, 0.0) + float((z_hat - z).square().sum(dtype=torch.float64))

    with torch.no_grad():
        with _shown(model, keep), _shown(rounded, compare):
            said = [(model(part), rounded(part)) for part in _batches(x[:measured], batch)]
        said += [(model(part), rounded(part)) for part in _batches(x[measured:], batch) if len(part)]
    reference, logits = (torch.cat(list(each), 1).numpy() for each in zip(*said, strict=True))
    for k, z in enumerate(reference):
        if not np.isfinite(z).all():
            raise Unsupported(
                f"the float network answers NaN or infinity at exit {k + 1}: it is broken on its calibration images"
            )
    return reference, logits, {path: _decibels(signal[path], noise[path]) for path in signal}


def _batches(x: Tensor, batch: int) -> Iterator[Tensor]:
    for part in torch.split(x, batch):
        yield part.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else part


def _need(n: int) -> None:
    if n == 0:
        raise Unsupported("there are no calibration samples to compare two networks on: give the data set a calib part")


@contextmanager
def _shown(model: AnytimeModel, see: Any) -> Iterator[None]:
    """Show the output of every layer to ``see(path, output)`` while the chain runs."""
    hooks = [
        m.register_forward_hook(lambda _m, _x, out, path=path: see(path, out))
        for path, m in model.named_modules()
        if isinstance(m, LAYERS)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decibels(signal: float, noise: float) -> float:
    if not np.isfinite(noise):
        return -np.inf
    if noise == 0:
        return np.inf
    return float(10 * np.log10(signal / noise)) if signal else -np.inf


def _leads_to(path: str, k: int, restarts: bool) -> bool:
    """Whether a layer has a part in the logits of exit k."""
    kind, of, _ = path.split(".", 2)
    return int(of) == k if kind == "heads" or restarts else int(of) <= k
