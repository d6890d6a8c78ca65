"""How long facts will take, by earlier records of the same kind."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from time import perf_counter

from anytime.facts import Fact
from anytime.record import Record

UNKNOWN_S = 30.0  # of a fact that is like nothing that was ever run
JUDGED_S = 60.0  # expected seconds of work that must be done before a run's own pace says more than the records


def seconds(records: Iterable[Record]) -> dict[tuple[str, ...], float]:
    """Median wall time of eval records by (data set, model, kind of backend, backend), and by coarser names where that was never run."""
    seen: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for r in records:
        wall, said = r.facts.get("wall_s", {}), [str(r.facts.get(name, "")) for name in ("dataset", "model", "backend")]
        if r.kind != "eval" or "all" not in wall:
            continue
        names = _names(*said)
        for n in range(1, len(names) + 1):
            seen[names[:n]].append(wall["all"])
    return {name: median(values) for name, values in seen.items()}


def _names(data: str, model: str, backend: str) -> tuple[str, ...]:
    # By its classes: a QAT at other bits takes as long, one of the many PTQ of the same network a hundredth.
    return (data, model, " ".join(re.findall(r"\b[A-Z]\w*", backend)), backend)


def estimate(fact: Fact, took: dict[tuple[str, ...], float]) -> float | None:
    """Seconds that a fact will take by what ``seconds`` found; None where nothing like it was ever run."""
    if fact.of == "decide":
        return 0.2
    if fact.of in ("measure", "replay"):
        return 2.0
    names = _names(fact.cell.data.label, fact.cell.model.label, fact.cell.backend.label)
    return next((took[names[:n]] for n in range(len(names), 0, -1) if names[:n] in took), None)


class Pace:
    """The time that a run still needs: what earlier records expect, times how much slower this run has been than they say."""

    def __init__(self, facts: Sequence[Fact], records: Iterable[Record]) -> None:
        took = seconds(records)
        self._left = {f.name: estimate(f, took) or UNKNOWN_S for f in facts}
        self._whole_s, self._began = sum(self._left.values()), perf_counter()
        self.n = len(facts)

    def done(self, facts: Iterable[Fact]) -> tuple[int, float]:
        """``facts`` are done too; how many are, and the seconds left."""
        for fact in facts:
            self._left.pop(fact.name, None)
        left_s = sum(self._left.values())
        done_s, spent_s = self._whole_s - left_s, perf_counter() - self._began
        return self.n - len(self._left), left_s * (spent_s / done_s if done_s > JUDGED_S else 1.0)
