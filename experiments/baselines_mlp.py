"""What do detached exits on a multilayer perceptron save?

    make exp EXP=baselines_mlp         (about 2 minutes on 2 quiet cores)

The course notebook's three-exit MLP and its static twin on Fashion-MNIST (the notebook has EMNIST, which could not be had
here). 256 neurons a layer where the notebook has 1024: the zoo takes 4 MB a file and 20 in all, and 1024 are 11.6 MB. The exits are
detached, so the static twin's last layers learn from the very same gradients. Three fifths of the work lie in the first layer: no
budget under that can be kept.

It gave, in INT8: 82.53, 85.18 and 86.28 % at its exits, the last one exactly its twin's. Exits cost more time than they save: all
three together 0.100 ms, the twin 0.048; the first alone 0.036.
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
    suites=(Suite(FashionMNIST(), (Static(ThreeExitMLP(256)), ThreeExitMLP(256))),),
    recipe=Recipe(epochs=20, batch=128, lr=1e-3),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(Entropy(), MaxProb()),
    budgets=(0.65, 0.8, 0.9),
    boards=(Host(),),
)
