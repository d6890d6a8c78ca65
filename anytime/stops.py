"""Exit tests as plain functions of arrays: the same code runs offline and on a board.

numpy only, Python 3.6 syntax, no import of ours: this file is copied to boards as it is.
The tests (``at_*``, ``by_*``) take ``logits`` [k+1, B, K], those of the exits that have been read so far, oldest
first, and answer [B]: True where the sample leaves now.
"""

import numpy as np


def max_probability(logits: np.ndarray) -> np.ndarray:
    """Largest softmax probability [..., K] -> [...], in (0, 1]. High is confident."""
    return np.asarray(1.0 / np.add.reduce(np.exp(_shifted(logits)), -1))


def tempered(logits: np.ndarray, temperatures: "tuple[float, ...]") -> np.ndarray:
    """Logits [k+1, B, K] divided by the temperature of their exit [k+1]: what it says stays, how surely does not."""
    return np.asarray(logits / np.array(temperatures, dtype=np.float64).reshape(-1, 1, 1))


def entropy(logits: np.ndarray) -> np.ndarray:
    """Entropy of the softmax in nats [..., K] -> [...], in [0, log K]. Low is confident."""
    z = _shifted(logits)
    e = np.exp(z)
    total = np.add.reduce(e, -1)
    return np.asarray(np.log(total) - np.add.reduce(e * z, -1) / total)


def margin(logits: np.ndarray) -> np.ndarray:
    """Lead of the largest softmax probability over the second, of one class all, [..., K] -> [...], in [0, 1]. High is confident."""
    if logits.shape[-1] == 1:
        return max_probability(logits)
    e = np.exp(_shifted(logits))
    total = np.add.reduce(e, -1)
    e.partition(-2, -1)
    return np.asarray((1.0 - e[..., -2]) / total)


def most_confident(logits: np.ndarray) -> np.ndarray:
    """Which of the exits [E, B, K] gives its class the largest probability [B]; of equals the first."""
    return np.asarray(max_probability(logits).argmax(0))


def ensemble(logits: np.ndarray, weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Weighted geometric mean of what the exits that were read [k+1, B, K] say, as logits [B, K].

    ``weights`` [E-1, E-1], row k for exit k, and ``biases`` [E-1, K]. The log of a softmax is its logits less one number a
    sample, which the next softmax takes no notice of.
    """
    n = logits.shape[0]
    z = np.ascontiguousarray(logits, dtype=np.float64)
    return np.asarray(np.add.reduce(weights[n - 1, :n].reshape(-1, 1, 1) * z, 0) + biases[n - 1])


def scheduled(logits: np.ndarray, classes: np.ndarray, features: np.ndarray) -> np.ndarray:
    """EENet's score of each exit that was read [k+1, B, K] -> [k+1, B], in [0, 1]. High is confident.

    ``classes`` [E-1, K], row k for exit k, weigh its probabilities; ``features`` [E-1, E] the largest of them, 1 less their
    entropy as a share of the largest possible, and the sums of the exits before, clamped to [0, 1]. The score is the sum s
    itself, brought into [0, 1] as (1 + s / (1 + |s|)) / 2, which keeps every rank: clamped ones would tie.
    """
    n = logits.shape[0]
    z = _shifted(logits)
    e = np.exp(z)
    total = np.add.reduce(e, -1)
    # As in entropy(): 1 less its share.
    sure = 1.0 - (np.log(total) - np.add.reduce(e * z, -1) / total) / np.log(logits.shape[-1])
    sums = np.add.reduce(e * classes[:n, None], -1) / total + features[:n, :1] / total + features[:n, 1:2] * sure
    for k in range(1, n):
        sums[k] += np.add.reduce(features[k, 2 : k + 2, None] * np.minimum(np.maximum(sums[:k], 0.0), 1.0), 0)
    return np.asarray((1.0 + sums / (1.0 + np.abs(sums))) / 2.0)


def at_first(logits: np.ndarray) -> np.ndarray:
    """Everyone leaves at the first exit that is read."""
    return np.ones(logits.shape[1], dtype=bool)


def by_max_probability(logits: np.ndarray, thresholds: "tuple[float, ...]") -> np.ndarray:
    """Leave when the largest probability reaches the threshold of this exit."""
    return np.asarray(max_probability(logits[-1]) >= thresholds[logits.shape[0] - 1])


def by_entropy(logits: np.ndarray, thresholds: "tuple[float, ...]") -> np.ndarray:
    """Leave when the entropy in nats lies under the threshold of this exit."""
    return np.asarray(entropy(logits[-1]) < thresholds[logits.shape[0] - 1])


def by_margin(logits: np.ndarray, thresholds: "tuple[float, ...]") -> np.ndarray:
    """Leave when the lead of the largest probability reaches the threshold of this exit."""
    return np.asarray(margin(logits[-1]) >= thresholds[logits.shape[0] - 1])


def by_ensemble(logits: np.ndarray, weights: np.ndarray, biases: np.ndarray, thresholds: "tuple[float, ...]") -> np.ndarray:
    """Leave when the largest probability of the ensemble of the exits read so far reaches the threshold of this exit."""
    return np.asarray(max_probability(ensemble(logits, weights, biases)) >= thresholds[logits.shape[0] - 1])


def by_schedule(logits: np.ndarray, classes: np.ndarray, features: np.ndarray, thresholds: "tuple[float, ...]") -> np.ndarray:
    """Leave when EENet's score reaches the threshold of this exit."""
    return np.asarray(scheduled(logits, classes, features)[-1] >= thresholds[logits.shape[0] - 1])


def by_patience(logits: np.ndarray, patience: int) -> np.ndarray:
    """Leave when the last ``patience`` exits before this one all said the class that this one says."""
    if logits.shape[0] <= patience:
        return np.zeros(logits.shape[1], dtype=bool)
    said = logits[logits.shape[0] - patience - 1 :].argmax(-1)
    return np.asarray((said == said[-1]).all(0))


def _shifted(logits: np.ndarray) -> np.ndarray:
    # Contiguous, because the order of summation, and with it the last bit, follows the layout in memory:
    # the same logits must give the same decision wherever they lie.
    z = np.ascontiguousarray(logits, dtype=np.float64)
    return np.asarray(z - np.maximum.reduce(z, -1, keepdims=True))
