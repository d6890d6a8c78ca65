"""Data sets: how they are split, named, normalised and read, and what is said of bad files."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anytime import dataset
from anytime.dataset import Data, DatasetSpec, Preprocessing, Raw, data_root, digest, draw, normalise, torchvision
from anytime.datasets.cifar import CIFAR10, CIFAR100
from anytime.datasets.digits import Digits, enlarge
from anytime.datasets.emnist import EMNIST
from anytime.datasets.image_folder import ImageFolder
from anytime.datasets.mnist import MNIST, FashionMNIST
from anytime.datasets.npz import Npz
from anytime.datasets.synthetic import Synthetic
from anytime.errors import AnytimeError, DataError, UsageError
from anytime.spec import key, override

DRAWN = ("train", "calib", "tune", "val", "hold")


def one_sentence(error: AnytimeError) -> str:
    text = str(error)
    assert "\n" not in text and text and not text.endswith("."), text
    return text


@pytest.fixture
def real() -> Path:
    if "ANYTIME_DATA" not in os.environ:
        pytest.skip("needs the published files: set ANYTIME_DATA to a folder laid out as torchvision does")
    return data_root()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("ANYTIME_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@dataclass(frozen=True)
class Given(DatasetSpec):
    """The arrays of the test."""

    calib: int = 4
    tune: int = 4
    val: int = 4
    hold: int = 4
    arrays: tuple[Any, ...] = field(default=(), compare=False)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing((0.5,), (0.5,))

    def read(self) -> Raw:
        return Raw(*self.arrays)


def arrays(n: int = 60, n_classes: int = 3) -> list[Any]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    return [
        rng.random((n, 1, 4, 4), dtype=np.float32),
        y,
        rng.random((n // 4, 1, 4, 4), dtype=np.float32),
        y[: n // 4],
        tuple("abc"),
    ]


# --- splits -------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(4, 40), min_size=2, max_size=8),
    parts=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_draw_is_a_partition_in_proportion(sizes: list[int], parts: list[int], seed: int) -> None:
    y = np.repeat(np.arange(len(sizes)), sizes)
    counts = dict(zip(("calib", "tune", "val", "hold"), parts, strict=True))
    if sum(parts) > len(y) // 2:
        with pytest.raises(UsageError, match="leave at least half"):
            draw(y, counts, seed, "X")
        return
    drawn = draw(y, counts, seed, "X")
    assert {p: len(drawn[p]) for p in counts} == counts
    assert sorted(np.concatenate(list(drawn.values()))) == list(range(len(y)))
    assert all((np.diff(i) > 0).all() for i in drawn.values())
    for part, i in drawn.items():
        share = len(i) * np.array(sizes) / len(y)
        # Two roundings of a class's own, and those of the other classes in proportion.
        assert (np.abs(np.bincount(y[i], minlength=len(sizes)) - share) <= 2 + len(sizes) * np.array(sizes) / len(y)).all(), part
    again = draw(y, counts, seed, "X")
    assert all(np.array_equal(drawn[p], again[p]) for p in drawn)


def test_equal_classes_are_drawn_equally() -> None:
    drawn = draw(np.arange(1000) % 10, {"calib": 100, "tune": 50, "val": 200, "hold": 0}, 3, "X")
    assert (np.bincount(np.arange(1000)[drawn["val"]] % 10) == 20).all()
    assert len(drawn["hold"]) == 0


def test_another_seed_draws_other_samples() -> None:
    y = np.arange(1000) % 10
    one, two = (draw(y, {"val": 200}, seed, "X")["val"] for seed in (0, 1))
    assert 20 < len(np.intersect1d(one, two)) < 60  # 40 of 200 are expected by chance


def test_parts_may_take_half_and_no_more() -> None:
    y = np.arange(20) % 2
    assert len(draw(y, {"val": 10}, 0, "X")["train"]) == 10
    with pytest.raises(UsageError, match="X: val=11 take 11 of 20 training samples; leave at least half") as caught:
        draw(y, {"val": 11}, 0, "X")
    one_sentence(caught.value)
    with pytest.raises(UsageError, match="val=-1 is no number of samples"):
        draw(y, {"val": -1}, 0, "X")


def test_limit_keeps_the_classes_in_proportion_even_of_a_sorted_set() -> None:
    x_train, y_train, x_test, y_test, classes = arrays(120)
    i, j = y_train.argsort(kind="stable"), y_test.argsort(kind="stable")
    spec = Given(arrays=(x_train[i], y_train[i], x_test[j], y_test[j], classes), limit=36)
    data = spec.load(0)
    assert sum(len(getattr(data, p)) for p in DRAWN) == 36 and len(data.test) == 30
    every = torch.cat([getattr(data, p).y for p in DRAWN])
    assert every.bincount().tolist() == [12, 12, 12]
    with pytest.raises(UsageError, match="limit=-1 is no number of samples"):
        replace(spec, limit=-1).load(0)


def test_limit_does_not_change_what_the_published_set_is_called() -> None:
    # Else weights trained on the whole set could be judged on a few of its samples.
    whole, few = Synthetic().load(0), Synthetic(limit=600).load(0)
    assert whole.val.origins == few.val.origins
    assert len(few.train) < len(whole.train)


# --- digests ------------------------------------------------------------------------------------------------------


def test_sources_name_the_part_and_the_published_set() -> None:
    spec = Synthetic()
    raw, data = spec.read(), spec.load(0)
    published = digest(raw.x_train, raw.y_train)
    for name in DRAWN:
        part = getattr(data, name)
        assert part.sources == {published, part.digest}
    assert data.test.sources == {data.test.digest}
    assert len({getattr(data, p).digest for p in (*DRAWN, "test")} | {published}) == 7


def test_digest_tells_content_type_and_shape_apart() -> None:
    x = np.arange(12, dtype=np.uint8)
    same = digest(x.reshape(3, 4))
    assert same == digest(np.asfortranarray(x.reshape(3, 4)))
    assert len({same, digest(x.reshape(4, 3)), digest(x), digest(x.astype(np.int16)), digest(x + 1), digest(x, x)}) == 6
    assert len(same) == 16 and int(same, 16) >= 0


def test_digest_of_a_part_follows_images_and_labels() -> None:
    x_train, y_train, *rest = arrays()
    first = Given(arrays=(x_train, y_train, *rest)).load(0)
    other_x = x_train.copy()
    other_x[np.flatnonzero(y_train == 0)] += np.float32(0.001)
    changed = Given(arrays=(other_x, y_train, *rest)).load(0)
    assert all(getattr(first, p).digest != getattr(changed, p).digest for p in DRAWN)
    assert first.test.digest == changed.test.digest


# --- normalisation ------------------------------------------------------------------------------------------------


def test_normalise_by_hand() -> None:
    p = Preprocessing((0.5, 0.25), (0.5, 0.125))
    x = np.array([0, 255, 51, 51], dtype=np.uint8).reshape(1, 2, 1, 2)
    torch.testing.assert_close(normalise(x, p).flatten(), torch.tensor([-1.0, 1.0, -0.4, -0.4]), atol=1e-6, rtol=0)
    for dtype in (np.float16, np.float32, np.float64):
        given = (x / 255).astype(dtype)
        before = given.copy()
        out = normalise(given, p)
        torch.testing.assert_close(out.flatten(), torch.tensor([-1.0, 1.0, -0.4, -0.4]), atol=2e-3, rtol=0)
        assert out.dtype == torch.float32 and np.array_equal(given, before)


def test_black_is_what_a_pixel_of_0_becomes() -> None:
    p = Preprocessing((0.5, 0.25), (0.5, 0.125))
    assert p.black == tuple(normalise(np.zeros((1, 2, 1, 1), dtype=np.uint8), p).flatten().tolist())


# --- content that cannot be used ----------------------------------------------------------------------------------


def broken(**change: Any) -> Given:
    return Given(
        arrays=tuple(
            change.get(name, value) for name, value in zip(("x", "y", "x_test", "y_test", "classes"), arrays(), strict=True)
        )
    )


def with_one(array: Any, at: int, value: float) -> Any:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (broken(x=with_one(arrays()[0], 7, np.nan)), "Given: training sample 7 holds NaN or infinity"),
        (broken(x_test=with_one(arrays()[2], 3, np.inf)), "Given: test sample 3 holds NaN or infinity"),
        (broken(y=with_one(arrays()[1], 5, 3)), r"Given: label 3 of training sample 5 is not in 0\.\.2"),
        (broken(y_test=with_one(arrays()[3], 2, -1)), r"Given: label -1 of test sample 2 is not in 0\.\.2"),
        (broken(y=np.zeros(60, dtype=np.int64)), "Given: its training set has one class"),
        (broken(y=arrays()[1][:50]), "the training set has 60 samples and 50 labels"),
        (broken(x_test=np.zeros((0, 1, 4, 4)), y_test=np.zeros(0, dtype=np.int64)), "the test set has 0 samples"),
    ],
)
def test_bad_content(spec: Given, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        spec.load(0)
    one_sentence(caught.value)


def test_parts_too_large_for_the_set() -> None:
    with pytest.raises(UsageError, match="Digits: calib=128, tune=100, val=600, hold=100 take 928 of 1438") as caught:
        Digits(val=600).load(0)
    one_sentence(caught.value)


# --- torchvision --------------------------------------------------------------------------------------------------


def test_torchvision_imports_beside_any_torch() -> None:
    # In a process of its own, as the first import is the one that may fail.
    code = (
        "from anytime.dataset import torchvision as t; a = t(); b = t(); import torchvision;"
        "from torchvision import transforms; print(a is b is torchvision, a.datasets.CIFAR10.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "CIFAR10"], done.stderr


def test_torchvision_hides_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("something else is broken")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        torchvision()


# --- published files ----------------------------------------------------------------------------------------------


def test_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ANYTIME_DATA", "~/sets")
    assert data_root() == tmp_path / "sets"
    monkeypatch.delenv("ANYTIME_DATA")
    assert data_root() == tmp_path / ".cache" / "anytime" / "data"


READERS: dict[type[DatasetSpec], str] = {
    MNIST: "MNIST/raw/train-images-idx3-ubyte",
    FashionMNIST: "FashionMNIST/raw/train-images-idx3-ubyte",
    CIFAR10: "cifar-10-batches-py/data_batch_1",
    CIFAR100: "cifar-100-python/train",
    EMNIST: "EMNIST/raw/gzip.zip",
}


@pytest.mark.parametrize("cls", READERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("failure", [URLError("no network"), RuntimeError("first line\nlast line"), TimeoutError()], ids=repr)
def test_missing_files_and_no_network(
    cls: type[DatasetSpec], failure: Exception, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts = []

    def fail(*args: object, **more: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise failure

    utils = torchvision().datasets.utils
    for module in (utils, torchvision().datasets.mnist, torchvision().datasets.cifar):
        for name in ("download_url", "download_and_extract_archive"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)
    before = socket.getdefaulttimeout()
    with pytest.raises(DataError) as caught:
        cls().load(0)
    said = one_sentence(caught.value)
    assert said.startswith(f"{cls.__name__}: {empty / READERS[cls]} is missing and could not be downloaded (")
    assert "set ANYTIME_DATA to a folder" in said and "run once with network access" in said
    assert timeouts and all(timeouts), "a dead connection must not hang"
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("cls", READERS, ids=lambda c: c.__name__)
def test_a_data_folder_that_cannot_be_made(cls: type[DatasetSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ANYTIME_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match="is missing and could not be downloaded") as caught:
        cls().load(0)
    one_sentence(caught.value)


class Trap:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("cls", [CIFAR10, CIFAR100], ids=lambda c: c.__name__)
def test_tampered_pickles_are_never_read(cls: type[DatasetSpec], empty: Path) -> None:
    reader = getattr(torchvision().datasets, cls.__name__)
    folder = empty / reader.base_folder
    folder.mkdir(parents=True)
    for file, _ in [*reader.train_list, *reader.test_list, (reader.meta["filename"], "")]:
        (folder / file).write_bytes(pickle.dumps(Trap(empty / "sprung")))
    with pytest.raises(DataError, match="is not the published file") as caught:
        cls().load(0)
    assert str(folder) in one_sentence(caught.value)
    assert not (empty / "sprung").exists()


def linked(real: Path, empty: Path, *files: str) -> None:
    for file in files:
        (empty / file).parent.mkdir(parents=True, exist_ok=True)
        (empty / file).symlink_to(real / file)


IDX = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("harm", ["truncated", "tampered", "missing"])
def test_one_bad_idx_file(real: Path, name: str, harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    bad = f"{name}/raw/t10k-labels-idx1-ubyte"
    linked(real, root, *(f"{name}/raw/{file}" for file in IDX if not bad.endswith(file)))
    body = bytearray((real / bad).read_bytes())
    if harm == "truncated":
        (root / bad).write_bytes(body[:-1])
    elif harm == "tampered":
        body[100] ^= 1
        (root / bad).write_bytes(body)
    monkeypatch.setenv("ANYTIME_DATA", str(root))

    def no_network(*args: object, **more: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision().datasets.mnist, "download_and_extract_archive", no_network)
    with pytest.raises(DataError, match="is missing" if harm == "missing" else "is not the published file") as caught:
        (MNIST if name == "MNIST" else FashionMNIST)().load(0)
    assert str(root / bad) in one_sentence(caught.value)


def test_packed_files_are_unpacked(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = [f"MNIST/raw/{file}.gz" for file in IDX]
    if not all((real / file).is_file() for file in packed):
        pytest.skip(f"{real} holds the idx files, but not their published .gz")
    linked(real, tmp_path, *packed)
    monkeypatch.setenv("ANYTIME_DATA", str(tmp_path))
    raw = MNIST().read()
    assert raw.x_train.shape == (60000, 1, 28, 28)


def test_constants_are_those_inside_the_published_archives(real: Path) -> None:
    from anytime.datasets import mnist

    for name, md5s in (("MNIST", mnist._MNIST), ("FashionMNIST", mnist._FASHION_MNIST)):
        for file, published in getattr(torchvision().datasets, name).resources:
            path = real / name / "raw" / file
            if not path.is_file():
                pytest.skip(f"{path} is not there")
            body = path.read_bytes()
            assert hashlib.md5(body).hexdigest() == published
            assert hashlib.md5(gzip.decompress(body)).hexdigest() == md5s[file.removesuffix(".gz")]


def test_files_of_earlier_torchvisions_are_not_read(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision's MNIST(root) would take these, which nobody has published.
    linked(real, tmp_path, *(f"MNIST/raw/{file}" for file in IDX))
    (tmp_path / "MNIST" / "processed").mkdir()
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(20, 28, 28, dtype=torch.uint8), torch.arange(20) % 10), tmp_path / "MNIST" / "processed" / file)
    monkeypatch.setenv("ANYTIME_DATA", str(tmp_path))
    assert len(MNIST().read().x_train) == 60000


@pytest.mark.parametrize(
    ("spec", "label"),
    [(MNIST(), [5, 0, 4, 1, 9]), (FashionMNIST(), [9, 0, 0, 3, 0]), (CIFAR10(), [6, 9, 9, 4, 1])],
    ids=lambda v: type(v).__name__ if isinstance(v, DatasetSpec) else "",
)
def test_published_sets(spec: DatasetSpec, label: list[int], real: Path) -> None:
    # The first labels are as every tutorial prints them; sizes and class counts as published.
    raw = spec.read()
    assert raw.y_train[:5].tolist() == label
    assert len(raw.x_train) == (50_000 if isinstance(spec, CIFAR10) else 60_000) and len(raw.x_test) == 10_000
    counts = np.bincount(raw.y_train)
    expected = (
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949] if isinstance(spec, MNIST) else [len(raw.y_train) // 10] * 10
    )
    assert counts.tolist() == expected
    pixels = raw.x_train / np.float32(255)
    np.testing.assert_allclose(pixels.mean((0, 2, 3), dtype=np.float64), spec.preprocessing.mean, atol=1e-4)
    np.testing.assert_allclose(pixels.std((0, 2, 3), dtype=np.float64), spec.preprocessing.std, atol=1e-4)


def test_imagenet_statistics_are_a_choice_of_cifar10() -> None:
    spec = override(CIFAR10(), "statistics", "imagenet")
    assert spec.preprocessing == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert key(spec) != key(CIFAR10())
    with pytest.raises(UsageError, match="one of 'cifar10', 'imagenet'"):
        override(CIFAR10(), "statistics", "imagnet")


@pytest.mark.parametrize(
    "cls", [MNIST, FashionMNIST, CIFAR10, CIFAR100, EMNIST, Digits, ImageFolder, Npz], ids=lambda c: c.__name__
)
def test_augment_is_a_switch(cls: Callable[..., DatasetSpec]) -> None:
    assert cls(augment=False).augmentation() is None
    augment = cls(augment=True).augmentation()
    assert augment is not None
    x = torch.randn(8, len(cls().preprocessing.mean), 28, 28)
    assert augment(x, torch.Generator().manual_seed(0)).shape == x.shape


# --- EMNIST, on a zip of our own ----------------------------------------------------------------------------------


def idx(a: np.ndarray) -> bytes:
    return bytes([0, 0, 8, a.ndim]) + np.array(a.shape, dtype=">i4").tobytes() + a.astype(np.uint8).tobytes()


@pytest.fixture
def emnist(empty: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    path = empty / "EMNIST" / "raw" / "gzip.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for split, first, n_classes in (("balanced", 0, 47), ("letters", 1, 26)):
            for part, n in (("train", 940), ("test", 188)):
                made[f"{split}-{part}-images"] = rng.integers(0, 256, (n, 28, 28))
                made[f"{split}-{part}-labels"] = np.arange(n) % n_classes + first
                for what, axes in (("images", 3), ("labels", 1)):
                    packed = gzip.compress(idx(made[f"{split}-{part}-{what}"]))
                    archive.writestr(f"gzip/emnist-{split}-{part}-{what}-idx{axes}-ubyte.gz", packed)
    monkeypatch.setattr(torchvision().datasets.EMNIST, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    return made


def test_emnist_reads_the_zip_and_sets_images_upright(emnist: Mapping[str, np.ndarray]) -> None:
    raw = EMNIST().read()
    assert np.array_equal(raw.x_train[:, 0].swapaxes(1, 2), emnist["balanced-train-images"])
    assert np.array_equal(raw.y_test, emnist["balanced-test-labels"])
    # Cohen et al., table II: digits, capitals, and the eleven small letters that do not look like their capital.
    assert "".join(raw.classes) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
    data = EMNIST(calib=100, tune=100, val=100, hold=100).load(0)
    assert data.input_shape == (1, 28, 28) and len(data.train) == 540


def test_emnist_letters_count_from_0(emnist: Mapping[str, np.ndarray]) -> None:
    raw = EMNIST(split="letters").read()
    assert np.array_equal(raw.y_train, emnist["letters-train-labels"] - 1)
    assert "".join(raw.classes) == "abcdefghijklmnopqrstuvwxyz"


def test_emnist_tampered(emnist: Mapping[str, np.ndarray], empty: Path) -> None:
    path = empty / "EMNIST" / "raw" / "gzip.zip"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="gzip.zip is not the published file"):
        EMNIST().load(0)


# --- digits -------------------------------------------------------------------------------------------------------


def test_digits_are_the_1797_and_test_is_a_fifth_of_each_class() -> None:
    raw = Digits().read()
    assert len(raw.y_train) + len(raw.y_test) == 1797
    # Every class has 174 to 183 digits (scikit-learn's page), and each fifth of them is 35 to 37.
    assert set(np.bincount(raw.y_test)) <= {35, 36, 37}
    assert raw.x_train.shape[1:] == (1, 28, 28) and raw.x_train.min() == 0 and raw.x_train.max() == 1
    pixels = raw.x_train.astype(np.float64)
    np.testing.assert_allclose(
        [pixels.mean(), pixels.std()], [Digits().preprocessing.mean[0], Digits().preprocessing.std[0]], atol=1e-4
    )


def test_digits_are_the_same_on_every_machine() -> None:
    raw = Digits().read()
    assert (digest(raw.x_train, raw.y_train), digest(raw.x_test, raw.y_test)) == ("be79835234992f11", "6000137d657e5a20")


def test_digits_of_another_scikit_learn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    bunch.images[5, 3, 3] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bunch)
    with pytest.raises(DataError, match="gives other digits than it did"):
        Digits().load(0)


@pytest.mark.parametrize("size", [8, 12, 28, 33])
def test_enlarge_is_torchs_bilinear(size: int) -> None:
    x = np.random.default_rng(0).integers(0, 17, (5, 8, 8), dtype=np.uint8)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(x).double()[:, None], size=(size, size), mode="bilinear")
    np.testing.assert_allclose(enlarge(x, size), wanted[:, 0], atol=1e-12)


# --- the user's own -----------------------------------------------------------------------------------------------


def npz(path: Path, **change: Any) -> Npz:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8), "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8), "y_test": np.arange(12) % 4,
    }  # fmt: skip
    given = {name: array for name, array in (given | change).items() if array is not None}
    np.savez(path / "data.npz", **given)
    return Npz(path=str(path / "data.npz"), calib=4, tune=4, val=8, hold=4)


def test_npz_takes_every_layout_and_type(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, t = (rng.integers(0, 256, (n, 3, 8, 9), dtype=np.uint8) for n in (40, 12))
    wanted = npz(tmp_path, x_train=x, x_test=t).load(0)
    assert wanted.input_shape == (3, 8, 9) and wanted.n_classes == 4
    for change in (lambda a: a.transpose(0, 2, 3, 1), lambda a: (a / 255).astype(">f4"), lambda a: a / 255):
        got = npz(tmp_path, x_train=change(x), x_test=change(t)).load(0)
        for name in (*DRAWN, "test"):
            torch.testing.assert_close(getattr(got, name).x, getattr(wanted, name).x, atol=1e-5, rtol=0)
    grey = npz(tmp_path, x_train=x[:, 0], x_test=t[:, 0]).load(0)
    torch.testing.assert_close(grey.val.x[:, 0], wanted.val.x[:, 0])


def test_npz_normalises_each_channel(tmp_path: Path) -> None:
    spec = replace(npz(tmp_path), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    raw, data = spec.read(), spec.load(0)
    wanted = (raw.x_test / 255 - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([0.5, 0.25, 1.0], (3, 1, 1))
    np.testing.assert_allclose(data.test.x, wanted, atol=1e-5)


X = np.zeros((40, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": None}, "lacks an array .*x_test.*; it needs x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((40, 64))}, r"x_train of .* has the shape \(40, 64\); it must be NCHW, NHWC or NHW"),
        ({"x_train": np.zeros((0, 3, 8, 8))}, r"has the shape \(0, 3, 8, 8\)"),
        ({"x_test": np.zeros((12, 3, 8, 9))}, r"images of .* are \(3, 8, 8\) in x_train and \(3, 8, 9\) in x_test"),
        ({"x_train": X.astype(np.int64)}, "is of type int64; it must be uint8, or floats"),
        ({"x_train": X + 2}, r"x_train of .* holds 2; floats must lie in \[0, 1\]"),
        ({"x_train": with_one(X, 3, np.nan)}, "Npz: training sample 3 holds NaN or infinity"),
        ({"x_train": with_one(X, 3, -np.inf)}, "holds -inf; floats must lie in"),
        ({"x_train": np.array([None] * 40)}, "cannot be read .*[Oo]bject arrays"),
        ({"y_train": np.arange(39) % 4}, "the training set has 40 samples and 39 labels"),
        ({"y_train": np.zeros(40, dtype=int), "y_test": np.zeros(12, dtype=int)}, "its training set has one class"),
        ({"y_train": np.arange(40) % 4 + 1}, "holds 4 labels from 1 to 4; count them from 0 without a gap"),
        ({"y_train": np.arange(40) % 4 * 2}, "holds 4 labels from 0 to 6; count them from 0 without a gap"),
        ({"y_train": np.eye(4)[np.arange(40) % 4]}, r"y_train of .* has the shape \(40, 4\) and type float64"),
        ({"y_train": (np.arange(40) % 4).astype(float)}, "it must be one whole number for each image"),
        ({"y_test": np.full(12, 4)}, r"label 4 of test sample 0 is not in 0\.\.3"),
    ],
)
def test_npz_with_bad_arrays(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        npz(tmp_path, **change).load(0)
    one_sentence(caught.value)


@pytest.mark.parametrize("harm", ["missing", "truncated", "tampered", "text", "empty", "npy"])
def test_npz_that_is_no_npz(tmp_path: Path, harm: str) -> None:
    spec, path = npz(tmp_path), tmp_path / "data.npz"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    if harm == "missing":
        path.unlink()
    elif harm == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes({"truncated": body[:3000], "tampered": bytes(body), "text": b"label,pixel\n1,2\n", "empty": b""}[harm])
    with pytest.raises(DataError) as caught:
        spec.load(0)
    said = one_sentence(caught.value)
    assert said.startswith(f"Npz: {path} {'is missing' if harm == 'missing' else 'cannot be read'}")


def test_npz_and_image_folder_are_asked_for_what_they_need(tmp_path: Path) -> None:
    for spec, message in (
        (Npz(), "Npz: path is empty; give the .npz file"),
        (ImageFolder(), "ImageFolder: path is empty; give the folder"),
        (replace(npz(tmp_path), mean=(0.5,) * 2, std=(0.5,) * 2), "mean has 2 values, images of .* have 3 channels"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            spec.load(0)
        one_sentence(caught.value)
    for make in (
        lambda: Npz(std=(0.0,)),
        lambda: Npz(mean=(0.5, 0.5)),
        lambda: ImageFolder(size=0),
        lambda: ImageFolder(mean=(0.5,) * 2, std=(0.5,) * 2),
        lambda: ImageFolder(std=(0.1, 0.1, -1.0)),
        lambda: Synthetic(n_classes=1),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        one_sentence(caught.value)


def folder(root: Path, classes: Mapping[str, tuple[int, int, int]], size: tuple[int, int] = (20, 12), n: int = 6) -> ImageFolder:
    """Images of one colour per class, a little different in each, with a black stripe at both ends of the longer side."""
    for side in ("train", "test"):
        for name, colour in classes.items():
            (root / side / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
                pixels[:, 4:-4] = np.array(colour) + i
                Image.fromarray(pixels).save(root / side / name / f"{i}.png")
    return ImageFolder(path=str(root), size=12, calib=1, tune=1, val=2, hold=1)


COLOURS = {"blue": (0, 0, 200), "red": (200, 0, 0)}


def test_image_folder_resizes_and_crops_about_the_centre(tmp_path: Path) -> None:
    raw = folder(tmp_path, COLOURS).read()
    assert raw.classes == ("blue", "red") and raw.x_train.shape == (12, 3, 12, 12)
    for x, y in zip(raw.x_train, raw.y_train, strict=True):
        assert x[2 if y == 0 else 0].min() >= 200 and x[1].max() <= 5, "the black stripes are cropped away"
    small = replace(folder(tmp_path / "b", COLOURS), size=6).read()
    assert small.x_test.shape == (12, 3, 6, 6)


def test_image_folder_in_grey_and_other_modes(tmp_path: Path) -> None:
    spec = replace(folder(tmp_path, COLOURS), mean=(0.5,), std=(0.25,))
    path = tmp_path / "train" / "red" / "0.png"
    Image.open(path).convert("RGBA").save(path)
    Image.open(tmp_path / "train" / "red" / "1.png").convert("P").save(tmp_path / "train" / "red" / "1.png")
    data = spec.load(0)
    assert data.input_shape == (1, 12, 12)
    assert replace(spec, mean=(0.5,) * 3, std=(0.5,) * 3).load(0).input_shape == (3, 12, 12)


def test_image_folder_with_a_limit_keeps_every_class(tmp_path: Path) -> None:
    data: Data = replace(folder(tmp_path, COLOURS, n=12), limit=12).load(0)
    assert torch.cat([getattr(data, p).y for p in DRAWN]).bincount().tolist() == [6, 6]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: (root / "train" / "red" / "3.png").write_bytes(b"no image"), "train/red/3.png cannot be read as an image"),
        (
            lambda root: (root / "test" / "blue" / "2.png").write_bytes((root / "test" / "blue" / "2.png").read_bytes()[:60]),
            "test/blue/2.png cannot be read as an image",
        ),
        (lambda root: (root / "test" / "red").rename(root / "test" / "green"), r"do not have the same classes \(green, red\)"),
        (lambda root: shutil.rmtree(root / "test"), "test cannot be used"),
        (
            lambda root: Image.fromarray(np.full((20, 16), 30_000, np.uint16)).save(root / "train" / "red" / "3.png"),
            "train/red/3.png holds more than 8 bits .* I;16",
        ),
        (
            lambda root: Image.fromarray(np.full((20, 16), 0.5, np.float32)).save(root / "test" / "red" / "2.png", "TIFF"),
            "test/red/2.png holds more than 8 bits .* F",
        ),
        (lambda root: [p.unlink() for p in (root / "train" / "red").iterdir()], "train cannot be used .*red"),
        (lambda root: [shutil.rmtree(root / side / "red") for side in ("train", "test")], "its training set has one class"),
    ],
)
def test_image_folder_with_bad_content(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    spec = folder(tmp_path, COLOURS)
    harm(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        spec.load(0)
    one_sentence(caught.value)


def test_a_wrong_file_is_not_fetched_over(empty: Path) -> None:
    # It may be the user's own; deleting it is for them.
    empty.mkdir()
    path = empty / "file"
    path.write_bytes(b"mine")
    fetched: list[int] = []
    with pytest.raises(DataError, match="file is not the published file .*: delete it, then set ANYTIME_DATA"):
        dataset.ensure_published("X", {path: hashlib.md5(b"published").hexdigest()}, lambda: fetched.append(1))
    assert not fetched and path.read_bytes() == b"mine"


def test_two_processes_may_unpack_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second one must not judge files that the first is still writing.
    monkeypatch.setenv("ANYTIME_DATA", str(tmp_path))
    body = b"x" * 1000
    code = (
        "import os, sys, time; from pathlib import Path; from anytime.dataset import ensure_published\n"
        "path = Path(os.environ['ANYTIME_DATA']) / 'file'\n"
        "def get():\n"
        "    with path.open('wb') as f:\n"
        "        f.write(b'x' * 500); f.flush(); time.sleep(0.5); f.write(b'x' * 500)\n"
        f"ensure_published('X', {{path: '{hashlib.md5(body).hexdigest()}'}}, get)\n"
        "assert path.read_bytes() == b'x' * 1000; print('fine')"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=120)[0].strip() for p in running] == ["fine"] * 3
    assert dataset.md5(tmp_path / "file") == hashlib.md5(body).hexdigest()


def test_calib_of_a_set_of_ones_own_is_mixed_though_its_file_is_sorted(tmp_path):
    x, y = np.zeros((400, 1, 2, 2), np.uint8), np.arange(2).repeat(200)
    x[:, 0, 0, 0] = np.arange(400) % 256
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    parts = Npz(path=str(tmp_path / "own.npz"), calib=120, tune=0, val=0, hold=0).load(0)
    assert 8 <= int(parts.calib.y[:30].sum()) <= 22  # file order: none
    assert torch.equal(parts.calib.x, Npz(path=str(tmp_path / "own.npz"), calib=120, tune=0, val=0, hold=0).load(0).calib.x)
