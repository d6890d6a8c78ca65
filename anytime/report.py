"""Rows -> Markdown, CSV, LaTeX, text, and the files that hold them and the page; torch is never needed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from anytime.errors import UsageError, WriteError, near
from anytime.rows import rows as rows
from anytime.styles import LATEX, MD, PLAIN, Style, md_table
from anytime.tables import LEFT, pivots, provenance, sections, warnings, words
from anytime.tables import pivot as pivot

FORMATS = ("md", "csv", "tex")  # written unless others are asked for; "html" is the page


def show(rows: pd.DataFrame, fmt: str = "text") -> str:
    """The report as text: "text" (the pivot, for a terminal), "md" (everything), "csv" (the rows), "tex" (the pivot, booktabs).

    The same rows give the same bytes. Raises UsageError for another format.
    """
    if fmt == "csv":
        # Counts whole, all else to 12 digits: the last ones differ between processors, and tables are compared byte by byte.
        return rows.to_csv(index=False, float_format=_digits, lineterminator="\n")
    if fmt == "text":
        blocks = [*_pivots(rows, PLAIN), *warnings(rows)]
    elif fmt == "tex":
        head = f"% {rows.attrs['exp']}: written by anytime.report; needs \\usepackage{{booktabs}}"
        blocks = [head, *_pivots(rows, LATEX)]
    elif fmt == "md":
        blocks = _markdown(rows)
    else:
        raise UsageError(f"there is no report format {fmt!r}; {near(fmt, ('text', 'md', 'csv', 'tex'))}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def write(records_root: Path, exp: str, out_root: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write tables/<exp>.<format>, pages/<exp>.html where "html" is asked for, and figures/<exp>*.svg under ``out_root``.

    The same records give the same bytes. Raises UsageError for an unknown format or an experiment without records, WriteError
    when a file cannot be written.
    """
    from anytime import figures  # importing matplotlib takes longer than all tables

    if unknown := [fmt for fmt in formats if fmt not in (*FORMATS, "html")]:
        raise UsageError(f"there is no report format {unknown[0]!r}; {near(unknown[0], (*FORMATS, 'html'))}")
    frame = rows(records_root, exp)
    pictures = {out_root / "figures" / f"{exp}{suffix}.svg": picture for suffix, picture in figures.pictures(frame).items()}
    tables = [out_root / ("pages" if fmt == "html" else "tables") / f"{exp}.{fmt}" for fmt in formats]
    paths = [*tables, *pictures]
    for path in paths:
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".svg":
                figures.draw(frame, temporary, pictures[path])
            elif path.suffix == ".html":
                from anytime.page import page

                temporary.write_text(page(frame, records_root, out_root, path.parent), encoding="utf-8")
            else:
                temporary.write_text(show(frame, path.suffix[1:]), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise WriteError(f"cannot write {path}: {error.strerror or error}; free space or change its rights") from error
    return paths


def differences(exp: str, results: Path) -> list[str]:
    """A sentence per table of ``exp`` under ``results`` that is not, byte by byte, what the records there give.

    Figures are drawn, which must work, but not compared: their letters depend on the machine's fonts.
    """
    said = []
    with tempfile.TemporaryDirectory() as folder:
        for path in write(results / "records", exp, Path(folder)):
            there = results / path.relative_to(folder)
            fix = f"make report EXP={exp}, and read the difference"
            if path.suffix == ".svg":
                continue
            if not there.is_file():
                said.append(f"{there} is missing: {fix}")
            elif there.read_bytes() != path.read_bytes():
                lines = zip(there.read_text().splitlines(), path.read_text().splitlines(), strict=False)
                at = next((k for k, (old, new) in enumerate(lines, 1) if old != new), "the last")
                said.append(f"{there} is not what its records give, from line {at} on: {fix}")
    return said


def _digits(value: Any) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.12g}"


def _pivots(rows: pd.DataFrame, style: Style) -> Iterator[str]:
    for section in pivots(rows):
        yield style.table(section.header, section.body)
        yield style.between.join(map(style.line, section.notes))


def _markdown(rows: pd.DataFrame) -> list[str]:
    blocks = [f"# {rows.attrs['exp']}", rows.attrs["question"], *_pivots(rows, MD), *warnings(rows)]
    for section in sections(rows):
        blocks += [f"{'#' * section.level} {section.title}", section.lead]
        blocks += [md_table(section.header, section.body) if section.header else "", MD.between.join(section.notes)]
    if rows.attrs["troubles"]:
        blocks += [f"## {LEFT}", "\n".join(f"- {trouble}" for trouble in rows.attrs["troubles"])]
    blocks += ["## Made with", "\n".join(f"- {line}" for line in provenance(rows))]
    glossary = words(rows)
    return [*blocks, f"## {glossary.title}", md_table(glossary.header, glossary.body)] if glossary else blocks
