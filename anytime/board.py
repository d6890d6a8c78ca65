"""Where latency is measured: the promise of every board."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from anytime import stops
from anytime.backend import Deployable
from anytime.errors import AnytimeError, Unsupported
from anytime.metrics import Bools, Floats, Ints
from anytime.policy import Policy
from anytime.spec import Spec


@dataclass(frozen=True)
class Timing:
    """Raw times in ms a sample: stage and head of every link, [E, R], over R batches and launches (batch 1: samples).

    ``wall`` is elapsed time, ``cpu`` the process's CPU time over all its threads, NaN where nothing tells it; never one in the other's
    place. ``layers``: what the engine says of its own layers, a row for each. ``energy_mj``: of one inference to each exit, every head
    on the way run, None where it could not be had; () where it was not measured. ``restarts``: no stage can reuse one before it.
    """

    stage_ms: Floats
    head_ms: Floats
    stage_cpu_ms: Floats
    head_cpu_ms: Floats
    launches: int
    facts: dict[str, str]
    layers: tuple[dict[str, Any], ...] = ()
    energy_mj: tuple[float | None, ...] = ()
    restarts: bool = False

    def to_exit(self, exit: int, uses: tuple[int, ...] | None = None, cpu: bool = False) -> Floats:
        """ms [R] to leave at ``exit`` when the heads of ``uses`` (default: every one on the way) are run."""
        stage, head = (self.stage_cpu_ms, self.head_cpu_ms) if cpu else (self.stage_ms, self.head_ms)
        heads = [k for k in (range(exit + 1) if uses is None else uses) if k <= exit]
        stages = heads if self.restarts else list(range(exit + 1))
        return np.asarray(stage[stages].sum(0) + head[heads].sum(0))

    def path(self, uses: tuple[int, ...], exit: int) -> float:
        """Median ms of a path: what a policy with a budget in milliseconds counts with."""
        return float(np.median(self.to_exit(exit, uses)))


@dataclass(frozen=True)
class Replayed:
    """A policy executed end to end on R real samples: exit taken, class answered [R]; raw times [L, R] over L launches.

    In ms a sample; every ``at_once`` samples were handed over together and share one reading.
    """

    exits: Ints
    answers: Ints
    wall_ms: Floats
    cpu_ms: Floats
    facts: dict[str, str]
    at_once: int = 1

    @property
    def readings_ms(self) -> Floats:
        """Every reading once, whatever number of samples shares it: what percentiles are taken of."""
        return self.wall_ms[:, :: self.at_once].ravel()


@dataclass(frozen=True)
class Board(Spec, ABC):
    """A machine that runs networks and holds the stopwatch."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the tables call it."""

    def why_not(self, net: Deployable) -> str | None:
        """Why this board cannot time this network; None when it can."""
        if net.simulated:
            return f"simulated arithmetic has no latency: {net.facts.get('simulated', 'float kernels imitate it')}"
        return self._why_not(net)

    @abstractmethod
    def _why_not(self, net: Deployable) -> str | None: ...

    def lacks(self, form: str, needs: Sequence[str]) -> str | None:
        """What is missing here for networks of this format that need one of these kernels, and may be there another time; or None."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What a reader needs to judge the number: chip, flags, clocks, governor, threads, versions, load."""

    @abstractmethod
    def time(self, nets: Sequence[Deployable], x: Floats) -> list[Timing]:
        """x [N, ...]: real samples, batch by batch through every stage and head, rounds interleaved over ``nets``."""

    @abstractmethod
    def run(self, jobs: Sequence[tuple[Deployable, Policy]], x: Floats) -> list[Replayed]:
        """Execute each policy on its network's plan over x [R, ...], rounds interleaved over ``jobs``."""

    def check_launches(self, net: Deployable, policy: Policy, exits: Ints, answers: Ints) -> None:
        """AnytimeError where another launch took other exits or gave other answers: both [L, R]."""
        if moved := int(((exits != exits[0]) | (answers != answers[0])).any(0).sum()):
            raise AnytimeError(
                f"{self.name}: {net.execution} under {policy.label} took other exits or gave other answers in another "
                f"launch, on {moved} of {exits.shape[1]} samples: its kernels are not deterministic; try threads=1"
            )

    def answers(self, nets: Sequence[Deployable], parts: Mapping[str, Floats]) -> list[dict[str, Floats] | None]:
        """What its own engines answer, per network: part -> logits [E, N, K]; None where this machine's answers stand for them."""
        return [None] * len(nets)


def board_test(policy: Policy, logits: Floats) -> dict[str, Any]:
    """What a board needs to run ``policy``: the exits that it reads, and for each but the last its test in stops.py.

    Read off the calls that it makes on ``logits`` [E, N, K]: a policy promises to call a function of stops.py with numbers of
    its own. Unsupported where these numbers alone do not decide as it does. ``answer`` is "exit taken", or the name of a
    policy that answers with other logits than those.
    """
    used, tests = policy.uses(len(logits)), []
    for i in range(len(used) - 1):
        read = logits[list(used[: i + 1])]
        decided, name, said = _watched(policy, read)
        arguments = {k: np.asarray(v).tolist() for k, v in said.items() if k != "logits"}
        if policy.temperatures:
            read = stops.tempered(read, tuple(policy.temperatures[k] for k in used[: i + 1]))
        again = getattr(stops, name)(read, **{k: np.array(v) if isinstance(v, list) else v for k, v in arguments.items()})
        if not np.array_equal(decided, again):
            raise Unsupported(f"{policy.label} does not decide as stops.{name} alone does: a board cannot run it")
        tests.append({"test": name, "arguments": arguments})
    return {
        "uses": list(used), "tests": tests, "temperatures": list(policy.temperatures),
        "answer": policy.answers_as,
    }  # fmt: skip


def _watched(policy: Policy, logits: Floats) -> tuple[Bools, str, dict[str, Any]]:
    """What ``policy.stop`` says, and the exit test that it called, with its arguments."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_name
        if event == "call" and frame.f_code.co_filename == stops.__file__ and name.startswith(("at_", "by_")):
            calls.append((name, dict(frame.f_locals)))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        decided = policy.stop(logits)
    finally:
        sys.setprofile(before)
    if not calls:
        raise Unsupported(f"{policy.label} calls no exit test of stops.py: a board cannot run it")
    return decided, *calls[0]
