"""Trained weights that lie in the repository, so that an experiment starts at compression."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from anytime import machine
from anytime.config import Experiment
from anytime.errors import AnytimeError, CorruptFile, UsageError
from anytime.facts import reference_cell
from anytime.files import locked, write_atomically
from anytime.record import load
from anytime.spec import key, plain
from anytime.workshop import Workshop

LARGEST = 4_000_000  # bytes of one file: what lies here is cloned by everybody


def add(exp: Experiment, results: Path) -> list[Path]:
    """Copy the float networks that an experiment has trained from its cache to ``results/zoo``; answer their files.

    ``manifest.json`` holds for each its spec, key, ``trained_on``, sha256, test accuracy per exit, command, wall time,
    ``training_device``, ``training_precision`` and the host that evaluated it. What is not trained and evaluated yet is left
    out, UsageError when that is all; files over 4 MB are refused.
    """
    zoo, shop = results / "zoo", Workshop(results)
    known = {r.fact: r for r, _ in load(results / "records", exp.name).records if r.kind == "eval"}
    found: dict[str, tuple[bytes, bytes, dict[str, Any]]] = {}
    cells = {key(c): c for c in (reference_cell(c, exp.reference_backend) for c in exp.cells())}
    for cell in cells.values():
        record = known.get(key(("eval", cell)))
        name = shop.trainer(cell.data, cell.model, cell.recipe, cell.train_seed, cell.seed).place("base")
        weights = shop.cache / "trained" / name / "weights.safetensors"
        if record is None or not weights.exists():
            continue
        body = weights.read_bytes()
        if len(body) > LARGEST:
            raise AnytimeError(
                f"{cell.model.label} has {len(body) / 1e6:.1f} MB of weights; the zoo takes {LARGEST / 1e6:.0f} MB a file"
            )
        digest = weights.with_suffix(".sha256").read_bytes()
        size = int.from_bytes(body[:8], "little")
        meta = json.loads(body[8 : 8 + size])["__metadata__"]
        said = {
            "model": cell.model.label, "data": cell.data.label, "sha256": digest.decode().strip(), "bytes": len(body),
            "accuracy": [e["accuracy"] for e in record.exits], "trained_on": record.facts["trained_on"],
            "wall_s": float(meta["wall_s"]), "training_device": meta.get("device", "cpu"),
            "training_precision": meta.get("precision", cell.recipe.precision), "device": record.facts["device"],
            "versions": record.facts["versions"], "git": record.facts["git"], "experiment": exp.name,
            "command": shlex.join(["python", "-m", "anytime", *sys.argv[1:]]), "added_by": machine.commit(),
            "spec": plain(("training", cell.data, cell.model, cell.recipe, cell.train_seed, cell.seed)),
        }  # fmt: skip
        found[name] = digest, body, said
    if not found:
        raise UsageError(f"no network of {exp.name} is trained, evaluated and in the cache: make exp EXP={exp.name} first")
    with locked(zoo):
        for name, (digest, body, said) in found.items():
            write_atomically(zoo / f"{name}.sha256", digest)
            write_atomically(zoo / f"{name}.safetensors", body)
            write_atomically(zoo / "manifest.json", json.dumps(read(zoo) | {name: said}, indent=1, sort_keys=True).encode())
    return [zoo / f"{name}.safetensors" for name in found]


def read(zoo: Path) -> dict[str, Any]:
    """The manifest: file stem -> what is said of it; empty where there is none. CorruptFile for a torn one."""
    path = zoo / "manifest.json"
    try:
        held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CorruptFile(f"{path} cannot be read ({error}): restore it, or delete it and add the networks again") from error
    return held
