"""TFLite as a backend: what its interpreter answers, in which numbers, and how states cross its files."""

import pickle
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

from anytime.backend import Segment, TorchNet
from anytime.backends.float import Float16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qkeras import QKeras
from anytime.backends.tflite import TFLite
from anytime.boards.host import Host
from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.tflite_net import Port, moved
from tests.worlds import Residual, data, trainer


@pytest.fixture(autouse=True)
def installed():
    if reason := TFLite(of=QKeras()).why_not():
        pytest.skip(reason)


LAYERS = ("stages.0.0", "stages.1.0.a", "stages.1.0.b", "heads.0.1", "heads.1.2")


def small():
    torch.manual_seed(0)
    return AnytimeModel(
        stages=[nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)), nn.Sequential(Residual(8), nn.MaxPool2d(2))],
        heads=[
            nn.Sequential(nn.Flatten(), nn.Linear(512, 4)),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        ],
    ).eval()


@lru_cache
def made(of, form="int8"):
    calib = data().calib
    return TFLite(of=of, form=form).compress(small(), replace(calib, x=calib.x[:32], y=calib.y[:32]), trainer())


def images(n=40):
    return data().test.x[:n].numpy()


def far(net, twin):
    """Largest difference of logits, as a share of the largest logit, at each exit."""
    got, want = net.predict(images()), TorchNet(twin, {}, simulated=True).predict(images())
    return np.abs(got - want).max((1, 2)) / np.abs(want).max()


def test_its_own_calibration_is_near_the_float_network():
    net = made(Float32())
    assert (far(net, net.twin) < 0.03).all() and (far(net, net.twin) > 0).all()
    assert net.bits == dict.fromkeys(LAYERS, (8, 8)) and net.executed(images(1)) == dict.fromkeys(LAYERS, "int8")
    assert not net.simulated and "float network" in net.facts["twin"]
    assert TFLite(of=Float32()).column == "INT8 TFLite PTQ"


@pytest.mark.parametrize("of", [PTQ(8, 8), QKeras(8, 8, epochs=0)], ids=lambda v: v.label)
def test_grids_that_are_there_are_taken_over(of):
    net = made(of)
    assert (far(net, net.twin) < 0.02).all()  # of which half a 255th is the rounding of the logits
    assert net.executed(images(1)) == dict.fromkeys(LAYERS, "int8") and net.bits == dict.fromkeys(LAYERS, (8, 8))
    assert "twin" not in net.facts and "TensorFlow" in net.facts["library"] and TFLite(of=of).column == of.column
    grids = {round(float(m.scale), 9) for m in net.twin.modules() if type(m).__name__ == "FakeQuant"}
    state, _ = net.step(Segment(0, 1, None), net.start(images(2)))
    assert state[0].dtype == np.int8 and round(net._between(1)[0].scale, 9) in grids


@pytest.mark.parametrize("form, limit", [("fp32", 1e-5), ("fp16", 2e-3), ("dynamic", 0.03)])
def test_other_forms(form, limit):
    net = made(Float32(), form)
    assert (far(net, net.twin) <= limit).all()
    assert net.bits.get("heads.0.1") == {"fp32": None, "fp16": (16, 32), "dynamic": (8, 8)}[form]
    assert net.executed(images(1))["heads.0.1"] == ("int8" if form == "dynamic" else "fp32")
    state, _ = net.step(Segment(0, 1, None), net.start(images(2)))
    assert state[0].dtype == np.float32


def test_plans_links_and_batches_agree():
    net = made(Float32())
    got, step = net.predict(images(9)), 2 * net._engine(Segment(0, 1, 0)).outputs[0].scale
    assert np.abs(net.predict(images(9), batch=2) - got).max() <= step
    other = pickle.loads(pickle.dumps(net))
    assert np.array_equal(other.predict(images(9)), got)
    assert {Segment(0, 1, None), Segment(1, 1, 0), Segment(1, 2, None), Segment(2, 2, 1)} < set(other._files)
    state = other.start(images(9))
    for k in range(2):
        state, none = other.step(Segment(k, k + 1, None), state)
        kept, logits = other.step(Segment(k + 1, k + 1, k), state)
        assert none is None and np.abs(logits - got[k]).max() <= step
    state = net.start(images(9))
    for segment in net.plan([1]):
        state, logits = net.step(segment, state)
    assert np.abs(logits - got[1]).max() <= step


def test_files_are_small_and_timed(tmp_path):
    net, whole = made(Float32()), made(Float32(), "fp32")
    (tmp_path / "fp32").mkdir()
    sizes = [sum(p.stat().st_size for p in n.save(f)) for n, f in ((net, tmp_path), (whole, tmp_path / "fp32"))]
    assert sorted(p.name for p in tmp_path.glob("*.tflite")) == ["link_0.tflite", "link_1.tflite"]
    assert 0 < sizes[0] < sizes[1]
    board = Host(launches=1, warmup=1)
    assert board.why_not(net) is None
    (timing,) = board.time([net], images(3))
    assert timing.stage_ms.shape == (2, 3) and (timing.stage_ms > 0).all() and (timing.head_ms > 0).all()


def test_what_it_cannot_run_is_refused():
    train, calib = trainer(), data().calib
    for backend, said in (
        (TFLite(of=PTQ(4, 8)), "W4A8"),
        (TFLite(of=PTQ(8, 8), form="fp16"), "form='fp16' of W8A8"),
        (TFLite(of=OnnxRuntime(of=Float32())), "ONNX Runtime"),
        (TFLite(of=Float16()), "W16A16"),
    ):
        with pytest.raises(Unsupported, match=said):
            backend.compress(small(), calib, train)
    with pytest.raises(Unsupported, match="no samples"):
        TFLite(of=Float32()).compress(small(), replace(calib, x=calib.x[:0], y=calib.y[:0]), train)


def test_a_layer_that_it_quantizes_all_the_same_is_not_called_float():
    with pytest.raises(Unsupported, match="also quantizes what was left in float"):
        made(TFLite(of=PTQ(keep_float=("stages.1.0.b",))))


def test_grids_are_kept_or_rounded_to():
    eighth, same, other = Port(0, 0.125, 3), Port(7, 0.125 * (1 + 1e-7), 3), Port(1, 0.25, -1)
    counts = np.array([[-128, 3, 4, 127]], np.int8)
    assert moved(counts, eighth, same) is counts
    assert np.array_equal(moved(counts, eighth, None), [[-16.375, 0, 0.125, 15.5]])
    assert np.array_equal(moved(counts, eighth, other), [[-66, -1, 0, 61]])  # -66.5 and -0.5 to even
    assert np.array_equal(moved(np.array([99.0, -99, 0.5], np.float32), None, eighth), [127, -128, 7])
    floats = np.zeros(3, np.float32)
    assert moved(floats, None, Port(0, 0.0, 0)) is floats
