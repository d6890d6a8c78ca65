"""Leave when consecutive exits agree."""

from __future__ import annotations

from dataclasses import dataclass, replace

from anytime import stops
from anytime.errors import UsageError
from anytime.metrics import Bools, Floats, Predictions
from anytime.policy import Listed, PathCost, Points, listed


@dataclass(frozen=True)
class Patience(Listed):
    """Leave when an exit is the ``patience``-th in a row that says the class of the exit before it.

    0 leaves at the first exit, E - 1 or more never before the last. ``fit`` picks the patience that spends most
    within the budget; of equals the most accurate on val, then the smallest.
    Source: Zhou et al., "BERT Loses Patience" (PABEE), NeurIPS 2020, section 3.2, classification. Deviations: each
    sample leaves by itself (its code waits for the whole batch), and 0 is a patience.
    """

    patience: int | None = None

    def _stop(self, logits: Floats) -> Bools:
        if self.patience is None or self.patience < 0:
            raise UsageError(f"Patience(patience={self.patience}): call fit first, or give a number of exits, 0 or more")
        return stops.by_patience(logits, self.patience)

    def _points(self, val: Predictions, cost: PathCost) -> Points:
        return listed([replace(self, patience=p) for p in range(val.n_exits)], val, cost)
