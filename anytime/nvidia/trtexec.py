"""NVIDIA's trtexec, from TensorRT 7.1 to 11: its command lines, and what it writes, as pure functions over text.

Only whole lines count, so that a log that was cut off loses values but never changes one.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from anytime.errors import AnytimeError, Unsupported

Version = tuple[int, int, int]
Precision = Literal["fp32", "fp16", "int8"]

WARM_UP_MS, DURATION_S = 1000, 10
WORKSPACE_MIB = 1024  # TensorRT 7 and 8.0 begin with 16, which excludes fast kernels

# What the summary and the exported times call a quantity -> what we call it.
QUANTITIES = {
    "Latency": "latency", "Host Latency": "latency", "End-to-End Host Latency": "end_to_end", "Enqueue Time": "enqueue",
    "H2D Latency": "h2d", "GPU Compute Time": "compute", "GPU Compute": "compute", "D2H Latency": "d2h",
}  # fmt: skip
DURATIONS = {"latencyMs": "latency", "computeMs": "compute", "h2dMs": "h2d", "inMs": "h2d", "d2hMs": "d2h", "outMs": "d2h"}
NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"


# Versions


def banner_version(digits: str) -> Version:
    """ "8502" -> (8, 5, 2), "101602" -> (10, 16, 2): as a banner and a calibration cache write it."""
    n, step = int(digits), 1000 if len(digits) < 6 else 10000
    return n // step, n % step // 100, n % 100


def banner_digits(version: Version) -> str:
    """(8, 5, 2) -> "8502"."""
    major, minor, patch = version
    return str(major * (1000 if major < 10 else 10000) + minor * 100 + patch)


# Command lines


def number_types(version: Version, precision: Precision, calibrated: bool) -> tuple[tuple[str, ...], bool]:
    """What a builder is told of number types: its flags, and whether the graph's own types bind it. See build_command."""
    name = ".".join(map(str, version))
    if version < (7, 1, 0):
        raise Unsupported(f"TensorRT {name}: the command lines known here begin with 7.1; update JetPack")
    if calibrated and version >= (11, 0, 0):
        raise Unsupported(f"TensorRT {name} has no calibrators any more: take PTQ or QAT, whose ranges stand in the graph")
    if calibrated and precision != "int8":
        raise Unsupported(f"a calibration cache is for int8, not {precision}: leave one of them out")
    if precision == "int8" and not calibrated and version < (8, 0, 0):
        raise Unsupported(f"TensorRT {name} cannot read Q/DQ graphs: take a calibrator, or JetPack 4.6 or later")
    if version >= (10, 0, 0) and not calibrated:
        return (), True
    flags: dict[Precision, tuple[str, ...]] = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}
    return flags[precision], False


def build_command(
    version: Version,
    onnx: str,
    engine: str,
    precision: Precision,
    calibration: str = "",
    timing_cache: str = "",
    trtexec: str = "trtexec",
) -> list[str]:
    """Build an engine and do not run it.

    ``precision``: the lowest that the graph asks for by Q/DQ or by Casts; up to 8.6 it is a flag too, and what is not in
    integers may then run in FP16 there. ``calibration``: the path of a calibration cache, for a float graph. Unsupported where this version
    cannot take the graph.
    Source: NVIDIA/TensorRT, samples/common/sampleOptions.cpp at 7.1.3, 8.0.1, 8.2.1, 8.4.1, 8.5.2, v8.6.1, v10.3.0, v10.16, v11.1.
    """
    flags, typed = number_types(version, precision, bool(calibration))
    return [
        trtexec, f"--onnx={onnx}", f"--saveEngine={engine}",
        *(["--explicitBatch"] if version < (8, 0, 0) else []),
        *(["--stronglyTyped"] if typed and version < (11, 0, 0) else [f"--{flag.lower()}" for flag in flags]),
        *([f"--calib={calibration}"] if calibration else []),
        "--noTF32",  # FP32 would be TF32 on Orin
        f"--memPoolSize=workspace:{WORKSPACE_MIB}" if version >= (8, 4, 0) else f"--workspace={WORKSPACE_MIB}",
        *([f"--timingCacheFile={timing_cache}"] if timing_cache and version >= (8, 0, 0) else []),
        *(["--profilingVerbosity=detailed"] if version >= (8, 2, 0) else []),
        *(["--builderOptimizationLevel=3"] if version >= (8, 6, 0) else []),
        "--skipInference" if version >= (8, 6, 0) else "--buildOnly",
    ]  # fmt: skip


def time_command(
    version: Version,
    engine: str,
    times: str,
    profile: str = "",
    layers: str = "",
    inputs: Mapping[str, str] | None = None,
    outputs: str = "",
    trtexec: str = "trtexec",
) -> list[str]:
    """Time an engine as every version up to 10 does by default: transfers included, no CUDA graph, no spinning.

    11 has the opposite defaults, which are turned back. ``times``, ``profile``, ``layers``, ``outputs``: paths of JSON files to
    write. ``profile`` is left out up to 7.x, where it would disturb the times, ``layers`` up to 8.0, which cannot write them.
    ``inputs``: name -> path of the raw values; else trtexec makes random ones.
    Source: as build_command.
    """
    return [
        trtexec, f"--loadEngine={engine}", f"--warmUp={WARM_UP_MS}", f"--duration={DURATION_S}", "--iterations=10", "--avgRuns=10",
        f"--percentile={'90,95,99' if version >= (8, 5, 0) else 99}",
        *(["--noCudaGraph", "--noSpinWait", "--includeDataTransfers"] if version >= (11, 0, 0) else []),
        *([f"--loadInputs={','.join(f'{name}:{path}' for name, path in inputs.items())}"] if inputs else []),
        f"--exportTimes={times}",
        *([f"--exportProfile={profile}"] if profile and version >= (8, 0, 0) else []),
        *(["--separateProfileRun"] if profile and (8, 0, 0) <= version < (11, 0, 0) else []),
        *([f"--exportLayerInfo={layers}"] if layers and version >= (8, 2, 0) else []),
        *([f"--exportOutput={outputs}"] if outputs else []),
    ]  # fmt: skip


def calibration_cache(scales: Mapping[str, float], version: Version) -> str:
    """NVIDIA's calibration cache: a header, then a line for each tensor, its name and the bits of its float32 scale in hexadecimal.

    A scale is the largest |x| / 127. The header names the version, and any other one would calibrate anew; and it names the class of the
    calibrator that reads it, which in trtexec is IInt8EntropyCalibrator2 whatever the ranges were chosen by.
    Source: NVIDIA/TensorRT, sampleINT8/README.md, "Calibration file"; sampleEngines.cpp at 8.5.2, readScalesFromCalibrationCache.
    """
    for name, scale in scales.items():
        if "\n" in name or not (math.isfinite(scale) and scale > 0):
            raise AnytimeError(f"the scale of {name!r} is {scale}, and must be positive and finite: calibrate again")
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items()]
    return "\n".join([f"TRT-{banner_digits(version)}-EntropyCalibration2", *lines, ""])


# The log


class Banner(NamedTuple):
    """A line of trtexec about itself. ``verdict``: "RUNNING", "PASSED" or "FAILED"; 7.x names no ``version``."""

    verdict: str
    version: Version | None
    build: str | None
    command: str


class Stat(NamedTuple):
    """Milliseconds over all queries; ``percentiles``: per cent -> ms. ``mean`` is None where the version does not give it."""

    min: float
    max: float
    mean: float | None
    median: float
    percentiles: dict[float, float]


class Summary(NamedTuple):
    """The performance summary; what is not in the log is None, or missing from ``stats``.

    ``stats``: "latency" (transfers and compute), "compute", "h2d", "d2h", "enqueue", "end_to_end".
    ``throughput_qps`` is None for the 0 that 7.x writes for engines with an explicit batch.
    """

    stats: dict[str, Stat]
    throughput_qps: float | None
    walltime_s: float | None
    compute_s: float | None
    warnings: tuple[str, ...]


def banners(log: str) -> list[Banner]:
    """Every banner of a log, in order."""
    form = r"^&&&& (RUNNING|PASSED|FAILED) TensorRT\.trtexec(?: \[TensorRT v(\d+)\])?(?: \[b(\d+)\])? # (.*)\n"
    return [
        Banner(verdict, banner_version(digits) if digits else None, build or None, command)
        for verdict, digits, build, command in re.findall(form, log, re.MULTILINE)
    ]


def block(log: str, title: str) -> dict[str, str]:
    """What stands under "=== title ===", line by line up to the next title: "Selected Device" -> "Orin"."""
    found: dict[str, str] = {}
    inside = False
    for _, text in _lines(log):
        if text.startswith("=== "):
            inside = text == f"=== {title} ==="
        elif inside and ": " in text:
            name, _, value = text.partition(": ")
            found[name.strip()] = value.strip()
    return found


def reading(log: str) -> Summary:
    """What the whole lines of a log say, from whatever is there of it: for excerpts. See ``summary``."""
    stats: dict[str, Stat] = {}
    throughput = walltime = compute = None
    warnings = []
    older: dict[str, dict[str, Any]] = {}  # the blocks of 7.x, one value a line
    inside = ""
    for level, text in _lines(log):
        name, _, value = text.partition(": ")
        if level == "W":
            warnings.append(text)
        elif name in QUANTITIES and (stat := _stat(value)):
            stats[QUANTITIES[name]] = stat
        elif text in QUANTITIES:
            inside = QUANTITIES[text]
        elif found := re.fullmatch(rf"{NUMBER} qps", value):
            throughput = float(found[1]) or None
        elif name in ("Total Host Walltime", "walltime") and (found := re.fullmatch(rf"{NUMBER} s", value)):
            walltime = float(found[1])
        elif name in ("Total GPU Compute Time", "total compute time") and (found := re.fullmatch(rf"{NUMBER} s", value)):
            compute = float(found[1])
        elif inside and name in ("min", "max", "mean", "median", "percentile"):
            at = r" at (\d+(?:\.\d+)?)%" if name == "percentile" else "()"
            ends = rf"(?: \(end to end {NUMBER} ms{at}\))?"
            if found := re.fullmatch(rf"{NUMBER} ms{at}{ends}", value):
                here, per_cent, whole, _ = found.groups()
                older.setdefault(inside, {})[f"{name}{per_cent}"] = float(here)
                if whole:
                    older.setdefault("end_to_end", {})[f"{name}{per_cent}"] = float(whole)
    for quantity, said in older.items():
        if said.keys() >= {"min", "max", "median"}:
            per_cents = {float(k[10:]): v for k, v in said.items() if k.startswith("percentile")}
            stats[quantity] = Stat(said["min"], said["max"], said.get("mean"), said["median"], per_cents)
    return Summary(stats, throughput, walltime, compute, tuple(warnings))


def summary(log: str) -> Summary:
    """The summary of a run that passed; AnytimeError for one that failed, was cut off, or reported no times."""
    told = banners(log)
    verdicts = [b.verdict for b in told if b.verdict != "RUNNING"]
    if "FAILED" in verdicts:
        errors = [text for level, text in _lines(log) if level == "E" and text]
        raise AnytimeError(f"trtexec failed: {errors[0] if errors else 'it does not say why'}: read its log")
    if not verdicts:
        raise AnytimeError(f"the log of trtexec is cut off, it ends with {log[-60:]!r}: run it again")
    said = reading(log)
    if "The e2e network timing is not reported" in log:
        raise AnytimeError(
            "trtexec reports no times when its profiler is on: add --separateProfileRun or leave --dumpProfile out"
        )
    if "compute" not in said.stats:
        raise AnytimeError("trtexec passed, but its log has no GPU compute time: give the log of a run, not that of a build")
    return said


def _lines(log: str) -> list[tuple[str, str]]:
    """(level, text) of every whole line of a log: "I", "W", "E"."""
    found = re.findall(r"^\[[^\]\n]*\] \[([A-Z])\] ?(.*)\n", log, re.MULTILINE)
    return [(level, text.rstrip()) for level, text in found]


def _stat(text: str) -> Stat | None:
    """A whole line of 8.0 and later."""
    head = rf"min = {NUMBER} ms, max = {NUMBER} ms, mean = {NUMBER} ms, median = {NUMBER} ms"
    found = re.fullmatch(rf"{head}((?:, percentile\({NUMBER}%\) = {NUMBER} ms)*)", text)
    if not found:
        return None
    low, high, mean, median = (float(v) for v in found.groups()[:4])
    pairs = re.findall(rf"percentile\({NUMBER}%\) = {NUMBER} ms", found[5])
    return Stat(low, high, mean, median, {float(per_cent): float(ms) for per_cent, ms in pairs})


# Exported files


class Layer(NamedTuple):
    """A layer's part of an engine's time; ``median_ms`` is None before 8.4. ``share`` lies in [0, 1]."""

    name: str
    total_ms: float
    mean_ms: float
    median_ms: float | None
    share: float


class Kernel(NamedTuple):
    """A layer of an engine as it was built.

    ``nodes``: the ONNX nodes that it runs. ``precision``: "int8", "fp16", "fp32" ..., what it multiplies or reads; None where the
    engine does not say. ``reformat``: it only changes how a tensor lies in memory. ``weights``: how many.
    """

    name: str
    nodes: tuple[str, ...]
    kind: str
    precision: str | None
    reformat: bool
    weights: int | None


def times(text: str, version: Version, warm_up_ms: float = WARM_UP_MS) -> dict[str, list[float]]:
    """--exportTimes: "latency", "compute", "h2d", "d2h" -> ms of every query after the warm-up.

    Up to 8.4 the file holds the warm-up too, and it is left out here. Starts and ends are not read: 7.1 swaps some of them.
    """
    rows = _json(text, "--exportTimes", list)
    if version < (8, 5, 0):
        rows = [row for row in rows if _number(row, "startComputeMs", "--exportTimes") >= warm_up_ms]
    if not rows:
        raise AnytimeError("trtexec's --exportTimes holds no query after the warm-up: give it a longer --duration")
    keys = [key for key in DURATIONS if key in rows[0]]
    if "computeMs" not in keys:
        raise AnytimeError("trtexec's --exportTimes has no computeMs: it is of a version that is not known here")
    return {DURATIONS[key]: [_number(row, key, "--exportTimes") for row in rows] for key in keys}


def profile(text: str) -> list[Layer]:
    """--exportProfile: every layer in the engine's order."""
    rows = _json(text, "--exportProfile", list)
    if not rows or "count" not in rows[0]:
        raise AnytimeError("trtexec's --exportProfile does not begin with a count: it is of a version that is not known here")
    what = "--exportProfile"
    return [
        Layer(
            str(row.get("name")), _number(row, "timeMs", what), _number(row, "averageMs", what),
            _number(row, "medianMs", what) if "medianMs" in row else None, _number(row, "percentage", what) / 100,
        )
        for row in rows[1:]
    ]  # fmt: skip


def kernels(text: str) -> list[Kernel]:
    """--exportLayerInfo, of 8.2 to 11; an engine that was built without --profilingVerbosity=detailed gives names only."""
    said = _json(text, "--exportLayerInfo", dict).get("Layers")
    if not isinstance(said, list):
        raise AnytimeError("trtexec's --exportLayerInfo has no Layers: it is of a version that is not known here")
    return [_kernel(layer if isinstance(layer, dict) else {"Name": str(layer)}) for layer in said]


def outputs(text: str) -> dict[str, tuple[list[int], list[float]]]:
    """--exportOutput: name -> (shape, values in the order of C), of the last query."""
    rows = _json(text, "--exportOutput", list)
    try:
        return {
            row["name"]: ([int(d) for d in re.split("[x,]", str(row["dimensions"]))], [float(v) for v in row["values"]])
            for row in rows
        }
    except (KeyError, TypeError, ValueError) as error:
        raise AnytimeError(f"trtexec's --exportOutput is of a version that is not known here ({error})") from error


def _kernel(layer: dict[str, Any]) -> Kernel:
    name, weights = str(layer.get("Name")), layer.get("Weights")
    listed = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
    reads = [_kind(tensor) for tensor in layer.get("Inputs", [])[:1]]
    counted = isinstance(weights, dict) and weights.get("Count")
    if isinstance(weights, dict) and counted:
        reads.append(_plain(str(weights.get("Type"))))
    # Integers only where both sides are: a float input is not multiplied by integers.
    known = [kind for kind in reads if kind]
    precision = max(known, key=("int8", "fp16", "bf16", "fp32").index) if known else None
    kind = str(layer.get("LayerType", ""))
    nodes = tuple(dict.fromkeys([*listed, *name.split(" + ")]))
    return Kernel(name, nodes, kind, precision, kind == "Reformat", int(counted) if counted else None)


def _kind(tensor: Any) -> str | None:
    """What a tensor holds: "Format/Datatype" up to 10, "DataType" or "Datatype" in 11."""
    keys = ("DataType", "Datatype", "Format/Datatype")
    return next((_plain(str(tensor[k])) for k in keys if k in tensor), None) if isinstance(tensor, dict) else None


def _plain(said: str) -> str | None:
    words = {"int8": "int8", "fp16": "fp16", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float": "fp32"}
    return next((plain for word, plain in words.items() if re.search(rf"\b{word}\b", said, re.IGNORECASE)), None)


def _json(text: str, what: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise AnytimeError(f"trtexec's {what} is cut off or broken ({error}): run it again") from error
    if not isinstance(value, kind) or (isinstance(value, list) and not all(isinstance(row, dict) for row in value)):
        raise AnytimeError(f"trtexec's {what} is of a version that is not known here: it holds no {kind.__name__} of that form")
    return value


def _number(row: Mapping[str, Any], key: str, what: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise AnytimeError(f"trtexec's {what} says {key} = {value!r}, where a number is wanted: run it again")
    return float(value)
