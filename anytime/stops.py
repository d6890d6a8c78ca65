"""Exit tests as plain functions of arrays: the same code runs offline and on a board.

numpy only, Python 3.6 syntax, no import of ours: this file is copied to boards as it is.
Every function takes ``logits`` [k+1, B, K], those of the exits that have been read so far, oldest first,
and answers [B]: True where the sample leaves now.
"""

import numpy as np


def probabilities(logits):
    """Softmax over the last axis, float64."""
    z = np.asarray(logits, dtype=np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def max_probability(logits):
    """Largest softmax probability [..., K] -> [...], in (0, 1]. High is confident."""
    z = np.asarray(logits, dtype=np.float64)
    return 1.0 / np.exp(z - z.max(-1, keepdims=True)).sum(-1)


def entropy(logits):
    """Entropy of the softmax in nats [..., K] -> [...], in [0, log K]. Low is confident."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(-1, keepdims=True)
    e = np.exp(z)
    total = e.sum(-1)
    return np.log(total) - (e * z).sum(-1) / total


def at_fixed(logits, exit):
    """Everyone leaves at exit index ``exit``."""
    return np.full(logits.shape[1], logits.shape[0] - 1 == exit)


def by_max_probability(logits, thresholds):
    """Leave when the largest probability reaches the threshold of this exit."""
    return max_probability(logits[-1]) >= thresholds[logits.shape[0] - 1]


def by_entropy(logits, thresholds):
    """Leave when the entropy in nats lies under the threshold of this exit."""
    return entropy(logits[-1]) < thresholds[logits.shape[0] - 1]


def by_patience(logits, patience):
    """Leave when the last ``patience`` exits before this one all said the class that this one says."""
    if logits.shape[0] <= patience:
        return np.zeros(logits.shape[1], dtype=bool)
    said = logits[-(patience + 1):].argmax(-1)
    return (said == said[-1]).all(0)
