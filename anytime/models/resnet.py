"""The residual networks for CIFAR, without exits, into which published weights load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from anytime.errors import AnytimeError, UsageError, first_line
from anytime.layers import BasicBlock, ZeroPadShortcut
from anytime.model import AnytimeModel, ModelSpec, need_shape

# What anytime.dataset calls CIFAR-10's published training set, all 50,000 images of it (``CIFAR10().load(0).train.origins``).
CIFAR10_TRAIN = "6c49b531d8e07562"
_WIDTHS = (16, 32, 64)


@dataclass(frozen=True)
class _ResNet(ModelSpec, ABC):
    """6n + 2 layers: one convolution, three groups of n blocks, one linear layer.

    ``weights``: file with a torch state dict of akamaster/pytorch_resnet_cifar10, whose names these layers bear; the
    published ones want ``CIFAR10(statistics="imagenet")``.
    """

    exits_early: ClassVar[bool] = False

    weights: str = ""

    @property
    @abstractmethod
    def n(self) -> int:
        """Blocks per group."""

    @property
    def label(self) -> str:
        return f"ResNet-{6 * self.n + 2}" + (f" from {Path(self.weights).name}" if self.weights else "")

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        need_shape(self, input_shape, (3, 32, 32))
        groups = zip(_WIDTHS[:1] + _WIDTHS, _WIDTHS, (1, 2, 2), strict=False)
        stage = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, _WIDTHS[0], 3, 1, 1, bias=False),
                bn1=nn.BatchNorm2d(_WIDTHS[0]),
                relu=nn.ReLU(),
                **{f"layer{i}": _group(self.n, *group) for i, group in enumerate(groups, 1)},
            )
        )
        head = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(_WIDTHS[-1], n_classes))
        )
        model = AnytimeModel([stage], [head])
        for m in model.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)
        if self.weights:
            _import(model, self.weights, self.label)
        return model


def _group(n: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    grown = c_out - c_in
    first = BasicBlock(c_in, c_out, stride, ZeroPadShortcut(stride, grown // 2, grown // 2) if grown else nn.Identity())
    return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1, nn.Identity()) for _ in range(n - 1)))


def _import(model: AnytimeModel, path: str, label: str) -> None:
    """Load the weights, all of them and nothing else; the network has then seen the whole published training set."""
    given, own = _read(path), model.state_dict()
    short = {name.removeprefix("stages.0.").removeprefix("heads.0."): name for name in own}
    # Older torch kept no such counter; without it BatchNorm's running statistics are used as they are.
    missing = [s for s in short if s not in given and not s.endswith("num_batches_tracked")]
    unexpected = [s for s in given if s not in short]
    shapes = [s for s in short if s in given and given[s].shape != own[short[s]].shape]
    troubles = [("has no", missing), ("has, in excess,", unexpected), ("has another shape of", shapes)]
    said = "; ".join(f"it {what} {_few(names)}" for what, names in troubles if names)
    if said:
        raise UsageError(f"{path} does not fit {label}: {said}; give the weights of this very network")
    model.load_state_dict({short[s]: t for s, t in given.items()}, strict=False)
    model.trained_on = frozenset({CIFAR10_TRAIN})


def _read(path: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise AnytimeError(f"there is no file {path}: give the path of a torch state dict as weights, or none")
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise UsageError(
            f"{path} cannot be read as torch weights ({first_line(error)}): give a file that torch.save wrote"
        ) from error
    state = held.get("state_dict", held) if isinstance(held, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()):
        raise UsageError(f"{path} holds no state dict: give a file that maps names to tensors, alone or under 'state_dict'")
    return {name.removeprefix("module."): t for name, t in state.items()}  # DataParallel puts the prefix there


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class ResNet20(_ResNet):
    """ResNet-20 for 3x32x32: 40.55 M MACs, 0.27 M parameters.

    Option-A shortcuts. Initialised as akamaster's code does: He normal by fan-in, the linear layer too.
    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385,
    section 4.2; layer names from github.com/akamaster/pytorch_resnet_cifar10.
    """

    @property
    def n(self) -> int:
        return 3


@dataclass(frozen=True)
class ResNet32(_ResNet):
    """ResNet-32 for 3x32x32: 68.86 M MACs, 0.46 M parameters; otherwise as ResNet20.

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385, section 4.2.
    """

    @property
    def n(self) -> int:
        return 5


@dataclass(frozen=True)
class ResNet44(_ResNet):
    """ResNet-44 for 3x32x32: 97.17 M MACs, 0.66 M parameters; otherwise as ResNet20.

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385, section 4.2.
    """

    @property
    def n(self) -> int:
        return 7


@dataclass(frozen=True)
class ResNet56(_ResNet):
    """ResNet-56 for 3x32x32: 125.49 M MACs, 0.85 M parameters; otherwise as ResNet20.

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385, section 4.2.
    """

    @property
    def n(self) -> int:
        return 9


@dataclass(frozen=True)
class ResNet110(_ResNet):
    """ResNet-110 for 3x32x32: 252.89 M MACs, 1.7 M parameters; otherwise as ResNet20.

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385, section 4.2.
    """

    @property
    def n(self) -> int:
        return 18
