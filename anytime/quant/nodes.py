"""What a node of a traced link is."""

from __future__ import annotations

from operator import add

import torch
from torch import fx, nn
from torch.nn import functional as F

from anytime.layers import ZeroPadShortcut

# Operations that only choose or move values: their output lies on the grid of their input.
PASS_MODULES = (nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity, ZeroPadShortcut)  # 0 is on every grid
SPLIT_CALLS = (torch.chunk, torch.split, torch.tensor_split, torch.unbind)  # they give tuples of parts
SPLIT_METHODS = ("chunk", "split", "tensor_split", "unbind")
PASS_CALLS = (torch.flatten, F.max_pool2d, F.dropout, *SPLIT_CALLS)
PASS_METHODS = ("flatten", "view", "reshape", "contiguous", "detach", *SPLIT_METHODS)
ADD_CALLS = (add, torch.add)
# What may answer with the memory of its first argument, by name.
VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
VIEWS = (
    *PASS_METHODS,
    *("getitem", "dropout", "unflatten", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "narrow"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "view_as", "select", "diagonal", "unfold", "to", "float"),
)

TENSORS = ("T", "mT", "H", "mH", "data", "real")  # attributes of a tensor that are tensors


def module_of(g: fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a node calls; None for every other node."""
    return g.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def passes(g: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only chooses or moves values of its first argument."""
    if node.op == "call_module":
        return isinstance(module_of(g, node), PASS_MODULES)
    if node.target is getattr:
        return node.args[1] in TENSORS
    return (node.op == "call_function" and node.target in PASS_CALLS) or (
        node.op == "call_method" and node.target in PASS_METHODS
    )


def splits(node: fx.Node) -> bool:
    """Whether a node cuts a tensor into a tuple of parts."""
    return (node.op == "call_function" and node.target in SPLIT_CALLS) or (
        node.op == "call_method" and node.target in SPLIT_METHODS
    )


def name_of(node: fx.Node) -> str:
    """The bare name of the function or method that a node calls: "matmul" for ``@`` and torch.linalg.matmul too."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return target.removeprefix("linalg_").split(".")[0]  # an overload is called "mm.default"


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


def is_view(g: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what a node makes may lie in the memory of what it reads."""
    if node.op == "call_module":
        return isinstance(module_of(g, node), VIEW_MODULES)
    if node.target is getattr:
        return node.args[1] in TENSORS
    return node.op in ("call_function", "call_method") and name_of(node) in VIEWS


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
    return source if len(source.users) == 1 else None
