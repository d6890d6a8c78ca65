"""What do five small networks give that one network of their cost does not?

    make exp EXP=ensembles             (about 1 hour from nothing on 2 quiet cores, nearly all of it training)

LeNet-5 on CIFAR-10, 20 epochs a member: fusion, voting, bagging and boosting of five (100 epochs of one member's training each),
and snapshots, once of the 20 epochs of a single network and once of 100. Every member is quantized to INT8 and executed by
ONNX Runtime; voting in FP32 too. Beside them one LeNet-5 alone, and one of 2.76 times the width, which costs what five cost (5.08
times the MACs). Every ensemble stops between members where max-probability says so. One training seed; losses are paired with the
single FP32 network, image by image.

It gave, INT8, all five members: voting 68.44 %, bagging 68.27, boosting 71.29, fusion 72.09, where one LeNet-5 has 63.33; snapshots of
its 20 epochs 61.88, worse than one, of 100 epochs 70.50. The one network that costs what five cost has 75.98 % and needs 0.17 ms
where they need 0.71 to 0.84: five small networks are worth more than one of them, and less than one network of their cost.
"""

from anytime.backends.ensembles import Bagging, Fusion, GradientBoosting, Snapshot, Stack, Voting
from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.lenet import LeNet5
from anytime.policies.confidence import MaxProb
from anytime.train import Recipe

EPOCHS, MEMBERS = 20, 5
FP32, INT8 = OnnxRuntime(of=Float32()), OnnxRuntime(of=PTQ(8, 8))
AS_DEAR = LeNet5(width=2.76)  # 3.31 M MACs; five LeNet-5 have 3.26 M

EXPERIMENT = Experiment(
    name="ensembles",
    question="What do five small networks give that one network of their cost does not?",
    suites=(Suite(CIFAR10(), (LeNet5(),)),),
    recipe=Recipe(epochs=EPOCHS, batch=128, lr=1e-3),
    backends=(
        Float32(),
        FP32,
        INT8,
        *(Stack(members=((AS_DEAR, backend),)) for backend in (FP32, INT8)),
        *(Voting(backend, MEMBERS) for backend in (FP32, INT8)),
        Bagging(INT8, MEMBERS),
        Fusion(INT8, MEMBERS),
        GradientBoosting(INT8, MEMBERS),
        Snapshot(INT8, MEMBERS),
        Snapshot(INT8, MEMBERS, epochs=EPOCHS * MEMBERS),
    ),
    policies=(MaxProb(),),
    budgets=(1.5, 2.0, 3.0, 4.0, 5.0),
    boards=(Host(),),
)
