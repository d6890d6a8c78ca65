"""One immutable JSON file per fact. Nothing is ever overwritten; a table is a fold over the folder."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anytime.errors import AnytimeError, CorruptFile, WriteError

Kind = Literal["eval", "measure", "decide", "replay", "skip", "fail"]
KINDS: tuple[str, ...] = ("eval", "measure", "decide", "replay", "skip", "fail")
SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One fact.

    ``eval``     what a network predicts and costs: one row of ``exits`` per exit, one of ``layers`` per layer
    ``measure``  what its stages and heads cost on a board: one row of ``exits`` per exit
    ``decide``   a policy fitted on it: one row of ``points``: parameters, what it spends and scores
    ``replay``   that decision executed on a board, end to end: one row of ``points``
    ``skip``, ``fail``  with the sentence in ``reason``

    ``fact`` names what is answered (cell, and policy, budget, arm, board where they apply), so that the same
    question asked again has the same name; ``of`` the kind that a skip or fail stands in for.
    """

    exp: str
    cell: str
    kind: Kind
    fact: str
    spec: dict[str, Any]
    of: str = ""
    board: str = ""
    exits: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    schema: int = SCHEMA


def now() -> str:
    """The time as records have it; later is larger."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def append(record: Record, root: Path, attachments: dict[str, bytes] | None = None) -> Path:
    """Write ``record`` to a new file under ``root/exp``, whole or not at all; any number of writers, no lock.

    ``attachments`` (suffix -> bytes) lie beside it under its stem, written first: a record that is there is complete.
    Raises WriteError when the disk is full or may not be written, AnytimeError when a number is NaN.
    """
    folder = root / record.exp
    created = now()
    stem = f"{created.replace('.', '')}-{record.kind}-{record.fact}-{uuid.uuid4().hex[:6]}"
    try:
        body = json.dumps({**asdict(record), "created": created}, indent=1, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise AnytimeError(
            f"a {record.kind} record of cell {record.cell} holds NaN or infinity: that is a failure, not a number"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in (attachments or {}).items():
            _publish(content, folder / (stem + suffix))
        return _publish(body.encode(), folder / f"{stem}.json")
    except OSError as error:
        raise WriteError(
            f"cannot write a record to {folder}: {error.strerror or error}; free space or change its rights, then run again"
        ) from error


def _publish(content: bytes, final: Path) -> Path:
    fd, name = tempfile.mkstemp(dir=final.parent, prefix=".tmp-")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        try:
            os.link(name, final)  # raises if it exists: append-only by the file system, not by good manners
        except FileExistsError:
            raise
        except OSError:  # FAT and some network disks have no links; no two records share a name, so nothing is overwritten
            os.rename(name, final)
        return final
    finally:
        Path(name).unlink(missing_ok=True)


class Loaded(NamedTuple):
    """Records in the order of their creation, each with its file; and a sentence per file that could not be used."""

    records: list[tuple[Record, Path]]
    troubles: list[str]


def load(root: Path, exp: str | None = None) -> Loaded:
    """Every readable record under ``root`` (of one experiment). A torn or foreign file is a sentence, never an end."""
    folder = root / exp if exp else root
    records, troubles = [], []
    for path in sorted(folder.rglob("*.json")):
        try:
            records.append((read(path), path))
        except AnytimeError as error:
            troubles.append(str(error))
    records.sort(key=lambda item: item[0].created)
    return Loaded(records, troubles)


def experiments(root: Path) -> list[str]:
    """Names of the experiments that have records under ``root``."""
    return sorted(folder.name for folder in root.glob("*") if any(folder.glob("*.json")))


def read(path: Path) -> Record:
    """One record; CorruptFile says what is wrong with the file."""
    try:
        said = json.loads(path.read_text(), parse_constant=_no_number)
    except (OSError, ValueError) as error:
        raise CorruptFile(f"the record {path} cannot be read ({error}): remove it; what it held is run again") from error
    if not isinstance(said, dict) or said.get("kind") not in KINDS:
        raise CorruptFile(f"{path} is no record of ours: move it out of the records folder")
    if isinstance(said.get("schema"), int) and said["schema"] > SCHEMA:
        raise CorruptFile(
            f"the record {path} was written by a newer version (schema {said['schema']}, this one reads {SCHEMA}): update anytime"
        )
    types = {f.name: {"dict": dict, "list": list, "int": int}.get(str(f.type).partition("[")[0], str) for f in fields(Record)}
    odd = {"exp", "cell", "kind", "fact", "spec"} - said.keys() | said.keys() - types.keys()
    odd |= {name for name in said.keys() & types.keys() if not isinstance(said[name], types[name])}
    odd |= {name for name in said.keys() - odd if types[name] is list and not all(isinstance(row, dict) for row in said[name])}
    if odd:
        said_odd = f"does not fit schema {SCHEMA} (fields: {', '.join(sorted(odd))})"
        raise CorruptFile(f"the record {path} {said_odd}: remove it; what it held is run again")
    return Record(**said)


def _no_number(text: str) -> float:
    raise ValueError(f"it holds {text}, which we never write")


def newest(records: Sequence[tuple[Record, Path]]) -> dict[str, tuple[Record, Path]]:
    """fact -> its newest record; a skip gives way to what another machine could do, and a fail to what was finished after it.

    What was decided and timed of a network that was made anew since, and is another now, is not there.
    """
    best: dict[str, tuple[Record, Path]] = {}
    since = made(records)
    for record, path in records:
        old = best.get(record.fact)
        if not is_stale(record, since) and (old is None or record.kind != "skip" or old[0].kind in ("skip", "fail")):
            best[record.fact] = (record, path)
    return best


def made(records: Iterable[tuple[Record, Path]]) -> dict[str, str]:
    """cell -> since when its predictions are what they are now, or cannot be made any more."""
    found: dict[str, tuple[str, Any]] = {}
    for r, _ in sorted(records, key=lambda item: item[0].created):
        if r.of == "eval" and r.kind != "skip":
            scores = [(exit.get("exit"), exit.get("accuracy"), exit.get("macs")) for exit in r.exits]
            if found.get(r.cell, ("", None))[1] != scores:
                found[r.cell] = r.created, scores
    return {cell: created for cell, (created, _) in found.items()}


def is_stale(record: Record, since: Mapping[str, str]) -> bool:
    """Whether it says something of a network that is another now: ``since`` as ``made`` gives it."""
    return record.of != "eval" and record.created < since.get(record.cell, "")
