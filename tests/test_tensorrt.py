"""Graphs for TensorRT: its rules over every network, each rule's saboteur, the same answers as the twin; torch2trt's arguments."""

import json
import pickle
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from anytime.backend import TorchNet
from anytime.backends.float import BFloat16, Float16, Float32
from anytime.backends.ptq import PTQ
from anytime.backends.tensorrt import TensorRT, Torch2TRT
from anytime.boards.host import Host
from anytime.engine import OnnxRuntimeGraph
from anytime.errors import Unsupported, UsageError
from anytime.model import AnytimeModel, Segment
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.iresnext import IResNeXt
from anytime.models.msdnet import MSDNet
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.peer import tensors
from anytime.quant.graph import Widths, prepared
from anytime.quant.onnx_graph import OnnxChain
from anytime.quant.place import tensorrt_exclusions
from anytime.quant.tensorrt import for_tensorrt, one_sample
from anytime.quant.tensorrt_ranges import graph_scales, tensor_scales
from anytime.quant.tensorrt_rules import broken_rules
from anytime.quant.trace import traced
from tests.test_contract_model import keepers, shape_of
from tests.worlds import Restarting, Tiny, data, trained

SMALLER = {
    IResNeXt: IResNeXt(blocks=1, width=16, cardinality=4, subnets=2), MSDNet: MSDNet(blocks=3, base=2, step=1),
    SparseResNet: SparseResNet(depth=2, exits=2), SDN: SDN("resnet20"),
}  # fmt: skip
DEEPER = ("ResNet-32", "ResNet-44", "ResNet-56", "ResNet-110")  # ResNet-20 with more of the same blocks
NETWORKS = [(Tiny(), (3, 16, 16)), (Restarting(), (3, 16, 16))]
NETWORKS += [(s, shape_of(s)) for s in (SMALLER.get(type(s), s) for s in keepers()) if s.label not in DEEPER]
RUN = (Tiny, Restarting, BLeNet, BAlexNet, MSDNet, SparseResNet, IResNeXt, SDN)  # the small ones


def settled(spec, shape):
    """An untrained network, traced, whose BatchNorms have seen some samples: else activations vanish on the way."""
    torch.manual_seed(0)
    model, x = spec.build(shape, 10), torch.rand(4, *shape)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        model.train()(x)
    return traced(model), x


def written(chain, x, fp16=False, exclusions=()):
    """(writer of its graphs for TensorRT, twin)."""
    twin = prepared(chain, x, Widths(8, 8), "s8s8", "minmax", "minmax", exclusions).freeze(round_bias=False)
    write = OnnxChain(twin, tuple(x.shape[1:]), int_bias=False).write
    return (lambda segment: for_tensorrt(write(segment), fp16)), twin


def links_of(chain):
    return [s for k in range(chain.n_exits) for s in (Segment(k, k + 1, k), Segment(k, k + 1, None), Segment(k + 1, k + 1, k))]


@pytest.mark.parametrize("spec, shape", NETWORKS, ids=lambda v: getattr(v, "label", ""))
def test_every_network_keeps_the_rules(spec, shape):
    chain, x = settled(spec, shape)
    small = isinstance(spec, RUN)
    ways = [(True, tensorrt_exclusions(chain)), (False, ())]
    for fp16, exclusions in ways if small else ways[:1]:
        write, twin = written(chain, x, fp16, exclusions)
        for segment in links_of(chain) if small else twin_plan(twin):
            graph = write(segment)
            assert broken_rules(one_sample(graph)) == []
            onnx.checker.check_model(graph, full_check=True)


@pytest.mark.parametrize("spec, shape", [n for n in NETWORKS if isinstance(n[0], RUN)], ids=lambda v: getattr(v, "label", ""))
def test_the_graphs_answer_as_the_twin(spec, shape):
    """Link by link, each from the twin's own state."""
    chain, x = settled(spec, shape)
    write, twin = written(chain, x)
    net = TorchNet(twin, {}, simulated=True)
    state = net.start(x.numpy())
    for segment in twin_plan(twin):
        entering = [t.numpy() for t in tensors(state)]
        state, want = net.step(segment, state)
        for engine, run in runners(write(segment)):
            logits, *rest = run(entering)
            # A value may fall to the other side of a step: of the integers' grids the logits see one or a few.
            assert np.abs(logits - want).max() <= 0.02 * np.abs(want).max(), (engine, segment)
            for got, wanted in zip(rest, [] if twin.restarts else tensors(state), strict=False):
                assert (np.abs(got - wanted.numpy()) > 1e-5 * np.abs(wanted.numpy()).max()).mean() < 0.02, (engine, segment)


def twin_plan(twin):
    return TorchNet(twin, {}, simulated=True).plan(range(twin.n_exits))


def runners(graph):
    newer = onnx.ModelProto.FromString(graph.SerializeToString())
    newer.opset_import[0].version, newer.ir_version = 19, 9  # the evaluator knows Q/DQ from there on; they mean the same
    names = [i.name for i in graph.graph.input]
    evaluator = ReferenceEvaluator(newer)
    yield "reference", lambda state: evaluator.run(None, dict(zip(names, state, strict=True)))
    yield "onnxruntime", OnnxRuntimeGraph(graph.SerializeToString(), 1)


# Saboteurs


class Adds(nn.Module):
    """A skip that is no convolution, one that is, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 16, 3, 1, 1), *(nn.Conv2d(16, 16, 3, 1, 1) for _ in range(3)))
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.a(x))
        y = self.relu(x + self.b(x))
        return torch.cat([self.relu(self.c(y) + self.d(x)), y], 1)


def good():
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.Conv2d(32, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    chain, x = traced(AnytimeModel([Adds()], [head])), torch.rand(4, 3, 8, 8)
    return one_sample(written(chain, x)[0](Segment(0, 1, 0)))


GOOD = good()


def node_of(model, kind, at=0):
    return [n for n in model.graph.node if n.op_type == kind][at]


def named(model, name):
    return next(n for n in model.graph.node if n.name == name)


def constant(model, name, value):
    """Put a constant, instead of one of that name."""
    for old in [c for c in model.graph.initializer if c.name == name]:
        model.graph.initializer.remove(old)
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def value(model, name):
    return next(numpy_helper.to_array(c) for c in model.graph.initializer if c.name == name)


def pair(model, name, scale=0.1, like=None):
    """Q and DQ behind a tensor; answer the float one."""
    constant(model, f"{name}/s", np.float32(scale))
    constant(model, f"{name}/z", np.int8(0))
    grid = like or [f"{name}/s", f"{name}/z"]
    model.graph.node.append(helper.make_node("QuantizeLinear", [name, *grid], [f"{name}/q"], f"{name}/q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", [f"{name}/q", *grid], [f"{name}/dq"], f"{name}/dq"))
    return f"{name}/dq"


def scale(to):
    def spoil(model):
        q = node_of(model, "QuantizeLinear")
        constant(model, q.input[1], np.full_like(value(model, q.input[1]), to))

    return spoil


def zero(to):
    def spoil(model):
        constant(model, node_of(model, "QuantizeLinear").input[2], to)

    return spoil


def moving_scale(model):
    node_of(model, "QuantizeLinear").input[1] = "x"


def unknown(model):
    node_of(model, "Relu").op_type = "Gelu"


def dilated(model):
    next(a for a in node_of(model, "MaxPool").attribute if a.name == "dilations").ints[:] = [2, 2]


def lonely_q(model):
    q = node_of(model, "QuantizeLinear")
    for n in model.graph.node:
        if n.op_type == "DequantizeLinear" and n.input[0] == q.output[0]:
            n.op_type = "Identity"


def two_scales(model):
    constant(model, "other", np.float32(0.3))
    node_of(model, "DequantizeLinear").input[1] = "other"


def integer_weights(model):
    dq = next(n for n in model.graph.node if n.name.endswith("weight/DQ"))
    constant(model, "integers", np.zeros(value(model, dq.input[0].removesuffix("/Q:out")).shape, np.int8))
    dq.input[0] = "integers"


def twice(model):
    node_of(model, "MaxPool").input[0] = pair(model, next(n for n in model.graph.node if n.op_type == "QuantizeLinear").input[0])


def float_input(model):
    conv = named(model, "heads.0.0")
    q = next(n for n in model.graph.node if n.output[0] == conv.input[0])
    conv.input[0] = next(n for n in model.graph.node if n.output[0] == q.input[0]).input[0]


def other_axis(model):
    for n in model.graph.node:
        if n.name == "heads.0.0.weight/DQ":
            n.attribute[0].i = 1


def one_for_all_channels(model):
    for name in ("heads.0.0.weight/scale", "heads.0.0.weight/zero_point"):
        constant(model, name, value(model, name)[0])


def rounded_bias(model):
    conv = named(model, "heads.0.0")
    conv.input[2] = pair(model, conv.input[2])


def made_weight(model):
    q = named(model, "heads.0.0.weight/Q")
    model.graph.node.insert(0, helper.make_node("Identity", [q.input[0]], ["made"], "made"))
    q.input[0] = "made"


def per_channel_activation(model):
    q = node_of(model, "QuantizeLinear")
    for name in q.input[1:]:
        constant(model, name, np.repeat(value(model, name), 3))


def pair_before_relu(model):
    relu = named(model, "heads.0.1")
    relu.input[0] = pair(model, relu.input[0])


def both_sides(model):
    add = node_of(model, "Add")
    at = next(i for i, name in enumerate(add.input) if name == "stages.0.b:out")
    add.input[at] = pair(model, add.input[at])


def no_side(model):
    add = node_of(model, "Add")
    for i, name in enumerate(add.input):
        dq = next(n for n in model.graph.node if n.output[0] == name)
        if dq.op_type == "DequantizeLinear":
            add.input[i] = next(n for n in model.graph.node if n.output[0] == dq.input[0]).input[0]


def concatenated_apart(model):
    concat = node_of(model, "Concat")
    constant(model, "apart", np.float32(0.7))
    dq = next(n for n in model.graph.node if n.output[0] == concat.input[0])
    dq.input[1] = "apart"


def concatenated_on(model):
    q = next(n for n in model.graph.node if n.input[0] == node_of(model, "Concat").output[0])
    constant(model, "on", np.float32(0.7))
    q.input[1] = "on"


def integers_into_if(model):
    branch(
        model,
        [helper.make_node("DequantizeLinear", [*node_of(model, "QuantizeLinear").output, "s", "z"], ["out"], "in the branch")],
    )


def integers_out_of_if(model):
    branch(model, [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["out"], "in the branch")])


def branch(model, nodes):
    constant(model, "s", np.float32(1))
    constant(model, "z", np.int8(0))
    constant(model, "condition", np.bool_(True))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    bodies = {side: helper.make_graph(nodes, side, [], [out]) for side in ("then_branch", "else_branch")}
    model.graph.node.append(helper.make_node("If", ["condition"], ["answer"], "exit", **bodies))


def opset(model):
    model.opset_import[0].version = 17


def ir(model):
    model.ir_version = 10


def any_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def integers_at_the_border(model):
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8


@pytest.mark.parametrize(
    "spoil, said",
    [
        (opset, "opset 17"),
        (ir, "IR version 10"),
        (any_batch, "x: an engine of a segment takes one sample of a static shape"),
        (integers_at_the_border, "logits: tensors at the border are float32"),
        (unknown, "the operator Gelu"),
        (dilated, "pools without dilations"),
        *((scale(bad), "scales must be float32, positive and finite") for bad in (0, -1, np.nan, np.inf)),
        (zero(np.int8(3)), "zero points must be int8 and 0"),
        (zero(np.uint8(0)), "zero points must be int8 and 0"),
        (zero(np.zeros(3, np.int8)), "1 scales and 3 zero points"),
        (moving_scale, "scale and zero point must be constants"),
        (lonely_q, "a Q must be followed by a DQ"),
        (two_scales, "a Q must be followed by a DQ of the same scale"),
        (integer_weights, "a DQ must stand behind a Q"),
        (twice, "one pair for all its readers"),
        (float_input, "heads.0.0: its weight is quantized and its input is not"),
        (other_axis, "heads.0.0.weight/DQ: weights take one scale for each channel out, along axis 0"),
        (one_for_all_channels, "heads.0.0.weight/Q: weights take one scale for each channel out"),
        (rounded_bias, "heads.0.0: TensorRT keeps biases in float"),
        (made_weight, "heads.0.0: its weight is no constant"),
        (per_channel_activation, "an activation takes one scale"),
        (pair_before_relu, "heads.0.1: a Q/DQ pair between heads.0.0 and it"),
        (both_sides, "both its inputs are quantized, so stages.0.b cannot take the addition in"),
        (no_side, "its skip side is not quantized, so stages.0.b leaves in float"),
        (concatenated_apart, "must share one scale"),
        (concatenated_on, "must share one scale"),
        (integers_into_if, "exit: TensorRT's If takes no integers across its border"),
        (integers_out_of_if, "exit: TensorRT's If takes no integers across its border, and out"),
    ],
)  # fmt: skip
def test_every_rule_catches_its_saboteur(spoil, said):
    assert broken_rules(GOOD) == []
    model = onnx.ModelProto.FromString(GOOD.SerializeToString())
    spoil(model)
    found = broken_rules(model)
    assert any(said in sentence for sentence in found), found


def test_the_good_graph_has_what_the_rules_are_about():
    kinds = [n.op_type for n in GOOD.graph.node]
    assert {"Add", "Concat", "Relu", "MaxPool", "Gemm"} <= set(kinds) and kinds.count("Add") == 2
    assert {i.type.tensor_type.elem_type for i in GOOD.graph.input} == {TensorProto.FLOAT}


def test_a_graph_of_another_target_is_refused():
    chain, x = settled(Tiny(), (3, 16, 16))
    twin = prepared(chain, x, Widths(8, 8), "u8s8", "minmax", "minmax").freeze(round_bias=True)
    with pytest.raises(Unsupported, match="state_out: .*symmetric and of 8 bits"):
        for_tensorrt(OnnxChain(twin, (3, 16, 16), int_bias=True).write(Segment(0, 1, 0)), False)


def test_relu6_is_fused_as_relu_is():
    stage = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 3), nn.ReLU6())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    chain = traced(AnytimeModel([stage], [head]))
    write, _ = written(chain, torch.rand(2, 3, 8, 8))
    graph = write(Segment(0, 1, 0)).graph
    made = {n.output[0]: n.op_type for n in graph.node}
    assert [made[n.input[0]] for n in graph.node if n.op_type == "Clip"] == ["Conv", "Conv"]


# FP16


def test_fp16_stands_in_the_graph():
    chain, _ = settled(Tiny(), (3, 16, 16))
    graph = for_tensorrt(OnnxChain(chain, (3, 16, 16), int_bias=False).write(Segment(0, 2, 1)), True)
    inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    multiplied = [n for n in inferred.node if n.op_type in ("Conv", "Gemm", "Relu", "Add", "MaxPool", "GlobalAveragePool")]
    assert len(multiplied) > 10 and {kinds[n.output[0]] for n in multiplied} == {TensorProto.FLOAT16}
    assert [n.op_type for n in inferred.node].count("Cast") == 3  # x in; logits and state out
    assert {v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.output)} == {TensorProto.FLOAT}


def test_beside_integers_only_what_they_leave_out_is_fp16():
    chain, x = settled(Tiny(), (3, 16, 16))
    write, _ = written(chain, x, True, ("heads.1.4",))
    inferred = onnx.shape_inference.infer_shapes(write(Segment(0, 2, 1)), check_type=True, strict_mode=True).graph
    half = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    assert {n.name for n in inferred.node if set(n.output) & half and n.op_type != "Cast"} == {"heads.1.4"}


# The backend


def made(backend, spec=None):
    return backend.compress(trained(spec) if spec else trained(), data().calib, None)


X = data().test.x[:64].numpy()


@pytest.mark.parametrize(
    "backend, precision, column, far",
    [
        (TensorRT(of=Float32()), "fp32", "FP32", 1e-5),
        (TensorRT(of=Float32(), precision="fp16"), "fp16", "FP16", 5e-3),
        (TensorRT(of=PTQ()), "int8", "INT8 PTQ", 2e-2),
        (TensorRT(of=PTQ(), precision="int8"), "int8", "INT8 PTQ", 2e-2),
        (TensorRT(of=Float32(), precision="int8", calibrator="minmax"), "int8", "INT8 minmax", 2e-2),
    ],
    ids=lambda v: getattr(v, "label", ""),
)
def test_each_precision(backend, precision, column, far, tmp_path):
    net = made(backend)
    assert (net.format, net.execution, net.precision, backend.column, net.simulated) == (
        "tensorrt",
        "TensorRT graph, scored by ONNX Runtime",
        precision,
        column,
        False,
    )
    twin = TorchNet(net.twin, {}, simulated=True).predict(X)
    got = net.predict(X)
    assert np.abs(got - twin).max() / np.abs(twin).max() <= far and (got.argmax(-1) == twin.argmax(-1)).mean() > 0.98
    saved = net.save(tmp_path)
    graphs = [onnx.load(p) for p in saved if p.suffix == ".onnx"]
    assert len(graphs) == 3 and [broken_rules(g) for g in graphs] == [[], [], []]
    assert [i.type.tensor_type.shape.dim[0].dim_value for i in graphs[1].graph.input] == [1]
    kinds = {c.data_type for g in graphs for c in g.graph.initializer}
    assert (TensorProto.FLOAT16 in kinds) == (precision != "fp32" and not net.calibrated)
    assert np.array_equal(pickle.loads(pickle.dumps(net)).predict(X[:3]), net.predict(X[:3]))
    assert net.executed(X[:1]) is None


def test_what_a_board_gets_is_the_whole_network(tmp_path):
    """The files, one sample after another, answer as predict does."""
    net = made(TensorRT(of=PTQ()))
    want = net.predict(X[:2], batch=1)
    for i in (0, 1):
        state = [X[i : i + 1]]
        for k, segment in enumerate(net.plan([0, 1, 2])):
            logits, *state = OnnxRuntimeGraph(net.files(segment)["onnx"], 1)(state)
            assert np.allclose(logits[0], want[k, i], atol=1e-4)


@pytest.mark.parametrize(
    "spec, calibrator, largest", [(None, "minmax", True), (Restarting(), "minmax", True), (Restarting(), "entropy2", False)]
)
def test_a_calibrator_gets_the_range_of_every_tensor(spec, calibrator, largest):
    """By hand from the tensors themselves: ONNX Runtime writes out every one of them over the calibration images."""
    net = made(TensorRT(of=Float32(), calibrator=calibrator), spec)
    x = data().calib.x.numpy()
    state = [x]
    for segment in net.plan(range(net.n_exits)):
        files = net.files(segment)
        scales = json.loads(files["scales.json"])
        graph = onnx.ModelProto.FromString(files["onnx"])
        made_here = [*(i.name for i in graph.graph.input), *(o for n in graph.graph.node for o in n.output)]
        assert list(scales) == made_here and all(value > 0 for value in scales.values())
        for info in (*graph.graph.input, *graph.graph.output):
            info.type.tensor_type.shape.dim[0].dim_param = "batch"
        entering = [i.name for i in graph.graph.input]
        del graph.graph.output[:]
        graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in made_here if n not in entering)
        names = [o.name for o in graph.graph.output]
        out = dict(zip(names, OnnxRuntimeGraph(graph.SerializeToString(), 1)(state), strict=True))
        for name, values in out.items():
            peak = np.abs(values).max() / 127
            assert scales[name] == pytest.approx(peak, rel=1e-4) if largest else scales[name] <= peak * 1.001
        if not net.twin.restarts and "state_out" in out:
            state = [out["state_out"]]


def test_inner_tensors_share_the_scale_of_what_they_are_made_of():
    graph = helper.make_graph(
        [helper.make_node("Slice", ["a"], ["b"]), helper.make_node("Pad", ["b"], ["c"]), helper.make_node("Relu", ["c"], ["d"])],
        "g", [helper.make_tensor_value_info("a", 1, [1])], [],
    )  # fmt: skip
    assert graph_scales(graph, {"c": 0.5}, [2.0]) == {"a": 2.0, "b": 2.0, "c": 0.5, "d": 0.5}


def test_every_entering_tensor_has_a_scale():
    """Head-only segments and states of several tensors."""
    chain, x = settled(MSDNet(blocks=2, base=1, step=1), (3, 32, 32))
    net = TensorRT(of=Float32(), calibrator="minmax").compress(chain, SimpleNamespace(x=x), None)
    scales = tensor_scales(chain, x, "minmax")
    before = json.loads(net.files(Segment(0, 1, None))["scales.json"])
    for segment in (Segment(1, 1, 0), Segment(1, 2, None), Segment(1, 2, 1)):
        read = json.loads(net.files(segment)["scales.json"])
        assert [read[f"state_{i}"] for i in range(3)] == [before[f"state_{i}_out"] for i in range(3)]
    assert scales["x"] == pytest.approx(x.abs().max().item() / 127)


@pytest.mark.parametrize(
    "backend, error, said",
    [
        (TensorRT(of=PTQ(weight_bits=4)), Unsupported, "8-bit integers, not W4A8"),
        (TensorRT(of=PTQ(), precision="fp16"), UsageError, "is INT8 already and cannot take precision='fp16'"),
        (TensorRT(of=PTQ(), calibrator="minmax"), UsageError, "cannot take calibrator='minmax'"),
        (TensorRT(of=Float32(), precision="int8"), UsageError, r"has no ranges: take PTQ\(8\)"),
        (TensorRT(of=Float32(), precision="fp16", calibrator="minmax"), UsageError, "is for INT8, not precision='fp16'"),
        (TensorRT(of=BFloat16()), Unsupported, "FP16 is precision='fp16'"),
        (TensorRT(of=Float16()), Unsupported, "FP16 is precision='fp16'"),
        (TensorRT(of=TensorRT(of=Float32())), Unsupported, "not TensorRT"),
    ],
    ids=lambda v: getattr(v, "label", ""),
)  # fmt: skip
def test_what_cannot_be_is_refused(backend, error, said):
    with pytest.raises(error, match=said):
        made(backend)


def test_this_machine_does_not_time_it():
    assert "not tensorrt" in Host().why_not(made(TensorRT(of=Float32())))


# torch2trt


class Built(nn.Module):
    """As torch2trt's TRTModule: answers like the link that it was made of."""

    def __init__(self, link):
        super().__init__()
        self.link = link

    def forward(self, x):
        return self.link(x)


@pytest.fixture
def nvidias(monkeypatch):
    """Modules with NVIDIA's names; the calls that torch2trt gets."""
    calls = []

    def torch2trt(link, inputs, **said):
        calls.append((link, inputs, said))
        return Built(link)

    parts = {
        "tensorrt": {
            "__version__": "8.5.2",
            "CalibrationAlgoType": SimpleNamespace(ENTROPY_CALIBRATION_2="e2", MINMAX_CALIBRATION="mm"),
        },
        "torch2trt": {"torch2trt": torch2trt},
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("anytime.backends.tensorrt.DEVICE", "cpu")
    return calls


def test_torch2trt_gets_its_keyword_arguments(nvidias, tmp_path):
    backend = Torch2TRT(fp16_mode=True, int8_mode=True, int8_calib_algorithm="minmax", max_workspace_size=1 << 20)
    net = made(backend)
    assert len(nvidias) == 6  # three stages, three heads
    link, (example,), said = nvidias[2]
    assert isinstance(link, nn.Module) and example.shape[0] == 1
    data_set = said.pop("int8_calib_dataset")
    assert len(data_set) == len(data().calib.x) and data_set[0][0].shape == example.shape[1:]  # what enters, one by one
    assert said == {
        "fp16_mode": True, "int8_mode": True, "int8_calib_algorithm": "mm", "max_workspace_size": 1 << 20,
        "strict_type_constraints": False, "max_batch_size": 1,
    }  # fmt: skip
    want = TorchNet(trained(), {}, simulated=True).predict(X)
    assert np.allclose(net.predict(X), want, atol=1e-4) and (net.format, net.execution) == ("torch2trt", "torch2trt")
    assert len(net.save(tmp_path)) == 6 and backend.column == "INT8 minmax"
    assert "not torch2trt" in Host().why_not(net)


def test_torch2trt_floats_are_not_calibrated(nvidias):
    made(Torch2TRT())
    assert "int8_calib_dataset" not in nvidias[0][2] and nvidias[0][2]["int8_calib_algorithm"] == "e2"


def test_torch2trt_is_refused_by_name_on_tensorrt_11(nvidias, monkeypatch):
    backend = Torch2TRT()
    if not torch.cuda.is_available():
        assert "needs CUDA" in backend.why_not()
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.4.0.106")
    assert "cannot work on TensorRT 11.4.0.106" in backend.why_not() and "IInt8Calibrator" in backend.why_not()


def test_torch2trt_without_its_packages():
    if "tensorrt" not in sys.modules:
        assert "tensorrt is not installed here" in Torch2TRT().why_not()


def test_torch2trt_takes_one_tensor_between_stages(nvidias):
    chain, x = settled(MSDNet(blocks=2, base=1, step=1), (3, 32, 32))
    with pytest.raises(Unsupported, match=r"heads.0: torch2trt takes one tensor between stages, this network hands on 3"):
        Torch2TRT().compress(chain, SimpleNamespace(x=x), None)
