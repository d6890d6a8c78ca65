"""Tables of strings as Markdown, as plain text, as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple


def md_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line) + " |" for line in lines)


def _text_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [[_starred(cell) for cell in line] for line in (header, *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _tex_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head, *lines = (" & ".join(map(_tex, line)) + r" \\" for line in (header, *body))
    inside = "\n".join([r"\toprule", head, r"\midrule", *lines, r"\bottomrule"])
    return f"\\begin{{tabular}}{{lll{'r' * (len(header) - 3)}}}\n{inside}\n\\end{{tabular}}"


def _tex(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text.translate(_TEX))


def _starred(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"\1*", text)


class Style(NamedTuple):
    """How a kind of file writes a table, a line, and what stands between lines."""

    between: str
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
    line: Callable[[str], str]


MD = Style("  \n", md_table, str)
PLAIN = Style("\n", _text_table, _starred)
LATEX = Style("\n\n", _tex_table, lambda text: r"\par\footnotesize " + _tex(text))
_TEX = str.maketrans({c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\^{}", "–": "--"})
_TEX |= str.maketrans(
    {
        "<": "$<$",
        ">": "$>$",
        "×": r"$\times$",
        "≤": r"$\le$",
        "≥": r"$\ge$",
        "→": r"$\to$",
        "†": r"\textdagger{}",
        "·": r"$\cdot$",
    }
)
