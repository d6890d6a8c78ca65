"""What every network promises, as a function that raises AssertionError."""

import copy

import torch

from anytime.backend import TorchNet
from anytime.cost import account
from anytime.errors import UsageError
from anytime.model import AnytimeModel
from anytime.quant.graph import traced


def model_keeps_its_promise(spec, shape, n_classes=10):
    """Build ``spec`` for inputs of ``shape`` and hold it against everything that a chain promises."""
    assert "Source:" in (type(spec).__doc__ or ""), "the docstring names no Source"
    torch.manual_seed(0)
    model = spec.build(shape, n_classes)
    assert isinstance(model, AnytimeModel) and len(model.stages) == len(model.heads), "one head per stage"
    assert model.trained_on == frozenset(), "a network that is just built has seen nothing"
    assert (model.n_exits > 1) == spec.exits_early, "exits_early does not say how many exits it has"
    torch.manual_seed(0)
    again = spec.build(shape, n_classes)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)), (
        "the same seed builds another network"
    )
    model.eval()
    x = torch.randn(3, *shape)
    with torch.inference_mode():
        logits = model(x)
        assert logits.shape == (model.n_exits, 3, n_classes), "forward must be [E, B, K]"
        assert torch.isfinite(logits).all(), "logits are not finite"
        assert close(model(x[1:2])[:, 0], logits[:, 1], 1e-4), "an answer depends on its batch"
        state = x
        for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            before = copy.deepcopy(state)
            state, held = stage(x if model.restarts else state), state
            assert same(before, held), f"stage {k} changes the state that it reads"
            kept = copy.deepcopy(state)
            assert torch.equal(head(state), logits[k]), f"head {k} is not what forward runs"
            assert same(kept, state), f"head {k} changes the state that it reads"
        assert close(traced(model)(x), logits, 1e-3), "its graph says something else"
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters()), "a parameter that no exit uses"
    cost = account(TorchNet(model.eval(), {}, simulated=False), shape)
    assert (cost.stage.macs > 0).all(), "a deeper exit costs no more"
    try:
        spec.build((7, 5, 5), n_classes)(torch.zeros(1, 7, 5, 5))
    except (UsageError, RuntimeError) as error:
        assert isinstance(error, UsageError), f"inputs of another shape end in {type(error).__name__}, not in a sentence"
    return model


def close(a, b, tolerance):
    """Whether logits agree, per exit, by the largest of it: a deep residual network that is not trained has huge ones."""
    exits = a.shape[0]
    error, size = ((a - b).abs().reshape(exits, -1).amax(1), b.abs().reshape(exits, -1).amax(1))
    return bool((error <= tolerance * size.clamp(min=1)).all())


def same(a, b):
    """Whether two states hold the same numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
