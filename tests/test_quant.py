"""Ranges, rounding, placement and coverage, against hand-worked values and other libraries."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import nn

from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.models.branchynet import BAlexNet, BLeNet
from anytime.quant import graph, ranges
from anytime.quant.fake import FakeQuant, QConv2d, QLinear, on_grid
from anytime.quant.graph import Widths, prepared, quantized, traced
from anytime.quant.ranges import (
    BINS,
    MANY,
    SHRINK,
    Grid,
    Histogram,
    activation_grid,
    affine,
    entropy_amax,
    symmetric,
    weight_scales,
)
from tests.worlds import Tiny, data, trained


def seen(x):
    h, t = Histogram(), torch.as_tensor(x, dtype=torch.float32)
    h.see_extremes(t)
    h.see_values(t)
    return h


def rounded(x, g: Grid):
    """The definition, in numpy: half to even, clamp, back."""
    q = np.clip(np.rint(np.asarray(x) / g.scale) + g.zero_point, g.qmin, g.qmax)
    return (q - g.zero_point) * g.scale


# Grids ---------------------------------------------------------------------------------------------------------


def test_affine_by_hand():
    # [-1, 3] at 8 bits: step 4/255, zero at integer 63.75 -> 64.
    g = affine(-1.0, 3.0, 8)
    assert (g.scale, g.zero_point, g.qmin, g.qmax) == (pytest.approx(4 / 255), 64, 0, 255)
    assert affine(0.5, 2.0, 8) == affine(0.0, 2.0, 8)  # 0 must be an integer: padding writes it


def test_symmetric_by_hand():
    assert symmetric(12.7, 8, narrow=True) == Grid(pytest.approx(0.1), 0, -127, 127)
    assert symmetric(12.7, 8, narrow=False).qmin == -128  # TensorRT's activations
    assert symmetric(0.7, 4, narrow=True)[2:] == (-7, 7)


bounds = st.floats(-1e3, 1e3, width=32)


@given(bounds, bounds, st.sampled_from([2, 3, 4, 8, 16]))
def test_an_affine_grid_holds_zero_and_its_ends(a, b, bits):
    low, high = min(a, b), max(a, b)
    g = affine(low, high, bits)
    assert rounded(0.0, g) == 0.0
    for end in (low, high):
        assert abs(rounded(end, g) - end) <= g.scale * 1.01


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40), st.sampled_from([2, 4, 8]), st.booleans())
def test_fake_quant_is_the_definition_and_idempotent(values, bits, signed):
    x = torch.tensor(values)
    g = activation_grid(seen(x), "minmax", bits, signed)
    q = FakeQuant(bits, signed)
    q.set(g)
    got = q(x)
    assert torch.equal(q(got), got)
    # torch multiplies by 1/scale, the definition divides: a value on the very edge of two steps may fall to either.
    scale = float(q.scale)
    assert np.abs(got.numpy() - rounded(values, g._replace(scale=scale))).max() <= scale * 1.001
    assert np.mean(np.abs(got.numpy() - rounded(values, g._replace(scale=scale))) > 1e-3 * scale) <= 0.2
    assert np.abs(got.numpy() - values).max() <= scale * (0.51 + (0 if not signed else 0.5)) + 1e-4


def test_the_straight_through_gradient_is_one_inside_and_zero_outside():
    q = FakeQuant(8, signed=False)
    q.set(affine(0.0, 2.55, 8))
    x = torch.tensor([-0.5, 0.0, 1.234, 2.55, 3.0], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 0]  # at 0 itself the ReLU before decides: 0


def test_of_a_grid_with_negative_values_both_ends_reach_half_a_step_out():
    q = FakeQuant(3, signed=False)
    q.set(Grid(0.5, 4, 0, 7))  # -2 ... 1.5
    x = torch.tensor([-2.5, -2.3, -2.2, 1.7, 1.8, 2.0], requires_grad=True)
    q(x).backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [0, 0, 3, 4, 0, 0]


def test_the_straight_through_gradient_of_weights_by_hand():
    """A weight learns where it rounds to an integer of its grid, and at the edges, half a step out, still does."""
    steps = torch.tensor([-6.0, -4.5 - 2**-8, -4.5, -4.0, 0.25, 3.0, 3.5, 3.5 + 2**-8, 5.0])
    q = QLinear(nn.Linear(9, 2), 3)
    scales = torch.tensor([0.5, 4.0])
    q.weight.data = scales[:, None] * steps
    q.weight_scale.copy_(scales)
    q.weight_qmin, q.on = -4, True  # as of a learner that settled on a wider grid
    y, g = q.rounded(), torch.arange(1.0, 19.0).view(2, 9)
    y.backward(g)
    assert torch.equal(y, scales[:, None] * torch.tensor([-4.0, -4, -4, -4, 0, 3, 3, 3, 3]))
    assert torch.equal(q.weight.grad, g * torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0]))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), st.sampled_from([2, 3, 4, 8, 16]), st.booleans())
def test_rounding_is_torchs_own(values, bits, signed):
    x = torch.tensor(values)
    g = activation_grid(seen(x), "minmax", bits, signed)
    want = torch.fake_quantize_per_tensor_affine(x, g.scale, g.zero_point, g.qmin, g.qmax)
    assert torch.allclose(on_grid(x, g), want, rtol=1e-6, atol=0)


# Observers -----------------------------------------------------------------------------------------------------


def test_minmax_takes_the_extremes():
    g = activation_grid(seen([-1.0, 0.0, 3.0]), "minmax", 8, signed=False)
    assert g == affine(-1.0, 3.0, 8)


def test_percentile_cuts_the_tail():
    x = np.concatenate([np.linspace(0, 1, 100_000), [50.0]])
    g = activation_grid(seen(x), "percentile", 8, signed=False, percentile=99.9)
    assert g.scale * 255 == pytest.approx(1.0, abs=50 / BINS)
    signed = activation_grid(seen(np.concatenate([x, -x])), "percentile", 8, signed=True, percentile=99.9)
    assert signed.scale * 127 == pytest.approx(1.0, abs=50 / BINS)


@pytest.mark.parametrize("n, asked", [(10_000, {"percentile": 99.9}), (100_000, {})], ids=["99.9", "99.99 unless asked"])
def test_percentile_by_hand(n, asked):
    """10 of n values may be cut from either tail: of 4 + 8 the 4 go and the 8 stay, which end in the bin from 5 and the one to -3."""
    ends = np.repeat([8.0, -8.0, 5 + 1 / 256, -3 - 1 / 256], [4, 4, 8, 8])  # bins of 1/128, their middles
    h = seen(np.concatenate([ends, np.linspace(-1, 1, n - len(ends))]))
    low, high = -3 - 1 / 128, 5 + 1 / 128
    assert activation_grid(h, "percentile", 8, signed=False, **asked) == affine(low, high, 8)
    # Of |x| the 4 + 4 at 8 go; its bins are of 1/256.
    assert activation_grid(h, "percentile", 8, signed=True, **asked) == symmetric(high, 8, narrow=False)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([3, 4, 8]), st.booleans())
def test_mse_is_never_worse_than_minmax(seed, bits, signed):
    x = np.random.default_rng(seed).standard_t(3, 5000).astype(np.float32)
    h = seen(x)
    error = {o: np.square(rounded(x, activation_grid(h, o, bits, signed)) - x).sum() for o in ("mse", "minmax")}
    assert error["mse"] <= error["minmax"] * 1.01  # 1 %: the search sees bins, not values


def test_mse_by_brute_force():
    x = np.random.default_rng(0).standard_t(3, 20_000).astype(np.float32)
    ends = np.linspace(0.05, 1, 400) * np.abs(x).max()
    best = min(np.square(rounded(x, symmetric(a, 4, narrow=False)) - x).mean() for a in ends)
    got = np.square(rounded(x, activation_grid(seen(x), "mse", 4, signed=True)) - x).mean()
    assert got <= best * 1.05


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([300, 5000]))
def test_the_range_that_bins_choose_is_nearly_what_the_values_choose(seed, bits, signed, n):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, n).astype(np.float32)
    x = np.maximum(x, 0) if seed % 2 else x
    low, high, amax = x.min(), x.max(), np.abs(x).max()
    every = [symmetric(s * amax, bits, False) if signed else affine(s * low, s * high, bits) for s in SHRINK]
    best = min(np.square(rounded(x, g) - x).sum() for g in every)
    got = np.square(rounded(x, activation_grid(seen(x), "mse", bits, signed)) - x).sum()
    assert got <= (1.05 if bits == 8 else 1.01) * best  # at 8 bits a step is hardly wider than a bin


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=200), st.integers(0, 1))
def test_bins_are_those_of_torch(values, rectified):
    x = torch.tensor(values).relu() if rectified else torch.tensor(values)
    low, high = float(x.min()), float(x.max())
    h = seen(x)
    if high > low:
        assert np.array_equal(h.counts, torch.histc(x, BINS, low, high).numpy())
        assert np.array_equal(h.abs_counts, torch.histc(x.abs(), BINS, 0.0, h.amax).numpy())
    else:
        assert not h.counts.any()


@pytest.mark.parametrize("reached", [None, torch.arange(200) % 3])
def test_one_pass_or_two_see_the_same(monkeypatch, reached):
    """The saboteur of a single pass: extremes that come with the last batch."""
    x = data().train.x[:200].clone()
    x[-1] *= 9
    net = quantized(trained(), Widths(8, 8), "u8s8")
    runs = []
    monkeypatch.setattr(net.model.stages[0], "forward", lambda x, of=net.model.stages[0].forward: (runs.append(len(x)), of(x))[1])
    once = net.observe(x, reached)
    n_once, held = sum(runs), sum(h.counts.sum() for h in once.values())
    monkeypatch.setattr(graph, "MOST_KEPT", int(held / 2))  # it runs over when half is seen
    twice = net.observe(x, reached)
    assert n_once == 200 and sum(runs) == 600 and held > 0
    for name, h in once.items():
        other = twice[name]
        assert (h.low, h.high, h.moving) == (other.low, other.high, other.moving) and h.counts.sum() > 0
        assert np.array_equal(h.counts, other.counts) and np.array_equal(h.abs_counts, other.abs_counts)
        assert h.kept is None and other.kept is None  # nothing stays in memory
    assert not any(h.counts.any() for h in net.observe(x, reached, values=False).values())


def test_of_large_samples_every_eleventh_value_is_kept_and_counts_eleven_times():
    x = torch.randn(2, MANY + 1)
    h = Histogram(keep=True)
    h.see_extremes(x)
    assert h.n_kept == -(-2 * (MANY + 1) // 11) and h.high == float(x.max())
    h.count()
    assert np.array_equal(h.counts, 11 * torch.histc(x.flatten()[::11], BINS, h.low, h.high).numpy())


@pytest.mark.parametrize("size", [MANY // 2, MANY + 1])
def test_a_sample_weighs_the_same_however_few_came_along(size):
    """The saboteur: thinned by the size of a batch, of which what is left at a late stage is now above the limit and now below."""
    some, others = torch.zeros(60, size), torch.ones(4, size)
    h = Histogram()
    for x in (some, others):
        h.see_extremes(x)
    for x in (some, others):
        h.see_values(x)
    assert h.counts[-1] / h.counts.sum() == pytest.approx(4 / 64, rel=0.01)
    assert h.counts.sum() == pytest.approx(64 * size, rel=0.01)


def test_moving_average_by_hand():
    """A tenth of each batch of 32; of 16 samples that are left, half of that."""
    h = Histogram()
    for n, high in ((32, 10.0), (32, 20.0), (16, 31.0)):
        h.see_extremes(torch.linspace(-high / 10, high, n)[:, None])
    assert h.moving == (pytest.approx(-1.1 + 0.05 * (1.1 - 3.1)), pytest.approx(11.0 + 0.05 * (31 - 11)))
    grid = activation_grid(h, "moving", 8, signed=False)
    assert grid.scale == pytest.approx((12.0 + 1.2) / 255)


def test_of_channels_that_eleven_divides_none_is_missed():
    x = torch.ones(64, 88, 8, 8).contiguous(memory_format=torch.channels_last)
    x[:, 5] = 100.0
    h = Histogram(keep=True)
    h.see_extremes(x)
    assert h.n_kept == -(-x.numel() // 13)
    h.count()
    assert h.counts[-1] == pytest.approx(len(x) * 64, rel=0.02), "13th values"


def reference_entropy_amax(counts, amax, levels):
    """TensorRT's published procedure as plain loops, KL by scipy."""
    bins = counts.astype(float).copy()
    bins[0] = bins[1]
    best, best_i = np.inf, len(bins)
    for i in range(levels, len(bins) + 1):
        p = bins[:i].copy()
        p[-1] += bins[i:].sum()
        q = np.zeros(i)
        groups = [j * levels // i for j in range(i)]
        for level in range(levels):
            mine = [j for j in range(i) if groups[j] == level]
            full = [j for j in mine if bins[j] > 0]
            for j in full:
                q[j] = bins[mine].sum() / len(full)
        if q.sum() == 0 or ((p > 0) & (q == 0)).any():
            continue
        kl = entropy(p, q)
        if kl <= best + 1e-12:
            best, best_i = kl, i
    return amax * best_i / len(bins)


def test_entropy_against_plain_loops():
    rng = np.random.default_rng(1)
    counts = np.histogram(np.abs(rng.standard_t(4, 20_000)), 64)[0]
    assert entropy_amax(counts, 10.0, 16) == pytest.approx(reference_entropy_amax(counts, 10.0, 16))


def test_entropy_spends_a_bit_on_the_sign(monkeypatch):
    """|x| has 2^bits levels where nothing is negative and the integers are unsigned, else half of them."""
    monkeypatch.setattr(ranges, "BINS", 64)  # plain loops are slow
    x = np.abs(np.random.default_rng(0).standard_t(4, 20_000)).astype(np.float32)
    both = np.where(np.arange(len(x)) % 2, x, -x / 10)

    def amax(of, levels):
        of = np.abs(of)
        return reference_entropy_amax(np.histogram(of, 64, (0, of.max()))[0], float(of.max()), levels)

    assert amax(x, 16) > amax(x, 8) and amax(both, 16) > amax(both, 8) > -both.min()
    assert activation_grid(seen(x), "entropy", 4, signed=False) == affine(0, amax(x, 16), 4)
    assert activation_grid(seen(x), "entropy", 4, signed=True) == symmetric(amax(x, 8), 4, narrow=False)
    assert activation_grid(seen(both), "entropy", 4, signed=False) == affine(float(both.min()), amax(both, 8), 4)


def test_entropy_saturates_an_outlier():
    x = np.concatenate([np.abs(np.random.default_rng(0).normal(size=200_000)), [60.0]])
    g = activation_grid(seen(x), "entropy", 8, signed=True)
    assert 2.5 < g.scale * 127 < 10


def test_weight_scales_by_hand():
    w = torch.tensor([[1.27, -0.3], [0.0, 0.0], [-2.54, 0.1]])
    assert weight_scales(w, 8, "minmax").tolist() == pytest.approx([0.01, 1.0, 0.02])  # an all-zero channel stays usable


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]))
def test_weight_mse_is_never_worse_than_minmax(seed, bits):
    w = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed))
    qmax = 2 ** (bits - 1) - 1

    def error(observer):
        s = weight_scales(w, bits, observer)[:, None]
        return ((w / s).round().clamp(-qmax, qmax) * s - w).square().sum(1)

    assert (error("mse") <= error("minmax") + 1e-6).all()


# Chains --------------------------------------------------------------------------------------------------------


def calibrated(model, bits=8, target="u8s8", **kw):
    return prepared(model, data().calib.x, Widths(bits, bits), target, "mse", "mse", **kw)


def test_folding_batch_norm_changes_nothing():
    x, model = data().test.x[:32], trained()
    with torch.inference_mode():
        assert torch.allclose(traced(model)(x), model(x), atol=1e-4)
    assert not [m for m in traced(trained()).modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
def test_every_layer_of_every_stage_and_head_is_covered(target):
    net = calibrated(trained(), target=target)
    layers = {p for p, m in traced(trained()).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(net.bits) == layers
    assert all(q.calibrated and q.signed == (target == "s8s8") for q in net.quantizers())
    if target == "s8s8":
        assert all(int(q.zero_point) == 0 for q in net.quantizers())


def test_a_tap_is_rounded_once():
    net = calibrated(trained())
    reads = {path: net.sources[path] for path in ("heads.1.0", "stages.2.0")}
    assert reads["heads.1.0"] is reads["stages.2.0"]


def test_relu_is_fused_and_logits_are_not_rounded():
    net = quantized(BLeNet().build((1, 28, 28), 10), Widths(8, 8), "u8s8").model
    kinds = [type(m).__name__ for m in net.stages[0].children()]
    assert kinds.count("FakeQuant") == 2  # the input, and what the ReLU leaves: not the convolution before it
    assert not isinstance(net.heads[0].get_submodule(list(net.heads[0].graph.nodes)[-2].target), FakeQuant)


def test_eight_bits_are_near_and_two_are_far():
    x, y, model = data().test.x, data().test.y, trained()
    with torch.inference_mode():
        want = (model(x).argmax(-1) == y).float().mean(1)
        got = {b: (calibrated(model, b).freeze(True)(x).argmax(-1) == y).float().mean(1) for b in (8, 2)}
    assert (want - got[8]).max() <= 0.02
    assert (want - got[2]).max() > 0.02


def test_freezing_puts_weights_and_biases_on_their_grids():
    net = calibrated(trained())
    model = net.freeze(round_bias=True)
    for path, layer in net.layers():
        q = layer.integers()
        scale = layer.weight_scale.view(-1, *(1,) * (layer.weight.ndim - 1))
        assert torch.allclose(q * scale, layer.weight, atol=1e-6) and q.abs().max() <= 127
        steps = layer.bias / (net.sources[path].scale * layer.weight_scale)
        assert torch.allclose(steps, steps.round(), atol=0.02)
    assert model is net.model and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bits, factor", [(16, 1.0), (8, 1e-9)])
def test_a_bias_that_int32_does_not_hold_widens_the_scale_of_its_weights(bits, factor):
    """At 16 bits the steps of a bias are tiny, and so they are for a channel whose weights are next to nothing."""
    model = traced(trained())
    layer = model.stages[0].get_submodule("0")
    with torch.no_grad():
        layer.weight[:2] *= factor
        layer.bias[:2] = torch.tensor([3e3, -1.0])
    net = prepared(model, data().calib.x, Widths(bits, bits, edge=bits), "u8s8", "minmax", "minmax")
    frozen, x = net.freeze(round_bias=True), data().test.x[:64]
    with torch.inference_mode():
        want, got = model(x), frozen(x)
    assert ((got - want).norm() / want.norm()).item() < 0.02
    for path, q in net.layers():
        assert (q.bias / (net.sources[path].scale * q.weight_scale)).abs().max() < 2**31


def test_the_bias_of_a_channel_without_weights_is_not_rounded_away():
    model = traced(trained())
    layer = model.stages[0].get_submodule("0")
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias[0] = 0.01
    net = prepared(model, data().calib.x, Widths(4, 4, edge=4), "u8s8", "minmax", "minmax")
    net.freeze(round_bias=True)
    assert dict(net.layers())["stages.0.0"].bias[0].item() == pytest.approx(0.01, rel=1e-6)


def test_quantizing_leaves_the_float_network_alone():
    model = copy.deepcopy(trained())
    before = copy.deepcopy(model.state_dict())
    calibrated(model).freeze(True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_gradients_reach_every_weight_through_the_roundings():
    net = calibrated(trained())
    net.model(data().test.x[:16]).square().sum().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0 for _, layer in net.layers())


def test_edge_layers_stay_at_eight_bits():
    bits = prepared(trained(), data().calib.x, Widths(4, 4, edge=8), "u8s8", "mse", "mse").bits
    assert bits["stages.0.0"] == (8, 8) and bits["heads.1.4"] == (8, 8) and bits["stages.2.0"] == (4, 4)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x):
        return self.up(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.weight, padding=1)


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "layer, said",
    [(Odd(), r"stages.0.4.*ConvTranspose2d"), (Functional(), "stages.0.*conv2d"), (Deciding(), "cannot be traced")],
    ids=["unknown layer", "functional convolution", "control flow"],
)
def test_what_no_quantizer_knows_is_named(layer, said):
    model = Tiny().build((3, 16, 16), 4)
    model.stages[0].append(layer)
    with pytest.raises(Unsupported, match=said):
        calibrated(model)


def test_an_excluded_layer_stays_in_float_and_is_said():
    net = calibrated(trained(), exclusions=("heads.0.2",))
    assert "heads.0.2" not in net.bits and net.exclusions == ("heads.0.2",)


def test_a_layer_without_a_calibrated_input_is_caught():
    """The saboteur: a quantizer taken away after calibration."""
    net = calibrated(trained())
    del net.sources["stages.2.0"]
    with pytest.raises(Unsupported, match="stages.2.0 .*no calibrated quantizer"):
        net.check_coverage()
    net = calibrated(trained())
    next(layer for path, layer in net.layers() if path == "heads.2.3").weight_scale.fill_(float("nan"))
    with pytest.raises(Unsupported, match="heads.2.3 .*weight is not calibrated"):
        net.check_coverage()


def test_bad_calibration_is_said():
    with pytest.raises(Unsupported, match="no samples"):
        prepared(trained(), data().calib.x[:0], Widths(8, 8), "u8s8", "mse", "mse")
    with pytest.raises(Unsupported, match="NaN"):
        prepared(trained(), torch.full((4, 3, 16, 16), float("nan")), Widths(8, 8), "u8s8", "mse", "mse")
    with pytest.raises(Unsupported, match="bits 1"):
        Widths(1, 8)


def test_constant_images_calibrate():
    net = prepared(trained(), torch.zeros(8, 3, 16, 16), Widths(8, 8), "u8s8", "mse", "mse")
    assert torch.isfinite(net.freeze(True)(torch.zeros(2, 3, 16, 16))).all()


def test_branchynets_fall_into_no_hole():
    for spec, shape in ((BLeNet(), (1, 28, 28)), (BAlexNet(), (3, 32, 32))):
        model = spec.build(shape, 10)
        net = prepared(model, torch.rand(16, *shape), Widths(8, 8), "u8s8", "minmax", "minmax")
        assert len(net.bits) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())


def test_q_conv_keeps_stride_padding_and_groups():
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=1, groups=4)
    q = QConv2d(conv, 8)
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(q(x), conv(x))  # not calibrated yet: the weight as it is
    assert not isinstance(AnytimeModel([nn.Identity()], [nn.Flatten()]).stages[0], FakeQuant)
