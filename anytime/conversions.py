"""The table that users of torch2trt know: what each conversion of a network changes, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anytime.rows import Row, absent, listed

BATCH = ", batch "  # what a board's name has behind it where it measures throughput
HEADER = (
    *("name", "data type", "engine", "options", "input", "max error", "% of range", "argmax agreement (%)", "classes said"),
    *("board", "before", "throughput before (1/s)", "after", "latency before (ms)", "after"),
)
LEAD = (
    "The last exit of each network. Max error: the largest absolute difference from the logits of the same network in the reference "
    "arithmetic, over the test images of the data set, also as a share of the range of those logits; what has integers was calibrated on "
    "the calib images, which are others. Argmax agreement: test images that are answered with the same class; it shows little where few "
    "classes are said at all. Before: the same network in the reference, or where the board cannot run that, in the same data type "
    "by the first engine that it has. Throughput in batches, latency (median) at batch 1. The options are ours, in place of "
    "torch2trt's keyword arguments."
)


def conversions(exits: Sequence[Row]) -> list[list[str]]:
    """Lines under HEADER from rows of exits, one per network, backend and machine; none where nothing was timed in batches."""
    if not any(BATCH in row["board"] and not absent(row["latency_ms_mean"]) for row in exits):
        return []
    networks: dict[tuple[str, ...], list[Row]] = {}
    for row in exits:
        networks.setdefault(tuple(str(row[name]) for name in listed("dataset model variant seed")), []).append(row)
    return [line for rows in networks.values() for line in _of_network(rows)]


def _of_network(rows: Sequence[Row]) -> list[list[str]]:
    last: dict[str, float] = {}  # an ensemble has exits of its own
    for row in rows:
        last[row["backend"]] = max(row["exit"], last.get(row["backend"], 0))
    found: dict[tuple[str, str], dict[str, Row]] = {}  # backend, machine -> board -> row
    for row in rows:
        if row["exit"] == last[row["backend"]]:
            machine = row["board"].partition(BATCH)[0]
            found.setdefault((row["backend"], machine), {})[row["board"]] = row
    lines = []
    for (backend, machine), boards in found.items():
        after = next(iter(boards.values()))
        if after["reference"]:
            continue
        there = [at for (_, m), at in found.items() if m == machine and machine]
        before = next((at for at in there if next(iter(at.values()))["reference"]), None)
        if before is None:
            column = next((row["column"] for row in rows if row["reference"]), None)
            before = next((at for at in there if next(iter(at.values()))["column"] == column), {})
        engine = next((row["execution"] for row in before.values()), "–")
        name = f"{after['model']} ({after['variant']})" if after["variant"] else after["model"]
        simulated = " †" if after["simulated"] else ""
        times = [say(at, machine) for say in (_throughput, _latency) for at in (before, boards)]
        error = "–" if absent(after["max_error"]) else f"{after['max_error']:.2g}"
        lines.append(
            [name, after["column"], after["execution"] + simulated, backend, after["input_shape"], error]
            + [_percent(after["max_error_share"]), _percent(1 - after["prediction_flips"], 1), _count(after["answers"])]
            + [machine or "–", engine, *times]
        )  # fmt: skip
    return lines


def _percent(share: float, digits: int = 3) -> str:
    return "–" if absent(share) else f"{100 * share:.{digits}f}"


def _count(n: float) -> str:
    return "–" if absent(n) else f"{n:.0f}"


def _throughput(boards: Mapping[str, Row], machine: str) -> str:
    row = next((row for board, row in boards.items() if board.startswith(machine + BATCH)), None)
    if row is None or absent(row["latency_ms_mean"]):
        return "–"
    return f"{'~' if row['noisy'] else ''}{1e3 / row['latency_ms_mean']:.1f} ({row['board'].partition(BATCH)[2]})"


def _latency(boards: Mapping[str, Row], machine: str) -> str:
    row = boards.get(machine)
    if row is None or absent(row["latency_ms_p50"]):
        return "–"
    return f"{'~' if row['noisy'] else ''}{row['latency_ms_p50']:.2f}"
