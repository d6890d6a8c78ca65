"""What a job's results come to: times, the layers of engines, energy, noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from anytime.backend import Deployable, Segment, links
from anytime.boards.ssh.job import stem
from anytime.errors import AnytimeError
from anytime.metrics import Floats
from anytime.nvidia import tegrastats, trtexec
from anytime.nvidia.trtexec import Version

Plain = dict[str, Any]
TIMES = ("stage_ms", "head_ms", "stage_cpu_ms", "head_cpu_ms")
NOISY_SHARE = 0.10
CPU = "CPUExecutionProvider"
BY_TRTEXEC = {
    "times": "GPU times of trtexec, each engine alone on random input: of a stage its compute (of the first one the transfer of the input "
    "too), of a head its compute and the transfer of the logits; launch gaps and CPU times are not in them"
}


def stepped(pieces: Sequence[Plain], place: int) -> dict[str, Floats]:
    """Times [E, launches x R] of the network at this place of the task."""
    return {name: np.concatenate([piece[f"{place}.{name}"] for piece in pieces], axis=1) for name in TIMES}


def by_trtexec(pieces: Sequence[Plain], folder: str, net: Deployable, version: Version) -> dict[str, Floats]:
    """The same from trtexec's exported times; CPU times are NaN: it does not say them. AnytimeError for a run that failed.

    A state stays on the GPU between engines of one program, so that its transfers, which trtexec times too, are left out. Queries
    of different engines have nothing to do with each other: their times are added in the order in which they came.
    """

    def of(segment: Segment) -> Floats:
        rows = []
        for piece in pieces:
            name = f"{folder}/{stem(segment)}.plan"
            trtexec.summary(_text(piece[f"{name}.log"]))  # or says why there is none
            said = trtexec.times(_text(piece[f"{name}.times"]), version)
            entered = segment.head is None and (segment.first == 0 or net.restarts)
            more = said.get("h2d") if entered else said.get("d2h") if segment.head is not None else None
            rows.append(np.add(said["compute"], more or 0.0))
        return np.array([row[: min(map(len, rows))] for row in rows]).ravel()

    found = [of(segment) for segment in links(net)]
    n = min(map(len, found))
    cut = np.array([times[:n] for times in found])
    none = np.full_like(cut[::2], np.nan)
    return dict(zip(TIMES, (cut[::2], cut[1::2], none, none), strict=True))


def engines(built: Plain, timed: Plain, folder: str, net: Deployable) -> tuple[tuple[Plain, ...], dict[str, str]]:
    """What TensorRT says of the layers of these engines -> a row for each, and facts; the text is from building or timing them.

    Rows: ``exit``, ``head``; the engine's own layer (``kernel``, ``kind``, ``reformat``, how many ``weights``), ``executed``, the number
    type that it multiplies or reads, and ``layers``, those of the network that it holds.
    """
    names = {segment: f"{folder}/{stem(segment)}.plan" for segment in links(net)}
    said: Plain = built["said"]
    facts = {
        "engine_bytes": str(sum(said["engine_bytes"][name] for name in names.values())),
        "build_s": f"{sum(said['build_s'][name] for name in names.values()):.1f}",
    }
    exported = {}
    for segment, name in names.items():
        raw = built.get(name, timed.get(f"{name}.layers"))
        if raw is None:
            return (), facts | {"engine_layers": "not said: TensorRT does so from 8.2 on"}
        exported[segment] = _text(raw)
    multiply = {path for path, m in net.twin.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    rows: list[Plain] = []
    try:
        for segment, text in exported.items():
            for kernel in trtexec.kernels(text):
                own = [node for node in kernel.nodes if node in multiply]
                rows.append(
                    {
                        "exit": segment.stop - 1, "head": segment.head is not None, "kernel": kernel.name, "kind": kernel.kind,
                        "executed": kernel.precision or "", "reformat": kernel.reformat, "weights": kernel.weights, "layers": own,
                    }
                )  # fmt: skip
    except AnytimeError as error:
        return (), facts | {"engine_layers": str(error)}
    ran = {layer: row["executed"] for row in rows for layer in row["layers"] if row["executed"]}
    counted = ", ".join(f"{kind} {n}" for kind, n in Counter(ran.values()).most_common())
    return tuple(rows), facts | {
        "engine_layers": f"{len(rows)}, {sum(row['reformat'] for row in rows)} of them only reformat",
        "executed": f"{counted}, unknown {len(multiply - set(ran))}" if counted else "the engines do not say",
    }


def energy(board: str, piece: Plain, n_exits: int) -> tuple[tuple[float | None, ...], dict[str, str]]:
    """mJ of one inference to each exit, every head on the way run; None where it is not to be had, and the facts say why."""
    if why := piece["said"]["why"]:
        return (None,) * n_exits, {"energy": f"none: {why}"}
    try:
        idle = tegrastats.samples(_text(piece["idle.lines"]))
        found = [_of_exit(board, piece, str(k), idle) for k in range(n_exits)]
    except AnytimeError as error:
        return (None,) * n_exits, {"energy": f"none: {error}"}
    facts = {
        "energy": "; ".join(dict.fromkeys(f"none: {one.reason}" for one in found if one.reason)) or "tegrastats, above idle",
        "energy_rails": " + ".join(found[0].rails) or "unknown",
        "energy_window_s": " ".join(f"{one.window_s:.1f}" for one in found),
        "energy_inferences": " ".join(str(one.inferences) for one in found),
        "energy_idle_w": next((f"{one.idle_w:.3f}" for one in found if one.idle_w is not None), "unknown"),
        "energy_busy_w": " ".join("unknown" if one.busy_w is None else f"{one.busy_w:.3f}" for one in found),
        "rails_mw": _rails(piece, idle, str(n_exits - 1)),
    }
    return tuple(one.mj for one in found), facts


def _of_exit(board: str, piece: Plain, name: str, idle: Sequence[tegrastats.Sample]) -> tegrastats.Energy:
    at, busy, ended = piece[f"{name}.s"], tegrastats.samples(_text(piece[f"{name}.lines"])), piece[f"{name}.ended"]
    inside = int(((ended > at[0]) & (ended <= at[-1])).sum()) if len(at) else 0
    return tegrastats.energy(board, at, busy, piece["idle.s"], idle, inside)


def _rails(piece: Plain, idle: Sequence[tegrastats.Sample], name: str) -> str:
    """Mean mW of every rail at rest and on the way to this exit: "VDD_IN 5079 -> 9120"."""
    busy = tegrastats.samples(_text(piece[f"{name}.lines"]))
    rails = sorted({rail for one in (*idle, *busy) for rail in one.rails_mw})
    means = {
        rail: [np.mean(seen) for part in (idle, busy) if (seen := [one.rails_mw[rail] for one in part if rail in one.rails_mw])]
        for rail in rails
    }
    return ", ".join(f"{rail} {' -> '.join(f'{mw:.0f}' for mw in both)}" for rail, both in means.items()) or "none"


def noise(said: Sequence[Plain], threads: int) -> dict[str, str]:
    """Whether others took the board's CPU. While a GPU works the thread that waits for it may rest, which tells nothing."""
    wall = sum(one["wall_s"] for one in said)
    stalled = None if any(one["stalled_us"] is None for one in said) else sum(one["stalled_us"] for one in said)
    elsewhere = any("gpu" in ran or ran.get("provider", CPU) != CPU for one in said for ran in one.get("engines", ()))
    known_cpu = threads == 1 and not elsewhere and all(one["cpu_s"] is not None for one in said)
    spent = sum(one["cpu_s"] for one in said) if known_cpu else None
    shares = {
        "pressure_share": None if stalled is None else 1e-6 * stalled / wall,
        "waiting_share": None if spent is None else max(0.0, 1 - spent / wall),
    }
    known = [share for share in shares.values() if share is not None]
    noisy = "unknown" if not known else "yes" if max(known) > NOISY_SHARE else "no"
    return {name: "unknown" if share is None else f"{share:.3f}" for name, share in shares.items()} | {"noisy": noisy}


def _text(raw: Any) -> str:
    return bytes(raw).decode("utf-8", "replace")
