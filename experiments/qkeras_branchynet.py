"""What do few bits of QKeras leave of a network with side branches, and how fast is INT8 in TFLite?

    make exp EXP=qkeras_branchynet     (about a quarter of an hour on 2 quiet cores; its float networks lie in results/zoo)

B-LeNet and its static twin on MNIST, trained as in qat_branchynet. QKeras on 8, 4 and 2 bits (the first layer and each head's
last one keep 8), scored in simulation; TFLite's own INT8 of the float network and of QKeras' grids, its FP16 and dynamic-range
forms, with our INT8 under ONNX Runtime and OpenVINO beside them in one table.

It gave, at the last exit of B-LeNet: 99.42 % in FP32, 99.38 with 8 bits of QKeras (99.40 executed by TFLite), 99.12 with 4 and
98.70 with 2; 0.047 ms a sample in TFLite's INT8, 0.080 in our INT8 under OpenVINO, 0.055 in the fastest FP32.
"""

from anytime.backends.float import Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.backends.qkeras import QKeras
from anytime.backends.tflite import TFLite
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.mnist import MNIST
from anytime.models.branchynet import BLeNet
from anytime.models.static import Static
from anytime.policies.confidence import Entropy, MaxProb
from experiments.common import branchy_recipe

TUNE_EPOCHS = 3  # as in qat_branchynet; two bits get three times as many

EXPERIMENT = Experiment(
    name="qkeras_branchynet",
    question="What do few bits of QKeras leave of a network with side branches, and how fast is INT8 in TFLite?",
    suites=(Suite(MNIST(), (Static(BLeNet()), BLeNet())),),
    recipe=branchy_recipe(),
    backends=(
        Float32(),
        Float32(epochs=TUNE_EPOCHS),
        OnnxRuntime(of=Float32()),
        OpenVINO(of=Float32()),
        TFLite(of=Float32(), form="fp32"),
        TFLite(of=Float32(), form="fp16"),
        TFLite(of=Float32(), form="dynamic"),
        TFLite(of=Float32()),
        OnnxRuntime(of=PTQ(8, 8)),
        OpenVINO(of=PTQ(8, 8)),
        TFLite(of=QKeras(8, 8, epochs=TUNE_EPOCHS)),
        QKeras(8, 8, epochs=TUNE_EPOCHS),
        QKeras(4, 4, epochs=TUNE_EPOCHS),
        QKeras(2, 2, epochs=3 * TUNE_EPOCHS, lr_scale=1.0),
    ),
    policies=(Entropy(), MaxProb()),
    budgets=(0.25, 0.5, 0.65, 0.8, 1.0),
    boards=(Host(),),
)
