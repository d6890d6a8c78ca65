"""What do sub-networks that share their weights cost, against the whole network alone?

    make exp EXP=baselines_iresnext    (about 3 hours on 2 quiet cores)

IResNeXt L9 with 4 sub-networks and its static twin, the largest of them alone, on CIFAR-10, trained alike for 5 epochs, and IResNeXt for
2 too, each in one cycle of the learning rate: a curve, for the authors' 300 epochs are four days here (the four sub-networks together
take 12 to 24 minutes an epoch of one core, as they share weights and nothing that was computed). Each exit restarts from the image: a fixed
policy jumps to the one that its budget pays, a max-probability policy asks one after another and pays their sum. The budgets are
what the four cost alone.

It gave, in FP32: 77.53, 80.88, 82.11 and 82.51 % after 5 epochs, 69.12 to 72.80 % after 2; asking one after another is worse than
jumping by up to 0.55 points at one budget. The static twin, INT8 and times have not been run yet.
"""

from dataclasses import replace

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import Joint
from anytime.models.iresnext import IResNeXt
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from anytime.policies.fixed import Fixed
from experiments.common import cifar_recipe

NETWORKS = (Static(IResNeXt(subnets=4)), IResNeXt(subnets=4))
LONG, SHORT = (replace(cifar_recipe(Joint()), epochs=epochs) for epochs in (5, 2))

EXPERIMENT = Experiment(
    name="baselines_iresnext",
    question="What do sub-networks that share their weights cost, against the whole network alone?",
    suites=(Suite(CIFAR10(), NETWORKS, others=((NETWORKS[1], SHORT),)),),
    recipe=LONG,
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(Fixed(), MaxProb()),
    budgets=(0.28, 0.52, 0.76, 1.0),
    boards=(Host(),),
)
