"""Links of a chain as ONNX graphs, with Q/DQ where the chain carries quantizers.

One static graph per segment. Nodes bear their layer's path ("stages.0.0"), so a profile or a viewer reads
like the network. Opset 13 and IR 7 load on every board that we know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import add, getitem
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from anytime.errors import Unsupported
from anytime.layers import MixedPool2d, ZeroPadShortcut
from anytime.model import AnytimeModel, Segment
from anytime.quant.fake import FakeQuant, QConv2d, QLinear
from anytime.quant.trace import PASS_CALLS, PASS_METHODS, PASS_MODULES

OPSET, IR = 13, 7


class Q(NamedTuple):
    """The grid that a tensor lies on, as names in the graph; ``integers`` is the tensor behind the DQ."""

    quant: FakeQuant
    scale: str
    zero_point: str
    integers: str


class Value(NamedTuple):
    """A float tensor of the graph; ``q`` when a DQ made it."""

    name: str
    q: Q | None = None


@dataclass
class Writer:
    """Builds one graph."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    grids: dict[int, tuple[str, str]] = field(default_factory=dict)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Name of an initializer."""
        self.initializers.setdefault(name, numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node; answer the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}:out"], name, **attributes))
        return f"{name}:out"

    def quantize(self, value: str, quant: FakeQuant, name: str) -> Value:
        """Q and DQ behind a float tensor."""
        scale, zero_point = self._grid(quant, name)
        integers = self.op("QuantizeLinear", [value, scale, zero_point], f"{name}/Q")
        return self.dequantize(Q(quant, scale, zero_point, integers), name)

    def dequantize(self, q: Q, name: str) -> Value:
        """A float tensor from integers."""
        return Value(self.op("DequantizeLinear", [q.integers, q.scale, q.zero_point], f"{name}/DQ"), q)

    def _grid(self, quant: FakeQuant, name: str) -> tuple[str, str]:
        if id(quant) not in self.grids:
            scale = self.constant(f"{name}/scale", np.array(quant.scale.item(), np.float32))
            zero = self.constant(f"{name}/zero_point", np.array(quant.zero_point.item(), integer_type(quant)))
            self.grids[id(quant)] = (scale, zero)
        return self.grids[id(quant)]


def integer_type(quant: FakeQuant) -> type[np.generic]:
    """numpy type that holds this grid's integers."""
    if quant.bits <= 8:
        return np.int8 if quant.signed else np.uint8
    return np.int16 if quant.signed else np.uint16


class OnnxChain:
    """A chain ready to be written, segment by segment; its links must be traced (``quant.graph.traced`` or ``quantized``).

    ``int_bias`` writes the biases of quantized layers as int32 (CPU engines), else float (TensorRT).
    ``channels_last``: integer images cross segments as [B, H, W, C]. ONNX Runtime computes in that layout, and turns what comes as
    [B, C, H, W] around slowly (of ResNet-56, batch 64: a fifth of a segment's time); OpenVINO is slower by as much the other way.
    """

    def __init__(self, model: AnytimeModel, input_shape: tuple[int, ...], int_bias: bool, channels_last: bool = False) -> None:
        self.model, self.int_bias, self.channels_last = model, int_bias, channels_last
        # states[k] is what enters stage k: (shape without batch, its FakeQuant or None), nested as the state is.
        x = torch.zeros(1, *input_shape)
        state: Any = x
        quant: Any = None
        self.states = [_describe(x, None)]
        with torch.inference_mode():
            for stage in model.stages:
                assert isinstance(stage, fx.GraphModule)
                state, quant = stage(x if model.restarts else state), _out_quant(stage, quant)
                self.states.append(_describe(state, quant))
            self.n_classes = model.heads[-1](state).shape[-1]

    def write(self, segment: Segment) -> onnx.ModelProto:
        """The graph of one segment.

        Inputs "x" or "state" (with an index when there are several), integers where the state is quantized;
        outputs "logits" (with a head) and "state_out" (unless nothing can follow).
        """
        w = Writer()
        first, stop, head = segment
        restarts = self.model.restarts
        fresh = first == 0 or (restarts and stop > first)  # it begins from the input
        inputs, value = _enter(w, self.states[0 if fresh else first], "x" if fresh else "state", self.channels_last)
        for k in range(first, stop)[-1:] if restarts else range(first, stop):
            value = _link(w, self.model.stages[k], f"stages.{k}", value, self.int_bias)
        outputs = []
        if head is not None:
            logits = _link(w, self.model.heads[head], f"heads.{head}", value, self.int_bias)
            w.nodes.append(helper.make_node("Identity", [logits.name], ["logits"], "logits"))
            outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", self.n_classes]))
        if stop > first and (head is None or (stop < self.model.n_exits and not restarts)):
            outputs += _leave(w, value, self.states[stop], self.channels_last)
        graph = helper.make_graph(w.nodes, _title(segment), inputs, outputs, list(w.initializers.values()))
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="anytime")
        proto.ir_version = IR
        onnx.checker.check_model(proto)
        return proto


def _title(segment: Segment) -> str:
    stages = "" if segment.stop == segment.first else f"stages {segment.first + 1} to {segment.stop}"
    return ", ".join(filter(None, [stages, "" if segment.head is None else f"head {segment.head + 1}"]))


def _describe(state: Any, quant: Any) -> Any:
    if isinstance(state, Tensor):
        return (tuple(state.shape[1:]), quant if isinstance(quant, FakeQuant) else None)
    each = quant if isinstance(quant, tuple) else (quant,) * len(state)
    return [_describe(s, q) for s, q in zip(state, each, strict=True)]


def _out_quant(stage: fx.GraphModule, entering: Any) -> Any:
    """Quantizers of what a stage returns, followed through operations that only move values."""

    def of(node: Any) -> Any:
        if isinstance(node, tuple | list):
            return tuple(of(n) for n in node)
        if node.op == "placeholder":
            return entering
        if node.op == "call_function" and node.target is getitem:
            held = of(node.args[0])
            return held[node.args[1]] if isinstance(held, tuple) else held
        if node.target is torch.cat:
            return _one(set(of(node.args[0])))
        module = stage.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, FakeQuant):
            return module
        return of(node.args[0]) if _moves(node, module) else None

    return of(stage.graph.output_node().args[0])


def _one(grids: set[FakeQuant | None]) -> FakeQuant | None:
    """The one grid that everything which is concatenated shares, as TensorRT wants it; None where they differ or are float."""
    return next(iter(grids)) if len(grids) == 1 else None


def _moves(node: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, PASS_MODULES) or node.target in PASS_CALLS + PASS_METHODS


def _enter(w: Writer, described: Any, name: str, channels_last: bool) -> tuple[list[onnx.ValueInfoProto], Any]:
    if isinstance(described, list):
        parts = [_enter(w, d, f"{name}_{i}", channels_last) for i, d in enumerate(described)]
        return [info for infos, _ in parts for info in infos], tuple(value for _, value in parts)
    _, quant = described
    info, turned = _border(described, name, channels_last)
    if quant is None:
        return [info], Value(name)
    integers = w.op("Transpose", [name], f"{name}/NCHW", perm=[0, 3, 1, 2]) if turned else name
    scale, zero_point = w._grid(quant, name)
    return [info], w.dequantize(Q(quant, scale, zero_point, integers), name)


def _leave(w: Writer, value: Any, described: Any, channels_last: bool, name: str = "state") -> list[onnx.ValueInfoProto]:
    if isinstance(described, list):
        return [info for i, d in enumerate(described) for info in _leave(w, value[i], d, channels_last, f"{name}_{i}")]
    source = value.name if value.q is None else value.q.integers
    out = f"{name}_out"  # an input may be called "state" too
    info, turned = _border(described, out, channels_last)
    node = partial(helper.make_node, "Transpose", perm=[0, 2, 3, 1]) if turned else partial(helper.make_node, "Identity")
    w.nodes.append(node([source], [out], out))
    return [info]


def _border(described: Any, name: str, channels_last: bool) -> tuple[onnx.ValueInfoProto, bool]:
    """Type and shape of a tensor between segments, and whether its channels come last."""
    shape, quant = described
    turned = channels_last and quant is not None and len(shape) == 3
    kind = TensorProto.FLOAT if quant is None else helper.np_dtype_to_tensor_dtype(np.dtype(integer_type(quant)))
    return helper.make_tensor_value_info(name, kind, ["batch", *(shape[1:] + shape[:1] if turned else shape)]), turned


def _link(w: Writer, link: nn.Module, path: str, value: Any, int_bias: bool) -> Any:
    assert isinstance(link, fx.GraphModule)
    values: dict[fx.Node, Any] = {}

    def get(arg: Any) -> Any:
        if isinstance(arg, tuple | list):
            return [get(a) for a in arg]
        return values[arg] if isinstance(arg, fx.Node) else arg

    for node in link.graph.nodes:
        name = f"{path}.{node.target if node.op == 'call_module' else node.name}"
        if node.op == "placeholder":
            values[node] = value
        elif node.op == "output":
            out = node.args[0]
            return tuple(get(n) for n in out) if isinstance(out, tuple | list) else get(out)
        elif node.op == "get_attr":
            values[node] = Value(w.constant(name, _attribute(link, node.target).detach().numpy()))
        elif node.op == "call_function" and node.target is getitem:
            values[node] = get(node.args[0])[node.args[1]]
        elif node.op == "call_module":
            module = link.get_submodule(node.target)
            used = sum(n.op == "call_module" and n.target == node.target for n in link.graph.nodes)
            values[node] = _module(w, module, name if used == 1 else f"{path}.{node.name}", get(node.args[0]), int_bias)
        else:
            values[node] = _call(w, node, name, [get(a) for a in node.args], {k: get(v) for k, v in node.kwargs.items()})
    raise AssertionError("a graph without an output")


def _attribute(root: nn.Module, target: str) -> Tensor:
    parent, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)  # type: ignore[no-any-return]


def _module(w: Writer, m: nn.Module, name: str, x: Value, int_bias: bool) -> Value:
    if isinstance(m, FakeQuant):
        return w.quantize(x.name, m, name)
    if isinstance(m, ZeroPadShortcut):
        return _zero_pad(w, m, name, x, int_bias)
    for kind, emit in EMIT.items():
        if isinstance(m, kind):
            return (
                _keep(w, emit(w, m, name, x, int_bias), x, name)
                if isinstance(m, PASS_MODULES)
                else Value(emit(w, m, name, x, int_bias))
            )
    raise Unsupported(f"{name}: no ONNX form is known for {type(m).__name__}")


def _keep(w: Writer, out: str, x: Value, name: str) -> Value:
    """What only moves values stays in integers: the same grid behind it, so that an engine runs it between Q and DQ."""
    if x.q is None or out == x.name:
        return Value(out, x.q)
    return w.dequantize(x.q._replace(integers=w.op("QuantizeLinear", [out, x.q.scale, x.q.zero_point], f"{name}/Q")), name)


def _weight(w: Writer, m: QConv2d | QLinear | nn.Conv2d | nn.Linear, name: str, x: Value, int_bias: bool) -> list[str]:
    """Names of the weight [O, ...] (a linear's transposed [I, O]) and the bias as the layer multiplies them."""
    flip = isinstance(m, nn.Linear)
    if isinstance(m, QConv2d | QLinear):
        assert x.q is not None, f"{name} reads a tensor without a quantizer"
        kind = np.int8 if m.weight_bits <= 8 else np.int16
        q = m.integers().detach().numpy().astype(kind)
        scale = w.constant(f"{name}.weight/scale", m.weight_scale.numpy())
        zero = w.constant(f"{name}.weight/zero_point", np.zeros(len(q), kind))
        integers = w.constant(f"{name}.weight", q.T if flip else q)
        names = [w.op("DequantizeLinear", [integers, scale, zero], f"{name}.weight/DQ", axis=1 if flip else 0)]
        if m.bias is not None and int_bias:
            step = (x.q.quant.scale * m.weight_scale).numpy().astype(np.float32)
            counts = np.clip(np.rint(m.bias.detach().numpy().astype(np.float64) / step), -(2**31), 2**31 - 1).astype(np.int32)
            b_scale = w.constant(f"{name}.bias/scale", step)
            b_zero = w.constant(f"{name}.bias/zero_point", np.zeros(len(step), np.int32))
            return [
                *names,
                w.op("DequantizeLinear", [w.constant(f"{name}.bias", counts), b_scale, b_zero], f"{name}.bias/DQ", axis=0),
            ]
    else:
        weight = m.weight.detach().float().numpy()
        names = [w.constant(f"{name}.weight", weight.T if flip else weight)]
    if m.bias is not None:
        names.append(w.constant(f"{name}.bias", m.bias.detach().float().numpy()))
    return names


def _conv(w: Writer, m: nn.Conv2d, name: str, x: Value, int_bias: bool) -> str:
    if isinstance(m.padding, str) or m.padding_mode != "zeros":
        raise Unsupported(
            f"{name}: padding {m.padding!r} with mode {m.padding_mode!r} has no ONNX form here; use zeros and numbers"
        )
    return w.op(
        "Conv", [x.name, *_weight(w, m, name, x, int_bias)], name, kernel_shape=list(m.kernel_size), strides=list(m.stride),
        pads=list(m.padding) * 2, dilations=list(m.dilation), group=m.groups,
    )  # fmt: skip


def _linear(w: Writer, m: nn.Linear, name: str, x: Value, int_bias: bool) -> str:
    return w.op("Gemm", [x.name, *_weight(w, m, name, x, int_bias)], name)


def _pair(v: Any) -> list[int]:
    return list(v) if isinstance(v, tuple | list) else [v, v]


def _max_pool(w: Writer, m: nn.MaxPool2d, name: str, x: Value, _: bool) -> str:
    return w.op(
        "MaxPool", [x.name], name, kernel_shape=_pair(m.kernel_size), strides=_pair(m.stride), pads=_pair(m.padding) * 2,
        dilations=_pair(m.dilation), ceil_mode=int(m.ceil_mode),
    )  # fmt: skip


def _avg_pool(w: Writer, m: nn.AvgPool2d, name: str, x: Value, _: bool) -> str:
    if m.ceil_mode or m.divisor_override:
        raise Unsupported(
            f"{name}: AvgPool2d with ceil_mode or divisor_override differs between torch and ONNX; write it without"
        )
    return w.op(
        "AveragePool", [x.name], name, kernel_shape=_pair(m.kernel_size), strides=_pair(m.stride), pads=_pair(m.padding) * 2,
        count_include_pad=int(m.count_include_pad),
    )  # fmt: skip


def _adaptive_pool(w: Writer, m: nn.AdaptiveAvgPool2d, name: str, x: Value, _: bool) -> str:
    if _pair(m.output_size) != [1, 1]:
        raise Unsupported(f"{name}: AdaptiveAvgPool2d to {m.output_size} has no ONNX form; use 1x1 or AvgPool2d")
    return w.op("GlobalAveragePool", [x.name], name)


def _batch_norm(w: Writer, m: nn.BatchNorm2d, name: str, x: Value, _: bool) -> str:
    assert m.running_mean is not None and m.running_var is not None
    ones, zeros = torch.ones_like(m.running_mean), torch.zeros_like(m.running_mean)
    parts = {"weight": ones if m.weight is None else m.weight, "bias": zeros if m.bias is None else m.bias,
             "mean": m.running_mean, "var": m.running_var}  # fmt: skip
    names = [w.constant(f"{name}.{k}", v.detach().float().numpy()) for k, v in parts.items()]
    return w.op("BatchNormalization", [x.name, *names], name, epsilon=m.eps)


def _flatten(w: Writer, m: nn.Flatten, name: str, x: Value, _: bool) -> str:
    if (m.start_dim, m.end_dim) != (1, -1):
        raise Unsupported(f"{name}: Flatten({m.start_dim}, {m.end_dim}) has no ONNX form here; flatten from 1 to the end")
    return w.op("Flatten", [x.name], name, axis=1)


def _lrn(w: Writer, m: nn.LocalResponseNorm, name: str, x: Value, _: bool) -> str:
    return w.op("LRN", [x.name], name, size=m.size, alpha=m.alpha, beta=m.beta, bias=m.k)


def _zero_pad(w: Writer, m: ZeroPadShortcut, name: str, x: Value, int_bias: bool) -> Value:
    # ONNX Runtime pads integers but does not fuse a Pad between DQ and Q; TensorRT wants them around it.
    whole = x.q if int_bias else None
    out = whole.integers if whole else x.name
    if m.stride > 1:
        bounds = {"starts": [0, 0], "ends": [2**31 - 1] * 2, "axes": [2, 3], "steps": [m.stride] * 2}
        out = w.op(
            "Slice", [out, *(w.constant(f"{name}/{k}", np.array(v, np.int64)) for k, v in bounds.items())], f"{name}/Slice"
        )
    pads = w.constant(f"{name}/pads", np.array([0, m.front, 0, 0, 0, m.back, 0, 0], np.int64))
    if whole:
        return w.dequantize(whole._replace(integers=w.op("Pad", [out, pads, whole.zero_point], name)), name)
    return _keep(w, w.op("Pad", [out, pads], name), x, name)


def _mixed_pool(w: Writer, m: MixedPool2d, name: str, x: Value, _: bool) -> str:
    alpha = m.alpha.detach().float().numpy()
    shares = {"Max": alpha, "Average": np.float32(1) - alpha}
    parts = []
    for kind, share in shares.items():
        pooled = w.op(f"{kind}Pool", [x.name], f"{name}/{kind}Pool", kernel_shape=[m.size] * 2, strides=[m.size] * 2)
        parts.append(w.op("Mul", [pooled, w.constant(f"{name}/{kind}", share)], f"{name}/{kind}Mul"))
    return w.op("Add", parts, name)


def _relu6(w: Writer, m: nn.Hardtanh, name: str, x: Value, _: bool) -> str:
    low = w.constant(f"{name}/low", np.array(m.min_val, np.float32))
    return w.op("Clip", [x.name, low, w.constant(f"{name}/high", np.array(m.max_val, np.float32))], name)


def _simple(kind: str) -> Callable[..., str]:
    return lambda w, m, name, x, _: w.op(kind, [x.name], name)


EMIT: dict[type[nn.Module], Callable[[Writer, Any, str, Value, bool], str]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _simple("Relu"),
    nn.Hardtanh: _relu6,
    nn.Sigmoid: _simple("Sigmoid"),
    nn.Tanh: _simple("Tanh"),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _flatten,
    nn.LocalResponseNorm: _lrn,
    MixedPool2d: _mixed_pool,
    nn.Dropout: lambda w, m, name, x, _: x.name,
    nn.Identity: lambda w, m, name, x, _: x.name,
}


def _call(w: Writer, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any]) -> Value:
    target = node.target
    if target in (add, torch.add, "add"):
        return Value(w.op("Add", [args[0].name, args[1].name], name))
    if target in (torch.relu, F.relu, "relu"):
        return Value(w.op("Relu", [args[0].name], name))
    if target is torch.cat:
        out = w.op("Concat", [v.name for v in args[0]], name, axis=kwargs.get("dim", args[1] if len(args) > 1 else 0))
        return _keep(w, out, args[0][0], name) if _one({v.q and v.q.quant for v in args[0]}) else Value(out)
    if target is F.adaptive_avg_pool2d and _pair(args[1]) == [1, 1]:
        return Value(w.op("GlobalAveragePool", [args[0].name], name))
    if target == "detach":
        return args[0]  # type: ignore[no-any-return]
    if target in (torch.flatten, "flatten") and tuple(args[1:2] or kwargs.values()) == (1,):
        return _keep(w, w.op("Flatten", [args[0].name], name, axis=1), args[0], name)
    raise Unsupported(f"{name}: no ONNX form is known for {getattr(target, '__name__', target)}")
