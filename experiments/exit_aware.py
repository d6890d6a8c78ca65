"""Does it pay to quantize an anytime network by what its exits do?

    make exp EXP=exit_aware            (about 40 minutes on 2 quiet cores; the float networks lie in results/zoo)

Two ablations on SDN ResNet-56 and B-AlexNet under a max-probability policy at 0.6 of the network's cost. Exit-conditional
calibration: every stage is calibrated, and its rounding learned, on the calibration images that reach it, against all of them on
every stage; W4A8 and W4A4. Reach-weighted mixed precision: bits by an integer program that counts a layer's BOPs by how many
samples reach it, and exits by how many leave there, against one that counts every layer and exit alike (``weigh=False``); both
calibrated alike and allowed the same expected BOPs: W4A4's on SDN ResNet-56, three quarters of them on B-AlexNet, whose
first layer keeps 8 bits; rounded to nearest, and by QDrop. Policies are fitted on val after compression. What each field gives
stands in the table under "One field more".

It gave: calibration on what reaches a stage changes nothing beyond the noise, -0.22 to +0.16 points over all exits and budgets.
Bits by reach: SDN ResNet-56 at 0.6 has 90.98 % where the plain choice has 90.52 (the difference 0.46 [0.12, 0.80]), uniform
W4A4 90.63; B-AlexNet 77.88 and 77.65 (0.23 [-0.05, 0.51]). Learned rounding gives more than both, and nothing is left for the bits:
uniform W4A4 by QDrop has 91.58, bits by reach and QDrop 91.46, the plain choice and QDrop 91.59; B-AlexNet 79.15 and 79.07.
SDN ResNet-56's bits by reach with QDrop are of before histograms weighed all samples alike, and are to be run again (FORCE=1).
"""

from anytime.backends.float import Float32
from anytime.backends.mixed import MixedPrecision
from anytime.backends.ptq import PTQ
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.models.branchynet import BAlexNet
from anytime.models.sdn import SDN
from anytime.policies.confidence import MaxProb
from anytime.reach import Reach
from experiments.common import branchy_recipe, trunk_first_recipe

REACH = Reach(MaxProb(), 0.6)
SHARE = 0.26  # of W8A8's expected BOPs: about W4A4's on SDN ResNet-56

EXPERIMENT = Experiment(
    name="exit_aware",
    question="Does it pay to quantize an anytime network by what its exits do?",
    suites=(Suite(CIFAR10(), (SDN("resnet56"),), others=((BAlexNet(), branchy_recipe()),)),),
    recipe=trunk_first_recipe(),
    backends=(
        Float32(),
        *(PTQ(4, a, add_bits=8, reach=reach) for a in (8, 4) for reach in (None, REACH)),
        *(PTQ(4, 4, add_bits=8, rounding="qdrop", iterations=500, reach=reach) for reach in (None, REACH)),
        *(MixedPrecision(reach=REACH, bops=SHARE, weigh=weigh) for weigh in (False, True)),
        *(MixedPrecision(reach=REACH, bops=SHARE, weigh=weigh, rounding="qdrop", iterations=500) for weigh in (False, True)),
    ),
    policies=(MaxProb(),),
    budgets=(0.4, 0.6, 0.8),
    budgets_of="own",
)
