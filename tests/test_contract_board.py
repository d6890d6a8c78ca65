"""Every board keeps the contract, and the contract catches those that do not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns, process_time_ns

import numpy as np
import pytest

import anytime.boards
from anytime.backend import Deployable, Segment
from anytime.board import Board, Replayed, Timing
from anytime.boards.host import Host
from anytime.boards.ssh import Ssh
from anytime.errors import AnytimeError
from anytime.execute import Executor
from anytime.metrics import Floats
from anytime.policy import Policy
from tests.contracts.board import check

MADE: dict[type[Board], Board] = {Host: Host(launches=2, warmup=1)}
ELSEWHERE = {Ssh: "test_ssh.py, which has a machine for it"}


def keepers() -> Iterator[type[Board]]:
    for module in pkgutil.iter_modules(anytime.boards.__path__, "anytime.boards."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, Board) and cls.__module__ == module.name and not inspect.isabstract(cls):
                yield cls


def test_the_walk_finds_the_keepers() -> None:
    assert {Host, Ssh} <= set(keepers())


@pytest.mark.parametrize("cls", [cls for cls in keepers() if cls not in ELSEWHERE])
def test_keeps_the_contract(cls: type[Board]) -> None:
    check(MADE.get(cls) or cls())


@dataclass(frozen=True)
class Bench(Board):
    """The plainest board that is honest: this very process, one launch."""

    @property
    def name(self) -> str:
        return "bench"

    def _why_not(self, net: Deployable) -> str | None:
        return None

    def facts(self) -> dict[str, str]:
        return {"cpu": "this one"}

    def _take(self, nets: Sequence[Deployable]) -> None:
        for net in nets:
            if reason := self.why_not(net):
                raise AnytimeError(reason)

    def time(self, nets: Sequence[Deployable], x: Floats) -> list[Timing]:
        self._take(nets)
        return [self._time(net, x) for net in nets]

    def _time(self, net: Deployable, x: Floats) -> Timing:
        net.open(1)
        ms = np.zeros((2, 2, net.n_exits, len(x)))
        for r in range(len(x)):
            state = net.start(x[r : r + 1])
            for k in range(net.n_exits):
                for part, segment in enumerate((Segment(k, k + 1, None), Segment(k + 1, k + 1, k))):
                    wall, spent = perf_counter_ns(), process_time_ns()
                    state, _ = net.step(segment, state)
                    ms[part, :, k, r] = 1e-6 * (perf_counter_ns() - wall), 1e-6 * (process_time_ns() - spent)
        return Timing(ms[0, 0], ms[1, 0], ms[0, 1], ms[1, 1], 1, self.facts())

    def run(self, jobs: Sequence[tuple[Deployable, Policy]], x: Floats) -> list[Replayed]:
        self._take([net for net, _ in jobs])
        return [self._run(net, policy, x) for net, policy in jobs]

    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        execute, ms, said = Executor(net, policy, 1), np.zeros((2, 1, len(x))), []
        for r in range(len(x)):
            wall, spent = perf_counter_ns(), process_time_ns()
            said.append(execute.one(x[r : r + 1]))
            ms[:, 0, r] = 1e-6 * (perf_counter_ns() - wall), 1e-6 * (process_time_ns() - spent)
        exits, answers = (np.array(each) for each in zip(*((k, z.argmax()) for k, z in said), strict=True))
        return Replayed(exits, answers, ms[0], ms[1], self.facts())


class TakesSimulated(Bench):
    def why_not(self, net: Deployable) -> str | None:
        return None


class TimesSimulated(Bench):
    def time(self, nets: Sequence[Deployable], x: Floats) -> list[Timing]:
        return [self._time(net, x) for net in nets]


class ReplaysSimulated(Bench):
    def run(self, jobs: Sequence[tuple[Deployable, Policy]], x: Floats) -> list[Replayed]:
        return [self._run(net, policy, x) for net, policy in jobs]


class RefusesAll(Bench):
    def _why_not(self, net: Deployable) -> str | None:
        return "today is Sunday"


class StatesNumbers(Bench):
    def facts(self) -> dict[str, str]:
        return {"threads": 1}  # type: ignore[dict-item]


class StatesNothing(Bench):
    def _time(self, net: Deployable, x: Floats) -> Timing:
        return replace(super()._time(net, x), facts={})


class TimesNothing(Bench):
    def _time(self, net: Deployable, x: Floats) -> Timing:
        timing = super()._time(net, x)
        return replace(timing, head_ms=0 * timing.head_ms)


class TimesSomeAsZero(Bench):
    def _time(self, net: Deployable, x: Floats) -> Timing:
        timing = super()._time(net, x)
        return replace(timing, head_ms=timing.head_ms * (np.arange(len(x)) > 0))


class TimesNaN(Bench):
    def _time(self, net: Deployable, x: Floats) -> Timing:
        timing = super()._time(net, x)
        return replace(timing, stage_ms=np.nan * timing.stage_ms)


class KeepsMeans(Bench):
    def _time(self, net: Deployable, x: Floats) -> Timing:
        timing = super()._time(net, x)
        return replace(timing, stage_ms=timing.stage_ms.mean(1, keepdims=True))


class SwapsNetworks(Bench):
    def time(self, nets: Sequence[Deployable], x: Floats) -> list[Timing]:
        return super().time(nets, x)[::-1][1:] + super().time(nets[-1:], x)


class SwapsClocks(Bench):
    def _time(self, net: Deployable, x: Floats) -> Timing:
        timing = super()._time(net, x)
        return replace(timing, stage_ms=timing.stage_cpu_ms, stage_cpu_ms=timing.stage_ms)


class SwapsStageAndHead(Bench):
    def _time(self, net: Deployable, x: Floats) -> Timing:
        t = super()._time(net, x)
        # CPU times halved: whatever the machine is doing, they stay under the wall times.
        return replace(t, stage_ms=t.head_ms, head_ms=t.stage_ms, stage_cpu_ms=t.head_ms / 2)


class LeavesLast(Bench):
    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        replay = super()._run(net, policy, x)
        return replace(replay, exits=np.full(len(x), net.n_exits - 1))


class AnswersFromLast(Bench):
    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        return replace(super()._run(net, policy, x), answers=net.predict(x, batch=1)[-1].argmax(-1))


class ForgetsThePolicysAnswer(Bench):
    """Right for every policy that answers with the exit taken, wrong for one that pools."""

    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        replay = super()._run(net, policy, x)
        return replace(replay, answers=Policy.answer(policy, net.predict(x, batch=1), replay.exits).argmax(-1))


class ReplaysInNoTime(Bench):
    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        return replace(super()._run(net, policy, x), wall_ms=np.zeros((1, len(x))))


class ReplaysMeans(Bench):
    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        return replace(super()._run(net, policy, x), wall_ms=np.ones(len(x)))


class SwapsReplayedClocks(Bench):
    """Wall times that hold the naps all the same."""

    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        replay = super()._run(net, policy, x)
        return replace(replay, cpu_ms=2 * replay.wall_ms)


class ReplaysInSeconds(Bench):
    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        replay = super()._run(net, policy, x)
        return replace(replay, wall_ms=1e-3 * replay.wall_ms, cpu_ms=1e-3 * replay.cpu_ms)


class ReplaysNegativeCPU(Bench):
    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        replay = super()._run(net, policy, x)
        return replace(replay, cpu_ms=-1 - replay.cpu_ms)


class ReplaysOne(Bench):
    def run(self, jobs: Sequence[tuple[Deployable, Policy]], x: Floats) -> list[Replayed]:
        return super().run(jobs, x)[:1]


class ReplaysWithoutAWord(Bench):
    def _run(self, net: Deployable, policy: Policy, x: Floats) -> Replayed:
        return replace(super()._run(net, policy, x), facts={})


class HasNoName(Bench):
    @property
    def name(self) -> str:
        return ""


SABOTEURS = {
    TakesSimulated: "takes a simulated network",
    TimesSimulated: "times a simulated network",
    ReplaysSimulated: "replays a simulated network",
    RefusesAll: "refuses an ordinary FP32 network",
    StatesNumbers: "facts of the board that are no text",
    StatesNothing: "a timing states no facts",
    TimesNothing: "head_ms shows no time",
    TimesSomeAsZero: "a wall time is zero",
    TimesNaN: "stage_ms is not finite",
    KeepsMeans: r"stage_ms is \(2, 1\), not \[E, launches x R\]",
    SwapsNetworks: "not come in the order of the networks",
    SwapsClocks: "the clocks are swapped",
    SwapsStageAndHead: "stage and head are swapped",
    LeavesLast: "the replay leaves at",
    AnswersFromLast: "the replay answers",
    ForgetsThePolicysAnswer: "the replay answers",
    ReplaysInNoTime: "a replayed wall time is zero",
    ReplaysMeans: r"replayed times are not \[L, R\]",
    SwapsReplayedClocks: "a replay that sleeps spends as much CPU",
    ReplaysInSeconds: "a replay took less than its stages sleep",
    ReplaysNegativeCPU: "a replayed CPU time is negative",
    ReplaysOne: "there is not one replay per job",
    ReplaysWithoutAWord: "a replay states no facts",
    HasNoName: "the board has no name",
}


def test_an_honest_board_passes() -> None:
    check(Bench())


@pytest.mark.parametrize("cls", SABOTEURS)
def test_catches(cls: type[Board]) -> None:
    with pytest.raises(AssertionError, match=SABOTEURS[cls]):
        check(cls())
