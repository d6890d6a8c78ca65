"""A network's weights in a file, checked when they are read."""

from __future__ import annotations

import json
import textwrap
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from anytime.errors import CorruptFile, first_line
from anytime.files import write_atomically
from anytime.model import AnytimeModel


def save_weights(model: AnytimeModel, path: Path, facts: dict[str, str] | None = None) -> None:
    """Write weights, buffers, ``trained_on`` and ``facts`` to ``path``, with their sha256 beside it, atomically.

    A tensor that has several names in the network is written once, under the first.
    """
    first = _first_names(model)
    tensors = {n: t.detach().contiguous().clone() for n, t in model.state_dict().items() if first[n] == n}
    meta = {"trained_on": json.dumps(sorted(model.trained_on)), **(facts or {})}
    body = safetensors.torch.save(tensors, meta)
    digest = sha256(body).hexdigest()
    write_atomically(path.with_suffix(".sha256"), f"{digest}\n".encode())
    write_atomically(path, body)


def load_weights(model: AnytimeModel, path: Path) -> dict[str, str]:
    """Load what ``save_weights`` wrote, strictly, and return its facts. CorruptFile when a byte differs.

    In a zoo the manifest must name them too: whoever changes a file can write a new digest beside it.
    """
    fix = "delete it and run again"
    try:
        body, wanted = path.read_bytes(), path.with_suffix(".sha256").read_text().strip()
    except OSError as error:
        raise CorruptFile(f"the weights {path} cannot be read ({first_line(error)}): {fix}") from error
    digest = sha256(body).hexdigest()
    if digest != wanted:
        raise CorruptFile(f"the weights {path} are not as they were written (sha256 differs): {fix}")
    in_zoo = path.with_name("manifest.json").exists()
    if in_zoo and manifest(path.parent).get(path.stem, {}).get("sha256") != digest:
        raise CorruptFile(f"the weights {path} are not those that the manifest.json beside them names (by sha256): {fix}")
    meta = metadata(body)
    given = safetensors.torch.load(body)
    shared = {n: given[first] for n, first in _first_names(model).items() if first in given}
    try:
        model.load_state_dict(shared | given)
    except RuntimeError as error:
        which = textwrap.shorten(str(error).partition("\n")[2], 200, placeholder=" ...")  # torch's first line names no key
        raise CorruptFile(f"the weights {path} do not fit the network ({which}): {fix}") from error
    model.trained_on = frozenset(json.loads(meta.pop("trained_on", "[]")))
    return meta


def metadata(body: bytes) -> dict[str, str]:
    """What a file of weights says beside them."""
    size = int.from_bytes(body[:8], "little")
    return dict(json.loads(body[8 : 8 + size]).get("__metadata__", {}))


def manifest(zoo: Path) -> dict[str, Any]:
    """What a zoo says of its networks: file stem -> that; empty where it has no manifest. CorruptFile for a torn one."""
    path = zoo / "manifest.json"
    try:
        held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CorruptFile(
            f"{path} cannot be read ({first_line(error)}): restore it, or delete it and add the networks again"
        ) from error
    return held


def _first_names(model: nn.Module) -> dict[str, str]:
    """Name of every tensor of the state -> the first of the names that this very tensor has (IResNeXt's slices have several)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
