"""Which networks of an experiment are meant by words of their rows, or by a key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from anytime.backends.onnxruntime import OnnxRuntime
from anytime.config import Cell, Experiment
from anytime.errors import UsageError, near
from anytime.facts import reference_cell
from anytime.find import experiment, names
from anytime.models.static import Static
from anytime.spec import key

ENGINES = ("OnnxRuntime", "OpenVINO", "TorchCompile")  # backends that run what ``of`` makes, and change none of its numbers
LISTED = 12


def find_cell(
    words: Sequence[str], sets: Sequence[str] = (), exp: Experiment | None = None
) -> tuple[tuple[Experiment, ...], Cell]:
    """The one cell that is meant, and the experiments that have it: by the beginning of its key, or by EXP and words of its row.

    ``exp`` may be one that lies in no file: then all are words of its row. A word is a whole label (of data, network, backend,
    column) or a piece of one. UsageError with the near misses.
    """
    rest = words
    if exp is None:
        if not words:
            raise UsageError(
                'no network is named: give EXP and words of its row (CELL="quickstart B-LeNet INT8"), or a cell\'s key'
            )
        first, *rest = words
        if re.fullmatch(r"[0-9a-f]{4,12}", first) and not rest and first not in names():
            if sets:
                raise UsageError("--set makes another experiment: name it, as in export EXP WORDS --set ..., instead of a key")
            return _by_key(first)
        exp = experiment(first, sets)
    cells = list(exp.cells())
    for word in _phrases(rest, cells):
        cells = _narrowed(cells, word, exp)
    # The same numbers under several engines are one network; ONNX Runtime's predictions are what a bundle gives.
    meant = {key(inner(c)): c for c in sorted(cells, key=lambda c: isinstance(c.backend, OnnxRuntime))}
    if len(meant) > 1:
        listed = [f"  {key(c)}  {', '.join(_names(c)[1:])}" for c in list(meant.values())[:LISTED]]
        more = [f"  and {len(meant) - LISTED} more"] if len(meant) > LISTED else []
        said = f"{' '.join(words)!r} means {len(meant)} networks: add a word, or give a key:"
        raise UsageError("\n".join([said, *listed, *more]))
    return (exp,), next(iter(meant.values()))


def only(exp: Experiment, words: Sequence[str]) -> frozenset[Cell]:
    """All cells that ``words`` name, and those that they are compared with; UsageError with the near misses."""
    cells = every = list(exp.cells())
    for word in _phrases(words, every):
        cells = _narrowed(cells, word, exp)
    static = {replace(cell, model=Static(cell.model)) for cell in cells if cell.model.exits_early}
    meant = frozenset(cells) | (static & frozenset(every))
    return meant | {reference_cell(cell, exp.reference_backend) for cell in meant}


def inner(cell: Cell) -> Cell:
    """The cell whose numbers this one's engine runs."""
    backend = cell.backend
    return replace(cell, backend=backend.of) if type(backend).__name__ in ENGINES else cell  # type: ignore[attr-defined]


def _by_key(start: str) -> tuple[tuple[Experiment, ...], Cell]:
    found: dict[str, Cell] = {}
    exps: list[Experiment] = []
    known: set[str] = set()
    for name in names():
        try:
            exp = experiment(name)
        except UsageError:
            continue  # a broken file of somebody's is not what was asked for
        cells = {key(cell): cell for cell in exp.cells()}
        known |= cells.keys()
        if mine := {k: cell for k, cell in cells.items() if k.startswith(start)}:
            exps.append(exp)
            found |= mine
    if len(found) > 1:
        raise UsageError(f"{start!r} begins several keys ({', '.join(found)}): give more digits")
    if not found:
        close = get_close_matches(start, {k[: len(start)] for k in known})
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?" if close else "the tables' CSV files carry them in the column cell"
        )
        more = "of an experiment that lies elsewhere, its path goes before the key"
        raise UsageError(f"no experiment has a network with the key {start!r}; {hint} ({more})")
    return tuple(exps), next(iter(found.values()))


def _phrases(words: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    """Neighbouring words that together are a label are one: SDN ResNet-20 INT8 PTQ is 'SDN ResNet-20', 'INT8 PTQ'."""
    labels = {name for cell in cells for name in _names(cell)}
    found, rest = [], list(words)
    while rest:
        n = next((n for n in range(len(rest), 1, -1) if " ".join(rest[:n]) in labels), 1)
        found.append(" ".join(rest[:n]))
        del rest[:n]
    return found


def _narrowed(cells: list[Cell], word: str, exp: Experiment) -> list[Cell]:
    whole = [c for c in cells if word in _names(c)]
    found = whole or [c for c in cells if any(word.lower() in name.lower() for name in _names(c))]
    if not found:
        raise UsageError(f"{exp.name} has no network that is {word!r}; {near(word, {n for c in cells for n in _names(c)[1:]})}")
    return found


def _names(cell: Cell) -> tuple[str, ...]:
    backend = cell.backend
    seeds = f"train_seed={cell.train_seed}", f"seed={cell.seed}"
    return key(cell), cell.data.label, cell.model.label, backend.label, backend.column, *seeds
