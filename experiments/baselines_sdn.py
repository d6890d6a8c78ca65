"""What do internal classifiers on a residual network save, against the same network without them?

    make exp EXP=baselines_sdn         (about 3 hours on 2 quiet cores; a finished network is never trained again)

SDN on ResNet-56 and its static twin, trained alike: 40 epochs without exits, which they share, then 20 more each, the side
exits' weights rising to 0.15 ... 0.9 as SDN's do; SDN on ResNet-20 and its twin for 30 from scratch. FP32 and
INT8 PTQ, executed by ONNX Runtime, under a max-probability policy; budgets are fractions of the static ResNet-56's MACs. One
training seed: half of ResNet-56's MACs cost 1.4 points against the twin (INT8 too, in 0.80 of the twin's measured time), three
quarters 0.5; the exits themselves cost the last one 0.5. On ResNet-20 they cost no accuracy, and in INT8 twice the time.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.sdn import SDN
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from experiments.common import short_cifar_recipe, trunk_first_recipe

SMALL = SDN("resnet20")

EXPERIMENT = Experiment(
    name="baselines_sdn",
    question="What do internal classifiers on a residual network save, against the same network without them?",
    suites=(
        Suite(
            CIFAR10(),
            (Static(SDN("resnet56")), SDN("resnet56")),
            others=((Static(SMALL), short_cifar_recipe()), (SMALL, short_cifar_recipe())),
        ),
    ),
    recipe=trunk_first_recipe(),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(MaxProb(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
