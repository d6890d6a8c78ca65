"""What decide records say of one policy on one network, folded over training seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from anytime.decisions import Curve, curve
from anytime.gather import NAN, Asked, Network, Row, known, listed
from anytime.metrics import Interval

LIMITED = listed("budget_violation exit_flips regret")  # with limits of their own beside them
REACHED = listed("nll_reached brier_reached ece_reached auroc_reached")
JUDGED = listed(  # what only labels can tell
    "accuracy accuracy_lo accuracy_hi loss loss_lo loss_hi loss_upper static_loss static_loss_lo static_loss_hi static_loss_upper "
    "ece nll brier auroc overthinking harmful_flips helpful_flips regret regret_lo regret_hi recovered area gain gain_lo gain_hi "
    "step_gain step_gain_lo step_gain_hi accuracy_at_macs accuracy_at_bops accuracy_at_ms board_accuracy"
)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of at least two training seeds with its 95 % t-interval: the spread of trainings, not of samples.

    Source: Student, "The probable error of a mean", Biometrika 1908.
    """
    mean, half = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half *= float(stdtrit(len(values) - 1, 0.975))
    return Interval(mean, mean - half, mean + half)


def limits(points: Sequence[Row]) -> Row:
    """Limits of ``LIMITED``: bootstrapped ones of one training seed, t-intervals over several."""
    row: Row = {}
    for name in LIMITED:
        values = known(p.get(name) for p in points)
        said = (points[0].get("limits") or {}).get(name) if len(points) == 1 else None
        if len(values) > 1:
            said = over_seeds(values)[1:]
        if values and said:
            row |= {f"{name}_lo": float(said[0]), f"{name}_hi": float(said[1])}
    return row


def reached(points: Sequence[Row]) -> Row:
    """Per exit, of the samples that reach it, "0.1/0.2/–": means over training seeds."""
    row: Row = {}
    for name in REACHED:
        if any(p.get(name) for p in points):
            exits = zip(*(p[name] for p in points if p.get(name)), strict=True)
            means = [known(values) for values in exits]
            row[name] = "/".join(f"{statistics.fmean(values):.4f}" if values else "–" for values in means)
    return row


def unjudged(network: Network) -> Row:
    """Blanks for all that labels tell, where its eval record says why they tell nothing."""
    return dict.fromkeys(JUDGED, NAN) | dict.fromkeys(REACHED, "") if network.facts.get("unjudged") else {}


def recovered(network: Network, asked: Asked, row: Row) -> Row:
    """Share of the regret of the arm kept that this arm does away with; nothing where that one is not above 0 beyond its limits."""
    kept = list(network.scores.get(asked._replace(arm="kept"), {}).values())
    regret, lo = known(p.get("regret") for p in kept), limits(kept).get("regret_lo", NAN)
    if asked.arm in ("", "kept") or not regret or not lo > 0 or not known([row.get("regret")]):
        return {}
    return {"recovered": 1 - row["regret"] / statistics.fmean(regret)}


def example(places: Iterable[tuple[str, float]]) -> list[str]:
    """The one policy that stands for all where there is room for one: that which the experiment names first.

    ``places``: a policy and its position in the experiment, or whether it has a gain over the first one, which itself never has.
    """
    last: dict[str, float] = {}
    for policy, place in places:
        last[policy] = max(place, last.get(policy, 0))
    return sorted(last, key=last.__getitem__)[:1]


def first_policy(network: Network, asked: Asked) -> Asked | None:
    """The same question to the policy that the experiment names first; None where that one cannot answer it."""
    places = {
        a: p["policy_position"]
        for a, points in network.scores.items()
        for p in points.values()
        if p.get("policy_position") is not None and asked == a._replace(policy=asked.policy)
    }
    first = min(places, key=lambda a: places[a], default=None)
    return None if first is None or places[first] or asked not in places or first == asked else first


def curve_of(network: Network, asked: Asked, costs: str | Mapping[int, float]) -> Curve | None:
    """Accuracy against ``costs``, "macs" or "bops" or those of leaving at each exit, of the policy refitted; seeds averaged."""
    points = [p for p in network.scores.get(asked._replace(arm="refitted"), {}).values() if p.get("curve")]
    found = []
    for point in points:
        said, n = point["curve"], point["n"]
        if isinstance(costs, str):
            cost = np.array(said[costs], dtype=np.float64)
        elif "counts" in said and len(costs) == len(said["counts"][0]):
            cost = np.array(said["counts"]) @ np.array([costs[k] for k in sorted(costs)]) / n
        else:
            return None
        found.append(curve(cost, np.array(said["n_right"]) / n))
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    cost = np.unique(np.concatenate([c.cost for c in found]))
    return Curve(cost, np.mean([[c.at(x) for x in cost] for c in found], axis=0))


def readings(network: Network, asked: Asked) -> Row:
    """What the policy's own curve reads where MACs, or BOPs, are exactly the budget's share of the reference's."""
    if asked.currency not in ("macs", "bops") or asked.arm != "refitted":
        return {}
    reference = next((p["reference"] for p in network.scores[asked].values() if p.get("reference")), None)
    curves = {what: curve_of(network, asked, what) for what in ("macs", "bops")}
    return {f"accuracy_at_{what}": c.at(asked.budget * reference[what]) for what, c in curves.items() if c and reference}


def reading_ms(network: Network, asked: Asked, ms: Mapping[int, float], whole: float) -> Row:
    """What it reads where the mean latency is the budget's share of ``whole``, with exits that take ``ms``."""
    everything = [whole, *ms.values()]
    if asked.arm != "refitted" or asked.currency == "accuracy" or len(known(everything)) < len(everything):
        return {}
    found = curve_of(network, asked, ms)
    return {"accuracy_at_ms": found.at(asked.budget * (1 if asked.currency == "ms" else whole))} if found else {}
