"""Rounding that is learned unit by unit, so that each unit gives what it gave in float: AdaRound, BRECQ, QDrop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from anytime.errors import Diverged, Unsupported, UsageError
from anytime.model import AnytimeModel
from anytime.quant.adaround import AdaRoundWeight
from anytime.quant.fake import FakeQuant, QuantizedLayer
from anytime.quant.graph import Quantized
from anytime.quant.layout import channels_last, flat, take
from anytime.quant.qdrop import DropStep, kept
from anytime.quant.units import Granularity, Unit, partition

BETA = (20.0, 2.0)  # the penalty's exponent, from first to last
WARM_UP = 0.2  # share of the iterations without penalty
SWEEP = 128  # samples at a time where nothing is learned
SMALLEST = torch.finfo(torch.float32).eps  # a learned step does not fall under this

Progress = Callable[[str, int, int], None]
Values = dict[fx.Node, Tensor]  # what was computed at a node of a quantized link, for all samples or for a batch


@dataclass(frozen=True)
class Reconstruction:
    """How rounding is learned.

    ``unit`` "layer" with ``drop`` 0 is AdaRound, "block" with 0 BRECQ, with 0.5 QDrop. ``drop``: the share of values that stay
    in float, among a unit's inputs and behind its quantizers; it is kept to the nearest 256th. ``learn_steps``: the steps of
    activations too, by Adam at ``step_lr``, which falls as a cosine. ``iterations``: of each unit. ``travel``: the rounding's
    rate, Adam's too, times iterations: how far it can go. ``penalty``: weight of what drives the rounding to 0 or 1.
    ``exit_weight``: what the error at an exit counts in the block that it reads (see reconstruct).
    Source: QDrop's published configuration. Deviation: it has 20,000 iterations at 1e-3, which is the same travel; a tenth
    of them at 1e-3 decides too little (ResNet-20, W4A8, 300 iterations: the logits' squared error on val is 0.86, at 1e-2 0.52).
    """

    unit: Granularity = "block"
    drop: float = 0.5
    learn_steps: bool = True
    iterations: int = 2000
    batch: int = 32
    travel: float = 20.0
    step_lr: float = 4e-5
    penalty: float = 0.01
    exit_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.unit not in ("layer", "block"):
            raise UsageError(f"unit {self.unit!r} of a reconstruction: take 'layer' or 'block'")
        if not 0 <= self.drop < 1:
            raise UsageError(f"drop {self.drop}: it is the share of values that stay in float, from 0 up to but not 1")
        if self.iterations < 0 or self.batch < 1:
            raise UsageError(f"{self.iterations} iterations of batches of {self.batch}: take 0 or more, of 1 or more")


class Learned(NamedTuple):
    """What became of one unit; ``before`` and ``after`` are its losses, rounded to nearest and as it has learned, nothing dropped."""

    unit: str
    layers: tuple[str, ...]
    samples: int
    iterations: int
    seconds: float
    before: float
    after: float


def reconstruct(
    net: Quantized,
    model: AnytimeModel,
    x: Tensor,
    how: Reconstruction,
    seed: int,
    reached: Tensor | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Learned]:
    """Learn how a calibrated net rounds, unit by unit from front to back, and settle it; grids of weights stay.

    ``model``: the traced float chain that it was made of. x [N, C, H, W]: the calibration images. ``reached`` [N]: the last
    stage that each enters, -1 for none; a unit learns from those that reach its stage. A unit's inputs come from what is
    already rounded before it, or are float where dropped; its targets are what it gives in float, on float inputs. Its loss
    is the squared error summed over channels, the mean over everything else (BRECQ's), plus ``penalty`` times
    AdaRoundWeight.undecided. Deterministic for a seed, a machine and a number of threads; draws from no generator but its own.

    The unit that a head reads is learned with that head: to the error at its output is added that of the logits which the
    float head makes of it, weighed so that equal relative errors count 1 : ``exit_weight``, that is, by it times the targets'
    mean square at the output over that at the logits, both summed over channels. Then the head's own units learn, on what is
    rounded before them. This form is this project's: where block and head learn at once, both rounded, the head decides its
    roundings while the block's still move, and early exits gain less (benchmarks/reconstruct.py says how much). Unit
    "layer" knows no such thing.
    Source: Nagel et al., ICML 2020, arXiv:2004.10568 (AdaRound); Li, Gong, Tan et al., ICLR 2021, arXiv:2102.05426 (BRECQ,
    section 3); Wei et al., ICLR 2022, arXiv:2203.05740 (QDrop); facts from the code of BRECQ, QDrop and MQBench. Deviations:
    plain squared error, not weighed by the Fisher information, as in all three codes' defaults; a unit's output is compared
    behind its quantizer, for AdaRound too, as in MQBench; the first layer learns like any other, at its edge bits (BRECQ
    leaves it rounded to nearest); with ``drop`` 0 activations are rounded while weights learn, where BRECQ learns steps
    afterwards.
    """
    net.check_coverage()
    if len(x) == 0:
        raise Unsupported("reconstruction has no samples: give the data set a calib part")
    net.model.eval()
    entry, plan = partition(net, model, how.unit, with_exits=bool(how.exit_weight))
    generator = torch.Generator().manual_seed(seed)
    settled: set[nn.Module] = set()
    report: list[Learned] = []
    total = sum(bool(unit.layers) for stage in plan for unit in stage.units) * how.iterations
    rounded: Values = {entry: channels_last(x)}
    floats = rounded

    def tell(n: int) -> None:
        progress("reconstruct", len(report) * how.iterations + n, total)

    for k, stage in enumerate(plan):
        if reached is not None:
            here = (reached >= k).nonzero().flatten()
            if len(here) == 0:
                raise Unsupported(f"no calibration image reaches stage {k}: give more of them, or learn from all")
            reached = reached[here]
            floats = {n: take(v, here) for n, v in floats.items()}
            rounded = {n: floats[n] if n is entry else take(v, here) for n, v in rounded.items()}
        for i, unit in enumerate(stage.units):
            start = perf_counter()
            targets, given = _sweep(unit, floats, rounds=False), _sweep(unit, rounded, rounds=True)
            if unit.layers:
                weigh = _weights(unit, targets, how.exit_weight)
                before = float(_loss(given, targets, weigh))
                _learn(unit, (rounded, floats, targets), weigh, how, generator, settled, tell)
                given = _sweep(unit, rounded, rounds=True)
                after = float(_loss(given, targets, weigh))
                if not math.isfinite(after):
                    raise Diverged(f"reconstruction of {unit.name} met NaN or infinity: look at the images, or lower the rates")
                n, seconds = len(given[unit.gives[0]]), perf_counter() - start
                report.append(Learned(unit.name, unit.layers, n, how.iterations, seconds, before, after))
            needed = {n for u in stage.units[i + 1 :] for n in u.reads} | ({entry} if net.model.restarts else stage.state)
            rounded, floats = ({n: v for n, v in have.items() if n in needed} for have in (rounded | given, floats | targets))
    return report


def _learn(
    unit: Unit, caches: tuple[Values, Values, Values], weigh: dict[fx.Node, float], how: Reconstruction,
    generator: torch.Generator, settled: set[nn.Module], tell: Callable[[int], None],
) -> None:  # fmt: skip
    """Learn and settle one unit; what an earlier one settled (a grid that tensors share) stays."""
    rounded, floats, targets = caches
    modules = dict.fromkeys(op.rounded for op in unit.ops if isinstance(op.rounded, FakeQuant | QuantizedLayer))
    weights: list[AdaRoundWeight] = []
    steps: list[nn.Parameter] = []
    for m in modules:
        if isinstance(m, FakeQuant):
            m.learner = DropStep(m, how.drop, generator, how.learn_steps and m not in settled)
            steps += [m.learner.step] if m.learner.step.requires_grad else []
        elif m not in settled:
            m.learner = AdaRoundWeight(m)
            weights.append(m.learner)
    params = [*(w.v for w in weights), *steps]
    groups = [{"params": params[: len(weights)], "lr": how.travel / max(how.iterations, 1)}, {"params": steps, "lr": how.step_lr}]
    optimizer = torch.optim.Adam(groups, fused=True)
    n = len(targets[unit.gives[0]])
    for i in range(how.iterations if params else 0):
        rows = torch.randperm(n, generator=generator)[: how.batch]
        values: Values = {}
        for node in unit.reads:
            values[node] = take(rounded[node], rows)
            if how.drop and rounded[node] is not floats[node]:
                keep = kept(values[node], how.drop, generator)
                values[node] = torch.lerp(take(floats[node], rows), values[node], keep)
        _run(unit, values, rounds=True)
        loss = _loss(values, {node: take(t, rows) for node, t in targets.items()}, weigh)
        late = (i / how.iterations - WARM_UP) / (1 - WARM_UP)
        if late >= 0:
            for w in weights:
                loss = loss + how.penalty * w.undecided(BETA[0] + (BETA[1] - BETA[0]) * late)
        optimizer.param_groups[1]["lr"] = how.step_lr * (1 + math.cos(math.pi * i / how.iterations)) / 2
        optimizer.zero_grad()
        loss.backward(inputs=params)  # type: ignore[no-untyped-call]  # biases and the like stay
        optimizer.step()
        for step in steps:
            step.data.clamp_(min=SMALLEST)
        tell(i + 1)
    for m in modules:
        m.settle()
    settled.update(modules)


def _weights(unit: Unit, targets: Values, exit_weight: float) -> dict[fx.Node, float]:
    """What the error at each of its outputs counts."""
    power = {n: float(t.square().mean()) * _channels(t) for n, t in targets.items()}
    weigh = dict.fromkeys(unit.gives, 1.0)
    if unit.logits is not None:
        weigh[unit.logits] = exit_weight * sum(power[n] for n in unit.gives) / max(power[unit.logits], SMALLEST)
    return weigh


def _loss(values: Values, targets: Values, weigh: dict[fx.Node, float]) -> Tensor:
    total = torch.zeros(())
    for n, t in targets.items():
        # Not mse_loss or mean: their gradients have another layout, which makes what is before them three times slower.
        error = flat(values[n] - t)
        total = total + error.dot(error) * (_channels(t) * weigh[n] / len(error))
    return total


def _channels(t: Tensor) -> int:
    return t.shape[1] if t.ndim > 1 else 1


def _run(unit: Unit, values: Values, rounds: bool) -> None:
    """Compute what a unit gives from what it reads, and what its head makes of that."""
    for ops, rounded in ((unit.ops, rounds), (unit.head, False)):
        for op in ops:
            args, kwargs = fx.node.map_arg((op.args, op.kwargs), values.__getitem__)
            values[op.node] = (op.rounded if rounded else op.plain)(*args, **kwargs)


@torch.no_grad()
def _sweep(unit: Unit, cache: Values, rounds: bool) -> Values:
    """The same for all samples."""
    wanted = unit.gives if unit.logits is None else (*unit.gives, unit.logits)
    parts: dict[fx.Node, list[Tensor]] = {n: [] for n in wanted}
    for i in range(0, len(next(iter(cache.values()))), SWEEP):
        values = {n: cache[n][i : i + SWEEP] for n in unit.reads}
        _run(unit, values, rounds)
        for n, part in parts.items():
            part.append(values[n])
    return {n: channels_last(torch.cat(part)) for n, part in parts.items()}
