"""What scales or averages every channel by itself, as a convolution of one channel each: integers in, integers out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from anytime.quant.fake import FakeQuant, QConv2d


def channelwise(m: nn.Module, grid: FakeQuant, channels: int) -> nn.Module:
    """BatchNorm behind no convolution, or average pooling, of ``channels`` on an 8-bit ``grid`` as a QConv2d; else ``m`` itself.

    ONNX Runtime has no integer kernel for the first, which costs a DQ, two transpositions and a Q, and a slow one for the second
    (benchmarks/channelwise.py); OpenVINO is a tenth slower or faster, and no longer dies of DenseNets (tests/test_openvino.py). A
    weight that is alone in its channel lies on its grid whatever it is, so only BatchNorm's shift is rounded: to 1/127 of what one
    step of the input makes.
    """
    if grid.bits > 8:
        return m
    if isinstance(m, nn.BatchNorm2d):
        conv = nn.Conv2d(channels, channels, 1, groups=channels)
        one, zero = torch.ones_like(conv.weight), torch.zeros(channels)
        assert m.running_mean is not None and m.running_var is not None
        weight, bias = fuse_conv_bn_weights(one, zero, m.running_mean, m.running_var, m.eps, m.weight, m.bias)
        return _on_grid(conv, weight, bias, steps=127, grid=grid)
    if (
        isinstance(m, nn.AvgPool2d)
        and (m.count_include_pad or m.padding in (0, (0, 0)))
        and not (m.ceil_mode or m.divisor_override)
    ):
        conv = nn.Conv2d(channels, channels, m.kernel_size, m.stride, m.padding, groups=channels, bias=False)
        return _on_grid(conv, torch.full_like(conv.weight, 1 / conv.weight[0].numel()), None, steps=1, grid=grid)
    return m


def _on_grid(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, steps: int, grid: FakeQuant) -> QConv2d:
    """``conv`` with these weights, the largest of each channel ``steps`` of its grid."""
    made = QConv2d(conv, 8)
    with torch.no_grad():
        made.weight.copy_(weight)
        largest = weight.flatten(1).abs().amax(1) / steps
        made.weight_scale.copy_(torch.where(largest > 0, largest, 1.0))
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
            made.make_room(bias, grid.scale)
    return made.requires_grad_(False)
