"""Bit allocation against brute force and by hand; sensitivities against rounding by hand."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from anytime.errors import Infeasible
from anytime.quant.bits import Bits
from anytime.quant.graph import Widths, quantized
from anytime.quant.search import Choices, choices, sensitivities
from anytime.quant.trace import links, traced
from tests.worlds import Restarting, data, trained

# The integer program --------------------------------------------------------------------------------------------


@st.composite
def small_choices(draw):
    """Up to four layers on up to three tensors; some cost nothing, and wider is not always truer."""
    layers = [f"l{i}" for i in range(draw(st.integers(1, 4)))]
    sources = {layer: f"t{draw(st.integers(0, 2))}" for layer in layers}
    some = st.sets(st.sampled_from([2, 3, 4, 6, 8]), min_size=1, max_size=3)
    distortion = st.floats(1e-4, 1.0)
    costs = {layer: draw(st.one_of(st.just(0.0), st.floats(0.1, 10))) for layer in layers}
    weight = {layer: {b: draw(distortion) for b in sorted(draw(some))} for layer in layers}
    activation = {t: {b: draw(distortion) for b in sorted(draw(some))} for t in sorted(set(sources.values()))}
    return Choices(costs, sources, weight, activation, draw(st.sampled_from([0.0, 0.5])))


def every_allocation(c):
    """All that may be chosen: (bits, cost, distortion), from the definition."""
    for widths in product(*c.weight.values(), *c.activation.values()):
        w = dict(zip(c.weight, widths, strict=False))
        a = dict(zip(c.activation, widths[len(w) :], strict=True))
        bits = {n: Bits(w[n], a[s]) for n, s in c.sources.items()}
        cost = sum(c.costs[n] * b.weight * b.activation for n, b in bits.items())
        yield bits, cost, sum(c.weight[n][w[n]] for n in w) + sum(c.activation[t][a[t]] for t in a) + c.rest


def allowed(c, bits):
    return {n: b.activation for n, b in bits.items()} == {
        n: {s: bits[m].activation for m, s in c.sources.items()}[c.sources[n]] for n in bits
    } and all(b.weight in c.weight[n] and b.activation in c.activation[c.sources[n]] for n, b in bits.items())


@settings(max_examples=60)
@given(small_choices(), st.floats(0, 1))
def test_the_cheapest_by_brute_force(c, how_far):
    everything = list(every_allocation(c))
    least, most = min(d for *_, d in everything), max(d for *_, d in everything)
    assert c.least_distortion == pytest.approx(least)
    bound = max(c.least_distortion, least + how_far * (most - least))
    got = c.cheapest(bound)
    assert allowed(c, got.bits) and set(got.bits) == set(c.sources)
    assert got.distortion <= bound * (1 + 2e-6) and got.gap <= 1e-6
    # The solver's own tolerance on the bound is one in a million: what lies on its edge may be taken or not.
    strict = min(cost for _, cost, d in everything if d <= bound * (1 + 1e-12))
    loose = min(cost for _, cost, d in everything if d <= bound * (1 + 1e-5))
    assert loose * (1 - 1e-5) <= got.cost <= strict * (1 + 1e-5)
    assert (got.cost, got.distortion) == (pytest.approx(c.cost(got.bits)), pytest.approx(c.distortion(got.bits)))


@settings(max_examples=60)
@given(small_choices(), st.floats(0, 1))
def test_the_truest_by_brute_force(c, how_far):
    everything = list(every_allocation(c))
    least, most = min(cost for _, cost, _ in everything), max(cost for _, cost, _ in everything)
    assert c.least_cost == pytest.approx(least)
    limit = max(c.least_cost, least + how_far * (most - least))
    got = c.truest(limit)
    assert allowed(c, got.bits) and got.cost <= limit * (1 + 2e-6) and got.gap <= 1e-6
    strict = min(d for _, cost, d in everything if cost <= limit * (1 + 1e-12))
    loose = min(d for _, cost, d in everything if cost <= limit * (1 + 1e-5))
    assert loose * (1 - 1e-5) <= got.distortion <= strict * (1 + 1e-5)


@settings(max_examples=30)
@given(small_choices(), st.floats(0, 1), st.floats(0, 1))
def test_more_distortion_never_costs_more(c, a, b):
    low, high = sorted((a, b))
    span = max(d for *_, d in every_allocation(c)) - c.least_distortion
    tight, loose = (c.cheapest(c.least_distortion + f * span).cost for f in (low, high))
    assert loose <= tight * (1 + 1e-5)


@settings(max_examples=15)
@given(small_choices(), st.lists(st.floats(0.01, 1), min_size=4, max_size=4), st.floats(0, 1))
def test_what_another_counts_is_kept_and_lies_on_its_own_frontier(c, run, how_far):
    shares = dict(zip(c.costs, run, strict=False))
    other = Choices({n: cost * shares[n] for n, cost in c.costs.items()}, c.sources, c.weight, c.activation, c.rest)
    most = max(other.cost(bits) for bits, *_ in every_allocation(c))
    limit = other.least_cost + how_far * (most - other.least_cost)
    got = c.truest(limit, by=other)
    assert other.cost(got.bits) <= limit * (1 + 2e-6)
    assert c.distortion(got.bits) == pytest.approx(c.truest(c.cost(got.bits)).distortion, rel=1e-4)


def two_layers(of_a=1.0, of_b=1.0, same_tensor=False):
    sources = {"a": "t", "b": "t" if same_tensor else "u"}
    exact = {8: 0.0} if not same_tensor else {4: 1.0, 8: 0.0}
    weight = {4: 1.0, 8: 0.0} if not same_tensor else {8: 0.0}
    return Choices({"a": of_a, "b": of_b}, sources, {"a": weight, "b": weight}, {t: exact for t in set(sources.values())})


@settings(max_examples=30)
@given(small_choices(), st.randoms(use_true_random=False), st.floats(0.2, 5))
def test_a_measured_bound_is_kept_however_wrong_the_prediction(c, rng, scale):
    """Never more expensive than bits that keep it already; where all predictions err alike, as cheap as with right ones."""
    everything = list(every_allocation(c))
    kept, kept_cost, predicted = rng.choice(everything)
    errs = {tuple(sorted(bits.items())): rng.uniform(0.3, 3) for bits, *_ in everything}

    def wrong(bits):
        return c.distortion(bits) * errs[tuple(sorted(bits.items()))]

    got = c.cheapest_measured(wrong(kept), kept, wrong)
    assert wrong(got.bits) <= wrong(kept) and got.cost <= kept_cost * (1 + 1e-9)
    even = c.cheapest_measured(scale * predicted, kept, lambda bits: scale * c.distortion(bits))
    assert even.cost <= c.cheapest(predicted).cost * (1 + 1e-6)


def test_what_fewer_samples_reach_keeps_more_bits():
    # One of two equal layers may take 4 bits. All samples run a, a quarter b: 4 * 8 + 8 * 8 / 4 = 48 against 72.
    got = two_layers(1.0, 0.25).cheapest(1.0)
    assert got == ({"a": (4, 8), "b": (8, 8)}, 1.0, 48.0, 0.0)
    assert two_layers(0.25, 1.0).cheapest(1.0).bits == {"a": (8, 8), "b": (4, 8)}
    assert two_layers().cheapest(1.0).cost == 96.0  # either one


def test_layers_of_one_tensor_take_its_bits():
    c = two_layers(same_tensor=True)
    assert c.cheapest(0.5) == ({"a": (8, 8), "b": (8, 8)}, 0.0, 128.0, 0.0)
    assert c.cheapest(1.0) == ({"a": (8, 4), "b": (8, 4)}, 1.0, 64.0, 0.0)  # its distortion counts once


def test_what_nobody_runs_is_as_true_as_it_can_be():
    assert two_layers(1.0, 0.0).cheapest(2.0).bits == {"a": (4, 8), "b": (8, 8)}


def test_too_little_is_said_with_what_is_possible():
    c = Choices({"a": 1.0}, {"a": "t"}, {"a": {2: 0.5, 4: 0.25}}, {"t": {4: 0.125}}, rest=1.0)
    with pytest.raises(Infeasible, match=r"a distortion of 1\.3 is too little; the least possible .* is 1\.375") as error:
        c.cheapest(1.3)
    assert c.cheapest(error.value.least).bits == {"a": (4, 4)}
    with pytest.raises(Infeasible, match=r"a cost of 7\.5 is too little; the least possible .* is 8") as error:
        c.truest(7.5)
    assert c.truest(error.value.least).bits == {"a": (2, 4)}
    with pytest.raises(Infeasible):
        c.cheapest(float("nan"))


# Sensitivities --------------------------------------------------------------------------------------------------


def nets_of(model, widths=(3, 8), add=8):
    nets = [quantized(model, Widths(w, w, 8, add), "u8s8") for w in widths]
    seen = nets[0].observe(data().calib.x)
    for net in nets:
        net.calibrate(seen, "minmax", "minmax")
    return nets


def kl(want, got):
    """Mean over samples [E] of logits [E, N, K], by scipy."""
    return rel_entr(softmax(want.double().numpy(), -1), softmax(got.double().numpy(), -1)).sum(-1).mean(-1)


def test_a_weight_alone():
    model, x = traced(trained()).requires_grad_(False), data().tune.x
    found = sensitivities(nets_of(model), x, batch=17)
    one = copy.deepcopy(model)
    layer = one.get_submodule("stages.1.0.a")
    for i, channel in enumerate(layer.weight):  # min-max, 3 bits: integers -3..3
        step = channel.abs().max() / 3
        layer.weight[i] = (channel / step).round() * step
    want = kl(model(x), one(x))
    assert want[0] == 0 and want[1:].min() > 0  # the first exit lies before it
    assert found["stages.1.0.a", 3] == pytest.approx(want, rel=1e-3)
    assert found["stages.1.0.a", 8].max() < found["stages.1.0.a", 3].max() / 10


def test_a_tensor_alone():
    model, x = traced(trained()).requires_grad_(False), data().tune.x
    nets = nets_of(model, (3,), add=3)
    found = sensitivities(nets, x)
    (name,) = {q.name for q in nets[0].quantizers() if q.name.startswith("stages.0:")} - {nets[0].sources["stages.0.0"].name}
    # A pooling by maximum stands behind the ReLU, and rounding keeps the order: its output is rounded alike.
    step = model.stages[0](data().calib.x).max() / 7  # pooled or not, the largest is the largest
    state = (model.stages[0](x) / step).round().clamp(0, 7) * step
    logits = [model.heads[0](state)]
    for stage, head in zip(model.stages[1:], model.heads[1:], strict=True):
        state = stage(state)
        logits.append(head(state))
    want = kl(model(x), torch.stack(logits))
    assert want.min() > 0
    assert found[name, 3] == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("spec", [None, Restarting()], ids=["chain", "restarts"])
def test_only_exits_that_come_after_can_change(spec):
    model = traced(trained(spec) if spec else trained())
    nets = nets_of(model)
    found = sensitivities(nets, data().tune.x)
    for link, _ in links(model):
        kind, k = link.split(".")
        mine = [d for (name, _), d in found.items() if name.replace(":", ".").startswith(f"{link}.")]
        assert mine
        for d in mine:
            others = d[: int(k)] if kind == "stages" and not model.restarts else np.delete(d, int(k))
            assert d[int(k)] > 0 and not others.any()


@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
def test_a_uniform_choice_is_all_of_its_roundings(target):
    model = traced(trained())
    nets = [quantized(model, Widths(w, w, 8, 8), target) for w in (3, 5, 8)]
    seen = nets[0].observe(data().calib.x)
    for net in nets:
        net.calibrate(seen, "mse", "mse")
    found = sensitivities(nets, data().tune.x)
    exits = np.array([0.5, 0.2, 0.3])
    c = choices(nets, found, {path: 1.0 for path, _ in nets[0].layers()}, exits)
    for net in nets:
        things = {(path, layer.weight_bits) for path, layer in net.layers()} | {(q.name, q.bits) for q in net.quantizers()}
        assert c.distortion(net.bits) == pytest.approx(sum(exits @ found[thing] for thing in things))
    assert set(c.weight["stages.0.0"]) == {8} and set(c.weight["stages.1.0.a"]) == {3, 5, 8}


def test_every_rounding_is_off_afterwards():
    model, x = traced(trained()), data().tune.x
    nets = nets_of(model)
    sensitivities(nets, x)
    with torch.no_grad():
        assert all(torch.allclose(net.model(x), model(x), atol=1e-5) for net in nets)
