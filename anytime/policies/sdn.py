"""Leave when an exit is sure enough of itself; when none was, the surest of all answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anytime import stops
from anytime.metrics import Floats, Ints
from anytime.threshold import Searched


@dataclass(frozen=True)
class SDN(Searched):
    """Leave when the largest softmax probability reaches the threshold; at the end, the most confident exit answers.

    A sample that no exit let go has read every head: the exit that is surest of its class answers for it, not the last.
    Source: Kaya et al., "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking", ICML 2019, section 4.2
    and its code. Deviation: thresholds are fitted on val to a budget; temperatures, where given, are in the comparison.
    """

    def answer(self, logits: Floats, exits: Ints) -> Floats:
        """The logits that are answered [N, K]: of the exit taken, or of the most confident one when that is the last."""
        who = np.array(exits)
        if (held := who == len(logits) - 1).any():
            who[held] = stops.most_confident(self._tempered(logits[:, held]))
        return super().answer(logits, who)
