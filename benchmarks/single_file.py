"""Is the single file with ``If`` as fast as graphs without? Early exit against the first segment alone, full depth against flat ones.

    python benchmarks/single_file.py [NETWORK ...] [--rounds N]

Networks in INT8 with weights as they are drawn, calibrated on noise: kernels take as long over these as over others. One thread,
batch 1, all graphs of a network in turn; medians over rounds of the process CPU time of a run, in us, and their ratios.
Flat graphs: the whole network with its last head only, and with every head (what runs at full depth). Between
"If, leaves there" and the first segment lie a decision and an answer.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import onnx
import torch
from keep import keep
from onnx import helper

from anytime.backend import Segment
from anytime.engine import OnnxRuntimeGraph
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.sdn import SDN
from anytime.onnx_if import IR, OPSET, renamed, single_file
from anytime.onnx_net import OnnxNet, written
from anytime.quant.graph import Widths, prepared

NETWORKS = {
    "B-LeNet": (BLeNet(), (1, 28, 28)),
    "B-AlexNet": (BAlexNet(), (3, 32, 32)),
    "SDN ResNet-20": (SDN(trunk="resnet20"), (3, 32, 32)),
    "SDN ResNet-56": (SDN(), (3, 32, 32)),
}
RUNS = 20  # of one graph in a turn; a third as many before them, untimed


def integers(spec, shape):
    """The network as ONNX Runtime runs it, 8 bits everywhere."""
    torch.manual_seed(0)
    model, noise = spec.build(shape, 10).eval(), torch.randn(64, *shape)
    chain = prepared(model, noise, Widths(8, 8), "u8s8", "minmax", "minmax").freeze(round_bias=True)
    return OnnxNet(chain, {}, lambda segment: written(chain, shape, segment), {})


def forced(net, threshold, test="by_max_probability"):
    """The single file whose every test has this threshold."""
    segments = [onnx.ModelProto.FromString(net.graph(s)) for s in net.plan(range(net.n_exits))]
    tests = [{"test": test, "arguments": {"thresholds": [threshold] * len(segments)}}] * (len(segments) - 1)
    policy = {"label": "forced", "tests": tests, "temperatures": [], "answer": "exit taken"}
    return single_file(segments, range(net.n_exits), policy, {}).SerializeToString()


def flat(net):
    """Every segment one after the other, every head's logits an output."""
    nodes, constants, outputs, state = [], [], [], ["x"]
    for k, segment in enumerate(net.plan(range(net.n_exits))):
        graph = onnx.ModelProto.FromString(net.graph(segment)).graph
        entering = ["x"] if graph.input[0].name == "x" else state
        more, weights, (logits, *state) = renamed(
            graph, f"exit_{k + 1}", dict(zip((i.name for i in graph.input), entering, strict=False))
        )
        nodes += [*more, helper.make_node("Identity", [logits], [f"logits_{k + 1}"])]
        constants += weights
        outputs.append(helper.make_tensor_value_info(f"logits_{k + 1}", onnx.TensorProto.FLOAT, [1, "K"]))
        if k == 0:
            entry = graph.input[0]
    model = helper.make_model(
        helper.make_graph(nodes, "flat", [entry], outputs, constants), opset_imports=[helper.make_opsetid("", OPSET)]
    )
    model.ir_version = IR
    return model.SerializeToString()


def measured(graphs, x, rounds):
    """Median CPU time of a run in us, per graph."""
    took = {name: [] for name in graphs}
    names = list(graphs)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            run = graphs[name]
            for _ in range(RUNS // 3):
                run([x])
            start = time.process_time_ns()
            for _ in range(RUNS):
                run([x])
            took[name].append((time.process_time_ns() - start) / RUNS / 1e3)
    return {name: statistics.median(t) for name, t in took.items()}


def main():
    """Measure every cell and print a table."""
    asked = argparse.ArgumentParser()
    asked.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    asked.add_argument("--rounds", type=int, default=200)
    said = asked.parse_args()
    print("| network | first segment | If, leaves there | ratio | flat, last head | flat, every head | If, full depth | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    values = {}
    for name in said.networks:
        spec, shape = NETWORKS[name]
        net, x = integers(spec, shape), np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
        last = net.n_exits - 1
        bodies = {
            "first": net.graph(net.plan(range(net.n_exits))[0]),
            "leaves": forced(net, 0.0),
            "last": net.graph(Segment(0, last + 1, last)),
            "flat": flat(net),
            "deep": forced(net, 2.0),
        }
        graphs = {name: OnnxRuntimeGraph(body, 1) for name, body in bodies.items()}
        np.testing.assert_array_equal(graphs["leaves"]([x])[3], graphs["flat"]([x])[0])
        np.testing.assert_array_equal(graphs["deep"]([x])[3], graphs["flat"]([x])[-1])
        us = measured(graphs, x, said.rounds)
        print(
            f"| {name} | {us['first']:.1f} us | {us['leaves']:.1f} us | {us['leaves'] / us['first']:.2f} "
            f"| {us['last']:.1f} us | {us['flat']:.1f} us | {us['deep']:.1f} us | {us['deep'] / us['flat']:.2f} |",
            flush=True,
        )
        values |= {f"{name} early ratio": us["leaves"] / us["first"], f"{name} full ratio": us["deep"] / us["flat"]}
    keep("single_file", values)


if __name__ == "__main__":
    sys.exit(main())
