"""What do 8 bits make of a ResNet-20 that somebody else has trained?

    make exp EXP=baselines_resnet      (about 3 minutes on 2 quiet cores; nothing is trained)

The published CIFAR-10 checkpoint of akamaster/pytorch_resnet_cifar10, 91.73 % on the test set, in FP32 and INT8 PTQ. The file
is looked for where CHECKPOINT in experiments/common.py says, from the folder that the command runs in; another place:
SET="suites.0.models.0.weights=path". These weights have seen the whole training set, calibration samples too, so no policy
could be fitted on any of it.

It gave: 91.73 % in FP32 and 91.76 in INT8, 0.991 and 0.600 ms at batch 1 under ONNX Runtime.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.resnet import ResNet20
from anytime.train import Recipe
from experiments.common import CHECKPOINT

EXPERIMENT = Experiment(
    name="baselines_resnet",
    question="What do 8 bits make of a ResNet-20 that somebody else has trained?",
    suites=(Suite(CIFAR10(statistics="imagenet"), (ResNet20(CHECKPOINT),)),),
    recipe=Recipe(),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(),
    budgets=(),
    boards=(Host(),),
)
