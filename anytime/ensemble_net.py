"""An ensemble as one chain: members run one after the other, and every exit says what those that have run say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from anytime.backend import Deployable, Segment
from anytime.errors import Unsupported
from anytime.metrics import Floats
from anytime.model import AnytimeModel

T = TypeVar("T")


class Link(NamedTuple):
    """Stage and exit of an ensemble: stages [first, stop) of a member; ``last``: then the member has answered."""

    member: int
    first: int
    stop: int
    last: bool


def links(members: Sequence[Deployable], inner_exits: bool) -> list[Link]:
    """The exits of an ensemble: one per member, or one per exit of every member.

    Of a member whose stages restart only the last one runs. Unsupported where its inner exits are wanted: they share nothing.
    """
    found = []
    for i, member in enumerate(members):
        n = member.n_exits
        if not inner_exits:
            found.append(Link(i, n - 1 if member.restarts else 0, n, True))
        elif member.restarts and n > 1:
            raise Unsupported(f"member {i + 1} starts again from the input at every stage: leave inner_exits out")
        else:
            found += [Link(i, k, k + 1, k == n - 1) for k in range(n)]
    return found


class _Part(nn.Module):
    """State (x, logits of the members that are done [B, m, K], the running member's own state if it has one)."""

    def __init__(self, member: AnytimeModel, link: Link, n_classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(list(member.stages)[link.first : link.stop])
        self.head = member.heads[-1] if link.last else None
        self.begins = member.restarts or link.first == 0
        self.n_classes, self.dtype = n_classes, next(member.parameters()).dtype

    def forward(self, state: Any) -> Any:
        x, said, *inner = state if isinstance(state, tuple) else (state, state.new_zeros(len(state), 0, self.n_classes).float())
        here = x.to(self.dtype) if self.begins else inner[0]
        for stage in self.stages:
            here = stage(here)
        return (x, said, here) if self.head is None else (x, _and(said, self.head(here)))


class _Exit(nn.Module):
    """What the members say together; with ``head``, one of them by an exit on its way."""

    def __init__(self, combine: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.combine, self.head = combine, head

    def forward(self, state: Any) -> Tensor:
        _, said, *inner = state
        z: Tensor = self.combine(said if self.head is None else _and(said, self.head(inner[0])))
        return z


def _and(said: Tensor, logits: Tensor) -> Tensor:
    return torch.cat([said, logits.float()[:, None]], 1)


class EnsembleNet(Deployable):
    """Members, each as its own backend made it, in the order given; exit e says what ``combiners[e]`` makes of their logits.

    State: (x, logits of the members that are done [B, m, K], the running member's state if it is on its way). The format is the
    members'; of different ones it names them all ("onnx+torch"), and no board has both.
    """

    def __init__(self, members: Sequence[Deployable], combiners: Sequence[nn.Module], n_classes: int, inner_exits: bool) -> None:
        self.members, self.links, self.n_classes = list(members), links(members, inner_exits), n_classes
        self.combiners = [c.eval() for c in combiners]
        self.twin = AnytimeModel(
            [_Part(members[link.member].twin, link, n_classes) for link in self.links],
            [
                _Exit(combine, None if link.last else members[link.member].twin.heads[link.first])
                for link, combine in zip(self.links, self.combiners, strict=True)
            ],
        ).eval()
        self.twin.trained_on = frozenset().union(*(m.twin.trained_on for m in members))
        self.format = "+".join(sorted({m.format for m in members}))  # type: ignore[misc]
        self.execution = " + ".join(dict.fromkeys(m.execution for m in members))
        self.simulated = any(m.simulated for m in members)
        if len(needs := {m.needs for m in members if m.needs}) > 1:
            raise Unsupported(f"its members need different CPU kernels ({needs}): give them one 16-bit format")
        self.needs = next(iter(needs), ())
        self.bits = self._renamed([m.bits for m in members])
        self.sqnr = self._renamed([m.sqnr for m in members])
        self.facts = {k: v for m in reversed(members) for k, v in m.facts.items() if k in ("simulated", "twin", "target")}

    def _renamed(self, of: Sequence[Mapping[str, T]]) -> dict[str, T]:
        """What is said of the members' layers, by the layers' names in the ensemble; of heads that it never runs nothing."""
        found = {}
        for e, link in enumerate(self.links):
            head = f"stages.{e}.head" if link.last else f"heads.{e}.head"
            names = {f"stages.{k}": f"stages.{e}.stages.{k - link.first}" for k in range(link.first, link.stop)}
            names[f"heads.{link.stop - 1}"] = head
            for path, value in of[link.member].items():
                kind, k, *rest = path.split(".", 2)
                if f"{kind}.{k}" in names:
                    found[".".join([names[f"{kind}.{k}"], *rest])] = value
        return found

    def open(self, threads: int) -> None:
        super().open(threads)
        for member in self.members:
            member.open(threads)

    def start(self, x: Floats) -> Any:
        return np.asarray(x, dtype=np.float32), np.empty((len(x), 0, self.n_classes), np.float32)

    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        x, said, *inner = state
        logits: Floats | None = None
        e = segment.first
        while e < segment.stop:
            i, first, stop, last = self.links[e]
            while not last and e + 1 < segment.stop:  # one run of the member as far as the segment goes
                e += 1
                _, _, stop, last = self.links[e]
            member = self.members[i]
            asked = last or (segment.head == e and e + 1 == segment.stop)
            here = inner[0] if inner else member.start(x)
            here, logits = member.step(Segment(first, stop, stop - 1 if asked else None), here)
            inner = [here]
            if last:
                said, inner, logits = _append(said, logits), [], None
            e += 1
        state = (x, said, *inner)
        if segment.head is None:
            return state, None
        link = self.links[segment.head]
        if not link.last:
            if logits is None:
                _, logits = self.members[link.member].step(Segment(link.stop, link.stop, link.stop - 1), inner[0])
            said = _append(said, logits)
        with torch.inference_mode():
            return state, self.combiners[segment.head](torch.from_numpy(said)).numpy()

    def save(self, folder: Path) -> list[Path]:
        """A folder per member, and the combiners."""
        paths = []
        for i, member in enumerate(self.members):
            own = folder / f"member_{i}"
            own.mkdir()
            paths += member.save(own)
        torch.save(self.combiners, folder / "combiners.pt")
        return [*paths, folder / "combiners.pt"]

    def executed(self, x: Floats) -> dict[str, str] | None:
        said = [member.executed(x) for member in self.members]
        return None if all(one is None for one in said) else self._renamed([one or {} for one in said])


def _append(said: Floats, logits: Floats | None) -> Floats:
    assert logits is not None
    return np.concatenate([said, logits[:, None]], 1)


def answers(members: Sequence[Deployable], x: Floats, inner_exits: bool) -> list[Floats]:
    """What each exit's combiner reads of x [N, ...]: logits [N, m, K], exit by exit."""
    found = []
    done: list[Floats] = []
    for member in members:
        logits = member.predict(x)
        found += [np.stack([*done, z], 1) for z in (logits if inner_exits else logits[-1:])]
        done.append(logits[-1])
    return found
