"""What every data set keeps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from anytime.dataset import Data, DatasetSpec, Part, Raw, digest, normalise

FROM_TRAINING = ("train", "calib", "tune", "val", "hold")
PARTS = (*FROM_TRAINING, "test")


def check(spec: DatasetSpec) -> None:
    """Raise AssertionError, with a sentence of its own, for each promise that ``spec`` does not keep."""
    raw = spec.read()
    kept = spec._limited(raw)
    data = spec.load(0)
    _tensors(data)
    _membership(data, kept, "0")
    _classes(data)
    _seeds(spec, data, kept)
    _sources(data, raw)
    _augmentation(data)


def _tensors(data: Data) -> None:
    for name in PARTS:
        part = getattr(data, name)
        assert part.name == name, f"part {name} calls itself {part.name}"
        assert part.x.dtype == torch.float32 and part.x.ndim == 4, (
            f"{name}.x is {part.x.dtype} of {part.x.ndim} axes, not float32 [N, C, H, W]"
        )
        assert tuple(part.x.shape[1:]) == data.input_shape, f"samples of {name} are not shaped like those of train"
        assert part.y.dtype == torch.int64 and part.y.shape == part.x.shape[:1], f"{name}.y is not int64 [N]"
        assert torch.isfinite(part.x).all(), f"{name}.x is not finite"
        assert len(part) and part.y.min() >= 0 and part.y.max() < data.n_classes, f"{name}.y leaves 0..{data.n_classes - 1}"
    assert data.n_classes == len(data.classes) >= 2, "n_classes and classes disagree"
    # A wrong mean or deviation costs accuracy in silence. Loose, as natural images are far from Gaussian.
    x = data.train.x.double()
    assert x.mean().abs() < 1 and 0.3 < x.std() < 3, f"train.x is not normalised: mean {x.mean():.2f}, deviation {x.std():.2f}"


def _names(x: np.ndarray, y: np.ndarray) -> Counter[str]:
    """Names of samples by their content; published sets hold some samples twice, so they are counted."""
    return Counter(digest(a, b) for a, b in zip(x, np.asarray(y, dtype=np.int64)[:, None], strict=True))


def _of(part: Part) -> Counter[str]:
    return _names(part.x.numpy(), part.y.numpy())


def _published(x: np.ndarray, y: np.ndarray, data: Data) -> Counter[str]:
    return _names(normalise(x, data.preprocessing).numpy(), y)


def _membership(data: Data, kept: Raw, seed: str) -> None:
    published = _published(kept.x_train, kept.y_train, data)
    seen: Counter[str] = Counter()
    for name in FROM_TRAINING:
        mine = _of(getattr(data, name))
        twice = (seen + mine) - published
        assert not mine - published, f"seed {seed}: {name} holds samples that are not in the published training set"
        assert not twice, f"seed {seed}: {twice.total()} samples of {name} are in another part too"
        seen += mine
    assert seen == published, f"seed {seed}: {(published - seen).total()} samples of the published training set are in no part"
    assert _of(data.test) == _published(kept.x_test, kept.y_test, data), f"seed {seed}: test is not the published test set"


def _classes(data: Data) -> None:
    every = torch.cat([getattr(data, name).y for name in FROM_TRAINING]).bincount(minlength=data.n_classes)
    for name in FROM_TRAINING:
        part = getattr(data, name)
        if len(part) >= 2 * data.n_classes:
            share = len(part) * every / every.sum()
            got = part.y.bincount(minlength=data.n_classes)
            empty = [c for c in range(data.n_classes) if share[c] >= 3 and not got[c]]
            assert not empty, f"{name} has no sample of class {empty[0]}: it was not drawn class by class"


def _seeds(spec: DatasetSpec, data: Data, kept: Raw) -> None:
    again, other = spec.load(0), spec.load(1)
    for name in PARTS:
        one, two = getattr(data, name), getattr(again, name)
        assert one.digest == two.digest and torch.equal(one.x, two.x) and torch.equal(one.y, two.y), (
            f"{name} differs under the same seed"
        )
    assert _of(other.test) == _of(data.test) and other.test.digest == data.test.digest, "test depends on the seed"
    for name in FROM_TRAINING:
        assert getattr(data, name).digest != getattr(other, name).digest, f"{name} is the same under another seed"
    _membership(other, kept, "1")


def _sources(data: Data, raw: Raw) -> None:
    published = digest(raw.x_train, raw.y_train)
    digests = {getattr(data, name).digest for name in PARTS}
    assert len(digests) == len(PARTS), "two parts have the same digest"
    for name in PARTS:
        part = getattr(data, name)
        assert part.digest in part.sources, f"{name}.sources does not name its own samples"
        assert (published in part.sources) == (name != "test"), (
            f"{name}.sources {'names' if name == 'test' else 'does not name'} the whole published training set"
        )
        assert not part.sources & (digests - {part.digest}), f"{name}.sources names another part"


def _augmentation(data: Data) -> None:
    if data.augment is None:
        return
    x = data.train.x[:32]
    before = x.clone()
    first, again, other = (data.augment(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(x, before), "augmentation writes into the batch that it was given"
    assert first.shape == x.shape, f"augmentation turns {tuple(x.shape)} into {tuple(first.shape)}"
    assert first.dtype == x.dtype and torch.isfinite(first).all(), "augmentation does not give finite float32"
    assert torch.equal(first, again), "augmentation does not follow its generator: it differs under the same seed"
    assert not torch.equal(first, other), "augmentation does not follow its generator: it is the same under another seed"
