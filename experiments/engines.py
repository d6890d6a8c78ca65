"""Which engine runs the same network fastest, and in which arithmetic?

    make exp EXP=engines               (about 10 minutes on 2 quiet cores; the float networks lie in results/zoo)

B-LeNet on MNIST, B-AlexNet and SDN ResNet-20 on CIFAR-10 and their static twins, in FP32 and in INT8, by torch, ONNX Runtime, OpenVINO and
TFLite. Our INT8 (the same grids, whoever executes them) under ONNX Runtime and OpenVINO; TFLite's INT8 is its converter's own.

It gave, batch 1, one thread of a 2-core EPYC: SDN ResNet-20 to its last exit 0.238 ms in TFLite's INT8, 0.374 in our INT8 under
the faster of ONNX Runtime and OpenVINO, 0.485 in the fastest FP32; TFLite's INT8 loses at most 0.41 points at any exit (upper
95 % limit), ours at most 0.40.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.backends.tflite import TFLite
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.mnist import MNIST
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.sdn import SDN
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from experiments.common import branchy_recipe, short_cifar_recipe

RESNET = SDN("resnet20")

EXPERIMENT = Experiment(
    name="engines",
    question="Which engine runs the same network fastest, and in which arithmetic?",
    suites=(
        Suite(MNIST(), (Static(BLeNet()), BLeNet())),
        Suite(
            CIFAR10(),
            (Static(BAlexNet()), BAlexNet()),
            others=((Static(RESNET), short_cifar_recipe()), (RESNET, short_cifar_recipe())),
        ),
    ),
    recipe=branchy_recipe(),
    backends=(
        Float32(),
        OnnxRuntime(of=Float32()),
        OpenVINO(of=Float32()),
        TFLite(of=Float32(), form="fp32"),
        OnnxRuntime(of=PTQ(8, 8)),
        OpenVINO(of=PTQ(8, 8)),
        TFLite(of=Float32()),
    ),
    policies=(MaxProb(),),
    budgets=(0.5, 0.8),
    budgets_of="own",
    boards=(Host(),),
)
