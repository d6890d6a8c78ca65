"""What torch's modules and functions become in Keras: channels last, their numbers tied to torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from anytime.errors import Unsupported
from anytime.layers import MixedPool2d, ZeroPadShortcut
from anytime.quant.fake import FakeQuant
from anytime.quant.nodes import is_add, is_relu
from anytime.tf import tensorflow


class Value(NamedTuple):
    """A tensor of Keras; ``order`` says of a flattened map which of torch's features stands at each place."""

    tensor: Any
    order: Tensor | None = None


class Tie(NamedTuple):
    """A parameter or buffer of torch and the variable that holds the same numbers; ``layout`` turns torch's into Keras'."""

    module: nn.Module
    name: str
    variable: Any
    layout: Callable[[Tensor], Tensor]

    @property
    def there(self) -> Tensor:
        """torch's numbers, laid out as Keras has them."""
        return self.layout(getattr(self.module, self.name))

    def carry(self) -> None:
        """torch to Keras."""
        self.variable.assign(self.there.detach().float().cpu().contiguous().numpy())


def _as_it_is(t: Tensor) -> Tensor:
    return t


class KerasLayers:
    """Makes Keras layers of torch's, one by one; one without a Keras form raises Unsupported by its name.

    ``layers`` bear their paths. ``weights`` and ``statistics`` tie what is learned and what BatchNorm counts to torch. Quantizers
    become fake_quant operators of the same grid, from which TensorFlow's converter takes its integers; weights stand on their
    grid already. A mixed pooling keeps its share as a constant.
    """

    def __init__(self) -> None:
        self.tf = tensorflow()
        self.layers: dict[str, Any] = {}
        self.weights: list[Tie] = []
        self.statistics: list[Tie] = []

    def carry(self) -> None:
        """Bring torch's weights and statistics to Keras."""
        for tie in (*self.weights, *self.statistics):
            tie.carry()

    def module(self, link: fx.GraphModule, node: fx.Node, m: nn.Module, name: str, x: Value) -> Value:
        """What a module makes of x."""
        if isinstance(m, nn.Dropout | nn.Identity):
            return Value(self.keep(self.tf.keras.layers.Dropout(m.p), name, x.tensor), x.order) if self._drops(m) else x
        for kind, (make, keeps) in MODULES.items():
            if isinstance(m, kind):
                return Value(make(self, m, name, x.tensor), x.order) if keeps else make(self, m, name, x)
        raise Unsupported(f"{name}: no Keras form is known for {type(m).__name__}")

    @staticmethod
    def _drops(m: nn.Module) -> bool:
        return isinstance(m, nn.Dropout) and m.p > 0

    def keep(self, layer: Any, name: str, x: Any) -> Any:
        """Call a Keras layer under the name of torch's, and remember it."""
        layer._name = name
        self.layers[name] = layer
        return layer(x)

    def tie(self, module: nn.Module, name: str, variable: Any, layout: Callable[[Tensor], Tensor] = _as_it_is) -> None:
        """Let a variable follow a parameter, where the module has one."""
        if getattr(module, name) is not None:
            self.weights.append(Tie(module, name, variable, layout))

    def _plain(self, value: Any) -> Any:
        """Tensors in torch's own order of features."""
        if isinstance(value, list):
            return [self._plain(v) for v in value]
        return value.tensor if value.order is None else self.tf.gather(value.tensor, torch.argsort(value.order).numpy(), axis=1)

    def _call(self, link: fx.GraphModule, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        target, layers = node.target, self.tf.keras.layers
        if kwargs.get("alpha", 1) != 1:
            raise Unsupported(f"{name}: an addition with alpha={kwargs['alpha']} has no Keras form here; multiply before you add")
        if is_add(node) and isinstance(args[0], Value) and isinstance(args[1], Value):
            return Value(self.keep(layers.Add(), name, [self._plain(args[0]), self._plain(args[1])]))
        if is_relu(link, node):
            return Value(self.keep(layers.ReLU(), name, args[0].tensor), args[0].order)
        if target is torch.cat and (kwargs.get("dim") or kwargs.get("axis") or (args[1:] or [0])[0]) == 1:
            return Value(self.keep(layers.Concatenate(-1), name, self._plain(args[0])))
        if target is F.adaptive_avg_pool2d:
            return Value(_adaptive_pool(self, nn.AdaptiveAvgPool2d(args[1]), name, args[0].tensor))
        if target in ("detach", "contiguous"):
            return args[0]
        if target in (torch.flatten, "flatten") and tuple(args[1:2] or kwargs.values()) == (1,):
            return _flatten(self, nn.Flatten(), name, args[0])
        raise Unsupported(f"{name}: no Keras form is known for {getattr(target, '__name__', target)}")

    # Layers that learn: QKeras writes its own (backends/qkeras.py)

    def conv(self, m: nn.Conv2d, name: str, x: Any, padding: str) -> Any:
        """A convolution of a map that is padded already, or pads itself ("same")."""
        layers = self.tf.keras.layers
        form = {"strides": m.stride, "padding": padding, "dilation_rate": m.dilation, "use_bias": m.bias is not None}
        if depthwise(m):
            layer = layers.DepthwiseConv2D(m.kernel_size, depth_multiplier=m.out_channels // m.groups, **form)
            out = self.keep(layer, name, x)
            self.tie(m, "weight", layer.depthwise_kernel, lambda w: depthwise_layout(w, m.groups))
        else:
            layer = layers.Conv2D(m.out_channels, m.kernel_size, groups=m.groups, **form)
            out = self.keep(layer, name, x)
            self.tie(m, "weight", layer.kernel, conv_layout)
        self.tie(m, "bias", layer.bias)
        return out

    def linear(self, m: nn.Linear, name: str, x: Value) -> Any:
        """A linear layer, its rows in the order of a flattened map."""
        layer = self.tf.keras.layers.Dense(m.out_features, use_bias=m.bias is not None)
        out = self.keep(layer, name, x.tensor)
        self.tie(m, "weight", layer.kernel, linear_layout(x.order))
        self.tie(m, "bias", layer.bias)
        return out

    def quantizer(self, m: FakeQuant, name: str, x: Any) -> Any:
        """A rounding to the grid of ``m``."""
        low, high = ((q - int(m.zero_point)) * float(m.scale) for q in (m.qmin, m.qmax))
        return self.tf.quantization.fake_quant_with_min_max_args(x, low, high, m.bits)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C]; anything else as it is."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def conv_layout(w: Tensor) -> Tensor:
    """[O, I, h, w] -> [h, w, I, O]."""
    return w.permute(2, 3, 1, 0)


def depthwise_layout(w: Tensor, channels: int) -> Tensor:
    """[C * M, 1, h, w] -> [h, w, C, M]."""
    return w.reshape(channels, -1, *w.shape[2:]).permute(2, 3, 0, 1)


def linear_layout(order: Tensor | None) -> Callable[[Tensor], Tensor]:
    """[O, I] -> [I, O], its rows in the order that a flattened map has in Keras."""
    return lambda w: (w if order is None else w[:, order.to(w.device)]).t()


def depthwise(m: nn.Conv2d) -> bool:
    """Whether every channel is convolved by itself."""
    return m.groups == m.in_channels > 1


# What modules become


def _pair(v: Any) -> tuple[int, int]:
    return (v[0], v[1]) if isinstance(v, tuple | list) else (v, v)


def _conv(k: KerasLayers, m: nn.Conv2d, name: str, x: Any) -> Any:
    if isinstance(m.padding, str) or m.padding_mode != "zeros":
        raise Unsupported(
            f"{name}: padding {m.padding!r} with mode {m.padding_mode!r} has no Keras form here; use zeros and numbers"
        )
    reach = [d * (size - 1) for d, size in zip(m.dilation, m.kernel_size, strict=True)]
    if any(m.padding) and set(m.stride) == {1} and [2 * p for p in m.padding] == reach:
        return k.conv(m, name, x, "same")
    if any(m.padding):
        x = k.keep(k.tf.keras.layers.ZeroPadding2D(m.padding), f"{name}.pad", x)
    return k.conv(m, name, x, "valid")


def _max_pool(k: KerasLayers, m: nn.MaxPool2d, name: str, x: Any) -> Any:
    size, stride, before = _pair(m.kernel_size), _pair(m.stride), _pair(m.padding)
    if _pair(m.dilation) != (1, 1):
        raise Unsupported(f"{name}: MaxPool2d with dilation has no Keras form here; pool without")
    behind, same = [], []
    for n, s, t, p in zip(x.shape[1:3], size, stride, before, strict=True):
        out = (n + 2 * p - s + (t - 1 if m.ceil_mode else 0)) // t + 1
        out -= m.ceil_mode and (out - 1) * t >= n + p  # torch lets no window begin behind the map
        need = (out - 1) * t + s - n - p  # what the last window reads behind the map
        behind.append(max(need, 0))
        same.append(out == -(-n // t) and p == max((out - 1) * t + s - n, 0) // 2)
    layers = k.tf.keras.layers
    if not any((*before, *behind)) or all(same):
        padding = "same" if any((*before, *behind)) else "valid"
        return k.keep(layers.MaxPooling2D(size, stride, padding), name, x)
    if any(2 * p > s for s, p in zip(size * 2, (*before, *behind), strict=True)):
        raise Unsupported(f"{name}: a window of this MaxPool2d holds more padding than map; pool without so much")
    # A mirrored border holds only values that are in its window anyhow, so that no range sees minus infinity.
    x = k.tf.pad(x, [(0, 0), *zip(before, behind, strict=True), (0, 0)], "SYMMETRIC")
    return k.keep(layers.MaxPooling2D(size, stride, "valid"), name, x)


def _avg_pool(k: KerasLayers, m: nn.AvgPool2d, name: str, x: Any) -> Any:
    padding = _pair(m.padding)
    if m.ceil_mode or m.divisor_override or (any(padding) and not m.count_include_pad):
        raise Unsupported(
            f"{name}: AvgPool2d with ceil_mode, divisor_override or padding that is not counted has no Keras form here"
        )
    if any(padding):
        x = k.keep(k.tf.keras.layers.ZeroPadding2D(padding), f"{name}.pad", x)
    return k.keep(k.tf.keras.layers.AveragePooling2D(_pair(m.kernel_size), _pair(m.stride)), name, x)


def _adaptive_pool(k: KerasLayers, m: nn.AdaptiveAvgPool2d, name: str, x: Any) -> Any:
    have, want = tuple(x.shape[1:3]), _pair(m.output_size)
    if any(w is None or h % w for h, w in zip(have, want, strict=True)):
        raise Unsupported(f"{name}: AdaptiveAvgPool2d from {have} to {want} has no Keras form here; use a divisor of the map")
    if want == (1, 1):  # a mean, which in integers may leave its input's grid; a pooling may not
        return k.keep(k.tf.keras.layers.GlobalAveragePooling2D(keepdims=True), name, x)
    window = tuple(h // w for h, w in zip(have, want, strict=True))
    return k.keep(k.tf.keras.layers.AveragePooling2D(window), name, x)


def _batch_norm(k: KerasLayers, m: nn.BatchNorm2d, name: str, x: Any) -> Any:
    layer = k.tf.keras.layers.BatchNormalization(**norm_form(m))
    out = k.keep(layer, name, x)
    tie_norm(k, m, layer)
    return out


def norm_form(m: nn.BatchNorm2d) -> dict[str, Any]:
    """Arguments of Keras' BatchNormalization."""
    return {"momentum": 1 - (m.momentum or 0.0), "epsilon": m.eps, "center": m.affine, "scale": m.affine}


def tie_norm(k: KerasLayers, m: nn.BatchNorm2d, layer: Any) -> None:
    """Tie a BatchNormalization that is built."""
    for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
        k.tie(m, ours, getattr(layer, theirs))
    for ours, theirs in (("running_mean", "moving_mean"), ("running_var", "moving_variance")):
        k.statistics.append(Tie(m, ours, getattr(layer, theirs), _as_it_is))


def _flatten(k: KerasLayers, m: nn.Flatten, name: str, x: Value) -> Value:
    if (m.start_dim, m.end_dim) != (1, -1):
        raise Unsupported(f"{name}: Flatten({m.start_dim}, {m.end_dim}) has no Keras form here; flatten from 1 to the end")
    if len(x.tensor.shape) == 2:
        return x
    _, h, w, c = x.tensor.shape
    order = torch.arange(c * h * w).view(c, h, w).permute(1, 2, 0).reshape(-1)
    return Value(k.keep(k.tf.keras.layers.Flatten(), name, x.tensor), None if c == 1 or h * w == 1 else order)


def _linear(k: KerasLayers, m: nn.Linear, name: str, x: Value) -> Value:
    return Value(k.linear(m, name, x))


def _lrn(k: KerasLayers, m: nn.LocalResponseNorm, name: str, x: Any) -> Any:
    if m.size % 2 == 0:
        raise Unsupported(f"{name}: LocalResponseNorm over {m.size} channels has no middle; Keras knows odd sizes")
    return k.tf.nn.local_response_normalization(x, m.size // 2, m.k, m.alpha / m.size, m.beta)


def _zero_pad(k: KerasLayers, m: ZeroPadShortcut, name: str, x: Any) -> Any:
    return k.tf.pad(x[:, :: m.stride, :: m.stride], [(0, 0), (0, 0), (0, 0), (m.front, m.back)])


def _mixed_pool(k: KerasLayers, m: MixedPool2d, name: str, x: Any) -> Any:
    layers, alpha = k.tf.keras.layers, np.float32(m.alpha.detach().item())
    most = k.keep(layers.MaxPooling2D(m.size), f"{name}.max", x)
    mean = k.keep(layers.AveragePooling2D(m.size), f"{name}.avg", x)
    return most * alpha + mean * (np.float32(1) - alpha)


def _relu6(k: KerasLayers, m: nn.Hardtanh, name: str, x: Any) -> Any:
    return k.tf.clip_by_value(x, m.min_val, m.max_val)


def _activation(kind: str) -> Callable[..., Any]:
    return lambda k, m, name, x: k.keep(k.tf.keras.layers.Activation(kind), name, x)


# Kind -> (what writes it, whether it takes a bare tensor and leaves a flattened map in its order).
MODULES: dict[type[nn.Module], tuple[Callable[..., Any], bool]] = {
    FakeQuant: (lambda k, m, name, x: k.quantizer(m, name, x), True),
    nn.Linear: (_linear, False),
    nn.Flatten: (_flatten, False),
    nn.Conv2d: (_conv, True),
    nn.BatchNorm2d: (_batch_norm, True),
    nn.ReLU: (lambda k, m, name, x: k.keep(k.tf.keras.layers.ReLU(), name, x), True),
    nn.Hardtanh: (_relu6, True),
    nn.Sigmoid: (_activation("sigmoid"), True),
    nn.Tanh: (_activation("tanh"), True),
    nn.MaxPool2d: (_max_pool, True),
    nn.AvgPool2d: (_avg_pool, True),
    nn.AdaptiveAvgPool2d: (_adaptive_pool, True),
    nn.LocalResponseNorm: (_lrn, True),
    MixedPool2d: (_mixed_pool, True),
    ZeroPadShortcut: (_zero_pad, True),
}
