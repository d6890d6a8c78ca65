"""Does orthogonalized SGD teach a depth-nested network better than plain joint SGD?

    make exp EXP=baselines_sparse      (about 45 minutes on 2 quiet cores)

SparseResNet, four exits, on CIFAR-10: two epochs of joint SGD against the same two epochs of OSGD, which takes off each later
exit's gradient what lies along the earlier ones', over the whole vector of the parameters that both share; three training seeds, so
the intervals are over trainings. The runs are short: they compare the two steps, not what the network can reach (exit_or_smaller
trains it for 60 epochs, compresses and times it).

It gave, joint SGD and OSGD, exit by exit: 65.4 and 64.0 %, 68.4 and 67.9, 69.5 and 69.9, 70.4 and 71.5. In all three
pairs of trainings from one seed the last exit gains by OSGD and the first loses; each interval over trainings alone overlaps the other's.
Rows under ONNX Runtime are of single trainings, from before this experiment was one of FP32 alone.
"""

from dataclasses import replace

from anytime.backends.float import Float32
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.losses import Joint
from anytime.models.sparse_resnet import SparseResNet
from anytime.policies.confidence import MaxProb
from experiments.common import cifar_recipe

JOINT = replace(cifar_recipe(Joint()), epochs=2)

EXPERIMENT = Experiment(
    name="baselines_sparse",
    question="Does orthogonalized SGD teach a depth-nested network better than plain joint SGD?",
    suites=(Suite(CIFAR10(), (SparseResNet(),), others=((SparseResNet(), replace(JOINT, orthogonal="vector")),)),),
    recipe=JOINT,
    train_seeds=(0, 1, 2),
    backends=(Float32(),),
    policies=(MaxProb(),),
    budgets=(0.25, 0.5, 0.75, 1.0),
    boards=(),
)
