"""What an experiment asks for, what is there of it, how long the rest will take, and whom to cite."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from anytime.config import Experiment
from anytime.facts import facts_of, state
from anytime.forced import Forced
from anytime.pace import estimate, seconds
from anytime.progress import span
from anytime.record import load, newest
from anytime.spec import Spec


@dataclass
class Listing:
    """What is asked: a line per network, backend and kind of fact; how many facts are in which state; how long the rest takes."""

    question: str
    lines: list[dict[str, Any]]
    total: dict[str, int]
    left_s: float  # of the facts to do that were run before, by the median of earlier records of the same kind
    n_unknown: int  # facts to do that were never run before
    troubles: list[str]

    def text(self) -> str:
        """For people."""
        lines = [self.question, ""]
        for line in self.lines:
            name = "  ".join(str(line[part]) for part in ("dataset", "model", "backend", "seed", "of"))
            said = ", ".join(f"{n} {what}" if n > 1 else what for what, n in sorted(line["facts"].items()))
            lines.append(f"{name:<78} {said}" + (f": {line['reason']}" if line["reason"] else ""))
        lines += ["", ", ".join(f"{n} {what}" for what, n in self.total.items())]
        if self.total["todo"] + self.total["fail"]:
            guess = f"about {span(self.left_s)} by earlier records of the same kind"
            unknown = f"; {self.n_unknown} facts have no earlier record to judge by" if self.n_unknown else ""
            lines.append(f"to do: {guess}{unknown}")
        return "\n".join(lines + self.troubles)


def listing(exp: Experiment, results: Path) -> Listing:
    """What ``exp`` asks for and what is there of it; nothing is run."""
    loaded = load(results / "records")
    known = newest(Forced(results, exp.name).without_old(item for item in loaded.records if item[0].exp == exp.name))
    took = seconds(r for r, _ in loaded.records)
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    left: list[float | None] = []
    for fact in facts_of(exp):
        what, reason = state(fact, known)
        cell = fact.cell
        name = {
            "dataset": cell.data.label, "model": cell.model.label, "backend": cell.backend.label,
            "seed": f"seed {cell.train_seed}", "of": fact.of,
        }  # fmt: skip
        line = lines.setdefault(tuple(name.values()), name | {"facts": Counter[str](), "reason": ""})
        line["facts"][what] += 1
        line["reason"] = reason or line["reason"]
        if what in ("todo", "fail"):
            left.append(estimate(fact, took))
    said = list(lines.values())
    total = {what: sum(line["facts"][what] for line in said) for what in ("done", "todo", "skip", "fail")}
    known_s = [s for s in left if s is not None]
    return Listing(exp.question, said, total, sum(known_s), len(left) - len(known_s), loaded.troubles)


def sources(exp: Experiment) -> dict[str, str]:
    """Class -> its ``Source:``, of every class that the experiment uses."""
    found: dict[str, str] = {}
    for spec in _specs(exp):
        text = inspect.getdoc(type(spec)) or ""
        match = re.search(r"Source:\s*(.+?)(?:\n\s*\n|\Z)", text, re.S)
        if match:
            found[type(spec).__name__] = " ".join(match.group(1).split())
    return found


def _specs(value: object) -> Iterator[Spec]:
    if isinstance(value, Spec):
        yield value
        for f in fields(value):
            yield from _specs(getattr(value, f.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _specs(item)
