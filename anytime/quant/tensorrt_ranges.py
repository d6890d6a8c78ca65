"""The ranges that TensorRT's calibrators would look for."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Literal

import onnx
from torch import Tensor, fx

from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant
from anytime.quant.graph import Quantized
from anytime.quant.place import asks_shape
from anytime.quant.ranges import NEEDS_VALUES, Observer, activation_grid
from anytime.quant.trace import insert_after, links, traced

Calibrator = Literal["entropy2", "minmax"]
OBSERVERS: dict[Calibrator, Observer] = {"entropy2": "entropy", "minmax": "minmax"}


def tensor_scales(model: AnytimeModel, x: Tensor, observer: Observer) -> dict[str, float]:
    """Scale of every activation of a chain, over samples x [N, ...]: name of the tensor in its graphs -> largest |x| / 127.

    TensorRT's calibrators look at every tensor before fusion (entropy "2" and "minmax" do), not only where Q/DQ would stand.
    """
    chain = traced(model)
    for path, link in links(chain):
        for node in list(link.graph.nodes):
            called = node.op == "call_module" and sum(n.target == node.target for n in link.graph.nodes) == 1
            if node.op == "placeholder":
                if path.startswith("stages.") and (path == "stages.0" or chain.restarts):
                    _watch_behind(link, node, "x")
            elif node.op.startswith("call_") and node.target is not getitem and not asks_shape(node):
                _watch_behind(link, node, f"{path}.{node.target if called else node.name}:out")
        link.recompile()
    seen = Quantized(chain, {}, ()).observe(x, values=observer in NEEDS_VALUES)
    return {name: activation_grid(h, observer, 8, signed=True).scale for name, h in seen.items()}


def graph_scales(graph: onnx.GraphProto, known: dict[str, float], entering: Sequence[float]) -> dict[str, float]:
    """Scale of every activation in the graph of a segment, in its order; ``entering``: those of its inputs.

    Tensors inside what a layer is written as share the scale of what they are made of.
    """
    found = dict(zip((i.name for i in graph.input), entering, strict=True))
    for node in graph.node:
        source = next((found[name] for name in node.input if name in found), None)
        for out in node.output:
            scale = known.get(out, source)
            if scale is not None:
                found[out] = scale
    return found


def _watch_behind(link: fx.GraphModule, node: fx.Node, name: str) -> None:
    insert_after(link, node, f"watch_{node.name}", FakeQuant(8, True, name))
