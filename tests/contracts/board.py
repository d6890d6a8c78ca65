"""What every board keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from anytime import stops
from anytime.backend import Deployable, Segment, TorchNet
from anytime.board import Board, Replayed, Timing
from anytime.errors import AnytimeError
from anytime.metrics import Bools, Floats, Predictions, take
from anytime.model import AnytimeModel
from anytime.onnx_net import OnnxNet, written
from anytime.policy import PathCost, Policy
from anytime.quant.trace import traced

N, SHAPE, K = 10, (1, 8, 8), 4
NAP_S = 0.002


def chain(n_exits: int) -> AnytimeModel:
    """A chain of small convolutions over x [B, 1, 8, 8], four classes, random but fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(n_exits)
        stages = [nn.Sequential(nn.Conv2d(1 if k == 0 else 6, 6, 3, padding=1), nn.ReLU()) for k in range(n_exits)]
        heads = [nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, K)) for _ in range(n_exits)]
        return AnytimeModel(stages, heads)


def network(n_exits: int) -> TorchNet:
    """The chain as torch runs it, in FP32."""
    return TorchNet(chain(n_exits), {}, simulated=False)


def onnx(n_exits: int) -> OnnxNet:
    """The chain as graphs, for boards that have no torch."""
    net = traced(chain(n_exits))
    return OnnxNet(net, {}, partial(written, net, SHAPE), {})


def simulated() -> TorchNet:
    """One that must never be timed."""
    return TorchNet(chain(2), {}, simulated=True, execution="fake-quant")


class Napping(TorchNet):
    """Its stages sleep: time passes that no CPU spends."""

    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        if segment.stop > segment.first:
            time.sleep(NAP_S)
        return super().step(segment, state)


def samples() -> Floats:
    """x [N, 1, 8, 8]."""
    return np.random.default_rng(0).normal(size=(N, *SHAPE)).astype(np.float32)


@dataclass(frozen=True)
class Sure(Policy):
    """Leaves when the largest probability reaches the threshold of this exit; reads the exits ``reads``.

    ``pooled`` answers with the mean over the exits read so far, not with the logits of the exit taken.
    """

    thresholds: tuple[float, ...]
    reads: tuple[int, ...]
    pooled: bool = False

    def uses(self, n_exits: int) -> tuple[int, ...]:
        return self.reads

    def _stop(self, logits: Floats) -> Bools:
        return stops.by_max_probability(logits, self.thresholds)

    def answer(self, logits: Floats, exits: np.ndarray) -> Floats:
        if not self.pooled:
            return super().answer(logits, exits)
        means = np.zeros_like(logits)
        for i, k in enumerate(self.reads):
            means[k] = logits[list(self.reads[: i + 1])].mean(0)
        return take(means, exits)

    def _fit(self, val: Predictions, cost: PathCost, budget: float) -> Policy:
        return self


def sure(net: Deployable, x: Floats, reads: tuple[int, ...], pooled: bool = False) -> Sure:
    """Half of the samples leave at each exit: thresholds midway between two scores, which rounding does not cross."""
    logits = net.predict(x, batch=1)
    return Sure(tuple(float(np.median(stops.max_probability(logits[k]))) for k in reads[:-1]), reads, pooled)


def check(board: Board, make: Callable[[int], Deployable] = network, naps: bool = True) -> None:
    """Raise AssertionError, with a sentence of its own, for each promise that ``board`` does not keep.

    ``make`` gives networks in a form that it runs; ``naps``: it can run one that sleeps.
    """
    x = samples()
    assert board.name and isinstance(board.name, str), "the board has no name"
    _facts(board.facts(), "the board")
    _refusals(board, x)
    nets = [make(2), make(3), Napping(chain(2), {}, simulated=False) if naps else make(2)]
    for net in nets:
        assert board.why_not(net) is None, f"the board refuses an ordinary FP32 network in {net.format}: {board.why_not(net)}"
    timings = board.time(nets, x)
    assert [t.stage_ms.shape[0] for t in timings] == [2, 3, 2], "timings do not come in the order of the networks"
    for timing in timings:
        _timing(timing)
    if naps:
        _clocks(timings[2])
    jobs = [(nets[0], sure(nets[0], x, (0, 1))), (nets[1], sure(nets[1], x, (0, 2), pooled=True))]
    replays = board.run(jobs, x)
    assert len(replays) == 2, "there is not one replay per job"
    for (net, policy), replay in zip(jobs, replays, strict=True):
        _replay(net, policy, x, replay)
    if naps:
        (napping,) = board.run([(nets[2], sure(network(2), x, (0, 1)))], x)
        _replayed_clocks(napping)


def _facts(facts: dict[str, str], whose: str) -> None:
    assert facts, f"{whose} states no facts"
    odd = {k: v for k, v in facts.items() if not (isinstance(k, str) and isinstance(v, str) and v)}
    assert not odd, f"facts of {whose} that are no text, or empty: {odd}"


def _refusals(board: Board, x: Floats) -> None:
    net = simulated()
    assert board.why_not(net), "the board takes a simulated network"
    for what, call in (("times", lambda: board.time([net], x)), ("replays", lambda: board.run([(net, sure(net, x, (0, 1)))], x))):
        try:
            call()
        except AnytimeError:
            continue
        raise AssertionError(f"the board {what} a simulated network")


def _timing(timing: Timing) -> None:
    e = len(timing.stage_ms)
    for name in ("stage_ms", "head_ms", "stage_cpu_ms", "head_cpu_ms"):
        ms = getattr(timing, name)
        assert ms.shape == (e, N * timing.launches), f"{name} is {ms.shape}, not [E, launches x R] = {(e, N * timing.launches)}"
        assert np.isfinite(ms).all(), f"{name} is not finite"
        assert (ms >= 0).all() and ms.any(-1).all(), f"{name} shows no time"
    assert (timing.stage_ms > 0).all() and (timing.head_ms > 0).all(), "a wall time is zero"
    _facts(timing.facts, "a timing")


def _clocks(napping: Timing) -> None:
    cpu, wall = napping.stage_cpu_ms.sum(), napping.stage_ms.sum()
    assert cpu < wall, f"stages that sleep spend {cpu:.1f} ms of CPU in {wall:.1f} ms: the clocks are swapped, or are one"
    assert (napping.stage_ms >= 1e3 * NAP_S).all(), (
        "a stage took less than it sleeps: stage and head are swapped, or it was not run"
    )


def _replayed_clocks(napping: Replayed) -> None:
    naps = 1e3 * NAP_S * (1 + napping.exits)
    assert (napping.wall_ms >= naps).all(), "a replay took less than its stages sleep: it was not run, or is not in ms"
    assert napping.cpu_ms.sum() < napping.wall_ms.sum(), (
        "a replay that sleeps spends as much CPU: the clocks are swapped, or are one"
    )


def _replay(net: Deployable, policy: Policy, x: Floats, replay: Replayed) -> None:
    logits = net.predict(x, batch=1)
    exits = policy.exits(logits)
    assert len(set(exits)) == 2, "this contract's own policy must use both its exits"
    assert replay.exits.shape == replay.answers.shape == (N,), "exits and answers are not [R]"
    assert (replay.exits == exits).all(), f"the replay leaves at {replay.exits}, the policy says {exits}"
    said = policy.answer(logits, exits).argmax(-1)
    assert (replay.answers == said).all(), f"the replay answers {replay.answers}, the policy {said}"
    assert replay.wall_ms.ndim == 2 and replay.wall_ms.shape == replay.cpu_ms.shape, "replayed times are not [L, R]"
    assert replay.wall_ms.shape[1] == N, "replayed times are not [L, R]"
    assert np.isfinite(replay.wall_ms).all() and (replay.wall_ms > 0).all(), "a replayed wall time is zero or not finite"
    assert np.isfinite(replay.cpu_ms).all() and (replay.cpu_ms >= 0).all(), "a replayed CPU time is negative or not finite"
    _facts(replay.facts, "a replay")
