"""Rounding that backends learn behind calibration, and that is kept as trainings are."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from anytime.model import AnytimeModel
from anytime.quant.graph import Quantized
from anytime.quant.reconstruct import Reconstruction, reconstruct
from anytime.train import Trainer

Rounding = Literal["nearest", "adaround", "brecq", "qdrop"]
NAMES = {"adaround": "AdaRound", "brecq": "BRECQ", "qdrop": "QDrop"}


def learn_rounding(
    net: Quantized, chain: AnytimeModel, x: Tensor, rounding: Rounding, iterations: int, trainer: Trainer, name: str,
    reached: Tensor | None = None,
) -> dict[str, str]:  # fmt: skip
    """Let a calibrated net learn how it rounds, and answer what is to be said of it; "nearest" leaves it as it is.

    ``chain`` is the float one, x the calibration images; ``reached`` as in reconstruct. What took minutes is found again under
    ``name``, which must say all that it depends on.
    """
    if rounding == "nearest":
        return {}
    how = {
        "adaround": Reconstruction(unit="layer", drop=0.0, learn_steps=False, iterations=iterations),
        "brecq": Reconstruction(unit="block", drop=0.0, iterations=iterations),
        "qdrop": Reconstruction(unit="block", drop=0.5, iterations=iterations),
    }[rounding]

    def learn() -> dict[str, str]:
        units = reconstruct(net, chain, x, how, trainer.train_seed, reached, trainer.progress)
        took = sum(unit.seconds for unit in units)
        return {"reconstructed": f"{len(units)} units, {iterations} iterations each, in {took:.0f} s"}

    return trainer.once(net.model, name, learn)
