"""Tensors laid out channels last."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(t: Tensor) -> Tensor:
    """In the layout in which convolutions of few channels are two to three times faster."""
    return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.contiguous_format)


def flat(t: Tensor) -> Tensor:
    """As a vector, in the order of channels_last."""
    return (t.permute(0, 2, 3, 1) if t.ndim == 4 else t).reshape(-1)


def take(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of what is laid out by channels_last, in that layout."""
    return t.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2) if t.ndim == 4 else t.index_select(0, rows)
