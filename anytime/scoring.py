"""What a record says: of predictions, of costs, of times."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from anytime.backend import Deployable
from anytime.board import Timing
from anytime.cost import Cost, LayerCost, LinkCost
from anytime.dataset import torchvision
from anytime.decisions import confidence, overthinking
from anytime.metrics import Floats, Ints, Predictions, correct
from anytime.record import Record


def eval_rows(
    test: Predictions, cost: Cost, agreement: Floats, executed: dict[str, str] | None, reference: Predictions | None = None
) -> list[dict[str, Any]]:
    """One row per exit: what it scores, and what leaving there costs with every head on the way run.

    ``reference`` is what the same network says in FP32; with other exits than these there is nothing to compare.
    """
    if reference is not None and reference.logits.shape != test.logits.shape:
        reference = None
    right, int8 = correct(test), only_int8(cost, executed).every("macs") if executed else None
    every = {what: cost.every(what) for what in ("macs", "bops", "params", "packed_bytes")}
    over = overthinking(right)
    rows = []
    for k in range(test.n_exits):
        passed = slice(0, k + 1)
        rows.append(
            {
                "exit": k, "n": len(test.labels), "n_right": int(right[k].sum()), "accuracy": float(right[k].mean()),
                **confidence(test.logits[k], test.labels), "overthinking": float(over[k]),
                **{what: float(values[k]) for what, values in every.items()},
                "peak_activation_bytes": float(max(part.activation_bytes[passed].max() for part in (cost.stage, cost.head))),
                "own_macs": cost.path((k,), k), "stage_macs": float(cost.stage.macs[k]), "head_macs": float(cost.head.macs[k]),
                "agreement": float(agreement[k]),
                "int8_macs_share": None if int8 is None else float(int8[k] / every["macs"][k]),
                "answers": len(np.unique(test.logits[k].argmax(-1))),
                **({} if reference is None else fidelity(test.logits[k], reference.logits[k])),
            }
        )  # fmt: skip
    return rows


def fidelity(logits: Floats, reference: Floats) -> dict[str, float]:
    """How far logits [N, K] are from the reference's: the largest difference, also as a share of the reference's range, and the
    share of samples on which they say another class.

    Source: torch2trt's table of conversions (its "Max Error"); the share and the range are this project's.
    """
    error = float(np.abs(logits.astype(np.float64) - reference).max())
    width = float(reference.max()) - float(reference.min())
    flips = float((logits.argmax(-1) != reference.argmax(-1)).mean())
    return {"max_error": error, "prediction_flips": flips} | ({"max_error_share": error / width} if width else {})


def unjudged(trained_on: frozenset[str], labelled: bool) -> str:
    """Why the labels say nothing about a network; empty where they do."""
    if not trained_on:
        return "latency and fidelity only: weights of it were drawn and never trained, so no accuracy is shown"
    return "" if labelled else "latency and fidelity only: the labels of its images are not its classes, so no accuracy is shown"


def recorded_cost(evaluated: Record, restarts: bool) -> Cost:
    """MACs and BOPs as an eval record tells them, layer by layer; parameters and bytes are NaN: it has them not link by link."""
    layers = tuple(LayerCost(**{name: row[name] for name in LayerCost._fields}) for row in evaluated.layers)
    n = len(evaluated.exits)

    def link(head: bool) -> LinkCost:
        macs, bops = np.zeros(n), np.zeros(n)
        for layer in layers:
            if layer.head == head:
                macs[layer.exit] += layer.macs
                bops[layer.exit] += layer.bops
        return LinkCost(macs, bops, *(np.full(n, np.nan) for _ in range(3)))

    return Cost(link(False), link(True), layers, restarts)


def layer_rows(cost: Cost, executed: dict[str, str] | None, sqnr: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row per layer that multiplies.

    ``executed`` is the number type of its kernel, "" where no profile tells; ``sqnr_db`` is None where it was not measured or
    there is no noise.
    """
    rows = []
    for layer in cost.layers:
        db = sqnr.get(layer.layer, np.inf)
        ran = (executed or {}).get(layer.layer, "")
        rows.append({**layer._asdict(), "executed": ran, "sqnr_db": db if np.isfinite(db) else None})
    return rows


def only_int8(cost: Cost, executed: dict[str, str]) -> Cost:
    """The part of a cost whose MACs ran in 8-bit kernels."""

    def part(link: LinkCost, head: bool) -> LinkCost:
        macs = np.zeros(len(link.macs))
        for layer in cost.layers:
            if layer.head == head and executed.get(layer.layer) == "int8":
                macs[layer.exit] += layer.macs
        return link._replace(macs=macs)

    return replace(cost, stage=part(cost.stage, False), head=part(cost.head, True))


def int8_share(cost: Cost, layers: list[dict[str, Any]], uses: tuple[int, ...], share: Floats) -> float | None:
    """Share of the MACs that ran in 8-bit kernels when share [E] of the samples leave at each exit; None without a profile."""
    executed = {layer["layer"]: layer["executed"] for layer in layers if layer["executed"]}
    if not executed:
        return None
    part = only_int8(cost, executed)
    taken = [(s, k) for k, s in enumerate(share) if s > 0]
    return float(sum(s * part.path(uses, k) for s, k in taken) / sum(s * cost.path(uses, k) for s, k in taken))


def compact(test: Predictions) -> bytes:
    """npz of the class said uint8 (uint16 from 256 classes on) and its confidence in 255ths uint8 [E, N], and the labels [N]."""
    z = test.logits.astype(np.float64) - test.logits.max(-1, keepdims=True)
    body = io.BytesIO()
    np.savez_compressed(
        body,
        argmax=test.logits.argmax(-1).astype(np.uint8 if test.logits.shape[-1] < 256 else np.uint16),
        confidence=np.rint(255 / np.exp(z).sum(-1)).astype(np.uint8),
        labels=test.labels.astype(np.uint16),
    )
    return body.getvalue()


def size_bytes(net: Deployable) -> int:
    """Of the files that a board needs."""
    with TemporaryDirectory() as folder:
        return sum(p.stat().st_size for p in net.save(Path(folder)))


def percentiles(ms: Floats) -> dict[str, float | None]:
    """p50, p90 and p99 of ms [R]; p90 wants 64 samples and p99 662, fewer give None.

    Source: MLPerf's early stopping rule: so many are needed to bound a percentile at 99 % confidence.
    """
    p50, p90, p99 = (float(p) for p in np.percentile(ms, [50, 90, 99]))
    n = len(ms)
    return {"latency_ms_p50": p50, "latency_ms_p90": p90 if n >= 64 else None, "latency_ms_p99": p99 if n >= 662 else None}


def mean_over(ms: Floats, exits: Ints, share: Floats) -> float:
    """Mean of ms [L, R] as it would be if the R samples, who left at ``exits`` [R], left as ``share`` [E] of all samples do.

    A few hundred samples are enough to time each exit, too few to say how many leave there: of 250 two standard errors are six
    points. Exits at which none of them left are not counted.
    """
    here = np.bincount(exits, minlength=len(share)) / len(exits)
    weight = (share / np.where(here > 0, here, 1.0))[exits]
    return float(np.average(ms.mean(0), weights=weight))


def timing_rows(timing: Timing) -> list[dict[str, Any]]:
    """One row per exit: the times to leave there with every head on the way run, and those of its own link; what it takes of energy."""
    rows = []
    for k in range(len(timing.stage_ms)):
        whole, spent = timing.to_exit(k), float(timing.to_exit(k, cpu=True).mean())
        rows.append(
            {
                "exit": k, "n": len(whole), **percentiles(whole), "latency_ms_mean": float(whole.mean()),
                "cpu_ms": spent if np.isfinite(spent) else None, "stage_ms_p50": float(np.median(timing.stage_ms[k])),
                "head_ms_p50": float(np.median(timing.head_ms[k])), "own_latency_ms_p50": float(np.median(timing.to_exit(k, (k,)))),
                **({"energy_mj": timing.energy_mj[k]} if timing.energy_mj else {}),
            }
        )  # fmt: skip
    return rows


def executed_rows(timing: Timing, cost: Cost) -> list[dict[str, float]]:
    """Per exit, the share of its MACs that the board's engine says to have run in 8-bit kernels; nothing where it says nothing."""
    executed = {layer: row["executed"] for row in timing.layers for layer in row["layers"] if row["executed"]}
    if not executed:
        return [{} for _ in timing.stage_ms]
    shares = only_int8(cost, executed).every("macs") / cost.every("macs")
    return [{"int8_macs_share": float(share)} for share in shares]


def answered_rows(said: Floats, test: Predictions) -> list[dict[str, float]]:
    """Per exit, what logits [E, N, K] of a board's own engine score, and on how many samples they say the class that was scored here."""
    classes, here = said.argmax(-1), test.logits.argmax(-1)
    return [
        {"board_accuracy": float((mine == test.labels).mean()), "board_agreement": float((mine == other).mean())}
        for mine, other in zip(classes, here, strict=True)
    ]


def ptflops_macs(net: nn.Module, shape: tuple[int, ...]) -> dict[str, float] | str:
    """What both of ptflops' counters say of a float network, every exit run; a sentence where it fails."""
    try:
        torchvision()  # ptflops imports it, and cannot without the shim
        from ptflops import get_model_complexity_info

        found = {}
        for how in ("pytorch", "aten"):
            macs, _ = get_model_complexity_info(net, shape, as_strings=False, print_per_layer_stat=False, backend=how)
            found[how] = float(macs)
        return found
    except Exception as error:  # a peer's failure is a fact about the peer
        return f"ptflops failed: {error}"
