"""Whether a network is one that everything else can count on, asked of a few images before anything is made of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anytime.dataset import Data
from anytime.errors import AnytimeError, Unsupported, first_line
from anytime.model import AnytimeModel
from anytime.quant.trace import traced


def check_answers(net: AnytimeModel, label: str, parts: Data) -> None:
    """AnytimeError unless every exit has one logit for each class, the same ones whatever stands beside an image in its batch.

    Cross-entropy does not miss a class too many, and of answers that hang on the batch none is what a board gives.
    """
    if not isinstance(net, AnytimeModel):
        raise AnytimeError(f"{label}: build gave a {type(net).__name__}: return an AnytimeModel of stages and heads")
    x = parts.train.x[:2]
    probe = copy.deepcopy(net).eval()  # what the user has put into eval mode stays so

    def answered(x: Tensor) -> Iterator[Tensor]:
        state: Any = x
        for k, (stage, head) in enumerate(zip(probe.stages, probe.heads, strict=True)):
            try:
                state = stage(x if probe.restarts else state)
                logits = head(state)
            except AnytimeError:
                raise
            except Exception as error:
                raise AnytimeError(f"{label}: stage or head {k + 1} cannot take what reaches it ({first_line(error)})") from error
            if not isinstance(logits, Tensor) or logits.shape != (len(x), parts.n_classes):
                got = f"{list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise AnytimeError(
                    f"{label}: exit {k + 1} gives {got} for {len(x)} images: of {parts.n_classes} classes it must be "
                    f"{[len(x), parts.n_classes]}; build takes their number as n_classes"
                )
            yield logits

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for k, (together, alone) in enumerate(zip(answered(x), answered(x[:1]), strict=True)):
            if (together[:1] - alone).abs().max() > 1e-3 * together.abs().max():
                raise AnytimeError(
                    f"{label}: exit {k + 1} answers an image otherwise when it stands alone in its batch: BatchNorm without running "
                    "statistics, dropout that is never off, or a mean over the batch; make each answer its image's own"
                )


def check_links(model: AnytimeModel, x: Tensor) -> None:
    """Unsupported where links change in eval mode what they read, or do what torch.fx does not see, on x [N, ...].

    Else what an exit answers hangs on which heads were run before it, and every graph of the chain is another network.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits, state = model(x.clone()), x
        for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            state = stage(copy.deepcopy(x if model.restarts else state))
            if not _alike(head(copy.deepcopy(state)), logits[k]):
                raise Unsupported(
                    f"exit {k + 1} answers otherwise when no other head has run: a head or a stage changes what it reads in place; "
                    "write it out of place"
                )
        try:
            graphs = traced(model)
        except Unsupported:
            return  # whoever needs the graphs says so
        for k, (seen, meant) in enumerate(zip(graphs(x.clone()), logits, strict=True)):
            if not _alike(seen, meant):
                raise Unsupported(
                    f"exit {k + 1} has effects that torch.fx does not see, such as in-place changes of a value that is read again; "
                    "write them out of place"
                )


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max().clamp(min=1))
