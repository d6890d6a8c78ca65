"""What does INT8 answer on a CPU without VNNI, and what does it cost to have it right?

    ANYTIME_DATA=... python benchmarks/saturation.py [--rounds N]

Networks of results/zoo in INT8 (nearest, MSE, 1,024 calibration images), all 10,000 test images. Such a CPU multiplies u8 by s8 and
adds two products in 16 bits, where they saturate: ONNX Runtime at its defaults, and OpenVINO. "exact" is ONNX Runtime told to widen
first (EXACT_INT8 in anytime/engine.py), as this project always does; of weights of 7 bits no two products overflow. Agreement: share
of images with the class that the simulated integers give, per exit. Time: ratio of medians of the process CPU time of a run at
full depth, batch 1, one thread, in turn. On a CPU with VNNI all agree, and what the exact kernels would cost there, where nobody asks for
them, is kept apart (saturation_vnni.json).
"""

import argparse
import statistics
import time
from unittest.mock import patch

import numpy as np
import torch
from keep import keep
from reconstruct import trained

from anytime import cpu, engine
from anytime.backend import Backend, Deployable, TorchNet
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.model import Segment
from anytime.models.branchynet import BAlexNet
from anytime.models.sdn import SDN
from anytime.train import Recipe, Trainer

SEVEN = PTQ(weight_bits=7, edge_bits=7)
FORMS: dict[str, tuple[Backend, str]] = {  # name -> (what runs, ONNX Runtime's precision mode)
    "exact": (OnnxRuntime(of=PTQ()), "1"),
    "ONNX Runtime's default": (OnnxRuntime(of=PTQ()), "0"),
    "OpenVINO": (OpenVINO(of=PTQ()), "1"),
    "ONNX Runtime with 7 bits": (OnnxRuntime(of=SEVEN), "1"),
    "OpenVINO with 7 bits": (OpenVINO(of=SEVEN), "1"),
}
RUNS = 20  # of one graph in a turn; a third as many before them, untimed


def whole(net: Deployable) -> Segment:
    """Everything up to the last exit, as one graph."""
    return Segment(0, net.n_exits, net.n_exits - 1)


def main() -> None:
    """Print what every engine answers, then what it takes."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--rounds", type=int, default=60)
    rounds = asked.parse_args().rounds
    torch.set_num_threads(1)
    print(f"this CPU {'has no VNNI' if cpu.saturates() else 'has VNNI or saturates nowhere'}")
    values = {}
    for spec in (SDN("resnet20"), BAlexNet()):
        model, data = trained(spec)
        test, labels = data.test.x.numpy(), data.test.y.numpy()
        nets, twins = {}, {}
        for name, (backend, mode) in FORMS.items():
            engine.EXACT_INT8 = (engine.EXACT_INT8[0], mode)
            net = backend.compress(model, data.calib, Trainer(Recipe(), data.train, 0))
            net.open(1)
            with patch.object(cpu, "has_any", lambda _: False):  # its sessions are made now, in this mode on every CPU
                net.step(whole(net), net.start(test[:1]))
                said = net.predict(test).argmax(-1)
            if backend not in twins:
                twins[backend] = TorchNet(net.twin, net.bits, simulated=True).predict(test).argmax(-1)
            agreed, right = 100 * (said == twins[backend]).mean(-1), 100 * (said == labels).mean(-1)
            values |= {f"{spec.label}: agreement at exit {k + 1}: {name} (%)": a for k, a in enumerate(agreed)}
            values |= {f"{spec.label}: accuracy at exit {k + 1}: {name} (%)": a for k, a in enumerate(right)}
            print(f"{spec.label}, {name}: agrees {np.round(agreed, 2)}, right {np.round(right, 2)} %", flush=True)
            nets[name] = net
        took: dict[str, list[float]] = {name: [] for name in nets}
        for _ in range(rounds):
            for name, net in nets.items():
                segment, state = whole(net), net.start(test[:1])
                for _ in range(RUNS // 3):
                    net.step(segment, state)
                start = time.process_time_ns()
                for _ in range(RUNS):
                    net.step(segment, state)
                took[name].append((time.process_time_ns() - start) / RUNS / 1e3)
        medians = {name: statistics.median(t) for name, t in took.items()}
        for name, median in medians.items():
            values[f"{spec.label}: time: {name} / ONNX Runtime's default"] = median / medians["ONNX Runtime's default"]
        print(f"{spec.label}: " + ", ".join(f"{name} {median:.0f} us" for name, median in medians.items()), flush=True)
    keep("saturation" if cpu.saturates() else "saturation_vnni", values)


if __name__ == "__main__":
    main()
