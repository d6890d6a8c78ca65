"""What every backend promises, as a function that raises AssertionError."""

import copy
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch

from anytime.backend import TorchNet
from anytime.cost import account


def backend_keeps_its_promise(backend, model, data, trainer, agreement=0.97):
    """Compress ``model`` and hold the result against everything that Backend and Deployable promise."""
    assert "Source:" in (type(backend).__doc__ or ""), "the docstring names no Source"
    before = copy.deepcopy(model.state_dict())
    seen = model.trained_on
    net = backend.compress(model, data.calib, trainer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "compress changed its input"
    x = data.test.x[:128].numpy()
    got = net.predict(x)
    own_exits = backend.own_exits  # an ensemble's chain is longer than the network's
    n_exits = net.n_exits if own_exits else model.n_exits
    assert got.shape == (n_exits, 128, data.n_classes), "predict must be [E, N, K]"
    assert got.dtype == np.float32, "logits must come home as float32"
    if "twin" in net.facts:  # the float network: what a peer's integers change is no disagreement
        agreement = min(agreement, 0.85)
    want = TorchNet(net.twin, {}, simulated=True, dtype=getattr(net, "dtype", torch.float32)).predict(x)
    assert (got.argmax(-1) == want.argmax(-1)).mean(1).min() >= agreement, "deployable and twin disagree"
    other = net.predict(x, batch=7)
    assert (got.argmax(-1) == other.argmax(-1)).mean() >= 0.99 and np.abs(got - other).max() <= 0.05 * np.abs(got).max(), (
        "answers depend on batch size"
    )
    names = {name for name, _ in net.twin.named_modules()}
    assert set(net.bits) <= names, "bits for layers that do not exist"
    assert seen <= net.twin.trained_on, "the twin forgot what it was trained on"
    cost = account(net, tuple(data.test.x.shape[1:]))
    plain = account(TorchNet(model, {}, simulated=True), tuple(data.test.x.shape[1:]))
    assert own_exits or np.array_equal(cost.macs, plain.macs), "MACs changed"
    for exits in ([0], [net.n_exits - 1], [0, net.n_exits - 1]):
        state = net.start(x[:5])
        for segment in net.plan(exits):
            state, logits = net.step(segment, state)
            assert np.allclose(logits, got[segment.head, :5], atol=0.05 * np.abs(got).max()), (
                "a plan gives other answers than predict"
            )
    with tempfile.TemporaryDirectory() as folder:
        assert sum(p.stat().st_size for p in net.save(Path(folder))) > 0, "nothing was saved"
    assert np.array_equal(pickle.loads(pickle.dumps(net)).predict(x[:9]), net.predict(x[:9])), (
        "it changes when another process gets it"
    )
    if net.simulated:
        assert net.facts.get("simulated"), "simulated, and does not say why"
    else:
        net.open(1)
    return net
