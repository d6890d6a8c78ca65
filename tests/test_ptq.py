"""The steps of post-training quantization, in their order, as one backend."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from anytime.backend import fake_quant_net
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.dataset import Part
from anytime.errors import Collapsed, Unsupported, UsageError
from anytime.model import AnytimeModel
from anytime.policies.confidence import MaxProb
from anytime.quant.bias import reestimate_bn
from anytime.quant.fake import FakeQuant
from anytime.quant.graph import prepared
from anytime.quant.trace import traced
from anytime.reach import Reach
from tests.contracts.backend import backend_keeps_its_promise
from tests.worlds import Restarting, data, trained, trainer

STEPS = {
    "plain": PTQ(4, 8),
    "equalized": PTQ(4, 8, equalize=True),
    "bias corrected": PTQ(4, 8, correct_bias=True),
    "adaround": PTQ(4, 8, rounding="adaround", iterations=20),
    "statistics anew": PTQ(4, 8, reestimate_bn=True, correct_bias=True),
    "statistics anew, learned": PTQ(4, 8, reestimate_bn=True, rounding="adaround", iterations=20),
    "brecq": PTQ(4, 8, rounding="brecq", iterations=20),
    "everything": PTQ(
        4, 4, equalize=True, correct_bias=True, rounding="qdrop", iterations=20, reach=Reach(MaxProb(), 0.8), add_bits=8
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_keeps_the_promise(name):
    backend_keeps_its_promise(STEPS[name], trained(), data(), trainer())


def test_stages_that_restart_are_reconstructed_too():
    backend_keeps_its_promise(PTQ(4, 8, rounding="qdrop", iterations=10), trained(Restarting()), data(), trainer())


def test_behind_batch_norm_rounded_layers_have_the_moments_of_float_ones():
    """Rounding to 3 bits changes the mean and variance of every channel; folded statistics keep the change, new ones do not."""
    x, y = data().calib.x[:256], data().calib.y[:256]

    def moments(model):
        seen = []
        hook = model.get_submodule("stages.0.0").register_forward_hook(lambda _m, _x, out: seen.append(out))
        model(x)
        hook.remove()
        flat = seen[0].transpose(0, 1).flatten(1)
        return torch.stack([flat.mean(1), flat.std(1)])

    def change(backend):
        twin = backend.compress(trained(), Part(x, y, "calib", "some"), trainer()).twin
        return (moments(twin) - moments(traced(trained()))).abs().amax(1)

    folded, anew = (change(PTQ(3, 8, edge_bits=3, reestimate_bn=r)) for r in (False, True))
    assert (anew < 1e-3).all() and (folded > 10 * anew).all()


def test_only_what_rounding_moves_counts_as_moved():
    """The saboteur: calibration images paler than the training images, whose own statistics are a fifth off."""
    pale, x = Part(0.8 * data().calib.x, data().calib.y, "calib", "pale"), data().test.x[:64]
    folded, anew = (PTQ(8, 8, reestimate_bn=r).compress(trained(), pale, trainer()).twin(x) for r in (False, True))
    naive = copy.deepcopy(trained())
    reestimate_bn(naive, pale.x)
    with torch.no_grad():
        assert (anew - folded).square().mean() < 0.1 * (naive.eval()(x) - trained()(x)).square().mean()


def test_what_statistics_anew_cannot_go_with():
    with pytest.raises(UsageError, match="reestimate_bn together with equalize, which needs"):
        PTQ(4, 8, reestimate_bn=True, equalize=True)
    with pytest.raises(UsageError, match="reestimate_bn together with reach"):
        PTQ(4, 8, reestimate_bn=True, reach=Reach(MaxProb(), 0.8))
    with pytest.raises(Unsupported, match="no BatchNorm"):
        PTQ(4, 8, reestimate_bn=True).compress(trained(Restarting()), data().calib, trainer())


def test_a_stage_is_calibrated_on_the_samples_that_reach_it(monkeypatch):
    """The saboteur: images three times as bright, all of which leave at the first exit."""
    calib, minmax = data().calib, PTQ(observer="minmax")
    x = calib.x * torch.where(torch.arange(len(calib)) % 2 == 0, 3.0, 1.0).view(-1, 1, 1, 1)
    monkeypatch.setattr(Reach, "of", lambda *_: np.arange(len(calib)) % 2 * 2)

    def scales(made, rows):
        twin = made.compress(trained(), replace(calib, x=x[rows], y=calib.y[rows]), trainer()).twin
        return {q.name: float(q.scale) for q in twin.modules() if isinstance(q, FakeQuant)}

    got = scales(replace(minmax, reach=Reach(MaxProb(), 0.8)), slice(None))
    first, deeper = scales(minmax, slice(None)), scales(minmax, slice(1, None, 2))
    assert all(first[name] > 1.5 * deeper[name] for name in got)
    assert got == pytest.approx({name: (first if ".0:" in name else deeper)[name] for name in got}, rel=1e-5)


def test_samples_that_do_not_reach_a_stage_change_nothing_in_it(monkeypatch):
    """Neither ranges, roundings nor biases. The saboteur: other pixels where only the first stage looks; the second begins anew."""
    calib = data().calib
    monkeypatch.setattr(Reach, "of", lambda *_: np.arange(len(calib)) % 2)
    made = PTQ(4, 8, observer="minmax", rounding="adaround", iterations=5, correct_bias=True, reach=Reach(MaxProb(), 0.8))
    other = calib.x.clone()
    other[::2] = 3 * other[::2].flip(3)
    a, b = (made.compress(trained(Restarting()), replace(calib, x=x), trainer()).twin.state_dict() for x in (calib.x, other))
    moved = {key for key in a if not torch.equal(a[key], b[key])}
    assert {key.split(".")[1] for key in moved} == {"0"} and {key.split(".")[-1] for key in moved} >= {"scale", "weight", "bias"}


def test_records_can_say_what_was_done():
    net = STEPS["everything"].compress(trained(), data().calib, trainer())
    assert re.search(r" 20 iterations each, in \d+ s$", net.facts["reconstructed"]) and int(net.facts["biases corrected"]) > 0
    assert "pairs of layers" in net.facts["equalized"] and set(net.sqnr) == set(net.bits)


def test_what_took_minutes_to_learn_is_kept(tmp_path, monkeypatch):
    x, made, keeper = data().test.x.numpy(), STEPS["everything"], replace(trainer(), folder=tmp_path, key="tiny")
    first = made.compress(trained(), data().calib, keeper)
    monkeypatch.setattr("anytime.rounding.reconstruct", None)
    again = made.compress(trained(), data().calib, keeper)
    assert np.array_equal(again.predict(x), first.predict(x)) and again.facts == first.facts
    with pytest.raises(TypeError):  # the saboteur: other iterations are another learning
        replace(made, iterations=21).compress(trained(), data().calib, keeper)
    with pytest.raises(TypeError):
        made.compress(trained(), data().calib, replace(keeper, key="another"))


def test_the_column_names_the_steps():
    assert PTQ(4, 8).column == "W4A8 PTQ" and PTQ().column == "INT8 PTQ"
    assert STEPS["statistics anew"].column == "W4A8 PTQ (BN, BC)"
    assert STEPS["everything"].column == "INT4 PTQ (CLE, QDrop, BC, reached)"


def test_learned_eight_bits_run_in_onnx_runtime():
    net = OnnxRuntime(of=PTQ(rounding="adaround", iterations=5, correct_bias=True)).compress(trained(), data().calib, trainer())
    assert set(net.executed(data().test.x[:8].numpy()).values()) == {"int8"} and net.sqnr


def test_a_network_that_fell_to_chance_fails_and_names_the_layer():
    with pytest.raises(Collapsed, match="fallen to chance.*the first bad layer is "):
        PTQ(2, 2, observer="minmax", weight_observer="minmax", edge_bits=2).compress(trained(), data().calib, trainer())
    # what the check looks at is really at chance
    rounded = prepared(trained(), data().calib.x, PTQ(2, 2, edge_bits=2).widths, "u8s8", "minmax", "minmax")
    right = fake_quant_net(rounded, "u8s8").predict(data().test.x.numpy()).argmax(-1) == data().test.y.numpy()
    assert right.mean(1).min() < 0.4


def test_batch_norm_of_features_is_measured_against_float_too():
    """Its trained statistics are not those of the calibration images; at 8 bits rounding hardly moves them."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    model = AnytimeModel([nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())], [head]).eval()
    model.heads[0][3].running_mean.fill_(0.3)
    model.heads[0][3].running_var.fill_(0.5)
    x = data().test.x[:64]
    plain, measured = (PTQ(reestimate_bn=on).compress(model, data().calib, trainer()).twin(x) for on in (False, True))
    off = [float((z - model(x)).abs().max() / model(x).abs().max()) for z in (plain, measured)]
    assert max(off) < 0.05


def test_tensors_of_other_widths_do_not_go_to_an_engine_of_eight_bits():
    for bits in (4, 16):
        with pytest.raises(Unsupported, match=f"ONNX Runtime keeps tensors in 8 bits, not in {bits}: leave out add_bits"):
            OnnxRuntime(of=PTQ(add_bits=bits)).compress(trained(), data().calib, trainer())
