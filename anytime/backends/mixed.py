"""Bits chosen layer by layer, by what each costs and what its rounding does to the exits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from anytime.backend import Backend, BitMap, Bits, Deployable, Target, TorchNet, fake_quant_net
from anytime.cost import account
from anytime.dataset import Part
from anytime.errors import Infeasible, Unsupported, UsageError
from anytime.model import AnytimeModel
from anytime.quant.diagnose import diagnosed
from anytime.quant.graph import Quantized, Widths, quantized
from anytime.quant.place import left_out
from anytime.quant.ranges import NEEDS_VALUES, Observer
from anytime.quant.search import Allocation, Choices, choices, divergence, sensitivities
from anytime.quant.trace import traced
from anytime.reach import Reach
from anytime.rounding import NAMES, Rounding, learn_rounding
from anytime.spec import key
from anytime.train import Trainer


@dataclass(frozen=True)
class MixedPrecision(Backend):
    """Calibrated integers whose widths an integer program chooses from ``candidates``, layer by layer.

    It minimises the expected BOPs, the sum over layers of P(reach) x MACs x weight bits x activation bits, with no more
    distortion than uniform W``like``A``like``; or, given ``bops``, the distortion with no more expected BOPs than that share of
    W8A8's. Distortion is KL from the float network's answers in nats, averaged over exits by the share of samples that leaves
    there, on up to ``samples`` of the tune part. The program predicts it: the sum of what each layer's weight and each tensor does
    alone. These need not add up, so the bound of ``like`` is measured, on whole networks rounded to nearest: of the allocations
    that the program finds under several limits, the cheapest whose distortion is no more than the uniform network's, or that one.
    The gap in the record is the program's: where its prediction errs, cheaper bits may keep the bound. Records hold the
    predicted sum and what the chosen bits did together.
    Without ``reach`` every sample runs everything, and exits weigh alike: the plain form. With it every stage is also
    calibrated on those calib samples that reach it. ``weigh`` False then still chooses as the plain form does, while calibration
    and what ``bops`` limits go by ``reach``: the two sides of an ablation at equal expected BOPs. Once bits are chosen, ``rounding``
    other than to nearest is learned in ``iterations`` a unit, as PTQ does, on the samples that calibrate (anytime/rounding.py).
    ``edge_bits``: layers that read the image and each head's last one, fixed where no candidate is wider, chosen too where none is
    narrower. ``add_bits``: tensors that an addition or a pooling reads too; layers that want fewer round them once more.
    ``keep_float``: layers left out, by path; for "s8s8" TensorRT's own exclusions too.
    Source: this project; sensitivities and program as quant/search.py says.
    """

    reach: Reach | None = None
    weigh: bool = True
    like: int = 4
    bops: float | None = None
    candidates: tuple[int, ...] = (3, 4, 5, 6, 8)
    samples: int = 256
    observer: Observer = "mse"
    weight_observer: Observer = "mse"
    edge_bits: int = 8
    add_bits: int = 8
    rounding: Rounding = "nearest"
    iterations: int = 2000
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        said = f"candidates={self.candidates}"
        if not self.candidates or list(self.candidates) != sorted(set(self.candidates)):
            raise UsageError(f"MixedPrecision: {said}: give at least one width, ascending")
        narrowest, widest = self.candidates[0], self.candidates[-1]
        if self.bops is None and self.like not in self.candidates:
            raise UsageError(f"MixedPrecision: like={self.like} is not in {said}: add it there")
        if self.bops is not None and not self.bops > 0:
            raise UsageError(f"MixedPrecision: bops={self.bops} is no share of W8A8's expected BOPs: give more than 0")
        if narrowest < self.edge_bits < widest:
            raise UsageError(
                f"MixedPrecision: edge_bits={self.edge_bits} lies within {said}: give {widest} or more to fix the first and "
                f"last layers, {narrowest} to choose them like all others"
            )
        if self.add_bits < widest:
            raise UsageError(f"MixedPrecision: add_bits={self.add_bits} is narrower than {said}: give {widest} or more")
        if self.samples < 1:
            raise UsageError(f"MixedPrecision: samples={self.samples}: sensitivities need at least one")

    @property
    def version(self) -> int:  # type: ignore[override]
        """1 bounded the predicted distortion of ``like``; what ``bops`` asks for is as it was."""
        return 2 if self.bops is None else 1

    @property
    def column(self) -> str:
        return "mixed" if self.rounding == "nearest" else f"mixed ({NAMES[self.rounding]})"

    def compress(self, model: AnytimeModel, calib: Part, trainer: Trainer, target: Target = "u8s8") -> Deployable:
        tune = trainer.tune
        if tune is None or not len(tune):
            raise Unsupported("MixedPrecision chooses bits on the tune part and there is none: give the data set a larger tune")
        reached = None if self.reach is None else self.reach.estimate(model, calib)
        float_chain = traced(model)
        floats = left_out(float_chain, self.keep_float, target)
        nets = [quantized(float_chain, self._widths(width, floats), target, floats) for width in self.candidates]
        last = None if reached is None else torch.from_numpy(reached.last)
        seen = nets[0].observe(calib.x, last, values=self.observer in NEEDS_VALUES)
        for net in nets:
            net.calibrate(seen, self.observer, self.weight_observer)
            net.check_coverage()
        x = tune.x[torch.linspace(0, len(tune) - 1, min(self.samples, len(tune))).round().long()]
        begun = perf_counter()
        found = sensitivities(nets, x)
        measured = perf_counter()
        layers = account(TorchNet(float_chain, {}, simulated=True), tuple(x.shape[1:])).layers
        forms = [({n.layer: float(n.macs) for n in layers}, np.full(model.n_exits, 1 / model.n_exits))]
        if reached is not None:
            share = {n.layer: float((reached.head if n.head else reached.stage)[n.exit]) for n in layers}
            forms.append(({n.layer: n.macs * share[n.layer] for n in layers}, reached.leaves))
        plain, counted = (choices(nets, found, *form) for form in (forms[0], forms[-1]))
        chosen, (_, exits) = (counted, forms[-1]) if self.weigh else (plain, forms[0])
        want = _answers(float_chain, x)

        def at(bits: BitMap) -> Quantized:
            net = quantized(float_chain, self._widths(self.candidates[0], floats, bits), target, floats)
            net.calibrate(seen, self.observer, self.weight_observer)
            return net

        def together(bits: BitMap) -> float:
            return float(exits @ divergence(want, _answers(fake_quant_net(at(bits), target).twin, x)).mean(1).numpy())

        if self.bops is None:
            uniform = nets[self.candidates.index(self.like)].bits
            bound = together(uniform)
            allocation = chosen.cheapest_measured(bound, uniform, together)
        else:
            bound = None
            allocation = self._truest(chosen, counted, self.bops)
        solved = perf_counter()
        net = at(allocation.bits)
        net.check_coverage()
        # The bits too: another machine may choose others.
        name = f"{key((self, tuple((layer, *bits) for layer, bits in sorted(net.bits.items()))))}-{target}"
        learned = learn_rounding(net, float_chain, calib.x, self.rounding, self.iterations, trainer, name, last)
        done = fake_quant_net(net, target)
        done.sqnr = diagnosed(done.twin, float_chain, calib.x[:256], calib.y[:256])
        got = float(exits @ divergence(want, _answers(done.twin, x)).mean(1).numpy())
        spent = {form: f"{c.cost(allocation.bits) / _w8a8(c):.4f}" for form, c in (("plain", plain), ("expected", counted))}
        done.facts |= learned | {
            "bits": ", ".join(f"W{b.weight}A{b.activation} x {n}" for b, n in Counter(allocation.bits.values()).most_common()),
            "bops_of_w8a8": f"{spent['expected']} expected, {spent['plain']} if every sample runs everything",
            "bound": f"measured distortion {bound:.6g}" if bound is not None else f"expected BOPs {self.bops:g} of W8A8's",
            "distortion": f"{allocation.distortion:.6g} predicted, {got:.6g} measured",
            "gap": f"{allocation.gap:.2g}",
            "seconds": f"{measured - begun:.1f} sensitivities, {solved - measured:.1f} search",
        }
        return done

    def _widths(self, width: int, floats: tuple[str, ...], layers: BitMap | None = None) -> Widths:
        """What is left in float reads the widest: no choice is made for it."""
        widest = max(self.candidates[-1], self.edge_bits)
        left_out = dict.fromkeys(floats, Bits(widest, widest))
        return Widths(width, width, self.edge_bits, self.add_bits, {**left_out, **(layers or {})})

    def _truest(self, chosen: Choices, counted: Choices, bops: float) -> Allocation:
        whole = _w8a8(counted)
        try:
            return chosen.truest(bops * whole, counted)
        except Infeasible as error:  # in the user's terms
            raise Infeasible(
                f"MixedPrecision: {bops:g} of W8A8's expected BOPs is too little; the least possible with "
                f"candidates={self.candidates} is {error.least / whole:.4f}: give more, or narrower candidates",
                error.least / whole,
            ) from error


def _answers(model: AnytimeModel, x: Tensor) -> Tensor:
    """Logits [E, N, K]."""
    return torch.from_numpy(TorchNet(model, {}, simulated=True).predict(x.numpy()))


def _w8a8(form: Choices) -> float:
    return form.cost(dict.fromkeys(form.sources, Bits(8, 8)))
