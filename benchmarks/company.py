"""Does a time depend on the networks that it was measured beside?

    ANYTIME_DATA=... python benchmarks/company.py [--launches N] [--samples N]

Static ResNet-56 (weights of results/zoo) in INT8 on ONNX Runtime, batch 1, one thread, in fresh processes that hold it alone or one
more network besides, in turns as anytime/stopwatch.py has them. A ratio is a median of wall times, of all launches, over that of
the network alone; "at the end" is of the last reading of each turn, when its company is longest ago. It is why anytime/boards/host.py
gives engines processes of their own.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from keep import keep
from reconstruct import trained

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.boards import host
from anytime.models.sdn import SDN
from anytime.models.static import Static
from anytime.policies.fixed import Fixed
from anytime.stopwatch import TURN
from anytime.train import Recipe, Trainer

COMPANY = {
    "alone": (),
    "the same in FP32": (OnnxRuntime(of=Float32()),),
    "the same on OpenVINO": (OpenVINO(of=PTQ()),),
    "the same in torch": (Float32(),),
}


def main() -> None:
    """Print a line for each company."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--launches", type=int, default=5)
    asked.add_argument("--samples", type=int, default=256)
    args = asked.parse_args()
    model, data = trained(Static(SDN("resnet56")))
    trainer = Trainer(Recipe(), data.train, 0)
    took: dict[str, list[np.ndarray]] = {name: [] for name in COMPANY}
    with tempfile.TemporaryDirectory() as folder:
        for name, others in COMPANY.items():
            nets = [backend.compress(model, data.calib, trainer) for backend in (OnnxRuntime(of=PTQ()), *others)]
            jobs = [(net, Fixed(0)) for net in nets]
            host._write(Path(folder) / name, 1, 10, 1, 1, jobs, data.test.x[: args.samples].numpy())
        for _ in range(args.launches):
            for name in COMPANY:
                report = host._launch(Path(folder) / name, 1, f"INT8 beside {name}")
                took[name].append(report["readings"][0][:, 0] / 1e6)
    alone = statistics.median(np.concatenate(took["alone"]))
    print("| in company of | ms | times alone | at the end of a turn |\n| --- | --- | --- | --- |")
    values = {"alone (ms)": alone}
    for name, launches in took.items():
        ms = np.concatenate(launches)
        end = np.concatenate([launch[TURN - 1 :: TURN] for launch in launches])
        print(f"| {name} | {np.median(ms):.3f} | {np.median(ms) / alone:.2f} | {np.median(end) / alone:.2f} |", flush=True)
        values |= {f"{name}: times alone": np.median(ms) / alone, f"{name}: times alone, at the end": np.median(end) / alone}
    keep("company", values)


if __name__ == "__main__":
    main()
