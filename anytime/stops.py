"""Exit tests as plain functions of arrays: the same code runs offline and on a board.

numpy only, Python 3.6 syntax, no import of ours: this file is copied to boards as it is.
The tests (``at_*``, ``by_*``) take ``logits`` [k+1, B, K], those of the exits that have been read so far, oldest
first, and answer [B]: True where the sample leaves now.
"""

import numpy as np


def max_probability(logits: np.ndarray) -> np.ndarray:
    """Largest softmax probability [..., K] -> [...], in (0, 1]. High is confident."""
    return np.asarray(1.0 / np.exp(_shifted(logits)).sum(-1))


def entropy(logits: np.ndarray) -> np.ndarray:
    """Entropy of the softmax in nats [..., K] -> [...], in [0, log K]. Low is confident."""
    z = _shifted(logits)
    e = np.exp(z)
    total = e.sum(-1)
    return np.asarray(np.log(total) - (e * z).sum(-1) / total)


def at_first(logits: np.ndarray) -> np.ndarray:
    """Everyone leaves at the first exit that is read."""
    return np.ones(logits.shape[1], dtype=bool)


def by_max_probability(logits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Leave when the largest probability reaches the threshold of this exit."""
    return np.asarray(max_probability(logits[-1]) >= thresholds[logits.shape[0] - 1])


def by_entropy(logits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Leave when the entropy in nats lies under the threshold of this exit."""
    return np.asarray(entropy(logits[-1]) < thresholds[logits.shape[0] - 1])


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
    return np.asarray(z - z.max(-1, keepdims=True))
