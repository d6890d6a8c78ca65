"""QKeras: its layers and their gradients, in TensorFlow."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from anytime.backend import Backend, Deployable, Target, TorchNet
from anytime.dataset import Part
from anytime.errors import Unsupported, UsageError
from anytime.keras_chain import KerasChain
from anytime.keras_layers import (
    Value,
    channels_last,
    conv_layout,
    depthwise,
    depthwise_layout,
    linear_layout,
    norm_form,
    tie_norm,
)
from anytime.model import AnytimeModel
from anytime.quant.fake import FakeQuant, QConv2d, QLinear, Settled, per_channel
from anytime.quant.graph import Quantized, Widths, quantized
from anytime.quant.nodes import conv_before, is_relu, module_of
from anytime.quant.ranges import Grid, Histogram
from anytime.quant.trace import drop_node, links, tidy
from anytime.spec import key
from anytime.tf import missing, tensorflow
from anytime.train import TUNE_LR_SCALE, Trainer

EXPONENTS = 8  # powers of two that are tried for a grid, from the one that covers all values down
NOTHING = 1e-12  # what a weight of a channel of zeros is in QKeras


@dataclass(frozen=True)
class QKeras(Backend):
    """Trained for ``epochs`` through QKeras' layers, from the float network, every rounding in the forward pass.

    Activations lie on grids of a power of two, quantized_relu where nothing is negative, else quantized_bits; the power is the
    one with the least squared error on the calibration part, among ranges of at least 1. Weights are binary (1 bit), ternary
    (2) or quantized_bits (3 and more), their scales ``alpha`` per channel, computed anew at every step. ``edge_bits``: the
    first layer and each head's last one. ``add_bits``: tensors that an addition or a pooling reads too (0: as
    ``activation_bits``). ``keep_float``: layers left out, by path. ``fold_bn`` folds BatchNorm before; else it is trained in
    QConv2DBatchnorm, its statistics for the first ``freeze_bn`` of the epochs. Biases and logits stay in float.
    TensorFlow computes logits and gradients; optimizer, schedule, loss over the exits, batches and checkpoints are the
    recipe's own, at ``lr_scale`` times its rate. What is kept is a twin in torch, on the same grids.
    Source: Coelho et al., Nature Machine Intelligence 2021, arXiv:2006.10159; QKeras 0.9.0. Deviations: QKeras' clipping of
    stored weights to [-1, 1] is left out (its scales need none); shares of mixed poolings do not learn.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    epochs: int = 3
    lr_scale: float = TUNE_LR_SCALE
    alpha: Literal["auto", "auto_po2"] = "auto"
    edge_bits: int = 8
    keep_float: tuple[str, ...] = ()
    add_bits: int = 0
    fold_bn: bool = True
    freeze_bn: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.freeze_bn <= 1:
            raise UsageError(f"QKeras: freeze_bn={self.freeze_bn} is a share: give 0 to 1")

    @property
    def column(self) -> str:
        weight, activation = self.weight_bits, self.activation_bits
        return f"INT{weight} QKeras" if weight == activation else f"W{weight}A{activation} QKeras"

    def why_not(self) -> str | None:
        return missing("qkeras", "pyparsing")

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        if trainer.recipe.orthogonal != "no":
            raise Unsupported(
                f"{self.label}: TensorFlow gives one gradient for all exits together, and OSGD takes one for each: "
                "use recipe.orthogonal='no'"
            )
        widths = Widths(max(self.weight_bits, 2), self.activation_bits, self.edge_bits, self.add_bits)
        net = quantized(model, widths, target, self.keep_float, self.fold_bn)
        seen = net.observe(calib.x)
        for q in net.quantizers():
            fixed_point(q, seen[q.name], signed=target == "s8s8" or seen[q.name].low < 0)
        for _, layer in net.layers():
            if self.weight_bits == 1 and layer.weight_bits == 2:
                layer.weight_bits = 1
            layer.weight_scale.fill_(1.0)  # QKeras' own come with the weights
            with torch.no_grad():  # QKeras divides by the largest weight of a channel
                layer.weight[(layer.weight == 0).flatten(1).all(1)] = NOTHING
        net.check_coverage()
        keras = QKerasChain(net, tuple(calib.x.shape[1:]), self.alpha)
        student = _InKeras(net.model, keras, self.freeze_bn)
        trainer.fit(
            student, name=f"{key(self)}-{target}", epochs=self.epochs, lr_scale=self.lr_scale, precision="fp32",
            each_epoch=_begin_epoch,
        )  # fmt: skip
        net.model.trained_on = student.trained_on
        keras.carry()
        facts = {"library": f"QKeras {version('qkeras')}, TensorFlow {version('tensorflow')}", **keras.statistics_of_qtools(net)}
        keras.settle(net)
        bits = net.bits
        about = {"simulated": "float kernels imitate the integers; biases are float", "exclusions": ", ".join(net.exclusions)}
        # QKeras adds its biases unrounded.
        return TorchNet(
            net.freeze(round_bias=False), bits, simulated=True, execution="fake-quant", facts={**about, "target": target, **facts}
        )


def fixed_point(q: FakeQuant, seen: Histogram, signed: bool) -> None:
    """Give a quantizer the grid of a power of two with the least squared error on what was seen, with a range of at least 1."""
    q.signed = signed
    q.resize(q.bits)
    if seen.amax == 0:
        return q.set(Grid(1.0, 0, q.qmin, q.qmax))
    finest = -(q.bits - signed)  # QKeras takes 2 to the power of its integer bits in integers, where 2^-1 is an error
    values, widest = seen.centres, max(int(np.ceil(np.log2(seen.amax / q.qmax))), finest)

    def error(exponent: int) -> float:
        on_grid = np.clip(np.rint(values / 2.0**exponent), q.qmin, q.qmax) * 2.0**exponent
        return float((seen.counts * (on_grid - values) ** 2).sum())

    best = min(range(widest, max(widest - EXPONENTS, finest - 1), -1), key=error)
    q.set(Grid(2.0**best, 0, q.qmin, q.qmax))


class QKerasChain(KerasChain):
    """A chain with quantizers in QKeras' layers; a BatchNorm behind a convolution is folded into it as QConv2DBatchnorm does."""

    def __init__(self, net: Quantized, input_shape: tuple[int, ...], alpha: str = "auto") -> None:
        tensorflow()  # before QKeras imports it
        with _quiet():
            import qkeras

        self.qkeras, self.alpha = qkeras, alpha
        self.norms: dict[nn.Module | None, nn.BatchNorm2d] = {}  # convolution -> the BatchNorm that is folded into it
        for _, link in links(net.model):
            for node in link.graph.nodes:
                norm, conv = module_of(link, node), module_of(link, conv_before(link, node))
                if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, QConv2d):
                    self.norms[conv] = norm
        with _quiet():
            super().__init__(net.model, input_shape)

    def module(self, link: fx.GraphModule, node: fx.Node, m: nn.Module, name: str, x: Value) -> Value:
        if any(m is norm for norm in self.norms.values()):
            return x
        if is_relu(link, node) and all(_is_quantized_relu(module_of(link, reader)) for reader in node.users):
            return x  # quantized_relu is a ReLU too
        return super().module(link, node, m, name, x)

    def quantizer(self, m: FakeQuant, name: str, x: Any) -> Any:
        return self.keep(self.qkeras.QActivation(_activation(m)), name, x)

    def conv(self, m: nn.Conv2d, name: str, x: Any, padding: str) -> Any:
        if not isinstance(m, QConv2d):
            return super().conv(m, name, x, padding)
        norm, kind = self.norms.get(m), "QDepthwiseConv2D" if depthwise(m) else "QConv2D"
        if m.groups > 1 and not depthwise(m):
            raise Unsupported(f"{name}: QKeras has no convolution of {m.groups} groups; name it in keep_float")
        form = {"strides": m.stride, "padding": padding, "dilation_rate": m.dilation, "use_bias": m.bias is not None}
        if norm is not None:
            kind, form = kind + "Batchnorm", form | norm_form(norm)
        make = getattr(self.qkeras, kind)
        if depthwise(m):
            multiplier = m.out_channels // m.groups
            layer = make(m.kernel_size, depth_multiplier=multiplier, depthwise_quantizer=self._weight(m), **form)
        else:
            layer = make(m.out_channels, m.kernel_size, kernel_quantizer=self._weight(m), **form)
        out = self.keep(layer, name, x)
        if depthwise(m):
            self.tie(m, "weight", layer.depthwise_kernel, lambda w: depthwise_layout(w, m.groups))
        else:
            self.tie(m, "weight", layer.kernel, conv_layout)
        self.tie(m, "bias", layer.bias)
        if norm is not None:
            tie_norm(self, norm, layer.batchnorm)
        return out

    def linear(self, m: nn.Linear, name: str, x: Value) -> Any:
        if not isinstance(m, QLinear):
            return super().linear(m, name, x)
        layer = self.qkeras.QDense(m.out_features, use_bias=m.bias is not None, kernel_quantizer=self._weight(m))
        out = self.keep(layer, name, x.tensor)
        self.tie(m, "weight", layer.kernel, linear_layout(x.order))
        self.tie(m, "bias", layer.bias)
        return out

    def _weight(self, m: QConv2d | QLinear) -> Any:
        if m.weight_bits <= 2:
            return (self.qkeras.binary if m.weight_bits == 1 else self.qkeras.ternary)(alpha=self.alpha)
        return self.qkeras.quantized_bits(m.weight_bits, 0, alpha=self.alpha)

    def settle(self, net: Quantized) -> None:
        """Bring QKeras' rounded weights, their scales and its folded BatchNorm back to torch."""
        ties = {(tie.module, tie.name): tie for tie in self.weights}
        for path, m in net.layers():
            layer, tie = self.layers[path], ties[m, "weight"]
            if m in self.norms:
                kernel, bias = layer.get_folded_weights()
                m.bias = nn.Parameter(torch.from_numpy(np.array(bias)))
            else:
                kernel = tie.variable
            kernel = self.tf.convert_to_tensor(kernel)
            quantizer = layer.get_quantizers()[0]
            rounded = quantizer(kernel).numpy()
            # quantized_bits' scale is that of fractions, the others' that of -1, 0 and 1.
            step = np.array(quantizer.scale) / (2 ** (m.weight_bits - 1) if m.weight_bits > 2 else 1)
            weight, steps = (_back(tie.layout, np.broadcast_to(a, rounded.shape), m.weight) for a in (rounded, step))
            scale = steps.flatten(1)[:, 0]
            alive = scale > NOTHING
            most = max(2 ** (m.weight_bits - 1) - 1, 1)
            m.put(Settled(weight * per_channel(alive, weight), torch.where(alive, scale, 1.0), -most, most))
            m.on = True
        folded = list(self.norms.values())
        for _, link in links(net.model):
            for node in list(link.graph.nodes):
                if any(module_of(link, node) is norm for norm in folded):
                    drop_node(link, node, node.args[0])
            tidy(link)

    def statistics_of_qtools(self, net: Quantized) -> dict[str, str]:
        """QKeras' own counts: operations by kind and width, and energy; a sentence where it fails."""
        try:
            with _quiet():
                from qkeras.estimate import extract_model_operations
                from qkeras.qtools import run_qtools
                from qkeras.qtools.settings import cfg

                energy, operations = {}, Counter[str]()
                for path, link in self.links.items():
                    if not any(layer.weights for layer in link.layers):
                        continue
                    entering = [_activation(q) for q in _enters(net, path)] or ["quantized_bits(8, 0)"]
                    sources = [self.qkeras.get_quantizer(entering[0]) for _ in link.inputs]
                    tools = run_qtools.QTools(link, process="horowitz", source_quantizers=sources, is_inference=False)
                    said = tools.pe(
                        weights_on_memory="fixed", activations_on_memory="fixed", min_sram_size=8 * 16 * 1024 * 1024,
                        rd_wr_on_io=False,
                    )  # fmt: skip
                    energy[path] = tools.extract_energy_sum(cfg.include_energy, said)
                    for op in extract_model_operations(link).values():
                        kind, _, (weight, activation), _ = op["type"]
                        operations[f"{kind} {weight}x{activation}"] += op["number_of_operations"]
        except Exception as error:  # a peer's failure is a fact about the peer
            return {"qtools": f"QTools fails: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        return {
            "qtools_energy_pj": ", ".join(f"{path} {pj}" for path, pj in energy.items())
            + " (horowitz, memory 'fixed'"
            + ("; it counts layers with a folded BatchNorm as 0)" if self.norms else ")"),
            "qtools_operations": ", ".join(f"{kind} {n}" for kind, n in sorted(operations.items())),
        }


def _is_quantized_relu(m: nn.Module | None) -> bool:
    return isinstance(m, FakeQuant) and not m.signed


def _activation(q: FakeQuant) -> str:
    """QKeras' name of a grid of a power of two."""
    exponent = round(float(torch.log2(q.scale)))
    if q.signed:
        return f"quantized_bits({q.bits}, {exponent + q.bits - 1})"
    return f"quantized_relu({q.bits}, {exponent + q.bits})"


def _enters(net: Quantized, path: str) -> Iterable[FakeQuant]:
    """Quantizers of other links whose tensors the layers of a link read."""
    return (q for layer, q in net.sources.items() if layer.startswith(f"{path}.") and not q.name.startswith(f"{path}:"))


def _back(layout: Any, array: Any, like: Tensor) -> Tensor:
    """An array in Keras' layout as torch has it."""
    at = layout(torch.arange(like.numel()).view(like.shape)).reshape(-1)
    out = torch.empty(like.numel())
    out[at] = torch.from_numpy(np.array(array, np.float32)).reshape(-1)
    return out.view(like.shape)


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# Training


class _InKeras(AnytimeModel):
    """The chain whose logits and gradients Keras computes; what learns are torch's parameters."""

    def __init__(self, of: AnytimeModel, keras: KerasChain, freeze_bn: float) -> None:
        super().__init__(of.stages, of.heads, of.restarts)
        self.trained_on = of.trained_on
        self.keras, self.freeze_bn, self.call = keras, freeze_bn, None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        return _Step.apply(self, x, *(tie.there for tie in self.keras.weights))  # type: ignore[no-any-return, no-untyped-call]


def _begin_epoch(student: Any, done: float) -> None:
    """Make dropout depend on the epoch's seed alone, and let BatchNorm's statistics rest from ``freeze_bn`` on."""
    keras = student.keras
    keras.tf.random.set_seed(torch.initial_seed() % 2**31)
    for layer in keras.layers.values():
        if done >= student.freeze_bn and hasattr(layer, "ema_freeze_delay"):
            layer.ema_freeze_delay = 0
            layer._iteration.assign(1)
    model = keras.whole()
    signature = keras.tf.TensorSpec((None, *keras.states[0]), keras.tf.float32)
    # A graph of its own: random operators begin anew, and the choice above is read again.
    student.call = keras.tf.function(lambda x: model(x, training=True), input_signature=[signature])


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: _InKeras, x: Tensor, *weights: Tensor) -> Tensor:
        keras = student.keras
        keras.carry()
        with keras.tf.GradientTape() as tape:
            logits = student.call(channels_last(x).float().cpu().contiguous().numpy())  # type: ignore[misc]
        for tie in keras.statistics:
            with torch.no_grad():
                tie.there.copy_(torch.from_numpy(tie.variable.numpy()))
        ctx.made = keras, tape, logits
        return torch.from_numpy(logits.numpy()).to(x.device)

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> Any:
        keras, tape, logits = ctx.made
        variables = [tie.variable for tie in keras.weights]
        found = tape.gradient(
            logits, variables, output_gradients=d_logits.cpu().contiguous().numpy(), unconnected_gradients="zero"
        )
        return None, None, *(torch.from_numpy(g.numpy()).to(d_logits.device) for g in found)
