"""All that happens between two readings of the clocks. Run as a module, it is the fresh process that holds Host's stopwatch."""

from __future__ import annotations

import gc
import os
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from time import monotonic, perf_counter_ns, process_time_ns
from typing import Any

import numpy as np

from anytime import cpu
from anytime.backend import Deployable, Segment, links
from anytime.errors import AnytimeError
from anytime.execute import Executor
from anytime.metrics import Floats
from anytime.policy import Policy

TURN, REFRESH = 8, 3  # readings of a turn; untimed ones before them
_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}  # imported when a graph is made; TensorFlow, of "tflite", by tf.py


class _Links:
    """One network, link by link: ``go`` answers one row: per link, wall and CPU ns of its stage, then of its head."""

    def __init__(self, net: Deployable) -> None:
        self.net = net
        self.segments = links(net)
        self.links = list(zip(self.segments[::2], self.segments[1::2], strict=True))

    def go(self, sample: Floats) -> list[list[int]]:
        start, step, state = self.net.start, self.net.step, None
        readings: list[int] = []
        # The CPU's clock is the slow one to read: outside, so that wall times do not hold it.
        for stage, head in self.links:
            c0, w0 = process_time_ns(), perf_counter_ns()
            if state is None or self.net.restarts:
                state = start(sample)
            state, _ = step(stage, state)
            w1, c1 = perf_counter_ns(), process_time_ns()
            c2, w2 = process_time_ns(), perf_counter_ns()
            step(head, state)
            w3, c3 = perf_counter_ns(), process_time_ns()
            readings += [w1 - w0, c1 - c0, w3 - w2, c3 - c2]
        return [readings]


class _Replay:
    """One policy on its network's plan, sample by sample: ``go`` answers one row of wall ns, CPU ns, exit and class."""

    def __init__(self, net: Deployable, policy: Policy) -> None:
        self.executor = Executor(net, policy, 1)
        self.segments = self.executor.plan

    def go(self, sample: Floats) -> list[list[int]]:
        one = self.executor.one
        c0, w0 = process_time_ns(), perf_counter_ns()
        exit, answer = one(sample)
        said = answer.argmax()
        w1, c1 = perf_counter_ns(), process_time_ns()
        return [[w1 - w0, c1 - c0, exit, int(said)]]


class _Batches:
    """One policy on its network's plan, in batches: ``go`` answers a row per sample, with its share of the time of all."""

    def __init__(self, net: Deployable, policy: Policy, batch: int) -> None:
        self.executor = Executor(net, policy, batch)
        self.segments = self.executor.plan

    def go(self, samples: Floats) -> list[list[int]]:
        c0, w0 = process_time_ns(), perf_counter_ns()
        answers = self.executor.run(samples)
        said = answers.logits.argmax(-1)
        w1, c1 = perf_counter_ns(), process_time_ns()
        wall, spent = (w1 - w0) // len(samples), (c1 - c0) // len(samples)
        return [[wall, spent, int(exit), int(label)] for exit, label in zip(answers.exits, said, strict=True)]


def _ready(net: Deployable, segments: Sequence[Segment], x: Floats, beat: Callable[[], None]) -> None:
    """Run x [B, ...] once through every segment, for engines that make themselves ready at first use."""
    state = entered = net.start(x)
    for segment in segments:
        after, _ = net.step(segment, entered if segment.fresh(net.restarts) else state)
        if segment.stop > segment.first:  # a head alone hands nothing on
            state = after
        beat()


def _interleave(
    runs: Sequence[_Links | _Replay | _Batches], samples: Sequence[Floats], warmup: int, beat: Callable[[], None]
) -> dict[str, Any]:
    for run in runs:
        for i in range(warmup):
            run.go(samples[i % len(samples)])
            beat()
    readings: list[list[list[int]]] = [[] for _ in runs]
    stopwatch = _stopwatch_ns()
    gc.collect()
    gc.disable()
    stalled, c0, w0 = cpu.stalled_us(), process_time_ns(), perf_counter_ns()
    order = np.random.RandomState(0)  # drawn: were it to rotate, the same network would always come before another
    for first in range(0, len(samples), TURN):
        for i in order.permutation(len(runs)):
            for r in range(first - REFRESH, first):
                runs[i].go(samples[r % len(samples)])
            for sample in samples[first : first + TURN]:
                readings[i] += runs[i].go(sample)
                beat()
    w1, c1, stalled_after = perf_counter_ns(), process_time_ns(), cpu.stalled_us()
    gc.enable()
    return {
        "readings": [np.array(rows, np.int64) for rows in readings],
        "wall_ns": w1 - w0,
        "cpu_ns": c1 - c0,
        "stalled_us": None if stalled is None or stalled_after is None else stalled_after - stalled,
        "stopwatch_ns": stopwatch,
    }


def _stopwatch_ns() -> tuple[int, int]:
    """What reading the clocks adds to a wall and to a CPU time: the medians of timing nothing."""
    nothing = []
    for _ in range(1001):
        c0, w0 = process_time_ns(), perf_counter_ns()
        w1, c1 = perf_counter_ns(), process_time_ns()
        nothing.append((w1 - w0, c1 - c0))
    wall, spent = np.median(nothing, axis=0)
    return int(wall), int(spent)


def _pulse() -> Callable[[], None]:
    """Tell the parent about once a second that we live; without a parent the write fails, and we end."""
    last = 0.0

    def beat() -> None:
        nonlocal last
        if monotonic() - last > 1:
            os.write(1, b".")
            last = monotonic()

    return beat


def _memory_mb(reset: bool = False) -> float | None:
    """Largest memory that this process has held, from now on with ``reset``; None where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        peak = re.search(r"VmHWM:\s*(\d+) kB", cpu.read("/proc/self/status"))
        return int(peak[1]) / 1e3 if peak else None
    except OSError:
        return None


def _child(jobs_file: str, report_file: str, device: str = "cpu") -> None:
    beat = _pulse()
    beat()
    try:
        threads, warmup, batch, at_once, jobs, x = pickle.loads(Path(jobs_file).read_bytes())
    except (AttributeError, ImportError) as error:
        raise AnytimeError(
            f"a fresh process cannot import what it shall run ({error}): move the class into a module of its own"
        ) from error
    samples = [np.ascontiguousarray(x[r : r + at_once], dtype=np.float32) for r in range(0, len(x), at_once)]
    runs: list[_Links | _Replay | _Batches] = []
    opening: list[dict[str, float | None]] = []  # what it takes, of each job; nothing where the network was open
    opened = set()
    for net, policy in jobs:
        if policy is None:
            runs.append(_Links(net))
        else:
            runs.append(_Replay(net, policy) if batch == 1 else _Batches(net, policy, batch))
        # Else the first network of an engine would pay for its import, and one for the graphs that it has not been asked for yet.
        with suppress(ImportError):
            if net.format == "tflite":
                import_module("anytime.tf").tensorflow()
            else:
                import_module(_PACKAGES.get(net.format, "numpy"))
        for segment in runs[-1].segments if hasattr(net, "graph") else ():
            net.graph(segment)
        beat()
        before, begun, new = _memory_mb(reset=True), perf_counter_ns(), id(net) not in opened
        if new:
            net.open(threads)
            if device != "cpu":
                net.move(device)
            opened.add(id(net))
            beat()
        _ready(net, runs[-1].segments, samples[0][:batch], beat)
        took, after = 1e-6 * (perf_counter_ns() - begun), _memory_mb()
        held = None if before is None or after is None else after - before
        opening.append({"first_answer_ms": took, "memory_mb": held} if new else {})
        if at_once > batch:  # few go on together, at last one alone
            _ready(net, runs[-1].segments, samples[0][:1], beat)
    report = _interleave(runs, samples, warmup, beat) | {"opening": opening}
    Path(report_file).write_bytes(pickle.dumps(report))


if __name__ == "__main__":
    try:
        _child(*sys.argv[1:])
    except AnytimeError as sentence:
        sys.exit(str(sentence))
