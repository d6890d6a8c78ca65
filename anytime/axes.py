"""What the axes of a value inside a traced network are: samples, channels, places in the image."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

# Calls by name, of a module, a function or a method, that do more to the axes of a value than to change their sizes.
_TURNING = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT")
_RESHAPING = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_ORDERING = ("einsum", "tensordot")
_CONVOLVING = ("conv1d", "conv2d", "conv3d")


def axes_of(net: nn.Module, nodes: list[fx.Node], shapes: dict[fx.Node, torch.Size | str]) -> dict[fx.Node, str]:
    """What the axes of each value are, a letter each: "b" samples, "c" channels or features, "s" places in the image.

    The image is "bcss", and so is what a convolution over maps gives. Turning a value turns its letters, reshaping joins and
    splits them, and whatever else leaves the number of axes alone leaves their meaning, if all that it reads agrees about it
    (queries times keys do not). Values of which it cannot be told are left out.
    """
    found: dict[fx.Node, str] = {}
    for node in nodes:
        name, shape, known = _name(net, node), shapes[node], [n for n in node.all_input_nodes if n in found]
        axes: str | None = None
        if node.op == "placeholder" or name in _CONVOLVING:
            axes = "bc" + "s" * (len(shape) - 2)
        elif name in _TURNING:
            axes = _turned(node, found[known[0]]) if known == node.all_input_nodes else None
        elif name in _RESHAPING:
            axes = _reshaped(found[known[0]], shapes[known[0]], shape) if known else None  # type: ignore[arg-type]
        elif name not in _ORDERING:
            # A tuple of tensors hands on to its parts what they are parts of.
            read = {found[n] for n in known if shape in ("tuple", "list") or len(found[n]) == len(shape)}
            axes = read.pop() if len(read) == 1 else None
            if axes and name == "linear" and "c" not in axes:
                axes = axes[:-1] + "c"  # rows of a grey image become features
        if axes and (shape in ("tuple", "list") or not isinstance(shape, str)):
            found[node] = axes
    return found


def _name(net: nn.Module, node: fx.Node) -> str:
    """What a node calls: "linear" for nn.Linear and for the function, "T" for the attribute; "" for a parameter."""
    if node.op == "call_module":
        return type(net.get_submodule(str(node.target))).__name__.lower()
    if node.target is getattr:
        return str(node.args[1])
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _turned(node: fx.Node, axes: str) -> str:
    """The letters after a turn, by turning a value whose axes are told apart by their sizes."""
    probe = torch.empty(*range(len(axes)), device="meta")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: probe)
    call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    turned = call(*args, **kwargs)
    return "".join(axes[size] for size in turned.shape)


def _reshaped(axes: str, before: Sequence[int], after: Sequence[int]) -> str | None:
    """The letters after a reshape; None where samples are joined with anything, or axes are cut across.

    An axis joined of several is of channels if one of them is: a patch [p, p, C] becomes a vector of features.
    """
    out = ""
    for low, high in _spans(after):
        met = [(axis, *of) for axis, of in zip(axes, _spans(before), strict=True) if max(low, of[0]) < min(high, of[1])]
        held = {axis for axis, _, _ in met}
        whole = all((low <= first and last <= high) or (first <= low and high <= last) for _, first, last in met)
        if not whole or ("b" in held and len(held) > 1):
            return None
        out += "c" if "c" in held else next(iter(held), "s")
    return out


def _spans(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Each axis as the stretch of a flat value that it steps through: (its stride, the stride of the axis before it)."""
    return [(prod(shape[i + 1 :]), prod(shape[i:])) for i in range(len(shape))]
