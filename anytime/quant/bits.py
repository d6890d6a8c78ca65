"""Bit widths, and the integers that a target computes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

# What integers are made for, by activation and weight integers: ONNX Runtime and TFLite; OpenVINO, which multiplies the same
# but fuses more; TensorRT.
Target = Literal["u8s8", "u8s8-fused", "s8s8"]


class Bits(NamedTuple):
    """Bit widths that a layer multiplies."""

    weight: int
    activation: int


FP32 = Bits(32, 32)
INT8_WIDTHS = frozenset({Bits(8, 8), Bits(7, 8)})  # what kernels for 8 bits multiply; of 7 bits no two products overflow 16
BitMap = Mapping[str, Bits]  # layer path ("stages.0.0") -> bits; a path left out is FP32
