"""Boards over SSH: a job is pushed, runs detached and bounded, and what it has finished is collected, whatever the link does."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from anytime.backend import Deployable, links
from anytime.board import Board, Replayed, Timing
from anytime.boards.ssh import results
from anytime.boards.ssh.job import MACHINE, RUNS, Job, agent_sha256, on_board
from anytime.boards.ssh.link import Link, address_missing, waited
from anytime.boards.ssh.remote import FOLDER, Remote
from anytime.boards.ssh.said import said_of
from anytime.errors import AnytimeError, Unsupported, UsageError, install
from anytime.metrics import Floats
from anytime.policy import Policy

Plain = dict[str, Any]

STATE_S = 500.0  # importing engines, four processes of at most 120 s
MOST_BYTES = 2**30  # of samples that are sent to be answered
CHUNK = 2000  # samples of a prediction that are lost together
WINDOW_S = 12  # of power, at rest and for each exit: the sensors want 10 of readings
RUN_S = 30  # at most, of trtexec on one engine: 11 of them are measured


@dataclass(frozen=True)
class Ssh(Board):
    """A machine that ``ssh ALIAS`` reaches: a Jetson, or any Linux with Python 3.6, numpy and the engine.

    Address, user and keys stay in ~/.ssh/config; the host key must be known there. ``board`` (a name of jetson.MODULES, as "AGX
    Xavier"), ``power_mode`` (as nvpmodel calls it) and ``fixed_clocks`` (jetson_clocks) are what a measurement insists on;
    "" and False take any. ``provider`` is ONNX Runtime's. An ``emulated`` machine is refused, unless that is wanted: its
    measurements say ``emulated: yes``, and no table takes them.

    A job runs detached and bounded on the board, is polled, and found again by its content after the link was lost or
    this process was ended. Exit status None, -1 or 255 of ssh means a lost link, never a failure. Latency only (batch 1), rounds
    interleaved as Host does; launches follow each other in the sample axis. A policy that answers with other logits than those
    of the exit taken (SDN, ZTW) gets its answer here, from the logits that the board has read: its time lacks that step.

    TensorRT's engines are built there, one for each segment, and run by its Python, states staying on the GPU; where the board has
    only trtexec that builds and times them, and no policy is executed. ``energy``: where there is tegrastats, mJ of an inference to each
    exit, above idle, over windows of 12 s of their own.

    Source: this project.
    """

    alias: str
    board: str = ""
    power_mode: str = ""
    fixed_clocks: bool = False
    provider: str = "CPUExecutionProvider"
    python: str = "python3"
    threads: int = 1
    launches: int = 3
    warmup: int = 10
    emulated: bool = False
    energy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alias or self.threads < 1 or self.launches < 1 or self.warmup < 0:
            raise UsageError(
                f"Ssh: alias={self.alias!r}, threads={self.threads}, launches={self.launches}, warmup={self.warmup}: "
                "name a Host of ~/.ssh/config, threads >= 1, launches >= 1, warmup >= 0"
            )
        if "/" in self.python and not self.python.startswith("/"):
            raise UsageError(
                f"Ssh: python={self.python!r} is no whole path, and a job runs in a folder of its own: "
                "give /home/USER/venv/bin/python, or a name that is on the board's PATH"
            )

    @property
    def name(self) -> str:
        return self.alias

    def _why_not(self, net: Deployable) -> str | None:
        if net.format == "torch2trt":
            return f"engines of torch2trt run only where torch has made them, not on {self.name}: take TensorRT(of=...)"
        if net.format not in RUNS:
            return f"{self.name} runs {', '.join(RUNS)}, not {net.format}: wrap the backend in OnnxRuntime or TensorRT"
        if not hasattr(net, "graph"):
            return f"{self.name} runs one network at a time, and {net.execution} is several: measure its members"
        if net.bits and net.format == "onnx" and self.provider != "CPUExecutionProvider":
            return f"ONNX Runtime's {self.provider} has no integer kernels and would compute in float: take TensorRT(of=...)"
        if net.needs:
            return f"{self.name} is not asked whether its CPU has kernels for these numbers ({', '.join(net.needs)})"
        return self.lacks(net.format, net.needs)

    def lacks(self, form: str, needs: Sequence[str]) -> str | None:
        if find_spec("asyncssh") is None:
            return f"asyncssh is not installed here: {install('boards')}"
        return address_missing(self.alias)

    def facts(self) -> dict[str, str]:
        return said_of(waited(self._state(with_engines=False)))

    def time(self, nets: Sequence[Deployable], x: Floats) -> list[Timing]:
        with self._job(nets, x) as job:
            job.samples("time", x)
            folders = [job.net(net, links(net)) for net in nets]
            alone = {i: f"trtexec-{i}" for i, net in enumerate(nets) if job.by_trtexec(net)}
            together = [i for i in range(len(nets)) if i not in alone]
            for launch in range(self.launches):
                if together:
                    job.task(f"time-{launch}", kind="time", nets=[{"folder": folders[i]} for i in together], x="time.npy")
                for i, name in alone.items():
                    runs = job.timed_by_trtexec(nets[i], links(nets[i]))
                    job.task(f"{name}-{launch}", kind="trtexec", runs=runs, takes_s=RUN_S * len(runs))
            tegrastats = job.state["tools"]["tegrastats"] if self.energy else ""
            for i in together if tegrastats else ():
                about = {"tegrastats": tegrastats, "window_s": WINDOW_S, "takes_s": 2 * WINDOW_S * (nets[i].n_exits + 1)}
                job.task(f"power-{folders[i]}", kind="power", folder=folders[i], x="time.npy", **about)
            waited(self._done(job))
            return [
                self._timing(job, net, folder, alone.get(i, "time"), together.index(i) if i in together else None, len(x))
                for i, (net, folder) in enumerate(zip(nets, folders, strict=True))
            ]

    def _timing(self, job: Job, net: Deployable, folder: str, tasks: str, place: int | None, n: int) -> Timing:
        """Of one network, from the tasks of this name; ``place`` among those that ran together, None by trtexec."""
        pieces = [job.piece(f"{tasks}-{launch}") for launch in range(self.launches)]
        mj: tuple[float | None, ...] = ()
        if place is None:
            times = results.by_trtexec(pieces, folder, net, job.tool.version)
            facts = self._facts(pieces, results.BY_TRTEXEC | {"engine": f"trtexec {job.tool.name}"}, 1, n, job)
        else:
            times, ran = results.stepped(pieces, place), pieces[-1]["said"]["engines"][place]
            facts = self._facts(pieces, ran, len(pieces[-1]["said"]["engines"]), n, job)
        if f"power-{folder}" in job.names:
            mj, power = results.energy(facts["board"], job.piece(f"power-{folder}"), net.n_exits)
            facts |= power
        rows: tuple[Plain, ...] = ()
        if net.format == "tensorrt":
            rows, built = results.engines(job.piece("build"), pieces[-1], folder, net)
            facts |= job.tool.facts | built
        return Timing(**times, launches=self.launches, facts=facts, layers=rows, energy_mj=mj, restarts=net.restarts)

    def run(self, jobs: Sequence[tuple[Deployable, Policy]], x: Floats) -> list[Replayed]:
        with self._job([net for net, _ in jobs], x) as job:
            self._answered_by(job, [net for net, _ in jobs])
            job.samples("replay", x)
            asked = []
            for net, policy in jobs:
                said = on_board(net, policy, x)
                asked.append({"folder": job.net(net, list(net.plan(said["uses"]))), "policy": said})
            for launch in range(self.launches):
                job.task(f"replay-{launch}", kind="time", nets=asked, x="replay.npy")
            waited(self._done(job))
            pieces = [job.piece(f"replay-{launch}") for launch in range(self.launches)]
        replays = []
        for i, (net, policy) in enumerate(jobs):
            exits, wall, cpu, read = (
                np.stack([piece[f"{i}.{name}"] for piece in pieces]) for name in ("exits", "wall_ms", "cpu_ms", "logits")
            )
            answered = np.stack([policy.answer(z, e) for z, e in zip(read, exits, strict=True)])
            if not np.isfinite(answered).all():
                raise AnytimeError(f"{self.name}: {policy.label} answers with logits of exits that were not read")
            answers = answered.argmax(-1)
            self.check_launches(net, policy, exits, answers)
            ran = pieces[-1]["said"]["engines"][i]
            replays.append(Replayed(exits[0], answers[0], wall, cpu, self._facts(pieces, ran, len(jobs), len(x), job)))
        return replays

    def predict(self, nets: Sequence[Deployable], parts: Mapping[str, Floats], batch: int = 64) -> list[dict[str, Floats]]:
        """What the board answers: per network, part ("val", "test") -> logits [E, N, K]. Not timed; TensorRT takes samples one by one."""
        pieces: list[dict[str, Floats]] = []
        for x in parts.values():
            self._check(nets, x)
        with self._job(nets, next(iter(parts.values()))) as job:
            self._answered_by(job, nets)
            for part, x in parts.items():
                job.samples(part, x)
            for i, net in enumerate(nets):
                folder = job.net(net, list(net.plan(range(net.n_exits))))
                for part, x in parts.items():
                    for first in range(0, len(x), CHUNK):
                        job.task(
                            f"predict-{i}-{part}-{first}", kind="predict", folder=folder, x=f"{part}.npy",
                            first=first, stop=min(first + CHUNK, len(x)), batch=1 if net.format == "tensorrt" else batch,
                        )  # fmt: skip
            waited(self._done(job))
            for i in range(len(nets)):
                chunks = {part: range(0, len(x), CHUNK) for part, x in parts.items()}
                pieces.append(
                    {
                        part: np.concatenate([job.piece(f"predict-{i}-{part}-{first}")["logits"] for first in firsts], axis=1)
                        for part, firsts in chunks.items()
                    }
                )
        return pieces

    def answers(self, nets: Sequence[Deployable], parts: Mapping[str, Floats]) -> list[dict[str, Floats] | None]:
        """TensorRT's, which no other machine has; None too by trtexec alone, and where the samples are too many to be sent."""
        found: list[dict[str, Floats] | None] = [None] * len(nets)
        its = [i for i, net in enumerate(nets) if net.format == "tensorrt"]
        if its and sum(x.nbytes for x in parts.values()) <= MOST_BYTES:
            with contextlib.suppress(Unsupported):
                for i, said in zip(its, self.predict([nets[i] for i in its], parts), strict=True):
                    found[i] = said
        return found

    def _answered_by(self, job: Job, nets: Sequence[Deployable]) -> None:
        """Unsupported where only trtexec would run them."""
        for net in nets:
            if job.by_trtexec(net):
                raise Unsupported(
                    f"{self.name} uses TensorRT by {job.tool.facts['tensorrt_by']}, which times engines but runs no policy on samples: "
                    "install TensorRT's Python there (python3-libnvinfer), or set python= to an interpreter that has it"
                )

    async def inspect(self) -> list[str]:
        """What a user wants to know of this board, a line each; what is wrong begins with "WRONG"."""
        try:
            state = await self._state()
        except AnytimeError as error:
            return [f"WRONG    {error}"]
        said = said_of(state)
        lines = [f"{name:<18} {text}" for name, text in said.items()]
        engines = state["engines"]
        for name, text in engines.items():
            if name != "trtexec":
                lines.append(f"{'python ' + name:<18} {text or 'not installed'}")
        for name, path in state["tools"].items():
            lines.append(f"{name:<18} {' '.join((path, engines.get(name, ''))) if path else 'not found'}")
        lines.append(f"{'free':<18} {state['free_bytes'] / 1e9:.1f} GB")
        if state["jobs"]:
            lines.append(f"{'left there':<18} {len(state['jobs'])} jobs in ~/{FOLDER}; the command that began them collects them")
        return lines + [f"WRONG    {sentence}" for sentence in (*self.wrong(state), *self._lacking(engines))]

    def wrong(self, state: Plain) -> list[str]:
        """Why a measurement there would not be of what is wanted: board, power mode, clocks, emulation; a sentence each."""
        said, sentences = said_of(state), []
        if self.board and said["board"] != self.board:
            what = (
                f"a {said['board']} ({said['model']})"
                if said["board"] != "unknown"
                else f"no Jetson that we know ({said['model']})"
            )
            sentences.append(
                f"{self.name} is {what}, not the {self.board} that is wanted: mend HostName in ~/.ssh/config, or board= in its file"
            )
        if self.power_mode and said["power_mode"] != self.power_mode:
            sentences.append(
                f"{self.name} runs in power mode {said['power_mode']} (id {said['power_mode_id']}), not in {self.power_mode}: "
                "set it there with sudo nvpmodel -m ID (nvpmodel -p --verbose lists them), or change power_mode= in its file"
            )
        if self.fixed_clocks and said["clocks"] != "fixed":
            sentences.append(f"{self.name}: its clocks are {said['clocks']}, not fixed: run sudo jetson_clocks there")
        if state["emulated"] and not self.emulated:
            sentences.append(
                f"{self.name} is emulated ({state['emulated']}), its times mean nothing: give a real board, "
                "or emulated=True to check answers only"
            )
        return sentences

    def _lacking(self, engines: Mapping[str, str]) -> Iterator[str]:
        """What keeps every engine there from running; one of ONNX Runtime and TensorRT is enough."""
        other = engines["tensorrt"] or engines["trtexec"]
        for package in ("numpy", "onnxruntime"):
            if said := engines[package]:
                if said.startswith("broken"):
                    yield f"{self.name}: {package} is {said}"
                elif package == "onnxruntime" and self.provider not in said.split():
                    yield f"{self.name}: onnxruntime offers {' '.join(said.split()[1:])}, not {self.provider}: change provider="
            elif package == "numpy" or not other:
                yield f"{self.name}: {self.python} has no {package}: install it there (nothing is installed for you), or set python="
        for name in ("tensorrt", "trtexec"):
            if engines[name].startswith("broken"):
                yield f"{self.name}: {name} is {engines[name]}"

    def _check(self, nets: Sequence[Deployable], x: Floats) -> None:
        if not len(x):
            raise UsageError(f"{self.name}: there is no sample to run; give at least one")
        for net in nets:
            if reason := self.why_not(net):
                raise AnytimeError(f"{self.name} cannot run {net.execution}: {reason}")

    async def _state(self, with_engines: bool = True) -> Plain:
        """Asked of an agent that is handed over through the pipe: nothing is written there."""
        async with Link(self.alias) as link:
            command = f"{shlex.quote(self.python)} -B -" + ("" if with_engines else " alone")
            said = await link.sh(command, STATE_S, given=MACHINE.read_text())
            listed = await link.sh(f"ls {FOLDER} 2>/dev/null; true")
        try:
            state: Plain = json.loads(said)
        except ValueError as error:
            raise AnytimeError(
                f"{self.name}: the agent said {said[-200:]!r}, not its state: log in and try {self.python}"
            ) from error
        return state | {"jobs": listed.split()}

    def _job(self, nets: Sequence[Deployable], x: Floats) -> Job:
        """An empty job for a board that is what is wanted."""
        self._check(nets, x)
        state = waited(self._state(with_engines=any(net.format == "tensorrt" for net in nets)))
        if sentences := self.wrong(state):
            raise AnytimeError("; ".join(sentences))
        return Job(self.name, state, {"provider": self.provider, "threads": self.threads, "warmup": self.warmup})

    async def _done(self, job: Job) -> None:
        """Run a job to its end."""
        job.seal()
        async with Link(self.alias) as link:
            await Remote(self.name, self.python, job, link).finished()

    def _facts(self, pieces: Sequence[Plain], ran: dict[str, str], interleaved: int, n: int, job: Job) -> dict[str, str]:
        said = [piece["said"] for piece in pieces]
        modes = {(state["nvpmodel"], state["emulated"]) for one in said for state in (one["before"], one["after"])}
        if len(modes) > 1:
            raise AnytimeError(f"{self.name}: its power mode changed during the measurement: leave it alone and measure again")
        # A job of before is collected too, and it may have run before somebody changed the board, or what its file wants.
        if sentences := [s for one in said for state in (one["before"], one["after"]) for s in self.wrong(state)]:
            raise AnytimeError(f"while it was measured, {'; '.join(dict.fromkeys(sentences))}; then measure again")
        facts: dict[str, str] = (
            said_of(said[0]["before"])
            | {f"{name}_after": said_of(said[-1]["after"])[name] for name in ("celsius", "throttling")}
            | ran
            | results.noise(said, self.threads)
            | {
                "threads": str(self.threads), "launches": str(self.launches), "warmup": str(self.warmup), "samples": str(n),
                "interleaved": str(interleaved), "job": job.id, "agent": agent_sha256(),
            }
        )  # fmt: skip
        return facts
