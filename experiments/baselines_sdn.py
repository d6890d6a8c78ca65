"""What do internal classifiers on a residual network save, against the same network without them?

    make exp EXP=baselines_sdn         (about 3 hours on 2 quiet cores; a finished network is never trained again)

SDN on ResNet-56 and on ResNet-20 with their static twins, trained alike: 75 epochs, the side exits' weights rising to
0.15 ... 0.9 as SDN's do. FP32 and INT8 PTQ under a max-probability policy, executed by ONNX Runtime and by OpenVINO, and TFLite's
own FP32 and INT8 beside them; budgets are fractions of the static ResNet-56's MACs. With 75 epochs it has not been run yet.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.backends.tflite import TFLite
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import Rising
from anytime.models.sdn import SDN
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from experiments.common import cifar_recipe

EXPERIMENT = Experiment(
    name="baselines_sdn",
    question="What do internal classifiers on a residual network save, against the same network without them?",
    suites=(Suite(CIFAR10(), (Static(SDN("resnet56")), SDN("resnet56"), Static(SDN("resnet20")), SDN("resnet20"))),),
    recipe=cifar_recipe(Rising()),
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
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
