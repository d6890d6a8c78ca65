"""The depth-nested sparse ResNet against a plain network of each depth that shares only its weights."""

import pickle
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anytime.backend import TorchNet
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.cost import account
from anytime.errors import UsageError
from anytime.models.sparse_resnet import SparseResNet
from tests.worlds import data, trainer

SMALL = SparseResNet(depth=4, widths=(4, 6), exits=3)
DEEPER = SparseResNet(depth=8, widths=(3, 4, 5), exits=3)  # two layers per resolution at the first exit


def alone(model, spec, x, s):
    """Logits of the network of exit s, written from the definition: no stages, no states, recursion with a memory.

    A layer was born at the first stage whose step divides it, and numbered by that step reads the
    layers 1, 2, 4, ... before it, -1 being the transition of the stage at which it was born.
    """
    S = spec.exits

    def of(stage, resolution, name):
        return model.stages[stage].layers[f"resolution{resolution}_{name}"]

    @cache
    def start(r, born):
        if r == 0:  # the stem, for every stage
            return start(0, 0) if born else of(0, 0, "start")(x)
        return of(born, r, "start")(behind(r - 1, born))

    def reads(r, index, step, born):
        i, total = index // step, 0
        for j in range(10):
            if i - 2**j >= 0:
                total = total + layer(r, (i - 2**j) * step)
            elif i - 2**j == -1:
                total = total + start(r, born)
        return total

    @cache
    def layer(r, index):
        born = next(b for b in range(S) if index % 2 ** (S - 1 - b) == 0)
        return of(born, r, f"layer{index}")(reads(r, index, 2 ** (S - 1 - born), born))

    def behind(r, stage):
        return reads(r, spec.depth, 2 ** (S - 1 - stage), stage)

    return model.heads[s].classify(behind(len(spec.widths) - 1, s))


def ready(spec, size=16):
    torch.manual_seed(0)
    model = spec.build((3, size, size), 10)
    model(torch.randn(16, 3, size, size))  # running statistics that are not 0 and 1
    return model.eval()


@pytest.mark.parametrize("spec", [SMALL, DEEPER, SparseResNet()], ids=lambda s: s.label)
def test_every_exit_is_the_sparse_resnet_of_its_depth_alone_in_numbers_and_macs(spec):
    model, x = ready(spec), torch.randn(1, 3, 16, 16)
    cost = account(TorchNet(model, {}, simulated=False), (3, 16, 16))
    with torch.inference_mode():
        together = model(x)
        for s in range(spec.exits):
            with FlopCounterMode(display=False) as counter:
                assert torch.allclose(alone(model, spec, x, s), together[s], atol=1e-5), f"exit {s}"
            # jumped to: no more than the network alone; one after another: its cost and the heads on the way
            assert cost.path((s,), s) == counter.get_total_flops() / 2
            assert cost.path(tuple(range(s + 1)), s) == counter.get_total_flops() / 2 + cost.head.macs[:s].sum()


def test_the_default_lies_within_its_budget():
    model = SparseResNet().build((3, 32, 32), 10)
    cost = account(TorchNet(model, {}, simulated=False), (3, 32, 32))
    assert cost.macs[-1] <= 60e6
    assert [f"{m / 1e6:.2f}" for m in cost.macs] == ["8.98", "17.08", "31.30", "57.78"]
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == "0.505"
    layers = sum(  # one in every resolution
        pixels * (2 * width * width // 4 + 9 * (width // 4) ** 2) for width, pixels in ((32, 1024), (96, 256), (192, 64))
    )
    transitions = 32 * 96 * 256 + 96 * 192 * 64
    assert cost.stage.macs.tolist() == [
        n * layers + transitions + stem for n, stem in ((1, 27 * 32 * 1024), (1, 0), (2, 0), (4, 0))
    ]


def test_the_wiring_of_the_default_by_hand():
    """Layer 6 is born at the third stage (step 2) as its layer 3, which reads 2, 1 and -1: 4, 2 and the start."""
    stages = SparseResNet().build((3, 32, 32), 10).stages

    def reads(stage, place):
        return [str(p).partition("_")[2] for to, of in stages[stage].reads.items() if str(to) == place for p in of]

    assert reads(2, "resolution1_layer6") == ["layer4", "layer2", "start"]
    assert reads(3, "resolution2_layer5") == ["layer4", "layer3", "layer1"]
    assert reads(3, "resolution1_start") == ["layer7", "layer6", "layer4", "layer0"]
    for k, stage in enumerate(stages):
        born = {p for s in stages[: k + 1] for p in s.reads}
        assert {p for of in stage.reads.values() for p in of if p.resolution >= 0} <= born, "reads what is not there yet"
        ran = [p for s in stages[:k] for p in s.reads if p.layer >= 0]
        assert not set(ran) & set(stage.reads), "a layer runs twice"


def test_the_longest_paths_are_as_the_docstring_says():
    depth, found = {}, []
    for stage in SparseResNet(widths=(4,)).build((3, 8, 8), 10).stages:
        for place, of in stage.reads.items():
            depth[place] = 1 + max(depth[p] for p in of) if place.layer >= 0 else 0
        found.append(max(depth.values()))
    assert found == [1, 2, 3, 5]


def test_integers_say_what_the_twin_says():
    x = data()
    model = trainer(epochs=1).fit(SMALL.build((3, 16, 16), 4))
    net = OnnxRuntime(PTQ()).compress(model, x.calib, trainer())
    ours, twin = net.predict(x.test.x[:64].numpy()), TorchNet(net.twin, {}, simulated=False).predict(x.test.x[:64].numpy())
    assert (ours.argmax(-1) == twin.argmax(-1)).mean() >= 0.98
    assert np.abs(ours - twin).max() <= 0.1 * np.abs(twin).max()
    assert set(net.executed(x.test.x[:2].numpy()).values()) == {"int8"}
    away = pickle.loads(pickle.dumps(net))  # a board times it in a process of its own
    assert np.array_equal(away.predict(x.test.x[:8].numpy()), ours[:, :8])


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: SparseResNet(depth=6), "multiple of 2\\^\\(exits-1\\).*depth=8"),
        (lambda: SparseResNet(widths=()), "widths positive"),
        (lambda: SparseResNet(squeeze=0), "and squeeze"),
        (lambda: SparseResNet(exits=0), "widths positive.*depth=1"),
        (lambda: SparseResNet().build((784,), 10), "the data set gives 784: choose"),
        (lambda: SparseResNet().build((3, 30, 32), 10), "multiples of 4, the data set gives 3x30x32"),
    ],
)
def test_what_cannot_be_built_is_said(build, said):
    with pytest.raises(UsageError, match=said):
        build()
