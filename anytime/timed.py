"""Times of one network's points, over sessions of measuring."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from anytime.gather import NAN, Row, absent, known, listed

TIMED = listed(
    "latency_ms_p50 latency_ms_p90 latency_ms_p99 latency_ms_mean cpu_ms energy_mj own_latency_ms_p50 same_exits same_answers "
    "board_accuracy board_agreement"
)


def times(points: Sequence[Row]) -> Row:
    """Points of one or several sessions of measuring, pooled."""
    if not points:
        return {}
    taken = {name: known(p.get(name) for p in points) for name in TIMED}
    row: Row = {name: statistics.median(values) if values else NAN for name, values in taken.items()}
    sessions: dict[Any, list[float]] = defaultdict(list)  # a record without a session is one of its own
    for i, p in enumerate(points):
        if not absent(p.get("latency_ms_p50")):
            sessions[p["session"] or i].append(float(p["latency_ms_p50"]))
    p50s = [statistics.median(values) for values in sessions.values()]
    if ran := known(p.get("int8_macs_share") for p in points):
        row["int8_macs_share"] = statistics.median(ran)  # by an engine that only the board has
    row |= {"latency_ms_spread": max(p50s) - min(p50s) if len(p50s) > 1 else NAN, "noisy": any(p["noisy"] for p in points)}
    return row | {
        "n_sessions": len({p["session"] or i for i, p in enumerate(points)}),
        "n_timed": int(min((p.get("n_timed") or p["n"] for p in points if not absent(p.get("n"))), default=0)),
    }


def mean_ms(row: Row) -> float:
    """What one run takes on average; the median where no mean was recorded."""
    return next((float(row[name]) for name in ("latency_ms_mean", "latency_ms_p50") if not absent(row.get(name))), NAN)


def ms_by_session(points: Sequence[Row]) -> dict[str, float]:
    """Session -> mean latency in it; "" -> that of all."""
    sessions = {p["session"] for p in points} | {""}
    return {session: mean_ms(times([p for p in points if session in ("", p["session"])])) for session in sessions}


def ratios(above: Sequence[Row], below: Sequence[Row]) -> list[float]:
    """Mean latency of ``above`` over that of ``below``, in each session that timed both; where none did, the one of all that was pooled."""
    ours, theirs = ms_by_session(above), ms_by_session(below)
    shared = sorted(ours.keys() & theirs.keys() - {""}) or [""]
    return known(ours[session] / theirs[session] for session in shared if theirs[session])
