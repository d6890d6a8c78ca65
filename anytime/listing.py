"""What an experiment asks for, what is there of it, how long the rest will take, and whom to cite."""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from statistics import median

from anytime.config import Experiment
from anytime.facts import Fact, facts_of, state
from anytime.record import Record, load, newest
from anytime.spec import Spec


def listing(exp: Experiment, results: Path) -> str:
    """One line per network, backend and kind of fact; then how much is to do, with a time estimate from earlier records."""
    loaded = load(results / "records")
    known = newest([item for item in loaded.records if item[0].exp == exp.name])
    took = _seconds([r for r, _ in loaded.records])
    rows: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, ...], str] = {}
    left: list[float | None] = []
    for fact in facts_of(exp):
        what, reason = state(fact, known)
        line: tuple[str, ...] = (
            fact.cell.data.label,
            fact.cell.model.label,
            fact.cell.backend.label,
            f"seed {fact.cell.train_seed}",
            fact.of,
        )
        rows[line][what] += 1
        if reason:
            reasons[line] = reason
        if what in ("todo", "fail"):
            left.append(_estimate(fact, took))
    lines = [exp.question, ""]
    for name, counts in rows.items():
        said = ", ".join(f"{n} {what}" if n > 1 else what for what, n in sorted(counts.items()))
        lines.append(f"{'  '.join(name):<78} {said}" + (f": {reasons[name]}" if name in reasons else ""))
    total = Counter(what for counts in rows.values() for what in counts.elements())
    known_s = sum(s for s in left if s is not None)
    unknown = sum(s is None for s in left)
    lines += ["", ", ".join(f"{total[what]} {what}" for what in ("done", "todo", "skip", "fail"))]
    if left:
        guess = f"about {known_s / 60:.1f} minutes by earlier records of the same kind"
        lines.append(f"to do: {guess}" + (f"; {unknown} facts have no earlier record to judge by" if unknown else ""))
    return "\n".join(lines + loaded.troubles)


def sources(exp: Experiment) -> str:
    """The ``Source:`` of every class that the experiment uses, once."""
    found: dict[str, str] = {}
    for spec in _specs(exp):
        text = inspect.getdoc(type(spec)) or ""
        match = re.search(r"Source:\s*(.+?)(?:\n\s*\n|\Z)", text, re.S)
        if match:
            found[type(spec).__name__] = " ".join(match.group(1).split())
    width = max(map(len, found), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in found.items())


def _specs(value: object) -> Iterator[Spec]:
    if isinstance(value, Spec):
        yield value
        for f in fields(value):
            yield from _specs(getattr(value, f.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _specs(item)


def _seconds(records: list[Record]) -> dict[tuple[str, ...], float]:
    """Median wall time by (kind, data set, model, backend), and by coarser names where that was never run."""
    seen: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for r in records:
        wall = r.facts.get("wall_s", {})
        if r.kind != "eval" or "all" not in wall:
            continue
        names = (r.facts["dataset"], r.facts["model"], r.facts["backend"])
        for n in range(1, 4):
            seen[("eval", *names[:n])].append(wall["all"])
    return {name: median(values) for name, values in seen.items()}


def _estimate(fact: Fact, took: dict[tuple[str, ...], float]) -> float | None:
    if fact.of == "decide":
        return 0.2
    if fact.of in ("measure", "replay"):
        return 2.0
    names = (fact.cell.data.label, fact.cell.model.label, fact.cell.backend.label)
    return next((took[("eval", *names[:n])] for n in (3, 2, 1) if ("eval", *names[:n]) in took), None)
