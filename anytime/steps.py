"""Steps: networks whose backends differ in one field only, so that what the field gives can be said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from anytime.gather import Network, Row, key_of

_WIDTHS = ("weight_bits=", "activation_bits=", "add_bits=", "edge_bits=")


class Step(NamedTuple):
    """``plain`` is the network whose backend has this one field by default; ``said`` is the field and its value."""

    plain: Network
    said: str


def steps(networks: Sequence[Network]) -> dict[int, Step]:
    """``id`` of a network -> its step, where it has one.

    Of several plain forms one of the same widths, if there is any: what bits cost stands in every table. Of these the last one that
    the experiment names before it: experiments add one thing after another. (Records keep the place of when they were made; they
    alone would decide otherwise when a row is made again.)
    """
    there = {(n.family, n.model, key_of(n.spec.get("backend"))): n for n in networks}
    found = {}
    for network in networks:
        position = network.facts["position"]
        plain = [
            Step(there[where], said)
            for rest, said in _one_less(network.spec.get("backend"))
            if (where := (network.family, network.model, key_of(rest))) in there
        ]
        if plain:
            found[id(network)] = max(
                plain, key=lambda s: (not s.said.startswith(_WIDTHS), *_rank(s.plain.facts["position"], position))
            )
    return found


def _rank(plain: float, own: float) -> tuple[bool, float]:
    return (plain < own, plain if plain < own else -plain)


def _one_less(spec: Any) -> Iterator[tuple[Row, str]]:
    """A backend's spec, without defaults, with one field less; and that field. What it wraps likewise."""
    if not isinstance(spec, dict):
        return
    for name, value in spec.items():
        if name == "of":
            yield from (({**spec, name: rest}, said) for rest, said in _one_less(value))
        elif name not in ("is", "version"):
            yield {n: v for n, v in spec.items() if n != name}, f"{name}={_told(value)}"


def _told(value: Any) -> str:
    """As Python would write it."""
    if isinstance(value, dict):
        fields = [f"{n}={_told(v)}" for n, v in value.items() if n not in ("is", "version")]
        return f"{value.get('is')}({', '.join(fields)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    return repr(value)
