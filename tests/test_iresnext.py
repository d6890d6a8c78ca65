"""IResNeXt: published figures, truly sliced, and shared weights that stay shared."""

import copy
import pickle
from hashlib import sha256

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from anytime.backend import TorchNet
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.cost import account
from anytime.errors import CorruptFile, UsageError
from anytime.layers import SlicedConv2d
from anytime.models.iresnext import IResNeXt
from anytime.quant.graph import Widths, quantized
from anytime.weights import load_weights, save_weights
from tests.worlds import data, trainer

SMALL = IResNeXt(blocks=1, width=8, bottleneck=2, cardinality=4, subnets=2)


def ready(spec=SMALL, size=16):
    torch.manual_seed(0)
    model = spec.build((3, size, size), 10)
    model(torch.randn(16, 3, size, size))  # running statistics that are not 0 and 1
    return model.eval()


@pytest.mark.parametrize(
    "blocks, macs, active, stored",
    [
        # reference/anytime.md, b.1
        (
            7,
            ["15.88", "29.99", "44.09", "58.20", "72.31", "86.41", "100.52", "114.63"],
            ["0.108", "0.206", "0.303", "0.400", "0.497", "0.594", "0.692", "0.789"],
            "0.876",
        ),
        # of L9 the ends; what lies between was counted here
        (3, ["7.82", "13.86", "19.91", "25.95", "32.00", "38.05", "44.09", "50.14"], None, "0.391"),
    ],
    ids=["L21", "L9"],
)
def test_published_figures(blocks, macs, active, stored):
    model = IResNeXt(blocks).build((3, 32, 32), 10)
    cost = account(TorchNet(model, {}, simulated=False), (3, 32, 32))
    jumped = [cost.path((k,), k) for k in range(8)]
    # The published list rounds 29.985 and 72.305 up, a float's own digits go down: half a unit of the last digit.
    assert all(abs(got / 1e6 - float(want)) <= 0.00501 for got, want in zip(jumped, macs, strict=True))
    if active:
        assert [f"{cost.path((k,), k, 'params') / 1e6:.3f}" for k in range(8)] == active
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == stored
    assert cost.macs[-1] == sum(jumped)  # one after another


def padded(model, spec, x, k):
    """Sub-network k as the authors' code runs it: inner channels padded with zeros, the whole last convolution."""
    whole = model.stages[-1]
    for m, w in zip(model.stages[k], whole, strict=True):
        if not hasattr(m, "residual"):
            x = m(x)
            continue
        *before, last = m.residual
        full = w.residual[-1].weight
        inner = nn.Sequential(*before)(x)
        inner = torch.cat([inner, inner.new_zeros(len(x), full.shape[1] - inner.shape[1], *inner.shape[2:])], 1)
        x = x + nn.functional.conv2d(inner, full)
    return model.heads[k](x)


def test_slicing_and_padding_with_zeros_are_the_same_function():
    model, x = ready(), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        for k, logits in enumerate(model(x)):
            assert torch.allclose(padded(model, SMALL, x, k), logits, atol=1e-5)


def first_channels_are_shared(model):
    small, large = ([m for m in s.modules() if isinstance(m, SlicedConv2d)] for s in model.stages)
    for a, b in zip(small, large, strict=True):
        if a.slice_0 is not b.slice_0:
            return False
        if a.dim == 0 and not torch.equal(a.weight, b.weight[: len(a.weight)]):
            return False
    return len(small) == 1 + 3 * 3


def test_weights_stay_shared_through_a_copy_a_pickle_and_a_move():
    model, x = ready(), torch.randn(2, 3, 16, 16)
    for other in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).double().float().to(memory_format=torch.channels_last),
    ):
        assert first_channels_are_shared(other)
        assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())
        with torch.inference_mode():
            assert torch.allclose(other(x), model(x), atol=1e-5)


def test_weights_are_saved_and_loaded_strictly(tmp_path):
    model, other = ready(), SMALL.build((3, 16, 16), 10).eval()
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert first_channels_are_shared(other)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(other(x), model(x))


def test_a_shared_slice_is_written_once_and_files_with_every_name_still_load(tmp_path):
    model, path = ready(), tmp_path / "w.safetensors"
    save_weights(model, path)
    parameters = sum(p.numel() for p in model.parameters())
    written = safetensors.torch.load(path.read_bytes())
    learned = [t for n, t in written.items() if "running" not in n and "num_batches" not in n]
    assert sum(t.numel() for t in learned) == parameters
    every = {n: t.contiguous().clone() for n, t in model.state_dict().items()}  # as files of before were written
    assert written.keys() < every.keys() and "stages.1.0.slice_0" not in written
    body = safetensors.torch.save(every, {"trained_on": "[]"})
    (tmp_path / "old.safetensors").write_bytes(body)
    (tmp_path / "old.sha256").write_text(sha256(body).hexdigest())
    other, x = SMALL.build((3, 16, 16), 10).eval(), torch.randn(2, 3, 16, 16)
    load_weights(other, tmp_path / "old.safetensors")
    with torch.inference_mode():
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["stages.0.0.slice_0", "stages.1.1.residual.2.slice_1"], ids=["shared", "its own"])
def test_a_slice_that_is_missing_is_named(tmp_path, name):
    model, path = ready(), tmp_path / "w.safetensors"
    save_weights(model, path)
    written = safetensors.torch.load(path.read_bytes())
    del written[name]
    body = safetensors.torch.save(written)
    path.write_bytes(body)
    path.with_suffix(".sha256").write_text(sha256(body).hexdigest())
    with pytest.raises(CorruptFile, match=f'Missing key.*"{name}"'):
        load_weights(SMALL.build((3, 16, 16), 10), path)


def test_a_shared_slice_learns_from_every_sub_network():
    model = ready()
    shared, own = (getattr(model.stages[1][1].residual[2], f"slice_{i}") for i in (0, 1))
    x = torch.randn(2, 3, 16, 16)
    model.heads[0](model.stages[0](x)).sum().backward()
    assert shared.grad.abs().sum() > 0 and own.grad is None
    of_the_first = shared.grad.clone()
    model.heads[1](model.stages[1](x)).sum().backward()
    assert own.grad.abs().sum() > 0 and not torch.equal(shared.grad, of_the_first)


def test_drawn_anew_it_is_drawn_as_the_whole_convolution():
    model = IResNeXt(blocks=1).build((3, 32, 32), 10)
    last = model.stages[-1][1].residual[-1]  # 1x1, 32 inner channels to 64
    before = last.weight.detach().clone()
    for m in model.modules():
        getattr(m, "reset_parameters", lambda: None)()
    assert not torch.equal(before, last.weight)
    assert 0.95 / 32**0.5 < last.weight.abs().max() <= 1 / 32**0.5  # torch's bound for a fan-in of 32


def test_integers_say_what_the_twin_says():
    x = data()
    model = trainer(epochs=1).fit(SMALL.build((3, 16, 16), 4))
    net = OnnxRuntime(PTQ()).compress(model, x.calib, trainer())
    ours, twin = net.predict(x.test.x[:64].numpy()), TorchNet(net.twin, {}, simulated=False).predict(x.test.x[:64].numpy())
    assert (ours.argmax(-1) == twin.argmax(-1)).mean() >= 0.98
    assert np.abs(ours - twin).max() <= 0.1 * np.abs(twin).max()
    assert set(net.executed(x.test.x[:2].numpy()).values()) == {"int8"}
    # The quantized copy costs what the float network does.
    assert np.array_equal(account(net, (3, 16, 16)).macs, account(TorchNet(model, {}, simulated=False), (3, 16, 16)).macs)


def test_quantized_sub_networks_are_rounded_apart():
    net = quantized(ready(), Widths(4, 8), "u8s8")
    # Each has a first layer of its own, read from the input, at the edge's width.
    assert net.bits["stages.0.0"].weight == net.bits["stages.1.0"].weight == 8 > net.bits["stages.1.1.residual.2"].weight
    first, second = ({p.data_ptr() for p in stage.parameters()} for stage in net.model.stages)
    assert first and not first & second


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: IResNeXt(subnets=3), "cardinality=24"),
        (lambda: IResNeXt(subnets=0), "positive numbers.*cardinality=8"),
        (lambda: IResNeXt(cardinality=0), "positive numbers"),
        (lambda: IResNeXt().build((784,), 10), "the data set gives 784: choose"),
        (lambda: IResNeXt().build((3, 30, 32), 10), "multiples of 4, the data set gives 3x30x32"),
    ],
)
def test_what_cannot_be_built_is_said(build, said):
    with pytest.raises(UsageError, match=said):
        build()
