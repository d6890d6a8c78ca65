"""What does each way of learning to round give back, at 4, 3 and 2 bits?

    make exp EXP=qat_grid              (about 16 hours of one core)

The published ResNet-20 (91.73 %), trained on with LSQ for 20 epochs at W4A4, W3A3 and W2A2, beside FP32 trained on for the same 20,
and again with the float network for a teacher (half of the loss), what has 8 bits left on its grid, and all in fp32; STE, PACT and
DoReFa beside LSQ for 8 epochs at W4A4 and W2A2. All by SGD with a cosine from 0.01 on the 45,000 images of the train part, FP32 and
the taught in fp32 and the others under autocast to bf16; BatchNorm stays behind its convolution, its statistics frozen after half of
the epochs, of the taught for the last two. The first layer and the last one keep 8 bits, and so does what additions read, which
these papers leave in float. STE keeps the calibrated grids, whose weights have a level less than the others' (at 2 bits three, not
four). One seed; the papers train 200 epochs and more.

It gave so far: FP32 trained on 91.49 %, LSQ, 20 epochs, 91.24 at W4A4, 90.87 at W3A3 (its last 11 epochs in fp32, on a CPU without
bfloat16) and 88.54 at W2A2, of 91.73 before; taught 91.49 at W4A4, 91.25 at W3A3 and 89.36 at W2A2. 8 epochs at W4A4
(in fp32, on a CPU without bfloat16): LSQ 91.41, PACT 91.15, STE 91.04. DoReFa, and 2 bits for 8 epochs, have not been run yet.
Two taught runs collapsed. In the first 8-bit activations still learned their steps, and that of the pooled features ran away; in
the second BatchNorm was frozen at half of the epochs as in the others, and a few steps later the network was destroyed; without the
teacher it went on learning from the same checkpoint.
"""

from dataclasses import replace

from anytime.backends.float import Float32
from anytime.backends.qat import QAT
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.resnet import ResNet20
from anytime.train import Recipe
from experiments.common import CHECKPOINT

LONG, SHORT = 20, 8


def qat(bits: int, learns: str, epochs: int) -> QAT:
    """Everything but the method is the same."""
    return QAT(bits, bits, epochs=epochs, lr_scale=1.0, learns=learns, fold_bn=False, add_bits=8, precision="bf16")  # type: ignore[arg-type]


def taught(bits: int) -> QAT:
    """LSQ with what should help it: the float network for a teacher, what has 8 bits on its grid, fp32."""
    return replace(qat(bits, "lsq", LONG), teach=0.5, learn_8bit=False, precision="fp32", freeze_bn=0.9)


EXPERIMENT = Experiment(
    name="qat_grid",
    question="What does each way of learning to round give back, at 4, 3 and 2 bits?",
    suites=(Suite(CIFAR10(statistics="imagenet"), (ResNet20(CHECKPOINT),)),),
    recipe=Recipe(batch=128, lr=0.01, weight_decay=1e-4, optimizer="SGD", optimizer_args=(("momentum", 0.9), ("nesterov", True))),
    backends=(
        Float32(),
        Float32(epochs=LONG, lr_scale=1.0),
        *(qat(bits, "lsq", LONG) for bits in (4, 3, 2)),
        *(taught(bits) for bits in (4, 3, 2)),
        *(qat(bits, learns, SHORT) for bits in (4, 2) for learns in ("lsq", "ste", "pact", "dorefa")),
    ),
    policies=(),
    budgets=(),
)
