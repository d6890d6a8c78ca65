"""What rounding shifts, put right afterwards: biases of layers, statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.quant.graph import Quantized
from anytime.quant.nodes import module_of

LAYERS = (nn.Conv2d, nn.Linear)
Visit = Callable[[str, Any, list[Tensor]], None]  # a layer's name in its link, the layer, its output for every batch


def correct_bias(net: Quantized, model: AnytimeModel, x: Tensor, reached: Tensor | None = None, batch: int = 256) -> int:
    """Take the mean error of every channel of every layer's output out of its bias; answer how many layers got it right.

    ``model``: the float chain that ``net``, calibrated, was made of. Over x [N, C, H, W] and space, from front to back, in
    stages and heads, each layer reading what the already corrected ones before it make; layers kept in float too. A layer
    without a bias gets one. ``reached`` [N]: the last stage that each sample enters; a stage is corrected on the samples that
    reach it. Every layer is run once on all of x, so that a few tensors of all x are held at a time. Unsupported without
    samples, and for the chain of another network.
    Source: Nagel, van Baalen, Blankevoort, Welling, ICCV 2019, arXiv:1906.04721, section 4.2 (which speaks of weights; here
    activations are rounded too while it measures) and appendix D, "Empirical quantization bias correction".
    """
    if len(x) == 0:
        raise Unsupported("bias correction has no samples: give the data set a calib part")
    check_same_layers(net.model, model)
    net.model.eval()
    model.eval()
    images = list(torch.split(x, batch))
    last = None if reached is None else list(torch.split(reached, batch))
    floats: list[Any] = images
    rounded: list[Any] = images
    n_corrected = 0
    with torch.no_grad():
        for k in range(model.n_exits):
            if last is not None:
                rows = [stage >= k for stage in last]
                images, floats, rounded, last = (_rows(of, rows) for of in (images, floats, rounded, last))
            starts = (images, images) if model.restarts else (floats, rounded)
            floats, rounded, n_stage = _correct(model.stages[k], net.model.stages[k], *starts)
            _, _, n_head = _correct(model.heads[k], net.model.heads[k], floats, rounded)
            n_corrected += n_stage + n_head
    return n_corrected


def reestimate_bn(model: nn.Module, x: Tensor, batch: int = 256) -> None:
    """Measure BatchNorm's running statistics anew on x [N, C, H, W], with whatever roundings are on.

    The plain average over batches of (almost) one size; everything but BatchNorm in eval mode. Modes, momenta and
    requires_grad are left as they were. Unsupported under two samples.
    Source: Nagel, Fournarakis, Bondarenko, Blankevoort, ICML 2022, arXiv:2203.11086 (why after QAT); the average as in
    torch.optim.swa_utils.update_bn.
    """
    if len(x) < 2:
        raise Unsupported(f"BatchNorm cannot be measured on {len(x)} samples: give at least two")
    modes = {m: m.training for m in model.modules()}
    norms = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.training = True
    try:
        with torch.no_grad():
            for part in torch.tensor_split(x, -(-len(x) // batch)):
                model(part)
    finally:
        for norm, momentum in norms.items():
            norm.momentum = momentum
        for m, mode in modes.items():
            m.training = mode


def check_same_layers(net: AnytimeModel, model: AnytimeModel) -> None:
    """Unsupported unless two chains have layers of the same paths and BatchNorm in the same places, so that outputs compare."""
    mine, theirs = ({p for p, m in c.named_modules() if isinstance(m, (*LAYERS, _BatchNorm))} for c in (net, model))
    if mine != theirs:
        raise Unsupported(
            f"only one of the two chains has {', '.join(sorted(mine ^ theirs)[:3])}: give the float chain that the rounded one was "
            "made of, BatchNorm folded in both or in neither"
        )


def _rows(chunks: list[Any], rows: list[Tensor]) -> list[Any]:
    """Some samples of every batch of states; batches that are left empty go."""
    return [fx.node.map_aggregate(c, lambda t, r=r: t[r]) for c, r in zip(chunks, rows, strict=True) if r.any()]  # type: ignore[misc]


def _correct(link: nn.Module, rounded: nn.Module, floats: list[Any], states: list[Any]) -> tuple[list[Any], list[Any], int]:
    """Correct one link; answer what it makes in float and rounded, and how many layers were corrected."""
    means: dict[str, Tensor] = {}
    corrected: list[str] = []

    def measure(name: str, layer: Any, outs: list[Tensor]) -> None:
        means[name] = _mean(layer, outs)

    def correct(name: str, layer: Any, outs: list[Tensor]) -> None:
        shift = (_mean(layer, outs) - means[name]).to(outs[0].dtype)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(shift), layer.weight.requires_grad)
        layer.bias -= shift
        for out in outs:
            out -= shift.view(-1, *(1,) * (out.ndim - 2)) if isinstance(layer, nn.Conv2d) else shift
        corrected.append(name)

    return _run(link, floats, measure), _run(rounded, states, correct), len(corrected)


def _run(g: nn.Module, states: list[Any], visit: Visit) -> list[Any]:
    """Run a link node by node, each on all batches before the next; show ``visit`` what each layer made."""
    assert isinstance(g, fx.GraphModule)
    interpreter = fx.Interpreter(g)
    held: dict[fx.Node, list[Any]] = {}
    for node in g.graph.nodes:
        if node.op == "placeholder":
            held[node] = states
        elif node.op == "output":
            break
        else:
            held[node] = [_call(interpreter, node, held, i) for i in range(len(states))]
        layer = module_of(g, node)
        if isinstance(layer, LAYERS) and states:
            visit(str(node.target), layer, held[node])
        for done in interpreter.user_to_last_uses.get(node, ()):
            del held[done]
    return [fx.node.map_arg(node.args[0], lambda n, i=i: held[n][i]) for i in range(len(states))]  # type: ignore[misc]


def _call(interpreter: fx.Interpreter, node: fx.Node, held: dict[fx.Node, list[Any]], i: int) -> Any:
    args, kwargs = (fx.node.map_arg(a, lambda n: held[n][i]) for a in (node.args, node.kwargs))
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def _mean(layer: Any, outs: list[Tensor]) -> Tensor:
    """Mean of each channel over samples and space, in float64: axis 1 of a map, the last one behind a linear layer."""
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    sums = [out.transpose(axis, -1).flatten(0, -2).sum(0, dtype=torch.float64) for out in outs]
    return torch.stack(sums).sum(0) / (sum(out.numel() for out in outs) / len(sums[0]))
