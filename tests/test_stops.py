"""The exit tests against scipy, by hand, and as a file that old boards can read."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy

from anytime import stops

logit_arrays = arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=12), elements=st.floats(-200, 200, width=32))


def test_is_python_3_6_and_imports_numpy_alone() -> None:
    source = Path(stops.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    assert imported == ["numpy"]
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


@settings(deadline=None)
@given(logit_arrays)
def test_entropy_is_scipys(logits: NDArray[np.float32]) -> None:
    got = stops.entropy(logits)
    np.testing.assert_allclose(got, entropy(softmax(logits.astype(float), axis=-1), axis=-1), atol=1e-12)
    assert (got >= 0).all() and (got <= np.log(logits.shape[-1]) + 1e-12).all()


@settings(deadline=None)
@given(logit_arrays)
def test_max_probability_is_scipys(logits: NDArray[np.float32]) -> None:
    got = stops.max_probability(logits)
    np.testing.assert_allclose(got, softmax(logits.astype(float), axis=-1).max(-1), rtol=1e-12)
    assert (got > 0).all() and (got <= 1).all()


def test_scores_by_hand() -> None:
    half = np.log([[0.5, 0.25, 0.25]])
    assert stops.max_probability(half) == pytest.approx([0.5])
    assert stops.entropy(half) == pytest.approx([1.5 * np.log(2)])
    assert stops.entropy(np.zeros((1, 8))) == pytest.approx([np.log(8)])
    # So far apart that the softmax is 1 and 0 in floats: certain, and no NaN.
    far = np.array([[0.0, 3e38, -3e38]], np.float32)
    assert stops.entropy(far) == 0 and stops.max_probability(far) == 1


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(2, 40))
def test_a_score_is_the_same_to_the_last_bit_wherever_the_logits_lie(seed: int, n: int, k: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, n, k))
    for score in (stops.entropy, stops.max_probability):
        whole = score(logits)
        assert (score(np.asfortranarray(logits)) == whole).all()
        assert (score(np.repeat(logits, 2, axis=-1)[..., ::2]) == whole).all()
        assert (np.array([[score(row) for row in exit] for exit in logits]) == whole).all()


def test_a_threshold_that_is_met_exactly() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    p, h = stops.max_probability(logits[1]), stops.entropy(logits[1])
    assert stops.by_max_probability(logits, np.array([9.0, p[1]])).tolist() == [a >= p[1] for a in p]
    assert stops.by_entropy(logits, np.array([0.0, h[1]])).tolist() == [a < h[1] for a in h]
    assert stops.by_max_probability(logits, np.array([9.0, p[1]]))[1] and not stops.by_entropy(logits, np.array([0.0, h[1]]))[1]


def test_patience_by_hand() -> None:
    said = np.array([[1, 1, 0, 2], [1, 0, 0, 2], [1, 0, 1, 1]])  # [exit, sample]
    logits = np.eye(3)[said]
    leaves = {p: [stops.by_patience(logits[: k + 1], p).tolist() for k in range(3)] for p in range(4)}
    assert leaves[0] == [[True] * 4] * 3
    assert leaves[1] == [[False] * 4, [True, False, True, True], [True, True, False, False]]
    assert leaves[2] == [[False] * 4, [False] * 4, [True, False, False, False]]
    assert leaves[3] == [[False] * 4] * 3


def test_first() -> None:
    assert stops.at_first(np.zeros((1, 3, 2))).tolist() == [True] * 3
