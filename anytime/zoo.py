"""Trained weights that lie in the repository, so that an experiment starts at compression."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anytime import machine
from anytime.config import Cell, Experiment
from anytime.errors import AnytimeError, UsageError
from anytime.facts import reference_cell
from anytime.files import locked, write_atomically
from anytime.record import load
from anytime.spec import key, plain
from anytime.weights import manifest as read
from anytime.weights import metadata
from anytime.workshop import Workshop

LARGEST, TOTAL = 4_000_000, 20_000_000  # bytes of one file, of all: what lies here is cloned by everybody


def add(exp: Experiment, results: Path, only: Sequence[Cell] = (), command: str = "") -> list[Path]:
    """Copy the float networks that an experiment has trained from its cache to ``results/zoo``; answer their files.

    ``only`` are those that are meant, by default all. ``command`` trains them, by default ``make exp`` of the experiment.
    ``manifest.json`` holds for each its spec, key, ``trained_on``, sha256, test accuracy per exit, command, wall time,
    ``training_device``, ``training_precision`` and the host that evaluated it. ``wall_s`` is the network's own training;
    ``trunk_wall_s`` that of the trunk it began from, 0 from scratch, "not recorded" where its weights do not say. What is not
    trained and evaluated yet is left out, UsageError when that is all; files over 4 MB are refused, and what would bring the zoo
    over 20 MB.
    """
    zoo, shop = results / "zoo", Workshop(results)
    known = {r.fact: r for r, _ in load(results / "records", exp.name).records if r.kind == "eval"}
    found: dict[str, tuple[bytes, bytes, dict[str, Any]]] = {}
    cells = {key(c): c for c in (reference_cell(c, exp.reference_backend) for c in only or exp.cells())}
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
        meta = metadata(body)
        # Weights that do not say where and in what they were trained are from when it was on a CPU and as the recipe says.
        said = {
            "model": cell.model.label, "data": cell.data.label, "sha256": digest.decode().strip(), "bytes": len(body),
            "accuracy": [e["accuracy"] for e in record.exits], "trained_on": record.facts["trained_on"],
            "wall_s": float(meta["wall_s"]), "trunk_wall_s": _trunk_wall_s(cell, meta),
            "training_device": meta.get("device", "cpu"), "training_precision": meta.get("precision", cell.recipe.precision),
            "device": record.facts["device"], "versions": record.facts["versions"], "git": record.facts["git"],
            "experiment": exp.name, "command": command or f"make exp EXP={exp.name}", "added_by": machine.commit(),
            "spec": plain(("training", cell.data, cell.model, cell.recipe, cell.train_seed, cell.seed)),
        }  # fmt: skip
        found[name] = digest, body, said
    if not found:
        meant = f"no network of {exp.name}" + " that is meant" * bool(only)
        raise UsageError(f"{meant} is trained, evaluated and in the cache: make exp EXP={exp.name} first")
    with locked(zoo):
        together = read(zoo) | {name: said for name, (_, _, said) in found.items()}
        if (total := sum(said["bytes"] for said in together.values())) > TOTAL:
            raise AnytimeError(
                f"{zoo} would hold {total / 1e6:.1f} MB of weights with {', '.join(said['model'] for _, _, said in found.values())}; "
                f"it takes {TOTAL / 1e6:.0f} MB in all: name fewer networks (--only), or take some out of it and of its manifest.json"
            )
        # First: weights that lie there and are not listed are refused where they are loaded.
        write_atomically(zoo / "manifest.json", json.dumps(together, indent=1, sort_keys=True).encode())
        for name, (digest, body, _) in found.items():
            write_atomically(zoo / f"{name}.sha256", digest)
            write_atomically(zoo / f"{name}.safetensors", body)
    return [zoo / f"{name}.safetensors" for name in found]


def _trunk_wall_s(cell: Cell, meta: dict[str, str]) -> float | str:
    if cell.recipe.start == "scratch":
        return 0.0
    return float(meta["trunk_wall_s"]) if "trunk_wall_s" in meta else "not recorded"
