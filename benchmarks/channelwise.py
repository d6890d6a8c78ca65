"""What is gained where BatchNorm behind no convolution and average pooling run as convolutions by channel?

    python benchmarks/channelwise.py [--rounds N]

INT8 networks with weights as they are drawn, at full depth, batch 1, one thread, with anytime/quant/channelwise.py and without
(BatchNorm in float between DQ and Q, pooling as the engine has it), in turn. Time: ratio of the medians of the process CPU time of a run.
Agreement: share of exits' answers of 256 random images that are the same with and without.
"""

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch
from keep import keep
from openvino_fusions import SHAPE, drawn

from anytime.model import Segment
from anytime.models.attached import Attached
from anytime.models.iresnext import IResNeXt
from anytime.models.sparse_resnet import SparseResNet
from anytime.onnx_net import OnnxNet, OpenVINONet, written
from anytime.quant import onnx_graph
from anytime.quant.channelwise import channelwise

DENSE = Attached("densenet121", ("features.transition1", "features.transition2"))
NETWORKS = (SparseResNet(), IResNeXt(), DENSE)
ENGINES = {"ONNX Runtime": (OnnxNet, "u8s8", True), "OpenVINO": (OpenVINONet, "u8s8-fused", False)}
FORMS = {"with": channelwise, "without": lambda module, grid, channels: module}
RUNS = 10  # of one graph in a turn; a third as many before them, untimed


def made(spec, engine):
    """The network in both forms."""
    kind, target, channels_last = ENGINES[engine]
    chain, images = drawn(spec, target)
    nets, said = {}, {}
    for form, make in FORMS.items():
        onnx_graph.channelwise = make
        nets[form] = kind(chain, {}, partial(written, chain, SHAPE, channels_last=channels_last), {})
        nets[form].open(1)
        said[form] = nets[form].predict(images.numpy()).argmax(-1)
        nets[form].graph(whole(nets[form]))
    return nets, 100 * float((said["with"] == said["without"]).mean())


def whole(net):
    """Everything up to the last exit, as one graph."""
    return Segment(0, net.n_exits, net.n_exits - 1)


def main():
    """Measure every network on every engine and print a table."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--rounds", type=int, default=60)
    rounds = asked.parse_args().rounds
    print("| network | engine | with, us | without, us | without / with | agree (%) |\n| --- | --- | --- | --- | --- | --- |")
    torch.set_num_threads(1)
    values = {}
    for spec in NETWORKS:
        for engine in ENGINES if spec is not DENSE else ["ONNX Runtime"]:  # OpenVINO dies of it (anytime/backends/openvino.py)
            nets, agree = made(spec, engine)
            took = {form: [] for form in FORMS}
            for r in range(rounds):
                for form in FORMS if r % 2 else reversed(FORMS):
                    segment, state = whole(nets[form]), nets[form].start(np.zeros((1, *SHAPE), np.float32))
                    for _ in range(RUNS // 3):
                        nets[form].step(segment, state)
                    start = time.process_time_ns()
                    for _ in range(RUNS):
                        nets[form].step(segment, state)
                    took[form].append((time.process_time_ns() - start) / RUNS / 1e3)
            with_it, without = (statistics.median(took[form]) for form in FORMS)
            print(
                f"| {spec.label} | {engine} | {with_it:.0f} | {without:.0f} | {without / with_it:.2f} | {agree:.1f} |", flush=True
            )
            values[f"{spec.label} in {engine}: without / with"] = without / with_it
            values[f"{spec.label} in {engine}: answers that agree (%)"] = agree
    keep("channelwise", values)


if __name__ == "__main__":
    main()
