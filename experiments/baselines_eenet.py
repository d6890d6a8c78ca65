"""What do EENet's networks save under a plain max-probability policy?

    make exp EXP=baselines_eenet       (for a GPU: four trainings of 150 epochs)

EENet's bottleneck ResNet-56 and thin DenseNet-121 with their static twins on CIFAR-10, trained as the authors do: SGD for 150
epochs, a tenth of the rate from epochs 50 and 100 on, linear weights, and for the last quarter the side exits also imitate
the last one. The authors train the DenseNet on CIFAR-100, whose files could not be had here. It has not been run: where this
was built there is no GPU.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import LinearWithLateKL
from anytime.models.eenet import EENetDenseNet121, EENetResNet56
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from anytime.train import Recipe

MODELS = (Static(EENetResNet56()), EENetResNet56(), Static(EENetDenseNet121()), EENetDenseNet121())

EXPERIMENT = Experiment(
    name="baselines_eenet",
    question="What do EENet's networks save under a plain max-probability policy?",
    suites=(Suite(CIFAR10(), MODELS),),
    recipe=Recipe(
        epochs=150,
        batch=128,
        lr=0.1,
        weight_decay=5e-4,
        optimizer="SGD",
        optimizer_args=(("momentum", 0.9),),
        schedule="MultiStepLR",
        schedule_args=(("milestones", (50, 100)),),
        loss=LinearWithLateKL(),
        precision="bf16",
    ),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(MaxProb(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(Host(),),
)
