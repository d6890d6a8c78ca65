"""Runs what an experiment lacks, fact by fact; what is there is never run again."""

from __future__ import annotations

import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch

from anytime import machine
from anytime.arms import Decider
from anytime.board import Board, Replayed, Timing
from anytime.config import Cell, Experiment, Suite
from anytime.dataset import DatasetSpec
from anytime.errors import AnytimeError, DataError, Infeasible, Leak, Unreachable, Unsupported, UsageError, WriteError
from anytime.facts import Fact, facts_of, reference_cell, state
from anytime.files import write_atomically
from anytime.forced import Forced
from anytime.metrics import Floats, Predictions
from anytime.pace import Pace
from anytime.policy import Policy
from anytime.record import Kind, Record, append, load, newest, now
from anytime.scoring import (
    answered_rows,
    compact,
    eval_rows,
    executed_rows,
    layer_rows,
    mean_over,
    percentiles,
    ptflops_macs,
    size_bytes,
    timing_rows,
    unjudged,
)
from anytime.spec import defaults, key, plain
from anytime.train import Progress, silent
from anytime.workers import workers
from anytime.workshop import Workshop, delete

Log = Callable[[str], None]
T = TypeVar("T")
SELDOM = 0.95  # share of equal classes under which an engine is said to answer otherwise than its simulation


@dataclass
class Runner:
    """One run of an experiment, or ``only`` of some of its cells: where its records go, and what is already there."""

    exp: Experiment
    results: Path
    progress: Progress = silent
    log: Log = print
    debug: bool = False
    only: frozenset[Cell] = frozenset()

    def __post_init__(self) -> None:
        self.results = Path(self.results).expanduser()  # as a string too
        self.shop = Workshop(self.results, self.progress)
        self.root = self.results / "records"
        self.forced = Forced(self.results, self.exp.name)
        machine.commit()  # asked before the work: a commit that is made meanwhile is not what ran
        self.said: set[str] = set()
        self.unreadable: dict[DatasetSpec, DataError] = {}
        self.contents: dict[str, str] = {}  # key of a cell -> what names its changeable samples and weights
        self.known = self._records()
        self.decider = Decider(self.exp, self.shop, lambda fact: self.known[fact][0] if fact in self.known else None)
        self.session = uuid4().hex[:8]  # measurements of one run, between which a ratio is fair
        self.pace: Pace | None = None  # of the run that is under way

    def _records(self) -> dict[str, tuple[Record, Path]]:
        loaded = load(self.root, self.exp.name)
        for trouble in loaded.troubles:
            self.log(trouble)
        known = newest(self.forced.without_old(loaded.records))
        cells = {key(cell): cell for cell in self.exp.cells()}
        changed = {name for name, (r, _) in known.items() if r.cell in cells and self._has_changed(r, cells[r.cell])}
        for what in sorted({self.shop.changeable(cells[known[name][0].cell]) for name in changed}):
            self._log_once(f"{what} have changed: what was found on the old ones is made again")
        lost = {name for name in known if self.exp.currency == "ms" and self._lacks_times(known[name][0])}
        return {name: found for name, found in known.items() if name not in changed | lost}

    def _kind(self, fact: str) -> str:
        """Of the record of a fact; "" where there is none."""
        return self.known[fact][0].kind if fact in self.known else ""

    def _lacks_times(self, record: Record) -> bool:
        """Whether the single times, which budgets in ms are fitted on, have left the cache that they lie in."""
        return record.kind == "measure" and self.shop.timing(record.fact) is None

    def _has_changed(self, record: Record, cell: Cell) -> bool:
        """Whether files of the user's hold other samples or weights now than when the record was written."""
        said, found = record.facts.get("content"), self._content(cell)
        return bool(said and found) and said != found

    def _content(self, cell: Cell) -> str:
        """As the workshop's; "" too where the samples cannot be read."""
        name = key(cell)
        if name not in self.contents:
            try:
                self.contents[name] = self.shop.content(cell)
            except DataError:
                self.contents[name] = ""
        return self.contents[name]

    # What is to be done ----------------------------------------------------------------------------------------

    def todo(self) -> list[Fact]:
        """Facts that are missing or have failed."""
        return [f for f in facts_of(self.exp) if self._meant(f.cell) and state(f, self.known)[0] in ("todo", "fail")]

    def states(self) -> list[tuple[str, str]]:
        """State and reason of every fact, now."""
        return [state(f, self.known) for f in facts_of(self.exp)]

    def forget(self) -> None:
        """Make everything again: nothing is known, and the cache loses what belongs to it; nothing more where that is under way.

        What is to be made again is written down until ``remade`` finds it there, so that an interrupted run goes on. Nothing is
        deleted before that, nor anything of a data set that cannot be read.
        """
        since, old = self.forced.since(), set[Path]()
        for cell in self.exp.cells():
            if self._meant(cell) and key(cell) not in since:
                self._of_readable(cell.data, lambda cell=cell: old.update(self.shop.kept_of(cell)))  # type: ignore[misc]
        again = {key(cell) for cell in self.exp.cells() if self._meant(cell) and cell.data not in self.unreadable}
        self.forced.write(dict.fromkeys(again, now()) | since)
        delete(old)
        self.known = self._records()

    def remade(self) -> None:
        """Of what was to be made again, that of which nothing is to do any more is so no longer."""
        left = {key(f.cell) for f in facts_of(self.exp) if state(f, self.known)[0] == "todo"}
        meant = {key(cell) for cell in self.exp.cells() if self._meant(cell)}
        self.forced.write({cell: since for cell, since in self.forced.since().items() if cell in left or cell not in meant})

    def _meant(self, cell: Cell) -> bool:
        return not self.only or cell in self.only

    def run(self, jobs: int = 1) -> None:
        """Everything that is missing, suite by suite: first what networks predict and policies decide, then what boards measure.

        A data set that cannot be read stops its own suites; the others are run, then its DataError is raised.
        """
        todo = self.todo()
        if todo:
            trial = self.root / self.exp.name / f"writable-{os.getpid()}"
            write_atomically(trial, b"")  # better now than after an hour
            trial.unlink()
            self.pace = Pace(todo, (r for r, _ in load(self.root).records))
            self._count([])
        predicting = [f for f in todo if f.of == "eval" or (f.of == "decide" and self.exp.currency != "ms")]
        groups: dict[str, list[Fact]] = defaultdict(list)
        for fact in predicting:
            c = fact.cell
            if fact.arm != "retrained":  # that one needs two trainings
                groups[key((c.data, c.model, c.train_seed, c.seed))].append(fact)
        if jobs > 1 and len(groups) > 1:
            self._in_parallel(list(groups.values()), jobs)
            groups.clear()
        for suite in self.exp.suites:
            again = [f for f in predicting if f.arm == "retrained" and f.suite == suite]
            for facts in (*(facts for facts in groups.values() if facts[0].suite == suite), again):
                self._of_readable(suite.data, lambda facts=facts: self.predict_and_decide(facts))  # type: ignore[misc]
            for board in self.exp.boards:
                mine = [f for f in todo if f.suite == suite and f.board == board]
                self._of_readable(suite.data, partial(self._on_board, suite, board, mine))
            self.shop.forget()
            self.decider.forget()
        if todo:
            self.progress(self.exp.name, len(todo), len(todo))
        for error in self.unreadable.values():
            raise error

    def _count(self, facts: Sequence[Fact]) -> None:
        """Say that ``facts`` are there too; the last one is said by ``run``, for some share the fate of others."""
        if self.pace is not None:
            n_done, left_s = self.pace.done(facts)
            self.progress(self.exp.name, min(n_done, self.pace.n - 1), self.pace.n, left_s)

    def _of_readable(self, data: DatasetSpec, work: Callable[[], Any]) -> None:
        if data not in self.unreadable:
            try:
                work()
            except DataError as error:
                self.log(f"{data.label} is left out: {error}")
                self.unreadable[data] = error

    def predict_and_decide(self, facts: Sequence[Fact]) -> None:
        """Facts of one trained network that need no board."""
        self.decider.forget()
        # The reference first: an eval record says how far its network is from it.
        for fact in sorted(facts, key=lambda f: f.cell.backend != self.exp.reference_backend):
            self._guarded(fact, self._eval if fact.of == "eval" else self._decide)

    def _on_board(self, suite: Suite, board: Board, facts: Sequence[Fact]) -> None:
        self._measure(suite, board, [f for f in facts if f.of == "measure"])
        for fact in facts:
            if fact.of == "decide":
                self._guarded(fact, self._decide)
        self._replay(board, [f for f in facts if f.of == "replay"])

    def _in_parallel(self, groups: list[list[Fact]], jobs: int) -> None:
        threads = max(1, torch.get_num_threads() // jobs)
        with workers(jobs) as pool:
            futures = {pool.submit(_group, self.exp, self.results, facts, threads, self.debug): facts for facts in groups}
            for done in as_completed(futures):
                self._of_readable(futures[done][0].cell.data, lambda done=done: self._say_all(done.result()))  # type: ignore[misc]
                self._count(futures[done])
        self.known = self._records()

    def _say_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.log(line)

    # One fact each ---------------------------------------------------------------------------------------------

    def _guarded(self, fact: Fact, work: Callable[[Fact], None]) -> None:
        """Do it; what cannot be done becomes a skip or a fail with its sentence, and the run goes on."""
        if any(self._kind(n) in ("", "skip", "fail") for n in fact.needs):
            return None  # what it needs has said why
        if reason := fact.cell.backend.why_not():
            return self._write(fact, "skip", reason=reason, facts={"by": "why_not"})
        try:
            work(fact)
        except (Unsupported, Infeasible, Leak) as error:
            self._write(fact, "skip", reason=str(error))
        except (WriteError, DataError, UsageError):
            raise  # not the cell's fault, and nothing after it can go better
        except Exception as error:
            if self.debug:
                traceback.print_exc()
            self._write(fact, "fail", reason=_sentence(error))

    def _eval(self, fact: Fact) -> None:
        cell = fact.cell
        started = perf_counter()
        test, parts = self.shop.predictions(cell)["test"], self.shop.data(cell.data, cell.seed)
        net, cost, plain_net = self.shop.net(cell), self.shop.cost(cell), cell.model.build(parts.input_shape, parts.n_classes)
        agreement = self.shop.agreement(cell, test.logits)
        executed = net.executed(parts.test.x[:1].numpy())
        if (alike := float(agreement.min())) < SELDOM:
            why = f": {net.facts['saturates']}" if "saturates" in net.facts else ""
            self.log(
                f"{cell.model.label}, {cell.backend.label}: the engine and the same integers in simulation name one class for "
                f"{100 * alike:.1f} % of the test samples alone{why}"
            )
        there = reference_cell(cell, self.exp.reference_backend)
        drawn = plain_net.fresh_heads and not cell.recipe.epochs
        known = there != cell and self._kind(key(("eval", there))) == "eval"
        reference = self.shop.predictions(there)["test"] if known else None
        facts = {
            "defaults": defaults(cell),
            "unjudged": unjudged(frozenset() if drawn else net.twin.trained_on, cell.data.labelled), "input_shape": list(parts.input_shape),
            "execution": net.execution, "simulated": net.simulated, "size_bytes": size_bytes(net), "net": net.facts,
            "trained_on": sorted(net.twin.trained_on), "ptflops_macs": ptflops_macs(plain_net, parts.input_shape),
            "wall_s": {**self.shop.wall_s.get(key(cell), {}), "all": perf_counter() - started},
        }  # fmt: skip
        rows: dict[str, Any] = {
            "exits": eval_rows(test, cost, agreement, executed, reference),
            "layers": layer_rows(cost, executed, net.sqnr),
        }
        self._write(fact, "eval", **rows, facts=facts, attachments={".npz": compact(test)})

    def _decide(self, fact: Fact) -> None:
        self._write(fact, "decide", points=[self.decider.point(fact)])

    # Boards ----------------------------------------------------------------------------------------------------

    def _measure(self, suite: Suite, board: Board, facts: list[Fact]) -> None:
        """Time the networks that lack it, interleaved; those of the suite's first model too, so that a ratio is of one session."""
        ready: list[Fact] = []
        everyone = [f for f in facts_of(self.exp) if f.of == "measure" and f.suite == suite and f.board == board]
        if facts:
            timed = [f for f in everyone if self._kind(f.name) == "measure"]
            facts = facts + [f for f in timed if f.cell.model == suite.models[0] and f not in facts]
        for fact in facts:
            self._guarded(fact, lambda f: ready.append(f) if self._timeable(f) else None)
        if not ready:
            return
        x = self._samples(ready[0].cell, self.exp.time_samples)

        def measure(facts: list[Fact]) -> list[tuple[Timing, dict[str, Floats] | None]]:
            nets = [self.shop.net(f.cell) for f in facts]
            self.progress(f"measure {len(facts)} networks on {board.name}", 0, 1)
            timings = board.time(nets, x)
            answers: dict[int, dict[str, Floats] | None] = {}
            for seed in dict.fromkeys(f.cell.seed for f in facts):  # each seed has a val part of its own
                own = [i for i, f in enumerate(facts) if f.cell.seed == seed]
                parts = self.shop.data(facts[0].cell.data, seed)
                asked = {"val": parts.val.x.numpy(), "test": parts.test.x.numpy()}
                answers |= zip(own, board.answers([nets[i] for i in own], asked), strict=True)
            self.progress(f"measure {len(facts)} networks on {board.name}", 1, 1)
            return [(timing, answers[i]) for i, timing in enumerate(timings)]

        for fact, (timing, said) in self._together(ready, measure):
            self.shop.keep_timing(fact.name, timing)
            facts_said = {"device": timing.facts, "launches": timing.launches, "session": self.session}
            ran = executed_rows(timing, self.decider.cost(fact.cell))
            rows = [row | more for row, more in zip(timing_rows(timing), ran, strict=True)]
            if said is not None:
                self.shop.keep_answers(fact.name, said)
                scored = answered_rows(said["test"], self.shop.predictions(fact.cell)["test"])
                rows = [row | more for row, more in zip(rows, scored, strict=True)]
            self._write(fact, "measure", exits=rows, layers=list(timing.layers), facts=facts_said)

    def _together(self, facts: list[Fact], work: Callable[[list[Fact]], list[T]]) -> Iterator[tuple[Fact, T]]:
        """Work on all at once, so that they are compared within one session; if that breaks, one by one: only the culprit fails."""
        try:
            results = work(facts)
        except Unreachable as error:
            return self.log(f"{error} It stays to do.")
        except Exception as error:
            said = _sentence(error)
            if self.debug:
                traceback.print_exc()
            if len(facts) == 1:
                return self._write(facts[0], "skip" if isinstance(error, Unsupported) else "fail", reason=said)
            self.log(f"together: {said} Now one by one.")
            for fact in facts:
                yield from self._together([fact], work)
            return None
        yield from zip(facts, results, strict=True)

    def _timeable(self, fact: Fact) -> bool:
        """Whether the board can time it; a skip says why not."""
        assert fact.board is not None
        if reason := fact.board.lacks("", ()):  # whatever the network, which costs a calibration
            self._write(fact, "skip", reason=reason, facts={"by": "board", "form": "", "needs": ()})
            return False
        net = self.shop.net(fact.cell)
        if reason := fact.board.why_not(net):
            passing = reason == fact.board.lacks(net.format, net.needs)
            self._write(
                fact, "skip", reason=reason, facts={"by": "board", "form": net.format, "needs": net.needs} if passing else {}
            )
            return False
        return True

    def _replay(self, board: Board, facts: list[Fact]) -> None:
        """Execute decisions, interleaved."""
        policies: dict[str, Policy] = {}

        def refit(f: Fact) -> None:
            policies[f.name] = self.decider.fitted(replace(f, board=f.board if self.exp.currency == "ms" else None))

        for fact in facts:
            self._guarded(fact, refit)
        ready = [f for f in facts if f.name in policies]
        if not ready:
            return
        x = self._samples(ready[0].cell, self.exp.replay_samples)

        def execute(facts: list[Fact]) -> list[Replayed]:
            self.progress(f"execute {len(facts)} decisions on {board.name}", 0, 1)
            runs = board.run([(self.shop.net(f.cell), policies[f.name]) for f in facts], x)
            self.progress(f"execute {len(facts)} decisions on {board.name}", 1, 1)
            return runs

        for fact, ran in self._together(ready, execute):
            policy = policies[fact.name]
            where = replace(fact, board=fact.board if self.exp.currency == "ms" else None)
            test = self.decider.said(where, fact.cell)["test"]
            offline = Predictions(test.logits[:, : len(x)], test.labels[: len(x)], "test")
            everyone = policy.exits(test.logits)
            exits = everyone[: len(x)]
            answers = policy.answer(offline.logits, exits).argmax(-1)
            # Who is handed over together shares one reading, whatever exit each takes.
            share = np.bincount(everyone if ran.at_once == 1 else ran.exits, minlength=offline.n_exits).astype(float)
            wall, cpu = (mean_over(ms, ran.exits, share / share.sum()) for ms in (ran.wall_ms, ran.cpu_ms))
            assert fact.policy is not None
            point = {
                "policy_label": fact.policy.label, "arm": fact.arm, "budget": fact.budget, "currency": self.exp.currency, "n": len(x),
                "accuracy": float((ran.answers == offline.labels).mean()),
                "offline_accuracy": float((answers == offline.labels).mean()),
                "same_exits": float((ran.exits == exits).mean()), "same_answers": float((ran.answers == answers).mean()),
                "share": (np.bincount(ran.exits, minlength=offline.n_exits) / len(x)).tolist(),
                "n_timed": ran.readings_ms.size,
                **percentiles(ran.readings_ms), "latency_ms_mean": wall, "cpu_ms": cpu,
            }  # fmt: skip
            self._write(
                fact, "replay", points=[point], facts={"device": ran.facts, "decides": fact.needs[0], "session": self.session}
            )

    def _samples(self, cell: Cell, n: int) -> Floats:
        return self.shop.data(cell.data, cell.seed).test.x[:n].numpy()

    # Writing ---------------------------------------------------------------------------------------------------

    def _write(
        self, fact: Fact, kind: Kind, *, reason: str = "", facts: dict[str, Any] | None = None,
        attachments: dict[str, bytes] | None = None, **rows: Any,
    ) -> None:  # fmt: skip
        cell, old = fact.cell, self._kind(fact.name)
        if kind == old == "skip" and self.known[fact.name][0].reason == reason:
            return
        if kind in ("skip", "fail") and old == fact.of:
            return self.log(f"{cell.model.label}, {cell.backend.label}, {fact.of}: {reason} What was found before stays.")
        about: dict[str, Any] = {
            "model": cell.model.label, "dataset": cell.data.label, "backend": cell.backend.label, "column": cell.backend.column,
            "position": fact.position, "reference": cell.backend == self.exp.reference_backend,
            "own_exits": cell.backend.own_exits, "question": self.exp.question,
            "suite": [s for s in self.exp.suites if s.data == cell.data].index(fact.suite),
            "versions": machine.versions(), "git": machine.commit(), "device": machine.facts(),
        }  # fmt: skip
        if kind in ("skip", "fail") and fact.policy is not None:
            about |= {"policy_label": fact.policy.label, "budget": fact.budget, "currency": self.exp.currency, "arm": fact.arm}
        if content := self._content(cell):
            about["content"] = content
        record = Record(
            self.exp.name, key(cell), kind, fact.name, plain(cell), of=fact.of, board=fact.board.name if fact.board else "",
            reason=reason, facts=about | (facts or {}), **rows,
        )  # fmt: skip
        path = append(record, self.root, attachments)
        self.known[fact.name] = (record, path)
        self._count([fact])
        if kind in ("skip", "fail"):
            where = f" on {fact.board.name}" if fact.board else ""
            self._log_once(f"{kind}: {cell.model.label}, {cell.backend.label}{where}, {fact.of}: {reason}")

    def _log_once(self, line: str) -> None:
        if line not in self.said:
            self.log(line)
        self.said.add(line)


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, AnytimeError) else f"{type(error).__name__}: {error}"


def _group(exp: Experiment, results: Path, facts: list[Fact], threads: int, debug: bool) -> list[str]:
    """One trained network's facts, in a process of their own."""
    torch.set_num_threads(threads)
    lines: list[str] = []
    Runner(exp, results, log=lines.append, debug=debug).predict_and_decide(facts)
    return lines
