"""Weights that came with the repository: found by key, refused when tampered with."""

import json
from pathlib import Path

import pytest
import torch

from anytime.backends.float import Float32
from anytime.errors import AnytimeError, CorruptFile, UsageError
from anytime.record import load
from anytime.run import Runner
from anytime.zoo import add, read
from tests.test_run import experiment

ROOT = Path(__file__).parent.parent


def small():
    return experiment(backends=(Float32(),), policies=(), boards=())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A results folder whose networks were added to its zoo, without the cache that they came from."""
    import shutil

    results = tmp_path_factory.mktemp("r")
    Runner(small(), results, log=lambda line: None).run()
    assert len(add(small(), results)) == 2
    shutil.rmtree(results / "cache")
    return results


def run(zoo, results):
    import shutil

    shutil.copytree(zoo / "zoo", results / "zoo")
    steps, said = [], []
    Runner(small(), results, progress=lambda what, *_: steps.append(what), log=said.append).run()
    return steps, said


def test_an_experiment_starts_at_compression(zoo, tmp_path):
    steps, _ = run(zoo, tmp_path)
    assert not [s for s in steps if s.startswith("train")]
    scores = [[[e["n_right"] for e in r.exits] for r, _ in load(p / "records").records] for p in (zoo, tmp_path)]
    assert scores[0] == scores[1]


def test_what_is_too_large_leaves_the_zoo_as_it_was(zoo, tmp_path, monkeypatch):
    Runner(small(), tmp_path, log=lambda line: None).run()
    sizes = sorted(p.stat().st_size for p in (tmp_path / "cache" / "trained").rglob("*.safetensors"))
    monkeypatch.setattr("anytime.zoo.LARGEST", sizes[-1] - 1)
    with pytest.raises(AnytimeError, match="MB of weights; the zoo takes"):
        add(small(), tmp_path)
    assert sizes[0] < sizes[-1] and not (tmp_path / "zoo").exists()


def test_the_manifest_says_where_they_come_from(zoo):
    manifest = read(zoo / "zoo")
    assert len(manifest) == 2
    for name, entry in manifest.items():
        assert (zoo / "zoo" / f"{name}.safetensors").stat().st_size == entry["bytes"]
        assert {"spec", "trained_on", "sha256", "accuracy", "command", "wall_s", "device", "git"} <= entry.keys()
        assert entry["training_device"] == "cpu" or torch.cuda.is_available()
        assert entry["training_precision"] == "fp32"


def test_a_torn_manifest_is_one_sentence(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CorruptFile, match="manifest.json cannot be read .*restore it"):
        read(tmp_path)


def test_a_tampered_file_is_refused_by_its_hash(zoo, tmp_path):
    import shutil

    shutil.copytree(zoo, tmp_path / "z")
    for path in (tmp_path / "z" / "zoo").glob("*.safetensors"):
        body = bytearray(path.read_bytes())
        body[-1] ^= 1
        path.write_bytes(body)
    _, said = run(tmp_path / "z", tmp_path / "r")
    assert len(said) == 2 and all("not as they were written" in line for line in said)


def test_what_was_never_trained_cannot_be_added(tmp_path):
    with pytest.raises(UsageError, match="no network of small is trained.*make exp EXP=small first"):
        add(small(), tmp_path)


def test_what_is_committed_is_whole_and_small():
    folder = ROOT / "results" / "zoo"
    manifest = read(folder)
    files = {p.stem for p in folder.glob("*.safetensors")}
    assert files == set(manifest) and sum(e["bytes"] for e in manifest.values()) < 20e6
    from hashlib import sha256

    for name, entry in manifest.items():
        assert sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest() == entry["sha256"] and entry["bytes"] < 4e6
        assert json.dumps(entry) and all(0 < a <= 1 for a in entry["accuracy"])


def test_committed_weights_score_what_their_manifest_says():
    """B-LeNet's, on the first 2,000 test images of MNIST against its committed predictions."""
    import os

    if not os.environ.get("ANYTIME_DATA"):
        pytest.skip("ANYTIME_DATA names no folder with MNIST's files")
    import numpy as np

    from anytime.datasets.mnist import MNIST
    from anytime.models.branchynet import BLeNet
    from anytime.weights import load_weights

    folder = ROOT / "results" / "zoo"
    name = next(n for n, e in read(folder).items() if e["model"] == "B-LeNet")
    model = BLeNet().build((1, 28, 28), 10)
    load_weights(model, folder / f"{name}.safetensors")
    test = MNIST().load(0).test
    with torch.inference_mode():
        said = model.eval()(test.x[:2000]).argmax(-1).numpy()
    records = load(ROOT / "results" / "records", "qat_branchynet").records
    record, path = next((r, p) for r, p in records if r.kind == "eval" and r.facts["model"] == "B-LeNet" and r.facts["reference"])
    assert (said == np.load(path.with_suffix(".npz"))["argmax"][:, :2000]).mean() > 0.999
