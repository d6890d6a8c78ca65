"""Links of a chain as graphs, BatchNorm folded into the convolution before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from operator import add

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anytime.errors import Unsupported
from anytime.layers import MixedPool2d, SlicedConv2d, ZeroPadShortcut
from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant, QConv2d, QLinear

# Operations that only choose or move values: their output lies on the grid of their input.
PASS_MODULES = (nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity, ZeroPadShortcut)  # 0 is on every grid
PASS_CALLS = (torch.flatten, F.max_pool2d, F.dropout)
PASS_METHODS = ("flatten", "view", "reshape", "contiguous", "detach")
ADD_CALLS = (add, torch.add)
LEAVES = (nn.LocalResponseNorm, MixedPool2d, ZeroPadShortcut, FakeQuant, QConv2d, QLinear)


class LinkTracer(fx.Tracer):
    """Traces a stage or a head down to the modules that a quantizer or a writer knows."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return super().is_leaf_module(m, qualified_name) or isinstance(m, LEAVES)


def trace(link: nn.Module, path: str) -> fx.GraphModule:
    """Graph of one link; submodules keep their paths. Unsupported when its Python depends on values."""
    if isinstance(link, fx.GraphModule):
        return link
    try:
        graph = LinkTracer().trace(link)
        for node in graph.nodes:
            node.type = None  # an annotation may be a string, with which a graph cannot be pickled
        return fx.GraphModule(link, graph, type(link).__name__)
    except Exception as error:
        raise Unsupported(f"{path} cannot be traced ({str(error).splitlines()[0]}): a link must be a static graph") from error


def traced(model: AnytimeModel, fold_bn: bool = True) -> AnytimeModel:
    """A copy in eval mode whose links are graphs, with BatchNorm folded into the convolution before it.

    No two links share weights in it: each is folded and rounded by itself.
    """
    model = copy.deepcopy(model).eval()
    for path, chain in (("stages", model.stages), ("heads", model.heads)):
        for k in range(len(chain)):
            link = trace(_unshared(chain[k]), f"{path}.{k}")
            chain[k] = _fold_bn(link) if fold_bn else link
    return model


def links(model: AnytimeModel) -> Iterator[tuple[str, fx.GraphModule]]:
    """("stages.0", graph), ("heads.0", graph), ..."""
    for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        yield f"stages.{k}", stage  # type: ignore[misc]
        yield f"heads.{k}", head  # type: ignore[misc]


def module_of(g: fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a node calls; None for every other node."""
    return g.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def passes(g: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only chooses or moves values of its first argument."""
    if node.op == "call_module":
        return isinstance(module_of(g, node), PASS_MODULES)
    return (node.op == "call_function" and node.target in PASS_CALLS) or (
        node.op == "call_method" and node.target in PASS_METHODS
    )


def is_relu(g: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a ReLU in any of its three forms."""
    return (
        isinstance(module_of(g, node), nn.ReLU)
        or (node.op == "call_function" and node.target in (torch.relu, F.relu))
        or (node.op == "call_method" and node.target == "relu")
    )


def is_add(node: fx.Node) -> bool:
    """Whether a node adds two tensors."""
    return (node.op == "call_function" and node.target in ADD_CALLS) or (node.op == "call_method" and node.target == "add")


def output_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What a link returns."""
    result = graph.output_node().args[0]
    return set(result) if isinstance(result, tuple | list) else {result}  # type: ignore[arg-type]


def conv_before(g: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The convolution whose output this BatchNorm alone reads, so that it can be folded into it; else None."""
    if not isinstance(module_of(g, node), nn.BatchNorm2d):
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and isinstance(module_of(g, source), nn.Dropout) and len(source.users) == 1:
        source = source.args[0]  # the identity, where BatchNorm is folded
    if not isinstance(source, fx.Node) or not isinstance(module_of(g, source), nn.Conv2d):
        return None
    calls = [n for n in g.graph.nodes if n.op == "call_module" and n.target == source.target]
    return source if len(source.users) == 1 and len(calls) == 1 else None


def drop_node(g: fx.GraphModule, node: fx.Node, instead: fx.Node) -> None:
    """Take a node out of a graph; its readers read ``instead``."""
    node.replace_all_uses_with(instead)
    g.graph.erase_node(node)


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


def _fold_bn(g: fx.GraphModule) -> fx.GraphModule:
    for node in list(g.graph.nodes):
        source = conv_before(g, node)
        if source is not None:  # a pre-activation BatchNorm stays, as an operation of its own
            g.set_submodule(str(source.target), fuse_conv_bn_eval(module_of(g, source), module_of(g, node)))  # type: ignore[arg-type, type-var]
            drop_node(g, node, node.args[0])
    return tidy(g)
