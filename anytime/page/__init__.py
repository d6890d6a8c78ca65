"""One page that holds a whole report: no network, no other file, tables there without JavaScript. Never torch."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from anytime import record
from anytime.errors import UsageError
from anytime.gather import Network, gather
from anytime.page import pieces
from anytime.page.data import Facts, charts, constructor, decided, flat, form, groups, named
from anytime.page.html import SORTED_FROM, Tables, esc, rich
from anytime.page.pictures import Pictures
from anytime.rows import Row
from anytime.tables import LEFT, pivots, provenance, sections, warnings, words

_BOKEH = "charts: BokehJS, (c) Anaconda, Inc., and Bokeh Contributors, BSD 3-Clause licence"


def page(rows: pd.DataFrame, records_root: Path, results: Path, folder: Path) -> str:
    """The page of an experiment; links to its records are relative to ``folder``. The same records give the same bytes.

    Pictures of test images are taken from ``results``/pictures, where ``pictures.keep`` has put them.
    Raises UsageError where Bokeh, whose script draws the charts, is not installed.
    """
    loaded = record.load(records_root, rows.attrs["exp"])
    networks = gather(loaded.records, [])
    return _Page(rows, networks, {id(r): path for r, path in loaded.records}, results, folder).text()


def script() -> str:
    """BokehJS with its plotting interface, minified, from the installed package."""
    try:
        from bokeh.util.paths import bokehjs_path
    except ImportError as error:
        raise UsageError("the page's charts need Bokeh's script: pip install bokeh, or ask for another format") from error
    folder = bokehjs_path() / "js"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in ("bokeh.min.js", "bokeh-api.min.js"))


class _Page:
    def __init__(
        self, rows: pd.DataFrame, networks: Sequence[Network], paths: Mapping[int, Path], results: Path, folder: Path
    ) -> None:
        self.rows, self.networks, self.paths, self.folder = rows, networks, paths, folder
        self.groups, self.table, self.facts, self.pictures = groups(networks), Tables(), Facts(networks), Pictures(results)
        self.number = {cell: i for i, network in enumerate(networks) for cell in network.cells.values()}
        self.parts: list[tuple[str, str, str]] = []  # anchor, title, HTML

    def text(self) -> str:
        """All of it."""
        decisions = [(group, found) for group in self.groups if (found := decided(group))]
        points = charts(self.rows, self.networks)
        for anchor, title, body in (
            ("pivot", "At a glance", self._pivots()),
            ("charts", "Accuracy against cost", _asset("charts.html") if points["series"] else ""),
            ("shares", "Where samples leave", pieces.shares(self.groups)),
            ("flips", "Decisions that flip", pieces.flips(decisions)),
            ("images", "Which test images leave first, and last", pieces.images(decisions, self.pictures)),
            *self._sections(),
            ("layers", "Layers", pieces.layers(self.groups, self.table)),
            ("networks", "Networks: spec, facts, records", "\n".join(map(self._network, self.networks))),
            ("facts", "Facts that records share", "\n".join(self._sheets())),
            ("made", "Made with", _list([*provenance(self.rows), _BOKEH])),
            ("left", LEFT, _list(self.rows.attrs["troubles"])),
            ("words", "Words", self._words()),
        ):
            if body:
                self.parts.append((anchor, title, body))
        exp, question = esc(self.rows.attrs["exp"]), esc(self.rows.attrs["question"])
        nav = "".join(f'<li><a href="#{anchor}">{esc(title)}</a>' for anchor, title, _ in self.parts)
        said = "".join(f"<p>{esc(line)}" for line in warnings(self.rows, "this page"))
        body = "\n".join(f'<section id="{a}"><h2>{esc(title)}</h2>\n{html}\n</section>' for a, title, html in self.parts)
        data = json.dumps(points, ensure_ascii=False, allow_nan=False)
        bokeh, own = script(), _asset("tables.js") + (_asset("charts.js") if points["series"] else "")
        # The policy lets nothing in from outside, and runs no script but these two: what a record says can never be one.
        hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (bokeh, own))
        policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}"
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{exp} · anytime</title>\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
            f"<style>\n{_asset('page.css')}{self.pictures.css()}</style>\n</head>\n<body>\n"
            f'<a class="skip" href="#pivot">to the tables</a>\n<header>\n<h1>{exp}</h1>\n<p class="question">{question}</p>\n'
            f'<div class="warnings">{said}</div>\n<nav aria-label="Contents"><ul>{nav}</ul></nav>\n</header>\n<main>\n{body}\n</main>\n'
            f'<script type="application/gzip" id="data">{_packed(data)}</script>\n'
            f'<script type="application/gzip" id="bokeh">{_packed(bokeh)}</script>\n<script>{own}</script>\n</body>\n</html>\n'
        )

    def _link(self, row: Row) -> str:
        return f"#n{self.number[row['cell'].split(',')[0]]}"

    def _pivots(self) -> str:
        return "\n".join(
            self.table(p.header, p.body, "Accuracy, latency and size by network, exit and backend") + _notes(p.notes)
            for p in pivots(self.rows)
        )

    def _sections(self) -> Iterator[tuple[str, str, str]]:
        """The sections of the report, those of lower level within the one above them."""
        found: list[tuple[str, list[str]]] = []
        for section in sections(self.rows):
            links = [self._link(row) for row in section.said]
            html = [f"<h3>{esc(section.title)}</h3>"] if section.level > 2 else []
            html += [f"<p>{esc(section.lead)}</p>"] if section.lead else []
            if section.header:
                caption = f"{section.title}: {len(section.body)} rows"
                html.append(self.table(section.header, section.body, caption, links, len(section.body) >= SORTED_FROM))
            html += [_notes(section.notes)] if section.notes else []
            if section.level > 2 and found:
                found[-1][1].extend(html)
            else:
                found.append((section.title, html))
        for i, (title, parts) in enumerate(found):
            yield f"s{i}", title, "\n".join(parts)

    def _network(self, network: Network) -> str:
        title = ", ".join([network.label("dataset"), named(network), form(network)])
        lines = [f"<dt>spec<dd><code>{esc(constructor(network.full_spec))}</code>"]
        lines.append(f"<dt>train seeds<dd>{esc(', '.join(f'{seed} ({cell})' for seed, cell in sorted(network.cells.items())))}")
        for name, values in self.facts.of(network):
            told = [
                (f"<i>{esc(who)}</i> " if who else "") + ", ".join(self._fact(name, value) for value in said)
                for who, said in values.items()
            ]
            lines.append(f"<dt>{esc(name)}<dd>{'; '.join(told)}")
        items = []
        for r in sorted(network.used, key=lambda r: record.KINDS.index(r.kind)):
            path = self.paths[id(r)]
            link = quote(Path(os.path.relpath(path, self.folder)).as_posix())
            about = next(iter(r.points), r.facts)
            said = [r.kind, r.board, about.get("policy_label"), about.get("arm"), about.get("budget")]
            text = " ".join(str(s) for s in said if s not in (None, ""))
            items.append(f"<li><a href={link}>{esc(text)}</a>" + (f" {esc(r.reason)}" if r.reason else ""))
        lines.append(f"<dt>records<dd><ul>{''.join(items)}</ul>")
        number = self.number[next(iter(network.cells.values()))]
        return f'<details id="n{number}"><summary>{esc(title)}</summary><dl>{"".join(lines)}</dl></details>'

    def _fact(self, name: str, value: str | int) -> str:
        return f'<a href="#f{value}">{esc(name)} {value + 1}</a>' if isinstance(value, int) else esc(value)

    def _sheets(self) -> Iterator[str]:
        if self.facts.shared:
            yield f"<h3>Of all records</h3><dl>{_terms(self.facts.shared)}</dl><h3>Of some</h3>"
        for number, name, facts in self.facts.sheets.values():
            yield f'<details id="f{number}"><summary>{esc(name)} {number + 1}</summary><dl>{_terms(facts)}</dl></details>'

    def _words(self) -> str:
        glossary = words(self.rows)
        return self.table(glossary.header, glossary.body, "Words") if glossary else ""


def _asset(name: str) -> str:
    return (files("anytime.page") / name).read_text(encoding="utf-8")


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{esc(line)}' for line in lines)}</ul>" if lines else ""


def _notes(lines: Sequence[str]) -> str:
    return f'<div class="notes">{"".join(f"<p>{rich(line)}" for line in lines)}</div>'


def _terms(facts: Row) -> str:
    return "".join(f"<dt>{esc(key)}<dd>{esc(flat(value))}" for key, value in sorted(facts.items()))
