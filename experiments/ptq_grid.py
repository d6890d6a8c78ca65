"""How few bits does post-training quantization leave a ResNet-20, and what is each step of it worth?

    make exp EXP=ptq_grid              (about 90 minutes on 2 quiet cores; nothing is trained)

The published checkpoint of akamaster/pytorch_resnet_cifar10 (91.73 % on the test set; another place of the file:
SET="suites.0.models.0.weights=path"), three calibration sets of 1,024 training images. W8A8 by us, by ONNX Runtime's
quantize_static, by NNCF and by torchao, each as it comes and as the best of four settings on the tune part (torchao with a module for
each call of a ReLU, without which it fails, and as simulated by PT2E); W4A8 from the plainest
form on, one repair after another; W4A4 and W2A4 by learned rounding. The first layer and each head's last one keep 8 bits.
``add_bits=8`` keeps what additions read at 8 bits, as QDrop's own tables do not; both stand here. These weights have seen
the calibration and tune images, as in every published table of PTQ; no policy is fitted on them.

It gave, W8A8 by us on the three calibration sets: 91.76, 91.68, 91.70 %. On the first set: 91.67 by quantize_static, 91.74 by NNCF,
91.80 by torchao; W4A8 89.80 to nearest, 91.16 with bias correction, 91.62 by AdaRound, 91.75 by BRECQ, 91.73 by QDrop; W4A4 90.75 by
QDrop, with additions in 8 bits 91.01 (BRECQ 91.13); W2A4 89.13. What BRECQ and QDrop learn on the other two sets has not been run yet.
"""

from anytime.backends.float import Float32
from anytime.backends.nncf import NNCF
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.backends.torchao import TorchAO
from anytime.backends.tuned import Tuned
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.resnet import ResNet20
from anytime.train import Recipe
from experiments.common import CHECKPOINT

OURS = tuple(OnnxRuntime(of=PTQ(8, 8, observer=o)) for o in ("mse", "minmax", "percentile", "moving"))
THEIRS = (
    tuple(OrtQuantizer(observer=o, per_channel=c) for o in ("minmax", "percentile") for c in (False, True)),
    tuple(NNCF(ranges=r, fast_bias_correction=f) for r in ("mean_minmax", "histogram") for f in (True, False)),
)
TORCHAO = tuple(TorchAO(own_relus=True, observer=o, reduce_range=r) for o in ("histogram", "minmax") for r in (False, True))

EXPERIMENT = Experiment(
    name="ptq_grid",
    question="How few bits does post-training quantization leave a ResNet-20, and what is each step of it worth?",
    suites=(Suite(CIFAR10(statistics="imagenet"), (ResNet20(CHECKPOINT),)),),
    recipe=Recipe(),
    backends=(
        Float32(),
        OnnxRuntime(of=Float32()),
        OURS[0],
        Tuned(OURS),
        OrtQuantizer(),
        NNCF(),
        TorchAO(),
        TorchAO(own_relus=True),
        *(Tuned(candidates) for candidates in THEIRS),
        PTQ(4, 8, observer="minmax", weight_observer="minmax"),
        PTQ(4, 8),
        PTQ(4, 8, equalize=True),
        PTQ(4, 8, equalize=True, correct_bias=True),
        PTQ(4, 8, correct_bias=True),
        PTQ(4, 8, rounding="adaround"),
        PTQ(4, 8, rounding="brecq"),
        PTQ(4, 8, rounding="qdrop"),
        PTQ(4, 4),
        PTQ(4, 4, add_bits=8),
        PTQ(4, 4, rounding="brecq", add_bits=8),
        PTQ(4, 4, rounding="qdrop"),
        PTQ(4, 4, rounding="qdrop", add_bits=8),
        PTQ(2, 4, rounding="qdrop", add_bits=8),
        PTQ(4, 8, reestimate_bn=True),
        PTQ(4, 8, reestimate_bn=True, correct_bias=True),
        Tuned(TORCHAO),
        PTQ(4, 8, observer="minmax"),
    ),
    policies=(),
    budgets=(),
    boards=(Host(),),
    seeds=(0, 1, 2),
)
