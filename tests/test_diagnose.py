"""SQNR against hand values, the first bad layer, and exits that fall to chance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anytime.errors import AnytimeError, Collapsed, Unsupported
from anytime.model import AnytimeModel
from anytime.quant.diagnose import diagnosed, fallen, first_bad, layer_sqnr
from anytime.quant.graph import Widths, prepared, quantized, traced
from anytime.quant.ranges import affine
from tests.worlds import Restarting, Tiny, data, trained


def rounded(model, bits=8, x=None):
    return prepared(model, data().calib.x if x is None else x, Widths(bits, bits), "u8s8", "mse", "mse")


# Layers --------------------------------------------------------------------------------------------------------


def linear(weight, bias=0.0):
    m = nn.Linear(1, 1)
    with torch.no_grad():
        m.weight.fill_(weight)
        m.bias.fill_(bias)
    return m


def one_layer():
    """z = x on images 1.2 and 2, of which the rounded chain reads 1 and 2."""
    model = traced(AnytimeModel([nn.Sequential(nn.Flatten(), linear(1.0))], [nn.Sequential(nn.Identity(), linear(2.0, 1.0))]))
    x = torch.tensor([1.2, 2.0]).view(2, 1, 1, 1)
    net = quantized(model, Widths(8, 8), "u8s8")
    net.calibrate(net.observe(x), "minmax", "minmax")
    first, tap = net.quantizers()
    first.set(affine(0, 255, 8))  # a step of 1
    tap.mode = "off"
    return net, model, x


def test_sqnr_by_hand():
    # z = 1.2, 2 against 1, 2: E[z^2] = 2.72, E[e^2] = 0.02. The head: 3.4, 5 against 3, 5: 18.28 and 0.08.
    net, model, x = one_layer()
    got = layer_sqnr(net, model, x)
    assert list(got) == ["stages.0.1", "heads.0.1"]
    assert got["stages.0.1"] == pytest.approx(10 * math.log10(2.72 / 0.02), abs=1e-4)
    assert got["heads.0.1"] == pytest.approx(10 * math.log10(18.28 / 0.08), abs=1e-4)
    assert layer_sqnr(net.freeze(True), model, x, batch=1) == pytest.approx(got, abs=1e-2)  # a frozen chain, another batch


def test_no_error_no_signal_and_nan():
    net, model, x = one_layer()
    assert set(layer_sqnr(model, model, x).values()) == {math.inf}
    for m in (model, net.model):
        with torch.no_grad():
            m.stages[0].get_submodule("1").weight.zero_()
    assert layer_sqnr(net, model, x)["stages.0.1"] == math.inf  # 0 instead of 0
    with torch.no_grad():
        net.model.stages[0].get_submodule("1").bias.fill_(1.0)
        net.model.heads[0].get_submodule("1").bias.fill_(float("nan"))
    got = layer_sqnr(net, model, x)
    assert got["stages.0.1"] == -math.inf  # 1 instead of 0
    assert got["heads.0.1"] == -math.inf


def test_a_relu_that_works_in_place_is_not_measured():
    model = traced(AnytimeModel([nn.Sequential(linear(-1.0), nn.ReLU(inplace=True))], [nn.Flatten()]))
    x = torch.tensor([[1.0], [2.0]])
    net = rounded(model, x=x)
    net.model.stages[0].get_submodule("0").bias.data.fill_(0.5)  # -0.5, -1.5 instead of -1, -2; behind the ReLU all are 0
    assert layer_sqnr(net, model, x)["stages.0.0"] == pytest.approx(10 * math.log10(5 / 0.5), abs=0.1)


def test_six_decibels_a_bit():
    torch.manual_seed(0)
    x, model = torch.rand(32, 3, 8, 8), traced(AnytimeModel([nn.Identity()], [nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten())]))
    got = [layer_sqnr(prepared(model, x, Widths(16, b, edge=b), "u8s8", "minmax", "minmax"), model, x) for b in (4, 6, 8)]
    low, middle, high = (g["heads.0.0"] for g in got)
    assert middle - low == pytest.approx(2 * 6.02, abs=1) and high - middle == pytest.approx(2 * 6.02, abs=1)


@pytest.mark.parametrize("spec", [Tiny(), Restarting()], ids=["stages", "stages that restart"])
def test_every_layer_is_measured_in_the_order_in_which_it_runs(spec):
    model = traced(spec.build((3, 16, 16), 4))
    got = layer_sqnr(rounded(model), model, data().calib.x)
    assert set(got) == {p for p, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    places = [p.split(".")[:2] for p in got]
    assert sorted(places, key=lambda p: (int(p[1]), p[0] == "heads")) == places
    assert not any(m._forward_hooks for m in model.modules())  # nothing is left behind


def test_chains_that_do_not_compare_are_said():
    net, model, x = one_layer()
    with pytest.raises(Unsupported, match="no calibration samples"):
        layer_sqnr(net, model, x[:0])
    with pytest.raises(Unsupported, match="only one of the two chains"):
        layer_sqnr(net, traced(trained()), x)


FIRST_BAD = [
    # a layer that is lost altogether stands at 0 dB, what is behind it drowns
    ({"stages.0.a": 40.0, "stages.0.b": 0.3, "stages.0.c": -2.0, "stages.0.d": -30.0}, "stages.0.b"),
    ({"stages.0.a": 40.0, "stages.0.b": -3.0, "stages.0.c": -60.0}, "stages.0.b"),
    # none under 0 dB: the largest drop
    ({"stages.0.a": 40.0, "stages.0.b": 36.0, "stages.0.c": 21.0, "stages.0.d": 12.0}, "stages.0.c"),
    # the first one, which has none before it
    ({"stages.0.a": 0.0, "stages.0.b": 2.0, "stages.0.c": -3.0}, "stages.0.a"),
    ({"stages.0.a": 19.0, "stages.0.b": 12.0, "stages.0.c": 3.0}, "stages.0.c"),
    # a head hangs on its stage, and the next stage on that too: 30 -> 22 is less than 30 -> 20
    ({"stages.0.a": 30.0, "heads.0.a": 45.0, "heads.0.b": 38.0, "stages.1.a": 22.0, "heads.1.a": 12.0}, "heads.1.a"),
    # layers without an error say nothing
    ({"stages.0.a": math.inf, "stages.0.b": 40.0, "stages.0.c": math.inf, "stages.0.d": 9.0}, "stages.0.d"),
    ({"stages.0.a": 40.0, "stages.0.b": -math.inf}, "stages.0.b"),
    ({"stages.0.a": math.inf}, "stages.0.a"),
    ({"heads.0.a": 15.0, "heads.0.b": 13.0}, "heads.0.a"),  # there is nothing in front of the head
]


@pytest.mark.parametrize("sqnr, bad", FIRST_BAD)
def test_the_first_bad_layer(sqnr, bad):
    assert first_bad(sqnr) == bad


# Exits ---------------------------------------------------------------------------------------------------------


def votes(right, labels, n_classes, wrong=1):
    """Logits of one exit that is right about the first ``right`` samples and ``wrong`` classes off about the others."""
    says = [y if i < right else (y + wrong) % n_classes for i, y in enumerate(labels)]
    return np.eye(n_classes)[says]


def both(now, was, labels, n_classes):
    return fallen(votes(was, labels, n_classes)[None], votes(now, labels, n_classes)[None], np.asarray(labels))


def test_chance_by_hand():
    # 100 samples of 10 classes. Chance 0.1; Wilson's lower limit of 16/100 is 0.1010, of 15/100 0.0931.
    labels = list(range(10)) * 10
    assert both(16, 90, labels, 10) == []
    assert both(15, 90, labels, 10) == [(0, 0.9, 0.15, 0.1)]
    assert both(10, 15, labels, 10) == []  # the float exit was no better than chance either
    assert both(0, 90, labels, 10) == [(0, 0.9, 0.0, 0.1)]  # worse than chance is not better


def test_chance_is_the_commonest_class_where_that_is_more():
    # 80 of 100 samples are of class 0: an exit that always says 0 is right about 80 and knows nothing.
    labels = [0] * 80 + [1] * 20
    constant = np.eye(2)[[0] * 100][None]
    assert fallen(votes(95, labels, 2)[None], constant, np.asarray(labels)) == [(0, 0.95, 0.8, 0.8)]
    assert both(90, 95, labels, 2) == []
    # Balanced, two classes: 50 and 59 right of 100 cannot be told from chance (0.596 - 0.5 < 1.96 * 0.05), 60 can.
    even = [0, 1] * 50
    assert both(59, 95, even, 2) and not both(60, 95, even, 2)


def test_a_weak_exit_does_not_fall_by_a_sample():
    """Float just over the limit, rounded just under: no proof that anything was lost."""
    labels = list(range(10)) * 10
    assert both(15, 16, labels, 10) == [] and both(15, 17, labels, 10) == []
    few = [0, 1, 2, 3]
    assert both(1, 4, few, 4) == []  # four samples prove nothing


def test_logits_that_are_not_finite_are_wrong():
    labels = list(range(10)) * 10
    good = votes(100, labels, 10)
    broken = np.where(good > 0, np.nan, good)  # argmax would take the NaN, which stands at the right class
    assert fallen(good[None], broken[None], np.asarray(labels)) == [(0, 1.0, 0.0, 0.1)]


@given(st.integers(2, 12), st.integers(20, 200), st.integers(0, 999))
def test_a_network_that_is_not_rounded_never_falls(k, n, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(2, n, k)), rng.integers(0, k, n)
    logits[0, np.arange(n), labels] += 3
    assert fallen(logits, logits, labels) == []


def test_good_eight_bits_pass():
    model, part = traced(trained()), data().tune
    sqnr = diagnosed(rounded(model), model, part.x, part.y, measured=16)
    assert sqnr == layer_sqnr(rounded(model), model, part.x[:16]) and min(sqnr.values()) > 20
    assert diagnosed(rounded(model).freeze(True), model, part.x, part.y, batch=7).keys() == sqnr.keys()


@pytest.mark.parametrize("what", ["weights", "activations"])
@pytest.mark.parametrize(
    "path, exit",
    [("stages.0.0", 2), ("stages.1.0.a", 2), ("stages.1.0.b", 2), ("heads.1.0", 2), ("heads.1.4", 2), ("heads.2.3", 3)],
)
def test_a_scale_that_is_a_thousand_times_too_large_is_found(path, exit, what):
    """The saboteur. (Exit 1 is at chance in float already: it is not accused.)"""
    model, part = traced(trained()), data().tune
    net = rounded(model)
    (dict(net.layers())[path].weight_scale if what == "weights" else net.sources[path].scale).mul_(1000)
    with pytest.raises(Collapsed, match=rf"exit {exit} .* 5?8?\d\.\d% in float .* first bad layer is {path} \(") as failed:
        diagnosed(net, model, part.x, part.y)
    assert isinstance(failed.value, AnytimeError)


def test_the_layer_lies_on_the_way_to_the_exit():
    """A bad head of an exit that is not accused is no reason for what happens at another."""
    model, part = traced(trained()), data().tune
    net = rounded(model)
    layers = dict(net.layers())
    layers["heads.0.2"].weight_scale.mul_(1000)  # exit 1: at chance in float too
    layers["heads.2.3"].weight_scale.mul_(1000)
    with pytest.raises(Collapsed, match=r"exit 3 .* first bad layer is heads\.2\.3"):
        diagnosed(net, model, part.x, part.y)


def test_of_stages_that_restart_only_the_last_is_on_the_way():
    model, part = traced(trained(Restarting())), data().tune
    net = rounded(model)
    layers = dict(net.layers())
    layers["stages.0.0"].bias.data.fill_(1e3)  # drowns exit 1, which in float ...
    layers["stages.1.0"].weight_scale.mul_(1000)
    with torch.no_grad():
        model.heads[0].get_submodule("2").weight.zero_()  # ... is at chance too
    with pytest.raises(Collapsed, match=r"exit 2 .* first bad layer is stages\.1\.0"):
        diagnosed(net, model, part.x, part.y)


def test_a_float_network_that_answers_nan_is_said():
    model, part = traced(trained()), data().tune
    net = rounded(model)
    with torch.no_grad():
        model.heads[1].get_submodule("4").bias[0] = float("nan")
    with pytest.raises(Unsupported, match="the float network answers NaN or infinity at exit 2"):
        diagnosed(net, model, part.x, part.y)


def test_no_samples_are_said():
    model, part = traced(trained()), data().tune
    with pytest.raises(Unsupported, match="no calibration samples"):
        diagnosed(rounded(model), model, part.x[:0], part.y[:0])
    with pytest.raises(Unsupported, match="no calibration samples"):
        fallen(np.zeros((1, 0, 3)), np.zeros((1, 0, 3)), np.zeros(0, dtype=int))
