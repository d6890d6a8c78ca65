"""How does a network that was made for early exits compare with itself without them?

    make exp EXP=baselines_msdnet      (for a GPU: three trainings of 300 epochs)

MSDNet's two CIFAR-10 presets, ten exits for anytime prediction and seven for a budgeted batch, beside the static twin of the
first. Trained as in the paper: SGD for 300 epochs in batches of 64, a tenth of the rate from epochs 150 and 225 on (inferred);
but with validation samples held out for both, which the paper does for the budgeted batch only. A third of the first
network's MACs are heads, which only a policy that asks them all pays. It has not been run: where this was built there is no
GPU.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.msdnet import CIFAR10_ANYTIME, CIFAR10_BATCH
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from anytime.train import Recipe

EXPERIMENT = Experiment(
    name="baselines_msdnet",
    question="How does a network that was made for early exits compare with itself without them?",
    suites=(Suite(CIFAR10(), (Static(CIFAR10_ANYTIME), CIFAR10_ANYTIME, CIFAR10_BATCH)),),
    recipe=Recipe(
        epochs=300,
        batch=64,
        lr=0.1,
        weight_decay=1e-4,
        optimizer="SGD",
        optimizer_args=(("momentum", 0.9),),
        schedule="MultiStepLR",
        schedule_args=(("milestones", (150, 225)),),
        precision="bf16",
    ),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(MaxProb(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
