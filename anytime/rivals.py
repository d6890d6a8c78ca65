"""Early exit, or just a smaller network: what a policy takes and answers beside networks without exits, run in the same way."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from anytime.gather import Asked, Network, Row
from anytime.paired import Answered
from anytime.timed import ratios


class _Beside(NamedTuple):
    name: str
    times: list[float]  # its mean latency over the policy's, session by session
    gain: Row

    @property
    def time(self) -> float:
        return statistics.fmean(self.times)


class Rivals:
    """Networks with one exit, by data, arithmetic and execution."""

    def __init__(self, networks: Sequence[Network], answered: Answered) -> None:
        self.answered = answered
        self.plain: dict[tuple[str, str, str], list[tuple[Network, Asked]]] = defaultdict(list)
        for network in networks:
            exits = [asked for asked in network.scores if asked.exit is not None]
            if len(exits) == 1:
                self.plain[_way(network)].append((network, exits[0]))

    def of(self, network: Network, asked: Asked, board: str) -> Row:
        """Of a refitted policy that was timed on ``board``:

        ``rival``: the largest network without exits that takes no longer, by mean latency; ``rival_gain``: how much more of the test
        part it has right, paired. ``as_good``: the fastest that has as much right; ``as_good_time``: its latency as a multiple of
        the policy's, with the smallest and largest of several sessions. Empty where there is none such,
        and where labels tell nothing.
        """
        points = network.times.get(asked, {}).get(board, [])
        if asked.arm != "refitted" or not points or network.facts.get("unjudged"):
            return {}
        beside = []
        for other, its in self.plain[_way(network)]:
            gain = self.answered.gain(network, asked, other, its, "rival_gain")
            if gain and (found := ratios(other.times.get(its, {}).get(board, []), points)):
                beside.append(_Beside(other.label("model"), found, gain))
        row: Row = {}
        if as_fast := [other for other in beside if other.time <= 1]:
            rival = max(as_fast, key=lambda other: other.time)
            row |= {"rival": rival.name, "rival_time": rival.time} | rival.gain
        if as_good := [other for other in beside if other.gain["rival_gain"] >= 0]:
            fastest = min(as_good, key=lambda other: other.time)
            row |= {"as_good": fastest.name, "as_good_time": fastest.time}
            if len(fastest.times) > 1:
                row |= {"as_good_time_lo": min(fastest.times), "as_good_time_hi": max(fastest.times)}
        return row


def _way(network: Network) -> tuple[str, str, str]:
    return network.place, network.label("column"), network.label("execution")
