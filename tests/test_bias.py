"""Bias correction takes out the mean error of every layer, heads too; BatchNorm's statistics are measured anew."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.models.msdnet import MSDNet
from anytime.quant.bias import correct_bias, reestimate_bn
from anytime.quant.fake import FakeQuant
from anytime.quant.graph import Widths, prepared, quantized, traced
from anytime.quant.ranges import affine
from tests.worlds import Restarting, Tiny, data, trained

LAYERS = (nn.Conv2d, nn.Linear)


@contextmanager
def recorded(model):
    """Path of a layer -> its outputs, over all calls."""
    seen: dict[str, list] = {}
    hooks = [
        m.register_forward_hook(lambda _m, _x, out, p=p: seen.setdefault(p, []).append(out))
        for p, m in model.named_modules()
        if isinstance(m, LAYERS)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def mean_errors(net, model, x, reached=None):
    """Path -> largest |mean error| of a channel over its typical size, each stage on the samples that reach it."""
    found = {}
    for k in range(model.n_exits):
        part = x if reached is None else x[reached >= k]
        if not len(part):
            continue
        with torch.no_grad(), recorded(model) as wanted, recorded(net.model) as got:
            model(part)
            net.model(part)
        for path in (p for p in wanted if p.split(".")[1] == str(k)):
            error = got[path][0] - wanted[path][0]
            channels = error.mean((0, 2, 3)) if error.ndim == 4 else error.mean(0)
            found[path] = float(channels.abs().max() / wanted[path][0].std())
    return found


def rounded(model, x, bits=3, **kw):
    return prepared(model, x, Widths(bits, bits, edge=bits, **kw), "u8s8", "mse", "mse")


@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
def test_no_layer_is_wrong_on_average_any_more(target):
    x, model = data().calib.x, traced(trained())
    net = prepared(model, x, Widths(3, 3, edge=3), target, "mse", "mse")
    before = mean_errors(net, model, x)
    assert (
        correct_bias(net, model, x, batch=40) == len(before) == 8
    )  # 4 convolutions, another one and 3 linear layers in the heads
    after = mean_errors(net, model, x)
    assert max(before.values()) > 0.1
    assert max(after.values()) < 1e-5


@pytest.mark.parametrize(
    "spec, shape, batch",
    [(Restarting(), (3, 16, 16), 7), (MSDNet(blocks=2, base=1, step=1), (3, 32, 32), 6)],
    ids=["stages that restart", "states that are tuples"],
)
def test_other_chains(spec, shape, batch):
    torch.manual_seed(0)
    x, model = torch.randn(16, *shape), traced(spec.build(shape, 4))
    net = rounded(model, x, add=8)
    assert correct_bias(net, model, x, batch=batch) == sum(isinstance(m, LAYERS) for m in model.modules())
    assert max(mean_errors(net, model, x).values()) < 1e-4


def one_layer():
    """z = 0.5 x without a bias; on a grid of step 0.4 the weight is 0.4, on one of step 1 the image 1.2 is 1."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(0.5)
    model = traced(AnytimeModel([nn.Sequential(conv)], [nn.Flatten()]))
    net = quantized(model, Widths(8, 8), "u8s8")
    x = torch.tensor([1.2, 2.0]).view(2, 1, 1, 1)
    net.calibrate(net.observe(x), "minmax", "minmax")
    first, second = net.quantizers()
    first.set(affine(0, 255, 8))  # a step of 1
    second.mode = "off"
    layer = dict(net.layers())["stages.0.0"]
    layer.weight_scale.fill_(0.4)
    return net, model, x, layer


def test_one_layer_by_hand():
    # x = 1.2, 2: in float 0.6, 1.0; rounded 0.4 * (1, 2) = 0.4, 0.8. The mean error is -0.2, so the bias is +0.2.
    net, model, x, layer = one_layer()
    assert correct_bias(net, model, x) == 1
    assert layer.bias.tolist() == pytest.approx([0.2])
    assert net.model(x).flatten().tolist() == pytest.approx([0.6, 1.0])
    assert correct_bias(net, model, x) == 1 and layer.bias.tolist() == pytest.approx([0.2])  # nothing is left to correct


def test_channels_of_a_linear_layer_over_tokens_are_its_last_axis():
    torch.manual_seed(0)
    x, model = torch.randn(6, 3, 2), traced(AnytimeModel([nn.Identity()], [nn.Sequential(nn.Linear(2, 3))]))
    net = rounded(model, x)
    correct_bias(net, model, x)
    error = (net.model(x) - model(x))[0].detach()
    assert error.mean((0, 1)).abs().max() < 1e-6 < error.mean((0, 2)).abs().max()


def test_samples_that_are_not_reached_have_no_influence():
    x, model = data().calib.x, traced(trained())
    reached = torch.arange(len(x)) % 4  # three quarters enter stage 1, half stage 2
    net = rounded(model, x)
    assert correct_bias(net, model, x, reached, batch=25) == 8
    assert max(mean_errors(net, model, x, reached).values()) < 1e-5  # 0 over those that get there
    assert mean_errors(net, model, x)["heads.2.3"] > 1e-3  # and over all of them it is not


def test_a_stage_that_nobody_reaches_is_left_alone():
    x, model = data().calib.x[:32], traced(trained())
    net = rounded(model, x)
    before = {p: m.bias.clone() for p, m in net.layers()}
    n = correct_bias(net, model, x, torch.zeros(32, dtype=torch.long))
    same = {p for p, m in net.layers() if torch.equal(m.bias, before[p])}
    assert n == 2 and same == {p for p in before if p.split(".")[1] != "0"}


def correct_stages_only(net, model, x):
    """The saboteur: heads forgotten, as by a tool that corrects the trunk."""
    heads = {p: m.bias.clone() for p, m in net.layers() if p.startswith("heads")}
    correct_bias(net, model, x)
    for p, m in net.layers():
        if p in heads:
            with torch.no_grad():
                m.bias.copy_(heads[p])


def test_a_head_that_is_forgotten_is_seen():
    x, model = data().calib.x, traced(trained())
    net = rounded(model, x)
    correct_stages_only(net, model, x)
    wrong = {p for p, e in mean_errors(net, model, x).items() if e > 1e-3}
    assert wrong and all(p.startswith("heads") for p in wrong)


def test_each_layer_is_corrected_behind_a_corrected_prefix():
    """The saboteur: every layer at once, from errors measured before anything was corrected."""
    x, model = data().calib.x, traced(trained())
    net, once = rounded(model, x), rounded(model, x)
    correct_bias(net, model, x)
    with torch.no_grad(), recorded(model) as wanted, recorded(once.model) as got:
        model(x)
        once.model(x)
    for p, m in once.layers():
        error = got[p][0] - wanted[p][0]
        with torch.no_grad():
            m.bias -= error.mean((0, 2, 3)) if error.ndim == 4 else error.mean(0)
    assert max(mean_errors(once, model, x).values()) > 1e-2 > max(mean_errors(net, model, x).values())


def test_layers_kept_in_float_are_corrected_too_and_the_float_chain_stays():
    x, model = data().calib.x, traced(trained())
    before = copy.deepcopy(model.state_dict())
    net = prepared(model, x, Widths(3, 3, edge=3), "u8s8", "mse", "mse", exclusions=("heads.2.3",))
    assert correct_bias(net, model, x) == 8
    assert mean_errors(net, model, x)["heads.2.3"] < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)))


def test_a_layer_that_is_called_twice_is_corrected_for_each_call():
    torch.manual_seed(0)
    x, model = torch.randn(8, 2, 4, 4), traced(AnytimeModel([Twice()], [nn.Sequential(nn.Flatten(), nn.Linear(32, 3))]))
    net = rounded(model, x)
    assert correct_bias(net, model, x) == 3 and max(mean_errors(net, model, x).values()) < 1e-5


def test_what_cannot_be_corrected_is_said():
    x, model = data().calib.x[:16], traced(trained())
    net = rounded(model, x)
    with pytest.raises(Unsupported, match="no samples"):
        correct_bias(net, model, x[:0])
    with pytest.raises(Unsupported, match="only one of the two chains has heads.1.0"):
        correct_bias(net, traced(Restarting().build((3, 16, 16), 4)), x)
    with pytest.raises(Unsupported, match="BatchNorm folded in both"):
        correct_bias(prepared(trained(), x, Widths(8, 8), "u8s8", "mse", "mse", fold_bn=False), model, x)


# BatchNorm -----------------------------------------------------------------------------------------------------


def normed():
    """A chain in training mode whose BatchNorm reads what a quantizer of step 1 leaves, behind a dropout."""
    q = FakeQuant(8, signed=False)
    q.set(affine(0, 255, 8))
    return AnytimeModel([nn.Sequential(q, nn.Dropout(0.5), nn.BatchNorm2d(1, momentum=0.3))], [nn.Flatten()])


def test_statistics_are_the_average_over_batches_of_what_is_rounded():
    # Rounded: 1 1 3 | 2 6. Means 5/3 and 4, unbiased variances 4/3 and 8; their averages 17/6 and 14/3.
    model = normed()
    bn = model.stages[0][2]
    bn.running_mean.fill_(99.0)
    reestimate_bn(model, torch.tensor([1.2, 0.9, 3.4, 2.1, 6.0]).view(5, 1, 1, 1), batch=3)
    assert float(bn.running_mean) == pytest.approx(17 / 6) and float(bn.running_var) == pytest.approx(14 / 3)


def test_batches_are_of_one_size():
    """Of 5 samples in batches of 4 the last must not be one: BatchNorm cannot measure it, and it would weigh as much as 4."""
    model = normed()
    reestimate_bn(model, torch.tensor([1.0, 1.0, 3.0, 2.0, 6.0]).view(5, 1, 1, 1), batch=4)
    assert float(model.stages[0][2].running_mean) == pytest.approx(17 / 6)


def test_modes_momenta_and_gradients_are_left_as_they_were():
    model = Tiny().build((3, 16, 16), 4).train()
    frozen = model.stages[0][1].eval()
    frozen.weight.requires_grad_(False)
    weights = {k: v.clone() for k, v in model.named_parameters()}
    was = [(m.training, getattr(m, "momentum", None)) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    reestimate_bn(model, data().calib.x[:8])
    assert was == (
        [(m.training, getattr(m, "momentum", None)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())
    with pytest.raises(Unsupported, match="1 samples"):
        reestimate_bn(model, data().calib.x[:1])


def test_after_it_a_network_with_shifted_weights_normalises_again():
    """What it is for: weights that rounding changed, BatchNorm with the statistics of those before."""
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8)
    conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model = AnytimeModel([nn.Sequential(conv, bn)], [nn.Flatten()])
    reestimate_bn(model, x)
    with torch.no_grad():
        conv.weight *= 3.0
        conv.bias += 1.0
    model.eval()

    def off():
        with torch.no_grad():
            z = model.stages[0](x)
        return float((z.mean((0, 2, 3)).abs() + (z.std((0, 2, 3)) - 1).abs()).max())

    assert off() > 1
    reestimate_bn(model, x)
    assert off() < 0.01
