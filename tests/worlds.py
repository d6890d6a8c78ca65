"""Small worlds that the tests share: a tiny chain, synthetic data, a recipe of seconds."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from anytime.dataset import Data
from anytime.datasets.synthetic import Synthetic
from anytime.model import AnytimeModel, ModelSpec
from anytime.train import Recipe, Trainer


@dataclass(frozen=True)
class Tiny(ModelSpec):
    """Three exits over convolutions with BatchNorm, a residual add, a shared tap, every kind of pooling."""

    width: int = 8

    def build(self, input_shape, n_classes):
        c = self.width
        return AnytimeModel(
            stages=[
                nn.Sequential(nn.Conv2d(input_shape[0], c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)),
                nn.Sequential(Residual(c), nn.MaxPool2d(2, ceil_mode=True)),
                nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), nn.BatchNorm2d(2 * c), nn.ReLU()),
            ],
            heads=[
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n_classes)),
                nn.Sequential(
                    nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n_classes)
                ),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(2 * c, n_classes)),
            ],
        )


@dataclass(frozen=True)
class Restarting(ModelSpec):
    """Two sub-networks that both start from the input, as IResNeXt's do."""

    def build(self, input_shape, n_classes):
        def sub(c):
            return nn.Sequential(nn.Conv2d(input_shape[0], c, 3, 2, 1), nn.ReLU())

        def head(c):
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n_classes))

        return AnytimeModel([sub(8), sub(16)], [head(8), head(16)], restarts=True)


class Residual(nn.Module):
    """x + conv(relu(conv(x))), then relu."""

    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.bn, self.relu, self.last = nn.BatchNorm2d(c), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.last(x + self.bn(self.b(self.relu(self.a(x)))))


@lru_cache
def data() -> Data:
    """Four classes of 3x16x16."""
    return Synthetic(n=800, noise=0.25, size=16, channels=3, n_classes=4).load(0)


def trainer(**recipe) -> Trainer:
    """Two epochs unless said otherwise."""
    return Trainer(Recipe(**{"epochs": 2, "batch": 64, "lr": 1e-2, **recipe}), data().train, 0, tune=data().tune)


def fresh(spec: ModelSpec = Tiny()) -> AnytimeModel:
    """Tiny, or another one, before any training; always the same weights."""
    torch.manual_seed(0)
    return spec.build((3, 16, 16), 4)


@lru_cache
def trained(spec: ModelSpec = Tiny()) -> AnytimeModel:
    """Tiny, or another one, trained."""
    return trainer().fit(fresh(spec))


def family(spec: ModelSpec = Tiny(), **fields) -> Trainer:
    """The trainer of ``spec``, which knows the other members of its ensemble; nothing is kept."""
    own = replace(trainer(), hold=data().hold, key=spec.label, **fields)

    def other(i=0, model=None, recipe=None, fresh=False):
        its = model or spec
        its_trainer = replace(
            own, others=other, train_seed=i, recipe=recipe or own.recipe, key=f"{its.label} {i}" if i else its.label
        )
        torch.manual_seed(i)
        net = its.build((3, 16, 16), 4)
        return (net if fresh else its_trainer.fit(net)), its_trainer

    return replace(own, others=other)
