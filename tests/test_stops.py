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
    assert stops.by_max_probability(logits, (9.0, p[1])).tolist() == [a >= p[1] for a in p]
    assert stops.by_entropy(logits, (0.0, h[1])).tolist() == [a < h[1] for a in h]
    assert stops.by_max_probability(logits, (9.0, p[1]))[1] and not stops.by_entropy(logits, (0.0, h[1]))[1]


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


@settings(deadline=None)
@given(logit_arrays.filter(lambda z: z.shape[-1] > 1))
def test_margin_is_the_lead_of_scipys_probabilities(logits: NDArray[np.float32]) -> None:
    p = np.sort(softmax(logits.astype(float), axis=-1), axis=-1)
    np.testing.assert_allclose(stops.margin(logits), p[..., -1] - p[..., -2], atol=1e-12)
    assert (stops.margin(logits) >= 0).all() and (stops.margin(logits) <= 1).all()
    assert (stops.margin(logits[..., :1]) == 1).all()  # of one class


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(2, 7), st.integers(1, 9), st.integers(2, 12))
def test_an_ensemble_is_the_weighted_geometric_mean(seed: int, n_exits: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    logits, weights, biases = rng.normal(size=(n_exits, n, k)), rng.random((n_exits, n_exits)), rng.normal(size=(n_exits, k))
    factors = np.prod(softmax(logits, axis=-1) ** weights[-1, :, None, None], axis=0) * np.exp(biases[-1])
    expected = factors / factors.sum(-1, keepdims=True)
    np.testing.assert_allclose(softmax(stops.ensemble(logits, weights, biases), axis=-1), expected, atol=1e-12)
    unread = np.tril(weights) + np.triu(np.full_like(weights, np.nan), 1)
    for read in range(1, n_exits + 1):  # row k weighs exits 0 to k, and looks at nothing else
        assert np.isfinite(stops.ensemble(logits[:read], unread, biases)).all()


def test_the_most_confident_exit() -> None:
    logits = np.array([[[0, 1.0], [5, 0.0], [1, 1.0]], [[9, 0.0], [0, 5.0], [1, 1.0]], [[0, 0.0], [0, 6.0], [1, 1.0]]])
    assert stops.most_confident(logits).tolist() == [1, 2, 0]


def test_temperatures_divide_exit_by_exit() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    got = stops.tempered(logits, (2.0, 0.5))
    assert got.dtype == np.float64 and (got[0] == logits[0] / 2).all() and (got[1] == logits[1] * 2).all()


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(2, 30), st.integers(2, 40))
def test_one_sample_is_decided_as_in_a_batch_to_the_last_bit(seed: int, exits: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(exits, n, k)).astype(np.float32)
    matrix = rng.normal(size=(exits, max(k, exits + 1)))
    scores = {  # each [N, ...]
        "temperature": lambda z: stops.max_probability(stops.tempered(z, (1.7,) * exits)).T,
        "ensemble": lambda z: stops.ensemble(z, matrix[:, :exits], matrix[:, :k]),
        "schedule": lambda z: stops.scheduled(z, matrix[:, :k], 0.2 * matrix[:, : exits + 1]).T,
        "margin": lambda z: stops.margin(z).T,
        "entropy": lambda z: stops.entropy(z).T,
    }
    for name, score in scores.items():
        whole = score(logits)
        assert (np.concatenate([score(logits[:, i : i + 1]) for i in range(n)]) == whole).all(), f"{name} follows the batch"
        assert (score(np.asfortranarray(logits)) == whole).all(), f"{name} follows the layout in memory"
