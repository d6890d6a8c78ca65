"""Do three differently built, differently quantized networks know more than the best of them, and is their cascade cheaper?

    make exp EXP=stacks                (about 90 minutes on 2 cores; its float networks lie in results/zoo)

B-AlexNet in INT8, SparseResNet in W4A8 and SDN ResNet-20 in BF16 on CIFAR-10, the last exit of each, by every combiner: the average of
their probabilities, a weighted one, an MLP, logistic regression and gradient boosting, learned on 976 images that no member
saw. Beside them each member alone and SDN ResNet-56 in INT8, which costs what the three cost (126 of 127 M MACs). W4A8 runs in
simulation; so the cascade is timed with the three in INT8 under ONNX Runtime, and once with the members' own exits. The members
were trained by recipes of their own (the networks of the zoo). A second stack has SDN ResNet-56 in B-AlexNet's place, three
networks that are nearly as good as each other; a third just the two SDN. One training seed.

It gave, three together: 91.15 % averaged, 91.31 with a weight for each, 91.26 by logistic regression, 90.47 by gradient boosting, 89.94 by
the MLP; the best member 90.00, SDN ResNet-56 91.99. Averaged with SDN ResNet-56 92.67; that cascade has 92.14 % at 1.6, half of
SDN ResNet-56's MACs, and takes nearly as long as that, for SparseResNet takes longer than SDN ResNet-56 in ONNX Runtime. The cascade
of the two SDN alone has 92.31 % for the same MACs, in two thirds of the time.
"""

from anytime.backends.ensembles import Stack
from anytime.backends.float import BFloat16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import Joint
from anytime.models.branchynet import BAlexNet
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.policies.confidence import MaxProb
from experiments.common import branchy_recipe, cifar_recipe, short_cifar_recipe, trunk_first_recipe

INT8 = OnnxRuntime(of=PTQ(8, 8))
NETWORKS = (
    (BAlexNet(), branchy_recipe()),
    (SparseResNet(), cifar_recipe(Joint())),
    (SDN("resnet20"), short_cifar_recipe()),
)
ARITHMETICS = (INT8, PTQ(4, 8), BFloat16())
DIFFERENT = tuple((model, backend, recipe) for (model, recipe), backend in zip(NETWORKS, ARITHMETICS, strict=True))
ONE_ENGINE = tuple((model, INT8, recipe) for model, recipe in NETWORKS)
LARGEST = (SDN("resnet56"), INT8, trunk_first_recipe())
RESIDUAL = (DIFFERENT[2], DIFFERENT[1], LARGEST)
RESIDUAL_ONE_ENGINE = (ONE_ENGINE[2], ONE_ENGINE[1], LARGEST)
TWO = (ONE_ENGINE[2], LARGEST)

EXPERIMENT = Experiment(
    name="stacks",
    question="Do three differently built, differently quantized networks know more than the best of them, and is their cascade cheaper?",
    suites=(Suite(CIFAR10(), (SDN("resnet20"),)),),
    recipe=short_cifar_recipe(),
    backends=(
        Float32(),
        *(Stack(members=(member,)) for member in dict.fromkeys(DIFFERENT + ONE_ENGINE)),
        Stack(members=(LARGEST,)),
        *(Stack(members=DIFFERENT, combine=how) for how in ("average", "weighted", "mlp", "logistic", "gradient_boosting")),
        *(Stack(members=ONE_ENGINE, combine=how) for how in ("average", "weighted", "mlp")),
        Stack(members=ONE_ENGINE, combine="weighted", inner_exits=True),
        *(Stack(members=RESIDUAL, combine=how) for how in ("average", "mlp")),
        *(Stack(members=RESIDUAL_ONE_ENGINE, combine=how) for how in ("average", "mlp")),
        Stack(members=TWO),
    ),
    policies=(MaxProb(), MaxProb(per_exit=True)),
    budgets=(0.8, 1.0, 1.3, 1.6, 2.0, 3.1),
    boards=(Host(),),
)
