"""BranchyNet's networks: LeNet, AlexNet and ResNet-110 with side branches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from anytime.layers import BasicBlock, LocalResponseNorm, ZeroPadShortcut, he_normal
from anytime.model import AnytimeModel, ModelSpec, need_shape


def _conv(c_in: int, c_out: int, kernel: int, pad: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=pad)


@dataclass(frozen=True)
class BLeNet(ModelSpec):
    """B-LeNet, two exits, for 1x28x28: 0.220 and 1.248 M MACs with every head run, 74,694 parameters.

    Pooling is in ceil mode (Chainer's ``cover_all``). In the paper's code the branch and the trunk both begin
    with the same "pool, relu" of the first convolution; here that is computed once, before the tap, and as
    "relu, pool", which is the same function: less work and a smaller state, the same MACs. Deviation: weights begin as
    torch draws them, not Chainer's LeCun-normal.
    Source: Teerapittayanon, McDanel, Kung, "BranchyNet", ICPR 2016, arXiv:1709.01686, section IV; layers from the
    authors' networks/lenet code (the branch position in the text differs).
    """

    @property
    def label(self) -> str:
        return "B-LeNet"

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (1, 28, 28))

        def pool() -> nn.MaxPool2d:
            return nn.MaxPool2d(2, 2, ceil_mode=True)

        return AnytimeModel(
            stages=[
                nn.Sequential(_conv(1, 5, 5, 3), nn.ReLU(), pool()),
                nn.Sequential(_conv(5, 10, 5, 3), nn.ReLU(), pool(), _conv(10, 20, 5, 3), nn.ReLU(), pool()),
            ],
            heads=[
                nn.Sequential(_conv(5, 10, 3, 1), nn.ReLU(), pool(), nn.Flatten(), nn.Linear(640, n_classes)),
                nn.Sequential(nn.Flatten(), nn.Linear(720, 84), nn.Linear(84, n_classes)),
            ],
        )


@dataclass(frozen=True)
class BAlexNet(ModelSpec):
    """B-AlexNet, three exits, for 3x32x32: 17.34, 21.32 and 30.47 M MACs with every head run, 0.606 M parameters.

    What a branch and the trunk both begin with (relu, pool, LRN at the first tap; relu at the second) is
    computed once, before the tap. LRN is Chainer's: x / (2 + 5e-5 sum x^2)^0.75 over 3 channels, which is
    torch's and ONNX's with k = 2 and alpha = 3 x 5e-5. Dropout 0.5, Chainer's default. Deviation: weights begin as torch draws them.
    Source: Teerapittayanon, McDanel, Kung, "BranchyNet", ICPR 2016, arXiv:1709.01686, section IV; layers from the
    authors' networks/alex code (branches after the second and third convolution; the text says first and second).
    """

    @property
    def label(self) -> str:
        return "B-AlexNet"

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))

        def pool() -> nn.MaxPool2d:
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        def lrn() -> LocalResponseNorm:
            return LocalResponseNorm(3, alpha=3 * 5e-5, beta=0.75, k=2.0)

        return AnytimeModel(
            stages=[
                nn.Sequential(_conv(3, 32, 5, 2), nn.ReLU(), pool(), lrn(), _conv(32, 64, 5, 2), nn.ReLU(), pool(), lrn()),
                nn.Sequential(_conv(64, 96, 3, 1), nn.ReLU()),
                nn.Sequential(_conv(96, 96, 3, 1), nn.ReLU(), _conv(96, 64, 3, 1), nn.ReLU(), pool()),
            ],
            heads=[
                nn.Sequential(
                    _conv(64, 32, 3, 1), nn.ReLU(), _conv(32, 32, 3, 1), nn.ReLU(), pool(), nn.Flatten(), nn.Linear(512, n_classes)
                ),
                nn.Sequential(pool(), lrn(), _conv(96, 32, 3, 1), nn.ReLU(), pool(), nn.Flatten(), nn.Linear(128, n_classes)),
                nn.Sequential(
                    nn.Flatten(),
                    *(nn.Linear(1024, 256), nn.ReLU(), nn.Dropout()),
                    *(nn.Linear(256, 128), nn.ReLU(), nn.Dropout()),
                    nn.Linear(128, n_classes),
                ),
            ],
        )  # fmt: skip


@dataclass(frozen=True)
class BResNet110(ModelSpec):
    """B-ResNet110, three exits, for 3x32x32: 48.60, 127.54 and 284.91 M MACs with every head run, 2.227 M parameters.

    The first convolution has no padding, so the maps are 30x30, 15x15 and 8x8. Option-A shortcuts whose zero channels
    stand in front, convolutions with biases, as in the authors' code. LRN as in BAlexNet. The first branch lies
    behind the first ReLU, as in the code of the paper's experiments; a later version moved it behind a first block.
    Every convolution starts He-normal by fan-in; there the branch's own start with Chainer's LeCun-normal.
    Source: Teerapittayanon, McDanel, Kung, "BranchyNet", ICPR 2016, arXiv:1709.01686, section IV; layers from the
    authors' networks/resnet code.
    """

    @property
    def label(self) -> str:
        return "B-ResNet110"

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))

        def plain(c: int, n: int) -> list[nn.Module]:
            return [BasicBlock(c, c, 1, nn.Identity(), bias=True) for _ in range(n)]

        def halved(c: int) -> BasicBlock:
            return BasicBlock(c // 2, c, 2, ZeroPadShortcut(2, front=c // 2, back=0), bias=True)

        model = AnytimeModel(
            stages=[
                nn.Sequential(_conv(3, 16, 3, 0), nn.BatchNorm2d(16), nn.ReLU()),
                nn.Sequential(*plain(16, 18)),
                nn.Sequential(halved(32), *plain(32, 17), halved(64), *plain(64, 17)),
            ],
            heads=[
                nn.Sequential(
                    *(_conv(16, 64, 5, 2), nn.ReLU(), LocalResponseNorm(3, alpha=3 * 5e-5, beta=0.75, k=2.0)),
                    *(_conv(64, 32, 3, 1), nn.ReLU(), _conv(32, 32, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(28800, n_classes)),
                ),
                nn.Sequential(*plain(16, 1), nn.Flatten(), nn.Linear(14400, n_classes)),
                nn.Sequential(nn.AvgPool2d(6, 1), nn.Flatten(), nn.Linear(576, n_classes)),
            ],
        )
        he_normal(model, "fan_in")
        return model
