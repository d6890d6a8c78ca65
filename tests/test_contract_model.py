"""The model contract over every keeper, and the saboteurs that it must catch."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass, fields

import pytest
import torch
from torch import nn

import anytime.models
from anytime.errors import UsageError
from anytime.model import AnytimeModel, ModelSpec
from anytime.models.branchynet import BLeNet
from tests.contracts.model import model_keeps_its_promise
from tests.worlds import Tiny

SHAPES = ((1, 28, 28), (3, 32, 32), (3, 224, 224))


def keepers():
    for info in pkgutil.iter_modules(anytime.models.__path__, "anytime.models."):
        for cls in vars(importlib.import_module(info.name)).values():
            mine = inspect.isclass(cls) and issubclass(cls, ModelSpec) and cls.__module__ == info.name
            if mine and not inspect.isabstract(cls):
                yield cls(of=BLeNet()) if "of" in {f.name for f in fields(cls)} else cls()


def shape_of(spec):
    for shape in SHAPES:
        try:
            spec.build(shape, 10)
            return shape
        except UsageError:
            continue
    raise AssertionError(f"{spec.label} takes none of the shapes {SHAPES}: add its own")


def test_the_walk_finds_the_keepers():
    assert {"BLeNet", "SDN", "IResNeXt", "SparseResNet", "MSDNet", "Attached", "Static"} <= {
        type(spec).__name__ for spec in keepers()
    }


@pytest.mark.parametrize("spec", list(keepers()), ids=lambda s: s.label)
def test_model(spec):
    model_keeps_its_promise(spec, shape_of(spec))


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Noisy(nn.Module):
    def forward(self, x):
        return x + x.mean(0)


class Unused(nn.Linear):
    def __init__(self):
        super().__init__(8, 10)
        self.more = nn.Parameter(torch.zeros(1))


class Other(AnytimeModel):
    def forward(self, x):
        return 2 * super().forward(x)


@dataclass(frozen=True)
class Makes(ModelSpec):
    """Source: a saboteur."""

    what: str = ""

    def build(self, input_shape, n_classes):
        if input_shape[0] != 3 and self.what != "any shape":
            raise UsageError("three channels")
        if self.what == "seeded":
            torch.manual_seed(torch.seed() % 2**31)
        model = Tiny().build((3, 16, 16), n_classes)
        if self.what == "one exit":
            return AnytimeModel(model.stages[:1], model.heads[:1])
        if self.what == "in place":
            model.stages[1].insert(0, InPlace())
        if self.what == "batch":
            model.heads[0].insert(0, Noisy())
        if self.what == "unused":
            model.heads[0][2] = Unused()
        if self.what == "seen":
            model.trained_on = frozenset({"x"})
        if self.what == "head in place":
            model.heads[0].insert(0, InPlace())
        if self.what == "infinite":
            torch.nn.init.constant_(model.heads[0][2].bias, float("inf"))
        if self.what == "one class":
            model = Tiny().build((3, 16, 16), 1)
        if self.what == "other head":
            model.__class__ = Other
        if self.what == "free":
            model.stages[2] = nn.Identity()
            model.heads[2] = model.heads[1]
            model.heads[1] = nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1), *model.heads[1][1:2], nn.Conv2d(16, 8, 1), *model.heads[1][2:]
            )
        return model


@pytest.mark.parametrize(
    "what, said",
    [
        ("one exit", "how many exits"),
        ("seeded", "the same seed builds another"),
        ("in place", "changes the state that it reads"),
        ("batch", "depends on its batch"),
        ("unused", "no exit uses"),
        ("seen", "has seen nothing"),
        ("any shape", "not in a sentence"),
        ("free", "costs no more"),
        ("other head", "is not what forward runs"),
        ("head in place", "head 0 changes the state"),
        ("infinite", "logits are not finite"),
        ("one class", r"forward must be \[E, B, K\]"),
    ],
)
def test_the_contract_catches(what, said):
    with pytest.raises(AssertionError, match=said):
        model_keeps_its_promise(Makes(what), (3, 16, 16))


def test_the_branchynet_pool_and_relu_commute():
    """The tap lies behind "relu, pool", where the paper's code has "pool, relu" in both branches: the same function."""
    x = torch.randn(4, 5, 30, 30)
    pool, relu = nn.MaxPool2d(2, 2, ceil_mode=True), nn.ReLU()
    assert torch.equal(pool(relu(x)), relu(pool(x)))


def test_the_lrn_is_torchs_and_chainers():
    from anytime.layers import LocalResponseNorm

    x = torch.randn(2, 7, 4, 4) * 30
    ours = LocalResponseNorm(3, alpha=3 * 5e-5, beta=0.75, k=2.0)(x)
    assert torch.allclose(ours, nn.LocalResponseNorm(3, 3 * 5e-5, 0.75, 2.0)(x), rtol=1e-5, atol=1e-6)
    # Chainer: x / (k + alpha sum)^beta, its alpha not divided by the size
    padded = nn.functional.pad(x.square(), (0, 0, 0, 0, 1, 1))
    chainer = x / (2 + 5e-5 * (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:])) ** 0.75
    assert torch.allclose(ours, chainer, rtol=1e-5, atol=1e-6)


def test_a_network_begins_from_its_static_twin():
    from anytime.models.static import Static
    from anytime.workshop import _inherit

    base, net = Static(BLeNet()).build((1, 28, 28), 10), BLeNet().build((1, 28, 28), 10)
    _inherit(net, base, alike=False)
    x = torch.randn(2, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(net(x)[-1], base(x)[0])
