"""What do internal classifiers on a residual network save, against the same network without them?

    make exp EXP=baselines_sdn        (about 4 hours on 2 cores; a finished network is never trained again)

SDN on ResNet-20 and on ResNet-56 with their static twins, trained alike: 30 epochs, the side exits' weights rising to
0.15 ... 0.9 as SDN's do. FP32 and INT8 PTQ, executed by ONNX Runtime, under a max-probability policy. Gave so far
(results/tables/baselines_sdn.md, the ResNet-20 pair): last exit 90.03 % against the static twin's 90.06 %; at three quarters of
its MACs 90.02 % and no faster in FP32 (0.99x), 1.36x in INT8.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import Rising
from anytime.models.sdn import SDN
from anytime.models.static import Static
from anytime.policies.threshold import MaxProb
from experiments.common import cifar_recipe

EXPERIMENT = Experiment(
    name="baselines_sdn",
    question="What do internal classifiers on a residual network save, against the same network without them?",
    suites=(Suite(CIFAR10(), (Static(SDN("resnet20")), SDN("resnet20"), Static(SDN("resnet56")), SDN("resnet56"))),),
    recipe=cifar_recipe(Rising()),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(MaxProb(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
