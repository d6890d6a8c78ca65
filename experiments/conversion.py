"""What does converting torchvision's classifiers cost in fidelity, and what does it gain in speed?

    make exp EXP=conversion            (about 45 minutes on 2 quiet cores, 16 GB; nothing is trained)
    make measure EXP=conversion BOARD=agx_xavier

torch2trt's table (name, data type, input shape, options, max error, throughput and latency before and after) for FP32, FP16 and INT8:
on this host by ONNX Runtime and OpenVINO, on a board by TensorRT, whose graphs are scored here by ONNX Runtime and timed there.

Nobody trained these networks: no weights can be downloaded where this was made, so theirs are torchvision's initialisation, training
seed 0, with BatchNorm measured on 64 images, and no accuracy is shown. Such networks answer by small margins and with few classes, so
agreement says less of a trained one than errors as a share of the logits' range do. The images are real: photos of CIFAR-10, 32x32
brought to 224x224 bilinearly, normalised as ImageNet's, in 1000 classes that their labels do not name. INT8 is calibrated on 32 of the
published training set, where users of TensorRT calibrate on one random input; errors and agreement are those on 128 of the test
set. With weights of your own, ``Attached("resnet50", at, weights="resnet50.pth", trained_on=("imagenet",))``, they are those of your
network; with images and labels of your own too (``ImageFolder``), accuracies stand beside them.

Where a network has exits, images are made to leave by the geometric split: as many at each exit as spend half, or 0.75, of the MACs of
the classifier without exits. Whether they leave rightly nobody can know: those rows tell latency only. Left out is VGG: AlexNet in all
its forms takes 10 GB already. DenseNet-121 in INT8, of which OpenVINO used to die, has not been run there yet.

It gave, batch 1, one thread of a 2-core Xeon with AMX: ResNet-50 105.6 ms in torch, 64.0 in FP32 and 21.1 in INT8 under ONNX Runtime,
8.1 in INT8 under OpenVINO (version 1 of it, which rounded what it fuses); FP16 in torch is slower than FP32 for all six. INT8's
largest error is 0.7 % of the logits' range for AlexNet and 44 % for ResNet-50; 39 (MobileNetV2) to 96 % (AlexNet) of the photos keep
their class, by the tiny margins of untrained networks.
"""

from anytime.backends.float import Float16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ptq import PTQ
from anytime.backends.tensorrt import TensorRT
from anytime.boards.host import Host
from anytime.config import Experiment, Suite
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.enlarged import Enlarged
from anytime.models.attached import Attached
from anytime.models.static import Static
from anytime.policies.geometric import GeometricSplit
from anytime.train import Recipe

# Weights by their largest, as TensorRT does: by the error of rounding they take a minute of AlexNet's 61 million.
INT8 = PTQ(8, 8, weight_observer="minmax")
PHOTOS = Enlarged(CIFAR10(statistics="imagenet"), size=224, n_classes=1000, limit=128, calib=32, tune=2, val=28, hold=2)
PLAIN = (
    Attached("alexnet", ("features.5",)),
    Attached("squeezenet1_1", ("features.7",)),
    Attached("densenet121", ("features.denseblock2",)),
)
WITH_EXITS = (
    Attached("mobilenet_v2", ("features.6", "features.13")),
    Attached("resnet18", ("layer1", "layer2", "layer3")),
    Attached("resnet50", ("layer1", "layer2", "layer3")),
)

EXPERIMENT = Experiment(
    name="conversion",
    question="What does converting torchvision's classifiers cost in fidelity, and what does it gain in speed?",
    suites=(
        *(Suite(PHOTOS, (Static(network),)) for network in PLAIN),
        *(Suite(PHOTOS, (Static(network), network)) for network in WITH_EXITS),
    ),
    recipe=Recipe(epochs=0),
    backends=(
        Float32(),
        Float16(),
        OnnxRuntime(of=Float32()),
        OnnxRuntime(of=INT8),
        OpenVINO(of=Float32()),
        OpenVINO(of=INT8),
        TensorRT(of=Float32(), precision="fp32"),
        TensorRT(of=Float32(), precision="fp16"),
        TensorRT(of=INT8),
    ),
    policies=(GeometricSplit(),),
    budgets=(0.5, 0.75),
    boards=(Host(), Host(batch=8, launches=1, warmup=2)),
    arms=("refitted",),
    time_samples=24,
    replay_samples=64,
)
