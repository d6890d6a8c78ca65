"""What do compression and stopping early give together, network by network?

    make exp EXP=grid                  (hours on 2 cores; the float networks lie in results/zoo)

B-LeNet on MNIST, B-AlexNet, SDN ResNet-20 and ResNet-56 and SparseResNet on CIFAR-10, as the zoo holds them, and their static
twins, in FP32, FP16 and BF16; in W8A8 by our PTQ under ONNX Runtime, OpenVINO and as TensorRT's graphs; by ONNX Runtime's own
quantizer, NNCF and torchao at their defaults (but that every call of a ReLU gets a module, without which torchao fails); in W4A8
and W4A4 to nearest, and with bits chosen layer by layer. Policies are fitted after compression; budgets are shares of each
network's own MACs in FP32. What asks for more than one row is an experiment of its own: learned rounding ``ptq_exits``, QAT
``qat_branchynet`` and ``qat_grid``, ensembles ``ensembles`` and ``stacks``, kept thresholds ``decisions``. Jetsons are named, and
skipped until ~/.ssh/config has their addresses.
"""

from anytime.backends.float import BFloat16, Float16, Float32
from anytime.backends.mixed import MixedPrecision
from anytime.backends.nncf import NNCF
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.backends.tensorrt import TensorRT
from anytime.backends.torchao import TorchAO
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.mnist import MNIST
from anytime.losses import Joint
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.models.static import Static
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.eenet import EENet
from anytime.policies.patience import Patience
from anytime.policies.risk import RiskControl
from experiments.boards.agx_xavier import BOARD as AGX_XAVIER
from experiments.boards.xavier_nx import BOARD as XAVIER_NX
from experiments.common import branchy_recipe, cifar_recipe, short_cifar_recipe, trunk_first_recipe

RESNET20, RESNET56 = SDN("resnet20"), SDN("resnet56")

EXPERIMENT = Experiment(
    name="grid",
    question="What do compression and stopping early give together, network by network?",
    suites=(
        Suite(MNIST(), (Static(BLeNet()), BLeNet())),
        Suite(
            CIFAR10(),
            (Static(BAlexNet()), BAlexNet()),
            others=(
                (Static(RESNET20), short_cifar_recipe()),
                (RESNET20, short_cifar_recipe()),
                (Static(RESNET56), trunk_first_recipe()),
                (RESNET56, trunk_first_recipe()),
                (SparseResNet(), cifar_recipe(Joint())),
            ),
        ),
    ),
    recipe=branchy_recipe(),
    backends=(
        OnnxRuntime(of=Float32()),
        OpenVINO(of=Float32()),
        Float16(),
        BFloat16(),
        OnnxRuntime(of=PTQ(8, 8)),
        OpenVINO(of=PTQ(8, 8)),
        TensorRT(of=PTQ(8, 8)),
        OrtQuantizer(),
        NNCF(),
        TorchAO(own_relus=True),
        PTQ(4, 8),
        PTQ(4, 4, add_bits=8),
        MixedPrecision(),
    ),
    policies=(MaxProb(), Entropy(), Patience(), EENet(seed=0), RiskControl(epsilon=0.02)),
    budgets=(0.5, 0.75),
    budgets_of="own",
    arms=("refitted",),
    boards=(Host(), AGX_XAVIER, XAVIER_NX),
)
