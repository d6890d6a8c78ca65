"""This machine's own CPU, or its GPU, timed in fresh processes (anytime/stopwatch.py)."""

from __future__ import annotations

import importlib.util
import os
import pickle
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anytime import cpu
from anytime.backend import Deployable
from anytime.board import Board, Replayed, Timing
from anytime.errors import AnytimeError, UsageError
from anytime.metrics import Floats
from anytime.policy import Policy

Job = tuple[Deployable, Policy | None]  # without a policy: link by link

SILENCE_S = 180.0  # a child beats about every second; opening a network or a segment of it is the longest between two
AT_ONCE = 8  # batches that a policy is executed on together
ENGINES = {
    "torch": "torch",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tflite": "tensorflow",
}  # format -> package that runs it
NOISY_SHARE = 0.10
NOISY_RULE = (
    f"yes when, over the rounds, tasks waited for a CPU (Linux's pressure 'some') for more than {NOISY_SHARE:.0%} of the time, "
    f"or the one measuring thread was off its CPU for more than {NOISY_SHARE:.0%}"
)


@dataclass(frozen=True)
class Host(Board):
    """Time networks on this machine in ``launches`` fresh processes one after the other.

    ``batch`` 1 is latency. With more it is throughput: x is cut into batches, and times are those of a batch divided by its size,
    whole batches alone. A policy is executed on 8 batches at a time, where samples that stay wait for each other, so that
    segments run on full ones (anytime/execute.py); these samples share one reading. UsageError with fewer samples than a reading takes.

    Every launch runs every sample. After ``warmup`` runs of each network the networks take turns, in an order that
    is drawn anew for each round. A turn times 8 batches, one by one, after 3 untimed runs (on those before
    them) that bring the network's weights, code and branch history back into the core, as in a program that runs
    nothing else: a time must not depend on the company that it was measured in. (Six of B-AlexNet's size, one thread of
    ONNX Runtime: without these runs heads take 60 % and stages 8 to 23 % longer than alone, with them as long.)
    Engines get processes of their own, their launches taking turns: beside torch, which gives its memory back after each run, others
    are slower for as long as it is there (benchmarks/company.py), and the idle threads of one keep spinning on the cores of the next.

    Handing a sample over (``start``) counts to the first stage. A replay is timed from the sample to the class, exit
    tests included. Launches follow each other in the sample axis of ``Timing``: [E, launches x R]. Clock readings are
    not subtracted; the facts say what they take. Facts of one network: ``first_answer_ms`` from opening it to its first answer,
    and ``memory_mb``, by how much opening and running it once raised the peak of the process; medians over launches, absent where
    another job had opened it.

    ``device`` "cuda" runs what torch runs as it stands on torch's current GPU, in channels_last; FP16 and BF16 are networks that
    ``Float16()`` and ``BFloat16()`` made, which they do where the CPU has such kernels too. Times hold the transfers: the sample's to
    the GPU, each read head's logits back, which is what is waited for; timed link by link, every stage and every head is waited for.
    CPU times hold what the process waits in, ``first_answer_ms`` starting CUDA, ``memory_mb`` the host's memory alone. Written
    without a GPU at hand and never run on one.

    Source: this project.
    """

    threads: int = 1
    launches: int = 3
    warmup: int = 10
    batch: int = 1
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads < 1 or self.launches < 1 or self.warmup < 0 or self.batch < 1:
            raise UsageError(
                f"Host: threads={self.threads}, launches={self.launches}, warmup={self.warmup}, batch={self.batch}: "
                "use threads >= 1, launches >= 1, warmup >= 0, batch >= 1"
            )

    @property
    def name(self) -> str:
        return "host" + ", cuda" * (self.device == "cuda") + f", batch {self.batch}" * (self.batch > 1)

    def _why_not(self, net: Deployable) -> str | None:
        if net.format not in ENGINES:
            return f"host runs {', '.join(ENGINES)}, not {net.format}"
        if self.device not in net.devices:
            return (
                f"host, cuda runs what torch runs as it stands, not {net.execution}: ONNX Runtime would need its CUDA provider, "
                "which no session here asks for, torch.compile and ensembles a device of their own; OpenVINO and TFLite have no CUDA"
            )
        return self.lacks(net.format, net.needs)

    def lacks(self, form: str, needs: Sequence[str]) -> str | None:
        package = ENGINES.get(form)
        if package and importlib.util.find_spec(package) is None:
            return f"{package} is not installed here: pip install {package}"
        if self.threads > _cores():
            return f"host may use {_cores()} cores, fewer than threads={self.threads}: set fewer threads"
        if self.device == "cuda":  # the CPU's kernels do not matter
            return _no_cuda(needs)
        if needs:
            wanted = ", ".join(needs)
            if not cpu.flags():
                return f"this system does not say whether its CPU has one of {wanted}: it might time an emulation"
            if not cpu.has_any(tuple(needs)):
                return f"this CPU has no kernels for these numbers (none of {wanted}): it would time an emulation"
        return None

    def facts(self) -> dict[str, str]:
        mhz = cpu.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
        avg10 = re.search(r"some avg10=([\d.]+)", cpu.read("/proc/pressure/cpu"))
        return {
            "cpu": cpu.info("model name") or platform.processor() or "unknown",
            "flags": cpu.of_note(),
            "cores": f"{_cores()} of {os.cpu_count()}",
            "threads": str(self.threads),
            "batch": str(self.batch),
            "governor": cpu.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
            "mhz": f"{int(mhz) / 1e3:.0f}" if mhz else cpu.info("cpu MHz") or "unknown",
            "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f}",
            "os": platform.platform(),
            "python": platform.python_version(),
            **{package: _version(package) for package in (*ENGINES.values(), "numpy")},
            "pressure_avg10": avg10[1] if avg10 else "unknown",
            "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
            **(_gpu() if self.device == "cuda" else {}),
        }

    def time(self, nets: Sequence[Deployable], x: Floats) -> list[Timing]:
        timings, whole = [], x[: max(self.batch, len(x) // self.batch * self.batch)]
        measured = self._measure([(net, None) for net in nets], whole, self.batch)
        for net, (readings, facts) in zip(nets, measured, strict=True):
            ms = 1e-6 / self.batch * readings.reshape(-1, readings.shape[2] // 4, 2, 2).transpose(2, 3, 1, 0)
            (stage, stage_cpu), (head, head_cpu) = ms
            timings.append(Timing(stage, head, stage_cpu, head_cpu, self.launches, facts, restarts=net.restarts))
        return timings

    def run(self, jobs: Sequence[tuple[Deployable, Policy]], x: Floats) -> list[Replayed]:
        replays, at_once = [], 1 if self.batch == 1 else AT_ONCE * self.batch
        for (net, policy), (readings, facts) in zip(jobs, self._measure(jobs, x, at_once), strict=True):
            wall, spent, exits, answers = readings.transpose(2, 0, 1)
            self.check_launches(net, policy, exits, answers)
            replays.append(Replayed(exits[0], answers[0], 1e-6 * wall, 1e-6 * spent, facts, at_once))
        return replays

    def _measure(self, jobs: Sequence[Job], x: Floats, at_once: int) -> list[tuple[NDArray[np.int64], dict[str, str]]]:
        """Per job its readings [launches, R, ...] in ns, ``at_once`` samples to each, and the facts of its measurement."""
        if len(x) < at_once:
            raise UsageError(f"{self.name}: {len(x)} samples are less than the {at_once} of one reading; give {at_once} or more")
        for net, _ in jobs:
            if reason := self.why_not(net):
                raise AnytimeError(f"{self.name} cannot time {net.execution}: {reason}")
        # Before the launches: they are load themselves.
        facts = self.facts() | {"launches": str(self.launches), "warmup": str(self.warmup), "samples": str(len(x))}
        groups: dict[str, list[int]] = {}
        for i, (net, _) in enumerate(jobs):
            groups.setdefault(net.format, []).append(i)
        reports: dict[str, list[dict[str, Any]]] = {group: [] for group in groups}
        with _own_folder() as folder:
            for group, members in groups.items():
                its = [jobs[i] for i in members]
                _write(Path(folder) / f"jobs{group}", self.threads, self.warmup, self.batch, at_once, its, x)
            for launch in range(self.launches):
                for group, members in groups.items():
                    where = f"{self.name}, launch {launch + 1} of {self.launches}"
                    what = ", ".join(dict.fromkeys(jobs[i][0].execution for i in members))
                    reports[group].append(
                        _launch(Path(folder) / f"jobs{group}", self.threads, f"{where}: the process that ran {what}", self.device)
                    )
        found: dict[int, tuple[NDArray[np.int64], dict[str, str]]] = {}
        for group, members in groups.items():
            measured = facts | {"interleaved": str(len(members))} | _noise(reports[group], self.threads)
            for place, i in enumerate(members):
                opening = [report["opening"][place] for report in reports[group]]
                own = {name: _median([said[name] for said in opening]) for name in opening[0]}
                found[i] = np.stack([report["readings"][place] for report in reports[group]]), measured | own
        return [found[i] for i in range(len(jobs))]


# The machine


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _no_cuda(needs: Sequence[str]) -> str | None:
    """Why torch cannot run such numbers on a GPU here; None when it can."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda and f"it was built for CUDA {torch.version.cuda} and finds no GPU or no driver"
        return f"torch sees no CUDA here: {built or f'torch {torch.__version__} was built without it'}"
    if set(needs) & set(cpu.BF16_KERNELS) and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU does not multiply bfloat16: it would time an emulation"
    return None


def _gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": "none that torch sees"}
    its = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": its.name,
        "gpu_memory_gb": f"{its.total_memory / 1e9:.1f}",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "tf32": "no",
        "layout": "channels_last",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _noise(reports: Sequence[dict[str, Any]], threads: int) -> dict[str, str]:
    wall, spent = sum(r["wall_ns"] for r in reports), sum(r["cpu_ns"] for r in reports)
    stalled = None if any(r["stalled_us"] is None for r in reports) else sum(r["stalled_us"] for r in reports)
    pressure = None if stalled is None else 1e3 * stalled / wall
    waiting = max(0.0, 1 - spent / wall) if threads == 1 else None
    return {
        "pressure_us": "unknown" if stalled is None else str(stalled),
        "pressure_share": "unknown" if pressure is None else f"{pressure:.3f}",
        "waiting_share": "unknown" if waiting is None else f"{waiting:.3f}",
        "noisy": noisy(pressure, waiting),
        "noisy_rule": NOISY_RULE,
        "stopwatch_wall_ns": str(max(r["stopwatch_ns"][0] for r in reports)),
        "stopwatch_cpu_ns": str(max(r["stopwatch_ns"][1] for r in reports)),
    }


def noisy(pressure: float | None, waiting: float | None) -> str:
    """Whether others took the CPU: "yes", "no" or, with nothing measured, "unknown"; NOISY_RULE says when.

    Shares of the measurement in [0, 1]: ``pressure`` with some task waiting for a CPU, ``waiting`` with the
    measuring thread off its CPU.
    """
    shares = [share for share in (pressure, waiting) if share is not None]
    if not shares:
        return "unknown"
    return "yes" if max(shares) > NOISY_SHARE else "no"


def _median(each: Sequence[float | None]) -> str:
    known = [value for value in each if value is not None]
    return f"{np.median(known):.1f}" if known else "unknown"


# A launch


def _own_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="anytime-host-")
    except OSError as error:
        raise AnytimeError(
            f"host: no temporary folder can be made ({error}); free space or set TMPDIR to one that can be written"
        ) from error


def _write(path: Path, *payload: Any) -> None:
    try:
        path.write_bytes(pickle.dumps(payload))
    except OSError as error:
        raise AnytimeError(f"host: cannot write {path} ({error.strerror}); free space or set TMPDIR to another folder") from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AnytimeError(
            f"host: a network or policy cannot be handed to a process of its own ({error}); keep lambdas, open sessions and "
            "classes that no module can be asked for out of its state"
        ) from error


def _launch(jobs: Path, threads: int, who: str, device: str = "cpu") -> dict[str, Any]:
    """Run the file ``jobs`` in a fresh process that dies with us; AnytimeError says how it failed."""
    report, words = jobs.with_suffix(".report"), jobs.with_suffix(".stderr")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path),
        "OMP_NUM_THREADS": str(threads),  # for the pools that no network's open() sizes
    }
    command = [sys.executable, "-P", "-m", "anytime.stopwatch", str(jobs), str(report), device]
    with (
        words.open("wb") as stderr,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=env) as child,
    ):
        assert child.stdout is not None
        pulse = child.stdout.fileno()
        try:
            while alive := select.select([pulse], [], [], SILENCE_S)[0]:
                if not os.read(pulse, 4096):
                    break
            code = child.wait(SILENCE_S) if alive else None
        except subprocess.TimeoutExpired:
            code = None
        finally:
            child.kill()
    if code is None:
        raise AnytimeError(f"{who} gave no sign of life for {SILENCE_S:g} s and was ended{_last_words(words)}")
    if code:
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else "failed"
        raise AnytimeError(f"{who} {how}{_last_words(words)}")
    if not report.exists():
        raise AnytimeError(f"{who} ended without a result{_last_words(words)}")
    said: dict[str, Any] = pickle.loads(report.read_bytes())
    report.unlink()
    return said


def _last_words(words: Path) -> str:
    lines = words.read_text(errors="replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), ", without a word")
