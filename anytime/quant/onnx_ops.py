"""What torch's modules and functions become in ONNX: those for which integers matter. What has no form here is onnx_torch's."""

from __future__ import annotations

from collections.abc import Callable
from operator import add
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from anytime.errors import Unsupported
from anytime.layers import MixedPool2d, ZeroPadShortcut
from anytime.quant.fake import FakeQuant, QConv2d, QLinear
from anytime.quant.nodes import PASS_MODULES
from anytime.quant.onnx_torch import BATCHES, batch_axes, is_tensor
from anytime.quant.onnx_writer import Value, Writer


def module(w: Writer, m: nn.Module, node: fx.Node, name: str, x: Value, int_bias: bool) -> Value | None:
    """What a module makes of x; None where it has no form here."""
    if isinstance(m, FakeQuant):
        return w.quantize(x.name, m, name)
    if isinstance(m, ZeroPadShortcut):
        return _zero_pad(w, m, name, x, int_bias)
    if isinstance(m, nn.Linear) and len(shape := shape_of(node)) != 2:
        if shape.count(-1) > 1:
            return None
        rows = reshape(w, x, [-1, m.in_features], f"{name}/rows")
        return reshape(w, Value(_linear(w, m, name, rows, int_bias)), shape, f"{name}/axes")
    for kind, emit in EMIT.items():
        if isinstance(m, kind) and (out := emit(w, m, name, x, int_bias)):
            return w.keep(out, x, name) if isinstance(m, PASS_MODULES) else Value(out)
    return None


def shape_of(node: fx.Node) -> list[int]:
    """Shape of what a node makes, -1 for what grows with the batch."""
    return [-1 if axis in batch_axes(node) else size for axis, size in enumerate(node.meta["shapes"][BATCHES[0]])]


def reshape(w: Writer, x: Value, shape: list[int], name: str) -> Value:
    """The values of x in another shape, on its grid."""
    return w.keep(w.op("Reshape", [x.name, w.constant(f"{name}/shape", np.array(shape, np.int64))], name), x, name)


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
            counts = np.rint(m.bias.detach().numpy().astype(np.float64) / step)
            if np.abs(counts).max() >= 2**31:  # freeze makes room; who brings grids of their own may have none
                raise Unsupported(f"{name}: its bias is more steps than 32 bits hold, for its weights are next to nothing")
            counts = counts.astype(np.int32)
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


def _conv(w: Writer, m: nn.Conv2d, name: str, x: Value, int_bias: bool) -> str | None:
    if m.padding_mode != "zeros":
        return None
    if m.padding == "same":  # an odd one goes behind
        whole = [dilation * (size - 1) for dilation, size in zip(m.dilation, m.kernel_size, strict=True)]
        pads = [n // 2 for n in whole] + [n - n // 2 for n in whole]
    else:
        pads = [0] * 4 if m.padding == "valid" else [int(n) for n in m.padding] * 2
    return w.op(
        "Conv", [x.name, *_weight(w, m, name, x, int_bias)], name, kernel_shape=list(m.kernel_size), strides=list(m.stride),
        pads=pads, dilations=list(m.dilation), group=m.groups,
    )  # fmt: skip


def _linear(w: Writer, m: nn.Linear, name: str, x: Value, int_bias: bool) -> str:
    return w.op("Gemm", [x.name, *_weight(w, m, name, x, int_bias)], name)


def _pair(v: Any) -> list[int]:
    return list(v) if isinstance(v, tuple | list) else [v, v]


def _max_pool(w: Writer, m: nn.MaxPool2d, name: str, x: Value, _: bool) -> str | None:
    sides = zip(*(_pair(v) for v in (m.kernel_size, m.stride, m.padding, m.dilation)), strict=True)
    # No window starts in the padding behind the map, whatever its size, if what it spans reaches from there to the last start.
    if m.ceil_mode and any(stride + pad > dilation * (size - 1) + 1 for size, stride, pad, dilation in sides):
        return None
    return w.op(
        "MaxPool", [x.name], name, kernel_shape=_pair(m.kernel_size), strides=_pair(m.stride), pads=_pair(m.padding) * 2,
        dilations=_pair(m.dilation), ceil_mode=int(m.ceil_mode),
    )  # fmt: skip


def _avg_pool(w: Writer, m: nn.AvgPool2d, name: str, x: Value, _: bool) -> str | None:
    if m.ceil_mode or m.divisor_override:
        return None
    return w.op(
        "AveragePool", [x.name], name, kernel_shape=_pair(m.kernel_size), strides=_pair(m.stride), pads=_pair(m.padding) * 2,
        count_include_pad=int(m.count_include_pad),
    )  # fmt: skip


def _adaptive_pool(w: Writer, m: nn.AdaptiveAvgPool2d, name: str, x: Value, _: bool) -> str | None:
    return w.op("GlobalAveragePool", [x.name], name) if _pair(m.output_size) == [1, 1] else None


def _batch_norm(w: Writer, m: nn.BatchNorm2d, name: str, x: Value, _: bool) -> str:
    assert m.running_mean is not None and m.running_var is not None
    ones, zeros = torch.ones_like(m.running_mean), torch.zeros_like(m.running_mean)
    parts = {"weight": ones if m.weight is None else m.weight, "bias": zeros if m.bias is None else m.bias,
             "mean": m.running_mean, "var": m.running_var}  # fmt: skip
    names = [w.constant(f"{name}.{k}", v.detach().float().numpy()) for k, v in parts.items()]
    return w.op("BatchNormalization", [x.name, *names], name, epsilon=m.eps)


def _flatten(w: Writer, m: nn.Flatten, name: str, x: Value, _: bool) -> str | None:
    return w.op("Flatten", [x.name], name, axis=1) if (m.start_dim, m.end_dim) == (1, -1) else None


def _lrn(w: Writer, m: nn.LocalResponseNorm, name: str, x: Value, _: bool) -> str | None:
    return w.op("LRN", [x.name], name, size=m.size, alpha=m.alpha, beta=m.beta, bias=m.k) if m.size % 2 else None


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
    return w.keep(w.op("Pad", [out, pads], name), x, name)


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


# Each adds nodes and answers the name of what they make; None where this module, as it is set, has no form here.
EMIT: dict[type[nn.Module], Callable[[Writer, Any, str, Value, bool], str | None]] = {
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
RESHAPES = (torch.flatten, torch.reshape, "flatten", "reshape", "view", "unflatten")


def call(w: Writer, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any]) -> Value | None:
    """What a function or a method of a tensor makes of its arguments, as ``module`` does."""
    target = node.target
    if target in RESHAPES and shape_of(node).count(-1) == 1:
        if target in (torch.flatten, "flatten") and len(shape_of(node)) == 2:
            return w.keep(w.op("Flatten", [args[0].name], name, axis=1), args[0], name)
        return reshape(w, args[0], shape_of(node), name)
    if not all(map(is_tensor, node.all_input_nodes)):  # it reads numbers too, which are made of shapes
        return None
    if target in (add, torch.add, "add") and kwargs.get("alpha", 1) == 1:
        return Value(w.op("Add", [_operand(w, v, f"{name}/{i}") for i, v in enumerate(args[:2])], name))
    if target in (torch.relu, F.relu, "relu"):
        return Value(w.op("Relu", [args[0].name], name))
    if target is torch.cat:
        axis = next((kwargs[said] for said in ("dim", "axis") if said in kwargs), args[1] if len(args) > 1 else 0)
        out = w.op("Concat", [v.name for v in args[0]], name, axis=axis)
        return w.keep(out, args[0][0], name) if one_grid({v.q and v.q.quant for v in args[0]}) else Value(out)
    if target is F.adaptive_avg_pool2d and _pair(args[1]) == [1, 1]:
        return Value(w.op("GlobalAveragePool", [args[0].name], name))
    return args[0] if target == "detach" else None


def _operand(w: Writer, v: Value | float, name: str) -> str:
    return v.name if isinstance(v, Value) else w.constant(name, np.array(v, np.float32))


def one_grid(grids: set[FakeQuant | None]) -> FakeQuant | None:
    """The one grid that everything which is concatenated shares, as TensorRT wants it; None where they differ or are float."""
    return next(iter(grids)) if len(grids) == 1 else None
