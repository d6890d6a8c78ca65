"""What do detached exits on a multilayer perceptron save?

    make exp EXP=baselines_mlp         (about 5 minutes on 2 quiet cores)

The course notebook's three-exit MLP and its static twin on Fashion-MNIST (the notebook has EMNIST, which could not be had
here). 512 neurons a layer where the notebook has 1024: the zoo takes 4 MB a file, and 1024 are 11.6 MB. The exits are
detached, so the static twin's last layers learn from the very same gradients. It has not been run yet.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.mnist import FashionMNIST
from anytime.models.course import ThreeExitMLP
from anytime.models.static import Static
from anytime.policies.confidence import Entropy, MaxProb
from anytime.train import Recipe

EXPERIMENT = Experiment(
    name="baselines_mlp",
    question="What do detached exits on a multilayer perceptron save?",
    suites=(Suite(FashionMNIST(), (Static(ThreeExitMLP(512)), ThreeExitMLP(512))),),
    recipe=Recipe(epochs=20, batch=128, lr=1e-3),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(Entropy(), MaxProb()),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
