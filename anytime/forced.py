"""FORCE=1: which cells are being made again, written down until each of them is, so that an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from anytime.files import write_atomically
from anytime.record import Record


class Forced:
    """Since when which cells (by key) of ``exp`` are being made again; kept in a file, which is gone when none is left."""

    def __init__(self, results: Path, exp: str) -> None:
        self.path = results / "cache" / "forced" / f"{exp}.json"

    def since(self) -> dict[str, str]:
        """Cell -> time of asking. A file that cannot be read is none: it is a note, and no record depends on it."""
        try:
            held = json.loads(self.path.read_text())
            return {str(cell): str(since) for cell, since in held.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def write(self, since: Mapping[str, str]) -> None:
        """Keep just these. WriteError where that cannot be."""
        if since:
            write_atomically(self.path, json.dumps(dict(sorted(since.items()))).encode())
        else:
            self.path.unlink(missing_ok=True)

    def without_old(self, records: Iterable[tuple[Record, Path]]) -> list[tuple[Record, Path]]:
        """Records that are not to be made again."""
        since = self.since()
        return [(r, path) for r, path in records if r.created >= since.get(r.cell, "")]
