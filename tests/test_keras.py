"""The chain in Keras: equal to torch link by link, and a sentence where it cannot be."""

import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from torch import nn

from anytime import tf
from anytime.errors import AnytimeError, Unsupported
from anytime.keras_chain import KerasChain
from anytime.keras_layers import channels_last
from anytime.layers import LocalResponseNorm, MixedPool2d, ZeroPadShortcut
from anytime.model import AnytimeModel, Segment
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.models.course import ThreeExitMLP
from anytime.models.sdn import SDN
from anytime.quant.graph import Widths, prepared
from anytime.quant.trace import traced
from anytime.tf import missing
from tests.worlds import Residual, Restarting


@pytest.fixture(autouse=True)
def installed():
    if reason := missing():
        pytest.skip(reason)


def uneven(model):
    """BatchNorm that does something."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model.eval()


def in_keras(model, x, fold_bn=True):
    chain = KerasChain(traced(model, fold_bn), tuple(x.shape[1:]))
    return chain, chain.whole()(channels_last(x).numpy()).numpy()


def one_link(layer, x):
    """A chain whose stage is a layer and whose head says all that comes out of it."""
    return uneven(AnytimeModel([nn.Sequential(layer)], [nn.Sequential(nn.Flatten())])), x


@pytest.mark.parametrize(
    "spec, shape",
    [(BLeNet(), (1, 28, 28)), (BAlexNet(), (3, 32, 32)), (ThreeExitMLP(64), (1, 28, 28)), (SDN("resnet20"), (3, 32, 32))],
    ids=lambda v: getattr(v, "label", ""),
)
def test_networks_are_equal_at_every_exit(spec, shape):
    model, x = uneven(spec.build(shape, 10)), torch.randn(3, *shape)
    with torch.inference_mode():
        want = model(x).numpy()
    chain, got = in_keras(model, x)
    assert np.abs(got - want).max() <= 1e-4 * max(1, np.abs(want).max())
    assert set(chain.links) == {f"{kind}.{k}" for kind in ("stages", "heads") for k in range(model.n_exits)}


class Joined(nn.Module):
    """Flattened maps that are joined, and maps that are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        both = torch.cat([self.a(x), self.b(x)], 1)
        return torch.cat([torch.relu(both.flatten(1)), torch.flatten(x, 1)], dim=1)


class Sliced(nn.Module):
    def forward(self, x):
        return x[:, ::2]


class Scaled(nn.Module):
    def forward(self, x):
        return torch.add(x, torch.relu(x), alpha=2)


LAYERS = {
    "grouped": nn.Conv2d(4, 6, 3, 2, 1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
    "dilated": nn.Conv2d(4, 5, 3, padding=2, dilation=2),
    "one-sided kernel": nn.Conv2d(4, 5, (1, 3), padding=(0, 1)),
    "own padding": nn.Conv2d(4, 5, 5, padding=3),
    "BatchNorm": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    "padded maximum": nn.MaxPool2d(3, 2, 1),
    "maximum in ceil mode": nn.MaxPool2d(2, 2, ceil_mode=True),
    "maximum of an odd map": nn.MaxPool2d(3, 2, ceil_mode=True),
    "average": nn.AvgPool2d(3, 2),
    "padded average": nn.AvgPool2d(3, 1, 1),
    "adaptive": nn.AdaptiveAvgPool2d(1),
    "LRN": LocalResponseNorm(3, alpha=0.5, beta=0.75, k=2.0),
    "mixed pooling": MixedPool2d(3),
    "zero channels": ZeroPadShortcut(2, 1, 3),
    "sum": Residual(4),
    "joined": Joined(),
    "bounded": nn.Sequential(nn.ReLU6(), nn.Tanh(), nn.Sigmoid()),
    "linear": nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(324, 6, bias=False), nn.Dropout()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_equal(name):
    torch.manual_seed(0)
    model, x = one_link(LAYERS[name], torch.randn(2, 4, 9, 9) - 1)  # below 0: a border of zeros would win a maximum
    with torch.inference_mode():
        want = model(x).numpy()
    for fold_bn in (True, False):
        _, got = in_keras(model, x, fold_bn)
        assert np.abs(got - want).max() <= 1e-5 * max(1, np.abs(want).max())


def test_every_pooling_by_maximum_is_equal_or_refused():
    tried = refused = 0
    for n in (6, 7):
        x = torch.randn(1, 4, n, n) - 2
        for size, stride, ceil in ((2, 1, False), (2, 2, True), (3, 2, True), (3, 3, True), (2, 3, True)):
            for pad in range(size // 2 + 1):
                model, x = one_link(nn.MaxPool2d(size, stride, pad, ceil_mode=ceil), x)
                try:
                    _, got = in_keras(model, x)
                except Unsupported as error:
                    assert "stages.0" in str(error)
                    refused += 1
                else:
                    assert np.array_equal(got, model(x).numpy())
                    tried += 1
    assert tried > 3 * refused


def test_segments_and_stages_that_restart():
    model, x = Restarting().build((3, 8, 8), 4).eval(), torch.randn(2, 3, 8, 8)
    chain, got = in_keras(model, x)
    assert np.allclose(got, model(x).detach().numpy(), atol=1e-5)
    alone = chain.segment(Segment(1, 2, 1))(channels_last(x).numpy())
    assert np.allclose(alone, got[1], atol=1e-6)
    stage = chain.segment(Segment(1, 2, None))(channels_last(x).numpy())
    assert np.allclose(chain.segment(Segment(2, 2, 1))(stage), got[1], atol=1e-6)


def test_quantizers_keep_their_grids():
    torch.manual_seed(0)
    model, x = BLeNet().build((1, 28, 28), 10).eval(), torch.randn(16, 1, 28, 28)
    net = prepared(model, x, Widths(8, 8), "u8s8", "minmax", "minmax")
    net.freeze(round_bias=True)
    got = KerasChain(net.model, (1, 28, 28)).whole()(channels_last(x).numpy()).numpy()
    far = np.abs(got - net.model(x).numpy())
    # A sum that lies between two integers may be rounded up here and down there.
    assert np.median(far) < 1e-5 and far.max() < 0.05 * np.abs(got).max()


@pytest.mark.parametrize(
    "layer, said",
    [
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU()), r"stages\.0\.0\.1: .*GELU"),
        (nn.Conv2d(4, 4, 3, padding="same"), r"stages\.0\.0: .*'same'"),
        (nn.AvgPool2d(2, ceil_mode=True), r"stages\.0.*AvgPool2d"),
        (nn.AdaptiveAvgPool2d(2), r"stages\.0.*divisor"),
        (nn.MaxPool2d(2, dilation=2), r"stages\.0.*dilation"),
        (nn.LocalResponseNorm(4), r"stages\.0.*4 channels"),
        (Sliced(), r"stages\.0.*getitem"),
        (Scaled(), r"stages\.0.*alpha=2"),
    ],
)
def test_what_has_no_form_is_named(layer, said):
    model, x = one_link(layer, torch.randn(1, 4, 9, 9))
    with pytest.raises(Unsupported, match=said):
        in_keras(model, x)


def test_another_keras_is_refused(monkeypatch):
    class Other:
        class keras:
            class layers:
                class Layer:
                    pass

    monkeypatch.setitem(sys.modules, "tensorflow", Other)
    with pytest.raises(AnytimeError, match="TF_USE_LEGACY_KERAS=1"):
        tf.tensorflow()


def test_a_reason_names_the_command(monkeypatch):
    assert missing("qkeras", "pyparsing") is None
    assert "pip install" in missing("no_such_package")
    monkeypatch.setattr(tf, "distribution", lambda name: name)  # HGQ2 is there
    assert "pip uninstall -y HGQ2" in missing("qkeras") and missing() is None
    monkeypatch.undo()
    # Uninstalled again, it has taken QKeras' __init__.py along.
    monkeypatch.setattr(tf, "find_spec", lambda name: ModuleSpec(name, None, is_package=True))
    assert "--force-reinstall" in missing("qkeras")
