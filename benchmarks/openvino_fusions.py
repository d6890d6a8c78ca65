"""What do quantizers cost, in time and in truth, where OpenVINO fuses what they stand between?

    python benchmarks/openvino_fusions.py [--rounds N]

INT8 networks with weights as they are drawn, run by OpenVINO at full depth, batch 1, one thread, as placed for it ("u8s8-fused")
and as for ONNX Runtime ("u8s8"), in turn. Time: ratio of the medians of the process CPU time of a run. Error: root mean square of
OpenVINO's logits against their own twin's, as a share of the twin's standard deviation; the worst exit of 64 random images.
"""

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch
from keep import keep

from anytime.model import Segment
from anytime.models.attached import Attached
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.onnx_net import OpenVINONet, written
from anytime.quant.graph import Widths, prepared

SHAPE = (3, 32, 32)
NETWORKS = (SDN("resnet20"), SDN("resnet56"), SparseResNet(), Attached("mobilenet_v2", ("features.7", "features.14")))
TARGETS = ("u8s8-fused", "u8s8")
RUNS = 20  # of one graph in a turn; a third as many before them, untimed


def drawn(spec, target):
    """The network in INT8 for a target, with weights as they are drawn, and the images that it was calibrated on."""
    torch.manual_seed(0)
    model, images = spec.build(SHAPE, 10).train(), torch.randn(256, *SHAPE)
    with torch.no_grad():
        model(images)  # BatchNorm statistics, so that activations have a trained network's size
    return prepared(model.eval(), images, Widths(8, 8), target, "mse", "mse").freeze(round_bias=True), images


def made(spec, target):
    """The network as OpenVINO runs it, and how far it is from its twin."""
    chain, images = drawn(spec, target)
    net = OpenVINONet(chain, {}, partial(written, chain, SHAPE), {})
    net.open(1)
    with torch.no_grad():
        said = chain(images[:64]).numpy()
    worst = max(
        float(np.sqrt(np.square(run - own).mean()) / own.std())
        for run, own in zip(net.predict(images[:64].numpy()), said, strict=True)
    )
    return net, worst


def main():
    """Measure every network and print a table."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--rounds", type=int, default=100)
    rounds = asked.parse_args().rounds
    print(
        "| network | fused, us | rounded, us | ratio | error of its twin, fused | rounded |\n| --- | --- | --- | --- | --- | --- |"
    )
    torch.set_num_threads(1)
    values = {}
    for spec in NETWORKS:
        nets = {target: made(spec, target) for target in TARGETS}
        took = {target: [] for target in TARGETS}
        for r in range(rounds):
            for target in TARGETS if r % 2 else TARGETS[::-1]:
                net = nets[target][0]
                segment, state = Segment(0, net.n_exits, net.n_exits - 1), net.start(np.zeros((1, *SHAPE), np.float32))
                for _ in range(RUNS // 3):
                    net.step(segment, state)
                start = time.process_time_ns()
                for _ in range(RUNS):
                    net.step(segment, state)
                took[target].append((time.process_time_ns() - start) / RUNS / 1e3)
        fused, rounded = (statistics.median(took[target]) for target in TARGETS)
        errors = [nets[target][1] for target in TARGETS]
        print(
            f"| {spec.label} | {fused:.0f} | {rounded:.0f} | {fused / rounded:.3f} | {errors[0]:.4f} | {errors[1]:.4f} |",
            flush=True,
        )
        values[f"{spec.label}: fused / rounded"] = fused / rounded
        values |= {f"{spec.label}: twin's error, {name}": e for name, e in zip(("fused", "rounded"), errors, strict=True)}
    keep("openvino_fusions", values)


if __name__ == "__main__":
    main()
