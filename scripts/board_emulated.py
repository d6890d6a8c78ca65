"""What the emulated aarch64 board answers against this machine: B-LeNet and SDN ResNet-20, FP32 and INT8, policies and links.

Started by scripts/board_emulated.sh. It never prints a time: those of an emulation mean nothing.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from anytime.backend import Backend
from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.ssh import Ssh
from anytime.errors import AnytimeError
from anytime.find import experiment
from anytime.onnx_net import GraphNet
from anytime.policies.confidence import MaxProb
from anytime.stops import max_probability
from anytime.workshop import Workshop
from anytime.zoo import read

ROOT = Path(__file__).parent.parent
NETWORKS = {"B-LeNet": 32, "SDN ResNet-20": 8}  # network -> samples


def network(model: str, backend: Backend) -> tuple[GraphNet, np.ndarray]:
    """The zoo's weights, compressed, and the published test images. Nothing is trained."""
    name, kept = next((name, said) for name, said in read(ROOT / "results" / "zoo").items() if said["model"] == model)
    cell = next(c for c in experiment(kept["experiment"]).cells() if c.model.label == model)
    shop = Workshop(ROOT / "results")
    parts = shop.data(cell.data, cell.seed)
    float_net = cell.model.build(parts.input_shape, parts.n_classes)
    float_net.load_state_dict(load_file(ROOT / "results" / "zoo" / f"{name}.safetensors"))
    trainer = shop.trainer(cell.data, cell.model, cell.recipe, cell.train_seed, cell.seed)
    net = OnnxRuntime(of=backend).compress(float_net.eval(), parts.calib, trainer)
    assert isinstance(net, GraphNet)
    return net, parts.test.x.numpy()


def main() -> int:
    """Compare, print a line each, answer 1 if anything differs by more than it may."""
    board, wrong = Ssh("emulated", python="/opt/v/bin/python", launches=1, warmup=1, emulated=True), []
    print("\n".join(asyncio.run(board.inspect())))
    try:
        replace(board, emulated=False).facts()
        net, x = network("B-LeNet", Float32())
        replace(board, emulated=False).time([net], x[:1])
        wrong.append("it was timed as if it were real")
    except AnytimeError as refused:
        print(f"refused, as it must be: {refused}")
    for model, n in NETWORKS.items():
        for backend in (Float32(), PTQ(8, 8)):
            net, x = network(model, backend)
            (there,) = board.predict([net], {"test": x[:n]}, batch=1)
            here = net.predict(x[:n], batch=1)
            apart, same = float(np.abs(there["test"] - here).max()), bool((there["test"].argmax(-1) == here.argmax(-1)).all())
            policy = MaxProb(thresholds=tuple(float(np.median(max_probability(z))) for z in here[:-1]))
            (ran,) = board.run([(net, policy)], x[: n // 2])
            ends = bool((ran.exits == policy.exits(here[:, : n // 2])).all())
            marked = ran.facts["emulated"] == "yes"
            print(
                f"{model}, {backend.label}, {n} images, {net.n_exits} exits: logits at most {apart:.2e} apart, classes "
                f"{'equal' if same else 'DIFFER'}, exits {'equal' if ends else 'DIFFER'}, {'marked' if marked else 'NOT MARKED'}"
            )
            # INT8: one step of an integer grid, which is over 1e-3 for every one of these layers.
            if apart > (1e-5 if isinstance(backend, Float32) else 1e-3) or not (same and ends and marked):
                wrong.append(f"{model}, {backend.label}")
    print("FAILED: " + "; ".join(wrong) if wrong else "the emulated board answers as this machine does")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
