"""The best of several backends, by images that nobody trained or calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anytime.backend import Backend, Deployable, Target
from anytime.dataset import Part
from anytime.errors import AnytimeError, DataError, Unsupported, UsageError, WriteError
from anytime.metrics import Predictions, correct, nll
from anytime.model import AnytimeModel
from anytime.train import Trainer


@dataclass(frozen=True)
class Tuned(Backend):
    """Compress with every backend of ``of`` and keep the one that scores best on the tune part.

    The score is the accuracy, meant over the exits; of equals the lower mean negative log-likelihood, then the first
    named. A candidate that cannot compress this network is a failed trial with its sentence; when all are,
    Unsupported, or AnytimeError if any of them broke rather than refused.
    Source: this project.
    """

    of: tuple[Backend, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.of:
            raise UsageError("Tuned: of is empty; name the candidates")

    @property
    def label(self) -> str:
        return f"Tuned({', '.join(backend.label for backend in self.of)})"

    @property
    def column(self) -> str:
        return " / ".join(dict.fromkeys(backend.column for backend in self.of)) + " tuned"

    def why_not(self) -> str | None:
        return next((reason for backend in self.of if (reason := backend.why_not())), None)

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        if trainer.tune is None or not len(trainer.tune):
            raise UsageError(f"{self.label}: the trainer has no tune part to choose by; give it one")
        best: tuple[tuple[float, float], Deployable, str] | None = None
        trials: dict[str, str] = {}
        failed: list[AnytimeError] = []
        for i, backend in enumerate(self.of, 1):
            trial = f"trial {i}"
            try:
                net = backend.compress(model, calib, trainer, target)
                accuracy, loss = _score(net, trainer.tune)
            except (WriteError, DataError, UsageError):
                raise  # not the candidate's fault
            except AnytimeError as error:
                failed.append(error)
                trials[trial] = f"{backend.label}: failed: {error}"
                continue
            trials[trial] = f"{backend.label}: {100 * accuracy:.2f} %, NLL {loss:.4f}"
            if best is None or (accuracy, -loss) > best[0]:
                best = (accuracy, -loss), net, f"{trial}: {backend.label}"
        if best is None:
            broken = not all(isinstance(error, Unsupported) for error in failed)
            raise (AnytimeError if broken else Unsupported)(
                f"every candidate of {type(self).__name__} failed: {'; '.join(trials.values())}"
            )
        _, net, won = best
        net.facts = {**net.facts, "trials": str(len(self.of)), "won": won, **trials}
        return net


def _score(net: Deployable, tune: Part) -> tuple[float, float]:
    """Accuracy and negative log-likelihood, each meant over the exits."""
    said = Predictions(net.predict(tune.x.numpy()), tune.y.numpy(), tune.name)
    return float(correct(said).mean()), float(np.mean([nll(logits, said.labels) for logits in said.logits]))
