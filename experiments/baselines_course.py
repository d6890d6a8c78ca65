"""What do exits after each group of a ResNet-18 save on small grey images?

    make exp EXP=baselines_course      (about 20 minutes on 2 quiet cores)

The course notebook's ResNet-18 and its static twin on Fashion-MNIST (the notebook's grey set has no name), ten epochs. Its
45 MB of weights are too large for the zoo. It has not been run yet.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.mnist import FashionMNIST
from anytime.models.course import EarlyExitResNet18
from anytime.models.static import Static
from anytime.policies.confidence import Entropy, MaxProb
from anytime.train import Recipe

EXPERIMENT = Experiment(
    name="baselines_course",
    question="What do exits after each group of a ResNet-18 save on small grey images?",
    suites=(Suite(FashionMNIST(), (Static(EarlyExitResNet18()), EarlyExitResNet18())),),
    recipe=Recipe(epochs=10, batch=128, lr=1e-3, precision="bf16"),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(Entropy(), MaxProb()),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
