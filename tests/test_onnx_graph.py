"""The graphs that are written: the same answers as the chain, in ONNX's own reference evaluator and in ONNX Runtime."""

from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from anytime import cpu
from anytime.backend import TorchNet
from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.engine import EXACT_INT8, OnnxRuntimeGraph
from anytime.errors import Unsupported
from anytime.layers import MixedPool2d, ZeroPadShortcut
from anytime.model import AnytimeModel, Segment
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.quant.graph import Widths, prepared, traced
from anytime.quant.onnx_graph import IR, OPSET, OnnxChain
from tests.worlds import Tiny, data, trained, trainer


def chains():
    model = trained()
    yield "float", traced(model), True
    for target in ("u8s8", "s8s8"):
        net = prepared(model, data().calib.x, Widths(8, 8), target, "mse", "mse")
        yield target, net.freeze(round_bias=target == "u8s8"), target == "u8s8"


CHAINS = {name: (chain, int_bias) for name, chain, int_bias in chains()}
SHAPE = (3, 16, 16)


def session_of(proto):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT_INT8)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def runners(proto):
    newer = onnx.ModelProto.FromString(proto.SerializeToString())
    newer.opset_import[0].version = 19  # the evaluator knows Q/DQ from 19 on; what 13 says of these operators is the same
    newer.ir_version = 9
    yield "reference", ReferenceEvaluator(newer).run
    session = session_of(proto)
    yield "onnxruntime", session.run


@pytest.mark.parametrize("name", CHAINS)
def test_link_by_link_the_graphs_say_what_the_chain_says(name):
    chain, int_bias = CHAINS[name]
    x = data().test.x[:4]
    with torch.inference_mode():
        want = chain(x).numpy()
    writer = OnnxChain(chain, SHAPE, int_bias)
    states = {"reference": x.numpy(), "onnxruntime": x.numpy()}
    for k in range(chain.n_exits):
        proto = writer.write(Segment(k, k + 1, k))
        for engine, run in runners(proto):
            logits, *rest = run(None, {proto.graph.input[0].name: states[engine]})
            # One step of an integer grid may fall to the other side; the float chain has no steps.
            assert np.abs(logits - want[k]).max() <= (1e-4 if name == "float" else 0.05 * np.abs(want[k]).max()), engine
            if rest:
                states[engine] = rest[0]
                assert rest[0].dtype == {"float": np.float32, "u8s8": np.uint8, "s8s8": np.int8}[name]


class Called(nn.Module):
    """Its functions are called as its modules are."""

    def __init__(self):
        super().__init__()
        self.a, self.relu, self.cat = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        y = self.a(x)
        return self.relu(self.cat(torch.cat([nn.functional.relu(y), y], axis=1)))


def test_calls_that_are_named_as_modules_are_told_apart():
    torch.manual_seed(0)
    plain = AnytimeModel([Called()], [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))]).eval()
    x = data().test.x[:4]
    proto = OnnxChain(traced(plain), SHAPE, True).write(Segment(0, 1, 0))
    for _, run in runners(proto):
        assert np.allclose(run(None, {proto.graph.input[0].name: x.numpy()})[0], plain(x)[0].detach().numpy(), atol=1e-5)


def test_a_bias_that_no_int32_holds_is_refused_and_does_not_wrap():
    net = prepared(trained(), data().calib.x, Widths(8, 8), "u8s8", "mse", "mse")
    layer = dict(net.layers())["stages.2.0"]
    with torch.no_grad():
        layer.weight_scale[0], layer.bias[0] = 1e-12, 1.0
    with pytest.raises(Unsupported, match="stages.2.0: its bias is more steps than 32 bits hold"):
        OnnxChain(net.freeze(round_bias=False), SHAPE, True).write(Segment(0, 3, 2))


def test_a_fused_prefix_is_bit_by_bit_the_links_in_turn():
    chain, int_bias = CHAINS["u8s8"]
    writer = OnnxChain(chain, SHAPE, int_bias)
    x = data().test.x[:8].numpy()

    def run(segment, value):
        proto = writer.write(segment)
        session = session_of(proto)
        return session.run(None, {proto.graph.input[0].name: value})

    (state,) = run(Segment(0, 1, None), x)
    (state,) = run(Segment(1, 2, None), state)
    apart = run(Segment(2, 3, 2), state)[0]
    assert np.array_equal(apart, run(Segment(0, 3, 2), x)[0])


@pytest.mark.parametrize("has", [{"sse2", "avx512_vnni"}, {"sse2", "avx2"}, set()], ids=["VNNI", "none", "unknown"])
def test_only_a_cpu_without_vnni_is_told_to_widen(monkeypatch, has):
    """Told so, ONNX Runtime takes its slow kernels on a CPU of AVX512-VNNI too."""
    monkeypatch.setattr(cpu, "flags", lambda: frozenset(has))
    chain, int_bias = CHAINS["u8s8"]
    graph = OnnxRuntimeGraph(OnnxChain(chain, SHAPE, int_bias).write(Segment(0, 1, 0)).SerializeToString(), threads=1)
    options = graph._session.get_session_options()
    if "avx512_vnni" in has:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(EXACT_INT8[0])
    else:
        assert options.get_session_config_entry(EXACT_INT8[0]) == EXACT_INT8[1]


@pytest.mark.parametrize("inside", ["flat", "If"])
def test_products_that_overflow_16_bits_are_added_exactly(inside):
    """On an x86 CPU without VNNI the engine's own defaults saturate: 2 x 255 x 127 > 32,767."""
    rng = np.random.default_rng(0)
    weights, x = rng.choice([-127, 127], (64, 4)).astype(np.int8), rng.integers(200, 256, (32, 64)).astype(np.float32)
    arrays = {"s": np.float32(1), "z": np.uint8(0), "w": weights, "ws": np.float32(1), "wz": np.int8(0)}
    initializers = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        onnx.helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        onnx.helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    taken, given = value("x", shape=[None, 64]), value("y", shape=[None, 4])
    if inside == "If":
        branch = onnx.helper.make_graph(nodes, "branch", [], [given], initializers)
        nodes = [
            onnx.helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            onnx.helper.make_node("Cast", ["top"], ["some"], to=onnx.TensorProto.BOOL),
            onnx.helper.make_node("If", ["some"], ["y"], then_branch=branch, else_branch=branch),
        ]
        initializers = []
    graph = onnx.helper.make_graph(nodes, "g", [taken], [given], initializers)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR)
    assert np.array_equal(OnnxRuntimeGraph(proto.SerializeToString(), 1)([x])[0], x @ weights)


@pytest.mark.parametrize("name", CHAINS)
def test_channels_last_between_segments_changes_no_bit(name):
    chain, int_bias = CHAINS[name]
    x = data().test.x[:4].numpy()
    found = []
    for channels_last in (False, True):
        writer = OnnxChain(chain, SHAPE, int_bias, channels_last)
        state, logits, shapes = x, [], []
        for k in range(chain.n_exits):
            proto = writer.write(Segment(k, k + 1, k))
            onnx.checker.check_model(proto, full_check=True)
            session = session_of(proto)
            z, *rest = session.run(None, {proto.graph.input[0].name: state})
            logits.append(z)
            if rest:
                (state,) = rest
                shapes.append(state.shape)
        found.append((np.stack(logits), shapes))
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1] == [(4, 8, 8, 8), (4, 8, 4, 4)]
    # Floats stay as they are: ONNX Runtime has a layout of its own for them.
    assert found[1][1] == ([(4, 8, 8, 8), (4, 8, 4, 4)] if name == "float" else [(4, 8, 8, 8), (4, 4, 4, 8)])


def test_what_nobody_reads_is_not_in_the_graph():
    net = OnnxRuntime(of=PTQ()).compress(trained(), data().calib, None)
    first, last = net.plan([1, 2])
    assert (first, last) == (Segment(0, 2, 1), Segment(2, 3, 2))
    for segment, heads in ((first, {"1"}), (last, {"2"}), (net.plan([2])[0], {"2"})):
        nodes = onnx.ModelProto.FromString(net.graph(segment)).graph.node
        assert {n.name.split(".")[1] for n in nodes if n.name.startswith("heads.")} == heads
        assert {int(n.name.split(".")[1]) for n in nodes if n.name.startswith("stages.")} == set(
            range(segment.first, segment.stop)
        )


@pytest.mark.parametrize("target", ["float", "u8s8", "s8s8"])
@pytest.mark.parametrize("layer", [ZeroPadShortcut(2, 3, 1), ZeroPadShortcut(1, 0, 2), MixedPool2d(4)], ids=str)
def test_shared_layers_say_what_torch_says(layer, target):
    # No ReLU before it: the grid's zero lies between its ends, and a pad must write that integer.
    stage = nn.Sequential(nn.Conv2d(3, 8, 3), layer)
    chain = AnytimeModel([stage], [nn.Sequential(nn.Flatten(), nn.LazyLinear(4))]).eval()
    x = torch.randn(16, *SHAPE)
    chain(x)
    integers = prepared(chain, x, Widths(8, 8), "s8s8" if target == "s8s8" else "u8s8", "minmax", "minmax")
    chain = traced(chain) if target == "float" else integers.freeze(round_bias=target == "u8s8")
    with torch.inference_mode():
        want = chain(x)[0].numpy()
    proto = OnnxChain(chain, SHAPE, target == "u8s8").write(Segment(0, 1, 0))
    for engine, run in runners(proto):
        (logits,) = run(["logits"], {"x": x.numpy()})
        assert np.abs(logits - want).max() <= (1e-5 if target == "float" else 0.02 * np.abs(want).max()), engine
    pads = [len(node.input) for node in proto.graph.node if node.op_type == "Pad"]
    assert set(pads) <= {3 if target == "u8s8" else 2}  # a zero point to write: in integers on CPU engines, else between Q and DQ


def test_it_loads_on_the_boards():
    proto = OnnxChain(*[CHAINS["u8s8"][0], SHAPE, True]).write(Segment(0, 1, 0))
    assert (proto.opset_import[0].version, proto.ir_version) == (OPSET, IR) == (13, 7)
    onnx.checker.check_model(proto, full_check=True)
    assert {"stages.0.0", "heads.0.2"} <= {n.name for n in proto.graph.node}  # readable in a viewer


def test_every_layer_runs_in_eight_bits():
    for spec, shape in ((BLeNet(), (1, 28, 28)), (BAlexNet(), (3, 32, 32)), (Tiny(), SHAPE)):
        model = spec.build(shape, 10).eval()
        part = data().calib.__class__(torch.rand(8, *shape), torch.zeros(8, dtype=torch.int64), "calib", "d")
        net = OnnxRuntime(of=PTQ()).compress(model, part, None)
        assert set(net.executed(part.x[:1].numpy()).values()) == {"int8"}


def test_a_layer_that_fell_out_of_int8_is_named():
    net = OnnxRuntime(of=PTQ(keep_float=("heads.1.0",))).compress(trained(), data().calib, None)
    net.bits["heads.1.0"] = (8, 8)  # as if it had been promised
    executed = net.executed(data().test.x[:1].numpy())
    assert [layer for layer, kind in executed.items() if kind != "int8"] == ["heads.1.0"]


@pytest.mark.parametrize("of", [Float32(), PTQ()])
def test_a_linear_layer_over_rows(of):
    """As many rows as there are, and integers where they are asked for."""
    rows = AnytimeModel([nn.Sequential(nn.Linear(16, 4), nn.ReLU())], [nn.Sequential(nn.Flatten(), nn.Linear(192, 4))]).eval()
    net, x = OnnxRuntime(of=of).compress(rows, data().calib, trainer()), data().calib.x[:5].numpy()
    want = TorchNet(net.twin, {}, True).predict(x)
    assert np.abs(net.predict(x) - want).max() <= (1e-5 if of == Float32() else 0.01 * np.abs(want).max())
    assert set(net.executed(x[:1]).values()) == {"fp32" if of == Float32() else "int8"}


class Named(nn.Module):
    """A module that bears the name which torch.fx gives the second call of another one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act, self.act_1 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ReLU6()

    def forward(self, x):
        return self.act_1(self.b(self.act(self.a(self.act(x)))))


def test_a_second_call_takes_no_other_modules_name():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = AnytimeModel([Named()], [head]).eval()
    proto = OnnxChain(traced(model), SHAPE, int_bias=True).write(Segment(0, 1, 0))
    x = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        assert np.allclose(session_of(proto).run(None, {"x": x.numpy()})[0], model(x)[0], atol=1e-5)
