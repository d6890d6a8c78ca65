"""Leave when the ensemble of the exits read so far is sure enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from anytime import stops
from anytime.errors import UsageError
from anytime.metrics import Bools, Floats, Ints, Predictions, softmax
from anytime.threshold import Searched, lower

LARGEST = 20.0  # no weight or bias is larger: samples that can be told apart perfectly would ask for infinity


@dataclass(frozen=True)
class ZTW(Searched):
    """Leave when the largest probability of the exits' geometric ensemble reaches the threshold; the ensemble answers.

    At exit k the probabilities of exits 0 to k are multiplied, each to the power of a weight of its own, 0 or more, and by a
    factor of the class. ``fit`` finds ``weights`` [E-1][k+1] and ``biases`` [E-1][K] (logs of the factors) by the cross-entropy
    on val, then the thresholds. The last exit answers for itself.
    Source: Wolczyk et al., "Zero Time Waste: Recycling Predictions in Early Exit Neural Networks", NeurIPS 2021, section 3.2.
    Deviations: heads are not cascaded (that is a network's affair); weights are learned on val, as nothing else is left, not
    on the training part; they start from the plain geometric mean and, the problem being convex in the weights themselves,
    end in its optimum within [0, 20] (L-BFGS-B), not where 5 epochs of SGD over their logs from a random start end.
    """

    weights: tuple[tuple[float, ...], ...] = ()
    biases: tuple[tuple[float, ...], ...] = ()

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats]:
        if not self.weights:
            raise UsageError(f"{self.label}: no ensemble is fitted; call fit with val predictions of this very network first")
        return lower(self.weights), np.array(self.biases)

    def _scores(self, logits: Floats) -> Floats:
        ensembles = [stops.ensemble(logits[: k + 1], *self._arrays) for k in range(len(logits))]
        return stops.max_probability(np.stack(ensembles))

    def _stop(self, logits: Floats) -> Bools:
        return stops.by_ensemble(logits, *self._arrays, self.thresholds)

    def answer(self, logits: Floats, exits: Ints) -> Floats:
        """The logits that are answered [N, K]: those of the ensemble at the exit taken; at the last exit its own."""
        answered = super().answer(logits, exits).astype(np.float64)
        for k in range(len(logits) - 1):
            if (here := exits == k).any():
                answered[here] = stops.ensemble(self._tempered(logits[: k + 1, here]), *self._arrays)
        return answered

    def _learned(self, val: Predictions) -> ZTW:
        logits = self.tempered_all(val.logits).astype(np.float64)
        fitted = [_fitted(logits[: k + 1], val.labels) for k in range(val.n_exits - 1)]
        return replace(self, weights=tuple(w for w, _ in fitted), biases=tuple(b for _, b in fitted))


def _fitted(logits: Floats, labels: Ints) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weights [M] and bias [K] of the ensemble of exits [M, N, K] with the least cross-entropy."""
    from scipy.optimize import minimize

    m, n, n_classes = logits.shape
    at = np.arange(n)

    def loss(x: Floats) -> tuple[float, Floats]:
        """Cross-entropy in nats a sample, and its gradient."""
        z = np.tensordot(x[:m], logits, 1) + x[m:]
        p = softmax(z)
        top = z.max(-1)
        value = (np.log(np.exp(z - top[:, None]).sum(-1)) + top - z[at, labels]).mean()
        p[at, labels] -= 1
        return float(value), np.concatenate([np.tensordot(logits, p, 2), p.sum(0)]) / n

    start = np.concatenate([np.full(m, 1 / m), np.zeros(n_classes)])
    bounds = [(0.0, LARGEST)] * m + [(-LARGEST, LARGEST)] * n_classes
    x = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x.tolist()
    return tuple(x[:m]), tuple(x[m:])
