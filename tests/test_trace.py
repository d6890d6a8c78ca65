"""What tracing makes of a link: the same values, nothing shared and nothing in place."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.probe import check_links
from anytime.quant.graph import Widths, prepared
from anytime.quant.learned import learn
from anytime.quant.reconstruct import Reconstruction, reconstruct
from anytime.quant.trace import traced


class Call(nn.Module):
    """f(self, x), with two convolutions, a BatchNorm and a parameter at hand."""

    def __init__(self, f):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.conv, self.other, self.bn = f, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.pool, self.drop = nn.ReLU(inplace=True), nn.MaxPool2d(1), nn.Dropout(inplace=True)
        self.gain = nn.Parameter(torch.tensor([0.5]))
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.f(self, x)


def chain(f):
    return AnytimeModel([Call(f)], [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))]).eval()


def images(n=4):
    return torch.randn(n, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def same(model, to=None):
    """Whether the traced chain makes of images what the float one makes of a copy of them, and leaves them alone."""
    x = images()
    with torch.no_grad():
        want, got = model.stages[0](x.clone()), (to or traced(model)).stages[0](x)
    return torch.equal(x, images()) and torch.allclose(got, want, atol=1e-5)


# One module, one call ------------------------------------------------------------------------------------------


def test_a_layer_that_is_called_again_is_a_layer_of_its_own():
    model = chain(lambda m, x: m.conv(m.relu(m.conv(m.relu(m.conv(x))))))
    chained = traced(model)
    convs = {name: m for name, m in chained.stages[0].named_modules() if isinstance(m, nn.Conv2d)}
    assert set(convs) == {"conv", "conv_again", "conv_again_again"} and same(model, chained)
    assert len({m.weight.data_ptr() for m in convs.values()}) == 3
    assert sum(isinstance(m, nn.ReLU) for m in chained.modules()) == 1  # it holds nothing


def test_batch_norm_is_folded_into_each_call_of_its_convolution():
    model = chain(lambda m, x: m.conv(torch.relu(m.bn(m.conv(x)))) + m.bn(m.other(x)))
    chained = traced(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in chained.modules()) and same(model, chained)


def test_layers_that_share_a_parameter_no_longer_do():
    model = AnytimeModel([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))], [nn.Sequential(nn.Linear(4, 2))])
    model.stages[0][2].weight = model.stages[0][0].weight
    a, b = (traced(model).stages[0].get_submodule(name) for name in ("0", "2"))
    assert torch.equal(a.weight, b.weight) and a.weight is not b.weight


# Nothing in place ----------------------------------------------------------------------------------------------


def adds(m, x):
    y = m.conv(x)
    y.add_(m.other(x))
    return y * 2


def clears_then_reads(m, x):
    y = m.conv(x)
    F.relu(y, True)
    F.hardtanh(y, -0.5, 0.5, inplace=True)
    torch.relu_(y).mul_(m.gain)
    return m.relu(m.other(y)) + y


IN_PLACE = {
    "add_": adds,
    "ReLU": lambda m, x: m.relu(m.conv(x)) + m.relu(m.other(x)),
    "old names": clears_then_reads,
    "out=": lambda m, x: (y := m.conv(x), torch.add(y, 1, out=y), y - m.other(x))[-1],
    "the input": lambda m, x: (x.mul_(2), x + m.conv(x))[-1],
    "dropout": lambda m, x: (y := m.conv(x), m.relu(m.drop(y)) + y)[-1],
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_what_works_in_place_gives_the_same_out_of_place(how):
    model = chain(IN_PLACE[how])
    before = copy.deepcopy(model.state_dict())
    chained = traced(model)
    assert same(model, chained) and model.stages[0].relu.inplace and model.stages[0].drop.inplace
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    calls = [str(n.target) for n in chained.stages[0].graph.nodes if n.op == "call_method"]
    assert not any(name.endswith("_") for name in calls) and "inplace=True" not in repr(chained)


@pytest.mark.parametrize(
    "f, said",
    [
        (lambda m, x: (y := m.conv(x), y[:, :2].add_(1), y)[-1], r"stages\.0\.add_ changes getitem in place, and output"),
        (lambda m, x: (y := m.conv(x), z := y.view(-1, 4, 36), y.relu_(), z + 1)[-1], "add reads another view"),
        (lambda m, x: m.conv(x).zero_(), r"stages\.0\.zero_ .*no other form"),
        (lambda m, x: (m.gain.mul_(2), m.conv(x))[-1], r"stages\.0\.mul_ changes gain"),
    ],
    ids=["a view", "a view before", "no such method", "a parameter"],
)
def test_what_cannot_be_taken_out_of_place_is_said(f, said):
    with pytest.raises(Unsupported, match=said):
        traced(chain(f))


@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
def test_what_worked_in_place_is_learned(target):
    """Behind a quantizer, which keeps what it read for its gradient, and on what reconstruction keeps."""
    model = chain(lambda m, x: m.relu(x.add_(m.other(m.relu(m.conv(x))))))
    net = prepared(model, images(16), Widths(4, 4), target, "minmax", "mse")
    learn(net, "lsq")
    net.model(images()).square().sum().backward()
    assert all(layer.weight.grad is not None for _, layer in net.layers())
    for unit in ("layer", "block"):
        x = images(16)
        net = prepared(model, x, Widths(4, 4), target, "minmax", "mse")
        reconstruct(net, traced(model), x, Reconstruction(unit, iterations=2, batch=8), seed=0)
        assert torch.equal(x, images(16))


# A link that is one layer --------------------------------------------------------------------------------------


def test_a_link_may_be_a_single_layer():
    model = AnytimeModel([nn.Conv2d(4, 4, 6), nn.Flatten()], [nn.Flatten(), nn.Linear(4, 3)]).eval()
    chained = traced(model)
    assert not any(m.training for m in chained.modules()) and same(model, chained)
    net = prepared(model, images(), Widths(8, 8), "u8s8", "minmax", "minmax")
    assert set(net.bits) == {"stages.0.0", "heads.1.0"}


def test_a_view_of_a_map_is_calibrated_channels_last():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 3)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.fc(x.view(x.size(0), -1))

    torch.manual_seed(0)
    model, x = AnytimeModel([nn.Identity()], [View()]).eval(), torch.rand(70, 3, 4, 4)
    net = prepared(model, x, Widths(8, 8), "u8s8", "minmax", "minmax")
    assert (net.model(x) - model(x)).abs().max() < 0.02


def added(m, x):
    y = kept = m.conv(x)
    y += m.other(x)
    return y + kept


@pytest.mark.parametrize(
    "of, said",
    [
        (lambda m: m.heads[0].insert(0, nn.ReLU(inplace=True)), "exit 2 answers otherwise when no other head has run"),
        (lambda m: m.stages.__setitem__(0, Call(added)), "exit 1 has effects that torch.fx does not see"),
        (lambda m: None, ""),
    ],
)
def test_a_network_that_is_another_one_in_graphs_is_refused_before_it_is_trained(of, said):
    end = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))  # noqa: E731
    model = AnytimeModel([Call(lambda m, x: m.bn(m.conv(x))), nn.Conv2d(4, 4, 1)], [end(), end()])
    of(model)
    if not said:
        return check_links(model, images())
    with pytest.raises(Unsupported, match=said):
        check_links(model, images())


def test_a_dropout_that_asks_for_the_mode_drops_in_the_training_of_a_graph_too():
    model = chain(lambda m, x: F.dropout(m.conv(x), 0.5, m.training))
    chained = traced(model)
    assert same(model, chained)
    x = images()
    assert torch.equal(chained(x), chained(x)) and not torch.equal(chained.train()(x), chained(x))
