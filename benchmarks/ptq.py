"""How long does post-training quantization to 8 bits take, ours and ONNX Runtime's quantize_static, on the same images?

    OMP_WAIT_POLICY=PASSIVE python benchmarks/ptq.py [rounds]

ResNet-20 as it is built, 1,024 calibration images of CIFAR-10's shape, 2 threads, all forms in turn; from the float network in
torch to the first answer of the INT8 session: calibration, rounding, graph, session, and quantize_static's pre-processing.
Ours also looks for collapse and measures every layer's noise in that time. Medians, and ratios to quantize_static; the CPU
time of all threads too, which other programs change less, if threads that wait do not spin.

Found on a 2-core Xeon: min-max 0.77 (CPU 0.63), MSE 1.14 (0.87), NNCF 1.96 (1.74); while calibration still ran the network twice,
0.78 and 1.47 (an EPYC).
"""

import statistics
import sys
import time
import warnings

import torch
from keep import keep

from anytime.backends.nncf import NNCF
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.dataset import Part
from anytime.models.resnet import ResNet20
from anytime.train import Recipe, Trainer


def main() -> None:
    """Time all in turn and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = ResNet20().build((3, 32, 32), 10).train()
    x = torch.randn(1024, 3, 32, 32)
    with torch.no_grad():  # BatchNorm statistics of these images, so that activations have a trained network's size
        for part in torch.split(x, 128):
            model(part)
    model.eval()
    calib = Part(x, torch.randint(10, (1024,)), "calib", "random")
    backends = {
        "quantize_static, its defaults": OrtQuantizer(),
        "ours, min-max": OnnxRuntime(of=PTQ(observer="minmax", weight_observer="minmax")),
        "ours, its defaults (MSE)": OnnxRuntime(of=PTQ()),
        "NNCF, its defaults": NNCF(),
    }
    backends = {name: backend for name, backend in backends.items() if backend.why_not() is None}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in backends}
    for turn in range(rounds + 1):
        for name, backend in backends.items():
            started, cpu = time.perf_counter(), time.process_time()
            net = backend.compress(model, calib, Trainer(Recipe(), calib, 0))
            net.open(2)
            net.step(net.plan([0])[0], net.start(x[:1].numpy()))
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - started, time.process_time() - cpu))
    medians = {name: [statistics.median(kind) for kind in zip(*each, strict=True)] for name, each in times.items()}
    base = medians["quantize_static, its defaults"]
    for name, (wall, cpu) in medians.items():
        print(f"{name:30} {wall:5.2f} s, {wall / base[0]:.2f} of quantize_static; CPU {cpu:5.2f} s, {cpu / base[1]:.2f}")
    kinds = (("wall", 0), ("CPU", 1))
    keep("ptq", {f"{name}: {kind}": each[i] / base[i] for name, each in medians.items() for kind, i in kinds})


if __name__ == "__main__":
    main()
