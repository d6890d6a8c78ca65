"""Augmentation of whole batches of tensors, after normalisation, drawn from a generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample

from anytime.dataset import Augment


def crop(x: Tensor, generator: Generator, padding: int = 4, fill: Sequence[float] = (0.0,)) -> Tensor:
    """Shift each image by up to ``padding`` whole pixels, up or down and left or right.

    x [B, C, H, W]. ``fill`` is what comes in from outside, one value per channel or one for all; 0 is the
    mean colour of a normalised image.

    Source: He et al. 2015, "Deep Residual Learning", section 4.2: padded by 4, a random crop of the old size.
    """
    b, c, h, w = x.shape
    padded = _per_channel(fill, x).expand(b, c, h + 2 * padding, w + 2 * padding).clone()
    padded[:, :, padding : padding + h, padding : padding + w] = x
    at = torch.randint(2 * padding + 1, (2, b), generator=generator)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view: [B, C, rows, columns, H, W]
    return windows[torch.arange(b), :, at[0], at[1]]


def flip(x: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2; x [B, C, H, W]."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)


def cutout(x: Tensor, generator: Generator, side: int) -> Tensor:
    """Paint a square of ``side`` pixels, cut off where it leaves the image, in 0, the mean colour; x [B, C, H, W].

    Its centre is any pixel. Source: DeVries and Taylor 2017, arXiv:1708.04552, section 3.2.
    """
    b, _, h, w = x.shape
    top = torch.randint(h, (b, 1), generator=generator) - side // 2
    left = torch.randint(w, (b, 1), generator=generator) - side // 2
    rows, columns = (((at := torch.arange(n)) >= first) & (at < first + side) for n, first in ((h, top), (w, left)))
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def affine(
    x: Tensor,
    generator: Generator,
    degrees: float = 10.0,
    translate: float = 2.0,
    scale: tuple[float, float] = (0.9, 1.1),
    shear: float = 0.0,
    fill: Sequence[float] = (0.0,),
) -> Tensor:
    """Turn, shift, scale and shear each image about its centre, each drawn uniformly.

    x [B, C, H, W]. ``degrees`` and ``shear`` are the largest angles, ``translate`` the largest shift in pixels
    on each axis, all to either side; ``scale`` lies between its two factors. ``fill`` as in ``crop``.
    """
    u = torch.rand(5, len(x), generator=generator)
    either = 2 * u - 1
    return warp(
        x,
        turn=either[0] * math.radians(degrees),
        shift=either[1:3].T * translate,
        scale=scale[0] + u[3] * (scale[1] - scale[0]),
        shear=either[4] * math.radians(shear),
        fill=fill,
    )


def warp(x: Tensor, turn: Tensor, shift: Tensor, scale: Tensor, shear: Tensor, fill: Sequence[float] = (0.0,)) -> Tensor:
    """Map pixel p (x, y from the centre) of each image to R(turn) S(shear) scale p + shift, bilinearly.

    x [B, C, H, W]; ``turn`` (clockwise on the screen, where y points down) and ``shear`` [B] in radians,
    ``shift`` [B, 2] in pixels, ``scale`` [B].
    """
    h, w = x.shape[2:]
    cos, sin, k = turn.cos(), turn.sin(), shear.tan()
    # grid_sample asks where each output pixel comes from: the inverse map, in units of half the image's sides.
    inverse = torch.stack([cos + k * sin, sin - k * cos, -sin, cos], 1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    sides = torch.tensor([w, h], dtype=x.dtype)
    theta = torch.cat([inverse * sides / sides[:, None], -(inverse @ shift[:, :, None]) * 2 / sides[:, None]], 2)
    outside = _per_channel(fill, x)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x - outside, grid, align_corners=False) + outside


def compose(*steps: Augment) -> Augment:
    """One augmentation after the other."""
    return partial(_in_turn, steps=steps)


def _in_turn(x: Tensor, generator: Generator, steps: Sequence[Augment]) -> Tensor:
    for step in steps:
        x = step(x, generator)
    return x


def _per_channel(fill: Sequence[float], x: Tensor) -> Tensor:
    return torch.tensor(fill, dtype=x.dtype).view(1, -1, 1, 1)
