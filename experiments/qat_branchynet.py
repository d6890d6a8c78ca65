"""How many bits can a network with side branches lose, and what do the exits make of it?

    make exp EXP=qat_branchynet        (46 minutes from nothing on 2 cores; its float networks lie in results/zoo)

B-LeNet on MNIST and B-AlexNet on CIFAR-10 with their static twins, in FP32, FP32 trained on for the QAT's epochs,
FP16, BF16, INT8 PTQ, INT8 QAT and INT4 QAT. Every network begins from the trained static one, as BranchyNet does
(20 epochs), and is then trained 20 more; the static twin too. Gave (results/tables/qat_branchynet.md): INT8 loses nothing
that 10,000 images can show, at any exit; INT4 QAT half a point on CIFAR-10. B-LeNet executes 4.2 times fewer MACs than LeNet
under the entropy policy and is 1.5 times faster in ONNX Runtime; its INT8 is slower than its FP32 there (5 to 20 channels).
"""

from anytime.backends.float import BFloat16, Float16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.mnist import MNIST
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.static import Static
from anytime.policies.confidence import Entropy, MaxProb
from experiments.common import branchy_recipe

TUNE_EPOCHS = 3  # of both QATs, and of FP32 trained on: else QAT's gain is retraining's

EXPERIMENT = Experiment(
    name="qat_branchynet",
    question="How many bits can a network with side branches lose, and what do the exits make of it?",
    suites=(
        Suite(MNIST(), (Static(BLeNet()), BLeNet())),
        Suite(CIFAR10(), (Static(BAlexNet()), BAlexNet())),
    ),
    recipe=branchy_recipe(),
    backends=(
        Float32(),
        OnnxRuntime(of=Float32()),
        Float32(epochs=TUNE_EPOCHS),
        Float16(),
        BFloat16(),
        OnnxRuntime(of=PTQ(8, 8)),
        OnnxRuntime(of=QAT(8, 8, epochs=TUNE_EPOCHS)),
        QAT(4, 4, epochs=TUNE_EPOCHS),
    ),
    policies=(Entropy(), MaxProb()),
    budgets=(0.25, 0.5, 0.65, 0.8, 1.0),
    boards=(Host(),),
)
