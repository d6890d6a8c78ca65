"""Bit widths layer by layer: what each rounding does by itself, and the integer program that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anytime.errors import AnytimeError, Infeasible
from anytime.metrics import Floats
from anytime.model import AnytimeModel, State
from anytime.quant.bits import BitMap, Bits
from anytime.quant.fake import FakeQuant, QConv2d, QLinear
from anytime.quant.graph import Quantized
from anytime.quant.trace import links

BISECTIONS = 16
TRIALS = 8  # allocations that are measured
WIDER = 1.5  # what a predicted limit that was kept is multiplied by, until one is not
MOST_NODES = 10_000  # of the solver's tree; then the best that was found is taken, with its gap

Sensitivities = dict[tuple[str, int], Floats]  # (layer or tensor, bits) -> distortion of every exit [E]


class Allocation(NamedTuple):
    """Bits of every layer."""

    bits: dict[str, Bits]
    distortion: float  # predicted
    cost: float
    gap: float  # how far, relatively, the proven bound lies from what was found; 0 is the optimum, NaN what nobody solved for


@dataclass(frozen=True)
class Choices:
    """Which bits layers may take, and what they bring.

    ``weight``: layer -> bits -> distortion; ``activation``: tensor -> bits -> distortion; ``sources``: layer -> the tensor that
    it multiplies; layers of one tensor take the same activation bits. ``costs``: layer -> cost of a weight bit times
    an activation bit: MACs, times the probability that they are run. ``rest``: distortion that no choice changes.
    Distortions add up over layers and tensors. Solved by HiGHS.
    Source: the integer program of HAWQ-V3 (Yao et al., ICML 2021, arXiv:2011.10680, section 3.4). Deviations: its two sides
    exchanged in ``cheapest``, activation bits chosen apart from weight bits and tied to tensors, costs times probabilities.
    """

    costs: Mapping[str, float]
    sources: Mapping[str, str]
    weight: Mapping[str, Mapping[int, float]]
    activation: Mapping[str, Mapping[int, float]]
    rest: float = 0.0

    def cost(self, bits: BitMap) -> float:
        """Of layers with these bits."""
        return float(sum(self.costs[layer] * b.weight * b.activation for layer, b in bits.items()))

    def distortion(self, bits: BitMap) -> float:
        """Predicted, of layers with these bits."""
        tensors = {self.sources[layer]: b.activation for layer, b in bits.items()}
        weights = sum(self.weight[layer][b.weight] for layer, b in bits.items())
        return float(weights + sum(self.activation[name][a] for name, a in tensors.items()) + self.rest)

    @property
    def least_cost(self) -> float:
        """Of the narrowest widths."""
        return self.cost(self._all(min))

    @property
    def least_distortion(self) -> float:
        """Of the truest widths."""
        return self.rest + sum(min(d.values()) for d in (*self.weight.values(), *self.activation.values()))

    def cheapest(self, distortion: float) -> Allocation:
        """The least cost with at most this distortion, to one in a million. Infeasible under the least possible."""
        least = self.least_distortion
        if not distortion >= least:  # not "<": NaN must not pass
            raise _infeasible("distortion", distortion, least)
        return self._solve(minimise_cost=True, limit=distortion - self.rest)

    def cheapest_measured(self, distortion: float, kept: BitMap, measured: Callable[[BitMap], float]) -> Allocation:
        """The least cost found whose ``measured`` distortion is at most ``distortion``; ``kept``: bits that are known to keep it.

        The program is solved under limits of what it predicts: first its prediction of ``kept``, then wider ones until one is
        too wide, then between the two, ``TRIALS`` in all.
        """
        best = Allocation(dict(kept), self.distortion(kept), self.cost(kept), float("nan"))
        low, high, limit = self.least_distortion, None, best.distortion
        for _ in range(TRIALS):
            trial = self.cheapest(limit)
            if measured(trial.bits) <= distortion:
                low, best = limit, min(best, trial, key=lambda a: a.cost)
                if trial.cost <= self.least_cost:
                    break
            else:
                high = limit
            limit = low * WIDER if high is None else (low + high) / 2
        return best

    def truest(self, cost: float, by: Choices | None = None) -> Allocation:
        """The least distortion at no more than this cost, to one in a million. Infeasible under the least possible.

        ``by`` counts the cost in the place of these ``costs``, which still choose: of what they would choose under a limit
        of their own, the answer is what ``by`` finds the most expensive within ``cost``, found by bisection of that limit.
        """
        counted = by or self
        if not cost >= counted.least_cost:
            raise _infeasible("cost", cost, counted.least_cost)
        if counted == self:
            return self._solve(minimise_cost=False, limit=cost)
        low = self.least_cost
        best, high = self._solve(minimise_cost=False, limit=low), self.cost(self._all(max))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            trial = self._solve(minimise_cost=False, limit=middle)
            if counted.cost(trial.bits) <= cost:
                best, low = trial, middle
            else:
                high = middle
        return best

    def _all(self, which: Callable[[Mapping[int, float]], int]) -> BitMap:
        return {n: Bits(which(self.weight[n]), which(self.activation[s])) for n, s in self.sources.items()}

    def _solve(self, minimise_cost: bool, limit: float) -> Allocation:
        """One binary variable per (tensor, bits) and per (layer, weight bits, activation bits)."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        costly = {self.sources[layer] for layer, cost in self.costs.items() if cost > 0}
        tensors = [(name, a) for name, d in self.activation.items() for a in _worth(d, free=name not in costly)]
        column = {key: j for j, key in enumerate(tensors)}
        layers = [
            (layer, w, a)
            for layer, source in self.sources.items()
            for w in _worth(self.weight[layer], free=not self.costs[layer] > 0)
            for a in self.activation[source]
            if (source, a) in column
        ]
        distortion = np.array([self.activation[name][a] for name, a in tensors] + [self.weight[n][w] for n, w, _ in layers])
        cost = np.array([0.0] * len(tensors) + [self.costs[layer] * w * a for layer, w, a in layers])
        # A tensor takes one width; a layer takes one of its pairs where its tensor takes their activation bits, else none.
        pairs = dict.fromkeys((layer, a) for layer, _, a in layers)
        row: dict[object, int] = {key: i for i, key in enumerate([*self.activation, *pairs])}
        entries = [(row[name], j, 1.0) for j, (name, _) in enumerate(tensors)]
        entries += [(row[layer, a], column[self.sources[layer], a], -1.0) for layer, a in pairs]
        entries += [(row[layer, a], j, 1.0) for j, (layer, _, a) in enumerate(layers, len(tensors))]
        i, j, value = zip(*entries, strict=True)
        right = [1.0] * len(self.activation) + [0.0] * len(pairs)
        least, limited = (cost, distortion) if minimise_cost else (distortion, cost)
        found = milp(
            least / (max(self.least_cost if minimise_cost else self.least_distortion, least.max() * 1e-6) or 1.0),
            integrality=np.ones(len(least)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(coo_array((value, (i, j)), (len(row), len(least))).tocsr(), right, right),
                LinearConstraint(limited[None] / (limit or 1.0), -np.inf, 1.0 if limit else 0.0),
            ],
            options={"mip_rel_gap": 0.0, "node_limit": MOST_NODES},
        )
        if found.x is None:
            raise AnytimeError(f"bits: the solver found no allocation ({found.message}): give fewer candidate widths")
        bits = {n: Bits(w, a) for (n, w, a), taken in zip(layers, found.x[len(tensors) :], strict=True) if taken > 0.5}
        return Allocation(bits, self.distortion(bits), self.cost(bits), float(found.mip_gap or 0.0))


def _infeasible(what: str, asked: float, least: float) -> Infeasible:
    return Infeasible(
        f"bits: a {what} of {asked} is too little; the least possible with these widths is {least}: give more", least
    )


def _worth(distortion: Mapping[int, float], free: bool) -> list[int]:
    """Widths that no narrower one equals or beats; of what costs nothing, the best one alone."""
    if free:
        return [min(distortion, key=lambda b: (distortion[b], -b))]
    return [b for b, d in distortion.items() if all(d < other for n, other in distortion.items() if n < b)]


def choices(nets: Sequence[Quantized], found: Sensitivities, costs: Mapping[str, float], exits: Floats) -> Choices:
    """What ``sensitivities`` of the same nets offer, exits weighed by exits [E]."""
    sources = {path: q.name for path, q in nets[0].sources.items()}
    weight: dict[str, dict[int, float]] = {path: {} for path in sources}
    activation: dict[str, dict[int, float]] = {name: {} for name in sources.values()}
    for net in nets:
        for path, bits in net.bits.items():
            q = net.sources[path]
            weight[path][bits.weight] = float(exits @ found[path, bits.weight])
            # Layers that want fewer bits round their tensor once more; those that take it as it is add nothing.
            again = q.name == sources[path]
            activation[sources[path]][bits.activation] = float(exits @ found[q.name, q.bits]) if again else 0.0
    rest = sum(float(exits @ found[q.name, q.bits]) for q in nets[0].quantizers() if q.name not in activation)
    return Choices({path: costs[path] for path in sources}, sources, weight, activation, rest)


def sensitivities(nets: Sequence[Quantized], x: Tensor, batch: int = 128) -> Sensitivities:
    """Mean KL(float || rounded) in nats of every exit over x [N, C, H, W] when one layer's weight or one tensor alone is rounded.

    ``nets``: one network, calibrated at several widths, narrowest first; they are left with every rounding off. Each starts at the
    link that changes, from the float state before it.
    Source: Cai et al., "ZeroQ", CVPR 2020, arXiv:2001.00281, section 3.2. Deviations: per exit, activations too, on real images.
    """
    for net in nets:
        for _, _, _, m in _roundings(net):
            _switch(m, False)
    plain = nets[0].model
    states = inputs = list(torch.split(x, batch))
    found: Sensitivities = {}
    with torch.inference_mode():
        want = [plain(part) for part in inputs]
        for k in range(plain.n_exits):
            before = inputs if plain.restarts else states
            states = [plain.stages[k](state) for state in before]
            for net in nets:
                for link, name, bits, m in _roundings(net):
                    is_head = link == f"heads.{k}"
                    if (is_head or link == f"stages.{k}") and (name, bits) not in found:
                        _switch(m, True)
                        found[name, bits] = np.zeros(plain.n_exits)
                        for state, reference in zip(states if is_head else before, want, strict=True):
                            for e, logits in _after(net.model, k, is_head, state):
                                found[name, bits][e] += float(divergence(reference[e], logits).sum()) / len(x)
                        _switch(m, False)
    return found


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) [...] in nats of logits [..., K]."""
    p, q = (z.double().log_softmax(-1) for z in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


def _roundings(net: Quantized) -> Iterator[tuple[str, str, int, FakeQuant | QConv2d | QLinear]]:
    """(link, name, bits, module) of all that rounds; what several links share stands in the first."""
    seen = set()
    for path, link in links(net.model):
        for name, m in link.named_modules():
            if m not in seen and isinstance(m, FakeQuant):
                yield path, m.name, m.bits, m
            elif m not in seen and isinstance(m, QConv2d | QLinear):
                yield path, f"{path}.{name}", m.weight_bits, m
            seen.add(m)


def _switch(m: FakeQuant | QConv2d | QLinear, on: bool) -> None:
    if isinstance(m, FakeQuant):
        m.mode = "on" if on else "off"
    else:
        m.on = on


def _after(model: AnytimeModel, k: int, head: bool, state: State) -> Iterator[tuple[int, Tensor]]:
    """(exit, logits) of every exit that a change in stage k, or in head k alone, can move; state: what that link reads."""
    if head:
        yield k, model.heads[k](state)
        return
    for e in range(k, k + 1 if model.restarts else model.n_exits):
        state = model.stages[e](state)
        yield e, model.heads[e](state)
