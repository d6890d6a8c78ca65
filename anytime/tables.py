"""Rows -> tables of strings, in the order of a report; how they are written down is not said here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from anytime.conversions import HEADER, LEAD, conversions
from anytime.decided import example
from anytime.gather import LEFT as LEFT
from anytime.gather import LEFT_OUT
from anytime.metrics import METRICS
from anytime.rows import NAN, Row, absent, listed

_CELL = listed("status reason execution simulated noisy front accuracy latency_ms_p50 size_bytes loss loss_lo loss_hi loss_upper")
_MEASURED = (
    "latency_ms_mean latency_ms_p50 latency_ms_p90 latency_ms_p99 latency_ms_spread cpu_ms energy_mj speedup speedup_over reason"
)
_EXITS = listed(
    "dataset network column execution policy board train_seeds accuracy static_loss macs static_macs bops macs_by_bits "
    f"worst_layer params packed_bytes size_bytes agreement board_accuracy board_agreement int8_macs_share {_MEASURED}"
)
_POLICIES = listed(
    "dataset network column execution policy arm budget board train_seeds spent exit_shares accuracy loss static_loss macs "
    f"static_macs exit_flips int8_macs_share same_exits {_MEASURED}"
)
_DECISIONS = listed(
    "network column execution floor policy arm budget spent budget_violation exit_flips sides harm prediction_flips accuracy "
    "gain regret recovered ece auroc"
)
_STEPS = listed("dataset network column execution policy budget step accuracy bops step_gain")
_RIVALS = listed(
    "dataset network column execution policy budget board accuracy latency_ms_mean rival rival_time rival_gain as_good as_good_time"
)
_CURVES = listed("network column execution policy budget board accuracy_at_macs accuracy_at_bops accuracy_at_ms area")
_MISSED = listed("dataset network column backend of policy arm budget board train_seeds status reason")
_TITLES = {
    "dataset": "data set",
    "of": "asked for",
    "accuracy": "accuracy (%) [95 %]",
    "loss": "loss (points) [95 %], upper limit",
    "static_loss": "loss to its static twin (points) [95 %], upper limit",
    "static_macs": "MACs of its static twin's (%)",
    "budget_violation": "budget violation (%) [95 %]",
    "exit_flips": "exit flips (%) [95 %]",
    "sides": "earlier + later (%)",
    "harm": "harmful, helpful (%)",
    "gain": "gain over the first policy (points) [95 %]",
    "step": "one field more",
    "step_gain": "what it gives (points) [95 %]",
    "rival": "no slower without exits",
    "rival_time": "its latency (x)",
    "rival_gain": "its accuracy more (points) [95 %]",
    "as_good": "as accurate without exits",
    "as_good_time": "its latency (x) [sessions]",
    "regret": "regret (points) [95 %]",
    "accuracy_at_macs": "accuracy at equal MACs (%)",
    "accuracy_at_bops": "at equal BOPs (%)",
    "accuracy_at_ms": "at equal latency (%)",
    "area": "area under the curve (%)",
    "speedup_over": "over",
    "bops": "BOPs (G)",
    "macs": "MACs (M)",
    "board_accuracy": "accuracy on the board (%)",
    "board_agreement": "agreement of the board (%)",
    "cpu_ms": "CPU (ms)",
    "energy_mj": "energy (mJ)",
    "int8_macs_share": "MACs in INT8 (%)",
    "macs_by_bits": "MACs by bits",
    "worst_layer": "noisiest layer (SQNR)",
}
ARMS = ("kept", "temperature", "share-matched", "refitted")
_SIDES, _HARMS = ("earlier", "later"), ("harmful", "helpful")
MARKS = {
    "†": "† scored with simulated arithmetic, never timed; its MB are its parameters at their true bit widths.",
    "~": "~ measured while other work kept the machine busy.",
}
BOUND = "‡ a bound: it uses what no board can know."
PAIRED = (
    "Accuracy of the same network and exit in FP32 minus its accuracy here, paired over the test samples: points, two-sided 95 % "
    "interval, then the upper one-sided 95 % limit, which is what a claim of being within x of FP32 has to stay under."
)


STEPS = (
    "Rows whose backend differs in one field from another row of the same network, exit or refitted policy, where that field is by "
    "default: accuracy here minus accuracy there, paired over the test samples."
)
RIVALS = (
    "Beside each policy, on the same data, engine and arithmetic: the largest network without exits that takes no longer on average, and "
    "the fastest that answers as much of the test part right. Latencies are multiples of the policy's."
)


class Section(NamedTuple):
    """A heading and what stands under it, in this order; what is empty is left out.

    ``said`` are the rows that the lines of ``body`` tell, where they tell one each.
    """

    title: str = ""
    lead: str = ""
    header: Sequence[str] = ()
    body: Sequence[Sequence[str]] = ()
    said: Sequence[Row] = ()
    notes: Sequence[str] = ()
    level: int = 2


def pivot(rows: pd.DataFrame, board: str | None = None) -> pd.DataFrame:
    """Networks and exits down, backends across: index (dataset, network, exit), columns (column, field).

    Where a column was executed in several ways, the one that left the last exit soonest on ``board`` (default: the first) stands
    for it, else a real one before a simulated one; field ``execution`` says which. A cell that was skipped has its status and
    reason; one that is done but was not timed the reason for that. The size of a simulated network is its packed one.
    """
    board = next(iter(_boards(rows)), "") if board is None else board
    said = defaultdict(list)
    for row in _dicts(rows):
        if row["of"] not in ("decide", "replay"):
            said[row["dataset"], _network(row), row["column"]].append(row)
    columns = list(dict.fromkeys(column for _, _, column in said))
    index: list[tuple[str, str, str]] = []
    cells: dict[tuple[str, str], list[Any]] = {pair: [] for pair in product(columns, _CELL)}
    for dataset, network in dict.fromkeys((dataset, network) for dataset, network, _ in said):
        chosen = {column: _stand_in(said.get((dataset, network, column), []), board) for column in columns}
        for k in sorted({k for exits in chosen.values() for k in exits if k >= 0}) or [-1]:
            index.append((dataset, network, f"exit {k + 1}" if k >= 0 else ""))
            for column, exits in chosen.items():
                cell = exits.get(k, exits.get(-1, {}))
                for name in _CELL:
                    cells[column, name].append(cell.get(name))
    names = ["dataset", "network", "exit"]
    return pd.DataFrame(cells, index=pd.MultiIndex.from_tuples(index, names=names) if index else None)


def _dicts(rows: pd.DataFrame) -> list[Row]:
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def _boards(rows: pd.DataFrame) -> list[str]:
    return [str(board) for board in rows["board"][rows["latency_ms_p50"].notna()].unique()]


def _network(row: Row) -> str:
    return f"{row['model']} ({row['variant']})" if row["variant"] else str(row["model"])


def _stand_in(said: Sequence[Row], board: str) -> dict[int, Row]:
    """The rows of one network and column -> those of the execution that stands for it, by exit; -1 where it was skipped."""
    best: tuple[tuple[bool, bool, float], dict[int, Row]] = (True, True, NAN), {}
    for backend in dict.fromkeys(row["backend"] for row in said):
        own = [row for row in said if row["backend"] == backend]
        why_not = next((r["reason"] for r in own if r["of"] == "measure" and r["status"] != "done" and r["board"] == board), "")
        exits: dict[int, Row] = {}
        for row in sorted((r for r in own if r["status"] == "done"), key=lambda r: r["board"] != board):
            blank = {"latency_ms_p50": NAN, "front": False, "reason": row["reason"] or why_not}
            exits.setdefault(row["exit"], row if row["board"] == board else row | blank)
        if exits:
            final = exits[max(exits)]
            ms = final["latency_ms_p50"]
            if final["simulated"]:
                exits = {k: row | {"size_bytes": final["packed_bytes"]} for k, row in exits.items()}
            rank = (bool(final["simulated"]), absent(ms), 0.0 if absent(ms) else float(ms))
        else:
            exits = dict.fromkeys((-1,), next((row for row in own if row["of"] == "eval"), own[0]))
            rank = (True, True, math.inf)
        if exits and (not best[1] or rank < best[0]):
            best = rank, exits
    return best[1]


def _say(name: str, value: Any) -> str:
    return "–" if absent(value) else METRICS[name].said(value)


def _value(name: str, row: Row, notes: list[str]) -> str:
    """What a table says of a row under the heading ``name``."""
    if name == "network":
        return _network(row)
    if name == "execution":
        return f"{row[name]} †" if row["simulated"] else str(row[name])
    if name == "policy" and row["bound"]:
        return f"{row[name]} ‡"
    if name == "sides":
        return "" if absent(row["earlier_flips"]) else " + ".join(_say(f"{side}_flips", row[f"{side}_flips"]) for side in _SIDES)
    if name == "harm":
        return "" if absent(row["harmful_flips"]) else ", ".join(_say(f"{how}_flips", row[f"{how}_flips"]) for how in _HARMS)
    if name in ("budget_violation", "exit_flips", "gain", "step_gain", "rival_gain", "regret") and not absent(row[f"{name}_lo"]):
        sign = "" if name == "exit_flips" else "+"
        value, lo, hi = (f"{round(100 * row[name + limit], 2) + 0.0:{sign}.2f}" for limit in ("", "_lo", "_hi"))  # no -0.00
        return f"{value} [{lo}, {hi}]"
    if name == "as_good_time" and not absent(row["as_good_time_lo"]):
        return f"{row[name]:.2f} [{row['as_good_time_lo']:.2f}, {row['as_good_time_hi']:.2f}]"
    if name == "reason":
        return f"[{notes.index(row[name]) + 1}]" if row[name] else ""
    if name == "budget":
        return "" if absent(row[name]) else budget_said(row["currency"], row[name], row["board"])
    if name == "accuracy" and not absent(row[name]):
        text = f"{_say(name, row[name])} [{_say('accuracy_lo', row['accuracy_lo'])}, {_say('accuracy_hi', row['accuracy_hi'])}]"
        return f"**{text}**" if row["front"] else text
    if name in ("loss", "static_loss") and not absent(row[name]):
        value, lo, hi, upper = (f"{100 * row[name + limit]:+.2f}" for limit in ("", "_lo", "_hi", "_upper"))
        return f"{value} [{lo}, {hi}], ≤ {upper}"
    if name in METRICS:
        mark = "~" if row["noisy"] and name.startswith("latency_ms_") and not absent(row[name]) else ""
        return mark + _say(name, row[name])
    return str(row[name])


def budget_said(currency: str, budget: float, board: str) -> str:
    """A budget with its unit: milliseconds are those of a board."""
    unit = {"ms": f" ms on {board}" if board else " ms", "accuracy": " accuracy", "": ""}.get(currency, f" × {currency}")
    return f"{budget:g}{unit}"


def _title(name: str) -> str:
    if name in _TITLES:
        return _TITLES[name]
    words = name.replace("latency_ms_", "").replace("_ms", "").replace("_bytes", "").replace("_", " ")
    unit = METRICS[name].unit if name in METRICS else ""
    return f"{words} ({unit})" if unit else words


def _notes(rows: pd.DataFrame) -> list[str]:
    return [str(reason) for reason in rows["reason"].unique() if reason]


def _grid(table: pd.DataFrame, say: Callable[[Row, bool], str]) -> tuple[list[str], list[list[str]]]:
    """A pivot -> header and rows of strings; ``say`` gets a cell and whether its column was executed in several ways."""
    header, body = ["data set", "network", "exit"], [list(map(str, place)) for place in table.index]
    for column in table.columns.get_level_values(0).unique():
        cells = _dicts(table[[column]].droplevel(0, axis=1))
        ran = {str(cell["execution"]) for cell in cells if cell["status"] == "done"}
        header.append(f"{column} ({ran.pop()})" if len(ran) == 1 else str(column))
        for line, cell in zip(body, cells, strict=True):
            line.append(say(cell, len(ran) > 1) if isinstance(cell["status"], str) else "")
    return header, body


def _cell(cell: Row, mixed: bool, notes: list[str]) -> str:
    mark = f" {_value('reason', cell, notes)}" if cell["reason"] else ""
    if cell["status"] != "done":
        return f"{cell['status']}{mark}"
    text = " · ".join(
        [_say("accuracy", cell["accuracy"]), *(_value(name, cell, []) for name in ("latency_ms_p50", "size_bytes"))]
    )
    text = f"**{text}**" if cell["front"] else text
    return text + (" †" if cell["simulated"] else "") + (f" ({cell['execution']})" if mixed else "") + mark


def _difference(cell: Row, mixed: bool) -> str:
    text = _value("loss", cell, []) if cell["status"] == "done" else str(cell["status"])
    return f"{text} †" if cell["simulated"] and text != "–" else text


def pivots(rows: pd.DataFrame) -> Iterator[Section]:
    """For each board the pivot, and below it what must be said of its cells."""
    notes = _notes(rows)
    for board in _boards(rows) or ([""] if len(rows) else []):
        header, body = _grid(pivot(rows, board), partial(_cell, notes=notes))
        where = f"median latency on {board} (ms)" if board else "latency (not timed)"
        text = " ".join(cell for line in body for cell in line)
        lines = [f"Each cell: accuracy (%) · {where} · size (MB). **Bold**: no cheaper row has an interval that reaches its own."]
        lines += [said for mark, said in MARKS.items() if mark in text]
        lines += [f"[{i}] {note}" for i, note in enumerate(notes, 1) if f"[{i}]" in text]
        yield Section(header=header, body=body, notes=lines)


def warnings(rows: pd.DataFrame, where: str = "the Markdown table") -> Iterator[str]:
    """Sentences of caution that stand above all; what could not be read is named at the end of ``where``."""
    done = rows[rows["status"] == "done"]
    n = min((seeds.count(",") + 1 for seeds in done["train_seeds"]), default=0)
    if n == 0:
        yield "No cell has finished yet."
    elif n < 5:
        yield f"n = {n} training seed{'s' if n > 1 else ''}, fewer than 5: not told from the luck of training."
    if unread := sum(LEFT_OUT not in trouble for trouble in rows.attrs["troubles"]):
        yield f"Unreadable files: {unread}; the end of {where} names them."


def sections(rows: pd.DataFrame) -> Iterator[Section]:
    """What follows the pivots."""
    said, notes = _dicts(rows), _notes(rows)
    done = [row for row in said if row["status"] == "done"]
    policies = [row for row in done if row["of"] in ("decide", "replay")]
    exits = [row for row in done if row["of"] in ("eval", "measure")]
    missed = [row for row in said if row["status"] != "done"]
    if lines := conversions(exits):
        yield Section("Conversions", LEAD, HEADER, lines)
    if any(not absent(row["loss"]) for row in exits):
        header, body = _grid(pivot(rows), _difference)
        yield Section("Loss against FP32", PAIRED, header, body)
    if exits:
        yield _section("Exits", exits, _EXITS, notes)
    stepped = {
        (row["cell"], row["policy"], _value("budget", row, [])): row
        for row in done if not absent(row["step_gain"]) and row["arm"] in ("", "refitted")
    }  # fmt: skip
    if stepped:
        yield _section("One field more", list(stepped.values()), _STEPS, notes)._replace(lead=STEPS)
    if policies:
        shown = [row for row in policies if row["arm"] == "refitted" or absent(row["regret"])]  # what is left out, is told below
        bounds = [BOUND] if any(row["bound"] for row in policies) else []
        yield _section("Policies", shown, _POLICIES, notes)._replace(notes=bounds)
        beside = [row for row in shown if row["rival"] or row["as_good"]]
        if beside:
            yield _section("Or a network without exits", beside, _RIVALS, notes)._replace(lead=RIVALS)
        yield from list(_decisions(policies, notes)) or _kept(policies)
    if notes:
        numbered = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
        yield _section("Skipped and failed", missed, _MISSED, notes)._replace(notes=numbered)


def provenance(rows: pd.DataFrame) -> list[str]:
    """Lines that say what the numbers were made with."""
    done = rows["train_seeds"][rows["status"] == "done"]
    seeds = sorted({int(seed) for told in done for seed in told.split(",")})
    return [f"training seeds: {', '.join(map(str, seeds)) or 'none'}", *rows.attrs["provenance"]]


def words(rows: pd.DataFrame) -> Section | None:
    """The glossary of the columns that say anything."""
    used = [name for name in METRICS if rows[name].notna().any()]
    meanings = [[_title(name), METRICS[name].better or "–", METRICS[name].meaning] for name in used]
    return Section("Words", "", ["column", "better", "meaning"], meanings) if used else None


def _section(title: str, said: Sequence[Row], names: Sequence[str], notes: list[str], level: int = 2) -> Section:
    """A table of those columns that say anything."""
    columns = [(_title(name), [_value(name, row, notes) for row in said]) for name in names]
    told = [(title, values) for title, values in columns if any(value not in ("", "–") for value in values)]
    header, body = [title for title, _ in told], list(zip(*(values for _, values in told), strict=True))
    return Section(title, "", header, body, said, level=level)


def _decisions(policies: Sequence[Row], notes: list[str]) -> Iterator[Section]:
    """A table per data set of what each arm decided and what it cost, and one of the curves."""
    judged = [row for row in policies if not absent(row["regret"])]
    once: dict[Any, Row] = {}
    for row in judged:  # boards repeat what is decided
        once.setdefault((row["cell"], row["policy"], _value("budget", row, []), row["arm"]), row)
    if judged:
        yield _side_by_side(list(once.values()))
    for dataset in dict.fromkeys(row["dataset"] for row in judged):
        own = [row for row in once.values() if row["dataset"] == dataset]
        yield _section(dataset, own, _DECISIONS, notes, 3)
    for dataset in dict.fromkeys(row["dataset"] for row in judged):
        own = [row for row in judged if row["dataset"] == dataset and row["arm"] == "refitted"]
        if own:
            yield _section(f"{dataset}: accuracy at equal cost", own, _CURVES, notes, 3)


def _side_by_side(judged: Sequence[Row]) -> Section:
    """The arms of the policy that stands for all, side by side: what a reader wants first."""
    shown = example((row["policy"], not absent(row["gain"])) for row in judged if row["arm"] == "share-matched")
    lines: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in judged:
        if row["policy"] in shown and not row["reference"]:
            who = tuple(_value(name, row, []) for name in ("dataset", "network", "column", "execution", "policy", "budget"))
            lines[who][row["arm"]] = row
    arms = [arm for arm in ARMS if any(arm in line for line in lines.values())]
    asked = [("budget_violation", arm) for arm in arms] + [("regret", arm) for arm in arms]
    asked += [("recovered", arm) for arm in arms if arm not in ("kept", "refitted")]
    header = ["data set", "network", "column", "execution", "policy", "budget"]
    header += [f"{_title(name).removesuffix(' [95 %]')} {arm}" for name, arm in asked]
    body = [[*who, *(_say(name, line[arm][name]) if arm in line else "" for name, arm in asked)] for who, line in lines.items()]
    return Section("Decisions", "", header if body else (), body)


def _kept(policies: Sequence[Row]) -> Iterator[Section]:
    """Thresholds kept from FP32 beside those fitted again after compression, where both were scored."""
    pairs: dict[Any, dict[str, Row]] = defaultdict(dict)
    for row in policies:
        pairs[row["cell"], row["policy"], _value("budget", row, [])].setdefault(row["arm"], row)
    body = []
    for arms in pairs.values():
        if {"kept", "refitted"} <= arms.keys() and not arms["kept"]["reference"]:
            kept, refitted = arms["kept"], arms["refitted"]
            who = [_value(name, kept, []) for name in ("dataset", "network", "column", "execution", "policy", "budget")]
            gain = f"{100 * (refitted['accuracy'] - kept['accuracy']):+.2f}"
            pair = [_say(name, row[name]) for name in ("accuracy", "spent", "exit_flips") for row in (kept, refitted)]
            body.append([*who, *pair[:2], gain, *pair[2:]])
    header = ["data set", "network", "column", "execution", "policy", "budget", "accuracy (%) kept", "refitted", "gain (points)"]
    header += ["spent kept", "refitted", "exit flips (%) kept", "refitted"]
    if body:
        yield Section("Kept and refitted thresholds", "", header, body)
