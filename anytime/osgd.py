"""Orthogonalized SGD: later tasks step only where they do not undo earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

Gradient = list[Tensor | None]  # one per parameter; None, or zeros, where the task does not touch it


class OSGD:
    """Wraps any torch optimizer: ``backward`` in the place of ``loss.backward()``, then the optimizer's own ``step``.

    The projection comes before momentum, weight decay and whatever else the optimizer does with a gradient.
    ``per_tensor`` projects every parameter tensor by itself instead of the whole vector.
    Source: Wan et al., "Orthogonalized SGD and Nested Architectures for Anytime Neural Networks", ICML 2020,
    arXiv:2008.06635. Inferred here: the paper's formula is for tasks that share all parameters; see ``orthogonalized``
    for what is done when they do not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, per_tensor: bool = False) -> None:
        self.optimizer, self.per_tensor = optimizer, per_tensor

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Set every parameter's ``grad`` to the sum of the orthogonalized gradients of ``losses``, scalars, most important first.

        What was in ``grad`` is replaced. A parameter that no loss touches gets None. The losses' graphs are freed.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients: list[Gradient] = [
            list(torch.autograd.grad(loss, parameters, retain_graph=k + 1 < len(losses), allow_unused=True))
            for k, loss in enumerate(losses)
        ]
        for p, *of_tasks in zip(parameters, *orthogonalized(gradients, self.per_tensor), strict=True):
            touched = [g for g in of_tasks if g is not None]
            p.grad = reduce(add, touched) if touched else None


class _Stack(torch.autograd.Function):
    """torch.stack that hands no gradient on where it is all zeros."""

    @staticmethod
    def forward(_: Any, *logits: Tensor) -> Tensor:
        return torch.stack(logits)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Any:
        return tuple(g if bool(g.any()) else None for g in gradient)


def apart(exits: Callable[[Tensor], Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
    """x -> the stacked logits of ``exits``, from which a loss of one exit goes back through the stages up to it alone.

    Through torch's own stack it goes back through all of them, with zeros, once for every exit.
    """
    return lambda x: _Stack.apply(*exits(x))  # type: ignore[no-untyped-call]


def orthogonalized(gradients: Sequence[Gradient], per_tensor: bool = False) -> list[Gradient]:
    """Take off every gradient its components along the earlier ones; the first is left as it is.

    In turn for j = 1 .. s-1: g_s -= <g_s, g'_j> / |g'_j|^2 g'_j, where the inner product, the norm and the
    subtraction run over the parameters that both tasks touch, all of them as one vector (``per_tensor``: each tensor
    by itself): what belongs to one task alone, such as its head, neither moves nor counts. A gradient of zeros counts
    as none: that is what torch gives through the stacked logits of all exits. Where each task touches all the shared
    parameters that an earlier one does, as the exits of a chain, g'_s ends orthogonal to every g'_j over what they
    share. An earlier gradient of zero takes nothing off.
    """
    done: list[Gradient] = []
    for gradient in gradients:
        new = list(gradient)
        for earlier in done:
            # Zeros where this task touches nothing, by a choice on the device.
            seen = [b if a is None or b is None else torch.where(a.any(), b, 0) for a, b in zip(gradient, earlier, strict=True)]
            both = [i for i, (a, b) in enumerate(zip(new, seen, strict=True)) if a is not None and b is not None]
            for vector in [[i] for i in both] if per_tensor else [both]:
                _take_off(new, seen, vector)
        done.append(new)
    return done


def _take_off(new: Gradient, earlier: Gradient, indices: list[int]) -> None:
    pairs = [(i, a, b) for i in indices if (a := new[i]) is not None and (b := earlier[i]) is not None]
    if pairs:  # sums stay on their device: nothing here waits for a GPU
        norm = torch.stack([b.square().sum() for _, _, b in pairs]).sum()
        along = torch.stack([(a * b).sum() for _, a, b in pairs]).sum() / torch.where(norm > 0, norm, 1)
        for i, a, b in pairs:
            new[i] = a - along * b
