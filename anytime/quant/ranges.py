"""From what was seen of a tensor to the range that its integers cover."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anytime.errors import Unsupported
from anytime.metrics import Floats

Observer = Literal["minmax", "moving", "percentile", "mse", "entropy"]
NEEDS_VALUES = ("percentile", "mse", "entropy")  # the others only ask for extremes
BINS = 2048  # TensorRT's
MOVING_BATCH, MOVING_SHARE = 32, 0.1  # "moving": how many samples make a batch, and what share of the average a new one takes
MANY = 1 << 12  # values of a sample from which on a histogram takes a part of them
TINY = 1e-30  # a range under this is nothing but zeros: its step would not be a normal float32


class Grid(NamedTuple):
    """Integers qmin..qmax; real = scale * (q - zero_point)."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int


class Histogram:
    """What calibration saw of one tensor: exact extremes, then 2,048 bins of x and of |x|.

    Bins need the extremes first, so that they never depend on the order of the batches: they are filled in a second pass
    over the same samples, or, with ``keep``, by ``count`` from what the first pass kept of them.
    """

    def __init__(self, keep: bool = False) -> None:
        self.kept: list[tuple[Tensor, int]] | None = [] if keep else None
        self.low, self.high = np.inf, -np.inf
        self.moving: tuple[float, float] | None = None  # moving average of the batches' extremes
        self.counts = np.zeros(BINS)  # over [low, high]
        self.abs_counts = np.zeros(BINS)  # over [0, max(|low|, |high|)]

    def see_extremes(self, x: Tensor) -> None:
        """First pass. Unsupported on NaN or infinity."""
        rows = _in_memory_order(x).reshape(len(x), -1)
        lows, highs = rows.amin(1), rows.amax(1)  # eight times as fast as aminmax along a dimension
        low, high = float(lows.min()), float(highs.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise Unsupported(
                "calibration met NaN or infinity in an activation: the float network is broken on its calibration images"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        for some_lows, some_highs in zip(torch.split(lows, MOVING_BATCH), torch.split(highs, MOVING_BATCH), strict=True):
            new = float(some_lows.min()), float(some_highs.max())
            old = self.moving or new
            share = MOVING_SHARE * len(some_lows) / MOVING_BATCH  # where few samples come this far a batch may be one of them
            self.moving = (old[0] + share * (new[0] - old[0]), old[1] + share * (new[1] - old[1]))
        if self.kept is not None:
            values, step = _thinned(x)
            self.kept.append((values.clone(), step))

    def see_values(self, x: Tensor) -> None:
        """Second pass."""
        self._count(*_thinned(x))

    def count(self) -> None:
        """In place of the second pass: the same values, if all were kept."""
        for values, step in self.kept or ():
            self._count(values, step)
        self.kept = None

    def _count(self, x: Tensor, step: int) -> None:
        if self.high > self.low:
            self.counts += step * _binned(x, self.low, self.high)
        if self.low == 0:
            self.abs_counts = self.counts  # the same bins
        elif self.amax > 0:
            self.abs_counts += step * _binned(x.abs(), 0.0, self.amax)

    @property
    def n_kept(self) -> int:
        """How many values it holds."""
        return sum(len(values) for values, _ in self.kept or ())

    @property
    def amax(self) -> float:
        """Largest |x|."""
        return max(abs(self.low), abs(self.high))

    @property
    def centres(self) -> Floats:
        """Middle of each bin of ``counts``."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        return np.asarray((edges[:-1] + edges[1:]) / 2)


def _in_memory_order(x: Tensor) -> Tensor:
    """float32, dimensions after the first permuted so that they lie in memory one after another."""
    x = x.detach().float()
    return x.permute(0, 2, 3, 1) if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x


def _thinned(x: Tensor) -> tuple[Tensor, int]:
    """Flat; of large samples every 11th value, or another prime that does not divide the channels: it would always meet the same.

    And the step, to count each value so many times: every sample weighs alike, however few came this far in its batch, and so does every
    tensor of a grid that several share.
    """
    x = _in_memory_order(x)
    step = next((prime for prime in (11, 13, 17, 19) if x.shape[-1] % prime), 1) if x.shape[1:].numel() > MANY else 1
    return x.reshape(-1)[::step], step


def _binned(x: Tensor, low: float, high: float) -> Floats:
    """How many of x, all in [low, high], lie in each of BINS bins: torch.histc, which takes three times as long."""
    counts = torch.bincount(x.sub(low).mul_(BINS).div_(high - low).to(torch.int16), minlength=BINS + 1).numpy()
    counts[BINS - 1] += counts[BINS]  # the last bin holds its upper edge
    return counts[:BINS]


def affine(low: float, high: float, bits: int) -> Grid:
    """Unsigned grid over [low, high], stretched so that 0 is an integer exactly (padding needs it)."""
    low, high = min(low, 0.0), max(high, 0.0)
    qmax = 2**bits - 1
    if high - low < TINY:
        return Grid(1.0, 0, 0, qmax)
    scale = (high - low) / qmax
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, qmax)), 0, qmax)


def symmetric(amax: float, bits: int, narrow: bool) -> Grid:
    """Signed grid with zero point 0; ``narrow`` leaves out the lowest integer (weights), TensorRT's activations do not."""
    qmax = 2 ** (bits - 1) - 1
    return Grid(amax / qmax if amax >= TINY else 1.0, 0, -qmax if narrow else -qmax - 1, qmax)


def activation_grid(h: Histogram, observer: Observer, bits: int, signed: bool, percentile: float = 99.99) -> Grid:
    """Per-tensor grid: affine unsigned (CPU engines), or symmetric signed (TensorRT).

    minmax; moving: an exponential moving average of the extremes of batches of 32; percentile: both tails in the affine
    case, |x| in the symmetric; mse: of 81 shrunk ranges the one with the least squared error on the histogram, by which the
    values' own error came out up to 1 % above the least of all (2 to 8 bits, normal, t, exponential and rectified samples);
    entropy: TensorRT's search on |x|, cut to the range seen.
    Source: Jacob et al. 2018 (affine), NVIDIA GTC 2017 S7310 (entropy), ``reference/quantization.md`` section c.
    """
    if not np.isfinite(h.amax):
        raise Unsupported("an activation was never seen: calibration needs at least one sample")
    if observer == "percentile":
        low, high = _tails(h, percentile)
        amax = _edge(h.abs_counts, percentile / 100, 0.0, h.amax)
    elif observer == "entropy":
        levels = 2**bits if h.low >= 0 and not signed else 2 ** (bits - 1)
        amax = entropy_amax(h.abs_counts, h.amax, levels)
        low, high = max(h.low, -amax), min(h.high, amax)
    else:
        low, high = h.moving if observer == "moving" and h.moving is not None else (h.low, h.high)
        amax = max(abs(low), abs(high))
    if observer != "mse":
        return symmetric(amax, bits, narrow=False) if signed else affine(low, high, bits)
    grids = [symmetric(s * amax, bits, False) if signed else affine(s * low, s * high, bits) for s in SHRINK]
    return grids[int(np.argmin(_squared_errors(h.centres, h.counts, grids)))]


SHRINK = np.linspace(1.0, 0.2, 81)  # BRECQ's grid of 1 % steps


def _squared_errors(values: Floats, counts: Floats, grids: list[Grid]) -> Floats:
    """Of every grid [G], over ``counts`` values at ``values`` [V]."""
    scale, zero, qmin, qmax = (np.array(field, dtype=np.float64)[:, None] for field in zip(*grids, strict=True))
    error = np.rint(values / scale)  # [G, V]
    np.clip(error, qmin - zero, qmax - zero, out=error)
    error *= scale
    error -= values
    error *= error
    return np.asarray(error @ counts)


def _edge(counts: Floats, share: float, low: float, high: float) -> float:
    """Smallest bin edge under which at least ``share`` of the mass lies."""
    total = counts.sum()
    if total == 0:
        return high
    i = int(np.searchsorted(np.cumsum(counts), share * total))
    return low + (high - low) * (min(i, len(counts) - 1) + 1) / len(counts)


def _tails(h: Histogram, percentile: float) -> tuple[float, float]:
    high = _edge(h.counts, percentile / 100, h.low, h.high)
    low = -_edge(h.counts[::-1], percentile / 100, -h.high, -h.low)
    return low, high


def entropy_amax(counts: Floats, amax: float, levels: int) -> float:
    """|x| at which to saturate: the cut whose quantized distribution is nearest to the clipped one.

    ``counts`` are 2,048 bins over [0, amax]. For every cut i: P is the first i bins with the tail added to the
    last; Q spreads each of ``levels`` groups evenly over its non-empty bins; the least KL(P || Q) wins, the last
    of equals, as NVIDIA's procedure does (the first bin is a copy of the second, so that zeros do not rule).
    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017, S7310, pages 38-42.
    """
    bins = counts.astype(np.float64).copy()
    if bins.sum() == 0:
        return amax
    bins[0] = bins[1]
    best, best_i = np.inf, len(bins)
    for i in range(levels, len(bins) + 1):
        p = bins[:i].copy()
        q = _spread(p, levels)
        p[-1] += bins[i:].sum()
        divergence = _kl(p, q)
        if divergence <= best:
            best, best_i = divergence, i
    return amax * best_i / len(bins)


def _spread(p: Floats, levels: int) -> Floats:
    group = np.minimum(np.arange(len(p)) * levels // len(p), levels - 1)
    full = p > 0
    mass = np.bincount(group, weights=p, minlength=levels)
    n = np.bincount(group, weights=full, minlength=levels)
    return np.where(full, (mass / np.maximum(n, 1))[group], 0.0)


def _kl(p: Floats, q: Floats) -> float:
    p_sum, q_sum = p.sum(), q.sum()
    if p_sum == 0 or q_sum == 0:
        return float("inf")
    p, q = p / p_sum, q / q_sum
    if ((p > 0) & (q == 0)).any():
        return float("inf")
    on = p > 0
    return float((p[on] * np.log(p[on] / q[on])).sum())


def weight_scales(w: Tensor, bits: int, observer: Observer) -> Tensor:
    """Symmetric per-output-channel scales [O] for weights [O, ...]; an all-zero channel gets scale 1.

    minmax and moving take the channel's largest |w|; every other observer searches the least squared error over shrunk
    ranges, since a histogram of so few weights says less than the weights themselves.
    """
    flat = w.detach().flatten(1)
    if not torch.isfinite(flat).all():
        raise Unsupported("a weight is NaN or infinite: the float network is broken")
    qmax = (1 << (bits - 1)) - 1
    full = flat.abs().amax(1)
    full = torch.where(full >= TINY, full, torch.full_like(full, float(qmax)))
    if observer in ("minmax", "moving"):
        return full / qmax
    best, best_error = full / qmax, torch.full_like(full, torch.inf)
    for s in SHRINK:
        scale = full * float(s) / qmax
        q = (flat / scale[:, None]).round_().clamp_(-qmax, qmax)
        error = q.mul_(scale[:, None]).sub_(flat).square_().sum(1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best
