"""The conversion table: how far from FP32, before and after, of networks that nobody trained."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from anytime import figures, report
from anytime.backend import TorchNet
from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.conversions import HEADER, conversions
from anytime.dataset import DatasetSpec, Preprocessing, Raw, digest, normalise, torchvision
from anytime.datasets.enlarged import Enlarged
from anytime.datasets.synthetic import Synthetic
from anytime.decided import JUDGED
from anytime.errors import Leak, Unsupported, UsageError
from anytime.metrics import Predictions
from anytime.models.attached import Attached
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from anytime.policies.geometric import GeometricSplit
from anytime.quant.bias import reestimate_bn
from anytime.record import load
from anytime.rows import rows
from anytime.run import Runner
from anytime.scoring import fidelity, mean_over, unjudged
from anytime.spec import plain
from anytime.train import Recipe
from anytime.workshop import Workshop
from tests.worlds import Tiny

SMALL = Synthetic(n=200, size=8, channels=3, n_classes=4)
PHOTOS = Enlarged(SMALL, size=12, n_classes=20, calib=16, tune=4, val=24, hold=4, limit=120)

EXP = Experiment(
    name="converted",
    question="What does converting cost?",
    suites=(Suite(PHOTOS, (Static(Tiny()), Tiny())), Suite(PHOTOS, (Static(Tiny(width=4)),))),
    recipe=Recipe(epochs=0),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ()), PTQ()),
    policies=(GeometricSplit(),),
    budgets=(0.6,),
    boards=(Host(launches=1, warmup=1), Host(launches=1, warmup=1, batch=4)),
    arms=("refitted",),
    time_samples=8,
    replay_samples=32,  # 8 batches of 4
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    said = []
    Runner(EXP, results, log=said.append).run()
    assert all("simulated arithmetic has no latency" in line for line in said), said
    return results


@pytest.fixture(scope="module")
def table(done):
    return rows(done / "records", "converted")


# --- numbers ------------------------------------------------------------------------------------------------------


def test_fidelity_by_hand():
    reference = np.array([[0.0, 1.0, 4.0], [3.0, 2.0, -1.0]])  # of the range 5
    logits = np.array([[0.5, 1.0, 4.0], [2.0, 2.25, -1.0]])  # the second says another class, and is 1 off
    said = fidelity(logits, reference)
    assert said == {"max_error": 1.0, "max_error_share": 0.2, "prediction_flips": 0.5}
    assert fidelity(reference, reference) == {"max_error": 0.0, "max_error_share": 0.0, "prediction_flips": 0.0}
    constant = np.full((2, 3), 7.0)
    assert fidelity(constant + 1, constant) == {"max_error": 1.0, "prediction_flips": 0.0}  # no range, no share of it


def test_labels_tell_nothing_without_training_or_without_being_the_classes():
    assert unjudged(frozenset({"a part"}), True) == ""
    assert "drawn and never trained" in unjudged(frozenset(), True)
    assert "not its classes" in unjudged(frozenset({"imagenet"}), False)


def test_the_record_says_how_far_the_logits_are(done):
    """Against predictions that are made here anew, from the cache's logits."""
    shop = Workshop(done)
    evals = [r for r, _ in load(done / "records", "converted").records if r.kind == "eval"]
    for cell in EXP.cells():
        record = next(r for r in evals if r.facts["backend"] == cell.backend.label and r.spec["model"] == plain(cell.model))
        z = shop.predictions(cell)["test"].logits
        z0 = shop.predictions(replace(cell, backend=Float32()))["test"].logits
        for k, row in enumerate(record.exits):
            assert row["answers"] == len(set(z[k].argmax(-1)))
            if cell.backend == Float32():
                assert "max_error" not in row
            else:
                assert row["max_error"] == pytest.approx(np.abs(z[k] - z0[k]).max(), rel=1e-6)
                assert row["prediction_flips"] == (z[k].argmax(-1) != z0[k].argmax(-1)).mean()
    by = {r.facts["backend"]: r.exits[-1]["max_error_share"] for r in evals if "max_error" in r.exits[-1]}
    assert by["OnnxRuntime(of=Float32)"] < 1e-5 < 1e-3 < by["OnnxRuntime(of=PTQ)"] < 0.5


# --- networks that nobody trained ---------------------------------------------------------------------------------


def test_without_epochs_weights_are_as_drawn_and_batchnorm_is_measured(tmp_path):
    shop = Workshop(tmp_path)
    net = shop.trained(PHOTOS, Tiny(), Recipe(epochs=0), 3, 0)
    torch.manual_seed(3000)
    drawn = Tiny().build((3, 12, 12), 20)
    assert not net.training and net.trained_on == frozenset()
    for name, p in net.named_parameters():
        assert torch.equal(p, dict(drawn.named_parameters())[name]), name
    x = PHOTOS.load(0).train.x
    conv, bn = net.stages[0][0], net.stages[0][1]
    with torch.no_grad():
        seen = conv(x).transpose(0, 1).flatten(1)
    assert torch.allclose(bn.running_mean, seen.mean(1), atol=1e-3)
    assert torch.allclose(bn.running_var, seen.var(1), rtol=0.05)
    assert not (tmp_path / "cache" / "trained").exists()


def test_loaded_weights_are_taken_as_they_are_and_fresh_heads_are_not_judged(tmp_path):
    torch.manual_seed(1)
    net = torchvision().models.resnet18(num_classes=4)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean += 0.25
    torch.save(net.state_dict(), tmp_path / "r.pth")
    exits = Attached("resnet18", ("layer1",), weights=str(tmp_path / "r.pth"), trained_on=("imagenet",))
    data = Enlarged(SMALL, size=16, limit=60, calib=8, tune=4, val=8, hold=4)
    exp = replace(EXP, suites=(Suite(data, (Static(exits), exits)),), backends=(Float32(),), boards=(), policies=())
    assert (Workshop(tmp_path).trained(data, exits, Recipe(epochs=0), 0, 0).stages[0].bn1.running_mean == 0.25).all()
    Runner(exp, tmp_path, log=print).run()
    found = {r.facts["model"]: r.facts["unjudged"] for r, _ in load(tmp_path / "records", "converted").records}
    assert found["resnet18 from r.pth static"] == "" and "never trained" in found["resnet18 from r.pth"]


def test_no_accuracy_is_shown_and_the_reason_is(table):
    finished = table[table["status"] == "done"]
    assert len(finished) and finished[list(JUDGED)].isna().all().all()
    assert not finished["front"].any() and (finished["nll_reached"] == "").all()
    assert finished["reason"].str.contains("drawn and never trained").all()
    assert figures.pictures(table) == {}
    for fmt in ("text", "md", "tex", "csv"):
        assert report.show(table, fmt)
    assert "drawn and never trained" in report.show(table, "md")


def test_a_trained_network_keeps_its_accuracy(tmp_path):
    data = replace(PHOTOS, n_classes=0)
    exp = replace(EXP, suites=(Suite(data, (Static(Tiny()),)),), recipe=Recipe(epochs=1), backends=(Float32(),), boards=())
    Runner(exp, tmp_path / "a", log=print).run()
    row = rows(tmp_path / "a" / "records", "converted").iloc[0]
    assert row["reason"] == "" and 0 <= row["accuracy"] <= 1
    foreign = replace(exp, suites=(Suite(PHOTOS, (Static(Tiny()),)),))
    Runner(foreign, tmp_path / "b", log=print).run()
    row = rows(tmp_path / "b" / "records", "converted").iloc[0]
    assert "not its classes" in row["reason"] and np.isnan(row["accuracy"])


def test_samples_that_share_a_reading_are_one_of_its_percentiles(done):
    points = [(r.board, p) for r, _ in load(done / "records", "converted").records if r.kind == "replay" for p in r.points]
    assert {board for board, _ in points} == {"host", "host, batch 4"}
    for board, point in points:
        assert point["n"] == 32 and point["n_timed"] == (32 if board == "host" else 1)


def test_a_policy_s_mean_is_over_the_exits_that_everybody_takes():
    ms = np.array(
        [[1.0, 1.0, 1.0, 4.0], [3.0, 1.0, 1.0, 4.0]]
    )  # two launches; three samples left at the first exit, one at the last
    exits = np.array([0, 0, 0, 2])
    assert mean_over(ms, exits, np.array([0.75, 0.0, 0.25])) == pytest.approx(ms.mean())
    assert mean_over(ms, exits, np.array([0.5, 0.0, 0.5])) == pytest.approx(0.5 * 4 / 3 + 0.5 * 4)
    assert mean_over(ms, exits, np.array([0.4, 0.2, 0.4])) == pytest.approx(0.5 * 4 / 3 + 0.5 * 4), (
        "nobody was timed at the second"
    )


def test_forced_shares_are_timed_end_to_end(table):
    executed = table[(table["of"] == "replay") & (table["board"] == "host")]
    assert set(executed["column"]) == {"FP32", "INT8 PTQ"} and len(executed) == 3
    for _, row in executed.iterrows():
        shares = [float(s) for s in row["exit_shares"].split("/")]
        assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=0.002) and row["spent_val"] <= 0.6
        assert row["latency_ms_mean"] > 0 and np.isnan(row["accuracy"]) and row["static_macs"] < 1


# --- suites of equal data -----------------------------------------------------------------------------------------


def test_suites_of_equal_data_are_not_compared(table):
    timed = table[(table["board"] == "host") & table["speedup_over"].ne("")]
    assert set(timed["speedup_over"]) == {
        f"Tiny{w} static FP32, {e}" for w in ("", "(width=4)") for e in ("torch", "ONNX Runtime")
    }
    for model, said in timed.groupby("model"):
        assert all(over.startswith("Tiny(width=4)") == model.startswith("Tiny(width=4)") for over in said["speedup_over"])


def test_each_suite_s_budgets_are_of_its_own_first_network():
    wide, narrow = Static(Tiny()), Static(Tiny(width=4))
    exp = replace(EXP, suites=(Suite(PHOTOS, (wide,)), Suite(PHOTOS, (narrow, Tiny()))))
    assert {exp.reference_model(c).label for c in exp.cells() if c.model == Tiny()} == {narrow.label}
    with pytest.raises(UsageError, match=r"Tiny static on .* is named twice; name it once"):
        replace(EXP, suites=(Suite(PHOTOS, (wide,)), Suite(PHOTOS, (narrow, wide))))


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_per_conversion_before_and_after(table):
    section = next(s for s in report.sections(table) if s.title == "Conversions")
    lines = [dict(zip(HEADER, line, strict=False)) for line in section.body]
    assert len(lines) == 3 * 3 and all(len(line) == len(HEADER) for line in section.body)
    exits = table[table["of"] == "measure"]
    for line, body in zip(lines, section.body, strict=True):
        assert line["input"] == "3x12x12"
        if line["options"] == "PTQ":
            assert line["engine"] == "fake-quant †" and body[-4:] == ["–"] * 4
            continue
        assert line["before"] == "torch" and line["board"] == "host"
        own = exits[(exits["model"] == line["name"]) & (exits["exit"] == (2 if line["name"] == "Tiny" else 0))]
        before, after = own[own["reference"]], own[own["backend"] == line["options"]]
        for value, shown, board in zip(
            [before, after, before, after], body[-4:], ["host, batch 4"] * 2 + ["host"] * 2, strict=True
        ):
            ms = value[value["board"] == board].iloc[0]
            wanted = f"{ms['latency_ms_p50']:.2f}" if board == "host" else f"{1e3 / ms['latency_ms_mean']:.1f} (4)"
            assert shown.removeprefix("~") == wanted


def a_row(**said):
    given = {
        "dataset": "D", "model": "net", "variant": "", "seed": 0, "backend": "B", "column": "FP32", "execution": "torch",
        "exit": 0, "board": "host", "reference": False, "simulated": False, "noisy": False, "input_shape": "3x8x8",
        "max_error": 0.25, "max_error_share": 0.01, "prediction_flips": 0.1, "answers": 7.0,
        "latency_ms_p50": 2.0, "latency_ms_mean": 4.0,
    }  # fmt: skip
    return given | said


def test_where_the_reference_cannot_run_before_is_the_same_data_type():
    def both(**said):
        machine = said.pop("machine")
        ms = said.pop("ms")
        return [a_row(board=board, latency_ms_p50=ms, latency_ms_mean=ms, **said) for board in (machine, f"{machine}, batch 8")]

    exits = [
        *both(machine="host", backend="Float32", reference=True, ms=8.0, max_error=np.nan),
        *both(machine="host", backend="Engine(of=PTQ)", column="INT8 PTQ", execution="engine", ms=2.0, noisy=True),
        a_row(board="board", backend="Other(of=Float32)", execution="other", latency_ms_p50=6.0),
        a_row(board="board", backend="Other(of=PTQ)", column="INT8 PTQ", execution="other", latency_ms_p50=3.0),
    ]
    host, fp32, int8 = conversions(exits)
    assert host == [
        *("net", "INT8 PTQ", "engine", "Engine(of=PTQ)", "3x8x8", "0.25", "1.000", "90.0", "7", "host", "torch"),
        *("125.0 (8)", "~500.0 (8)", "8.00", "~2.00"),
    ]
    assert fp32[-6:] == ["board", "other", "–", "–", "6.00", "6.00"]
    assert int8[-6:] == ["board", "other", "–", "–", "6.00", "3.00"]
    assert conversions([row for row in exits if "batch" not in row["board"]]) == []  # no throughput: another kind of experiment


def test_every_backend_s_own_last_exit_is_told():
    def of(backend, exits, **said):
        return [a_row(board=board, backend=backend, exit=k, **said) for k in range(exits) for board in ("host", "host, batch 8")]

    exits = [*of("Float32", 3, reference=True), *of("PTQ", 3, column="INT8 PTQ"), *of("Voting", 5, column="Voting INT8 PTQ")]
    assert [(line[3], line[10]) for line in conversions(exits)] == [("PTQ", "torch"), ("Voting", "torch")]


# --- images that are large enough ---------------------------------------------------------------------------------


def test_enlarged_is_torchs_bilinear_in_256_levels():
    raw, small = PHOTOS.read(), replace(SMALL, limit=120)
    x = torch.from_numpy(small._limited(SMALL.read()).x_train).double()
    wanted = torch.nn.functional.interpolate(x, size=(12, 12), mode="bilinear")
    assert raw.x_train.dtype == np.uint8 and np.abs(raw.x_train - wanted.numpy()).max() <= 0.5 + 1e-9
    assert raw.classes == tuple(map(str, range(20))) and replace(PHOTOS, n_classes=0).read().classes == SMALL.read().classes
    assert not PHOTOS.labelled and replace(PHOTOS, n_classes=0).labelled
    assert PHOTOS.label == f"{SMALL.label} at 12x12"


@dataclass(frozen=True)
class Given(DatasetSpec):
    """Floats in [0, 1], of any shape."""

    shape: tuple[int, ...] = (3, 8, 8)

    @property
    def preprocessing(self):
        return Preprocessing((0.5,), (0.25,))

    def read(self):
        x = np.random.default_rng(0).random((40, *self.shape), dtype=np.float32)
        return Raw(x, np.arange(40) % 4, x[:8], np.arange(8) % 4, tuple("abcd"))


def test_floats_are_enlarged_too():
    raw = Enlarged(Given(), size=8).read()
    assert np.abs(raw.x_train / 255 - Given().read().x_train).max() <= 0.5 / 255 + 1e-7


@pytest.mark.parametrize("of, size", [(Given((3, 8, 9)), 20), (Given(), 7)], ids=["not square", "smaller"])
def test_what_cannot_be_enlarged_is_refused(of, size):
    with pytest.raises(UsageError, match=r"images of .* are 3x8x[89] and cannot be enlarged to"):
        Enlarged(of, size=size).read()


def test_weights_that_saw_the_small_images_are_not_judged_on_the_large_ones():
    raw = SMALL.read()
    val = PHOTOS.load(0).val
    p = Predictions(np.zeros((2, len(val), 20)), val.y.numpy(), "val", val.sources, frozenset({digest(raw.x_train, raw.y_train)}))
    with pytest.raises(Leak):
        MaxProb().fit(p, None, 1.0)


# --- large inputs -------------------------------------------------------------------------------------------------


def test_large_inputs_are_predicted_in_smaller_batches(monkeypatch):
    torch.manual_seed(0)
    net = TorchNet(Tiny().build((3, 12, 12), 4), {}, simulated=False)
    x = normalise(PHOTOS.read().x_test, PHOTOS.preprocessing).numpy()[:7]
    whole, sizes = net.predict(x), []
    monkeypatch.setattr("anytime.backend.AT_ONCE", 3 * x[0].size + 1)
    start = net.start
    monkeypatch.setattr(net, "start", lambda part: sizes.append(len(part)) or start(part))
    np.testing.assert_allclose(net.predict(x), whole, atol=1e-6)
    assert sizes == [3, 3, 1]
    monkeypatch.setattr("anytime.backend.AT_ONCE", 1)
    assert net.predict(x[:2]).shape == (3, 2, 4)


@pytest.mark.parametrize("backbone", ["alexnet", "vgg11_bn"])
def test_pooling_to_the_size_that_comes_in_is_taken_out(backbone):
    net = Static(Attached(backbone, ("features.2",))).build((3, 224, 224), 5).eval()
    assert not any(isinstance(m, torch.nn.AdaptiveAvgPool2d) for m in net.modules())


def test_an_attached_network_is_called_by_its_name():
    assert Attached("resnet50", ("layer1",)).label == "resnet50" and Attached("my.nets:Big", ("a",)).label == "Big"
    assert Attached("resnet50", ("layer1",), weights="/w/r.pth", trained_on=("imagenet",)).label == "resnet50 from r.pth"


def test_an_engine_that_dies_of_a_network_is_refused_and_not_died_of():
    """DenseNets in INT8 kill OpenVINO 2026.4.1; another version may well run them."""
    spec = Attached("densenet121", ("features.denseblock1.denselayer2",))
    torch.manual_seed(0)
    model, part = spec.build((3, 32, 32), 4), Enlarged(SMALL, size=32, limit=120, calib=8, tune=4, val=8, hold=4).load(0).calib
    reestimate_bn(model, part.x)
    try:
        net = OpenVINO(of=PTQ()).compress(model.eval(), part, None)
    except Unsupported as error:
        assert "is killed by signal 11 when it compiles" in str(error)
    else:
        assert net.predict(part.x.numpy()).shape == (2, 8, 4)
    assert OpenVINO(of=Float32()).compress(model, part, None).predict(part.x.numpy()).shape == (2, 8, 4)
