"""LSQ, PACT and DoReFa against their definitions, written out with autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime.errors import Unsupported
from anytime.quant.fake import FakeQuant, QLinear
from anytime.quant.graph import Widths, prepared
from anytime.quant.learned import DoReFaActivation, DoReFaWeight, LSQActivation, LSQWeight, PACTActivation, learn
from anytime.quant.ranges import Grid, affine
from tests.worlds import Restarting, Tiny, data, trained


def quantizer(bits, low, high):
    q = FakeQuant(bits, signed=False)
    q.set(affine(low, high, bits))
    return q


def layer(weight, bits, scale):
    linear = torch.nn.Linear(*reversed(weight.shape))
    linear.weight.data = weight
    q = QLinear(linear, bits)
    q.weight_scale.copy_(torch.as_tensor(scale))
    q.on = True
    return q


def ste(v):
    return v + (v.round() - v).detach()


def lsq_by_definition(x, step, zero, qmax, gain):
    """Esser et al., equations 1 to 3: the gradient of the step through autograd alone."""
    step = (step - step * gain).detach() + step * gain
    v = (x / step).clamp(-zero, qmax - zero)
    return ste(v) * step


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans())
def test_lsq_activation_is_the_definition(seed, bits, negative, channels_last):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, 5, generator=draw)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    q = quantizer(bits, -1.0 if negative else 0.0, 1.5)
    learner = LSQActivation(q)
    g = torch.randn(x.shape, generator=draw)
    ours = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = learner(ours)
    y.backward(g)
    theirs, step = x.clone().requires_grad_(), q.scale.clone().requires_grad_()
    gain = (100 * (q.qmax - int(q.zero_point))) ** -0.5
    want = lsq_by_definition(theirs, step, int(q.zero_point), q.qmax, gain)
    want.backward(g)
    # a value between two steps may fall to either: torch's kernel multiplies by 1/step
    same = (y - want).abs() < 1e-5
    assert same.float().mean() > 0.97 and torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    torn = float((g * (y - want))[~same].abs().sum() / q.scale * gain)
    assert abs(float(learner.step.grad) - float(step.grad)) <= 1e-3 * float(g.abs().sum()) * gain + 2 * torn


def test_lsq_gradient_of_the_step_by_hand():
    # step 1, integers 0..3: 0.4 -> 0 (gives -0.4), 1.7 -> 2 (gives 0.3), 9 -> clipped to 3, -2 -> clipped to 0.
    learner = LSQActivation(quantizer(2, 0.0, 3.0))
    x = torch.tensor([[0.4, 1.7, 9.0, -2.0]], requires_grad=True)
    learner(x).sum().backward()
    assert float(learner.step.grad) == pytest.approx((-0.4 + 0.3 + 3 + 0) / (4 * 3) ** 0.5)
    assert x.grad.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("bits, low", [(2, -2), (4, -8), (8, -127)])
def test_lsq_weight_is_the_definition(bits, low):
    w = torch.randn(3, 50, generator=torch.Generator().manual_seed(bits))
    learner = LSQWeight(layer(w, bits, [0.1, 0.2, 0.3]))
    learner(w).square().sum().backward()
    step = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    high = 2 ** (bits - 1) - 1
    gain = (50 * high) ** -0.5
    s = ((step - step * gain).detach() + step * gain)[:, None]
    want = ste((w / s).clamp(low, high)) * s
    want.square().sum().backward()
    assert torch.allclose(learner(w), want) and torch.allclose(learner.step.grad, step.grad, rtol=1e-4)
    settled = learner.settle(w)
    integers = settled.weight / settled.scale[:, None]
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert integers.min() >= low - 1e-4 and integers.max() <= high + 1e-4


def test_pact_by_hand():
    # alpha 3 on 2 bits: steps of 1. Above alpha the gradient goes to alpha, below 0 to nobody.
    learner = PACTActivation(quantizer(2, 0.0, 3.0))
    x = torch.tensor([[-1.0, 0.4, 1.7, 3.0, 9.0]], requires_grad=True)
    y = learner(x)
    assert y.tolist() == [[0, 0, 2, 3, 3]]
    (y * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [[0, 2, 3, 0, 0]] and float(learner.alpha.grad) == 4 + 5
    assert learner.grid() == Grid(pytest.approx(1.0), 0, 0, 3)


def test_dorefa_activation_by_hand():
    # 2 bits: steps of 1/3 on [0, 1], whatever range was calibrated. Below 0 and beyond what rounds to 1 no gradient passes.
    learner = DoReFaActivation(quantizer(2, 0.0, 5.0))
    x = torch.tensor([[-0.5, -0.1, 0.1, 0.2, 0.4, 0.9, 1.0, 1.2, 3.0]], requires_grad=True)
    y = learner(x)
    assert y[0].tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1, 1, 1, 1])
    (y * torch.arange(1.0, 10.0)).sum().backward()
    assert x.grad.tolist() == [[0, 0, 3, 4, 5, 6, 7, 0, 0]]
    assert learner.grid() == Grid(pytest.approx(1 / 3), 0, 0, 3)


def test_dorefa_weight_by_hand():
    # 2 bits: levels -1, -1/3, 1/3, 1 times a factor; the largest weight lies on the last one.
    w = torch.tensor([[-2.0, -0.2, 0.1, 1.0]])
    learner = DoReFaWeight(layer(w, 2, [1.0]))
    # The factor is <w, unit> / <unit, unit> = (2 + 0.2 / 3 + 0.1 / 3 + 1) / (1 + 1 / 9 + 1 / 9 + 1) = 3.1 / (20 / 9).
    assert learner(w)[0].tolist() == pytest.approx([1.395 * unit for unit in (-1, -1 / 3, 1 / 3, 1)])
    assert learner(-2 * w)[0].tolist() == pytest.approx([1.395 * unit for unit in (1, 1 / 3, -1 / 3, -1)]), "it is fixed"
    settled = learner.settle(w)
    assert torch.allclose(settled.weight / settled.scale[:, None], torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dorefa_weight_is_the_definition(bits):
    """Zhou et al., equation 9; the largest |tanh w| is the layer's, and the gradient is that of the formula without rounding."""
    draw = torch.Generator().manual_seed(bits)
    w = torch.randn(3, 40, generator=draw) * torch.tensor([[0.1], [0.5], [1.0]])
    g = torch.randn(w.shape, generator=draw)
    learner = DoReFaWeight(layer(w, bits, [1.0, 1.0, 1.0]))
    t, levels = np.tanh(w.double().numpy()), 2**bits - 1
    unit = 2 * np.rint(levels * (t / (2 * np.abs(t).max()) + 0.5)) / levels - 1
    factor = np.linalg.lstsq(unit.reshape(-1, 1), w.double().numpy().ravel())[0].item()
    ours, theirs = w.clone().requires_grad_(), w.double().requires_grad_()
    got = learner(ours)
    assert np.allclose(got.detach().numpy(), factor * unit, atol=1e-5)
    got.backward(g)
    (factor * theirs.tanh() / theirs.tanh().abs().max()).backward(g.double())
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ste", "lsq", "pact", "dorefa"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fold_bn", [True, False])
def test_what_is_trained_is_what_settles(method, bits, fold_bn):
    model = trained(Tiny())
    net = prepared(model, data().calib.x, Widths(bits, bits), "u8s8", "mse", "mse", fold_bn=fold_bn)
    learn(net, method)
    x = data().test.x[:64]
    optimizer = torch.optim.SGD(net.model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net.model(x).square().mean().backward()
        optimizer.step()
    learned = [p for n, p in net.model.named_parameters() if "learner" in n]
    assert bool(learned) == (method in ("lsq", "pact"))
    assert all(p.grad is not None for p in learned)
    assert method != "lsq" or all(p.grad.abs() > 0 for p in learned if p.ndim == 0)
    net.model.eval()
    with torch.inference_mode():
        want = net.model(x)
    net.settle()
    assert not any("learner" in n for n, _ in net.model.named_modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.model.modules())
    with torch.inference_mode():
        before_bias = net.model(x)
        # an activation on the very edge of two steps may fall to either when a factor moves into a scale
        assert (want - before_bias).abs().mean() <= 0.02 * want.abs().mean()
        assert (want.argmax(-1) == before_bias.argmax(-1)).float().mean() >= 0.98
        final = net.freeze(round_bias=False)(x)
    assert (final - before_bias).abs().mean() <= 0.02 * want.abs().mean()
    for _, q in net.layers():
        whole = q.weight / q.weight_scale.view(-1, *(1,) * (q.weight.ndim - 1))
        assert torch.allclose(whole, whole.round(), atol=1e-2)


@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_what_has_no_form_for_signed_activations_says_so(method):
    net = prepared(trained(), data().calib.x, Widths(4, 4), "s8s8", "mse", "mse")
    with pytest.raises(Unsupported, match=f"{method} clips activations at 0, and this target's are signed: use learns='lsq'"):
        learn(net, method)


def test_pact_and_dorefa_take_only_what_they_have_a_form_for():
    """What has 8 bits keeps its grid, but for PACT's activations, and so does the input image, which has negative values."""
    for method, low, high in (("pact", PACTActivation, PACTActivation), ("dorefa", DoReFaActivation, type(None))):
        net = prepared(trained(), data().calib.x, Widths(4, 4), "u8s8", "mse", "mse")
        learn(net, method)
        got = {(q.bits, q.grid.zero_point == 0, type(q.learner)) for q in net.quantizers()}
        assert got == {(4, True, low), (4, False, type(None)), (8, True, high), (8, False, type(None))}
        assert {(m.weight_bits, type(m.learner)) for _, m in net.layers()} == {(4, DoReFaWeight), (8, type(None))}


@pytest.mark.parametrize("at_8_bits", [True, False])
def test_what_has_8_bits_can_keep_its_grid(at_8_bits):
    net = prepared(trained(), data().calib.x, Widths(4, 4, add=8), "u8s8", "mse", "mse")
    learn(net, "lsq", at_8_bits)
    assert {layer.weight_bits: layer.learner is not None for _, layer in net.layers()} == {8: at_8_bits, 4: True}
    assert {q.bits: q.learner is not None for q in net.quantizers()} == {8: at_8_bits, 4: True}


def test_learning_lowers_the_loss_of_what_restarts():
    model = trained(Restarting())
    net = prepared(model, data().calib.x, Widths(2, 2, edge=2), "u8s8", "mse", "mse")
    learn(net, "lsq")
    x = data().test.x[:64]
    want = model(x).detach()
    optimizer = torch.optim.Adam(net.model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = (net.model(x) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
