"""A bundle is written whole, checked when it is read, and answers as its policy does offline; without torch."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import anytime
from anytime import cpu, export, stops
from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.board import board_test
from anytime.boards.host import Host
from anytime.bundle import _checked, _pixels, fingerprint, policy_of
from anytime.cells import find_cell
from anytime.dataset import normalise
from anytime.engine import OnnxRuntimeGraph, OpenVINOGraph
from anytime.errors import AnytimeError, CorruptFile, Unsupported, UsageError, WriteError
from anytime.execute import Executor
from anytime.find import experiment
from anytime.metrics import Predictions
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.fixed import Fixed
from anytime.policies.patience import Patience
from anytime.policies.reading import Reading
from anytime.policies.sdn import SDN
from anytime.spec import key, plain
from tests.contracts import policy as contract
from tests.test_contract_policy import KEEPERS

ROOT = Path(__file__).parent.parent

EXPERIMENT = """
from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.config import Experiment, Suite
from anytime.datasets.synthetic import Synthetic
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.patience import Patience
from anytime.policies.sdn import SDN
from anytime.policies.oracle import Oracle
from anytime.train import Recipe
from tests.worlds import Restarting, Tiny
from anytime.models.static import Static

EXPERIMENT = Experiment(
    name="mine_to_export",
    question="Mine?",
    suites=(Suite(Synthetic(n=800, noise=0.25, size=16, channels=3, n_classes=4), (Tiny(), Restarting(), Static(Tiny()))),),
    recipe=Recipe(epochs=2, batch=64, lr=1e-2),
    backends=(Float32(), OnnxRuntime(of=PTQ()), PTQ(), PTQ(weight_bits=4)),
    policies=(MaxProb(), Entropy(), Patience(), SDN(), Oracle()),
    budgets=(0.6, 0.9),
)
"""


class Home:
    """A folder with an experiment, and what is exported from it."""

    def __init__(self, folder):
        self.folder = folder
        self.exp = folder / "mine_to_export.py"
        self.exp.write_text(EXPERIMENT)
        self.results = folder / "results"

    def choose(self, *words, policy=None, budget=None):
        return export.choose([str(self.exp), *words], (), self.results, policy, budget)

    def choose_of(self, backend, policy=None, budget=None):
        """Tiny, through another backend than those of the experiment, but of the same training."""
        exp = replace(experiment(str(self.exp)), backends=(Float32(), backend))
        return export.choose(["Tiny", backend.column], (), self.results, policy, budget, exp=exp)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def chosen(home):
    return home.choose("Tiny", "INT8 PTQ", policy="MaxProb", budget=0.6)


@pytest.fixture
def bundle(chosen, tmp_path):
    export.write_bundle(chosen, tmp_path / "net")
    return tmp_path / "net"


def images(chosen, n=60):
    """Published test images as PIL and numpy give them: [N, H, W, C] uint8."""
    return chosen.cell.data.read().x_test[:n].transpose(0, 2, 3, 1)


def offline(chosen, policy, n=60):
    logits = chosen.shop.predictions(chosen.cell)["test"].logits[:, :n]
    exits = policy.exits(logits)
    return exits, policy.answer(logits, exits)


def same(answers, exits, logits, classes):
    assert [a.place for a in answers] == list(range(len(exits)))
    assert [a.exit for a in answers] == exits.tolist()
    assert [a.label for a in answers] == [classes[c] for c in logits.argmax(-1)]
    np.testing.assert_array_equal([a.confidence for a in answers], stops.max_probability(logits))
    assert all(a.ms > 0 for a in answers)


@pytest.mark.parametrize("words", [("Tiny", "INT8 PTQ"), ("Tiny", "FP32"), ("Restarting", "INT8 PTQ")], ids=" ".join)
@pytest.mark.parametrize("label", ["MaxProb", "Patience", "SDN", None])
def test_it_answers_as_its_policy_offline(home, tmp_path, words, label):
    chosen = home.choose(*words, policy=label, budget=label and 0.9)
    export.write_bundle(chosen, tmp_path / "net")
    net = anytime.load(tmp_path / "net")
    assert net.policy == (chosen.policy or Fixed())
    exits, logits = offline(chosen, net.policy)
    shown = images(chosen)
    if "FP32" in words:  # float kernels add up otherwise in another company
        assert [net(image).label for image in shown] == [net.classes[c] for c in logits.argmax(-1)]
        return
    same([net(image)._replace(place=i) for i, image in enumerate(shown)], exits, logits, net.classes)
    same(net.batch(shown), exits, logits, net.classes)
    same(net.batch(list(shown), batch=7), exits, logits, net.classes)
    same(list(net.stream(iter(shown))), exits, logits, net.classes)
    same(sorted(net.stream(iter(shown), batch=16), key=lambda a: a.place), exits, logits, net.classes)


def test_a_network_of_openvino_runs_in_openvino(home, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    to, chosen = tmp_path / "net", home.choose_of(OpenVINO(of=PTQ()), "MaxProb", 0.6)
    export.write_bundle(chosen, to)
    net = anytime.load(to)
    assert isinstance(net.parts[0].run, OpenVINOGraph)
    same(net.batch(images(chosen)), *offline(chosen, chosen.policy), net.classes)
    assert "runs in openvino, as it was scored" in export.how_to_use(chosen, to, single=False)
    with pytest.raises(Unsupported, match="a single file runs in ONNX Runtime, and OpenVINO"):
        export.write_single(chosen, tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        UsageError, match="openvino is not installed here: .* or pass engine='onnxruntime'; accuracy was measured under o"
    ):
        anytime.load(to)
    saturated = pytest.warns(RuntimeWarning, match="saturates") if cpu.saturates() else warnings.catch_warnings()
    with saturated:
        assert isinstance(anytime.load(to, engine="onnxruntime").parts[0].run, OnnxRuntimeGraph)
    rewrite(to, lambda m: (m.pop("engine"), m["provenance"]["net"].pop("saturates", None)))  # as older ones are
    assert isinstance(anytime.load(to).parts[0].run, OnnxRuntimeGraph)


def test_a_jump_runs_one_network_of_those_that_restart(home, tmp_path):
    chosen = home.choose("Restarting", "INT8 PTQ")
    export.write_bundle(chosen, tmp_path / "net")
    net = anytime.load(tmp_path / "net")
    assert [part.head for part in net.plan((1,))] == [1] and [part.head for part in net.plan((0, 1))] == [0, 1]
    same(net.batch(images(chosen)), *offline(chosen, Fixed()), net.classes)


def test_the_time_of_an_answer_is_all_of_it(chosen, bundle, monkeypatch):
    net, said = anytime.load(bundle), stops.max_probability

    def slow(logits):
        time.sleep(0.03)
        return said(logits)

    net.policy = net._one.policy = Fixed()
    monkeypatch.setattr(stops, "max_probability", slow)
    for answer in (net(images(chosen, 1)[0]), *net.stream(images(chosen, 2))):
        assert answer.ms > 30


def test_the_user_may_bring_a_policy(home, tmp_path):
    chosen = home.choose("Tiny", "INT8 PTQ")
    export.write_bundle(chosen, tmp_path / "net")
    for policy in (Fixed(exit=0), Fixed(exit=1), Entropy(thresholds=(0.9, 0.6)), SDN(thresholds=(0.6, 0.7))):
        exits, logits = offline(chosen, policy)
        net = anytime.load(tmp_path / "net", policy=policy)
        same(net.batch(images(chosen)), exits, logits, net.classes)


def test_other_engines_say_the_same_class(chosen, bundle):
    pytest.importorskip("openvino")
    if cpu.saturates():
        with pytest.warns(RuntimeWarning, match="this CPU has no VNNI"):
            anytime.load(bundle, engine="openvino")
        return
    net, other = anytime.load(bundle), anytime.load(bundle, engine="openvino")
    shown = images(chosen)
    ran, there = (Executor(n, n.policy, 16).run(n.prepared(shown)) for n in (net, other))
    assert (ran.logits.argmax(-1) == there.logits.argmax(-1)).all()
    # One step of the logits' last layer apart at most where an engine rounds a half otherwise.
    np.testing.assert_allclose(there.logits, ran.logits, atol=0.1)


def test_pixels_become_what_the_data_set_makes_of_them(chosen, bundle):
    net, shown = anytime.load(bundle), images(chosen)
    expected = chosen.shop.data(chosen.cell.data, 0).test.x[:60].numpy()
    np.testing.assert_array_equal(net.prepared(shown), expected)
    as_float = shown / 255  # float64
    wanted = normalise(as_float.transpose(0, 3, 1, 2), chosen.cell.data.preprocessing).numpy()
    np.testing.assert_array_equal(net.prepared(as_float), wanted)
    np.testing.assert_array_equal(net.prepared(as_float.astype(np.float32)), wanted)


def test_images_of_every_kind(chosen, bundle):
    net, shown = anytime.load(bundle), images(chosen, 4)
    plain_answer = net(np.ascontiguousarray(shown[0]))
    for image in (shown[0], np.asfortranarray(shown[0]), shown[0] / 255, shown[0].tolist() and shown[0][::-1][::-1]):
        assert net(image)[:3] == pytest.approx(plain_answer[:3])
    assert net.batch([]) == [] and net.batch(shown[:0]) == [] and list(net.stream([])) == []


@pytest.mark.parametrize(
    "make, said",
    [
        *(
            (
                lambda x, mode=mode: Image.fromarray(x).convert(mode),
                rf"image 0 is in PIL's mode {mode}: give image.convert\('RGB'\)",
            )
            for mode in ("P", "YCbCr", "HSV", "LAB")
        ),
        (lambda x: x[:8], r"image 0 has the shape \(8, 16, 3\), the network takes \(16, 16, 3\)"),
        (lambda x: x.transpose(2, 0, 1), r"\(3, 16, 16\), the network takes \(16, 16, 3\)"),
        (lambda x: x[..., 0], r"has the shape \(16, 16\)"),
        (lambda x: x.astype(np.int64), "is int64: give uint8"),
        (lambda x: x.astype(np.float32), r"is float32 from .* to .*: give floats from 0 to 1"),
        (lambda x: x / 255 * np.nan, "give floats from 0 to 1"),
        (lambda x: None, "image 0 is a NoneType: open it first"),
        (lambda x: "cat.png", "image 0 is a str: open it first"),
    ],
)
def test_images_that_it_cannot_take(chosen, bundle, make, said):
    net = anytime.load(bundle)
    with pytest.raises(UsageError, match=said):
        net(make(images(chosen, 1)[0]))
    with pytest.raises(UsageError, match=said.replace("image 0", "image 1")):
        net.batch([images(chosen, 1)[0], make(images(chosen, 1)[0])])


def test_it_needs_no_torch(chosen, bundle):
    np.save(bundle.parent / "images.npy", images(chosen, 5))
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'pandas', 'onnx', 'sklearn', 'safetensors'): sys.modules[name] = None\n"
        "import anytime, numpy as np\n"
        "net = anytime.load(sys.argv[1])\n"
        "print([net(image).label for image in np.load(sys.argv[2])])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(bundle), str(bundle.parent / "images.npy")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    net = anytime.load(bundle)
    assert ran.stdout.strip() == str([net(image).label for image in images(chosen, 5)])


def rewrite(bundle, change):
    """A manifest that was changed by somebody who knows how to sign it."""
    path = bundle / "manifest.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said | {"sha256": fingerprint(said)}))


def with_external_data(bundle):
    """A graph whose first weight lies in a file beside, or above, the folder."""
    path = bundle / "segment_1.onnx"
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    (bundle.parent / "secret.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "../secret.bin"
    path.write_bytes(model.SerializeToString())
    rewrite(bundle, lambda m: m["segments"][0].update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


def flip(path, where=-40):
    body = bytearray(path.read_bytes())
    body[where] ^= 1
    path.write_bytes(body)


def tampered(bundle):
    path = bundle / "manifest.json"
    said = json.loads(path.read_text())
    said["policy"]["spec"]["thresholds"][0] /= 2
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    "hurt, said",
    [
        (lambda b: (b / "segment_2.onnx").unlink(), r"segment_2.onnx is missing"),
        (lambda b: flip(b / "segment_2.onnx"), r"segment_2.onnx is not as it was written"),
        (lambda b: (b / "segment_1.onnx").write_bytes(b""), r"segment_1.onnx is not as it was written"),
        (with_external_data, "keeps weights in another file"),
        (tampered, "manifest.json is not as it was written"),
        (lambda b: (b / "manifest.json").write_text('{"kind": "any'), "manifest.json cannot be read"),
        (lambda b: (b / "manifest.json").write_text("[]"), "is no manifest of a bundle"),
        (lambda b: rewrite(b, lambda m: m.update(schema=2)), "schema 2, this one reads 1"),
        (lambda b: rewrite(b, lambda m: m["segments"][0].update(file="../segment_1.onnx")), "lies outside its folder"),
        (lambda b: rewrite(b, lambda m: m["policy"]["spec"].update({"is": "MaxProp"})), "did you mean 'MaxProb'"),
        (lambda b: rewrite(b, lambda m: m["policy"]["spec"].update(version=9)), "of version 9, here it is 1"),
        (lambda b: rewrite(b, lambda m: m["policy"]["spec"].update(mood=1)), "does not have this version's fields"),
    ],
)
def test_a_hurt_bundle(bundle, hurt, said):
    hurt(bundle)
    with pytest.raises(CorruptFile, match=said) as caught:
        anytime.load(bundle)
    assert len(str(caught.value).splitlines()) == 1


def test_a_network_that_is_another_now_is_not_exported(home, chosen, monkeypatch):
    predict = export.GraphNet.predict
    monkeypatch.setattr(export.GraphNet, "predict", lambda self, x, batch=256: -predict(self, x, batch))
    with pytest.raises(AnytimeError, match=r"Tiny, OnnxRuntime\(of=PTQ\) answers otherwise than when it was scored: .* FORCE=1"):
        home.choose("Tiny", "INT8 PTQ")


def test_questions_without_sense(bundle, tmp_path):
    for work, said in (
        (lambda: anytime.load(tmp_path), "is no bundle, it has no manifest.json"),
        (lambda: anytime.load(bundle, engine="onnxrunntime"), "did you mean 'onnxruntime'"),
        (lambda: anytime.load(bundle, threads=-1), "threads=-1 is no number of threads"),
        (lambda: anytime.load(bundle, policy=MaxProb()), "MaxProb: 0 thresholds are fitted, 2 are needed for the 3 exits"),
        (lambda: anytime.load(bundle, policy=MaxProb(thresholds=(0.5,) * 4)), "4 thresholds are fitted, 2 are needed"),
        (lambda: anytime.load(bundle, policy=Reading(of=MaxProb(), chosen=(0, 2))), "0 thresholds are fitted, 1 are needed"),
        (lambda: anytime.load(bundle, policy=Patience()), "Patience.*call fit first"),
        (lambda: anytime.load(bundle, policy="Entropy"), "policy='Entropy' is no policy: give a fitted one"),
        (lambda: anytime.save("quickstart", to="net", policy=MaxProb()), r"policy=MaxProb\(.*give its name in tables, 'MaxProb'"),
        (lambda: anytime.load(bundle).batch(Image.new("RGB", (16, 16))), "Image holds no images .*for one image call net"),
    ):
        with pytest.raises(UsageError, match=said):
            work()
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        anytime.lode  # noqa: B018


def test_exits_that_were_not_written(home, tmp_path):
    chosen = home.choose("Tiny", "INT8 PTQ")
    export.write_bundle(chosen._replace(policy=Fixed(exit=1), said=None), tmp_path / "net")
    assert len(json.loads((tmp_path / "net" / "manifest.json").read_text())["segments"]) == 1
    with pytest.raises(UsageError, match="reads exit 1, this bundle holds exit 2"):
        anytime.load(tmp_path / "net", policy=MaxProb(thresholds=(0.5, 0.5)))


def test_an_engine_that_breaks_says_so(chosen, bundle):
    net = anytime.load(bundle)
    run = net.parts[0].run
    for broken, said in (
        (lambda state: [np.full_like(run(state)[0], np.nan), *run(state)[1:]], "not finite, for sample 0"),
        (lambda state: 1 / 0, "the engine failed on sample 0: division by zero"),
    ):
        hurt = anytime.bundle.Bundle(net.manifest, net.policy, [net.parts[0]._replace(run=broken), *net.parts[1:]])
        with pytest.raises(AnytimeError, match=said):
            hurt(images(chosen, 1)[0])


def test_a_bad_image_among_many_takes_nothing_back(chosen, bundle):
    net, shown = anytime.load(bundle), list(images(chosen))
    right = net.batch(shown)
    for bad, kind in ((shown[50][:8], UsageError), (shown[50] / 255 * np.nan, UsageError)):
        with pytest.raises(kind, match="image 50") as caught:
            net.batch([*shown[:50], bad, *shown[51:]], batch=8)
        said = caught.value.answered
        places = [a.place for a in said]
        assert len(places) > 20 and places == sorted(places)
        assert [a[:3] for a in said] == [right[i][:3] for i in places]


# The manifest


def test_the_manifest_says_all_that_a_board_needs(chosen, bundle):
    said = json.loads((bundle / "manifest.json").read_text())
    assert said["input"]["shape"] == [3, 16, 16] and said["input"]["mean"] == [0.5] * 3 and said["classes"] == list("0123")
    first, second, third = said["segments"]
    assert first["inputs"][0] == {"name": "x", "dtype": "float32", "shape": ["batch", 3, 16, 16]}
    state = first["outputs"][1]
    assert state["dtype"] == "uint8" and {k: v for k, v in second["inputs"][0].items() if k != "name"} == {
        k: v for k, v in state.items() if k != "name"
    }
    assert [len(s["outputs"]) for s in (first, second, third)] == [2, 2, 1]
    assert {(s["opset"], s["ir"]) for s in said["segments"]} == {(13, 7)}
    session = anytime.load(bundle).parts[0].run
    x = chosen.shop.data(chosen.cell.data, 0).test.x[:20].numpy()
    integers = session([x])[1].transpose(0, 3, 1, 2).astype(np.float64)  # channels cross segments last
    real = chosen.net.twin.stages[0](torch.from_numpy(x)).detach().numpy()
    assert (
        abs((integers - state["zero_point"]) * state["scale"] - real).max() < 1.01 * state["scale"]
    )  # a half may be rounded otherwise
    test = chosen.shop.predictions(chosen.cell)["test"]
    assert [e["test_accuracy"] for e in said["exits"]] == (test.logits.argmax(-1) == test.labels).mean(1).tolist()
    assert said["policy"]["tests"][0] == {
        "test": "by_max_probability",
        "arguments": {"thresholds": list(chosen.policy.thresholds)},
    }
    assert said["provenance"]["cell"] == key(chosen.cell) and said["provenance"]["spec"] == plain(chosen.cell)
    exits = chosen.policy.exits(test.logits)
    assert said["policy"]["test_share"] == pytest.approx([(exits == k).mean() for k in range(3)])


@pytest.mark.parametrize("policy", [p for p in KEEPERS.values() if not p.bound], ids=lambda p: p.label)
def test_a_board_decides_by_the_manifest_alone(policy):
    """With numpy, stops.py and what json brings back, as the agent does."""
    for n_exits, n, n_classes in contract.SHAPES[:2]:
        val, cost = contract.predictions(n_exits, n, n_classes), contract.costs(n_exits)
        for budget in contract.budgets(policy, val, cost, 4)[1:3]:
            fitted = policy.fit(val, cost, budget)
            assert policy_of(json.loads(json.dumps(plain(fitted)))) == fitted
            for asked in (fitted, fitted.tempered([1.5, 0.7, 1.1, 0.9, 2.0][:n_exits])):
                said = json.loads(json.dumps(board_test(asked, val.logits)))
                exits = np.full(n, said["uses"][-1])
                going = np.ones(n, bool)
                for i, test in enumerate(said["tests"]):
                    read = said["uses"][: i + 1]
                    logits = val.logits[read]
                    if said["temperatures"]:
                        logits = stops.tempered(logits, [said["temperatures"][k] for k in read])
                    arguments = {k: np.array(v) if isinstance(v, list) else v for k, v in test["arguments"].items()}
                    leave = going & getattr(stops, test["test"])(logits, **arguments)
                    exits[leave] = said["uses"][i]
                    going &= ~leave
                np.testing.assert_array_equal(exits, asked.exits(val.logits))


def test_a_policy_that_decides_by_more_than_its_numbers_is_refused():
    class Moody(MaxProb):
        def _stop(self, logits):
            return ~super()._stop(logits)

    class Averaged(MaxProb):
        def _stop(self, logits):
            return super()._stop(logits.cumsum(0))

    class Alone(MaxProb):
        def _stop(self, logits):
            return logits[-1].max(-1) > 1

    val = Predictions(*(getattr(contract.predictions(3, 50, 4), f) for f in ("logits", "labels", "part")))
    alone = "does not decide as stops.by_max_probability"
    for kind, said in ((Moody, alone), (Averaged, alone), (Alone, "calls no exit test")):
        with pytest.raises(Unsupported, match=said):
            board_test(kind(thresholds=(0.6, 0.6)), val.logits)


# Writing


def test_an_older_bundle_is_replaced_and_nothing_else(chosen, bundle):
    before = (bundle / "manifest.json").stat().st_ino
    export.write_bundle(chosen, bundle)
    assert (bundle / "manifest.json").stat().st_ino != before
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other things than a bundle of ours \(notes.txt\)"):
        export.write_bundle(chosen, bundle)
    other = bundle.parent / "other"
    other.mkdir()
    export.write_bundle(chosen, other)  # an empty one is fine
    for name, text in (("manifest.json", "{}"), ("thesis.tex", "x")):
        (bundle.parent / name[:3]).mkdir()
        (bundle.parent / name[:3] / name).write_text(text)
        with pytest.raises(UsageError, match="holds other things than a bundle of ours"):
            export.write_bundle(chosen, bundle.parent / name[:3])
    file = bundle.parent / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is no folder"):
        export.write_bundle(chosen, file)
    assert {p.name for p in bundle.parent.iterdir()} == {"net", "other", "man", "the", "file"}  # no temporary folder is left


def test_a_full_disk_leaves_what_was_there(chosen, bundle, monkeypatch):
    there = {p.name: p.read_bytes() for p in bundle.iterdir()}
    text = Path.write_text

    def full(self, *args, **kwargs):
        if self.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    for to in (bundle, bundle.parent / "new"):
        with pytest.raises(WriteError, match="No space left on device"):
            export.write_bundle(chosen, to)
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == there
    assert {p.name for p in bundle.parent.iterdir()} == {"net"}


@pytest.mark.parametrize("stops_it", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
@pytest.mark.parametrize("when", ["after the older one was moved away", "before the new one is moved there"])
def test_an_older_bundle_stays_until_the_new_one_is_there(chosen, bundle, monkeypatch, stops_it, when):
    there, rename, n = {p.name: p.read_bytes() for p in bundle.iterdir()}, os.rename, iter(range(9))

    def fails(old, new):
        i = next(n)
        if i == 1 and when.startswith("before"):
            raise stops_it
        rename(old, new)
        if i == 0 and when.startswith("after"):
            raise stops_it

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises((WriteError, KeyboardInterrupt)):
        export.write_bundle(chosen, bundle)
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == there
    assert {p.name for p in bundle.parent.iterdir()} == {"net"}


def test_what_is_printed_for_a_single_file_keeps_float_layers_float(home, tmp_path):
    chosen = home.choose_of(OnnxRuntime(of=PTQ(keep_float=("stages.1.0.a", "stages.1.0.b"))))
    to = export.write_single(chosen, tmp_path / "net.onnx")
    said = {"x": chosen.shop.data(chosen.cell.data, 0).test.x[:1].numpy()}
    exec(export.how_to_use(chosen, to, single=True), said)
    chosen.net.open(1)
    np.testing.assert_allclose(said["logits"], chosen.net.predict(said["x"])[-1], atol=1e-6)


def test_a_single_file_is_written_beside_nothing_else(chosen, tmp_path):
    import onnxruntime

    to = tmp_path / "net.onnx"
    export.write_single(chosen, to)
    export.write_single(chosen, to)  # an older one is replaced
    exits, logits = offline(chosen, chosen.policy, 20)
    lines = export.how_to_use(chosen, to, single=True).splitlines()
    assert len(lines) == 5
    for i, x in enumerate(chosen.shop.data(chosen.cell.data, 0).test.x[:20].numpy()):
        said = {"x": x[None]}
        exec("\n".join(lines) if i == 0 else lines[-1], globals(), said)
        globals().update(onnxruntime=onnxruntime, session=said.get("session", globals().get("session")))
        assert said["exit"] == exits[i] and said["label"] == logits[i].argmax()
        np.testing.assert_array_equal(said["logits"][0], logits[i])
    to.write_bytes(b"somebody else's")
    with pytest.raises(UsageError, match="is no file of ours"):
        export.write_single(chosen, to)
    with pytest.raises(UsageError, match=r"called NAME\.onnx"):
        export.write_single(chosen, tmp_path / "net")


# Choosing


@pytest.mark.parametrize(
    "words, said",
    [
        (("Tiny",), "means 3 networks: add a word, or give a key:"),
        (("Tinny",), "did you mean 'Tiny'"),
        (("Tiny", "W4"), ""),
    ],
    ids=" ".join,
)
def test_words_that_mean_no_one_network(home, words, said):
    if said:
        with pytest.raises(UsageError, match=said):
            find_cell([str(home.exp), *words])
    else:
        with pytest.raises(Unsupported, match="FP32, W8A8 and W7A8, not W4A8"):
            home.choose(*words)


@pytest.mark.parametrize(
    "words, policy, budget, said",
    [
        (("Tiny", "FP32"), "MaxProp", 0.6, "did you mean 'MaxProb'"),
        (("Tiny", "FP32"), "MaxProb", None, "add --budget, of 0.6, 0.9"),
        (("Tiny", "FP32"), "MaxProb", 0.7, "has no budget 0.7 for MaxProb; it has 0.6, 0.9"),
        (("Tiny", "FP32"), None, 0.7, "belongs to a policy: name one with --policy"),
        (("Tiny", "FP32"), "Oracle", 0.6, "it is a bound, not to be exported"),
        (("Tiny static", "FP32"), "MaxProb", 0.6, "has one exit"),
    ],
)
def test_policies_that_there_are_not(home, words, policy, budget, said):
    with pytest.raises(UsageError, match=said):
        home.choose(*words, policy=policy, budget=budget)


def test_a_budget_in_ms_is_one_boards(home):
    _, cell = find_cell([str(home.exp), "Tiny", "INT8 PTQ"])
    two = replace(experiment(str(home.exp)), currency="ms", boards=(Host(), Host(batch=8)))
    with pytest.raises(UsageError, match="on each of its boards .host, host, batch 8.*an experiment of one board"):
        export._asked(two, cell, "MaxProb", 0.6)
    assert export._asked(replace(two, boards=(Host(),)), cell, "MaxProb", 0.6).board == Host()


def test_a_cell_by_its_key(home, monkeypatch):
    (home.folder / "experiments").mkdir(exist_ok=True)
    (home.folder / "experiments" / "mine_by_key.py").write_text(EXPERIMENT.replace("mine_to_export", "mine_by_key"))
    (home.folder / "experiments" / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(home.folder)
    _, cell = find_cell([str(home.exp), "Tiny", "INT8 PTQ"])
    exps, found = find_cell([key(cell)[:8]])
    assert found == cell and [e.name for e in exps] == ["mine_by_key"]
    (home.folder / "experiments" / "twin_of_it.py").write_text(EXPERIMENT.replace("mine_to_export", "twin_of_it"))
    with pytest.raises(UsageError, match=f"mine_by_key and twin_of_it have .*export mine_by_key {key(cell)[:8]}"):
        export.choose([key(cell)[:8]], (), home.results, "MaxProb", 0.6)
    assert export.choose([key(cell)[:8]], (), home.results, None, None).cell == cell
    with pytest.raises(UsageError, match="--set makes another experiment"):
        find_cell([key(cell)[:8]], ("recipe.epochs=1",))
    wrong = key(cell)[:7] + ("0" if key(cell)[7] != "0" else "1")
    with pytest.raises(UsageError, match=f"no experiment has a network with the key '{wrong}'.*did you mean '{key(cell)[:8]}'"):
        find_cell([wrong])


@pytest.mark.parametrize("key", [b"\n\x08location", b"\n\x88\x00location", b"\x8a\x00\x88\x80\x00location"])
def test_weights_outside_are_seen_however_their_key_is_written(tmp_path, key):
    assert onnx.StringStringEntryProto.FromString(key).key == "location"
    (tmp_path / "segment_1.onnx").write_bytes(key)
    with pytest.raises(CorruptFile, match="keeps weights in another file"):
        _checked(tmp_path, {"file": "segment_1.onnx", "sha256": hashlib.sha256(key).hexdigest()})


def test_an_image_file_that_is_cut_off_names_its_place():
    body = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8)).save(body, "PNG")
    with pytest.raises(UsageError, match="image 2 cannot be read .*truncated"):
        _pixels(Image.open(io.BytesIO(body.getvalue()[:300])), (3, 16, 16), 2)
