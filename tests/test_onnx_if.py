"""The single file answers as its policy does, in integers, and runs only the branch that is taken."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from anytime.board import board_test
from anytime.engine import EXACT_INT8
from anytime.errors import Unsupported
from anytime.onnx_if import IR, OPSET, OUTPUTS, single_file
from anytime.onnx_net import OnnxNet, written
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.fixed import Fixed
from anytime.policies.patience import Patience
from anytime.quant.graph import Widths, prepared
from anytime.quant.trace import traced
from tests.worlds import Restarting, Tiny, data, trained

SHAPE = (3, 16, 16)
SPECS = (Tiny(), Restarting())


@lru_cache
def net(spec=SPECS[0], integers=True):
    """The trained network as ONNX Runtime runs it, segment by segment, and what it says about the test part."""
    chain = traced(trained(spec))
    if integers:
        chain = prepared(trained(spec), data().calib.x, Widths(8, 8), "u8s8", "mse", "mse").freeze(round_bias=True)
    made = OnnxNet(trained(spec), {}, lambda segment: written(chain, SHAPE, segment), {})
    return made, np.concatenate([made.predict(x[None]) for x in X], axis=1)


X = data().test.x[:60].numpy()


def saved(made, logits, policy, **metadata):
    said = {"label": policy.label, **board_test(policy, logits)}
    plan = made.plan(said["uses"])
    segments = [onnx.ModelProto.FromString(made.graph(segment)) for segment in plan]
    return single_file(segments, [s.head for s in plan], said, metadata)


def session(model, profile=""):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry(*EXACT_INT8)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def middling(policy, logits):
    """Thresholds between the scores of these samples, so that many leave at every exit."""
    scores = policy._scores(logits[:-1])
    return tuple(float(np.median(s)) for s in scores)


def policies(logits):
    for kind in (MaxProb, Entropy):
        yield kind(thresholds=middling(kind(), logits))
        yield kind(thresholds=(0.0,) * (len(logits) - 1))
        yield kind(thresholds=(9.0,) * (len(logits) - 1))
    for k in range(len(logits)):
        yield Fixed(exit=k)


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "float"])
@pytest.mark.parametrize("spec", SPECS, ids=["chain", "restarts"])
def test_it_answers_as_the_policy(spec, integers):
    made, logits = net(spec, integers)
    mixed = 0
    for policy in policies(logits):
        exits = policy.exits(logits)
        mixed += len(set(exits)) == made.n_exits
        run = session(saved(made, logits, policy)).run
        for i, x in enumerate(X):
            label, confidence, exit, said = run(None, {"x": x[None]})
            expected = policy.answer(logits, exits)[i]
            assert exit.tolist() == [exits[i]] and label.tolist() == [expected.argmax()]
            # The same kernels: of integers bit for bit, of floats as far as another layout of the weights adds up alike.
            np.testing.assert_allclose(said[0], expected, rtol=0, atol=0 if integers else 1e-5)
            p = np.exp(expected - expected.max())
            np.testing.assert_allclose(confidence, [(p / p.sum()).max()], rtol=1e-5)
    assert mixed >= 2, "no policy here leaves everywhere"


def nodes_of(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def scopes(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from scopes(attribute.g)


def outside(graph):
    """Initializers that a branch reads and does not hold."""
    for inner in list(scopes(graph))[1:]:
        held = {c.name for c in inner.initializer}
        other = {c.name for scope in scopes(graph) if scope is not inner for c in scope.initializer}
        yield from (name for node in inner.node for name in node.input if name in other - held)


def test_every_branch_holds_its_own_weights_and_every_name_is_its_own():
    made, logits = net()
    model = saved(made, logits, MaxProb(thresholds=(0.5, 0.5)), classes=json.dumps(["a", "b"]))
    onnx.checker.check_model(model, full_check=True)
    assert (model.opset_import[0].version, model.ir_version) == (OPSET, IR) == (13, 7)
    assert not list(outside(model.graph))
    names = [name for node in nodes_of(model.graph) for name in node.output]
    assert len(names) == len(set(names))
    called = {node.name for node in nodes_of(model.graph)}
    assert {"stages.0.0", "exit_1/If", "exit_1/GreaterOrEqual", "heads.2.3"} <= called, called
    assert [i.name for i in model.graph.input] == ["x"] and tuple(o.name for o in model.graph.output) == OUTPUTS
    assert {p.key: p.value for p in model.metadata_props} == {"classes": '["a", "b"]'}


def test_weights_outside_a_branch_are_caught():
    made, logits = net()
    model = saved(made, logits, MaxProb(thresholds=(0.5, 0.5)))
    inner = list(scopes(model.graph))[2]
    moved = inner.initializer.pop()
    model.graph.initializer.append(moved)
    assert list(outside(model.graph)) == [moved.name] * sum(moved.name in n.input for n in inner.node) != []


def executed(model, x, folder):
    """Kernels that ran: name -> operator."""
    run = session(model, f"{folder}/profile")
    run.run(None, {"x": x})
    events = json.loads(Path(run.end_profiling()).read_text())
    return {
        e["name"].removesuffix("_kernel_time"): e["args"]["op_name"]
        for e in events
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")
    }


def layers(kernels, kinds):
    """Layers of the network that ran in kernels of these kinds."""
    return {name.split("_token")[0] for name, op in kernels.items() if op in kinds and name.startswith(("stages.", "heads."))}


INT8, ANY = ("QLinearConv", "QGemm"), ("QLinearConv", "QGemm", "Conv", "FusedConv", "Gemm", "FusedGemm")


def test_what_is_skipped_does_not_run_and_what_runs_is_quantized(tmp_path):
    made, logits = net()
    early, deep = (saved(made, logits, MaxProb(thresholds=(t, t))) for t in (0.0, 2.0))
    at_once = executed(early, X[:1], tmp_path)
    assert all(name.split(".")[1] == "0" for name in layers(at_once, ANY)), at_once
    whole = executed(deep, X[:1], tmp_path)
    assert {name.split(".")[1] for name in layers(whole, ANY)} == {"0", "1", "2"}
    assert layers(whole, ANY) == layers(whole, INT8) and len(layers(whole, INT8)) == 8


@pytest.mark.parametrize("policy", [Patience(patience=1), MaxProb(thresholds=(0.5, 0.5), temperatures=(1.0, 2.0, 1.0))])
def test_other_policies_are_refused(policy):
    made, logits = net()
    with pytest.raises(Unsupported, match="does not fit into a single file"):
        saved(made, logits, policy)
