"""Weights that came with the repository: found by key, refused when tampered with."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from anytime.__main__ import main
from anytime.backends.float import Float32
from anytime.errors import AnytimeError, CorruptFile, UsageError
from anytime.find import experiment as found
from anytime.models.static import Static
from anytime.record import load
from anytime.run import Runner
from anytime.spec import key
from anytime.workshop import Workshop
from anytime.zoo import LARGEST, TOTAL, add, read
from tests.test_run import experiment
from tests.worlds import Tiny

ROOT = Path(__file__).parent.parent


def small():
    return experiment(backends=(Float32(),), policies=(), boards=())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A results folder whose networks are trained and evaluated, and nowhere but in its cache."""
    results = tmp_path_factory.mktemp("r")
    Runner(small(), results, log=lambda line: None).run()
    return results


@pytest.fixture(scope="module")
def zoo(ran, tmp_path_factory):
    """The same; the networks were added to its zoo, and the cache that they came from is gone."""
    results = shutil.copytree(ran, tmp_path_factory.mktemp("z") / "r")
    assert len(add(small(), results)) == 2
    shutil.rmtree(results / "cache")
    return results


def run(zoo, results):
    shutil.copytree(zoo / "zoo", results / "zoo")
    steps, said = [], []
    Runner(small(), results, progress=lambda what, *_: steps.append(what), log=said.append).run()
    return steps, said


def test_an_experiment_starts_at_compression(zoo, tmp_path):
    steps, _ = run(zoo, tmp_path)
    assert not [s for s in steps if s.startswith("train")]
    scores = [[[e["n_right"] for e in r.exits] for r, _ in load(p / "records").records] for p in (zoo, tmp_path)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "limit, said",
    [("LARGEST", "MB of weights; the zoo takes"), ("TOTAL", "would hold .* with Tiny static, Tiny; it takes .* name fewer")],
)
def test_what_is_too_large_leaves_the_zoo_as_it_was(ran, tmp_path, monkeypatch, limit, said):
    results = shutil.copytree(ran, tmp_path / "r")
    sizes = sorted(p.stat().st_size for p in (results / "cache" / "trained").rglob("*.safetensors"))
    monkeypatch.setattr(f"anytime.zoo.{limit}", sizes[-1] - 1 if limit == "LARGEST" else sum(sizes) - 1)
    with pytest.raises(AnytimeError, match=said):
        add(small(), results)
    assert sizes[0] < sizes[-1] and not list((results / "zoo").glob("[!.]*"))


def test_what_lies_there_counts_towards_the_total(ran, tmp_path, monkeypatch):
    results = shutil.copytree(ran, tmp_path / "r")
    first, second = small().cells()
    add(small(), results, [first])
    before = {p.name: p.read_bytes() for p in (results / "zoo").iterdir()}
    (entry,) = read(results / "zoo").values()
    monkeypatch.setattr("anytime.zoo.TOTAL", entry["bytes"])
    with pytest.raises(AnytimeError, match="with Tiny; it takes"):
        add(small(), results, [second])
    assert before == {p.name: p.read_bytes() for p in (results / "zoo").iterdir()}
    assert len(add(small(), results, [first])) == 1  # what it holds may be added again


def test_the_command_takes_the_networks_that_are_named(ran, tmp_path, capsys):
    (tmp_path / "small.py").write_text("from tests.test_zoo import small\n\nEXPERIMENT = small()\n")
    twin, tiny = map(key, small().cells())

    def added(i, *words):
        results = shutil.copytree(ran, tmp_path / f"r{i}")
        code = main(["zoo", str(tmp_path / "small.py"), "--results", str(results), *words])
        return code, sorted(e["model"] for e in read(results / "zoo").values()), capsys.readouterr().err, results

    assert added(0)[:2] == (0, ["Tiny", "Tiny static"])
    code, models, _, results = added(1, "--only", "Tiny")
    assert (code, models) == (0, ["Tiny"])  # not its twin
    (entry,) = read(results / "zoo").values()
    assert entry["command"] == f"make exp EXP={tmp_path / 'small.py'}"
    assert added(2, "--only", twin)[1] == ["Tiny static"]
    assert added(3, "--only", "Tiny", "static", "--only", tiny)[1] == ["Tiny", "Tiny static"]
    code, models, said, _ = added(4, "--only", "Tinny")
    assert (code, models) == (2, []) and "small has no network that is 'Tinny'; did you mean 'Tiny'" in said
    code, models, said, _ = added(5, "--only", "Tin")
    assert (code, models) == (2, []) and "'Tin' means 2 networks: add a word, or give a key" in said and tiny in said


def test_make_names_networks_too():
    import subprocess

    said = subprocess.run(["make", "-n", "zoo", "ONLY=B-LeNet static"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.rstrip().endswith("--only 'B-LeNet static'")


def test_the_manifest_says_where_they_come_from(zoo):
    manifest = read(zoo / "zoo")
    assert len(manifest) == 2
    for name, entry in manifest.items():
        assert (zoo / "zoo" / f"{name}.safetensors").stat().st_size == entry["bytes"]
        assert {"spec", "trained_on", "sha256", "accuracy", "wall_s", "device", "git"} <= entry.keys()
        assert entry["training_device"] == "cpu" or torch.cuda.is_available()
        assert entry["training_precision"] == "fp32" and entry["trunk_wall_s"] == 0
        assert entry["command"] == "make exp EXP=small"


def test_what_the_trunk_took_is_said_beside_the_networks_own_time(tmp_path):
    exp = small()
    exp = replace(exp, recipe=replace(exp.recipe, start="static", trunk_epochs=1))
    Runner(exp, tmp_path, log=lambda line: None).run()
    add(exp, tmp_path)
    data = exp.suites[0].data
    trunk = Workshop(tmp_path).trainer(data, Static(Tiny()), exp.recipe.from_scratch(), 0, 0)
    assert not read(tmp_path / "zoo").get(trunk.place("base")) and "trunk_wall_s" not in trunk.said()
    assert [e["trunk_wall_s"] for e in read(tmp_path / "zoo").values()] == [trunk.wall_s()] * 2 and trunk.wall_s() > 0
    # Weights from before that was written down.
    for path in (tmp_path / "cache" / "trained").glob("*/weights.safetensors"):
        path.write_bytes(path.read_bytes().replace(b'"trunk_wall_s"', b'"trunk_was_ms"'))
    add(exp, tmp_path)
    assert {e["trunk_wall_s"] for e in read(tmp_path / "zoo").values()} == {"not recorded"}


def test_a_torn_manifest_is_one_sentence(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CorruptFile, match="manifest.json cannot be read .*restore it"):
        read(tmp_path)


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("weights", "not as they were written"),
        ("weights and digest", "not those that the manifest.json beside them names"),
        ("names", "not those that the manifest.json beside them names"),
        ("manifest", "manifest.json cannot be read"),
    ],
)
def test_a_tampered_file_is_refused_by_its_hash(zoo, tmp_path, what, sentence):
    shutil.copytree(zoo, tmp_path / "z")
    manifest = tmp_path / "z" / "zoo" / "manifest.json"
    for path in manifest.parent.glob("*.safetensors"):
        if what.startswith("weights"):
            body = bytearray(path.read_bytes())
            body[-1] ^= 1
            path.write_bytes(body)
            if what == "weights and digest":
                path.with_suffix(".sha256").write_text(sha256(body).hexdigest())
        elif what == "names":  # of files that lie there whole, with their digests
            manifest.write_text(json.dumps({name: e for name, e in read(manifest.parent).items() if name != path.stem}))
        else:
            manifest.write_text("{")
    steps, said = run(tmp_path / "z", tmp_path / "r")
    assert len(said) == 2 and all(sentence in line for line in said) and not [s for s in steps if s.startswith("train")]


def test_what_was_never_trained_cannot_be_added(tmp_path):
    with pytest.raises(UsageError, match="no network of small is trained.*make exp EXP=small first"):
        add(small(), tmp_path)
    with pytest.raises(UsageError, match="no network of small that is meant is trained"):
        add(small(), tmp_path, list(small().cells())[:1])


def test_what_is_committed_is_whole_and_small():
    folder = ROOT / "results" / "zoo"
    manifest = read(folder)
    files = {p.stem: p.read_bytes() for p in folder.glob("*.safetensors")}
    assert files.keys() == manifest.keys() and sum(map(len, files.values())) <= TOTAL
    for name, entry in manifest.items():
        assert sha256(files[name]).hexdigest() == entry["sha256"] and len(files[name]) == entry["bytes"] <= LARGEST
        assert all(0 < a <= 1 for a in entry["accuracy"])


def test_what_is_committed_says_all_that_is_said_of_what_is_added(zoo):
    fresh = {k: type(v) for k, v in next(iter(read(zoo / "zoo").values())).items()}
    for name, entry in read(ROOT / "results" / "zoo").items():
        said = {k: fresh[k] if (k, v) == ("trunk_wall_s", "not recorded") else type(v) for k, v in entry.items()}
        assert said == fresh, f"{entry['model']}, {name}"
        assert entry["training_device"] and entry["training_precision"] in ("fp32", "bf16", "bf16, then fp32")
        recipe = entry["spec"][3]
        assert recipe["is"] == "Recipe" and (entry["trunk_wall_s"] == 0) == (recipe["start"] == "scratch")


def test_the_command_of_what_is_committed_trains_it():
    """Its key is that of a network of that experiment, with that recipe and on the very samples that it was trained on."""
    for name, entry in read(ROOT / "results" / "zoo").items():
        assert entry["command"] == f"make exp EXP={entry['experiment']}"
        cells = found(entry["experiment"]).cells()
        trained = {key(("training", c.data, c.model, c.recipe, c.train_seed, c.seed, *entry["trained_on"])) for c in cells}
        assert name.removesuffix("-base") in trained, entry["model"]


def test_the_networks_that_were_promised_are_committed():
    """All that are trained: IResNeXt L9 is not yet."""
    committed = {(e["data"], e["model"]) for e in read(ROOT / "results" / "zoo").values()}
    twins = {("MNIST", "B-LeNet"), *(("CIFAR10", model) for model in ("B-AlexNet", "SDN ResNet-20", "SDN ResNet-56"))}
    promised = twins | {(data, f"{model} static") for data, model in twins}
    assert promised | {("CIFAR10", "SparseResNet"), ("FashionMNIST", "ThreeExitMLP(width=256)")} <= committed


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
