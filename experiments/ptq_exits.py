"""What do few bits without training do to every exit of an anytime network?

    make exp EXP=ptq_exits             (about 75 minutes on 2 quiet cores; the float networks lie in results/zoo)

SDN on ResNet-56, B-AlexNet and SparseResNet from the zoo: W8A8 to nearest (executed by ONNX Runtime), W4A8 and W4A4 to nearest and
by QDrop with 500 iterations a unit (ptq_grid: 2,000), whose last unit of every stage learns together with the head that it feeds.
Every exit and a max-probability policy; one calibration set, one training seed.

It gave: W8A8 costs no exit of the three more than 0.07 points, 0.21 at the upper limit. W4A4 to nearest costs SDN
ResNet-56's second exit 3.73 points and its last one 0.97, the same network without exits 1.76; QDrop leaves 0.35, 0.10 and 0.55.
B-AlexNet loses up to 1.00 and 0.62. SparseResNet, whose layers every later exit reads, loses 2.0 to 3.5 points at all four of its exits,
its first the most; QDrop leaves 0.45 to 0.64, and in W4A8 0.06 to 0.17 of 1.1 to 2.6.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import Joint
from anytime.models.branchynet import BAlexNet
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from experiments.common import branchy_recipe, cifar_recipe, trunk_first_recipe

EXPERIMENT = Experiment(
    name="ptq_exits",
    question="What do few bits without training do to every exit of an anytime network?",
    suites=(
        Suite(
            CIFAR10(),
            (Static(SDN("resnet56")), SDN("resnet56")),
            others=((BAlexNet(), branchy_recipe()), (SparseResNet(), cifar_recipe(Joint()))),
        ),
    ),
    recipe=trunk_first_recipe(),
    backends=(
        Float32(),
        OnnxRuntime(of=PTQ(8, 8)),
        PTQ(4, 8),
        PTQ(4, 8, rounding="qdrop", iterations=500),
        PTQ(4, 4, add_bits=8),
        PTQ(4, 4, rounding="qdrop", iterations=500, add_bits=8),
    ),
    policies=(MaxProb(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    budgets_of="own",
    boards=(Host(),),
)
