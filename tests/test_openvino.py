"""OpenVINO: the same graphs as under ONNX Runtime, in the precision that was asked for; what torch.compile refuses."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from anytime import cpu
from anytime.backend import Backend
from anytime.backends.float import BFloat16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.backends.torch_compile import TorchCompile
from anytime.dataset import Part
from anytime.engine import OnnxRuntimeGraph, OpenVINOGraph
from anytime.errors import Unsupported, UsageError
from anytime.model import AnytimeModel, Segment
from anytime.onnx_net import OpenVINONet, written
from anytime.quant import onnx_graph
from anytime.quant.fake import FakeQuant
from tests.worlds import data, trained, trainer

pytestmark = pytest.mark.skipif(OpenVINO(of=Float32()).why_not() is not None, reason=str(OpenVINO(of=Float32()).why_not()))


def made(backend):
    return backend.compress(trained(), data().calib, None)


@pytest.fixture(scope="module")
def integers():
    return made(OpenVINO(of=PTQ()))


X = data().test.x[:32].numpy()


def test_both_engines_run_the_same_graphs_but_for_the_additions_that_openvino_fuses(integers):
    other = made(OnnxRuntime(of=PTQ()))
    skipped = {f"stages.1.quant__0_b/{name}" for name in ("Q", "DQ", "scale", "zero_point")}  # the residual branch's own sum
    for segment in (*integers.plan([0, 1, 2]), Segment(0, 3, 2)):
        here, there = (onnx.ModelProto.FromString(net.graph(segment)).graph for net in (integers, other))
        border = ("Identity", "Transpose")  # the layout of the state is the engine's own
        names = [[n.name for n in g.node if n.op_type not in border] for g in (here, there)]
        assert names[0] == [name for name in names[1] if name not in skipped]
        held = [{i.name: i.raw_data for i in g.initializer} for g in (here, there)]
        assert held[0] == {name: data for name, data in held[1].items() if name not in skipped}
        assert len(names[1]) - len(names[0]) == 2 * (segment.first <= 1 < segment.stop)
    assert ("saturates" in integers.facts) == cpu.saturates() and "saturates" not in other.facts
    if cpu.saturates():
        return  # it gives other answers, and has said so
    ours, theirs = integers.predict(X), other.predict(X)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.98
    # One step of an integer grid may fall to the other side.
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max()


def test_threads_do_not_take_each_others_answers(integers):
    graph = OpenVINOGraph(integers.graph(Segment(0, 3, 2)), 1)
    alone, wrong = [graph([X[i : i + 1]])[0] for i in range(8)], []

    def ask(i):
        wrong.extend(i for _ in range(100) if not np.array_equal(graph([X[i : i + 1]])[0], alone[i]))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(8)))
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_weights_of_seven_bits_saturate_on_no_cpu():
    seven = PTQ(weight_bits=7, edge_bits=7)
    net, twin = made(OpenVINO(of=seven)), seven.compress(trained(), data().calib, None, "u8s8-fused")
    assert set(net.bits.values()) == {(7, 8)} and "saturates" not in net.facts
    assert set(net.executed(X[:1]).values()) == {"int8"}
    assert (net.predict(X).argmax(-1) == twin.predict(X).argmax(-1)).mean() >= 0.98
    ours, exact = made(OnnxRuntime(of=seven)).predict(X), seven.compress(trained(), data().calib, None, "u8s8").predict(X)
    assert np.array_equal(ours.argmax(-1), exact.argmax(-1))


def test_seven_bits_of_dorefa_use_eight_and_are_said_to_saturate(monkeypatch):
    monkeypatch.setattr(cpu, "saturates", lambda: True)
    dorefa, lsq = (
        OpenVINO(of=QAT(weight_bits=7, edge_bits=7, epochs=1, learns=how)).compress(trained(), data().calib, trainer())
        for how in ("dorefa", "lsq")
    )
    assert set(dorefa.bits.values()) == {(7, 8)} and "saturates" in dorefa.facts and "saturates" not in lsq.facts


@pytest.mark.skipif(cpu.saturates(), reason="OpenVINO's INT8 saturates on a CPU without VNNI")
def test_the_twin_rounds_what_openvino_rounds(integers):
    """It adds what a convolution makes without rounding it, quantizer or not; a twin that rounds there is further from it."""
    twins = [PTQ().compress(trained(), data().calib, None, target) for target in ("u8s8-fused", "u8s8")]
    nets = (integers, OpenVINONet(twins[1].twin, twins[1].bits, partial(written, twins[1].twin, X.shape[1:]), {}))
    near, far = (np.abs(net.predict(X)[1:] - twin.predict(X)[1:]) > 1e-5 for net, twin in zip(nets, twins, strict=True))
    # One value that falls to the other side of a step of the grid moves all logits of its sample; other roundings move most samples'.
    assert near.mean() < 0.1 and far.mean() > 0.5


def test_the_state_crosses_segments_in_u8(integers):
    state = integers.start(X)
    for segment in integers.plan([0, 1])[:1]:
        state, _ = integers.step(segment, state)
    assert [part.dtype for part in state] == [np.uint8]
    compiled = integers._graphs[Segment(0, 1, 0)]._any.compiled
    assert [port.get_element_type().to_string() for port in compiled.outputs] == ["f32", "u8"]


def test_a_fused_prefix_says_what_its_links_say(integers):
    links = integers.predict(X)
    _, logits = integers.step(Segment(0, 3, 2), integers.start(X))
    assert np.array_equal(logits, links[2])


def test_a_sample_alone_is_the_same_as_in_a_batch(integers):
    """Bit by bit, ties of the input's grid too: pixels lie on them."""
    step = next(m.scale for m in integers.twin.modules() if isinstance(m, FakeQuant)).item()
    ties = ((np.floor(X / step) + 0.5) * step).astype(np.float32)
    for x in (X, ties):
        assert np.array_equal(integers.predict(x, batch=1), integers.predict(x, batch=13))
    floats = made(OpenVINO(of=Float32()))
    assert np.allclose(floats.predict(X, batch=1), floats.predict(X, batch=13), atol=1e-4)


def test_what_was_answered_stays_as_it_was(integers):
    """Its own buffers are written over by the next sample; what it has handed out must not be."""
    (first, *_), (second, *_) = (integers.plan([0, 1, 2]),) * 2
    state, logits = integers.step(first, integers.start(X[:1]))
    kept = [part.copy() for part in (*state, logits)]
    integers.step(second, integers.start(X[1:2]))
    assert all(np.array_equal(a, b) for a, b in zip(kept, (*state, logits), strict=True))


def test_what_ran_is_read_back_by_layer(integers):
    assert set(integers.executed(X[:1]).values()) == {"int8"}
    assert set(made(OpenVINO(of=Float32())).executed(X[:1]).values()) == {"fp32"}
    left_out = made(OpenVINO(of=PTQ(keep_float=("heads.1.0",))))
    assert [layer for layer, kind in left_out.executed(X[:1]).items() if kind != "int8"] == ["heads.1.0"]


def test_the_precision_is_said_and_never_the_engines_default():
    hint = "INFERENCE_PRECISION_HINT"
    has_bf16 = cpu.has_any(cpu.BF16_KERNELS)
    for backend, said in ((Float32(), "f32"), *([(BFloat16(), "bf16")] if has_bf16 else [])):
        net = made(OpenVINO(of=backend))
        net.step(net.plan([2])[0], net.start(X[:1]))
        assert net._graphs[Segment(0, 3, 2)]._single.compiled.get_property(hint).to_string() == said
    if has_bf16:
        assert "bf16" in net.executed(X[:1]).values()
    else:
        with pytest.raises(Unsupported, match="where the CPU multiplies it, BF16, not W16A16"):
            made(OpenVINO(of=BFloat16()))


def test_a_peers_graphs_are_taken_as_they_are():
    theirs = OrtQuantizer().compress(trained(), data().calib, None)
    net = OpenVINO(of=OrtQuantizer()).compress(trained(), data().calib, None)
    assert (net.execution, net.bits) == ("OpenVINO", theirs.bits)
    if not cpu.saturates():
        assert (net.predict(X).argmax(-1) == theirs.predict(X).argmax(-1)).mean() >= 0.95


def test_other_widths_are_refused():
    with pytest.raises(Unsupported, match="W4A8.*score PTQ.* without the engine"):
        made(OpenVINO(of=PTQ(weight_bits=4)))
    with pytest.raises(Unsupported, match="Foreign brings its own engine .its own engine.: leave OpenVINO out"):
        made(OpenVINO(of=Foreign()))
    with pytest.raises(Unsupported, match="torch.compile runs floating point, not PTQ"):
        made(TorchCompile(of=PTQ()))


class Foreign(Backend):
    """Neither torch's nor a graph."""

    def compress(self, model, calib, trainer, target="u8s8"):
        return SimpleNamespace(execution="its own engine", facts={})


@pytest.mark.parametrize("graph", [OnnxRuntimeGraph, OpenVINOGraph])
def test_a_file_that_is_no_graph_fails_at_once(graph):
    with pytest.raises(Exception, match="(?i)protobuf|model|read"):
        graph(b"no graph", 1)


def test_a_wrong_shape_is_not_repeated_into_the_right_one(integers):
    run = OpenVINOGraph(integers.graph(Segment(0, 1, 0)), 1)
    for x in (np.zeros((1, 3, 16, 16), np.float32), np.zeros((2, 3, 16, 16), np.float32)):
        run([x])
        with pytest.raises(UsageError, match="an input of shape .* where the graph takes"):
            run([x[:, :, :1, :1]])
        with pytest.raises(TypeError):
            run([x.astype(np.float64)])


def test_memory_that_ends_in_silence_is_found_out(integers, monkeypatch):
    """A batch for which OpenVINO found no memory was answered with the one before, and no error."""
    run = OpenVINOGraph(integers.graph(Segment(0, 1, 0)), 1)
    right = run([X[:4]])
    request = run._any

    class Stale:
        def __getattr__(self, name):
            return getattr(real, name)

        def infer(self):
            return dict(enumerate(right))

    real = request._request
    with monkeypatch.context() as without:
        without.setattr(request, "_request", Stale())
        with pytest.raises(MemoryError, match="no memory for 16 samples at once"):
            run([X[:16]])
        assert not request._inputs
    assert all(np.array_equal(a, b) for a, b in zip(run([X[:4]]), right, strict=True))


@pytest.mark.parametrize("x", [X[:2, :, :8], X[:2, 0], X[:2, :1]], ids=lambda x: str(x.shape))
def test_onnx_runtime_says_both_shapes(x):
    run = OnnxRuntimeGraph(made(OnnxRuntime(of=Float32())).graph(Segment(0, 1, 0)), 1)
    with pytest.raises(UsageError) as caught:
        run([x])
    assert str(caught.value) == f"an input of shape {x.shape} where the graph takes ('batch', 3, 16, 16)"
    with pytest.raises(Exception, match="(?i)data type"):
        run([X[:2].astype(np.float64)])


def test_threads_are_taken(integers):
    integers.open(2)
    integers.step(integers.plan([0])[0], integers.start(X[:1]))
    assert integers._graphs[Segment(0, 1, 0)]._single.compiled.get_property("INFERENCE_NUM_THREADS") == 2
    integers.open(1)
    assert not integers._graphs
    torch.set_num_threads(1)


class Dense(nn.Module):
    """Two layers of a DenseNet: what they concatenate is concatenated again."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 8, 3, padding=1, bias=False)) for c in (16, 24)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def dense():
    torch.manual_seed(0)
    head = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(32, 3, 16, 16)
    model = AnytimeModel([nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Dense())], [head]).eval()
    return model, Part(x, torch.zeros(32, dtype=torch.int64), "calib", "d")


def test_a_densenet_runs_in_integers():
    model, part = dense()
    net = OpenVINO(of=PTQ()).compress(model, part, None)
    with torch.inference_mode():
        want = net.twin(part.x).numpy()
    assert cpu.saturates() or np.abs(net.predict(part.x.numpy()) - want).max() <= 0.05 * np.abs(want).max()


def test_a_network_that_kills_openvino_is_refused(monkeypatch):
    """A DenseNet whose BatchNorm is computed in float; a later OpenVINO may live, and then this test and what it tests can go."""
    monkeypatch.setattr(onnx_graph, "channelwise", lambda module, grid, channels: module)
    with pytest.raises(Unsupported, match="killed by signal 11 when it compiles this network"):
        OpenVINO(of=PTQ()).compress(*dense(), None)
