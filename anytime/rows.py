"""Records -> tidy rows: a pure fold over results/records.

It needs neither torch nor the classes that the records name, so rows can be made on any machine, years later.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from anytime import record
from anytime.decided import first_policy, limits, over_seeds, reached, reading_ms, readings, recovered, unjudged
from anytime.errors import UsageError, near
from anytime.gather import NAN as NAN
from anytime.gather import Asked, Network, asked_of, gather, key_of, known, noisy, order, train_seed_of
from anytime.gather import Row as Row
from anytime.gather import absent as absent
from anytime.gather import listed as listed
from anytime.metrics import Interval, wilson
from anytime.paired import Answered
from anytime.rivals import Rivals
from anytime.steps import steps
from anytime.timed import mean_ms, ratios, times

COLUMNS = listed(
    "exp model dataset backend execution policy arm budget board train_seeds n accuracy accuracy_lo accuracy_hi macs bops params "
    "size_bytes latency_ms_p50 latency_ms_p90 latency_ms_p99 cpu_ms speedup speedup_over agreement int8_macs_share status reason "
    "column exit currency spent spent_val loss loss_lo loss_hi loss_upper static_loss static_loss_lo static_loss_hi "
    "static_loss_upper static_macs ece nll exit_flips exit_shares packed_bytes "
    "peak_activation_bytes own_macs own_latency_ms_p50 latency_ms_mean latency_ms_spread n_sessions n_timed same_exits "
    "same_answers macs_by_bits worst_layer front simulated noisy reference of seed variant cell exclusions "
    "brier auroc overthinking nll_reached brier_reached ece_reached auroc_reached budget_violation budget_violation_lo "
    "budget_violation_hi exit_flips_lo exit_flips_hi earlier_flips later_flips harmful_flips helpful_flips prediction_flips "
    "regret regret_lo regret_hi recovered area accuracy_at_macs accuracy_at_bops accuracy_at_ms gain gain_lo gain_hi bound floor "
    "step step_gain step_gain_lo step_gain_hi "
    "rival rival_gain rival_gain_lo rival_gain_hi rival_time as_good as_good_time as_good_time_lo as_good_time_hi "
    "max_error max_error_share answers input_shape energy_mj "
    "board_accuracy board_agreement"
)
_WORDS = listed(
    "exp model dataset backend execution policy arm board train_seeds speedup_over status reason column currency exit_shares of "
    "macs_by_bits worst_layer variant cell exclusions floor step rival as_good input_shape nll_reached brier_reached ece_reached "
    "auroc_reached"
)
_WHOLE = listed("n exit n_sessions n_timed seed")
_TRUTH = listed("front simulated noisy reference bound")
_SCORED = listed(
    "macs bops params packed_bytes peak_activation_bytes own_macs agreement int8_macs_share ece nll brier auroc overthinking spent "
    "spent_val budget_violation exit_flips earlier_flips later_flips harmful_flips helpful_flips prediction_flips regret area "
    "max_error max_error_share answers"
)
# Facts of a minute or of one network, not of a board.
_FLEETING = ("noisy", "pressure", "waiting", "stopwatch", "load", "mhz", "interleaved", "first_answer_ms", "memory_mb")


def rows(records_root: Path, exp: str) -> pd.DataFrame:
    """Fold the records of ``exp`` into tidy rows: one per (cell, exit or policy, budget, arm, board), and one per skip or fail.

    Columns are ``COLUMNS``; shares are in [0, 1], costs per sample; a number that was not taken is NaN. Training seeds of
    otherwise equal cells are folded: means, and for accuracy a t-interval over the seeds (one seed: Wilson's). Latencies are
    medians over repeated measurements, latency_ms_spread their max - min. ``speedup`` is the mean latency (the median where
    no mean was recorded) of the first model's reference at its last exit, in the same execution if it was timed there, divided
    by this row's. It is taken within each session of measuring that timed both, then averaged over these sessions; where no
    session is shared, over what was pooled. ``loss`` is paired, sample by sample, with the reference backend of the same
    model at the same exit, or under the same policy and budget refitted; with several seeds each is paired with its own
    reference, then value and limits are averaged. It is NaN on the reference's own rows, and where a policy answers anything
    but the class of the exit taken and its record (an old one) does not say of which samples that is right. ``static_loss`` is
    the same against the network without exits in the reference backend, ``static_macs`` the MACs as a share of that one's. What
    a policy row says of params, bytes and agreement is the whole network's; what it says of decisions is explained by the
    glossary (metrics.METRICS), its limits are bootstrapped (one seed) or t-intervals over seeds. ``step`` names the one field
    in which the backend differs from another one of the experiment, which has it by default; ``step_gain`` is what that field
    gives, paired (steps.py); ``rival`` and ``as_good`` name networks without exits that a policy stands beside (rivals.py).
    ``bound``: a policy that no board can run; ``floor``: what flips come to without any compression,
    by another engine or by training again. ``front``: see ``mark_front``; ``of`` names the fact that a row reports (eval,
    measure, decide, replay) or that its skip or fail stands in for; ``variant`` the fields in which cells of equal labels
    differ. ``attrs`` carry exp, question, troubles (a sentence per file that could not be used) and provenance (lines).
    Raises UsageError where no record of ``exp`` lies.
    """
    loaded = record.load(records_root, exp)
    if not loaded.records and not loaded.troubles:
        names = near(exp, {p.parent.name for p in records_root.glob("*/*.json")})
        raise UsageError(f"experiment {exp!r} has no records in {records_root}; {names}; or run it first")
    troubles = list(loaded.troubles)
    networks = gather(loaded.records, troubles)
    fold = Fold(networks, troubles)
    said = [row for network in networks for row in fold.rows_of(network)]
    mark_front(said)
    blank = {"exp": exp} | dict.fromkeys(_WORDS[1:], "") | dict.fromkeys(_TRUTH, False)
    frame = pd.DataFrame([blank | {k: v for k, v in row.items() if v is not None} for row in said], columns=COLUMNS)
    kinds = dict.fromkeys(COLUMNS, "float64") | dict.fromkeys(_WORDS, "object")
    # A copy: with a type for each column pandas keeps them apart, and warns of it.
    frame = frame.astype(kinds | dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(_TRUTH, "bool")).copy()
    # Where the checkout lies is no part of a table that is committed.
    told = sorted({trouble.replace(f"{records_root}{os.sep}", "") for trouble in troubles})
    question = next((str(n.facts["question"]) for n in networks if "question" in n.facts), "")
    frame.attrs = {"exp": exp, "question": question, "troubles": told, "provenance": provenance(networks)}
    return frame


def mark_front(rows: Sequence[Row]) -> None:
    """Set ``front`` on the rows that are worth their cost beyond the noise.

    A row is on the front unless a cheaper row of the same data set and board has an accuracy interval that reaches its own
    lower limit, or an equally cheap one an interval that lies above its own. Cost is the mean latency, for a policy's median is
    that of one of its exits (the median where no mean was recorded; MACs where nothing of that data set was timed). Rows that
    were not timed beside rows that were, and bounds that no board can run, are neither on the front nor in its way.
    """
    places: dict[Any, list[tuple[float, Row]]] = defaultdict(list)
    timed = {row["dataset"] for row in rows if not absent(row.get("latency_ms_p50"))}
    for row in rows:
        row["front"] = False
        cost: Any = mean_ms(row) if row["dataset"] in timed else row.get("macs")
        if not absent(cost) and not absent(row.get("accuracy")) and not row.get("bound"):
            places[row["dataset"], row["board"]].append((cost, row))
    for place in places.values():
        for cost, row in place:
            row["front"] = not any(
                (other < cost and rival["accuracy_hi"] >= row["accuracy_lo"])
                or (other == cost and rival["accuracy_lo"] > row["accuracy_hi"])
                for other, rival in place
            )


class Fold:
    """Networks -> rows: looks up what is seen only across networks, the references and the denominators of speed-ups."""

    def __init__(self, networks: Sequence[Network], troubles: list[str]) -> None:
        self.networks, self.troubles = networks, troubles
        self.answered = Answered(troubles)
        self.steps, self.rivals = steps(networks), Rivals(networks, self.answered)
        self.references: dict[tuple[str, str], Network] = {}
        self.statics: dict[tuple[str, str], list[Network]] = defaultdict(list)  # by the model that they are without its exits
        self.denominators: dict[tuple[str, str], list[tuple[Network, list[Row], str]]] = defaultdict(list)
        first: dict[str, Network] = {}
        for network in networks:
            if network.facts.get("reference"):
                self.references.setdefault((network.family, network.model), network)
                first.setdefault(network.place, network)
                self.statics[network.place, key_of((network.spec.get("model") or {}).get("of"))].append(network)
        # The reference comes first: it serves where its model was not timed in a row's own execution.
        for network in sorted(networks, key=lambda n: n is not first.get(n.place)):
            base = first.get(network.place)
            if base and (network.model, network.label("column")) == (base.model, base.label("column")):
                last = _last_exit(network.times)
                for board, points in network.times[last].items() if last else ():
                    name = f"{network.label('model')} {network.label('column')}, {network.label('execution')}"
                    self.denominators[network.place, board].append((network, points, name))

    def rows_of(self, network: Network) -> Iterator[Row]:
        """Exits, then policies, then what was skipped or failed."""
        for asked, _ in sorted({**network.scores, **network.times}.items(), key=order):
            points, boards = network.scores.get(asked, {}), network.times.get(asked, {})
            row = network.common(points or network.cells) | _told(asked) | {"status": "done"}
            row |= _score(list(points.values())) | _whole(network, asked) | self._loss(network, asked)
            row |= self._against_static(network, asked, row.get("macs")) | self._step(network, asked)
            if asked.exit is None:
                row |= self._decided(network, asked, row)
            scored, timed = ("decide", "replay") if asked.exit is None else ("eval", "measure")
            row["reason"] = network.facts.get("unjudged", "") if points else f"the {scored} record is missing"
            for board in sorted(boards) or [asked.fitted_on]:
                timings = boards.get(board, [])
                said = row | times(timings) | {"board": board, "of": timed if timings else scored}
                said |= self._speedup(network, board, timings)
                if asked.exit is None:
                    said |= self._at_ms(network, asked, board) | self.rivals.of(network, asked, board)
                yield said | unjudged(network)
        missed = defaultdict(set)
        for r in network.missed:
            missed[r.kind, r.of, r.board, " ".join(r.reason.split()), asked_of(r, r.facts)].add(train_seed_of(r))
        for (kind, of, board, reason, asked), seeds in missed.items():
            said = {"board": board, "status": kind, "of": of, "reason": reason}
            yield network.common(seeds) | _told(asked) | said

    def _base(self, network: Network, board: str) -> tuple[Network, list[Row], str] | None:
        """What it is timed against on this board."""
        bases = self.denominators.get((network.place, board), [])
        bases = [base for base in bases if base[0].family == network.family] or bases
        bases = [base for base in bases if base[0].label("execution") == network.label("execution")] or bases
        return bases[0] if bases else None

    def _speedup(self, network: Network, board: str, ours: list[Row]) -> Row:
        base = self._base(network, board)
        if base is None:
            return {}
        _, theirs, name = base
        found = ratios(theirs, ours)
        return {"speedup": _mean(found), "speedup_over": name} if found else {}

    def _at_ms(self, network: Network, asked: Asked, board: str) -> Row:
        base = self._base(network, board)
        whole = base[1] if base else []
        if any(p.get("budgets_of") == "own" for p in network.scores.get(asked, {}).values()):
            whole = self._own_last_exit(network, board)
        exits = {a.exit: boards[board] for a, boards in network.times.items() if a.exit is not None and board in boards}
        ms = {k: mean_ms(times(points)) for k, points in exits.items()}
        return reading_ms(network, asked, ms, mean_ms(times(whole))) if whole and ms else {}

    def _own_last_exit(self, network: Network, board: str) -> list[Row]:
        """Times of the last exit of the same network in the reference's column, in the same execution if it was timed there."""
        reference = self.references.get((network.family, network.model))
        forms = [n for n in self.networks if reference and (n.family, n.model) == (network.family, network.model)]
        forms = [n for n in forms if reference and n.label("column") == reference.label("column")]
        timed = {}
        for n in forms:
            if last := _last_exit(a for a, boards in n.times.items() if board in boards):
                timed[n.label("execution")] = n.times[last][board]
        return timed.get(network.label("execution")) or next(iter(timed.values()), [])

    def _decided(self, network: Network, asked: Asked, row: Row) -> Row:
        """What is said of decisions only."""
        points = list(network.scores.get(asked, {}).values())
        reference = self.references.get((network.family, network.model))
        same = reference and reference is not network and reference.label("column") == network.label("column")
        said = limits(points) | reached(points) | recovered(network, asked, row)
        said |= readings(network, asked) if points else {}
        said |= {"bound": any(p.get("bound") for p in points)}
        said |= {"floor": "trained again" if asked.arm == "retrained" else "FP32 by another engine" if same else ""}
        if first := first_policy(network, asked):
            said |= self.answered.gain(network, first, network, asked, "gain")
        return said

    def _step(self, network: Network, asked: Asked) -> Row:
        """What the field in which it differs from its plain form gives."""
        step = self.steps.get(id(network))
        found = self.answered.gain(step.plain, asked, network, asked, "step_gain") if step else {}
        return {"step": step.said} | found if step and found else {}

    def _loss(self, network: Network, asked: Asked) -> Row:
        reference = self.references.get((network.family, network.model))
        against = asked if asked.exit is not None else asked._replace(arm="refitted")
        if reference is None or (reference is network and against == asked):
            return {}
        if network.facts.get("own_exits") and asked.exit is not None:  # an exit of an ensemble is no exit of the network
            against = _last_exit(reference.scores) or against
        return self.answered.loss(reference, against, network, asked, "loss")

    def _against_static(self, network: Network, asked: Asked, macs: Any) -> Row:
        statics = self.statics.get((network.place, network.model), [])
        statics = [static for static in statics if static.family == network.family] or statics
        last = _last_exit(statics[0].scores) if statics else None
        if last is None:
            return {}
        whole = _mean(point.get("macs") for point in statics[0].scores[last].values())
        share = {} if absent(macs) or absent(whole) or not whole else {"static_macs": macs / whole}
        return self.answered.loss(statics[0], last, network, asked, "static_loss") | share


def _whole(network: Network, asked: Asked) -> Row:
    """What belongs to all of it together; of a policy's network that is more than of an exit's."""
    row: Row = {"size_bytes": network.facts.get("size_bytes"), "exclusions": (network.facts.get("net") or {}).get("exclusions")}
    row["input_shape"] = "x".join(map(str, network.facts.get("input_shape", ())))
    exits = [_score(list(points.values())) for a, points in sorted(network.scores.items(), key=order) if a.exit is not None]
    if asked.exit is None and exits:
        row |= {name: exits[-1][name] for name in ("params", "packed_bytes", "peak_activation_bytes")}
        row["agreement"] = min(e["agreement"] for e in exits)
    return row | {"macs_by_bits": _macs_by_bits(network.layers), "worst_layer": _worst_layer(network.layers)}


def _macs_by_bits(layers: Sequence[Row]) -> str:
    """ "W4A4 93.1 %, W8A8 6.9 %" of the MACs of all stages and heads; empty in FP32."""
    macs: dict[str, float] = defaultdict(float)
    for layer in layers:
        macs[f"W{layer['weight_bits']}A{layer['activation_bits']}"] += layer["macs"]
    total = sum(macs.values())
    if set(macs) <= {"W32A32"} or not total:
        return ""
    return ", ".join(f"{bits} {100 * n / total:.1f} %" for bits, n in sorted(macs.items(), key=lambda item: -item[1]))


def _worst_layer(layers: Sequence[Row]) -> str:
    noisy = [layer for layer in layers if not absent(layer.get("sqnr_db"))]
    worst = min(noisy, key=lambda layer: float(layer["sqnr_db"]), default=None)
    return f"{worst['layer']} {worst['sqnr_db']:.1f} dB" if worst else ""


def _last_exit(asked: Iterable[Asked]) -> Asked | None:
    return max((a for a in asked if a.exit is not None), key=lambda a: a.exit or 0, default=None)


def _told(asked: Asked) -> Row:
    return {name: value for name, value in asked._asdict().items() if name != "fitted_on"}


def _mean(values: Iterable[Any]) -> float:
    there = known(values)
    return statistics.fmean(there) if there else NAN


def _score(points: Sequence[Row]) -> Row:
    """Points of one or several training seeds, folded."""
    if not points:
        return {}
    shares, n = [float(p["accuracy"]) for p in points], min(int(p["n"]) for p in points)
    interval = _cut(over_seeds(shares)) if len(shares) > 1 else wilson(round(shares[0] * n), n)
    taken = zip(*(p["share"] for p in points if p.get("share")), strict=True)
    row: Row = {name: _mean(p.get(name) for p in points) for name in _SCORED}
    row |= {"n": n, "exit_shares": "/".join(f"{statistics.fmean(shares):.3f}" for shares in taken)}
    return row | dict(zip(("accuracy", "accuracy_lo", "accuracy_hi"), interval, strict=True))


def _cut(interval: Interval) -> Interval:
    """To what a share can be."""
    return Interval(interval.value, max(0.0, interval.lo), min(1.0, interval.hi))


def provenance(networks: Sequence[Network]) -> list[str]:
    """Lines that say what the numbers were made with."""
    told: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    timed = []
    for r in (r for network in networks for r in network.used):
        git = r.facts.get("git") or {}
        told["commit"][str(git.get("commit", "not recorded"))[:10]].add("with uncommitted changes" if git.get("dirty") else "")
        for name, value in (r.facts.get("versions") or {}).items():
            told["versions"][name].add(str(value))
        if r.kind in ("measure", "replay"):
            timed.append(noisy(r))
            for name, value in (r.facts.get("device") or {}).items():
                if not name.startswith(_FLEETING):
                    told[f"board {r.board}"][name].add(str(value))
    lines = []
    for title, said in sorted(told.items()):
        parts = (f"{name} {' / '.join(sorted(filter(None, values)))}".strip() for name, values in sorted(said.items()))
        lines.append(f"{title}: {', '.join(parts)}")
    return lines + ([f"{sum(timed)} of {len(timed)} measurements were made on a busy machine (~)"] if any(timed) else [])
