"""Strings -> HTML. Everything that comes from a record passes ``esc``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import count

_NUMBER = re.compile(r"(\*\*)?[~+≤ -]*\d|–$|$")  # what a cell of a column of numbers begins with

SORTED_FROM = 6  # lines: a shorter table is read faster than it is sorted
# Titles of columns that say which row it is: what readers filter by.
_WHICH = {
    "data set", "network", "column", "execution", "policy", "arm", "budget", "board", "exit", "floor", "backend", "asked for", "status",
    "up to", "part",
}  # fmt: skip


def esc(text: object) -> str:
    """Text, safe in an element and in a quoted attribute."""
    return escape(str(text), quote=True)


def rich(text: object) -> str:
    """Text whose **stars** make it bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", esc(text))


class Tables:
    """Writes tables; what is right-aligned is said once per table, which keeps thousands of rows small."""

    def __init__(self) -> None:
        self.numbers = count(1)

    def __call__(
        self,
        header: Sequence[str],
        body: Sequence[Sequence[str]],
        caption: str,
        links: Sequence[str] = (),
        sortable: bool = False,
    ) -> str:
        """A table in a frame that scrolls; ``links`` are fragments of the page, where spec, facts and records of each line stand."""
        name = f"t{next(self.numbers)}"
        shift = 2 if links else 1
        numeric = [i for i in range(len(header)) if body and all(_NUMBER.match(line[i]) for line in body)]
        right = ",".join(f"#{name} td:nth-child({i + shift})" for i in numeric)
        style = f"<style>{right}{{text-align:right}}</style>" if right else ""
        first = '<th scope="col"><span class="sr">details</span></th>' if links else ""
        head = first + "".join(
            f'<th scope="col"{" data-n" if i in numeric else ""}{" data-f" if title in _WHICH else ""}>{esc(title)}</th>'
            for i, title in enumerate(header)
        )
        lines = []
        for i, line in enumerate(body):
            # End tags of rows and cells may be left out in HTML.
            link = f"<td><a href={links[i]}>›</a>" if links else ""
            lines.append(f"<tr>{link}" + "".join(f"<td>{rich(cell)}" for cell in line))
        about = f'role="region" aria-label="{esc(caption)}" tabindex="0"'
        return (
            f'{style}<div class="frame" {about}><table id="{name}"{" data-sort" if sortable else ""}>'
            f'<caption class="sr">{esc(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n'
            + "\n".join(lines)
            + "\n</tbody></table></div>"
        )
