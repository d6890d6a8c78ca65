"""One ONNX file for a whole policy: segments in nested ``If`` nodes, each with its weights inside its own branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from anytime.errors import Unsupported

OPSET, IR = 13, 7
OUTPUTS = ("label", "confidence", "exit", "logits")
TESTS = ("by_max_probability", "by_entropy")

Nodes = list[onnx.NodeProto]


def single_file(
    segments: Sequence[onnx.ModelProto], heads: Sequence[int], policy: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """One graph out of those of a plan, batch 1: input "x", outputs label, confidence, exit [1] and logits [1, K].

    ``heads`` are the exits of the ``segments``; ``policy`` is what a manifest says of it (export.board_test), None for the only
    exit. The exit tests compute in double, as stops.py does. Initializers lie in the branch that reads them: in the outer
    graph, ONNX Runtime lays out and fuses nothing in the branch, which then takes 1.6 times as long.
    Unsupported for a policy other than by largest probability, by entropy or fixed.
    """
    tests = [] if policy is None else _tests(policy)
    if len(tests) != len(segments) - 1:
        raise Unsupported(f"{len(segments)} segments and {len(tests)} exit tests: one less than segments are needed")
    nodes, constants = _scope(segments, heads, tests, 0, {segments[0].graph.input[0].name: "x"}, OUTPUTS)
    entering = segments[0].graph.input[0]
    shape = [1, *(d.dim_value for d in entering.type.tensor_type.shape.dim[1:])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "anytime", inputs, _infos(OUTPUTS, _classes(segments[0])), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="anytime")
    model.ir_version = IR
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model


def _tests(policy: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The test and the threshold of every exit but the last."""
    tests = []
    for k, said in enumerate(policy["tests"]):
        if said["test"] not in TESTS or policy["temperatures"] or policy["answer"] != "exit taken":
            raise Unsupported(
                f"{policy['label']} does not fit into a single file, which tests the largest probability or the entropy of one "
                "exit: export the folder, or choose MaxProb, Entropy or no policy"
            )
        tests.append((said["test"], float(said["arguments"]["thresholds"][k])))
    return tests


def _scope(
    segments: Sequence[onnx.ModelProto], heads: Sequence[int], tests: Sequence[tuple[str, float]], i: int,
    known: Mapping[str, str], outputs: Sequence[str],
) -> tuple[Nodes, list[onnx.TensorProto]]:  # fmt: skip
    """Nodes and initializers from segment ``i`` on; ``known``: names of its inputs outside, ``outputs``: what to call the answer."""
    at, exit = f"exit_{heads[i] + 1}", heads[i]
    nodes, constants, (logits, *state) = renamed(segments[i].graph, at, known)
    nodes += _probabilities(logits, at)
    if i == len(segments) - 1:
        return nodes + _answer(logits, at, exit, outputs, with_confidence=True), constants
    tested, more = _test(*tests[i], at)
    n_classes = _classes(segments[0])
    leaving = [f"{at}/{name}" for name in OUTPUTS]
    sure = tests[i][0] == "by_max_probability"
    then = helper.make_graph(
        _answer(logits, at, exit, leaving, with_confidence=not sure), f"leave at exit {exit + 1}", [], _infos(leaving, n_classes)
    )
    after = segments[i + 1].graph.input
    names = ["x"] if after[0].name == "x" else state
    later = [f"after_{at}/{name}" for name in OUTPUTS]
    inner, weights = _scope(segments, heads, tests, i + 1, dict(zip((t.name for t in after), names, strict=True)), later)
    go_on = helper.make_graph(inner, f"go on after exit {exit + 1}", [], _infos(later, n_classes), weights)
    branch = helper.make_node("If", [f"{at}/leaves"], list(outputs), f"{at}/If", then_branch=then, else_branch=go_on)
    return [*nodes, *tested, branch], [*constants, *more]


def renamed(graph: onnx.GraphProto, at: str, known: Mapping[str, str]) -> tuple[Nodes, list[onnx.TensorProto], list[str]]:
    """A segment's nodes, initializers and the names of its outputs, so that it can stand beside others: "{at}/" before what is
    not named after a layer; ``known``: what its inputs are called there."""
    ends = {o.name for o in graph.output}
    # An Identity in front of an output only renames.
    passed = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity" and n.output[0] in ends}

    def new(name: str) -> str:
        name = passed.get(name, name)
        as_it_is = not name or name.startswith(("stages.", "heads."))
        return known.get(name, name if as_it_is else f"{at}/{name}")

    nodes = []
    for node in graph.node:
        if node.output[0] not in passed:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = new(node.name)
            copy.input[:], copy.output[:] = [new(n) for n in node.input], [new(n) for n in node.output]
            nodes.append(copy)
    constants = []
    for constant in graph.initializer:
        own = onnx.TensorProto()
        own.CopyFrom(constant)
        own.name = new(constant.name)
        constants.append(own)
    return nodes, constants, [new(o.name) for o in graph.output]


def _probabilities(logits: str, at: str) -> Nodes:
    return [
        helper.make_node("Cast", [logits], [f"{at}/double"], f"{at}/Cast", to=TensorProto.DOUBLE),
        helper.make_node("Softmax", [f"{at}/double"], [f"{at}/probabilities"], f"{at}/Softmax", axis=-1),
    ]


def _largest(at: str) -> onnx.NodeProto:
    return helper.make_node("ReduceMax", [f"{at}/probabilities"], [f"{at}/largest"], f"{at}/ReduceMax", axes=[1], keepdims=0)


def _test(test: str, threshold: float, at: str) -> tuple[Nodes, list[onnx.TensorProto]]:
    """Nodes that say whether it leaves, "{at}/leaves"."""
    if test == "by_max_probability":
        bound = numpy_helper.from_array(np.array([threshold], np.float64), f"{at}/threshold")
        decide = helper.make_node("GreaterOrEqual", [f"{at}/largest", bound.name], [f"{at}/leaves"], f"{at}/GreaterOrEqual")
        return [_largest(at), decide], [bound]
    # sum(p log p), the entropy's negative, in one product.
    bound = numpy_helper.from_array(np.array([[-threshold]], np.float64), f"{at}/threshold")
    return [
        helper.make_node("LogSoftmax", [f"{at}/double"], [f"{at}/logs"], f"{at}/LogSoftmax", axis=-1),
        helper.make_node("Gemm", [f"{at}/probabilities", f"{at}/logs"], [f"{at}/minus_entropy"], f"{at}/Gemm", transB=1),
        helper.make_node("Greater", [f"{at}/minus_entropy", bound.name], [f"{at}/leaves"], f"{at}/Greater"),
    ], [bound]


def _answer(logits: str, at: str, exit: int, outputs: Sequence[str], with_confidence: bool) -> Nodes:
    label, confidence, exit_out, logits_out = outputs
    number = numpy_helper.from_array(np.array([exit], np.int64), exit_out)
    return [
        *([_largest(at)] if with_confidence else []),
        helper.make_node("ArgMax", [logits], [label], f"{at}/ArgMax", axis=1, keepdims=0),
        helper.make_node("Cast", [f"{at}/largest"], [confidence], f"{at}/confidence", to=TensorProto.FLOAT),
        helper.make_node("Constant", [], [exit_out], f"{at}/Constant", value=number),
        helper.make_node("Identity", [logits], [logits_out], f"{at}/Identity"),
    ]


def _infos(names: Sequence[str], n_classes: int) -> list[onnx.ValueInfoProto]:
    kinds = [(TensorProto.INT64, [1]), (TensorProto.FLOAT, [1]), (TensorProto.INT64, [1]), (TensorProto.FLOAT, [1, n_classes])]
    return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in zip(names, kinds, strict=True)]


def _classes(segment: onnx.ModelProto) -> int:
    return int(segment.graph.output[0].type.tensor_type.shape.dim[-1].dim_value)
