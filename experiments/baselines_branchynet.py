"""Does BranchyNet's third network save what its paper says, branches counted?

    make exp EXP=baselines_branchynet  (for a GPU: three trainings of 100 epochs of a ResNet-110)

B-ResNet110 and its static twin on CIFAR-10. As in the paper the network begins from the trained static one, 100 epochs each
(here AdamW at 1e-3); the twin is trained 100 more too. The paper claims 1.9 times on the CPU, timed without the
branches; with every branch counted its exit shares give 1.41 in MACs. B-LeNet and B-AlexNet are in qat_branchynet. It has
not been run: where this was built there is no GPU.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.branchynet import BResNet110
from anytime.models.static import Static
from anytime.policies.confidence import Entropy
from anytime.train import Recipe

EXPERIMENT = Experiment(
    name="baselines_branchynet",
    question="Does BranchyNet's third network save what its paper says, branches counted?",
    suites=(Suite(CIFAR10(), (Static(BResNet110()), BResNet110())),),
    recipe=Recipe(epochs=100, batch=128, lr=1e-3, weight_decay=1e-4, start="static", precision="bf16"),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(Entropy(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
