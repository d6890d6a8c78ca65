"""Functions and methods of torch in a traced network, as the modules that the rest of the project knows."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_POOLS: dict[Any, type[nn.Module]] = {
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}


def as_modules(root: nn.Module, graph: fx.Graph, shapes: MutableMapping[fx.Node, Any]) -> None:
    """Turn calls into calls of modules, in place: pooling, the mean over a map, flattening (view and reshape too), dropout, ReLU6.

    ``shapes``: of what each node gave in a run; new nodes are added. Nodes keep their names, and what they compute stays the
    same, but dropout, which was traced in eval mode, acts in training again. A call that no module stands for is left.
    """
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source, mean = node.args[0], _is_mean(node, shapes)
        module = nn.AdaptiveAvgPool2d(1) if mean else nn.Flatten() if _flattens(node, shapes) else _of(root, node)
        if module is None:
            continue
        if mean and len(shapes[node]) == 2:
            with graph.inserting_before(node):
                pooled = graph.create_node("call_module", "", (source,), name=f"{node.name}_pool")
            _call(root, pooled, source, module)
            shapes[pooled] = torch.Size([*shapes[node], 1, 1])
            source, module = pooled, nn.Flatten()
        _call(root, node, source, module)


def _call(root: nn.Module, node: fx.Node, source: fx.Node, module: nn.Module) -> None:
    name = f"as_module_{node.name}"
    root.add_module(name, module.train(root.training))
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def _of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a function stands for."""
    if node.op != "call_function" or node.target not in (*_POOLS, F.dropout, F.relu6):
        return None
    said = node.normalized_arguments(root, normalize_to_only_use_kwargs=True)
    if said is None or said.kwargs.get("return_indices"):
        return None
    drop = ("input", "return_indices", "training", "inplace")
    given = {k: v for k, v in said.kwargs.items() if k not in drop and v != []}  # a stride of [] is the kernel's size
    if node.target is F.dropout:
        return nn.Dropout(**given)
    return nn.ReLU6() if node.target is F.relu6 else _POOLS[node.target](**given)


def _is_mean(node: fx.Node, shapes: Mapping[fx.Node, Any]) -> bool:
    """Whether it is the mean over the whole of each map [B, C, H, W]."""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    whole = isinstance(dims, tuple | list) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
    return node.target in (torch.mean, "mean") and len(shapes[node.args[0]]) == 4 and whole  # type: ignore[index]


def _flattens(node: fx.Node, shapes: Mapping[fx.Node, Any]) -> bool:
    """Whether it makes one vector of all that belongs to a sample."""
    before, after = shapes[node.args[0]], shapes[node]  # type: ignore[index]
    moves = node.target in (torch.flatten, torch.reshape, "flatten", "view", "reshape")
    return moves and not isinstance(before, str) and tuple(after) == (before[0], prod(before[1:]))
