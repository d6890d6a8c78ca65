"""Calls that change what they read, made to give new tensors: what is kept of a tensor stays as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from anytime.errors import Unsupported
from anytime.quant.nodes import is_view, module_of, name_of


def out_of_place(g: fx.GraphModule, path: str) -> None:
    """Let no call change what it reads: who reads that later reads the call's answer.

    Unsupported, by name, where another view of what changes is read later, where a parameter or a buffer changes, and where
    torch has no such call out of place.
    """
    order = {node: i for i, node in enumerate(g.graph.nodes)}
    for node in [n for n in g.graph.nodes if _works_in_place(g, n)]:
        changed: Any = node.kwargs.get("out") or node.all_input_nodes[0]
        name = f"{path}.{node.target if node.op == 'call_module' else node.name}"
        memory = _memory(g, changed)
        if memory.op == "get_attr" or not _take_out_of_place(g, node):
            raise Unsupported(f"{name} changes {changed} in place, which has no other form here: write it out of place")
        later = [n for n in g.graph.nodes if order[n] > order[node]]
        for n in later:
            n.replace_input_with(changed, node)
        if is_view(g, node):
            continue  # dropout in eval mode, squeeze_: no value changes
        for n in later:
            if not is_view(g, n) and any(_memory(g, read) is memory for read in n.all_input_nodes):
                raise Unsupported(f"{name} changes {changed} in place, and {n} reads another view of it: write it out of place")
    g.recompile()


def _works_in_place(g: fx.GraphModule, node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return bool(getattr(module_of(g, node), "inplace", False))
    name, at = name_of(node), _inplace_at(node)
    positional = at is not None and len(node.args) > at and node.args[at]
    return bool(positional or node.kwargs.get("inplace") or node.kwargs.get("out") or (name[-1] == "_" and name[-2:] != "__"))


def _inplace_at(node: fx.Node) -> int | None:
    """Where a function takes ``inplace`` among its arguments."""
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code else ()
    return names.index("inplace") if "inplace" in names else None


def _take_out_of_place(g: fx.GraphModule, node: fx.Node) -> bool:
    """Let a node make a new tensor; False where that is not known to torch."""
    module = module_of(g, node)
    if module is not None:
        module.inplace = False  # type: ignore[assignment]
        return True
    name, at = name_of(node), _inplace_at(node)
    node.args = tuple(False if i == at else a for i, a in enumerate(node.args))
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "out")}
    if name.endswith("_"):
        homes = (Tensor,) if node.op == "call_method" else (torch, F)
        found = next((f for home in homes if callable(f := getattr(home, name[:-1], None))), None)
        if found is None:
            return False
        node.target = name[:-1] if node.op == "call_method" else found
    return True


def _memory(g: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that made the memory in which a node's value lies."""
    while is_view(g, node):
        node = node.all_input_nodes[0]
    return node
