"""A traced chain in Keras, link by link: channels last, weights carried over. TensorFlow is imported inside functions only."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from anytime.errors import AnytimeError, Unsupported
from anytime.layers import MixedPool2d, ZeroPadShortcut
from anytime.model import AnytimeModel, Segment
from anytime.quant.fake import FakeQuant
from anytime.quant.trace import is_add, is_relu, links

INSTALL = "pip install 'anytime[qkeras]'"


def missing(*packages: str) -> str | None:
    """Why TensorFlow and ``packages`` cannot be imported here, with the command that mends it; None when they can."""
    absent = [name for name in ("tensorflow", "tf_keras", *packages) if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} is not installed: {INSTALL}"
    if "qkeras" in packages and _overwritten():
        return (
            "HGQ2 was installed over QKeras' package qkeras: "
            "pip uninstall -y HGQ2 && pip install --force-reinstall --no-deps qkeras==0.9.0"
        )
    return None


def _overwritten() -> bool:
    """Whether HGQ2, which ships a package ``qkeras`` of its own, is here or has left a hole when it went."""
    spec = find_spec("qkeras")
    if spec is None or spec.origin is None:
        return True
    try:
        distribution("HGQ2")
    except PackageNotFoundError:
        return False
    return True


def tensorflow() -> Any:
    """The module, with Keras 2 behind ``tf.keras``: QKeras knows no other. It takes torch's number of threads at first use."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    if not tf.keras.layers.Layer.__module__.startswith("tf_keras"):
        raise AnytimeError(
            "TensorFlow was imported with Keras 3 before this: set TF_USE_LEGACY_KERAS=1 in the environment and start again"
        )
    try:
        tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        pass  # it has run something already and keeps its threads
    return tf


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


class KerasChain:
    """The links of a traced ``chain`` as Keras models; a layer without a Keras form raises Unsupported by its name.

    ``links``: "stages.0" -> model; layers bear their paths. ``weights`` and ``statistics`` tie what is learned and what
    BatchNorm counts to torch. Quantizers become fake_quant operators of the same grid, from which TensorFlow's converter takes
    its integers; weights stand on their grid already. A mixed pooling keeps its share as a constant.
    """

    def __init__(self, chain: AnytimeModel, input_shape: tuple[int, ...]) -> None:
        self.tf = tensorflow()
        self.chain = chain
        self.links: dict[str, Any] = {}
        self.layers: dict[str, Any] = {}
        self.weights: list[Tie] = []
        self.statistics: list[Tie] = []
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

    def carry(self) -> None:
        """Bring torch's weights and statistics to Keras."""
        for tie in (*self.weights, *self.statistics):
            tie.carry()

    def segment(self, segment: Segment) -> Any:
        """The model of one segment: from the state (or the input) to its logits, if it has a head, then the state
        after it, unless nothing can follow; a list of tensors."""
        first, stop, head = segment
        restarts = self.chain.restarts
        fresh = first == 0 or (restarts and stop > first)
        inputs = value = self._inputs(self.states[0 if fresh else first], "x" if fresh else "state")
        for k in range(first, stop)[-1:] if restarts else range(first, stop):
            value = self.links[f"stages.{k}"](value)
        outputs = [] if head is None else [self.links[f"heads.{head}"](value)]
        if stop > first and (head is None or (stop < self.chain.n_exits and not restarts)):
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
            elif node.op == "call_function" and node.target is getitem:
                values[node] = get(node.args[0])[node.args[1]]
            elif module is not None:
                values[node] = self.module(link, node, module, name, get(node.args[0]))
            else:
                values[node] = self._call(link, node, name, get(node.args), {k: get(v) for k, v in node.kwargs.items()})
        raise AssertionError("a graph without an output")

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
        if is_add(node) and isinstance(args[1], Value):
            return Value(self.keep(layers.Add(), name, [self._plain(args[0]), self._plain(args[1])]))
        if is_relu(link, node):
            return Value(self.keep(layers.ReLU(), name, args[0].tensor), args[0].order)
        if target is torch.cat and (kwargs.get("dim") or (args[1:] or [0])[0]) == 1:
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


def _shapes(state: Any) -> Any:
    """Shapes without the batch, channels last, nested as the state is."""
    if isinstance(state, Tensor):
        return tuple(state.shape[2:]) + (state.shape[1],) if state.ndim == 4 else tuple(state.shape[1:])
    return [_shapes(s) for s in state]


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


def _conv(k: KerasChain, m: nn.Conv2d, name: str, x: Any) -> Any:
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


def _max_pool(k: KerasChain, m: nn.MaxPool2d, name: str, x: Any) -> Any:
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


def _avg_pool(k: KerasChain, m: nn.AvgPool2d, name: str, x: Any) -> Any:
    padding = _pair(m.padding)
    if m.ceil_mode or m.divisor_override or (any(padding) and not m.count_include_pad):
        raise Unsupported(
            f"{name}: AvgPool2d with ceil_mode, divisor_override or padding that is not counted has no Keras form here"
        )
    if any(padding):
        x = k.keep(k.tf.keras.layers.ZeroPadding2D(padding), f"{name}.pad", x)
    return k.keep(k.tf.keras.layers.AveragePooling2D(_pair(m.kernel_size), _pair(m.stride)), name, x)


def _adaptive_pool(k: KerasChain, m: nn.AdaptiveAvgPool2d, name: str, x: Any) -> Any:
    have, want = tuple(x.shape[1:3]), _pair(m.output_size)
    if any(w is None or h % w for h, w in zip(have, want, strict=True)):
        raise Unsupported(f"{name}: AdaptiveAvgPool2d from {have} to {want} has no Keras form here; use a divisor of the map")
    if want == (1, 1):  # a mean, which in integers may leave its input's grid; a pooling may not
        return k.keep(k.tf.keras.layers.GlobalAveragePooling2D(keepdims=True), name, x)
    window = tuple(h // w for h, w in zip(have, want, strict=True))
    return k.keep(k.tf.keras.layers.AveragePooling2D(window), name, x)


def _batch_norm(k: KerasChain, m: nn.BatchNorm2d, name: str, x: Any) -> Any:
    layer = k.tf.keras.layers.BatchNormalization(**norm_form(m))
    out = k.keep(layer, name, x)
    tie_norm(k, m, layer)
    return out


def norm_form(m: nn.BatchNorm2d) -> dict[str, Any]:
    """Arguments of Keras' BatchNormalization."""
    return {"momentum": 1 - (m.momentum or 0.0), "epsilon": m.eps, "center": m.affine, "scale": m.affine}


def tie_norm(k: KerasChain, m: nn.BatchNorm2d, layer: Any) -> None:
    """Tie a BatchNormalization that is built."""
    for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
        k.tie(m, ours, getattr(layer, theirs))
    for ours, theirs in (("running_mean", "moving_mean"), ("running_var", "moving_variance")):
        k.statistics.append(Tie(m, ours, getattr(layer, theirs), _as_it_is))


def _flatten(k: KerasChain, m: nn.Flatten, name: str, x: Value) -> Value:
    if (m.start_dim, m.end_dim) != (1, -1):
        raise Unsupported(f"{name}: Flatten({m.start_dim}, {m.end_dim}) has no Keras form here; flatten from 1 to the end")
    if len(x.tensor.shape) == 2:
        return x
    _, h, w, c = x.tensor.shape
    order = torch.arange(c * h * w).view(c, h, w).permute(1, 2, 0).reshape(-1)
    return Value(k.keep(k.tf.keras.layers.Flatten(), name, x.tensor), None if c == 1 or h * w == 1 else order)


def _linear(k: KerasChain, m: nn.Linear, name: str, x: Value) -> Value:
    return Value(k.linear(m, name, x))


def _lrn(k: KerasChain, m: nn.LocalResponseNorm, name: str, x: Any) -> Any:
    if m.size % 2 == 0:
        raise Unsupported(f"{name}: LocalResponseNorm over {m.size} channels has no middle; Keras knows odd sizes")
    return k.tf.nn.local_response_normalization(x, m.size // 2, m.k, m.alpha / m.size, m.beta)


def _zero_pad(k: KerasChain, m: ZeroPadShortcut, name: str, x: Any) -> Any:
    return k.tf.pad(x[:, :: m.stride, :: m.stride], [(0, 0), (0, 0), (0, 0), (m.front, m.back)])


def _mixed_pool(k: KerasChain, m: MixedPool2d, name: str, x: Any) -> Any:
    layers, alpha = k.tf.keras.layers, np.float32(m.alpha.detach().item())
    most = k.keep(layers.MaxPooling2D(m.size), f"{name}.max", x)
    mean = k.keep(layers.AveragePooling2D(m.size), f"{name}.avg", x)
    return most * alpha + mean * (np.float32(1) - alpha)


def _relu6(k: KerasChain, m: nn.Hardtanh, name: str, x: Any) -> Any:
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
