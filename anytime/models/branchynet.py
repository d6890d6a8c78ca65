"""BranchyNet's networks: LeNet and AlexNet with side branches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from anytime.layers import LocalResponseNorm
from anytime.model import AnytimeModel, ModelSpec, need_shape


def _conv(c_in: int, c_out: int, kernel: int, pad: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=pad)


@dataclass(frozen=True)
class BLeNet(ModelSpec):
    """B-LeNet, two exits, for 1x28x28.

    Pooling is in ceil mode (Chainer's ``cover_all``). In the paper's code the branch and the trunk both begin
    with the same "pool, relu" of the first convolution; here that is computed once, before the tap, and as
    "relu, pool", which is the same function: less work and a smaller state, the same MACs.
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
    """B-AlexNet, three exits, for 3x32x32.

    What a branch and the trunk both begin with (relu, pool, LRN at the first tap; relu at the second) is
    computed once, before the tap. LRN is Chainer's: x / (2 + 5e-5 sum x^2)^0.75 over 3 channels, which is
    torch's and ONNX's with k = 2 and alpha = 3 x 5e-5. Dropout 0.5, Chainer's default.
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
