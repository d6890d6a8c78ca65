"""Who answers right, sample by sample, and differences between two networks that are paired by it."""

from __future__ import annotations

import base64
import statistics
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from anytime.gather import LEFT_OUT, Asked, Network, Row
from anytime.metrics import Bools, Ints, paired_loss


class Answered:
    """Reads predictions that lie beside eval records, once; what cannot be read becomes a sentence in ``troubles``."""

    def __init__(self, troubles: list[str]) -> None:
        self.troubles = troubles
        self._files: dict[Path, Bools | None] = {}
        self._labels: dict[Path, Ints] = {}

    def loss(self, reference: Network, against: Asked, network: Network, asked: Asked, name: str) -> Row:
        """Loss and its limits, seed by seed, then averaged."""
        losses = []
        for seed in sorted(network.files):
            theirs, ours = self.right(reference, against, seed), self.right(network, asked, seed)
            if theirs is None or ours is None or len(theirs) != len(ours):
                continue
            if not np.array_equal(self._labels[reference.files[seed]], self._labels[network.files[seed]]):
                between = f"the loss between cells {reference.cells[seed]} and {network.cells[seed]}"
                self.troubles.append(f"{between} is{LEFT_OUT}they were asked of different test labels")
                continue
            losses.append(paired_loss(theirs, ours))
        means = map(statistics.fmean, zip(*losses, strict=True))
        return dict(zip((name, *(f"{name}_{limit}" for limit in ("lo", "hi", "upper"))), means, strict=True)) if losses else {}

    def gain(self, reference: Network, against: Asked, network: Network, asked: Asked, name: str) -> Row:
        """The other way round: what ``network`` has more than ``reference``, and the limits."""
        loss = self.loss(reference, against, network, asked, "loss")
        return {name: -loss["loss"], f"{name}_lo": -loss["loss_hi"], f"{name}_hi": -loss["loss_lo"]} if loss else {}

    def right(self, network: Network, asked: Asked, seed: int) -> Bools | None:
        """Whether it answers right, sample by sample [N]; None where that cannot be known."""
        point = network.scores.get(asked, {}).get(seed)
        right = self._read(network.files[seed]) if seed in network.files else None
        if point is None or right is None:
            return None
        try:
            if asked.exit is not None:
                answered = np.asarray(right[asked.exit])
                if answered.sum() != point.get("n_right", answered.sum()):
                    raise ValueError("its predictions and its record differ")
                return answered
            if "right" in point:  # it answers more than the class of the exit taken
                return np.unpackbits(unpacked(point["right"]), count=right.shape[1]).astype(bool)
            exits = unpacked(point.get("taken", ""))
            answered = np.asarray(right[exits, np.arange(right.shape[1])])
        except (ValueError, IndexError, zlib.error) as error:
            self.troubles.append(
                f"{asked.policy} of cell {network.cells[seed]}: its answers cannot be read ({error}), so its loss is left out"
            )
            return None
        # Without "right" a policy that answers more than the class of the exit taken cannot be known sample by sample.
        return answered if answered.sum() == point.get("n_right") else None

    def _read(self, path: Path) -> Bools | None:
        """[E, N], from what lies beside an eval record."""
        if path not in self._files:
            try:
                with np.load(path) as file:
                    self._labels[path] = file["labels"]
                    self._files[path] = file["argmax"] == self._labels[path]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                self._files[path] = None
                self.troubles.append(f"the predictions {path} cannot be read ({error}): paired losses of that cell are left out")
        return self._files[path]


def unpacked(text: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Small integers as decide records hold them; ValueError or zlib.error where they are torn."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
