"""What does 8-bit arithmetic do to a network that may stop early? The first table, on real digits, in half a minute.

    make exp

Gave: see results/tables/quickstart.md. B-LeNet and its static twin on scikit-learn's 1,797 handwritten digits; the
sets are small (359 test images: a 95 % interval is about 3 points wide), so this shows how the table reads, not what is true.
"""

from anytime.backends.float import Float16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.digits import Digits
from anytime.models.branchynet import BLeNet
from anytime.models.static import Static
from anytime.policies.confidence import Entropy
from anytime.train import Recipe

EXPERIMENT = Experiment(
    name="quickstart",
    question="What does 8-bit arithmetic do to a network that may stop early?",
    suites=(Suite(Digits(), (Static(BLeNet()), BLeNet())),),
    recipe=Recipe(epochs=40, batch=64, lr=2e-3),
    backends=(
        Float32(),
        OnnxRuntime(of=Float32()),
        Float16(),
        OnnxRuntime(of=PTQ(8, 8)),
        OnnxRuntime(of=QAT(8, 8, epochs=5)),
    ),
    policies=(Entropy(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
