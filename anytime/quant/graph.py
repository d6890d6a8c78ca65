"""A chain with quantizers on every link: how they are calibrated, that none is missing, and what it is when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anytime.errors import Unsupported
from anytime.model import AnytimeModel
from anytime.quant.bits import Bits, Target
from anytime.quant.fake import FakeQuant, QConv2d, QLinear, Settled, per_channel
from anytime.quant.nodes import conv_before, module_of
from anytime.quant.place import Placement, uncovered
from anytime.quant.place import Widths as Widths
from anytime.quant.ranges import NEEDS_VALUES, Histogram, Observer, activation_grid, weight_scales
from anytime.quant.trace import drop_node, links, tidy, traced

Calibration = dict[str, Histogram]  # name of a tensor -> what was seen of it
MOST_KEPT = 1 << 28  # values of all tensors that calibration holds at a time: 1 GiB


class Quantized:
    """A chain with quantizers in it, not yet calibrated.

    ``sources``: layer path -> the quantizer of the tensor that it reads. ``exclusions``: layers left in FP32 on purpose.
    """

    def __init__(self, model: AnytimeModel, sources: dict[str, FakeQuant], exclusions: tuple[str, ...]) -> None:
        self.model, self.sources, self.exclusions = model, sources, exclusions

    @property
    def bits(self) -> dict[str, Bits]:
        """Layer path -> what it multiplies."""
        return {path: Bits(layer.weight_bits, self.sources[path].bits) for path, layer in self.layers()}

    def layers(self) -> Iterator[tuple[str, QConv2d | QLinear]]:
        """Every quantized layer with its path, in the order of the chain."""
        for path, link in links(self.model):
            for name, m in link.named_modules():
                if isinstance(m, QConv2d | QLinear):
                    yield f"{path}.{name}", m

    def quantizers(self) -> list[FakeQuant]:
        """Every activation quantizer."""
        return [m for m in self.model.modules() if isinstance(m, FakeQuant)]

    def observe(self, x: Tensor, reached: Tensor | None = None, batch: int = 64, values: bool = True) -> Calibration:
        """What the float network's tensors hold for x [N, C, H, W]: every link is run, so no exit leaves anything out.

        ``reached`` [N]: the last stage that each sample enters; a stage then sees only the samples that reach it.
        ``values`` False leaves the histograms empty, for observers that need only extremes. The network
        runs once where what they need of it fits into 1 GiB, else twice; the histograms are the same.
        Unsupported without samples, and on NaN.
        """
        if len(x) == 0:
            raise Unsupported("calibration has no samples: give the data set a calib part")
        quantizers = self.quantizers()
        self.model.eval()
        for _, layer in self.layers():
            layer.on = False
        seen = {q.name: Histogram(keep=values) for q in quantizers}

        def run(mode: Literal["extremes", "values"]) -> None:
            for q in quantizers:
                q.mode, q.seen = mode, seen[q.name]
            with torch.inference_mode():
                for i in range(0, len(x), batch):
                    _watch(self.model, x[i : i + batch], None if reached is None else reached[i : i + batch])
                    if sum(h.n_kept for h in seen.values()) > MOST_KEPT:
                        for h in seen.values():
                            h.kept = None

        run("extremes")
        if values and any(h.kept is None for h in seen.values()):
            run("values")
        for h in seen.values():
            h.count()
        for q in quantizers:
            q.seen, q.mode = None, "off"
        return seen

    def calibrate(self, seen: Calibration, observer: Observer, weight_observer: Observer) -> None:
        """Choose every grid from what was observed, and start to round."""
        with torch.no_grad():
            for q in self.quantizers():
                if q.name not in seen:
                    raise Unsupported(f"calibration saw no tensor {q.name}: it is of another network; observe this one")
                # An average over tensors that take turns would be the range of none of them.
                own: Observer = "minmax" if q.shared and observer == "moving" else observer
                q.set(activation_grid(seen[q.name], own, q.bits, q.signed))
            for _, layer in self.layers():
                layer.on = True
                layer.weight_scale.copy_(weight_scales(layer.weight, layer.weight_bits, weight_observer))

    def check_coverage(self) -> None:
        """Unsupported unless every layer that multiplies is calibrated, weight and activation, or excluded by name."""
        missing = [f"{name} ({why})" for name, why in uncovered(self.model, self.sources) if name not in self.exclusions]
        if missing:
            raise Unsupported(
                f"these layers would stay in FP32 in silence: {', '.join(missing)}; exclude them by name or use a backend that knows them"
            )

    def settle(self) -> None:
        """Take over what learners have learned, then fold every BatchNorm into the convolution before it.

        Exact: a rounded channel's factor goes into its scale, the integers stay as they are (their sign may turn).
        """
        for m in (*self.quantizers(), *(layer for _, layer in self.layers())):
            m.settle()
        for _, link in links(self.model):
            for node in list(link.graph.nodes):
                source, bn = conv_before(link, node), module_of(link, node)
                conv = module_of(link, source)
                if not (isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)):
                    continue
                if isinstance(conv, QConv2d):
                    _fold(conv, bn)
                else:  # left in float
                    assert source is not None
                    link.set_submodule(str(source.target), fuse_conv_bn_eval(conv.eval(), bn.eval()))
                drop_node(link, node, node.args[0])
            tidy(link)

    def freeze(self, round_bias: bool) -> AnytimeModel:
        """Settle, put weights on their grids, and biases on the int32 grid of input scale x weight scale where an engine
        computes with such biases; return the chain in eval mode.

        A channel whose bias such an int32 cannot hold gets a wider weight scale (16 bits, or weights of next to nothing).
        """
        self.settle()
        with torch.no_grad():
            for path, layer in self.layers():
                if layer.bias is not None and round_bias:
                    layer.make_room(layer.bias, self.sources[path].scale)
                    step = self.sources[path].scale * layer.weight_scale
                    layer.bias.copy_((layer.bias / step).round() * step)
                layer.weight.copy_(layer.rounded())
        for p in self.model.parameters():
            p.requires_grad_(False)
        return self.model.eval()


def quantized(
    model: AnytimeModel, widths: Widths, target: Target, exclusions: tuple[str, ...] = (), fold_bn: bool = True
) -> Quantized:
    """A copy of a float chain with a quantizer on every tensor that a layer reads (see Placement).

    ``fold_bn`` False leaves BatchNorm behind its convolution, to be trained; ``settle`` folds it.
    """
    model = traced(model, fold_bn)
    return Quantized(model, Placement(model, widths, target, exclusions).sources, exclusions)


def prepared(
    model: AnytimeModel, calib: Tensor, widths: Widths, target: Target, observer: Observer, weight_observer: Observer,
    exclusions: tuple[str, ...] = (), fold_bn: bool = True,
) -> Quantized:  # fmt: skip
    """``quantized``, calibrated on calib [N, C, H, W], every layer covered; Unsupported names the layer that is not."""
    net = quantized(model, widths, target, exclusions, fold_bn)
    net.calibrate(net.observe(calib, values=observer in NEEDS_VALUES), observer, weight_observer)
    net.check_coverage()
    return net


def _watch(model: AnytimeModel, x: Tensor, reached: Tensor | None) -> None:
    """Run every link, on the samples that reach it."""
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions in half the time
    state: Any = x
    for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        if reached is not None:
            here = reached >= k
            if not here.any():
                return
            state, reached, x = _take(state, here), reached[here], x[here]
        state = stage(x if model.restarts else state)
        head(state)


def _take(state: Any, rows: Tensor) -> Any:
    return state[rows] if isinstance(state, Tensor) else tuple(_take(s, rows) for s in state)


def _fold(conv: QConv2d, bn: nn.BatchNorm2d) -> None:
    assert bn.running_mean is not None and bn.running_var is not None
    with torch.no_grad():
        factor = (bn.running_var + bn.eps).rsqrt() * (1.0 if bn.weight is None else bn.weight)
        weight = conv.rounded() * per_channel(factor, conv.weight)
        scale = torch.where(factor == 0, torch.ones_like(factor), conv.weight_scale * factor.abs())
        bias = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
        conv.bias = nn.Parameter(bias * factor + (0.0 if bn.bias is None else bn.bias))
    low, high = conv.weight_qmin, conv.weight_qmax
    widest = max(-low, high)
    conv.put(Settled(weight, scale, *((-widest, widest) if bool((factor < 0).any()) else (low, high))))
