"""Boards over SSH: a job is pushed, runs detached and bounded, and what it has finished is collected, whatever the link does."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import shlex
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np

from anytime import stops
from anytime.backend import Deployable, Segment
from anytime.board import Board, Replayed, Timing, board_test
from anytime.errors import AnytimeError, Unreachable, UsageError
from anytime.metrics import Floats
from anytime.nvidia import jetson
from anytime.policy import Policy

T = TypeVar("T")
Plain = dict[str, Any]
LOG = logging.getLogger(__name__)  # told of lost links and killed agents

CONNECT_S, LOGIN_S = 5.0, 20.0
KEEPALIVE_S, MISSED = 2.0, 3  # a link that is silent for longer than their product is lost
CALL_S = 8.0  # for a command that answers at once
STATE_S = 400.0  # importing engines, three processes of at most 120 s
PATIENCE_S = 300.0  # for a lost link to come back while a job runs
LIMIT_S = 2 * 3600  # of a whole job, kept on the board itself
SILENCE_S = 180.0  # of one task's process, kept there too
RESTARTS = 2  # of an agent that was killed
CHUNK = 2000  # samples of a prediction that are lost together
NOISY_SHARE = 0.10
FOLDER = ".anytime/jobs"
AGENT = Path(__file__).with_name("agent.py")
RUNS = {"onnx": "onnxruntime"}  # format of a Deployable -> the agent's engine


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

    def __post_init__(self) -> None:
        if not self.alias or self.threads < 1 or self.launches < 1 or self.warmup < 0:
            raise UsageError(
                f"Ssh: alias={self.alias!r}, threads={self.threads}, launches={self.launches}, warmup={self.warmup}: "
                "name a Host of ~/.ssh/config, threads >= 1, launches >= 1, warmup >= 0"
            )

    @property
    def name(self) -> str:
        return self.alias

    def _why_not(self, net: Deployable) -> str | None:
        if net.format not in RUNS:
            return f"{self.name} runs {', '.join(RUNS)}, not {net.format}: wrap the backend in OnnxRuntime"
        if net.needs:
            return f"{self.name} is not asked whether its CPU has kernels for these numbers ({', '.join(net.needs)})"
        if find_spec("asyncssh") is None:
            return "asyncssh is not installed here: pip install 'anytime[boards]'"
        return None

    def facts(self) -> dict[str, str]:
        return said_of(asyncio.run(self._state(with_engines=False)))

    def time(self, nets: Sequence[Deployable], x: Floats) -> list[Timing]:
        self._check(nets, x)
        with _Job(self) as job:
            job.samples("time", x)
            asked = [{"folder": job.net(net, _links(net))} for net in nets]
            for launch in range(self.launches):
                job.task(f"time-{launch}", kind="time", nets=asked, x="time.npy")
            found = asyncio.run(self._done(job))
        timings = []
        for i in range(len(nets)):
            parts = {
                name: np.concatenate([piece[f"{i}.{name}"] for piece in found.values()], axis=1)
                for name in ("stage_ms", "head_ms", "stage_cpu_ms", "head_cpu_ms")
            }
            timings.append(Timing(**parts, launches=self.launches, facts=self._facts(found, i, len(nets), len(x))))
        return timings

    def run(self, jobs: Sequence[tuple[Deployable, Policy]], x: Floats) -> list[Replayed]:
        self._check([net for net, _ in jobs], x)
        with _Job(self) as job:
            job.samples("replay", x)
            asked = []
            for net, policy in jobs:
                said = _on_board(net, policy, x)
                asked.append({"folder": job.net(net, list(net.plan(said["uses"]))), "policy": said})
            for launch in range(self.launches):
                job.task(f"replay-{launch}", kind="time", nets=asked, x="replay.npy")
            found = asyncio.run(self._done(job))
        replays = []
        for i, (net, policy) in enumerate(jobs):
            exits, wall, cpu, read = (
                np.stack([piece[f"{i}.{name}"] for piece in found.values()]) for name in ("exits", "wall_ms", "cpu_ms", "logits")
            )
            answered = np.stack([policy.answer(z, e) for z, e in zip(read, exits, strict=True)])
            if not np.isfinite(answered).all():
                raise AnytimeError(f"{self.name}: {policy.label} answers with logits of exits that were not read")
            answers = answered.argmax(-1)
            if moved := int(((exits != exits[0]) | (answers != answers[0])).any(0).sum()):
                raise AnytimeError(
                    f"{self.name}: {net.execution} under {policy.label} took other exits or gave other answers in another "
                    f"launch, on {moved} of {len(x)} samples: its kernels are not deterministic; try threads=1"
                )
            replays.append(Replayed(exits[0], answers[0], wall, cpu, self._facts(found, i, len(jobs), len(x))))
        return replays

    def predict(self, nets: Sequence[Deployable], parts: Mapping[str, Floats], batch: int = 64) -> list[dict[str, Floats]]:
        """What the board answers: per network, part ("val", "test") -> logits [E, N, K]. Not timed."""
        for x in parts.values():
            self._check(nets, x)
        with _Job(self) as job:
            for part, x in parts.items():
                job.samples(part, x)
            for i, net in enumerate(nets):
                folder = job.net(net, list(net.plan(range(net.n_exits))))
                for part, x in parts.items():
                    for first in range(0, len(x), CHUNK):
                        job.task(
                            f"predict-{i}-{part}-{first}", kind="predict", folder=folder, x=f"{part}.npy",
                            first=first, stop=min(first + CHUNK, len(x)), batch=batch,
                        )  # fmt: skip
            found = asyncio.run(self._done(job))
        return [
            {
                part: np.concatenate(
                    [found[f"predict-{i}-{part}-{first}"]["logits"] for first in range(0, len(x), CHUNK)], axis=1
                )
                for part, x in parts.items()
            }
            for i in range(len(nets))
        ]

    async def inspect(self) -> list[str]:
        """What a user wants to know of this board, a line each; what is wrong begins with "WRONG"."""
        try:
            state = await self._state()
        except AnytimeError as error:
            return [f"WRONG    {error}"]
        said = said_of(state)
        lines = [f"{name:<16} {text}" for name, text in said.items()]
        engines = state["engines"]
        lines += [f"{name:<16} {text or 'not installed'}" for name, text in engines.items()]
        lines += [f"{name:<16} {path or 'not found'}" for name, path in state["tools"].items()]
        lines.append(f"{'free':<16} {state['free_bytes'] / 1e9:.1f} GB")
        if state["jobs"]:
            lines.append(f"{'left there':<16} {len(state['jobs'])} jobs in ~/{FOLDER}; the command that began them collects them")
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
        for package in ("numpy", "onnxruntime"):
            if said := engines[package]:
                if said.startswith("broken"):
                    yield f"{self.name}: {package} is {said}"
                elif package == "onnxruntime" and self.provider not in said.split():
                    yield f"{self.name}: onnxruntime offers {' '.join(said.split()[1:])}, not {self.provider}: change provider="
            else:
                yield f"{self.name}: {self.python} has no {package}: install it there (nothing is installed for you), or set python="

    def _check(self, nets: Sequence[Deployable], x: Floats) -> None:
        if not len(x):
            raise UsageError(f"{self.name}: there is no sample to run; give at least one")
        for net in nets:
            if reason := self.why_not(net):
                raise AnytimeError(f"{self.name} cannot run {net.execution}: {reason}")

    async def _state(self, with_engines: bool = True) -> Plain:
        """Asked of an agent that is handed over through the pipe: nothing is written there."""
        async with _Link(self.alias) as link:
            command = f"{shlex.quote(self.python)} -B - state" + ("" if with_engines else " alone")
            said = await link.sh(command, STATE_S, given=AGENT.read_text())
            listed = await link.sh(f"ls {FOLDER} 2>/dev/null; true")
        try:
            state: Plain = json.loads(said)
        except ValueError as error:
            raise AnytimeError(
                f"{self.name}: the agent said {said[-200:]!r}, not its state: log in and try {self.python}"
            ) from error
        return state | {"jobs": listed.split()}

    async def _done(self, job: _Job) -> dict[str, Plain]:
        """Run a job to its end; task -> its arrays and what it said, in the order of the tasks."""
        if sentences := self.wrong(await self._state(with_engines=False)):
            raise AnytimeError("; ".join(sentences))
        job.seal(self)
        async with _Link(self.alias) as link:
            await _Remote(self, job, link).finished()
        return {name: _read_piece(self.name, job.results / f"{name}.npz", job.id) for name in job.names}

    def _facts(self, found: Mapping[str, Plain], i: int, interleaved: int, n: int) -> dict[str, str]:
        said = [piece["said"] for piece in found.values()]
        modes = {(state["nvpmodel"], state["emulated"]) for one in said for state in (one["before"], one["after"])}
        if len(modes) > 1:
            raise AnytimeError(f"{self.name}: its power mode changed during the measurement: leave it alone and measure again")
        last = said[-1]
        facts: dict[str, str] = (
            said_of(said[0]["before"])
            | {f"{name}_after": said_of(last["after"])[name] for name in ("celsius", "throttling")}
            | last["engines"][i]
            | _noise(said, self.threads)
            | {
                "threads": str(self.threads), "launches": str(self.launches), "warmup": str(self.warmup), "samples": str(n),
                "interleaved": str(interleaved), "job": last["job"],
                "agent": hashlib.sha256(AGENT.read_bytes()).hexdigest()[:12],
            }
        )  # fmt: skip
        return facts


def said_of(state: Plain) -> dict[str, str]:
    """The agent's raw state, read: what a reader of a record needs to judge a number. "unknown" where the board does not say."""
    who = jetson.identity(state["model"], state["compatible"], state["nv_tegra_release"])
    try:
        mode = jetson.power_mode(state["nvpmodel"] + "\n") if state["nvpmodel"] else None
        name, number = (mode.name, mode.id) if mode else ("none", None)
    except AnytimeError as error:
        name, number = f"unreadable: {error}", None
    packages = state["packages"]
    infer = [version for package, version in packages.items() if package.startswith(("tensorrt", "libnvinfer"))]
    clocks = state["cpu_khz"] + state["gpu_hz"]
    known = [(low, high) for _, low, high in clocks if low and high]
    said: dict[str, str] = {
        "cpu": state["cpu"] or "unknown",
        "cores": str(state["cores"]),
        "machine": state["machine"],
        "os": state["os"],
        "python": state["python"],
        "model": who.model or "unknown",
        "board": who.board or "unknown",
        "module": who.module or "unknown",
        "l4t": who.l4t or "unknown",
        "jetpack": packages.get("nvidia-jetpack") or who.jetpack or "unknown",
        "tensorrt": infer[0] if infer else "not installed",
        "cuda": state["cuda"] or "not installed",
        "power_mode": name,
        "power_mode_id": "unknown" if number is None else str(number),
        "clocks": "unknown" if not known else "fixed" if all(low == high for low, high in known) else "moving",
        "cpu_mhz": " ".join(f"{int(now) / 1e3:.0f}" for now, _, _ in state["cpu_khz"] if now) or "unknown",
        "gpu_mhz": " ".join(f"{int(now) / 1e6:.0f}" for now, _, _ in state["gpu_hz"] if now) or "unknown",
        "celsius": " ".join(f"{zone} {c:g}" for zone, c in state["celsius"].items()) or "unknown",
        "throttling": " ".join(f"{what} {level}" for what, level in state["throttling"].items()) or "none seen",
        "emulated": "yes" if state["emulated"] else "no",
    }
    return said


def _noise(said: Sequence[Plain], threads: int) -> dict[str, str]:
    wall = sum(one["wall_s"] for one in said)
    stalled = None if any(one["stalled_us"] is None for one in said) else sum(one["stalled_us"] for one in said)
    shares = {
        "pressure_share": None if stalled is None else 1e-6 * stalled / wall,
        "waiting_share": max(0.0, 1 - sum(one["cpu_s"] for one in said) / wall) if threads == 1 else None,
    }
    known = [share for share in shares.values() if share is not None]
    noisy = "unknown" if not known else "yes" if max(known) > NOISY_SHARE else "no"
    return {name: "unknown" if share is None else f"{share:.3f}" for name, share in shares.items()} | {"noisy": noisy}


# Jobs


class _Job(contextlib.ExitStack):
    """A folder of its own with all that the board needs; its name there is made of its content."""

    def __init__(self, board: Ssh) -> None:
        super().__init__()
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="anytime-ssh-")))
        self.folder, self.results = self.root / "job", self.root / "results"
        self.folder.mkdir()
        self.results.mkdir()
        self.tasks: list[Plain] = []
        self.id = ""
        self._known: dict[tuple[int, tuple[Segment, ...]], str] = {}
        self._engines: set[str] = set()

    @property
    def names(self) -> list[str]:
        return [task["name"] for task in self.tasks]

    def samples(self, name: str, x: Floats) -> None:
        np.save(self.folder / f"{name}.npy", np.ascontiguousarray(x, dtype=np.float32))

    def task(self, name: str, **said: Any) -> None:
        self.tasks.append({"name": name, **said})

    def net(self, net: Deployable, segments: Sequence[Segment]) -> str:
        """Write these segments as a bundle (see bundle.py), once; answer its folder."""
        known = (id(net), tuple(segments))
        if known not in self._known:
            self._known[known] = folder = f"net-{len(self._known)}"
            (self.folder / folder).mkdir()
            said = []
            for segment in segments:
                body = net.graph(segment)  # type: ignore[attr-defined]  # every net of a format in RUNS has it
                file = f"{segment.first}-{segment.stop}-{'state' if segment.head is None else segment.head}.onnx"
                (self.folder / folder / file).write_bytes(body)
                said.append({"file": file, "sha256": hashlib.sha256(body).hexdigest(), **segment._asdict()})
            manifest = {
                "kind": "anytime bundle", "schema": 1, "n_exits": net.n_exits, "restarts": net.restarts,
                "float_biases": bool(getattr(net, "float_biases", False)), "segments": said,
            }  # fmt: skip
            (self.folder / folder / "manifest.json").write_text(json.dumps(manifest))
            self._engines.add(RUNS[net.format])
        return self._known[known]

    def seal(self, board: Ssh) -> None:
        """Write what is left and give the job its name."""
        (engine,) = self._engines
        for file in (AGENT, Path(stops.__file__)):
            (self.folder / file.name).write_bytes(file.read_bytes())
        job = {
            "engine": engine, "provider": board.provider, "threads": board.threads, "warmup": board.warmup,
            "silence_s": SILENCE_S, "tasks": self.tasks,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps([board.alias, job], sort_keys=True).encode())
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(self.folder)).encode() + hashlib.sha256(path.read_bytes()).digest())
        self.id = digest.hexdigest()[:16]
        (self.folder / "job.json").write_text(json.dumps(job | {"id": self.id}))


def _links(net: Deployable) -> list[Segment]:
    return [s for k in range(net.n_exits) for s in (Segment(k, k + 1, None), Segment(k + 1, k + 1, k))]


def _on_board(net: Deployable, policy: Policy, x: Floats) -> Plain:
    # export.py lies above the boards in the order of rooms; see DESIGN.
    said: Plain = board_test(policy, net.predict(x[:256]))
    return said


def _read_piece(board: str, path: Path, job: str) -> Plain:
    try:
        with np.load(path) as arrays:
            piece: Plain = dict(arrays)
        piece["said"] = json.loads(str(piece["said"]))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise AnytimeError(f"{board}: the result {path.stem} cannot be read ({error}): measure again") from error
    if piece["said"]["job"] != job:
        raise AnytimeError(f"{board}: the result {path.stem} is of another job: measure again")
    return piece


# The link


class _Lost(Exception):
    """The connection is gone, and says nothing of what runs there."""


class _Link:
    """One connection, made again when it is lost."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.lost = 0
        self._conn: Any = None

    async def __aenter__(self) -> _Link:
        await self._connect()
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._drop()

    async def _connect(self) -> None:
        import asyncssh

        said: Plain = {"connect_timeout": CONNECT_S, "login_timeout": LOGIN_S}
        said |= {"keepalive_interval": KEEPALIVE_S, "keepalive_count_max": MISSED}
        try:
            options = await asyncssh.SSHClientConnectionOptions.construct(None, config=(), host=self.alias, port=())
            if options.known_hosts is None:  # asyncssh would then take any
                raise UsageError(
                    f"~/.ssh/config says UserKnownHostsFile none for {self.alias}: no host key would be checked; remove that line"
                )
            self._conn = await asyncio.wait_for(asyncssh.connect(self.alias, **said), CONNECT_S + LOGIN_S)
        except asyncssh.HostKeyNotVerifiable as error:
            raise AnytimeError(
                f"{self.alias}: its host key is unknown or has changed ({error}): log in once with ssh {self.alias} and compare "
                "the key; if the board was set up anew, remove the old one with ssh-keygen -R"
            ) from error
        except asyncssh.PermissionDenied as error:
            raise AnytimeError(f"{self.alias} lets nobody in ({error}): see that ssh {self.alias} needs no password") from error
        except (asyncssh.ConfigParseError, asyncssh.KeyImportError, FileNotFoundError) as error:
            raise UsageError(
                f"~/.ssh/config, or a key that it names, cannot be read for {self.alias} ({error}): mend it"
            ) from error
        except (asyncssh.Error, OSError, TimeoutError) as error:
            reason = str(error) or "no answer"
            raise Unreachable(f"{self.alias} cannot be reached ({reason}): is it on, and does ssh {self.alias} work?") from error

    def _drop(self) -> None:
        if self._conn is not None:
            self._conn.abort()
            self._conn = None

    async def _once(self, work: Callable[[Any], Awaitable[T]], limit_s: float) -> T:
        import asyncssh

        try:
            return await asyncio.wait_for(work(self._conn), limit_s)
        except (asyncssh.DisconnectError, asyncssh.ChannelOpenError, ConnectionError, TimeoutError) as error:
            raise _Lost(str(error) or f"no answer within {limit_s:g} s") from error
        except asyncssh.SFTPError as error:
            if isinstance(error, asyncssh.SFTPNoConnection | asyncssh.SFTPConnectionLost):
                raise _Lost(str(error)) from error
            raise

    async def ask(self, work: Callable[[Any], Awaitable[T]], limit_s: float = CALL_S) -> T:
        """Do ``work`` with the connection; while the link is lost, try to get it back and do it again: it must bear that."""
        until = 0.0
        while True:
            try:
                if self._conn is None:
                    await self._connect()
                return await self._once(work, limit_s)
            except (_Lost, Unreachable) as error:
                if isinstance(error, _Lost):
                    self.lost += 1
                    LOG.warning(f"{self.alias}: the link is lost ({error})")
                    self._drop()
                until = until or monotonic() + PATIENCE_S
                if monotonic() > until:
                    raise Unreachable(
                        f"{self.alias} did not come back within {PATIENCE_S:g} s: what runs there goes on, the same command "
                        "collects it"
                    ) from error
                await asyncio.sleep(1)

    async def sh(self, command: str, limit_s: float = CALL_S, given: str | None = None) -> str:
        """What a command writes; AnytimeError where it fails."""
        import asyncssh

        async def work(conn: Any) -> tuple[int, str, str]:
            done = await conn.run(command, check=False, **({"stdin": asyncssh.DEVNULL} if given is None else {"input": given}))
            # Killed with its session, asyncssh says None; others say -1, ssh itself 255.
            if done.exit_status in (None, -1, 255):
                raise _Lost("the session was closed")
            return done.exit_status, str(done.stdout), str(done.stderr)

        code, out, err = await self.ask(work, limit_s)
        if code:
            words = [line for line in err.splitlines() if line.strip()]
            raise AnytimeError(
                f"{self.alias}: {command.split()[0]} failed there ({words[-1] if words else f'exit status {code}'})"
            )
        return out


@dataclass
class _Remote:
    """A job on its board."""

    board: Ssh
    job: _Job
    link: _Link
    taken: set[str] = field(default_factory=set)

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.job.id}"

    async def finished(self) -> None:
        """Push it unless it is there, run it to its end, bring everything home, leave nothing behind."""
        deadline, restarts, nap = monotonic() + LIMIT_S + PATIENCE_S, RESTARTS, 0.1
        if (await self._look())[0] == "absent":
            await self._push()
        await self._start()
        while True:
            state, there = await self._look()
            await self._take(there)
            if state == "0":
                break
            if state != "running":
                if restarts and state in ("gone", "129", "130", "137", "143"):
                    restarts -= 1
                    LOG.warning(f"{self.board.name}: the agent was killed; it goes on with what is missing")
                    await self._start()
                else:
                    await self._failed(state)
            if monotonic() > deadline:
                raise AnytimeError(f"{self.board.name}: the job {self.job.id} did not end within {LIMIT_S + PATIENCE_S:g} s")
            await asyncio.sleep(nap)
            nap = min(1.0, 2 * nap)
        await self._clear()
        for name in self.job.names:
            if (error := self.job.results / f"{name}.error").exists():
                raise AnytimeError(f"{self.board.name}, {name}: the process that ran it {error.read_text()}")
            if not (self.job.results / f"{name}.npz").exists():
                raise AnytimeError(f"{self.board.name}, {name}: the agent ended well and left no result: measure again")

    @property
    def _alive(self) -> str:
        """A shell's test whether the agent's wrapper runs: its number may be another process's since, so its words must name the job.

        While a process becomes another program its words are empty, and its number is written only when it runs: so three looks.
        """
        seen = f"grep -qs {self.job.id} /proc/$(cat pid 2>/dev/null)/cmdline"
        return f"{{ {seen} || {{ sleep 0.5; {seen}; }} || {{ sleep 1; {seen}; }}; }}"

    async def _look(self) -> tuple[str, list[str]]:
        """absent, running, gone, or the agent's exit status; the results that are there."""
        # The status once more at the end: it may have come while the wrapper was looked for.
        said = await self.link.sh(
            f"cd {self.folder} 2>/dev/null || {{ echo absent; exit 0; }}; "
            f"if [ -f rc ]; then cat rc; elif {self._alive}; then echo running; elif [ -f rc ]; then cat rc; else echo gone; fi; "
            "ls results 2>/dev/null; true"
        )
        state, *there = said.split()
        return state, [name for name in there if name.endswith((".npz", ".error"))]

    async def _push(self) -> None:
        import asyncssh

        size = sum(p.stat().st_size for p in self.job.folder.rglob("*") if p.is_file())

        async def push(conn: Any) -> None:
            async with conn.start_sftp_client() as sftp:
                await sftp.makedirs(FOLDER, exist_ok=True)
                part = f"{self.folder}.part"
                if await sftp.exists(self.folder):  # the link was lost after all was done
                    return
                if await sftp.exists(part):
                    await sftp.rmtree(part)
                try:
                    await sftp.put(str(self.job.folder), part, recurse=True)
                    await sftp.rename(part, self.folder)
                except asyncssh.SFTPError as error:
                    if isinstance(error, asyncssh.SFTPNoConnection | asyncssh.SFTPConnectionLost):
                        raise
                    free = await sftp.statvfs(FOLDER)
                    await sftp.rmtree(part, ignore_errors=True)
                    raise AnytimeError(
                        f"{self.board.name}: cannot write {size / 1e6:.1f} MB to ~/{FOLDER} ({error.reason or type(error).__name__}, "
                        f"{free.bavail * free.frsize / 1e6:.1f} MB are free): free space there"
                    ) from error

        await self.link.ask(push, 30 + size / 50e3)

    async def _start(self) -> None:
        """Start the agent, unless it runs or has ended."""
        agent = f"timeout -k 5 {LIMIT_S} {shlex.quote(self.board.python)} -B agent.py run"
        inner = f"echo $$ >pid; {agent} >out 2>err; echo $? >rc.tmp; mv rc.tmp rc"
        # Asked again after a lost link, it must not run twice.
        await self.link.sh(
            f"cd {self.folder} || exit 1; grep -qs '^0$' rc && exit 0; [ ! -f pid ] || ! {self._alive} || exit 0; rm -f rc pid; "
            f"setsid nohup sh -c {shlex.quote(inner)} {self.job.id} </dev/null >/dev/null 2>&1 &"
        )

    async def _take(self, there: Sequence[str]) -> None:
        """Bring home what is new."""
        new = [name for name in there if name not in self.taken]
        if not new:
            return

        async def get(conn: Any) -> None:
            async with conn.start_sftp_client() as sftp:
                for name in new:
                    await sftp.get(f"{self.folder}/results/{name}", str(self.job.results / f"{name}.part"))
                    (self.job.results / f"{name}.part").rename(self.job.results / name)

        await self.link.ask(get, 600)
        self.taken |= set(new)

    async def _failed(self, state: str) -> None:
        words = (await self.link.sh(f"tail -n 1 {self.folder}/err 2>/dev/null; true")).strip()
        kept = f"{len(self.taken)} of {len(self.job.names)} results were finished"
        await self._clear()
        how = {"124": f"took longer than {LIMIT_S} s and was ended", "gone": "vanished without a word (was it started anew?)"}
        raise AnytimeError(
            f"{self.board.name}: the agent {how.get(state, f'failed with exit status {state}')}; {kept}"
            + (f": {words}" if words else "")
        )

    async def _clear(self) -> None:
        await self.link.sh(f"rm -rf {self.folder} {self.folder}.part; rmdir {FOLDER} .anytime 2>/dev/null; true", 60)
