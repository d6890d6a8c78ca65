"""How many samples change their exit although nothing was compressed?

    make exp EXP=floors                (about 25 minutes on 2 quiet cores, nearly all of it the second training)

The floors under what `decisions` shows: FP32 in another engine, and FP32 trained again from another seed. B-LeNet on MNIST and
B-AlexNet on CIFAR-10, two training seeds, every policy with thresholds kept from the other training beside refitted ones; INT8 PTQ
beside it for scale. Its second seed also says how far two trainings differ in accuracy.

It gave, max-probability: another training of B-LeNet, asked for 0.5, moves the exit of 16.7 % of the samples, INT8 of 0.9 %; of
B-AlexNet, asked for 0.75, of 23.8 %, INT8 of 1.3 %; another engine moves none.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.mnist import MNIST
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.policies.confidence import Entropy, Margin, MaxProb
from anytime.policies.patience import Patience
from experiments.common import branchy_recipe

EXPERIMENT = Experiment(
    name="floors",
    question="How many samples change their exit although nothing was compressed?",
    suites=(Suite(MNIST(), (BLeNet(),)), Suite(CIFAR10(), (BAlexNet(),))),
    recipe=branchy_recipe(),
    train_seeds=(0, 1),
    backends=(Float32(), OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(MaxProb(), Entropy(), Margin(), Patience()),
    budgets=(0.4, 0.5, 0.6, 0.75),
    budgets_of="own",
    arms=("refitted", "kept", "retrained"),
)
