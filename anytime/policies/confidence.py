"""Leave when an exit is sure enough of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anytime import stops
from anytime.metrics import Bools, Floats
from anytime.threshold import Searched


@dataclass(frozen=True)
class MaxProb(Searched):
    """Leave when the largest softmax probability reaches the threshold.

    Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (MSDNet), ICLR 2018,
    budgeted batch classification. Deviation: thresholds are fitted to the budget itself, not to geometric shares of
    the samples (that is GeometricSplit).
    """


@dataclass(frozen=True)
class Entropy(Searched):
    """Leave when the entropy of the softmax, in nats, lies under the threshold.

    Source: Teerapittayanon et al., "BranchyNet", ICPR 2016, section III, algorithm 1. Deviation: thresholds are fitted
    on val to a budget; the paper reads them off a grid.
    """

    high = False

    def _scores(self, logits: Floats) -> Floats:
        return stops.entropy(logits)

    def largest(self, n_classes: int) -> float:
        """That of equal probabilities."""
        return math.log(n_classes)

    def _stop(self, logits: Floats) -> Bools:
        return stops.by_entropy(logits, self.thresholds)


@dataclass(frozen=True)
class Margin(Searched):
    """Leave when the largest softmax probability is ahead of the second by at least the threshold.

    Source: Scheffer et al., "Active Hidden Markov Models for Information Extraction", IDA 2001 (the margin of a prediction);
    as a feature of an exit's gate in Chataoui et al., "Jointly-Learned Exit and Inference for a Dynamic Neural Network"
    (JEI-DNN), ICLR 2024. Deviation: it is the exit test itself, fitted to a budget.
    """

    def _scores(self, logits: Floats) -> Floats:
        return stops.margin(logits)

    def _stop(self, logits: Floats) -> Bools:
        return stops.by_margin(logits, self.thresholds)
