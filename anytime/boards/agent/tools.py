"""What NVIDIA's tools do for a job: engines built and timed, power read. Tasks of agent.py, written by ssh/job.py."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
from engines import Net, Refused
from machine import environment, how_it_ended, read, stalled_us

LINE_MS = 100  # between two lines of tegrastats
PATIENCE_S = 10.0  # for its first one
SETTLE_S = 1.0  # of load before its window begins
KEPT = 2000  # queries of a run of trtexec, the last ones

Said = Tuple[Dict[str, Any], Dict[str, Any]]


def built(job: Dict[str, Any], task: Dict[str, Any], beat: Callable[[], None]) -> Said:
    """Build the engines of the task, one after another, on one timing cache, which stays in ~/.anytime for later jobs."""
    kept, mine = os.path.expanduser(os.path.join("~", ".anytime", task["timing_cache"])), "timing.cache"
    if os.path.exists(kept):
        shutil.copyfile(kept, mine)
    arrays, seconds, sizes = {}, {}, {}
    for asked in task["engines"]:
        began, command = time.time(), asked["command"] or [sys.executable, "-B", "build.py", json.dumps(asked["options"])]
        _finished(command, "the builder of %s" % asked["engine"], beat)
        if not os.path.exists(asked["engine"]):
            raise Refused("the builder of %s ended well and left no engine" % asked["engine"])
        seconds[asked["engine"]], sizes[asked["engine"]] = time.time() - began, os.path.getsize(asked["engine"])
        if os.path.exists(asked["engine"] + ".layers"):
            arrays[asked["engine"]] = _bytes(asked["engine"] + ".layers")
    if os.path.exists(mine):
        # The next job may be another's: whole or not at all.
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(kept), exist_ok=True)
            shutil.copyfile(mine, "%s.%d.part" % (kept, os.getpid()))
            os.replace("%s.%d.part" % (kept, os.getpid()), kept)
    return arrays, {"build_s": seconds, "engine_bytes": sizes}


def run_by_trtexec(job: Dict[str, Any], task: Dict[str, Any], beat: Callable[[], None]) -> Said:
    """Let trtexec time engines, and bring home what it wrote: its log, its times, its layers, as bytes."""
    arrays, stalled, began = {}, stalled_us(), time.time()
    for asked in task["runs"]:
        log = _finished(asked["command"], "trtexec on %s" % asked["engine"], beat)
        arrays[asked["engine"] + ".log"] = np.frombuffer(log.encode("utf-8"), np.uint8)
        with open(asked["times"], encoding="utf-8") as f:
            rows = json.load(f)
        arrays[asked["engine"] + ".times"] = np.frombuffer(json.dumps(rows[-KEPT:]).encode(), np.uint8)
        if os.path.exists(asked["layers"]):
            arrays[asked["engine"] + ".layers"] = _bytes(asked["layers"])
    after = stalled_us()
    return arrays, {
        "wall_s": time.time() - began, "cpu_s": None,
        "stalled_us": None if stalled is None or after is None else after - stalled,
    }  # fmt: skip


def powered(job: Dict[str, Any], task: Dict[str, Any], beat: Callable[[], None]) -> Said:
    """Lines of tegrastats at rest, then while samples go to each exit, one after another, every head on the way run.

    Arrays: for "idle" and each exit, seconds of the monotonic clock and lines; for each exit, when every sample ended.
    """
    net, x = Net(task["folder"], job), np.load(task["x"])
    samples = [np.ascontiguousarray(x[r : r + 1], dtype=np.float32) for r in range(len(x))]
    for r in range(max(1, job["warmup"])):
        _leave(net, samples[r % len(samples)], net.n_exits - 1)
        beat()
    windows = {}  # type: Dict[str, Tuple[float, float]]
    ended = {}  # type: Dict[str, List[float]]
    try:
        tegrastats = Tegrastats(task["tegrastats"])
    except OSError as error:
        return {}, {"engines": [net.facts], "why": "tegrastats cannot be started: %s" % error}
    with tegrastats as lines:
        until = time.monotonic() + PATIENCE_S
        while not lines.read and time.monotonic() < until:
            beat()
            time.sleep(0.01)
        if not lines.read:
            return {}, {"engines": [net.facts], "why": "tegrastats said nothing within %g s" % PATIENCE_S}
        began = time.monotonic()
        while time.monotonic() < began + task["window_s"]:
            beat()
            time.sleep(0.05)
        windows["idle"] = began, time.monotonic()
        for exit in range(net.n_exits):
            at = []  # type: List[float]
            began, name = time.monotonic() + SETTLE_S, str(exit)
            while not at or at[-1] < began + task["window_s"]:
                _leave(net, samples[len(at) % len(samples)], exit)
                at.append(time.monotonic())
                beat()
            windows[name], ended[name] = (began, at[-1]), at
    arrays = {}  # type: Dict[str, Any]
    for name, (first, last) in windows.items():
        inside = [(at, line) for at, line in lines.read if first <= at <= last]
        arrays[name + ".s"] = np.array([at for at, _ in inside], np.float64)
        arrays[name + ".lines"] = np.frombuffer("".join(line + "\n" for _, line in inside).encode("utf-8"), np.uint8)
        arrays[name + ".ended"] = np.array(ended.get(name, []), np.float64)
    return arrays, {"engines": [net.facts], "why": ""}


def _leave(net: Net, sample: Any, exit: int) -> None:
    state = [sample]  # type: Any
    for k in range(exit + 1):
        state, _ = net.step((k, k + 1, None), [sample] if net.restarts else state)
        net.step((k + 1, k + 1, k), state)


class Tegrastats:
    """The tool at work: ``read`` grows by (second of the monotonic clock, line). Through a terminal, else it might hold lines back."""

    def __init__(self, path: str) -> None:
        self.read = []  # type: List[Tuple[float, str]]
        self.ours, theirs = os.openpty()
        self.child = subprocess.Popen(
            [path, "--interval", str(LINE_MS)], stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL,
            preexec_fn=die_with_the_parent,
        )  # fmt: skip
        os.close(theirs)
        self.thread = threading.Thread(target=self._listen, daemon=True)

    def _listen(self) -> None:
        rest = b""
        while True:
            try:
                some = os.read(self.ours, 65536)
            except OSError:  # a terminal whose other side is closed
                return
            at, lines = time.monotonic(), (rest + some).split(b"\n")
            rest = lines.pop()
            self.read += [(at, line.decode("utf-8", "replace").strip()) for line in lines]

    def __enter__(self) -> Any:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.child.kill()
        self.child.wait()
        self.thread.join(5)
        os.close(self.ours)


def die_with_the_parent() -> None:
    """In a child, before it becomes a program: whoever is left over would disturb who is timed next."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _finished(command: List[str], who: str, beat: Callable[[], None]) -> str:
    """Run a command to its end; answer all that it wrote. Refused with the first error that NVIDIA's tools mark, where it fails."""
    with open("words", "wb") as words:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT, env=environment(),
                preexec_fn=die_with_the_parent,
            )  # fmt: skip
        except OSError as error:
            raise Refused("%s cannot be started: %s" % (who, error)) from None
        while child.poll() is None:
            beat()
            time.sleep(0.05)
    said = str(read("words"))
    if child.returncode:
        marked, lines = re.findall(r"\[E\] *(\S.*)", said), [line for line in said.split("\n") if line.strip()]
        raise Refused("%s %s" % (who, how_it_ended(child.returncode, (marked[:1] or lines[-1:] or [""])[0])))
    return said + "\n"  # whole lines count


def _bytes(path: str) -> Any:
    with open(path, "rb") as f:
        return np.frombuffer(f.read(), np.uint8)
