"""Learned rounding: its formulas by hand, its units by the networks' own blocks, and that it lowers what it says it lowers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anytime.errors import Diverged, Unsupported, UsageError
from anytime.model import AnytimeModel
from anytime.models.branchynet import BAlexNet
from anytime.models.msdnet import MSDNet
from anytime.models.resnet import ResNet20
from anytime.models.sparse_resnet import SparseResNet
from anytime.quant.adaround import AdaRoundWeight, rectified_sigmoid
from anytime.quant.fake import FakeQuant, QConv2d, QLinear
from anytime.quant.graph import Widths, prepared, quantized, traced
from anytime.quant.qdrop import DropStep, kept
from anytime.quant.ranges import Grid, affine, weight_scales
from anytime.quant.reconstruct import Reconstruction, reconstruct
from anytime.quant.units import partition
from anytime.rounding import learn_rounding
from tests.worlds import Residual, Restarting, Tiny, data, trained, trainer

QUICK = Reconstruction(iterations=60)
BY_LAYER = replace(QUICK, unit="layer", drop=0.0, learn_steps=False)  # AdaRound
SPARSE = SparseResNet(depth=4, widths=(4, 6), exits=3)
DENSE = MSDNet(blocks=2, base=1, step=1, channels=4, growth=2)


def x():
    return data().train.x[:96]


def calibrated(model, weight=4, activation=4, target="u8s8", **widths):
    """A float chain, and what is rounded to nearest of it."""
    model = traced(model)
    net = quantized(model, Widths(weight, activation, **widths), target)
    net.calibrate(net.observe(data().calib.x), "mse", "mse")
    return net, model


def learned(model, how=QUICK, seed=0, images=None, reached=None, **kw):
    net, model = calibrated(model, **kw)
    report = reconstruct(net, model, x() if images is None else images, how, seed, reached)
    return net, model, report


def weights(net):
    return {path: layer.weight.detach().clone() for path, layer in net.layers()}


def errors(net, model):
    """Squared error of every exit's logits for each image [E, N]; nothing was learned from these images."""
    images = torch.cat([data().tune.x, data().val.x, data().test.x])
    with torch.inference_mode():
        return (net.model(images) - model(images)).square().mean(2)


def logit_error(net, model):
    """[E]."""
    return errors(net, model).mean(1)


def certainly_less(after, before):
    """Whether errors [E, N] fell, each exit's as a share of what it was: by more than three standard errors over images."""
    change = ((after - before) / before.mean(1, keepdim=True)).mean(0)
    return bool(change.mean() < -3 * change.std() / len(change) ** 0.5)


# Formulas ------------------------------------------------------------------------------------------------------


def test_the_rectified_sigmoid_by_hand():
    # sigmoid = 1/12, 1/2, 3/4, 11/12: times 1.2, less 0.1
    v = torch.tensor([-9.0, -np.log(11), 0.0, np.log(3), np.log(11), 9.0])
    assert rectified_sigmoid(v).tolist() == pytest.approx([0, 0, 0.5, 0.8, 1, 1], abs=1e-6)


def layer_of(weight, bits=4):
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False)
    conv.weight = nn.Parameter(weight)
    q = QConv2d(conv, bits)
    q.weight_scale.copy_(weight_scales(weight, bits, "minmax"))
    q.on = True
    return q


def test_a_soft_weight_by_hand():
    w = torch.tensor([0.7, 0.21, -0.34, 0.0]).view(1, 4, 1, 1)  # 4 bits: a step of 0.1
    q = layer_of(w)
    learner = AdaRoundWeight(q)
    assert torch.allclose(learner(w), w, atol=1e-6)  # it starts at the float weight
    up = torch.tensor([0.0, 0.1, 0.6, 0.0])  # h = frac(w / s); 0.7 / 0.1 may fall on either side of 7
    undecided = (1 - (2 * up - 1).abs() ** 2).sum()
    assert learner.undecided(2.0).item() == pytest.approx(undecided.item(), abs=1e-4)
    with torch.no_grad():
        learner.v.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]).view_as(w))
    assert learner(w).flatten().tolist() == pytest.approx([0.7, 0.3, -0.4, 0.0], abs=1e-6)  # 0.8 is cut to 7 steps
    assert learner.undecided(2.0).item() == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["mse", "minmax"]))
def test_what_settles_lies_on_the_grid_within_one_step(seed, bits, observer):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 2, 3, 3, generator=g)
    q = layer_of(w, bits)
    q.weight_scale.copy_(weight_scales(w, bits, observer))
    nearest = q.rounded().clone()
    learner = AdaRoundWeight(q)
    untrained = learner.settle(w)
    scale = untrained.scale.view(-1, 1, 1, 1)
    assert (untrained.weight - nearest).abs().max() <= 1.001 * scale.max() * ((w / scale).frac().abs() - 0.5).abs().lt(1e-4).any()
    with torch.no_grad():
        learner.v.copy_(torch.randn(w.shape, generator=g))
    settled = learner.settle(w)
    steps = settled.weight / scale
    assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= settled.qmax + 1e-4
    assert torch.equal(settled.scale, q.weight_scale) and torch.equal(learner(w), settled.weight)
    inside = (w / scale).abs() <= settled.qmax
    assert ((settled.weight - w).abs() <= scale * 1.001)[inside].all()
    q.put(settled)
    assert torch.allclose(q.rounded(), settled.weight, atol=1e-6)


def quantizer(grid, bits=4, signed=False):
    q = FakeQuant(bits, signed)
    q.set(grid)
    return q


GRIDS = {
    "from zero": Grid(0.1, 0, 0, 15),
    "with a zero point": affine(-0.5, 1.0, 4),
    "signed": Grid(0.125, 0, -8, 7),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_step_learns_by_the_gradient_of_lsq(grid):
    """The definition, value by value in float64: -x/s + round(x/s) inside, the clipped integer outside."""
    g = torch.Generator().manual_seed(0)
    values, back = torch.randn(4, 3, 5, 5, generator=g), torch.randn(4, 3, 5, 5, generator=g)
    values.requires_grad_()
    learner = DropStep(quantizer(grid, signed=grid.qmin < 0), 0.0, g)
    out = learner(values)
    out.backward(back)
    v, s = values.detach().double().numpy() / grid.scale, grid.scale
    low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    inside = (v > low) & (v < high)
    slope = np.where(inside, np.rint(v) - v, np.clip(v, low, high))
    want = (slope * back.numpy()).sum() / np.sqrt(75 * grid.qmax)  # 75 elements of one sample
    assert learner.step.grad.item() == pytest.approx(want, rel=1e-4)
    assert np.array_equal(values.grad.numpy(), np.where(inside, back.numpy(), 0))
    assert np.allclose(out.detach().numpy(), np.clip(np.rint(v), low, high) * s, atol=1e-6)
    assert learner.grid() == pytest.approx(grid)


def test_what_is_dropped_stays_float_and_teaches_the_step_nothing():
    grid = GRIDS["from zero"]
    values, back = torch.rand(2, 4, 6, 6) * 2, torch.randn(2, 4, 6, 6)
    values = values.to(memory_format=torch.channels_last).requires_grad_()
    keep = kept(values, 0.5, torch.Generator().manual_seed(3)).bool()
    assert 0.3 < keep.float().mean() < 0.7
    learner = DropStep(quantizer(grid), 0.5, torch.Generator().manual_seed(3))
    out = learner(values)
    out.backward(back)
    full = quantizer(grid)(values.detach())
    assert torch.equal(out.detach(), torch.where(keep, full, values.detach()))
    inside = values.detach() < 1.5
    assert torch.equal(values.grad, back * (inside | ~keep))
    slope = torch.where(inside, full - values.detach(), full) / 0.1
    assert learner.step.grad.item() == pytest.approx(float((slope * back)[keep].sum()) / np.sqrt(144 * 15), rel=1e-3)
    assert torch.equal(learner.eval()(values), full)  # outside of reconstruction nothing is dropped
    fixed = DropStep(quantizer(grid), 0.0, torch.Generator(), learn=False)
    fixed(values).sum().backward()
    assert fixed.step.grad is None


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 3, 5, 7)])
def test_the_share_that_is_dropped(shape):
    like = torch.empty(200, *shape)
    like = like.to(memory_format=torch.channels_last) if like.ndim == 4 else like
    g = torch.Generator().manual_seed(0)
    for drop in (0.0, 0.25, 0.5):
        got = kept(like, drop, g)
        assert got.shape == like.shape and got.stride() == like.stride() and set(got.unique().tolist()) <= {0.0, 1.0}
        assert abs(1 - got.mean().item() - drop) <= 4 * np.sqrt(0.25 / like.numel())


# Units ---------------------------------------------------------------------------------------------------------


def units(spec, shape, unit="block", target="u8s8", **kw):
    model = traced(spec.build(shape, 4))
    net = quantized(model, Widths(4, 4, **kw), target)
    entry, stages = partition(net, model, unit, with_exits=True)
    return net, entry, [stage.units for stage in stages]


@pytest.mark.parametrize("add", [0, 8])
def test_a_residual_block_is_one_unit_and_the_last_knows_the_head(add):
    _, _, (found,) = units(ResNet20(), (3, 32, 32), add=add)
    blocks = [f"stages.0.layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    assert [u.name for u in found] == ["stages.0.conv1", *blocks, "heads.0.linear"]
    assert [len(u.layers) for u in found] == [1, *[2] * 9, 1]
    assert all(len(u.reads) == len(u.gives) == 1 for u in found)
    assert [bool(u.head) for u in found] == [False] * 9 + [True, False]
    assert [op.layer for op in found[-2].head if op.layer] == ["heads.0.linear"] and found[-2].logits is found[-1].gives[0]


def test_the_units_of_a_chain_with_exits():
    names = [[u.name for u in stage if u.layers] for stage in units(Tiny(), (3, 16, 16))[2]]
    assert names == [
        ["stages.0.0", "heads.0.2"],
        ["stages.1.0", "heads.1.0", "heads.1.4"],  # a residual block, then the head's two layers
        ["stages.2.0", "heads.2.3"],
    ]
    layers = [u for u in units(Tiny(), (3, 16, 16), "layer")[2][1] if u.layers]
    assert [u.name for u in layers] == ["stages.1.0.a", "stages.1.0.b", "heads.1.0", "heads.1.4"]
    kinds = [[type(op.rounded).__name__ for op in u.ops] for u in layers]
    assert kinds[0] == ["QConv2d", "ReLU", "FakeQuant"] and kinds[3] == ["QLinear"]  # its ReLU, their quantizer, no more
    assert not any(u.head for u in layers)


def test_heads_of_several_layers_behind_plain_convolutions():
    found = units(BAlexNet(), (3, 32, 32))[2]
    assert [[u.name for u in stage if u.head] for stage in found] == [["stages.0.4"], ["stages.1.0"], ["stages.2.2"]]
    of_head = [[op.layer for op in u.head if op.layer] for stage in found for u in stage if u.head]
    assert [len(layers) for layers in of_head] == [3, 2, 3]
    assert of_head == [[layer for u in stage if u.name.startswith("heads") for layer in u.layers] for stage in found]


class Early(nn.Module):
    """A state of two tensors, one made of the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x):
        a = torch.relu(self.first(x))
        return a, torch.relu(self.second(a))


class Reads(nn.Module):
    """Logits from one tensor of the state."""

    def __init__(self, which):
        super().__init__()
        self.which, self.linear = which, nn.Linear(4, 4)

    def forward(self, state):
        return self.linear(state[self.which].mean((2, 3)))


@pytest.mark.parametrize("which, block", [(0, "stages.0.first"), (1, "stages.0.second")])
def test_the_block_that_a_head_reads_counts_it_not_simply_the_last(which, block):
    model = traced(AnytimeModel([Early()], [Reads(which)]))
    net = quantized(model, Widths(4, 4), "u8s8")
    (stage,) = partition(net, model, "block", with_exits=True)[1]
    assert [u.name for u in stage.units if u.head] == [block]
    net.calibrate(net.observe(x()), "mse", "mse")
    assert [r.unit for r in reconstruct(net, model, x(), replace(QUICK, iterations=3), 0)] == [
        "stages.0.first",
        "stages.0.second",
        "heads.0.linear",
    ]


def test_a_head_that_reads_no_layer_learns_by_itself():
    model = AnytimeModel([nn.MaxPool2d(4)], [nn.Sequential(nn.Flatten(), nn.Linear(48, 4))])
    net, model, report = learned(model, replace(QUICK, iterations=3))
    assert [r.unit for r in report] == ["heads.0.1"]


@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize(
    "spec, shape", [(SPARSE, (3, 16, 16)), (DENSE, (3, 32, 32)), (Restarting(), (3, 16, 16)), (Tiny(), (3, 16, 16))],
    ids=["states of many", "dense", "restarting", "plain"],
)  # fmt: skip
def test_every_layer_is_learned_once_and_what_a_unit_reads_is_there(spec, shape, unit, target):
    net, entry, found = units(spec, shape, unit, target)
    assert sorted(layer for stage in found for u in stage for layer in u.layers) == sorted(path for path, _ in net.layers())
    there = {entry}
    for stage in found:
        for u in stage:
            assert set(u.reads) <= there, u.name
            there |= set(u.gives)
        assert sum(bool(u.head) for u in stage) == (unit == "block")


# Learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight, activation", [(3, 8), (4, 4)])
@pytest.mark.parametrize(
    "how",
    [QUICK, replace(QUICK, drop=0.0), BY_LAYER],
    ids=["QDrop", "BRECQ", "AdaRound"],
)
def test_the_error_falls(weight, activation, how):
    net, model = calibrated(trained(), weight, activation)
    nearest = errors(net, model)
    report = reconstruct(net, model, x(), replace(how, iterations=600), 0)
    learned = errors(net, model)
    assert certainly_less(learned, nearest) and certainly_less(learned[-1:], nearest[-1:])
    low = [r for r in report if min(net.bits[path].weight for path in r.layers) < 8]
    assert low and sum(r.after for r in low) < sum(r.before for r in low)
    assert not [m for m in (*net.quantizers(), *(layer for _, layer in net.layers())) if m.learner is not None]
    net.check_coverage()


def test_eight_bits_lose_nothing():
    """Less than half a bit, which is a factor of 2 in the error, and no accuracy."""
    net, model = calibrated(trained(), 8, 8)
    nearest = logit_error(net, model)
    reconstruct(net, model, x(), QUICK, 0)
    assert (logit_error(net, model) < 2 * nearest).all()
    test = data().test
    with torch.inference_mode():
        right = [(m(test.x).argmax(-1) == test.y).float().mean(1) for m in (model, net.model)]
    assert (right[0] - right[1]).max() <= 0.01


def test_the_scales_of_weights_stay_and_steps_move_only_when_they_learn():
    net, model = calibrated(trained())
    scales = {path: layer.weight_scale.clone() for path, layer in net.layers()}
    steps = [float(q.scale) for q in net.quantizers()]
    reconstruct(net, model, x(), replace(QUICK, learn_steps=False), 0)
    assert [float(q.scale) for q in net.quantizers()] == steps
    assert all(torch.equal(layer.weight_scale, scales[path]) for path, layer in net.layers())
    for path, layer in net.layers():
        q = layer.weight / layer.weight_scale.view(-1, *(1,) * (layer.weight.ndim - 1))
        assert torch.allclose(q, q.round(), atol=1e-3), path
    net, _, _ = learned(trained())
    assert all(a != float(q.scale) > 0 for a, q in zip(steps, net.quantizers(), strict=True))


def test_without_iterations_it_is_rounding_to_nearest():
    net, model = calibrated(trained())
    nearest = logit_error(net, model)
    report = reconstruct(net, model, x(), replace(QUICK, iterations=0), 0)
    assert torch.allclose(logit_error(net, model), nearest, rtol=1e-5)
    assert all(r.after == pytest.approx(r.before) for r in report)


def test_heads_learn_too():
    nearest, _ = calibrated(trained(), 3, 8, edge=3)
    net, _, _ = learned(trained(), weight=3, activation=8, edge=3)
    before, after = ({p: layer.rounded() for p, layer in n.layers()} for n in (nearest, net))
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert {path.rsplit(".", 1)[0] for path in changed} >= {"heads.0", "heads.1", "heads.2", "stages.1.0"}


def test_the_loss_with_an_exit_by_hand():
    net, model = calibrated(trained(), 3, 8)
    with torch.inference_mode():
        state, plain = net.model.stages[0](x()), model.stages[0](x())
        logits, of_state, wanted = net.model.heads[0](state), model.heads[0](state), model.heads[0](plain)

    def over_channels(t):
        return t.square().sum(1).mean()

    for exit_weight in (0.0, 0.1, 2.0):
        net, model = calibrated(trained(), 3, 8)
        report = reconstruct(net, model, x(), replace(QUICK, iterations=0, exit_weight=exit_weight), 0)
        assert [r.unit for r in report[:2]] == ["stages.0.0", "heads.0.2"]
        relative = over_channels(of_state - wanted) / over_channels(wanted)
        want = over_channels(state - plain) + exit_weight * relative * over_channels(plain)
        assert report[0].before == pytest.approx(float(want), rel=1e-3)
        assert report[1].before == pytest.approx(float(over_channels(logits - wanted)), rel=1e-3)


def test_the_schedule_of_the_penalty_by_hand(monkeypatch):
    """A fifth of the iterations without it, then an exponent from 20 down to 2, and a hundredth of it in the loss."""
    torch.manual_seed(0)
    model = AnytimeModel([nn.Sequential(Residual(3))], [nn.Sequential(nn.Flatten(), nn.Linear(768, 4))]).eval()
    undecided, backward = AdaRoundWeight.undecided, torch.Tensor.backward
    said, losses = [], []
    monkeypatch.setattr(AdaRoundWeight, "undecided", lambda w, b: said.append((b, undecided(w, b))) or said[-1][1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, **kw: losses.append(loss.item()) or backward(loss, **kw))
    learned(model, replace(QUICK, iterations=10))
    betas = [20, 17.75, 15.5, 13.25, 11, 8.75, 6.5, 4.25]  # 20 - 18 * (i - 2) / 8
    assert [beta for beta, _ in said] == pytest.approx([*np.repeat(betas, 2), *betas])  # a block of two layers, then the head
    learned(model, replace(QUICK, iterations=10, penalty=0.0))
    penalties = np.subtract(losses[:3], losses[20:23])  # until then both learn the same
    assert penalties.tolist() == pytest.approx([0, 0, 0.01 * (said[0][1] + said[1][1]).item()], rel=1e-3)


@pytest.mark.parametrize(
    "name, unit, drop, learn_steps", [("adaround", "layer", 0, False), ("brecq", "block", 0, True), ("qdrop", "block", 0.5, True)]
)
def test_what_the_names_of_roundings_stand_for(monkeypatch, name, unit, drop, learn_steps):
    asked = []
    monkeypatch.setattr("anytime.rounding.reconstruct", lambda net, model, x, how, *rest: asked.append(how) or [])
    net, model = calibrated(trained())
    learn_rounding(net, model, x(), name, 7, trainer(), name)
    assert asked == [Reconstruction(unit=unit, drop=drop, learn_steps=learn_steps, iterations=7)]
    assert learn_rounding(net, model, x(), "nearest", 7, trainer(), name) == {} and len(asked) == 1


def test_an_exit_counts_in_what_its_block_learns():
    """The same batches and the same drops: what differs is the loss."""
    without, with_exit = (weights(learned(trained(), replace(QUICK, exit_weight=w))[0]) for w in (0.0, 1.0))
    assert not torch.equal(without["stages.1.0.b"], with_exit["stages.1.0.b"])
    by_layer = [weights(learned(trained(), replace(BY_LAYER, exit_weight=w))[0]) for w in (0.0, 1.0)]
    assert all(torch.equal(by_layer[0][path], by_layer[1][path]) for path in by_layer[0])


def test_seeds_decide_and_nobody_elses_generator_moves():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    runs = [weights(learned(trained(), replace(QUICK, iterations=20), seed=s)[0]) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(runs[0][p], runs[1][p]) for p in runs[0])
    assert not all(torch.equal(runs[0][p], runs[2][p]) for p in runs[0])


def test_a_stage_learns_only_from_the_samples_that_reach_it():
    """The saboteurs: an image of NaN that enters no stage, and other pixels where only the first stage looks."""
    reached = torch.arange(96) % 3
    spoiled, spoiled_reached = x().clone(), reached.clone()
    spoiled[5], spoiled_reached[5] = float("nan"), -1
    net, model, report = learned(trained(), images=spoiled, reached=spoiled_reached)
    assert [r.samples for r in report] == [95, 95, 63, 63, 63, 31, 31]
    assert all(np.isfinite([r.before, r.after]).all() for r in report) and torch.isfinite(logit_error(net, model)).all()
    with pytest.raises(Diverged, match=r"reconstruction of stages.0.0 met NaN"):
        learned(trained(), images=spoiled, reached=reached)

    other = x().clone()
    other[reached == 0] = other[reached == 0].flip(0) * 0.5
    torch.manual_seed(0)
    chain = Restarting().build((3, 16, 16), 4)
    a, b = (weights(learned(chain, images=i, reached=(reached > 0).long())[0]) for i in (x(), other))
    assert torch.equal(a["stages.1.0"], b["stages.1.0"]) and torch.equal(a["heads.1.2"], b["heads.1.2"])
    assert not torch.equal(a["stages.0.0"], b["stages.0.0"])


def with_statistics(spec, size):
    torch.manual_seed(0)
    model = spec.build((3, size, size), 4)
    model(torch.randn(16, 3, size, size))  # running statistics that are not 0 and 1
    return model


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
@pytest.mark.parametrize("spec", [SPARSE, Restarting()], ids=str)
def test_states_of_several_tensors_and_stages_that_restart(spec, target, unit):
    net, model = calibrated(with_statistics(spec, 16), 3, 8, target, edge=3)
    nearest = errors(net, model)
    report = reconstruct(net, model, x(), replace(QUICK, unit=unit, iterations=150), 0)
    assert sorted(path for r in report for path in r.layers) == sorted(path for path, _ in net.layers())
    assert certainly_less(errors(net, model), nearest)
    net.check_coverage()


def test_a_grid_that_concatenated_tensors_share_is_learned_once(monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(24, 3, 32, 32)
    model = with_statistics(DENSE, 32)
    model = traced(model)
    net = quantized(model, Widths(4, 4), "s8s8")
    net.calibrate(net.observe(images), "mse", "mse")
    shared = [q for q in net.quantizers() if sum(q in set(s.modules()) for s in net.model.stages) > 1]
    assert shared  # the same quantizer in both stages
    seen: dict[FakeQuant, list[float]] = {q: [float(q.scale)] for q in shared}
    settle = FakeQuant.settle

    def watched(q):
        settle(q)
        seen.get(q, []).append(float(q.scale))

    monkeypatch.setattr(FakeQuant, "settle", watched)
    reconstruct(net, model, images, Reconstruction(iterations=8), 0)
    for steps in seen.values():
        assert len(steps) > 2 and steps[0] != steps[1] and len(set(steps[1:])) == 1


def test_progress_counts_every_iteration():
    net, model = calibrated(trained())
    said = []
    reconstruct(net, model, x(), replace(QUICK, iterations=5), 0, progress=lambda *a: said.append(a))
    assert said == [("reconstruct", i, 35) for i in range(1, 36)]


# What cannot be meant ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"unit": "net"}, "unit 'net'.*'layer' or 'block'"),
        ({"drop": 1.0}, "drop 1.0: it is the share"),
        ({"iterations": -1}, "-1 iterations of batches of 32"),
        ({"batch": 0}, "batches of 0"),
    ],
)
def test_fields_that_mean_nothing(fields, said):
    with pytest.raises(UsageError, match=said):
        Reconstruction(**fields)


def test_what_it_cannot_start_from_is_said():
    net, model = calibrated(trained())
    with pytest.raises(Unsupported, match="no samples"):
        reconstruct(net, model, x()[:0], QUICK, 0)
    with pytest.raises(Unsupported, match="no calibration image reaches stage 2"):
        reconstruct(net, model, x(), replace(QUICK, iterations=0), 0, torch.ones(96, dtype=torch.long))
    for other in (trained(), traced(trained(Restarting())), traced(trained(), fold_bn=False)):
        with pytest.raises(Unsupported, match=r"stages.0 of the float chain is not what was quantized"):
            reconstruct(net, other, x(), QUICK, 0)
    with pytest.raises(Unsupported, match="no calibrated quantizer"):
        reconstruct(quantized(model, Widths(4, 4), "u8s8"), model, x(), QUICK, 0)


def test_an_excluded_layer_is_left_alone():
    model = traced(trained())
    net = quantized(model, Widths(4, 4), "u8s8", exclusions=("stages.1.0.b",))
    net.calibrate(net.observe(data().calib.x), "mse", "mse")
    report = reconstruct(net, model, x(), replace(QUICK, iterations=5), 0)
    assert "stages.1.0.b" not in [path for r in report for path in r.layers]
    left = net.model.get_submodule("stages.1.0.b")
    assert not isinstance(left, QConv2d | QLinear) and torch.equal(left.weight, model.get_submodule("stages.1.0.b").weight)


class Gate(nn.Module):
    """Squeeze and excitation as it is usually written."""

    def __init__(self, c):
        super().__init__()
        self.pool, self.a, self.b = nn.AdaptiveAvgPool2d(1), nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.pool(x).view(b, c)
        return x * torch.sigmoid(self.b(torch.relu(self.a(y)))).view(b, c, 1, 1).expand_as(x)


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("n", [1, 4])  # 4: more layers than one unit may have
def test_shapes_may_be_asked_before_layers_and_used_behind_them(unit, n):
    torch.manual_seed(0)
    gates = [m for _ in range(n) for m in (Gate(4), nn.Conv2d(4, 4, 3, padding=1))]
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *gates, nn.Flatten())
    chain, x = traced(AnytimeModel([body], [nn.Linear(64, 3)])), torch.randn(150, 3, 4, 4)
    net = prepared(chain, x, Widths(4, 8), "u8s8", "minmax", "minmax")
    done = reconstruct(net, chain, x, Reconstruction(unit=unit, drop=0.0, learn_steps=False, iterations=2), 0)
    assert sum(len(u.layers) for u in done) == 2 + 3 * n
    assert net.model(x).isfinite().all()


def test_a_shape_asked_first_and_used_last():
    class V(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)))

        def forward(self, x):
            b = x.shape[0]
            return self.body(x).view(b, -1)

    for unit in ("layer", "block"):
        chain, x = traced(AnytimeModel([V()], [nn.Linear(48, 3)])), torch.randn(150, 3, 4, 4)
        net = prepared(chain, x, Widths(4, 8), "u8s8", "minmax", "minmax")
        done = reconstruct(net, chain, x, Reconstruction(unit=unit, drop=0.5, iterations=2), 0)
        assert sum(len(u.layers) for u in done) == 9 and net.model(x).isfinite().all()
