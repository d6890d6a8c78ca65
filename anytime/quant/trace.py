"""Links of a chain as graphs, BatchNorm folded into the convolution before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anytime.errors import Unsupported, first_line
from anytime.layers import MixedPool2d, SlicedConv2d, ZeroPadShortcut
from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant, QConv2d, QLinear
from anytime.quant.inplace import out_of_place
from anytime.quant.nodes import conv_before, module_of, splits

DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
}
LEAVES = (nn.LocalResponseNorm, MixedPool2d, ZeroPadShortcut, FakeQuant, QConv2d, QLinear)


class LinkTracer(fx.Tracer):
    """Traces a stage or a head down to the modules that a quantizer or a writer knows."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return super().is_leaf_module(m, qualified_name) or isinstance(m, LEAVES)


def trace(link: nn.Module, path: str) -> fx.GraphModule:
    """Graph of one link; submodules keep their paths, a link that is a single layer is called "0".

    Unsupported when its Python depends on values.
    """
    if isinstance(link, fx.GraphModule):
        return link
    try:
        if LinkTracer().is_leaf_module(link, ""):
            link = nn.Sequential(link).train(link.training)  # else it would be traced into, to a function
        graph = LinkTracer().trace(link)
        _dropouts(link, graph)
        called = {node.target for node in graph.nodes if node.op == "call_module"}
        for node in graph.nodes:
            node.type = None  # an annotation may be a string, with which a graph cannot be pickled
            # Writers name modules by their targets; calls, and modules that are called again, by their nodes.
            if node.op.startswith("call_") and node.name in called - {node.target}:
                node._rename(f"{node.name}_call")
        for node in reversed(list(graph.nodes)):
            if node.target is getitem and splits(node.args[0]):
                node.args[0].append(node)  # no unit ends on a tuple
        return fx.GraphModule(link, graph, type(link).__name__)
    except Exception as error:
        raise Unsupported(f"{path} cannot be traced ({first_line(error)}): a link must be a static graph") from error


def _dropouts(link: nn.Module, graph: fx.Graph) -> None:
    """Make modules of functions that drop nothing because they were traced in eval mode: in training (QAT) they drop again."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in DROPOUTS:
            said = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
            if not said.get("training", True):
                name = f"as_module_{node.name}"
                link.add_module(name, DROPOUTS[node.target](said.get("p", 0.5)).train(link.training))
                node.op, node.target, node.args, node.kwargs = "call_module", name, (said["input"],), {}


def traced(model: AnytimeModel, fold_bn: bool = True) -> AnytimeModel:
    """A copy in eval mode whose links are graphs, with BatchNorm folded into the convolution before it.

    No two calls share weights in it, in one link or in two: each is folded and rounded by itself, on the grid of what it
    reads. A layer's second call is a layer "conv_again" of its own, which training (QAT) moves apart from the first.
    Nothing works in place, so that what is kept of a tensor stays as it was; Unsupported where that would change the result, but for
    a += b on a tensor that is kept, which torch.fx itself writes as a + b and nobody sees (``Attached`` compares the logits).
    """
    model = copy.deepcopy(model).eval()
    for path, chain in (("stages", model.stages), ("heads", model.heads)):
        for k in range(len(chain)):
            link = trace(_unshared(chain[k]), f"{path}.{k}")
            for node in link.graph.nodes:  # the same values, whatever the layout: calibration runs channels last
                if (
                    node.op == "call_method"
                    and node.target == "view"
                    and not node.kwargs
                    and not isinstance(node.args[1], torch.dtype)
                ):
                    node.target = "reshape"
            out_of_place(link, f"{path}.{k}")
            _apart(link)
            chain[k] = _fold_bn(link) if fold_bn else link
    return model


def links(model: AnytimeModel) -> Iterator[tuple[str, fx.GraphModule]]:
    """("stages.0", graph), ("heads.0", graph), ..."""
    for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        yield f"stages.{k}", stage  # type: ignore[misc]
        yield f"heads.{k}", head  # type: ignore[misc]


def drop_node(g: fx.GraphModule, node: fx.Node, instead: fx.Node) -> None:
    """Take a node out of a graph; its readers read ``instead``."""
    node.replace_all_uses_with(instead)
    g.graph.erase_node(node)


def insert_after(g: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """Let a module stand behind a node, in front of all its readers."""
    g.add_module(name, module)
    with g.graph.inserting_after(node):
        new = g.graph.call_module(name, (node,))
    node.replace_all_uses_with(new, lambda user: user is not new)
    return new


def tidy(g: fx.GraphModule) -> fx.GraphModule:
    """Forget what nobody calls any more."""
    g.graph.eliminate_dead_code()
    g.delete_all_unused_submodules()
    g.recompile()
    return g


def _unshared(link: nn.Module) -> nn.Module:
    link = copy.deepcopy(link)
    for name, m in list(link.named_modules()):
        if isinstance(m, SlicedConv2d):
            link.set_submodule(name, m.plain())
    return link


def _apart(g: fx.GraphModule) -> None:
    """Give every call a module whose parameters and buffers no call before it has; quantizers stay shared."""
    taken = {str(n.target) for n in g.graph.nodes if n.op == "call_module"}
    called: set[str] = set()
    seen: set[int] = set()
    for node in g.graph.nodes:
        module = module_of(g, node)
        if module is None or isinstance(module, FakeQuant):
            continue
        name = str(node.target)
        if not seen.isdisjoint(map(id, (*module.parameters(), *module.buffers()))):
            module = copy.deepcopy(module)
            while name in called or (name != node.target and name in taken):
                name += "_again"
            g.add_submodule(name, module)
            node.target = name
        called.add(name)
        seen.update(map(id, (*module.parameters(), *module.buffers())))
    g.recompile()


def _fold_bn(g: fx.GraphModule) -> fx.GraphModule:
    for node in list(g.graph.nodes):
        source = conv_before(g, node)
        if source is not None:  # a pre-activation BatchNorm stays, as an operation of its own
            g.set_submodule(str(source.target), fuse_conv_bn_eval(module_of(g, source), module_of(g, node)))  # type: ignore[arg-type, type-var]
            drop_node(g, node, node.args[0])
    return tidy(g)
