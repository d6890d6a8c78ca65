"""Other libraries' quantizers: what they make is what they make alone, what they leave in float is seen, how they fail is said."""

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from anytime import onnx_net, peer
from anytime.backend import Bits, Segment, TorchNet
from anytime.backends import nncf as nncf_keeper
from anytime.backends import torchao as torchao_keeper
from anytime.backends.nncf import NNCF
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.backends.torchao import TorchAO
from anytime.cost import account
from anytime.dataset import Part
from anytime.engine import EXACT_INT8
from anytime.errors import AnytimeError, Collapsed, Unsupported, UsageError
from anytime.layers import BasicBlock
from anytime.model import AnytimeModel
from anytime.models.msdnet import MSDNet
from anytime.models.sparse_resnet import SparseResNet
from anytime.onnx_net import multiplied, written
from anytime.quant.trace import traced
from anytime.scoring import only_int8
from tests.worlds import Restarting, data, trained

PEERS = (OrtQuantizer(), NNCF(), TorchAO(observer="minmax"))  # the histograms are slow
SHAPE = (3, 16, 16)


if reason := next((reason for backend in PEERS if (reason := backend.why_not())), None):
    pytest.skip(reason, allow_module_level=True)


def calib(x):
    return Part(x, torch.zeros(len(x), dtype=torch.int64), "calib", "d")


def small():
    """One exit over a residual block that calls its ReLU twice, as torchvision's and ours do."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return AnytimeModel([nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), BasicBlock(8, 8, 1, nn.Identity()))], [head]).eval()


every_peer = pytest.mark.parametrize("backend", PEERS, ids=lambda b: type(b).__name__)
every_peer_of_its_own = pytest.mark.parametrize(
    "backend", (*PEERS[:2], replace(PEERS[2], own_relus=True)), ids=lambda b: type(b).__name__
)


# What they make ------------------------------------------------------------------------------------------------


def test_onnx_runtimes_quantizer_is_called_as_anybody_would_call_it():
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, x = small(), torch.randn(32, *SHAPE)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": x.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, done = (f"{folder}/{name}.onnx" for name in ("plain", "ready", "done"))
        Path(plain).write_bytes(written(traced(model), SHAPE, Segment(0, 1, 0)))
        quant_pre_process(plain, ready)
        quantize_static(ready, done, Reader(), activation_type=QuantType.QUInt8)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(*EXACT_INT8)
        session = onnxruntime.InferenceSession(done, options, providers=["CPUExecutionProvider"])
        want = session.run(None, {"x": x.numpy()})[0]
    net = OrtQuantizer().compress(model, calib(x), None)
    assert np.array_equal(net.predict(x.numpy())[0], want)
    assert set(net.executed(x[:1].numpy()).values()) == {"int8"} and set(net.bits.values()) == {Bits(8, 8)}


def test_a_segment_is_calibrated_on_the_states_that_enter_it():
    model, part = trained(), data().calib
    with torch.inference_mode():
        state = model.stages[0](part.x)
    lo, hi = min(0.0, float(state.min())), max(0.0, float(state.max()))
    net = OrtQuantizer().compress(model, part, None)
    graph = onnx.ModelProto.FromString(net.graph(Segment(1, 2, 1))).graph
    (scale,) = (onnx.numpy_helper.to_array(c) for c in graph.initializer if c.name == "state_scale")
    assert np.isclose(scale, (hi - lo) / 255, rtol=1e-5)


@pytest.mark.parametrize("first, stop, head", [(0, 1, 0), (1, 2, 1), (0, 1, None), (2, 2, 1)])
def test_what_enters_a_segment_of_stages_that_restart(first, stop, head):
    model, x = traced(trained(Restarting())), data().calib.x[:8]
    got = peer.Calibration(model, x).entering(Segment(first, stop, head))
    with torch.inference_mode():
        want = x if stop > first else model.stages[1](x)  # a head alone reads what its stage made of x
    assert torch.equal(got, want)


def test_states_of_several_samples_batches_are_joined():
    x = torch.rand(300, 3, 16, 16)  # more than one batch of 256
    model = traced(SparseResNet(depth=2, widths=(4, 8), exits=2).build(SHAPE, 4))
    got = peer.tensors(peer.Calibration(model, x).entering(Segment(1, 2, 1)))
    with torch.inference_mode():
        want = model.stages[0](x)
    assert len(got) == len(want) > 1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


class Pair(nn.Module):
    """Two tensors: what it was given (of two: the first), convolved, and their sum."""

    def __init__(self, c_in, several):
        super().__init__()
        self.conv, self.relu, self.several = nn.Conv2d(c_in, 8, 3, padding=1), nn.ReLU(), several

    def forward(self, state):
        x = state[0] if self.several else state
        y = self.relu(self.conv(x))
        return y, (y + state[1] if self.several else y)


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.rest = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, state):
        return self.rest(state[1])


def pairs(shape):
    return AnytimeModel([Pair(3, False), Pair(8, True), Pair(8, True)], [Second() for _ in range(3)])


def sparse(shape):
    return SparseResNet(depth=2, widths=(4, 8), exits=2).build(shape, 4)


def msdnet(shape):
    return MSDNet(blocks=2, growth=2).build(shape, 4)


@pytest.mark.filterwarnings("ignore:ONNX Runtime fails to make products of this graph exact:RuntimeWarning")
@pytest.mark.parametrize(
    "backend, build, shape",
    [
        *((backend, pairs, SHAPE) for backend in PEERS),
        (OrtQuantizer(), sparse, SHAPE),  # the others go through these too, in 10 s to minutes
        (OrtQuantizer(), msdnet, (3, 32, 32)),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_states_of_several_tensors_go_through_segments(backend, build, shape):
    torch.manual_seed(0)
    model, x = build(shape).train(), torch.randn(32, *shape)
    with torch.no_grad():
        for _ in range(4):
            model(x)  # statistics of BatchNorm, so that activations are of a trained network's size
        want = model.eval()(x).numpy()
    net = backend.compress(model, calib(x), None)
    got = net.predict(x.numpy())
    assert np.abs(got - want).max() <= 0.3 * np.abs(want).max()
    last = net.n_exits - 1
    _, logits = net.step(Segment(0, last + 1, last), net.start(x.numpy()))  # fused, as a plan that skips exits asks for it
    assert np.abs(logits - got[last]).max() <= 0.2 * np.abs(got).max()
    assert set(net.bits) == {layer.layer for layer in account(net, shape).layers} and set(net.bits.values()) == {Bits(8, 8)}


def test_torchao_on_a_layer_that_nobody_reads():
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.used(x), self.unused(x)

    class First(Second):
        def forward(self, state):
            return self.rest(state[0])

    net = PEERS[2].compress(AnytimeModel([Extra()], [First()]).eval(), calib(torch.randn(4, *SHAPE)), None)
    assert set(net.bits) == {"stages.0.used", "heads.0.rest.2"}


@every_peer_of_its_own
def test_another_process_can_make_segments_that_nobody_asked_for_before(backend):
    model, x = small(), torch.randn(8, *SHAPE)
    net = backend.compress(model, calib(x), None)
    other = pickle.loads(pickle.dumps(net))
    state, none = other.step(Segment(0, 1, None), other.start(x.numpy()))
    _, logits = other.step(Segment(1, 1, 0), state)
    assert none is None and np.abs(logits - net.predict(x.numpy())[0]).max() <= 0.1 * np.abs(logits).max()


@every_peer_of_its_own
def test_the_record_says_whose_it_is(backend):
    net = backend.compress(small(), calib(torch.randn(4, *SHAPE)), None)
    library = {"OrtQuantizer": "onnxruntime", "NNCF": "nncf", "TorchAO": "torchao"}[type(backend).__name__]
    assert net.facts["library"].startswith(f"{library} ") and net.facts["twin"].startswith("the float network")
    assert "keep_float=()" in net.facts["knobs"] and "float32" in net.facts["segments"]


KNOBS = (
    *(OrtQuantizer(observer="percentile", percentile=99.0), OrtQuantizer(per_channel=True), OrtQuantizer(reduce_range=True)),
    *(NNCF(preset="mixed"), NNCF(fast_bias_correction=False), NNCF(subset_size=2)),
    *(NNCF(ranges="minmax"), TorchAO(observer="moving_average", own_relus=True), TorchAO(reduce_range=True, own_relus=True)),
)


@pytest.mark.parametrize("backend", KNOBS, ids=lambda b: b.label)
def test_a_knob_reaches_the_library(backend):
    torch.manual_seed(0)
    model, x = small(), torch.randn(24, *SHAPE) * torch.rand(24, 1, 1, 1)
    plain = type(backend)(**({"own_relus": True} if isinstance(backend, TorchAO) else {}))
    got, default = (b.compress(model, calib(x), None).predict(x.numpy()) for b in (backend, plain))
    with torch.no_grad():
        want = model(x).numpy()
    assert not np.array_equal(got, default)
    assert np.abs(got - want).max() <= 0.6 * np.abs(want).max()


def test_onnx_runtimes_entropy_is_min_max():
    """128 bins for 128 levels leave one range to choose from: as a trial it is a wasted one."""
    x = torch.randn(24, *SHAPE)
    entropy, minmax = (
        OrtQuantizer(observer=o).compress(small(), calib(x), None).predict(x.numpy()) for o in ("entropy", "minmax")
    )
    assert np.array_equal(entropy, minmax)


# What they leave in float --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [OrtQuantizer, NNCF, TorchAO], ids=lambda b: b.__name__)
def test_a_layer_left_in_float_is_seen(backend):
    kept = "stages.1.0.a"
    net = backend(keep_float=(kept,)).compress(trained(), data().calib, None)
    cost = account(net, SHAPE)
    macs = {layer.layer: layer.macs for layer in cost.layers}
    assert set(macs) - set(net.bits) == {kept}
    assert {layer.layer: layer.bops for layer in cost.layers}[kept] == macs[kept] * 32 * 32
    if backend is OrtQuantizer:
        executed = net.executed(data().test.x[:1].numpy())
        assert [layer for layer, kind in executed.items() if kind != "int8"] == [kept]
        share = only_int8(cost, executed).macs[-1] / cost.macs[-1]
        assert share == pytest.approx(1 - macs[kept] / sum(macs.values()))


def test_nncf_without_onnx_runtimes_pass_would_run_in_float():
    net = NNCF().compress(small(), calib(torch.randn(8, *SHAPE)), None)
    x = torch.randn(1, *SHAPE).numpy()
    convolutions = [name for name in net.bits if name != "heads.0.2"]
    executed = net.executed(x)
    assert {executed[name] for name in convolutions} == {"int8"}
    assert executed["heads.0.2"] == "fp32"  # no quantizer behind the logits
    net.float_biases = False
    assert set(net.executed(x).values()) == {"fp32"}


def test_bits_are_read_back_from_graphs():
    """Ours, whose bits are known without reading them."""
    net = OnnxRuntime(of=PTQ(keep_float=("heads.1.0",))).compress(trained(), data().calib, None)
    found = {}
    for segment in net.plan(range(net.n_exits)):
        found |= multiplied(net.graph(segment))
    assert found == net.bits and "heads.1.0" not in found
    assert not multiplied(written(traced(trained()), SHAPE, Segment(0, 1, 0)))


@pytest.mark.parametrize("backend", [OrtQuantizer, NNCF, TorchAO], ids=lambda b: b.__name__)
def test_a_layer_that_is_not_there_cannot_be_kept(backend):
    with pytest.raises(UsageError, match=r"no layer 'stages.1.0.c'; did you mean .*'stages.1.0.[ab]'"):
        backend(keep_float=("stages.1.0.c",)).compress(trained(), data().calib, None)


# How they fail -------------------------------------------------------------------------------------------------


def test_torchao_on_a_relu_that_is_called_twice():
    part = calib(torch.randn(8, *SHAPE))
    with pytest.raises(AnytimeError, match=r"torchao fails on stages.0, heads.0: .* ReLU .* 2.relu .*own_relus=True$") as failed:
        TorchAO().compress(small(), part, None)
    assert not isinstance(failed.value, Unsupported)  # a fail row, not a skip
    model = small()
    net = TorchAO(own_relus=True).compress(model, part, None)
    assert set(net.bits.values()) == {Bits(8, 8)} and len(net.bits) == 4
    with torch.no_grad():
        want = model(part.x).numpy()
    assert np.array_equal(TorchNet(net.twin, {}, simulated=True).predict(part.x.numpy()).argmax(-1), want.argmax(-1))
    assert np.abs(net.predict(part.x.numpy()) - want).max() <= 0.1 * np.abs(want).max()


def test_relus_of_their_own_change_no_number():
    chain, x = traced(small()), torch.randn(4, *SHAPE)
    own = torchao_keeper.own_relus(chain)
    assert torchao_keeper._repeated_relus(chain) and not torchao_keeper._repeated_relus(own)
    with torch.no_grad():
        assert torch.equal(chain(x), own(x))


@every_peer
def test_one_sample_is_enough_and_none_is_not(backend):
    net = backend.compress(trained(), calib(data().calib.x[:1]), None)
    assert np.isfinite(net.predict(data().test.x[:3].numpy())).all() and len(net.bits) == 8
    with pytest.raises(Unsupported, match="no samples: give the data set a calib part"):
        backend.compress(trained(), calib(torch.zeros(0, *SHAPE)), None)


@every_peer
def test_nan_is_said(backend):
    x = data().calib.x[:4].clone()
    x[2, 0, 3, 3] = torch.nan
    with pytest.raises(Unsupported, match="NaN or infinity enters stages.0, heads.0 in calibration"):
        backend.compress(trained(), calib(x), None)


@every_peer_of_its_own
def test_a_constant_input_and_a_channel_of_zeros(backend):
    """A library may choose any grid for what never varies; it must not give NaN or leave the layer out."""
    model = small()
    with torch.no_grad():
        model.stages[0][0].weight[3] = 0
        model.stages[0][0].bias[3] = 0
    net = backend.compress(model, calib(torch.zeros(4, *SHAPE)), None)
    assert np.isfinite(net.predict(np.zeros((2, *SHAPE), np.float32))).all() and len(net.bits) == 4


def test_a_wrapper_around_a_peer_is_refused():
    with pytest.raises(
        Unsupported, match=r"OrtQuantizer brings its own graphs and engine \(ONNX Runtime\): leave OnnxRuntime out"
    ):
        OnnxRuntime(of=OrtQuantizer()).compress(small(), calib(torch.randn(4, *SHAPE)), None)
    for backend in (NNCF(), TorchAO()):
        with pytest.raises(Unsupported, match="not s8s8"):
            backend.compress(small(), calib(torch.randn(4, *SHAPE)), None, "s8s8")


def test_what_a_library_raises_and_says(capsys):
    before = logging.root.manager.disable
    said = r"^it fails on stages.0, stages.1, heads.1: KeyError: 'a'$"
    with pytest.raises(AnytimeError, match=said) as failed, peer.library("it", Segment(0, 2, 1)):
        print("Calibrating ...")
        print("careful", file=sys.stderr)
        logging.getLogger("it").warning("deprecated")
        raise KeyError("a")
    assert isinstance(failed.value.__cause__, KeyError) and logging.root.manager.disable == before
    assert capsys.readouterr() == ("", "")
    with pytest.raises(Unsupported, match="^ours$"), peer.library("it", Segment(0, 1, None)):
        raise Unsupported("ours")


def test_they_are_silent_and_tell_nobody(tmp_path):
    """In a fresh process, where libraries say what they say at import; without pytest, with which NNCF does not report."""
    code = """
import torch
from torch import nn
from unittest.mock import MagicMock
from anytime.backends.nncf import NNCF
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.torchao import TorchAO
from anytime.dataset import Part
from anytime.model import AnytimeModel

stage, head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
part = Part(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64), "calib", "d")
for backend in (NNCF(), TorchAO(), OrtQuantizer(observer="percentile")):
    backend.compress(AnytimeModel([stage], [head]).eval(), part, None).predict(part.x.numpy())
from nncf.telemetry import wrapper
assert isinstance(wrapper.telemetry, MagicMock), "NNCF reports its runs"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "intel").exists()


@pytest.mark.parametrize(
    "keeper, backend, said",
    [
        (onnx_net, OrtQuantizer(), "pip install onnx onnxruntime"),
        (nncf_keeper, NNCF(), r"^nncf, onnx, onnxruntime is not installed: pip install -e '.\[peers\]'"),
        (torchao_keeper, TorchAO(), r"torchao is not installed: pip install -e '.\[peers\]'"),
    ],
)
def test_what_is_missing_is_said_with_its_command(monkeypatch, keeper, backend, said):
    monkeypatch.setattr(keeper, "find_spec", lambda name: None)
    assert re.search(said, backend.why_not())


def test_inductor_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert TorchAO().why_not() is None and "no-such-compiler" in TorchAO(compile=True).why_not()


# Compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++")
def test_inductor_runs_eight_bits():
    """On one exit: it takes a second for every segment and batch size."""
    model, x = small(), torch.randn(12, *SHAPE)
    net, reference = (
        TorchAO(observer="minmax", own_relus=True, compile=c).compress(model, calib(x), None) for c in (True, False)
    )
    assert (net.simulated, net.execution, "simulated" in net.facts) == (False, "Inductor", False)
    assert (reference.simulated, reference.executed(x.numpy())) == (True, None) and reference.facts["simulated"]
    got, want = net.predict(x.numpy()), reference.predict(x.numpy())
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
    executed = net.executed(x.numpy())
    assert set(executed) == set(net.bits) and set(executed.values()) == {"int8"}


@every_peer_of_its_own
def test_an_exit_that_has_fallen_to_chance_fails_the_network_and_is_named(backend):
    model, part = trained(), data().calib
    x = part.x.clone()
    x[-1] *= 1e6  # one broken image takes all of the range that the others need
    with pytest.raises(
        Collapsed, match=r"exit (1|2) has fallen to chance: \d.* in float .*behind stages\.[01], heads\.[01]: set"
    ):
        backend.compress(model, replace(part, x=x), None)
