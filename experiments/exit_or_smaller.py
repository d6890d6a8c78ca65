"""Early exit, or just a smaller network?

    make exp EXP=exit_or_smaller       (about 8 hours on 2 quiet cores, nearly all of it training, none of it twice)

SDN on ResNet-56 and SparseResNet under policies against static ResNet-56, 44, 32 and 20 of the same blocks, all trained 60
epochs by the same optimizer and augmentation, in two cycles (40 without exits, 20 with them; the static ones likewise) but for
SparseResNet, whose exits are trained together from the start; executed by the same engine in FP32 and in INT8 PTQ. The budgets
are what the static networks cost: 0.325, 0.55 and 0.775 of ResNet-56's MACs are ResNet-20's, 32's and 44's; 0.2 and 0.45 lie
between. Read it along the latency that was measured: what is on the front is worth its time beyond the noise.

It gave, in INT8 (an EPYC with AVX512-VNNI): ResNet-20 91.17 % in 0.36 ms, ResNet-32 91.90 % in 0.62 ms, ResNet-56 92.51 % in 1.00 ms; SDN
ResNet-56, reading up to three exits under max-probability, 91.41 % in 0.73 ms and 92.17 % in 0.96 ms: the smaller network. SparseResNet has
91.09 % for 25.5 M MACs, where ResNet-20 has 91.17 for 40.8, and takes 0.75 ms. ResNet-44 has not been run yet.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import Joint
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.models.static import Static
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.reading import Reading
from experiments.common import cifar_recipe, trunk_first_recipe

STATIC = tuple(Static(SDN(trunk)) for trunk in ("resnet56", "resnet44", "resnet32", "resnet20"))

EXPERIMENT = Experiment(
    name="exit_or_smaller",
    question="Early exit, or just a smaller network?",
    suites=(Suite(CIFAR10(), (*STATIC, SDN("resnet56")), others=((SparseResNet(), cifar_recipe(Joint())),)),),
    recipe=trunk_first_recipe(),  # of a network with one exit it is the plain cross-entropy
    backends=(OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))),
    policies=(MaxProb(), Entropy(), Reading(of=MaxProb())),
    budgets=(0.2, 0.325, 0.45, 0.55, 0.775, 1.0),
    boards=(Host(),),
)
