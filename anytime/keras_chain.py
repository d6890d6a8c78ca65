"""A traced chain in Keras, link by link: channels last, weights carried over."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from anytime.keras_layers import KerasLayers, Value
from anytime.model import AnytimeModel, Segment
from anytime.quant.trace import links


class KerasChain(KerasLayers):
    """The links of a traced ``chain`` as Keras models, in ``links``: "stages.0" -> model."""

    def __init__(self, chain: AnytimeModel, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.chain = chain
        self.links: dict[str, Any] = {}
        x = torch.zeros(1, *input_shape)
        state: Any = x
        self.states = [_shapes(x)]  # states[k] enters stage k, nested as the state is
        with torch.inference_mode():
            for stage in chain.stages:
                state = stage(x if chain.restarts else state)
                self.states.append(_shapes(state))
        for path, link in links(chain):
            kind, k = path.split(".")
            after = int(k) + (kind == "heads")
            self.links[path] = self._link(link, path, self.states[0 if kind == "stages" and chain.restarts else after])
        self.carry()

    def segment(self, segment: Segment) -> Any:
        """The model of one segment: from the state (or the input) to its logits, if it has a head, then the state
        after it, unless nothing can follow; a list of tensors."""
        head, restarts = segment.head, self.chain.restarts
        fresh = segment.fresh(restarts)
        inputs = value = self._inputs(self.states[0 if fresh else segment.first], "x" if fresh else "state")
        for k in segment.stages(restarts):
            value = self.links[f"stages.{k}"](value)
        outputs = [] if head is None else [self.links[f"heads.{head}"](value)]
        if segment.hands_on(self.chain.n_exits, restarts):
            outputs += self.tf.nest.flatten(value)
        return self.tf.keras.Model(inputs, outputs)

    def whole(self) -> Any:
        """One model from the input to the logits of every exit [E, B, K]."""
        x = value = self._inputs(self.states[0], "x")
        logits = []
        for k in range(self.chain.n_exits):
            value = self.links[f"stages.{k}"](x if self.chain.restarts else value)
            logits.append(self.links[f"heads.{k}"](value))
        return self.tf.keras.Model(x, self.tf.stack(logits))

    # A link, node by node

    def _inputs(self, shape: Any, name: str) -> Any:
        if isinstance(shape, list):
            return [self._inputs(s, f"{name}_{i}") for i, s in enumerate(shape)]
        return self.tf.keras.Input(shape, name=name)

    def _link(self, link: fx.GraphModule, path: str, entering: Any) -> Any:
        inputs = self._inputs(entering, "state")
        values: dict[Any, Any] = {}

        def get(arg: Any) -> Any:
            if isinstance(arg, tuple | list):
                return [get(a) for a in arg]
            return values[arg] if isinstance(arg, fx.Node) else arg

        for node in link.graph.nodes:
            module = link.get_submodule(node.target) if node.op == "call_module" else None
            used = sum(n.op == "call_module" and n.target == node.target for n in link.graph.nodes)
            name = f"{path}.{node.target if module is not None and used == 1 else node.name}"
            if node.op == "placeholder":
                values[node] = self.tf.nest.map_structure(Value, inputs)
            elif node.op == "output":
                out = self._plain(get(node.args[0]))
                return self.tf.keras.Model(inputs, out, name=path)
            elif node.op == "call_function" and node.target is getitem and isinstance(get(node.args[0]), list):
                values[node] = get(node.args[0])[node.args[1]]
            elif module is not None:
                values[node] = self.module(link, node, module, name, get(node.args[0]))
            else:
                values[node] = self._call(link, node, name, get(node.args), {k: get(v) for k, v in node.kwargs.items()})
        raise AssertionError("a graph without an output")


def _shapes(state: Any) -> Any:
    """Shapes without the batch, channels last, nested as the state is."""
    if isinstance(state, Tensor):
        return tuple(state.shape[2:]) + (state.shape[1],) if state.ndim == 4 else tuple(state.shape[1:])
    return [_shapes(s) for s in state]
