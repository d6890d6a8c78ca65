"""Two experiments, or two runs of one, side by side: what got worse, what better, and what only one of them has."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from anytime import record
from anytime.errors import UsageError, near
from anytime.gather import LEFT, MACHINE, Asked, Network, Row, asked_of, filled, gather, key_of
from anytime.metrics import METRICS, Interval, paired_loss
from anytime.rows import Fold, absent, provenance
from anytime.styles import md_table
from anytime.timed import ms_by_session

TOLERANCES = {"accuracy": 0.5, "agreement": 0.5, "int8_macs_share": 1.0, "latency_ms_mean": 1.1, "size_bytes": 1.01, "macs": 1.01}
_OF_A_MACHINE = ("latency_ms", "cpu_ms", "energy_mj", "speedup", "accuracy_at_ms")
_OF_A_BOARD = (*_OF_A_MACHINE, "same_exits", "board_", "rival_", "as_good_")


def unit(metric: str) -> str:
    """In what a difference of ``metric`` is said: "points" of what is a share, else "x", the ratio B / A."""
    return "points" if METRICS[metric].unit in ("%", "points") else "x"


def tolerances(said: Sequence[str]) -> dict[str, float]:
    """``TOLERANCES`` changed by "accuracy=0.3", "latency_ms_mean=1.2x", several with commas; UsageError for what cannot be meant."""
    known = [name for name, metric in METRICS.items() if metric.better and not name.endswith("_upper")]
    allowed = dict(TOLERANCES)
    for text in (part.strip() for more in said for part in more.split(",")):
        name, _, value = text.partition("=")
        if name not in known:
            raise UsageError(f"--tolerance {text}: there is no metric {name!r}; {near(name, known)}")
        least = 0.0 if unit(name) == "points" else 1.0
        try:
            allowed[name] = float(value.strip().removesuffix(unit(name)))
        except ValueError:
            allowed[name] = -1.0
        if not least <= allowed[name] < math.inf:
            raise UsageError(
                f"--tolerance {text}: give a number of {least:g} or more in {unit(name)}, as in {name}={least + 0.5:g}"
            )
    return allowed


@dataclass
class Pair:
    """One number of A beside the same one of B. ``value``, ``lo`` and ``hi``: B - A in points, or B / A; no limits: None."""

    dataset: str
    network: str
    backend: str
    asked: str
    board: str
    metric: str
    a: Any
    b: Any
    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    how: str = ""
    verdict: str = ""


@dataclass
class Comparison:
    """What two sides say. ``pairs`` in the order of A; the other fields hold a sentence each."""

    pairs: list[Pair] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    lost: int = 0  # networks, exits and policies of an experiment that are in A and not in B's run of it
    made_a: list[str] = field(default_factory=list)
    made_b: list[str] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)  # what differs between those that took times of one board's name
    troubles: list[str] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """Pairs of this verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)


class Side(NamedTuple):
    """One experiment of one side."""

    exp: str
    fold: Fold
    networks: list[Network]
    made: list[str]


def sides(said: str, results: Path) -> dict[str, Path]:
    """Experiment -> folder of records: of a results folder, of a folder with the records of one, or of a name under ``results``."""
    path, root = Path(said), results / "records"
    if path.is_dir():
        path = path / "records" if (path / "records").is_dir() else path
        if any(path.glob("*.json")):
            return {path.resolve().name: path.resolve().parent}
        if found := dict.fromkeys(record.experiments(path), path):
            return found
    names = record.experiments(root)
    if said in names:
        return {said: root}
    raise UsageError(f"{said!r} is neither a folder with records nor an experiment with records in {root}; {near(said, names)}")


def compare(a: str, b: str, results: Path, allowed: Mapping[str, float]) -> Comparison:
    """A beside B, paired by network, backend, and exit or policy; experiments of other names where each side has but one.

    Networks are paired by their specs, what is left by what it is called; accuracies sample by sample where both sides hold
    predictions of the same test labels under the same training seeds (Tango's interval, averaged over seeds), else apart. Times
    have an interval where both were measured in several sessions; those of two machines are not comparable. A pair is worse when
    it is so by more than is allowed *and* its interval, if it has one, says so too. UsageError where nothing is paired.
    """
    left, right, said = sides(a, results), sides(b, results), Comparison()
    alone = len(left) == len(right) == 1
    names = list(zip(left, right, strict=True)) if alone else [(name, name) for name in left if name in right]
    said.only_a += [f"the experiment {name}" for name in left if not alone and name not in right]
    said.only_b += [f"the experiment {name}" for name in right if not alone and name not in left]
    for one, other in names:
        _compare(_side(left[one], one, said), _side(right[other], other, said), allowed, said)
    if not names:
        raise UsageError(
            f"no experiment of one name is in both: {a} has {', '.join(left)}, {b} has {', '.join(right)}; to compare two of other "
            f"names give their folders, as {next(iter(left.values())) / next(iter(left))}"
        )
    if not said.pairs:
        raise UsageError(f"{a} and {b} have nothing in common: no network, backend and exit or policy stands in both")
    return said


def _side(root: Path, exp: str, said: Comparison) -> Side:
    loaded = record.load(root, exp)
    said.troubles += loaded.troubles
    networks = gather(loaded.records, said.troubles)
    return Side(exp, Fold(networks, said.troubles), networks, provenance(networks))


def _partners(ours: Sequence[Network], theirs: Sequence[Network]) -> dict[int, Network]:
    """id of a network of A -> the one of B: of one spec, else of one name, else of one name but for the variant, where that is clear.

    A variant is a difference to the neighbours of one folder: it may be there in B because of a network that A has not.
    """
    found: dict[int, Network] = {}
    taken: set[int] = set()
    for by in ("spec", "name and variant", "name"):
        left, right = defaultdict[str, list[Network]](list), defaultdict[str, list[Network]](list)
        for side, networks in ((left, ours), (right, theirs)):
            for n in networks:
                if id(n) not in found and id(n) not in taken:
                    own = {"spec": [n.spec], "name and variant": [_names(n)], "name": [_labels(n)]}[by]
                    side[key_of([own, n.spec.get("seed"), n.facts.get("suite", 0)])].append(n)
        for called, those in left.items():
            if len(those) == len(right[called]) == 1:
                found[id(those[0])] = right[called][0]
                taken.add(id(right[called][0]))
    return found


def _compare(a: Side, b: Side, allowed: Mapping[str, float], said: Comparison) -> None:
    said.made_a += [line for line in a.made if line not in b.made]
    said.made_b += [line for line in b.made if line not in a.made]
    partners = _partners(a.networks, b.networks)
    paired = {id(n) for n in partners.values()}
    again = a.exp == b.exp  # of another experiment nobody expects all
    unlike = defaultdict[str, list[str]](list)  # a field, and what each side says -> the networks of which they say it
    for ours in a.networks:
        theirs, name = partners.get(id(ours)), _called(ours)
        if theirs is None:
            said.only_a.append(name)
            said.lost += again and bool(ours.scores)
            continue
        mine, other = (n.facts.get("defaults", {}) for n in (ours, theirs))  # the older record's lacks what came later
        defaults = {of: mine.get(of, {}) | other.get(of, {}) for of in (*mine, *other)}
        for difference in _differing(*(filled(n.full_spec, defaults) for n in (ours, theirs))):
            unlike[key_of(difference)].append(ours.label("model"))
        rows, others = _rows(a.fold, ours), _rows(b.fold, theirs)
        gone = [asked for asked in rows if asked not in others]
        said.only_a += [f"{name}: {_asked(asked)}{_why(theirs, asked)}" for asked in gone]
        said.only_b += [f"{name}: {_asked(asked)}{_why(ours, asked)}" for asked in others if asked not in rows]
        said.lost += again * len(gone)
        for asked in (asked for asked in rows if asked in others):
            who = (*_names(ours), _asked(asked))
            for metric in allowed:
                for board, (x, y) in _boards(metric, rows[asked], others[asked]).items():
                    # Where others took the CPU, wall time says nothing of the network.
                    counted = metric
                    if metric == "latency_ms_mean" and (x["noisy"] or y["noisy"]):
                        counted = "cpu_ms"
                    elif metric == "latency_ms_mean" and (absent(x.get(metric)) or absent(y.get(metric))):
                        counted = "latency_ms_p50"  # of a record without means
                    pair = Pair(*who, board, counted, x.get(counted), y.get(counted))
                    if not absent(pair.a) and not absent(pair.b):
                        if apart := _machines(ours, theirs, asked, board) if metric.startswith(_OF_A_MACHINE) else "":
                            pair.how = "another machine"
                            said.machines += [apart] if apart not in said.machines else []
                        else:
                            _measure(pair, (a.fold, ours, x), (b.fold, theirs, y), asked)
                        _judge(pair, allowed[metric])
                        said.pairs.append(pair)
        said.pairs += _failures(ours, theirs)
        timed, others_timed = ({board for boards in n.times.values() for board in boards} for n in (ours, theirs))
        said.only_a += [f"{name}: its times on {board}" for board in sorted(timed - others_timed)]
        said.only_b += [f"{name}: its times on {board}" for board in sorted(others_timed - timed)]
    for what, models in unlike.items():
        where, *values = json.loads(what)
        of = "" if len(models) == len(paired) else f"{', '.join(dict.fromkeys(models))}: "
        for made, value in zip((said.made_a, said.made_b), values, strict=True):
            if (line := f"{of}{where} {value}") not in made:
                made.append(line)
    said.only_b += [_called(n) for n in b.networks if id(n) not in paired]


def _differing(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields of two whole specs that both have, and what each says: ("recipe.epochs", 1, 60). Labels, which networks are paired
    by, leave recipes out.
    """
    if isinstance(a, dict) and isinstance(b, dict) and a.get("is") == b.get("is"):
        for name in a:
            if name in b:
                yield from _differing(a[name], b[name], f"{where}.{name}" if where else name)
    elif a != b and where not in ("train_seed", "seed"):
        yield where, *(value.get("is", value) if isinstance(value, dict) else value for value in (a, b))


def _rows(fold: Fold, network: Network) -> dict[Asked, dict[str, Row]]:
    """What is asked -> board -> row, of what was scored."""
    found: dict[Asked, dict[str, Row]] = {}
    for row in fold.rows_of(network):
        board = row["board"] if row["currency"] == "ms" else ""
        asked = Asked(row["exit"], row["policy"], row["budget"], row["currency"], row["arm"], board)
        if row["status"] == "done" and asked in network.scores:
            found.setdefault(asked, {})[row["board"]] = {"noisy": False} | row
    return found


def _boards(metric: str, ours: dict[str, Row], theirs: dict[str, Row]) -> dict[str, tuple[Row, Row]]:
    """Board -> both rows: every board that timed both for what is timed, else one pair for all boards, of one board if there is one."""
    shared = {board: (ours[board], theirs[board]) for board in ours if board in theirs}
    if metric.startswith(_OF_A_BOARD):
        return {board: pair for board, pair in shared.items() if board}
    return {"": next(iter(shared.values()), (next(iter(ours.values())), next(iter(theirs.values()))))}


def _machines(ours: Network, theirs: Network, asked: Asked, board: str) -> str:
    """In which facts the machines differ that took these times, as far as both sides tell them; empty: in none."""
    told: list[dict[str, dict[str, None]]] = []
    for network in (ours, theirs):
        points = network.times.get(asked, {}).get(board, [])
        told.append({name: {p["machine"][name]: None for p in points if name in p["machine"]} for name in MACHINE})
    apart = [
        f"{name} {' / '.join(a)} in A, {' / '.join(b)} in B"
        for name, a, b in ((name, *(side[name] for side in told)) for name in MACHINE)
        if a and b and a != b
    ]
    return f"{board}: {'; '.join(apart)}" if apart else ""


def _measure(pair: Pair, ours: tuple[Fold, Network, Row], theirs: tuple[Fold, Network, Row], asked: Asked) -> None:
    """Set the difference, its limits, and where these come from."""
    a, b = float(pair.a), float(pair.b)
    if pair.metric == "accuracy":
        found = _paired(ours, theirs, asked)
        pair.how = "paired" if found else "unpaired"
        limits = (Interval(*(row[f"accuracy{end}"] for end in ("", "_lo", "_hi"))) for row in (ours[2], theirs[2]))
        pair.value, pair.lo, pair.hi = found or _apart(*limits)
    elif unit(pair.metric) == "points":
        pair.value = 100 * (b - a)
    elif a > 0 and b > 0:
        pair.value = b / a
        times = [list(_sessions(side[1], asked, pair.board)) for side in (ours, theirs)]
        if (
            pair.metric == "macs"
            and asked.currency == "macs"
            and not any(absent(side[2].get("budget_violation_lo")) for side in (ours, theirs))
        ):
            pair.how = "of the samples' exits"
            pair.lo, pair.hi = _spent_apart(ours[2], theirs[2])
        elif pair.metric == "latency_ms_mean" and min(map(len, times)) > 1:
            pair.how = f"{len(times[0])} and {len(times[1])} sessions"
            pair.lo, pair.hi = _welch(*times)
        elif pair.board:
            pair.how = "no interval"


def _paired(
    ours: tuple[Fold, Network, Row], theirs: tuple[Fold, Network, Row], asked: Asked
) -> tuple[float, float, float] | None:
    losses = []
    for seed in sorted(ours[1].files.keys() & theirs[1].files.keys()):
        x, y = (fold.answered.right(network, asked, seed) for fold, network, _ in (ours, theirs))
        if x is None or y is None or not np.array_equal(_truth(ours[1].files[seed]), _truth(theirs[1].files[seed])):
            return None
        losses.append(paired_loss(x, y))
    if not losses or ours[1].scores[asked].keys() != theirs[1].scores[asked].keys():
        return None
    value, lo, hi = (100 * statistics.fmean(values) for values in list(zip(*losses, strict=True))[:3])
    return 0.0 - value, 0.0 - hi, 0.0 - lo


def _truth(path: Path) -> np.ndarray[Any, Any]:
    with np.load(path) as file:  # it was read before, for its answers
        return np.asarray(file["labels"])


def _apart(a: Interval, b: Interval) -> tuple[float, float, float]:
    """B - A of two samples in points. Source: Newcombe, "Interval estimation for the difference between independent proportions", 1998,
    method 10; with the limits of whatever interval each has, as Zou and Donner, 2008.
    """
    value = b.value - a.value
    lo = value - math.hypot(b.value - b.lo, a.hi - a.value)
    return 100 * value, 100 * lo, 100 * (value + math.hypot(b.hi - b.value, a.value - a.lo))


def _spent_apart(a: Row, b: Row) -> tuple[float, float]:
    """95 % limits of the ratio of what two policies spend, each with the limits of its own interval, on logarithms; as _apart.

    Of a few seeds it may reach below nothing, which has no logarithm: next to nothing stands for it.
    """
    ends = [[math.log(max(1e-9, 1 + row[f"budget_violation{end}"])) for end in ("", "_lo", "_hi")] for row in (a, b)]
    (x, x_lo, x_hi), (y, y_lo, y_hi) = ends
    value = math.log(float(b["macs"]) / float(a["macs"]))
    return math.exp(value - math.hypot(y - y_lo, x_hi - x)), math.exp(value + math.hypot(y_hi - y, x - x_lo))


def _sessions(network: Network, asked: Asked, board: str) -> Iterator[float]:
    points = network.times.get(asked, {}).get(board, [])
    yield from (ms for session, ms in ms_by_session(points).items() if session and not absent(ms))


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """95 % limits of the ratio of means over sessions, on logarithms. Source: Welch, Biometrika 1947."""
    x, y = (np.log(values) for values in (a, b))
    parts = [values.var(ddof=1) / len(values) for values in (x, y)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(p * p / (len(v) - 1) for p, v in zip(parts, (x, y), strict=True)) if error else 1.0
    half, middle = float(stdtrit(freedom, 0.975)) * error, float(y.mean() - x.mean())
    return math.exp(middle - half), math.exp(middle + half)


def _judge(pair: Pair, allowed: float) -> None:
    if pair.value is None:
        pair.verdict = "not comparable"
        return
    points = unit(pair.metric) == "points"
    least = allowed if points else math.log(allowed)
    ends = [None if end is None else (end if points else math.log(end)) for end in (pair.value, pair.lo, pair.hi)]
    sign = -1 if METRICS[pair.metric].better == "higher" else 1
    value = sign * (ends[0] or 0.0)
    sure = ends[1] is None or ends[2] is None or ends[1] > 0 or ends[2] < 0
    if abs(value) <= least + 1e-9:
        pair.verdict = "equal" if value == 0 else "within tolerance"
    else:
        pair.verdict = ("worse" if value > 0 else "better") if sure else "within noise"


def _failures(ours: Network, theirs: Network) -> Iterator[Pair]:
    """What failed on one side and was done on the other."""
    fails = [{(r.of, r.board, asked_of(r, r.facts)): r.reason for r in n.missed if r.kind == "fail"} for n in (ours, theirs)]
    for which, verdict in ((1, "worse"), (0, "better")):
        for what, reason in fails[which].items():
            if _done((ours, theirs)[1 - which], *what):
                a, b = ("done", f"fail: {reason}") if which else (f"fail: {reason}", "done")
                yield Pair(*_names(ours), _asked(what[2]), what[1], f"status of {what[0]}", a, b, verdict=verdict)


def _done(network: Network, of: str, board: str, asked: Asked) -> bool:
    """Whether the network has what a record of this kind would say."""
    there = network.scores if of in ("eval", "decide") else [a for a, boards in network.times.items() if board in boards]
    if not asked.policy:
        return bool(there)
    # A failure of before December 2026 does not say its currency.
    return any(a._replace(fitted_on=asked.fitted_on, currency=asked.currency and a.currency) == asked for a in there)


def _names(network: Network) -> tuple[str, str, str]:
    """Data set, network with its variant, and backend."""
    data, model, backend = _labels(network)
    return data, f"{model} ({network.variant})" if network.variant else model, backend


def _labels(network: Network) -> tuple[str, str, str]:
    return network.label("dataset"), network.label("model"), network.label("backend")


def _called(network: Network) -> str:
    return ", ".join(filter(None, (*_labels(network), network.variant)))


def _asked(asked: Asked) -> str:
    budget = "" if absent(asked.budget) else f" at {asked.budget:g} {asked.currency}".rstrip()
    return f"{asked.policy}{budget}{f', {asked.arm}' if asked.arm else ''}"


def _why(network: Network, asked: Asked) -> str:
    """Why it is not there, as far as a record says it."""
    for r in network.missed:
        its = asked_of(r, r.facts)
        if r.of == "eval" or (r.of == "decide" and (its.policy, its.budget, its.arm) == (asked.policy, asked.budget, asked.arm)):
            return f" ({r.kind}: {r.reason})"
    return ""


def as_json(said: Comparison, allowed: Mapping[str, float]) -> str:
    """Every pair and every sentence."""
    return json.dumps({"worse": said.count("worse"), "tolerance": dict(allowed), **asdict(said)}, indent=1, allow_nan=False)


def as_markdown(said: Comparison, allowed: Mapping[str, float]) -> str:
    """A table of what differs, worst news last, as a terminal shows it; what is equal is counted."""
    blocks = []
    for verdict in ("not comparable", "within tolerance", "within noise", "better", "worse"):
        own = [pair for pair in said.pairs if pair.verdict == verdict]
        header = ["data set", "network", "backend", "exit or policy", "board", "metric", "A", "B", "difference [95 %]", "how"]
        names = [[p.dataset, p.network, p.backend, p.asked, p.board, p.metric] for p in own]
        if own:
            body = [[*who, *_shown(p)] for who, p in zip(names, own, strict=True)]
            blocks += [f"## {verdict.capitalize()}: {len(own)}", md_table(header, body)]
    for title, lines in (("Other machines, whose times are not comparable", said.machines), ("Only in A", said.only_a),
                         ("Only in B", said.only_b), ("Made with, A", said.made_a), ("Made with, B", said.made_b),
                         (LEFT, said.troubles)):  # fmt: skip
        blocks += [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []
    counts = [f"{said.count(v)} {v}" for v in ("equal", "within tolerance", "within noise", "better", "worse")]
    counts += [f"{n} not comparable"] if (n := said.count("not comparable")) else []
    limits = ", ".join(f"{name} {value:g} {unit(name)}" for name, value in allowed.items())
    lost = f"{said.lost} lost (in A, not in B), " if said.lost else ""
    return "\n\n".join([*blocks, f"{lost}{', '.join(counts)}; tolerated: {limits}"])


def _shown(pair: Pair) -> list[str]:
    if pair.metric not in METRICS:
        return [str(pair.a), str(pair.b), "", pair.how]
    metric = METRICS[pair.metric]
    told = [f"{metric.said(value)} {metric.unit}".strip() for value in (pair.a, pair.b)]
    if pair.value is None:
        return [*told, "", pair.how]
    form = "+.2f" if unit(pair.metric) == "points" else ".3f"
    limits = "" if pair.lo is None or pair.hi is None else f" [{pair.lo:{form}}, {pair.hi:{form}}]"
    return [*told, f"{pair.value:{form}} {unit(pair.metric)}{limits}", pair.how]
