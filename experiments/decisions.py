"""What does compression do to exit decisions, and what cures it?

    make exp EXP=decisions             (about 50 minutes on 2 cores, most of it EENet; its float networks lie in results/zoo)

B-LeNet on MNIST, B-AlexNet, SDN ResNet-20 and ResNet-56 and SparseResNet on CIFAR-10, after training, at W8A8, W4A8 and W4A4 to
nearest, and FP32 in ONNX Runtime as the floor. Every policy in four arms: FP32's own parameters kept, kept with temperatures, with
thresholds that give FP32's exit shares on unlabelled calibration images, and refitted. Budgets are fractions of each network's own
MACs in FP32. One training seed; the other floor, FP32 trained again, is what `floors` shows.

It gave, SDN ResNet-20, max-probability at 0.75: kept thresholds spend 4.4 (W4A8) and 6.2 % (W4A4) too much and lose next to nothing
against the network's own curve; share-matched ones and refitted ones spend no more than FP32's, temperatures half of that. At 0.5,
31.7 % of the samples change their exit in W4A8, 5.2 % in W8A8. SDN ResNet-56 alike: 25.7 and 4.8 %, 3.9 % overspent in W4A8.
SparseResNet overspends 18 % there, with temperatures 11, share-matched 1. B-AlexNet cannot leave below 0.57. No learned policy beats
max-probability in FP32; in W4A4 at 0.4 ZTW does, by 1.0 (SDN ResNet-20) and 0.9 points (ResNet-56).
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.config import ARMS, Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.mnist import MNIST
from anytime.losses import Joint
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.policies.confidence import Entropy, Margin, MaxProb
from anytime.policies.eenet import EENet
from anytime.policies.oracle import Oracle
from anytime.policies.patience import Patience
from anytime.policies.random import Random
from anytime.policies.ztw import ZTW
from experiments.common import branchy_recipe, cifar_recipe, short_cifar_recipe, trunk_first_recipe

EXPERIMENT = Experiment(
    name="decisions",
    question="What does compression do to exit decisions, and what cures it?",
    suites=(
        Suite(MNIST(), (BLeNet(),)),
        Suite(
            CIFAR10(),
            (BAlexNet(),),
            others=(
                (SDN("resnet20"), short_cifar_recipe()),
                (SDN("resnet56"), trunk_first_recipe()),
                (SparseResNet(), cifar_recipe(Joint())),
            ),
        ),
    ),
    recipe=branchy_recipe(),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8)), PTQ(4, 8), PTQ(4, 4, add_bits=8)),
    policies=(
        MaxProb(),
        MaxProb(per_exit=True),
        Entropy(),
        Margin(),
        Patience(),
        ZTW(),
        EENet(seed=0),
        Oracle(),
        Random(of=MaxProb()),
    ),
    budgets=(0.4, 0.5, 0.6, 0.75),
    budgets_of="own",
    arms=ARMS,
)
