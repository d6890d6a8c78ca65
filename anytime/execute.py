"""Executes a fitted policy: samples that leave are answered at once, the rest go on as a dense smaller batch. Never torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from anytime.errors import AnytimeError, UsageError, first_line
from anytime.metrics import Floats, Ints
from anytime.policy import Policy

# What ONNX Runtime, torch and C++ say where Python has MemoryError.
NO_MEMORY = re.compile("failed to allocate memory|can't allocate memory|out of memory|not enough memory|bad_alloc", re.IGNORECASE)


class Runs(Protocol):
    """What can be executed: every Deployable, and a loaded bundle."""

    @property
    def n_exits(self) -> int:
        """E."""

    def plan(self, exits: Sequence[int]) -> Sequence[Any]:
        """Segments that lead to those exits, the ``head`` of each; those of others may be among them, and are not read."""

    def start(self, x: Floats) -> Any:
        """x float32 [B, ...] -> state 0."""

    def step(self, segment: Any, state: Any) -> tuple[Any, Floats | None]:
        """State before the segment -> (state after it, logits [B, K] or None); what is answered belongs to the caller."""


class Answers(NamedTuple):
    """What came out of some samples: their places in the input, exits, answered logits [B, K], ms from hand-over to answer."""

    place: Ints
    exits: Ints
    logits: Floats
    ms: Floats


class _Given(NamedTuple):
    """Samples [B, ...] as they were handed over: the place of the first, and when, in s [B]."""

    x: Floats
    first: int
    since: Floats


class Broken(AnytimeError):
    """The engine failed on the way; ``answered`` holds what had been answered by then."""

    def __init__(self, message: str, answered: Answers) -> None:
        super().__init__(message)
        self.answered = answered

    def __reduce__(self) -> tuple[type, tuple[str, Answers]]:
        return type(self), (str(self), self.answered)


@dataclass
class _Group:
    """Samples that stand before the same segment: places [B], state, logits of the exits in use [U, B, K], time of hand-over [B] in s."""

    place: Ints
    state: Any
    since: Floats
    read: Floats | None = None

    def __len__(self) -> int:
        return len(self.place)


@dataclass
class Executor:
    """Runs ``net`` under a fitted ``policy``, at most ``batch`` samples at a time.

    Answers are those of ``policy.exits`` and ``policy.answer`` on all logits, as far as the engine's results do not depend on
    the size of a batch. Samples that do not leave wait before the next segment until ``batch`` of them are there, or the
    input ends; so at most ``batch`` x segments samples are held at any time, whatever the length of the input. With
    ``batch`` 1 every sample is answered, by ``one``, before the next one is asked for.

    An engine or a policy that fails, an engine that answers too few, or logits that are not finite, are an AnytimeError that
    names the samples; what was answered before stays answered.
    Source: this project.
    """

    net: Runs
    policy: Policy
    batch: int = 64
    plan: Sequence[Any] = field(init=False)
    used: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"batch={self.batch} is no number of samples: give 1 or more")
        if self.policy.bound:
            raise UsageError(f"{self.policy.label} decides by what no board can know: it is a bound, not to be executed")
        self.used = self.policy.uses(self.net.n_exits)
        thresholds = getattr(getattr(self.policy, "of", None) or self.policy, "thresholds", None)
        if thresholds is not None and len(thresholds) != len(self.used) - 1:
            raise UsageError(
                f"{self.policy.label}: {len(thresholds)} thresholds are fitted, {len(self.used) - 1} are needed for the "
                f"{len(self.used)} exits that it reads; call fit with val predictions of this very network first"
            )
        self.plan = self.net.plan(self.used)
        self._exits = [np.array([k]) for k in self.used]
        # What is answered is then among what was read, and needs no call to be found.
        self._as_taken = self.policy.answers_as == "exit taken" and not self.policy.tempers
        self._blank: Floats | None = None

    def one(self, x: Floats, place: int = 0) -> tuple[int, Floats]:
        """x [1, ...], the sample ``place`` -> its exit and the logits that are answered [1, K]; errors as ``stream``.

        What ``batch`` 1 does, and what boards time: a sample that runs alone pays for every call of numpy, so it makes few.
        """
        if len(x) != 1:
            raise UsageError(f"one() answers one sample, not {len(x)}: give several to run()")
        net, stop, used, read, i = self.net, self.policy.stop, self.used, self._blank, 0
        if read is not None:
            read = read.copy()
        state = self._guarded(-1, [place], lambda: net.start(x))
        for n, segment in enumerate(self.plan):
            try:  # as _guarded does, which costs a call
                state, logits = net.step(segment, state)
                if segment.head != used[i]:
                    continue
                assert logits is not None
                if read is None:
                    self._blank = self._unread(logits, 1)
                    read = self._blank.copy()
                read[i] = logits
            except AnytimeError:
                raise
            except Exception as error:
                raise self._failed(n, [place], error) from error
            try:
                if segment.head == used[-1] or stop(read[: i + 1])[0]:
                    break
            except AnytimeError:
                raise
            except Exception as error:
                raise self._failed(n, [place], error, self.policy.label) from error
            i += 1
        assert read is not None
        answer = read[i] if self._as_taken else self._answered_with(n, [place], read, self._exits[i])
        if not (_finite(read[: i + 1]) and (self._as_taken or _finite(answer))):
            for k, said in zip(used, read[: i + 1], strict=False):
                _check_read(k, said, [place])
            self._check_answer(used[i], answer, [place])
        return used[i], answer

    def run(self, x: Floats) -> Answers:
        """x [N, ...] -> everyone's answer, in the order of ``x``. Broken carries those that were there."""
        x = _floating(x, "the samples are")
        n, blocks = len(x), []
        try:
            for block in self._answered(self._cut(x)):
                blocks.append(block)
        except AnytimeError as error:
            raise Broken(str(error), _joined(blocks)) from error
        answers = _joined(blocks)
        order = np.empty(n, np.intp)
        order[answers.place] = np.arange(n)
        return Answers(answers.place[order], answers.exits[order], answers.logits[order], answers.ms[order])

    def stream(self, samples: Iterable[Floats]) -> Iterator[Answers]:
        """Samples [...] one by one -> answers as they become ready, some at a time; ``place`` tells whose they are.

        The next ``batch`` samples are asked for only when all that can be answered has been.
        """
        return self._answered(self._gather(iter(samples)))

    def _cut(self, x: Floats) -> Iterator[_Given]:
        for i in range(0, len(x), self.batch):
            yield _Given(x[i : i + self.batch], i, np.full(min(self.batch, len(x) - i), perf_counter()))

    def _gather(self, samples: Iterator[Floats]) -> Iterator[_Given]:
        first = 0
        while True:
            taken: list[Floats] = []
            since: list[float] = []
            for i, sample in enumerate(islice(samples, self.batch), first):
                # A copy: a camera may write its next frame over this one.
                taken.append(self._guarded(-1, [i], partial(np.array, _floating(sample, f"sample {i} is"))))
                since.append(perf_counter())
            if not taken:
                return
            for i, sample in enumerate(taken):
                if sample.shape != taken[0].shape:
                    raise UsageError(
                        f"sample {first + i} has the shape {sample.shape}, those before it {taken[0].shape}: give all the same one"
                    )
            place = range(first, first + len(taken))
            x = taken[0][None] if len(taken) == 1 else self._guarded(-1, place, partial(np.stack, taken))
            yield _Given(x, first, np.array(since))
            first += len(taken)

    def _answered(self, given: Iterator[_Given]) -> Iterator[Answers]:
        return self._alone(given) if self.batch == 1 else self._flow(given)

    def _alone(self, given: Iterator[_Given]) -> Iterator[Answers]:
        for x, place, since in given:
            exit, logits = self.one(x, place)
            yield Answers(np.array([place]), np.array([exit]), logits, 1e3 * (perf_counter() - since))

    def _flow(self, given: Iterator[_Given]) -> Iterator[Answers]:
        waiting: list[list[_Group]] = [[] for _ in self.plan]
        for x, first, since in given:
            place = np.arange(first, first + len(x))
            waiting[0].append(_Group(place, self._guarded(-1, place, lambda x=x: self.net.start(x)), since))  # type: ignore[misc]
            yield from self._sweep(waiting, self.batch)
        yield from self._sweep(waiting, 1)

    def _sweep(self, waiting: list[list[_Group]], least: int) -> Iterator[Answers]:
        """Go once through the segments, and run each that has ``least`` samples waiting; new ones never wait."""
        for i, queue in enumerate(waiting):
            while sum(map(len, queue)) >= (least if i else 1):
                waited = [*queue]
                try:
                    answers, rest = self._advance(i, self._take(queue))
                except AnytimeError:
                    raise
                except Exception as error:  # memory may end anywhere in between
                    raise self._failed(i, np.concatenate([g.place for g in waited])[: self.batch], error) from error
                if rest is not None:
                    waiting[i + 1].append(rest)
                if answers is not None:
                    yield answers

    def _take(self, queue: list[_Group]) -> _Group:
        """The first ``batch`` samples that wait."""
        taken: list[_Group] = []
        room = self.batch
        while queue and room:
            group = queue.pop(0)
            if len(group) > room:
                queue.insert(0, self._only(group, np.arange(room, len(group))))
                group = self._only(group, np.arange(room))
            taken.append(group)
            room -= len(group)
        if len(taken) == 1:
            return taken[0]
        read = None if taken[0].read is None else np.concatenate([g.read for g in taken if g.read is not None], axis=1)
        place, since = (np.concatenate([getattr(g, part) for g in taken]) for part in ("place", "since"))
        return _Group(place, self.join([g.state for g in taken]), since, read)

    def _advance(self, i: int, group: _Group) -> tuple[Answers | None, _Group | None]:
        """Run segment ``i``: the answers of those that leave, and the rest."""
        segment = self.plan[i]
        group.state, logits = self.net.step(segment, group.state)
        if segment.head not in self.used:
            return None, group
        assert logits is not None
        if len(logits) != len(group):
            raise AnytimeError(f"segment {i + 1} of {len(self.plan)}: the engine answered {len(logits)} of {_named(group.place)}")
        _check_read(segment.head, logits, group.place)
        read = group.read = self._unread(logits, len(group)) if group.read is None else group.read
        at = self.used.index(segment.head)
        read[at] = logits
        if segment.head == self.used[-1]:
            return self._answers(i, group, at), None
        stop = self._guarded(i, group.place, lambda: self.policy.stop(read[: at + 1]), self.policy.label)
        leaving = np.count_nonzero(stop)
        if not leaving:
            return None, group
        if leaving == len(stop):
            return self._answers(i, group, at), None
        left = _Group(group.place[stop], None, group.since[stop], read[:, stop])
        return self._answers(i, left, at), self._only(group, np.flatnonzero(~stop))

    def _answers(self, i: int, group: _Group, at: int) -> Answers:
        assert group.read is not None
        exit = self.used[at]
        exits = np.full(len(group), exit)
        # A copy: a view would hold on to what all exits said.
        logits = group.read[at].copy() if self._as_taken else self._answered_with(i, group.place, group.read, exits)
        self._check_answer(exit, logits, group.place)
        return Answers(group.place, exits, logits, 1e3 * (perf_counter() - group.since))

    def _answered_with(self, i: int, place: Sequence[int] | Ints, read: Floats, exits: Ints) -> Floats:
        """What the policy answers, given what was read [U, B, K]: it counts exits as the network does [E, B, K]."""
        every = read
        if len(read) != self.net.n_exits:
            every = np.full((self.net.n_exits, *read.shape[1:]), np.nan, read.dtype)
            every[list(self.used)] = read
        return self._guarded(i, place, lambda: self.policy.answer(every, exits), self.policy.label)  # type: ignore[no-any-return]

    def _only(self, group: _Group, keep: Ints) -> _Group:
        read = None if group.read is None else group.read[:, keep]
        return _Group(group.place[keep], self.rows(group.state, keep), group.since[keep], read)

    def rows(self, state: Any, keep: Ints) -> Any:
        """A copy of a state's samples ``keep``: of each of its tensors."""
        return tuple(self.rows(s, keep) for s in state) if isinstance(state, tuple | list) else state[keep]

    def join(self, states: Sequence[Any]) -> Any:
        """One state out of several, sample after sample."""
        if isinstance(states[0], tuple | list):
            return tuple(self.join(parts) for parts in zip(*states, strict=True))
        if isinstance(states[0], np.ndarray):
            return np.concatenate(states)
        import torch

        return torch.cat(tuple(states))

    def _unread(self, logits: Floats, n: int) -> Floats:
        """Room for what the exits in use say of ``n`` samples. NaN: an answer that needs what was not read must not look like one."""
        return np.full((len(self.used), n, *logits.shape[1:]), np.nan, logits.dtype)

    def _check_answer(self, exit: int, logits: Floats, place: Sequence[int] | Ints) -> None:
        if not _finite(logits):
            raise AnytimeError(
                f"{self.policy.label} answers at exit {exit + 1} with logits of exits that were not read, for {_named(place)}"
            )

    def _guarded(self, i: int, place: Sequence[int] | Ints, work: Callable[[], Any], who: str = "the engine") -> Any:
        try:
            return work()
        except AnytimeError:
            raise
        except Exception as error:
            raise self._failed(i, place, error, who) from error

    def _failed(self, i: int, place: Sequence[int] | Ints, error: Exception, who: str = "the engine") -> AnytimeError:
        """What to say when ``who`` breaks at the start (``i`` -1) or at segment ``i``."""
        what = f"segment {i + 1} of {len(self.plan)}" if i >= 0 else "start"
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            hint = f"{len(place)} samples at once: give a batch under {self.batch}" if self.batch > 1 else "one sample"
            return AnytimeError(f"{what}: no memory for {hint}")
        return AnytimeError(f"{what}: {who} failed on {_named(place)}: {first_line(error)}")


def _floating(x: Any, what: str) -> Floats:
    """As an array; UsageError for pixels and other integers, which would go in as if they were normalised."""
    x = np.asarray(x)
    if x.dtype.kind != "f":
        raise UsageError(f"{what} {x.dtype}: give floating point, normalised as the network was trained")
    return x  # type: ignore[no-any-return]


def _check_read(exit: int, logits: Floats, place: Sequence[int] | Ints) -> None:
    if not _finite(logits):
        bad = np.asarray(place)[~np.isfinite(logits).all(-1)]
        raise AnytimeError(f"exit {exit + 1} answers with logits that are not finite, for {_named(bad)}")


def _finite(x: Floats) -> bool:
    """Are all finite? Cheaper than numpy's ``all``, which a single sample feels."""
    return bool(np.count_nonzero(np.isfinite(x)) == x.size)


def _joined(blocks: Sequence[Answers]) -> Answers:
    if not blocks:
        return Answers(np.empty(0, np.intp), np.empty(0, np.intp), np.empty((0, 0), np.float32), np.empty(0))
    return Answers(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _named(place: Sequence[int] | Ints) -> str:
    said = ", ".join(str(i) for i in place[:5]) + (", ..." if len(place) > 5 else "")
    return f"sample {said}" if len(place) == 1 else f"{len(place)} samples ({said})"
