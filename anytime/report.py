"""Records -> tidy rows -> Markdown, CSV, LaTeX, text: a pure fold over results/records.

It needs neither torch nor the classes that the records name, so a table can be made on any machine, years later.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import statistics
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from anytime import record
from anytime.errors import UsageError, WriteError, near
from anytime.metrics import METRICS, Bools, Interval, Metric, paired_loss, wilson
from anytime.record import Record

Row = dict[str, Any]
NAN = math.nan
FORMATS = ("md", "csv", "tex")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLUMNS = _names(
    "exp model dataset backend execution policy arm budget board train_seeds n accuracy accuracy_lo accuracy_hi macs bops params "
    "size_bytes latency_ms_p50 latency_ms_p90 latency_ms_p99 cpu_ms speedup speedup_over agreement int8_macs_share status reason "
    "column exit currency spent spent_val loss loss_lo loss_hi loss_upper ece nll exit_flips exit_shares packed_bytes "
    "activation_bytes own_macs own_latency_ms_p50 latency_ms_mean latency_ms_spread n_sessions n_timed same_exits "
    "same_answers front simulated noisy reference of seed variant cell exclusions"
)
_WORDS = _names(
    "exp model dataset backend execution policy arm board train_seeds speedup_over status reason column currency exit_shares of "
    "variant cell exclusions"
)
_WHOLE = _names("n exit n_sessions n_timed seed")
_TRUTH = _names("front simulated noisy reference")
_SCORED = _names(
    "macs bops params packed_bytes activation_bytes own_macs agreement int8_macs_share ece nll spent spent_val exit_flips"
)
_TIMED = _names("latency_ms_p50 latency_ms_p90 latency_ms_p99 latency_ms_mean cpu_ms own_latency_ms_p50 same_exits same_answers")
_CELL = _names("status reason execution simulated noisy front accuracy latency_ms_p50 size_bytes loss loss_lo loss_hi loss_upper")
_MEASURED = "latency_ms_mean latency_ms_p50 latency_ms_p90 latency_ms_p99 latency_ms_spread cpu_ms speedup speedup_over reason"
_EXITS = _names(
    "dataset network column execution policy board train_seeds accuracy macs bops params packed_bytes size_bytes agreement "
    f"int8_macs_share {_MEASURED}"
)
_POLICIES = _names(
    "dataset network column execution policy arm budget board train_seeds spent exit_shares accuracy loss macs exit_flips "
    f"int8_macs_share same_exits {_MEASURED}"
)
_MISSED = _names("dataset network column backend of policy arm budget board train_seeds status reason")
_TITLES = {
    "dataset": "data set",
    "of": "asked for",
    "accuracy": "accuracy (%) [95 %]",
    "loss": "loss (points) [95 %], upper limit",
    "speedup_over": "over",
    "bops": "BOPs (G)",
    "macs": "MACs (M)",
    "cpu_ms": "CPU (ms)",
    "int8_macs_share": "MACs in INT8 (%)",
}
_METRICS = METRICS | {
    "latency_ms_mean": Metric("ms", "lower", 3, "mean wall time of one sample: of a policy it says more than the median does"),
    "latency_ms_spread": Metric("ms", "lower", 3, "largest minus smallest median over repeated measurements"),
    "same_exits": Metric("%", "higher", 1, "share of executed samples that left at the exit that the policy takes offline"),
}
_FLEETING = ("noisy", "pressure", "waiting", "stopwatch", "load", "mhz", "interleaved")  # facts of a minute, not of a board
MARKS = {
    "†": "† scored with simulated arithmetic, never timed; its MB are its parameters at their true bit widths.",
    "~": "~ measured while other work kept the machine busy.",
}
PAIRED = (
    "Accuracy of the same network and exit in FP32 minus its accuracy here, paired over the test samples: points, two-sided 95 % "
    "interval, then the upper one-sided 95 % limit, which is what a claim of being within x of FP32 has to stay under."
)
_NEEDED = {  # what the fold cannot do without; every other key may be absent
    "eval": {"exit", "n", "accuracy"},
    "measure": {"exit"},
    "decide": {"policy_label", "n", "accuracy"},
    "replay": {"policy_label"},
}


class _Asked(NamedTuple):
    """What a point answers: an exit, or a policy; ``fitted_on`` is the board whose milliseconds a budget counts, else empty."""

    exit: int | None
    policy: str
    budget: float
    currency: str
    arm: str
    fitted_on: str


@dataclass
class _Network:
    """What is known of one cell, its training seeds folded."""

    spec: Row
    facts: Row = field(default_factory=dict)
    variant: str = ""
    cells: dict[int, str] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)  # train seed -> its predictions
    scores: dict[_Asked, dict[int, Row]] = field(default_factory=lambda: defaultdict(dict))  # ... -> train seed -> point
    times: dict[_Asked, dict[str, list[Row]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )  # ... -> board
    missed: list[Record] = field(default_factory=list)
    used: list[Record] = field(default_factory=list)

    @property
    def family(self) -> str:
        """What networks must share to be compared: data, recipe, seed of the split."""
        return _key([self.spec.get(part) for part in ("data", "recipe", "seed")])

    @property
    def model(self) -> str:
        """The spec of the model, as a key."""
        return _key(self.spec.get("model"))

    def label(self, name: str) -> str:
        """The fact ``name``, else the class that the spec names."""
        spec = self.spec.get({"dataset": "data", "column": "backend"}.get(name, name))
        return str(self.facts.get(name) or (spec.get("is", "") if isinstance(spec, dict) else ""))

    def common(self, seeds: Iterable[int]) -> Row:
        """What every row of this network says."""
        seeds = sorted(seeds)
        return {
            **{name: self.label(name) for name in ("model", "dataset", "backend", "execution", "column")},
            **{name: bool(self.facts.get(name)) for name in ("simulated", "reference")},
            "seed": self.spec.get("seed"),
            "variant": self.variant,
            "train_seeds": ",".join(map(str, seeds)),
            "cell": ",".join(self.cells[seed] for seed in seeds),
        }

    def whole(self, asked: _Asked) -> Row:
        """What belongs to all of it together; of a policy's network that is more than of an exit's."""
        row: Row = {"size_bytes": self.facts.get("size_bytes"), "exclusions": (self.facts.get("net") or {}).get("exclusions")}
        exits = [_score(list(points.values())) for a, points in sorted(self.scores.items(), key=_order) if a.exit is not None]
        if asked.exit is None and exits:
            row |= {name: exits[-1][name] for name in ("params", "packed_bytes", "activation_bytes")}
            row["agreement"] = min(e["agreement"] for e in exits)
        return row


def rows(records_root: Path, exp: str) -> pd.DataFrame:
    """Fold the records of ``exp`` into tidy rows: one per (cell, exit or policy, budget, arm, board), and one per skip or fail.

    Columns are ``COLUMNS``; shares are in [0, 1], costs per sample; a number that was not taken is NaN. Training seeds of
    otherwise equal cells are folded: means, and for accuracy a t-interval over the seeds (one seed: Wilson's). Latencies are
    medians over repeated measurements, latency_ms_spread their max - min. ``loss`` is paired, sample by sample, with the
    reference backend of the same model at the same exit, or under the same policy and budget refitted; with several seeds each
    is paired with its own reference, then value and limits are averaged. It is NaN on the reference's own rows, and where a
    policy answers anything but the class of the exit taken. What a policy row says of params, bytes and agreement is the whole
    network's. ``front``: see ``mark_front``; ``of`` names the fact that a row reports (eval, measure, decide, replay) or that
    its skip or fail stands in for; ``variant`` the fields in which cells of equal labels differ.
    ``attrs`` carry exp, question, troubles (a sentence per file that could not be used) and provenance (lines).
    Raises UsageError where no record of ``exp`` lies.
    """
    loaded = record.load(records_root, exp)
    if not loaded.records and not loaded.troubles:
        names = near(exp, {p.parent.name for p in records_root.glob("*/*.json")})
        raise UsageError(f"experiment {exp!r} has no records in {records_root}; {names}; or run it first")
    troubles = list(loaded.troubles)
    networks = _networks(loaded.records, troubles)
    fold = _Fold(networks, troubles)
    said = [row for network in networks for row in fold.rows_of(network)]
    mark_front(said)
    blank = {"exp": exp} | dict.fromkeys(_WORDS[1:], "") | dict.fromkeys(_TRUTH, False)
    frame = pd.DataFrame([blank | {k: v for k, v in row.items() if v is not None} for row in said], columns=COLUMNS)
    numbers = {name: "float64" for name in COLUMNS if name not in (*_WORDS, *_WHOLE, *_TRUTH)}
    frame = frame.astype(
        dict.fromkeys(_WORDS, "object") | dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(_TRUTH, "bool") | numbers
    )
    # Where the checkout lies is no part of a table that is committed.
    told = sorted({trouble.replace(f"{records_root}{os.sep}", "") for trouble in troubles})
    question = next((str(n.facts["question"]) for n in networks if "question" in n.facts), "")
    frame.attrs = {"exp": exp, "question": question, "troubles": told, "provenance": _provenance(networks)}
    return frame


def mark_front(rows: Sequence[Row]) -> None:
    """Set ``front`` on the rows that are worth their cost beyond the noise.

    A row is on the front unless a cheaper row of the same data set and board has an accuracy interval that reaches its own
    lower limit, or an equally cheap one an interval that lies above its own. Cost is the mean latency, for a policy's median is
    that of one of its exits (the median where no mean was recorded; MACs where nothing of that data set was timed). Rows that
    were not timed beside rows that were are neither on the front nor in its way.
    """
    places: dict[Any, list[tuple[float, Row]]] = defaultdict(list)
    timed = {row["dataset"] for row in rows if not _absent(row.get("latency_ms_p50"))}
    for row in rows:
        row["front"] = False
        costs = ("latency_ms_mean", "latency_ms_p50") if row["dataset"] in timed else ("macs",)
        cost = next((row[name] for name in costs if not _absent(row.get(name))), NAN)
        if not _absent(cost) and not _absent(row.get("accuracy")):
            places[row["dataset"], row["board"]].append((cost, row))
    for place in places.values():
        for cost, row in place:
            row["front"] = not any(
                (other < cost and rival["accuracy_hi"] >= row["accuracy_lo"])
                or (other == cost and rival["accuracy_lo"] > row["accuracy_hi"])
                for other, rival in place
            )


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


def show(rows: pd.DataFrame, fmt: str = "text") -> str:
    """The report as text: "text" (the pivot, for a terminal), "md" (everything), "csv" (the rows), "tex" (the pivot, booktabs).

    The same rows give the same bytes. Raises UsageError for another format.
    """
    if fmt == "csv":
        # Counts whole, all else to 12 digits: the last ones differ between processors, and tables are compared byte by byte.
        return rows.to_csv(index=False, float_format=_digits, lineterminator="\n")
    if fmt == "text":
        blocks = [*_pivots(rows, _PLAIN), *_warnings(rows)]
    elif fmt == "tex":
        head = f"% {rows.attrs['exp']}: written by anytime.report; needs \\usepackage{{booktabs}}"
        blocks = [head, *_pivots(rows, _LATEX)]
    elif fmt == "md":
        blocks = _markdown(rows)
    else:
        raise UsageError(f"there is no report format {fmt!r}; {near(fmt, ('text', 'md', 'csv', 'tex'))}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def write(records_root: Path, exp: str, out_root: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write tables/<exp>.<format> and figures/<exp>.svg under ``out_root``; the same records give the same bytes.

    Raises UsageError for an unknown format or an experiment without records, WriteError when a file cannot be written.
    """
    from anytime import figures  # importing matplotlib takes longer than all tables

    if unknown := [fmt for fmt in formats if fmt not in FORMATS]:
        raise UsageError(f"there is no report format {unknown[0]!r}; {near(unknown[0], FORMATS)}")
    frame = rows(records_root, exp)
    paths = [out_root / "tables" / f"{exp}.{fmt}" for fmt in formats] + [out_root / "figures" / f"{exp}.svg"]
    for path in paths:
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".svg":
                figures.draw(frame, temporary)
            else:
                temporary.write_text(show(frame, path.suffix[1:]), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise WriteError(f"cannot write {path}: {error.strerror or error}; free space or change its rights") from error
    return paths


# ------------------------------------------------------------------------------------------------- records -> rows


def _networks(records: Sequence[tuple[Record, Path]], troubles: list[str]) -> list[_Network]:
    newest = record.newest(records)
    networks: dict[str, _Network] = {}
    order = (
        "skip",
        "fail",
        "measure",
        "replay",
        "decide",
        "eval",
    )  # what a skip says of its cell gives way to what its eval says
    for r, path in sorted(records, key=lambda item: order.index(item[0].kind)):
        points, needed = r.exits + r.points, _NEEDED.get(r.kind, set())
        if needed and not (points and all(needed <= point.keys() for point in points)):
            troubles.append(
                f"the {r.kind} record {path} lacks {' or '.join(sorted(needed))}: remove it; what it held is run again"
            )
            continue
        timed = r.kind in ("measure", "replay")
        if newest[r.fact][1] != path and not timed:  # times are pooled
            continue
        spec = {name: value for name, value in r.spec.items() if name != "train_seed"}
        network, seed = networks.setdefault(_key(spec), _Network(spec)), _train_seed(r)
        position = min(r.facts.get("position", math.inf), network.facts.get("position", math.inf))
        network.facts |= {name: value for name, value in r.facts.items() if value not in (None, "")} | {"position": position}
        network.cells[seed] = r.cell
        network.used.append(r)
        for point in points:
            if timed:
                network.times[_asked(r, point)][r.board].append(point | {"noisy": _noisy(r)})
            else:
                network.scores[_asked(r, point)][seed] = point
        if r.kind == "eval":
            network.files[seed] = path.with_suffix(".npz")
        if r.kind in ("skip", "fail"):
            network.missed.append(r)
    _name_variants(list(networks.values()))
    return sorted(networks.values(), key=lambda n: (n.facts["position"], n.variant, _key(n.spec)))


def _asked(r: Record, said: Row) -> _Asked:
    if "exit" in said:
        return _Asked(int(said["exit"]), f"exit {said['exit'] + 1}", NAN, "", "", "")
    policy, currency, arm = (str(said.get(name) or "") for name in ("policy_label", "currency", "arm"))
    budget = said.get("budget")
    return _Asked(None, policy, NAN if budget is None else float(budget), currency, arm, r.board if currency == "ms" else "")


def _order(item: tuple[_Asked, Any]) -> tuple[Any, ...]:
    return (item[0].exit is None, item[0].exit or 0, *item[0][1:])


def _name_variants(networks: Sequence[_Network]) -> None:
    # Runs under other settings (--set) share the folder; without a name for the difference their rows would look alike.
    leaves = pd.json_normalize([network.spec for network in networks]).astype(str)
    alike = [_key([network.label(name) for name in ("dataset", "model", "backend")]) for network in networks]
    differ = [path for path in sorted(map(str, leaves)) if (leaves[path].groupby(alike).nunique() > 1).any()]
    for network, said in zip(networks, _dicts(leaves[differ]), strict=True):
        network.variant = ", ".join(f"{path}={value}" for path, value in said.items() if value != "nan")


class _Fold:
    """Networks -> rows: looks up what is seen only across networks, the references and the denominators of speed-ups."""

    def __init__(self, networks: Sequence[_Network], troubles: list[str]) -> None:
        self.troubles = troubles
        self.answers: dict[Path, Bools | None] = {}
        self.references: dict[tuple[str, str], _Network] = {}
        self.denominators: dict[tuple[str, str], list[tuple[str, float, str]]] = defaultdict(list)
        first: dict[str, _Network] = {}
        for network in networks:
            if network.facts.get("reference"):
                self.references.setdefault((network.family, network.model), network)
                first.setdefault(network.family, network)
        # The reference comes first: it serves where its model was not timed in a row's own execution.
        for network in sorted(networks, key=lambda n: n is not first.get(n.family)):
            base = first.get(network.family)
            if base and (network.model, network.label("column")) == (base.model, base.label("column")):
                exits = sorted((item for item in network.times.items() if item[0].exit is not None), key=_order)
                for board, points in exits[-1][1].items() if exits else ():
                    name = f"{network.label('model')} {network.label('column')}, {network.label('execution')}"
                    base_ms = _times(points)["latency_ms_p50"]
                    self.denominators[network.family, board].append((network.label("execution"), base_ms, name))

    def rows_of(self, network: _Network) -> Iterator[Row]:
        """Exits, then policies, then what was skipped or failed."""
        for asked, _ in sorted({**network.scores, **network.times}.items(), key=_order):
            points, boards = network.scores.get(asked, {}), network.times.get(asked, {})
            row = network.common(points or network.cells) | _told(asked) | {"status": "done"}
            row |= _score(list(points.values())) | network.whole(asked) | self._loss(network, asked)
            scored, timed = ("decide", "replay") if asked.exit is None else ("eval", "measure")
            row["reason"] = "" if points else f"the {scored} record is missing"
            for board in sorted(boards) or [asked.fitted_on]:
                times = _times(boards.get(board, [])) | {"board": board, "of": timed if board in boards else scored}
                yield row | times | self._speedup(network, board, times.get("latency_ms_p50"))
        missed = defaultdict(set)
        for r in network.missed:
            missed[r.kind, r.of, r.board, " ".join(r.reason.split()), _asked(r, r.facts)].add(_train_seed(r))
        for (kind, of, board, reason, asked), seeds in missed.items():
            said = {"board": board, "status": kind, "of": of, "reason": reason}
            yield network.common(seeds) | _told(asked) | said

    def _speedup(self, network: _Network, board: str, ms: Any) -> Row:
        bases = self.denominators.get((network.family, board), [])
        bases = [base for base in bases if base[0] == network.label("execution")] or bases
        return {} if _absent(ms) or not bases else {"speedup": bases[0][1] / ms, "speedup_over": bases[0][2]}

    def _loss(self, network: _Network, asked: _Asked) -> Row:
        reference = self.references.get((network.family, network.model))
        against = asked if asked.exit is not None else asked._replace(arm="refitted")
        if reference is None or (reference is network and against == asked):
            return {}
        losses = []
        for seed in sorted(network.files):
            theirs, ours = self._right(reference, against, seed), self._right(network, asked, seed)
            if theirs is not None and ours is not None and len(theirs) == len(ours):
                losses.append(paired_loss(theirs, ours))
        means = map(statistics.fmean, zip(*losses, strict=True))
        return dict(zip(("loss", "loss_lo", "loss_hi", "loss_upper"), means, strict=True)) if losses else {}

    def _right(self, network: _Network, asked: _Asked, seed: int) -> Bools | None:
        """Whether it answers right, sample by sample [N]; None where that cannot be known."""
        point = network.scores.get(asked, {}).get(seed)
        right = self._read(network.files[seed]) if seed in network.files else None
        if point is None or right is None:
            return None
        try:
            if asked.exit is not None:
                return np.asarray(right[asked.exit])
            exits = np.frombuffer(zlib.decompress(base64.b64decode(point.get("taken", ""))), np.uint8)
            answered = np.asarray(right[exits, np.arange(right.shape[1])])
        except (ValueError, IndexError, zlib.error):
            self.troubles.append(
                f"{asked.policy} of cell {network.cells[seed]}: its answers cannot be read, so its loss is left out"
            )
            return None
        # A policy may answer with more than the logits of the exit taken; then these are not its answers.
        return answered if answered.sum() == point.get("n_right") else None

    def _read(self, path: Path) -> Bools | None:
        """[E, N], from what lies beside an eval record."""
        if path not in self.answers:
            try:
                with np.load(path) as file:
                    self.answers[path] = file["argmax"] == file["labels"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                self.answers[path] = None
                self.troubles.append(f"the predictions {path} cannot be read ({error}): paired losses of that cell are left out")
        return self.answers[path]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _train_seed(r: Record) -> int:
    return int(r.spec.get("train_seed", 0))


def _told(asked: _Asked) -> Row:
    return {name: value for name, value in asked._asdict().items() if name != "fitted_on"}


def _absent(value: Any) -> bool:
    return value is None or value is pd.NA or value != value


def _mean(values: Iterable[Any]) -> float:
    known = [float(value) for value in values if not _absent(value)]
    return statistics.fmean(known) if known else NAN


def _score(points: Sequence[Row]) -> Row:
    """Points of one or several training seeds, folded."""
    if not points:
        return {}
    shares, n = [float(p["accuracy"]) for p in points], min(int(p["n"]) for p in points)
    interval = over_seeds(shares) if len(shares) > 1 else wilson(round(shares[0] * n), n)
    taken = zip(*(p["share"] for p in points if p.get("share")), strict=True)
    row: Row = {name: _mean(p.get(name) for p in points) for name in _SCORED}
    row |= {"n": n, "exit_shares": "/".join(f"{statistics.fmean(shares):.3f}" for shares in taken)}
    return row | dict(zip(("accuracy", "accuracy_lo", "accuracy_hi"), interval, strict=True))


def over_seeds(shares: Sequence[float]) -> Interval:
    """Mean share of at least two training seeds with its 95 % t-interval, cut to [0, 1]: the spread of trainings, not of samples.

    Source: Student, "The probable error of a mean", Biometrika 1908.
    """
    mean, half = statistics.fmean(shares), statistics.stdev(shares) / math.sqrt(len(shares))
    half *= float(stdtrit(len(shares) - 1, 0.975))
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def _times(points: Sequence[Row]) -> Row:
    """Points of one or several sessions of measuring, pooled."""
    if not points:
        return {}
    known = {name: [float(p[name]) for p in points if not _absent(p.get(name))] for name in ("n", *_TIMED)}
    row: Row = {name: statistics.median(known[name]) if known[name] else NAN for name in _TIMED}
    p50s = known["latency_ms_p50"]
    row |= {"latency_ms_spread": max(p50s) - min(p50s) if len(p50s) > 1 else NAN, "noisy": any(p["noisy"] for p in points)}
    return row | {"n_sessions": len(points), "n_timed": int(min(known["n"], default=0))}


def _provenance(networks: Sequence[_Network]) -> list[str]:
    """Lines that say what the numbers were made with."""
    told: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    timed = []
    for r in (r for network in networks for r in network.used):
        git = r.facts.get("git") or {}
        told["commit"][str(git.get("commit", "not recorded"))[:10]].add("with uncommitted changes" if git.get("dirty") else "")
        for name, value in (r.facts.get("versions") or {}).items():
            told["versions"][name].add(str(value))
        if r.kind in ("measure", "replay"):
            timed.append(_noisy(r))
            for name, value in (r.facts.get("device") or {}).items():
                if not name.startswith(_FLEETING):
                    told[f"board {r.board}"][name].add(str(value))
    lines = []
    for title, said in sorted(told.items()):
        parts = (f"{name} {' / '.join(sorted(filter(None, values)))}".strip() for name, values in sorted(said.items()))
        lines.append(f"{title}: {', '.join(parts)}")
    return lines + ([f"{sum(timed)} of {len(timed)} measurements were made on a busy machine (~)"] if any(timed) else [])


def _noisy(r: Record) -> bool:
    return (r.facts.get("device") or {}).get("noisy") in (True, "yes")


# ------------------------------------------------------------------------------------------------- rows -> text


def _digits(value: Any) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.12g}"


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
            blank = {"latency_ms_p50": NAN, "reason": row["reason"] or why_not}
            exits.setdefault(row["exit"], row if row["board"] == board else row | blank)
        if exits:
            final = exits[max(exits)]
            ms = final["latency_ms_p50"]
            if final["simulated"]:
                exits = {k: row | {"size_bytes": final["packed_bytes"]} for k, row in exits.items()}
            rank = (bool(final["simulated"]), _absent(ms), 0.0 if _absent(ms) else float(ms))
        else:
            exits = dict.fromkeys((-1,), next((row for row in own if row["of"] == "eval"), own[0]))
            rank = (True, True, math.inf)
        if exits and (not best[1] or rank < best[0]):
            best = rank, exits
    return best[1]


def _say(name: str, value: Any) -> str:
    if _absent(value):
        return "–"
    metric = _METRICS[name]
    scale = {"%": 100, "points": 100, "M": 1e-6, "G": 1e-9, "MB": 1e-6}.get(metric.unit, 1)
    return f"{value * scale:.{metric.digits}f}"


def _value(name: str, row: Row, notes: list[str]) -> str:
    """What a table says of a row under the heading ``name``."""
    if name == "network":
        return _network(row)
    if name == "execution":
        return f"{row[name]} †" if row["simulated"] else str(row[name])
    if name == "reason":
        return f"[{notes.index(row[name]) + 1}]" if row[name] else ""
    if name == "budget":
        unit = " ms" if row["currency"] == "ms" else f" × {row['currency']}" if row["currency"] else ""
        return "" if _absent(row[name]) else f"{row[name]:g}{unit}"
    if name == "accuracy" and not _absent(row[name]):
        text = f"{_say(name, row[name])} [{_say('accuracy_lo', row['accuracy_lo'])}, {_say('accuracy_hi', row['accuracy_hi'])}]"
        return f"**{text}**" if row["front"] else text
    if name == "loss" and not _absent(row[name]):
        value, lo, hi, upper = (f"{100 * row[limit]:+.2f}" for limit in ("loss", "loss_lo", "loss_hi", "loss_upper"))
        return f"{value} [{lo}, {hi}], ≤ {upper}"
    if name in _METRICS:
        mark = "~" if row["noisy"] and name.startswith("latency_ms_") and not _absent(row[name]) else ""
        return mark + _say(name, row[name])
    return str(row[name])


def _title(name: str) -> str:
    if name in _TITLES:
        return _TITLES[name]
    words = name.replace("latency_ms_", "").replace("_ms", "").replace("_bytes", "").replace("_", " ")
    unit = _METRICS[name].unit if name in _METRICS else ""
    return f"{words} ({unit})" if unit else words


def _table(said: Sequence[Row], names: Sequence[str], notes: list[str]) -> str:
    """A Markdown table of those columns that say anything."""
    columns = [(_title(name), [_value(name, row, notes) for row in said]) for name in names]
    told = [(title, values) for title, values in columns if any(value not in ("", "–") for value in values)]
    return _md_table([title for title, _ in told], list(zip(*(values for _, values in told), strict=True))) if told else ""


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


def _pivots(rows: pd.DataFrame, style: _Style) -> Iterator[str]:
    """For each board the pivot, and below it what must be said of its cells."""
    notes = _notes(rows)
    for board in _boards(rows) or ([""] if len(rows) else []):
        header, body = _grid(pivot(rows, board), partial(_cell, notes=notes))
        yield style.table(header, body)
        where = f"median latency on {board} (ms)" if board else "latency (not timed)"
        text = " ".join(cell for line in body for cell in line)
        lines = [f"Each cell: accuracy (%) · {where} · size (MB). **Bold**: no cheaper row has an interval that reaches its own."]
        lines += [said for mark, said in MARKS.items() if mark in text]
        lines += [f"[{i}] {note}" for i, note in enumerate(notes, 1) if f"[{i}]" in text]
        yield style.between.join(map(style.line, lines))


def _warnings(rows: pd.DataFrame) -> Iterator[str]:
    done = rows[rows["status"] == "done"]
    n = min((seeds.count(",") + 1 for seeds in done["train_seeds"]), default=0)
    if n == 0:
        yield "No cell has finished yet."
    elif n < 5:
        yield f"n = {n} training seed{'s' if n > 1 else ''}, fewer than 5: not told from the luck of training."
    if troubles := len(rows.attrs["troubles"]):
        yield f"Unreadable files: {troubles}; the end of the Markdown table names them."


def _markdown(rows: pd.DataFrame) -> list[str]:
    said, notes = _dicts(rows), _notes(rows)
    done = [row for row in said if row["status"] == "done"]
    policies = [row for row in done if row["of"] in ("decide", "replay")]
    exits = [row for row in done if row["of"] in ("eval", "measure")]
    missed = [row for row in said if row["status"] != "done"]
    blocks = [f"# {rows.attrs['exp']}", rows.attrs["question"], *_pivots(rows, _MD), *_warnings(rows)]
    if any(not _absent(row["loss"]) for row in exits):
        blocks += ["## Loss against FP32", PAIRED, _md_table(*_grid(pivot(rows), _difference))]
    if exits:
        blocks += ["## Exits", _table(exits, _EXITS, notes)]
    if policies:
        blocks += ["## Policies", _table(policies, _POLICIES, notes), *_kept(policies)]
    if notes:
        numbered = "  \n".join(f"[{i}] {note}" for i, note in enumerate(notes, 1))
        blocks += ["## Skipped and failed", _table(missed, _MISSED, notes), numbered]
    if rows.attrs["troubles"]:
        blocks += ["## Unreadable records", "\n".join(f"- {trouble}" for trouble in rows.attrs["troubles"])]
    seeds = sorted({int(seed) for row in done for seed in row["train_seeds"].split(",")})
    lines = [f"training seeds: {', '.join(map(str, seeds)) or 'none'}", *rows.attrs["provenance"]]
    blocks += ["## Made with", "\n".join(f"- {line}" for line in lines)]
    used = [name for name in _METRICS if rows[name].notna().any()]
    meanings = [[_title(name), _METRICS[name].better or "–", _METRICS[name].meaning] for name in used]
    return [*blocks, "## Words", _md_table(["column", "better", "meaning"], meanings)] if used else blocks


def _kept(policies: Sequence[Row]) -> list[str]:
    """Thresholds kept from FP32 beside those fitted again after compression, where both were scored."""
    pairs: dict[Any, dict[str, Row]] = defaultdict(dict)
    for row in policies:
        fitted_on = row["board"] if row["currency"] == "ms" else ""
        pairs[row["cell"], row["policy"], row["budget"], row["currency"], fitted_on].setdefault(row["arm"], row)
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
    return ["## Kept and refitted thresholds", _md_table(header, body)] if body else []


def _md_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [[_starred(cell) for cell in line] for line in (header, *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _tex_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head, *lines = (" & ".join(map(_tex, line)) + r" \\" for line in (header, *body))
    inside = "\n".join([r"\toprule", head, r"\midrule", *lines, r"\bottomrule"])
    return f"\\begin{{tabular}}{{lll{'r' * (len(header) - 3)}}}\n{inside}\n\\end{{tabular}}"


def _tex(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text.translate(_TEX))


def _starred(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"\1*", text)


class _Style(NamedTuple):
    between: str
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
    line: Callable[[str], str]


_MD = _Style("  \n", _md_table, str)
_PLAIN = _Style("\n", _text_table, _starred)
_LATEX = _Style("\n\n", _tex_table, lambda text: r"\par\footnotesize " + _tex(text))
_TEX = str.maketrans({c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\^{}", "–": "--"})
_TEX |= str.maketrans({"<": "$<$", ">": "$>$", "×": r"$\times$", "≤": r"$\le$", "†": r"\textdagger{}", "·": r"$\cdot$"})
