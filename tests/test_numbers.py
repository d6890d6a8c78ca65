"""Every measured number in README.md and results/README.md stands in a record.

A number is measured if it has a decimal point or a unit of ``UNIT``. In prose it is followed by a comment, which a reader does not
see, that says where it is from; a comment serves all the numbers since the one before it, in their order:

    81.68 % [80.9, 82.4] <!-- qat_branchynet: accuracy, accuracy_lo, accuracy_hi of model=B-AlexNet; column=INT8 QAT; policy=exit 3 -->
    1.33 times <!-- qat_branchynet: latency_ms_mean of model=B-AlexNet; policy=exit 3; backend=... / backend=... -->
    46 minutes <!-- qat_branchynet: minutes -->
    0.29 s <!-- benchmarks/policies: ztw_s -->

The first names columns of results/tables/EXP.csv, which `make check` holds equal to the records, and conditions that leave one value;
"A / B" and "A - B" repeat only the conditions that differ. ``minutes`` is what the records say of training, compressing and predicting.
The last reads "values" of results/benchmarks/NAME.json. A line of a table is one of a table in results/tables, or cites like prose.

Code, links and what is no measurement by its form are exempt: parts of words (INT8, ResNet-20), whole numbers without a unit (2 cores,
8 bits), versions and settings (a decimal without a unit after a name or a word of ``SETTING``), and the level of an interval (95 % limit).
"""

import json
import re
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pytest

from anytime.metrics import METRICS
from anytime.record import load

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "results/README.md")
UNIT = r"%|percentage points|points?|ms|[µu]s|seconds?|s|minutes?|min|hours?|h|kB|MB|GB|mJ|x|×|times|M|G|dB|nats|BOPs|MACs"
SETTING = "budget|threshold|temperature|version|seed|epoch|epochs|share|weight|factor"
NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_.])(?<![A-Za-z]-)([+−-]?)(\d+(?:,\d{{3}})*(?:\.\d+)?)(?:\s*({UNIT}))?(?![A-Za-z0-9_])(?!\.\d)"
)
SOURCE = re.compile(r"<!--\s*([\w/-]+):\s*(.+?)\s*-->", re.S)
LEVEL = re.compile(r"\s*(?:\]|one-sided|two-sided|upper|lower|limit|interval|confidence)")


def blocks(text):
    """(line, text) of every paragraph, list item and line of a table, without code and targets of links."""
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m.group().count("\n"), text, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->", lambda m: m.group().replace("\n", " ") + "\n" * m.group().count("\n"), text, flags=re.S)
    said, before = [], ""
    for i, line in enumerate(text.split("\n"), 1):
        code = line.startswith("    ") and not (before.strip() and said)
        if line.strip() and not code:
            starts = re.match(r"\s*(\||[-*] |#|\d+\. )", line)
            line = re.sub(r"^\s*\d+\. ", "", line)
            if starts or not before.strip():
                said.append([i, line])
            else:
                said[-1][1] += " " + line
        before = "" if code else line
    for at, block in said:
        yield at, re.sub(r"`[^`]*`|https?://\S+|\]\([^)]*\)", lambda m: "]" if m.group()[0] == "]" else " code ", block)


def measured(match, text):
    """Whether a number is a measurement, by its form."""
    _, digits, unit = match.groups()
    before, after = text[: match.start()], text[match.end() :]
    if unit == "%" and digits == "95" and LEVEL.match(after):
        return False
    return bool(unit) or ("." in digits and not re.search(rf"(?:\b[A-Z][\w.+]*|\b(?:{SETTING}))\s+$", before))


@lru_cache(None)
def table(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def shown(column, value):
    """As a page shows it: in percent, points, millions ..."""
    base = column if column in METRICS else re.sub("_(lo|hi|upper)$", "", column)
    unit = METRICS[base].unit if base in METRICS else ""
    return value * {"%": 100, "points": 100, "M": 1e-6, "G": 1e-9, "MB": 1e-6}.get(unit, 1)


@lru_cache(None)
def cited(exp, query, results):
    """The values that a source names; ValueError says what is wrong with it."""
    if exp.startswith("benchmarks/"):
        values = json.loads((results / f"{exp}.json").read_text())["values"]
        return [float(values[name.strip()]) for name in query.split(",")]
    if query == "minutes":
        evals = [r for r, _ in load(results / "records", exp).records if r.kind == "eval"]
        return [sum(r.facts["wall_s"]["all"] for r in evals) / 60]
    if not (results / "tables" / f"{exp}.csv").is_file():
        raise ValueError(f"there is no table {exp}.csv")
    (one, how, other) = re.match(r"(.*?)(?:\s+([/-])\s+(.*))?$", query).groups()
    columns, _, said = one.partition(" of ")
    where = dict(part.strip().partition("=")[::2] for part in said.split(";"))
    values = [[value(exp, column.strip(), where, results) for column in columns.split(",")]]
    if how:
        others = where | dict(part.strip().partition("=")[::2] for part in other.split(";"))
        values.append([value(exp, column.strip(), others, results) for column in columns.split(",")])
        return [a / b if how == "/" else a - b for a, b in zip(*values, strict=True)]
    return values[0]


def value(exp, column, where, results):
    rows = table(results / "tables" / f"{exp}.csv")
    rows = rows[rows["status"] == "done"]
    for name, wanted in where.items():
        if name not in rows:
            raise ValueError(f"{exp}.csv has no column {name!r}")
        rows = rows[rows[name] == wanted]
    if column not in rows:
        raise ValueError(f"{exp}.csv has no column {column!r}")
    found = {text for text in rows[column] if text}
    if len(found) != 1:
        raise ValueError(f"{column} of {where} is {len(found)} values in {exp}.csv, one is needed")
    return shown(column, float(found.pop()))


@lru_cache
def lines_of_tables(results):
    return {line for path in (results / "tables").glob("*.md") for line in path.read_text().splitlines()}


def wrong(page, results):
    """Sentences about the numbers of ``page`` that no record holds."""
    known = lines_of_tables(results)
    for line, block in blocks(page.read_text()):
        if block in known or (block.startswith("|") and page.read_text().splitlines()[line - 1] in known):
            continue
        bare = SOURCE.sub(
            lambda m: " " * len(m.group()), re.sub(r"<!--(?!\s*[\w/-]+:).*?-->", lambda m: " " * len(m.group()), block)
        )
        pending, events = [], [(m.start(), m) for m in NUMBER.finditer(bare) if measured(m, bare)]
        for _, m in sorted(events + [(m.start(), m) for m in SOURCE.finditer(block)], key=lambda event: event[0]):
            if m.re is NUMBER:
                pending.append(m)
                continue
            try:
                values = cited(*m.groups(), results)
            except (ValueError, KeyError, OSError, AttributeError) as error:
                yield f"{page.name}, line {line}: {m.group()} cannot be read: {error}"
                continue
            if len(values) != len(pending):
                yield f"{page.name}, line {line}: {m.group()} has {len(values)} values for {len(pending)} numbers"
            for number, there in zip(pending, values, strict=False):
                sign, digits, unit = number.groups()
                here = float(digits.replace(",", "")) * (-1 if sign in ("-", "−") else 1)
                scale = 100 if unit == "%" and " / " in m.group() else 1
                if abs(here - there * scale) > 0.5000001 * 10.0 ** -len(digits.partition(".")[2]):
                    yield f"{page.name}, line {line}: {number.group().strip()} is {there * scale:.6g} by {m.group()}"
            pending = []
        for number in pending:
            yield f"{page.name}, line {line}: {number.group().strip()!r} has no source: write <!-- EXP: COLUMN of NAME=VALUE --> behind it"


@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_found_in_a_record(page):
    if not (ROOT / page).exists():
        pytest.skip(f"there is no {page} yet")
    assert not (sentences := list(wrong(ROOT / page, ROOT / "results"))), "\n".join(sentences)


@pytest.mark.parametrize("page", PAGES)
def test_a_changed_digit_of_a_measured_number_is_caught(page, tmp_path):
    """The saboteur: the last digit of each measured number in turn, the first 60, whether in a table or in prose."""
    if not (ROOT / page).exists():
        pytest.skip(f"there is no {page} yet")
    text, copy, n = (ROOT / page).read_text(), tmp_path / Path(page).name, 0
    lines, before = text.splitlines(), set(wrong(ROOT / page, ROOT / "results"))
    for at, block in blocks(text):
        for number in NUMBER.finditer(SOURCE.sub("", block)):
            line = next((i for i in range(at - 1, len(lines)) if number.group(2) in SOURCE.sub("", lines[i])), None)
            if n < 60 and line is not None and measured(number, SOURCE.sub("", block)):
                changed = number.group(2)[:-1] + str((int(number.group(2)[-1]) + 1) % 10)
                copy.write_text("\n".join([*lines[:line], lines[line].replace(number.group(2), changed, 1), *lines[line + 1 :]]))
                assert set(wrong(copy, ROOT / "results")) - before, f"{number.group()} -> {changed} was not seen"
                n += 1
    assert n > 5


# The rules themselves, on a page and a table of their own ---------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    (tmp_path / "tables").mkdir()
    lines = ["model,policy,status,accuracy,accuracy_lo,loss,latency_ms_mean,macs", "A,exit 1,done,0.81638,0.80,0.0012,2,1234567"]
    lines += ["B,exit 1,done,0.5,0.4,-0.003,1,2000000", "B,exit 2,done,0.6,0.4,,1,2000000"]
    (tmp_path / "tables" / "mine.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "tables" / "mine.md").write_text("| A | 81.64 |\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "speed.json").write_text('{"values": {"ours_s": 0.29, "ratio": 51234}}')
    return tmp_path


def said(results, text):
    page = results / "page.md"
    page.write_text(text)
    return list(wrong(page, results))


@pytest.mark.parametrize(
    "text",
    [
        "It has 81.6 % <!-- mine: accuracy of model=A --> right.",
        "81.64 %, at least 80.0 <!-- mine: accuracy, accuracy_lo of model=A -->",
        "It loses 0.12\npoints <!-- mine: loss of model=A -->, gains −0.3 points <!-- mine: loss of model=B; policy=exit 1 -->.",
        "1.23 M MACs <!-- mine: macs of model=A -->",
        "2.0 times as slow <!-- mine: latency_ms_mean of model=A / model=B -->",
        "62 % <!-- mine: macs of model=A / model=B; policy=exit 1 --> of the MACs",
        "31.6 points more <!-- mine: accuracy of model=A - model=B; policy=exit 1 -->",
        "0.29 s <!-- benchmarks/speed: ours_s -->, 51,234 times <!-- benchmarks/speed: ratio -->",
        "| A | 81.64 |",
        "On 2 cores, Python 3.11, ResNet-20 in INT8 or W4A4, 2 to 8 bits, budget 0.5, an upper 95 % limit [95 %], on 2026-11-20.",
        "`--tolerance 0.3` and [a link 7](https://x.y/1.5)\n\n    make x B=0.5 # 3 s\n\n```\n0.5 s\n```",
        "<!-- 1.5 s of thought --> nothing",
    ],
)
def test_what_is_true_or_no_measurement_passes(results, text):
    assert said(results, text) == []


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("It has 81.7 % <!-- mine: accuracy of model=A --> right.", "81.7 % is 81.638"),
        ("It has 81.6 % right.", "'81.6 %' has no source"),
        ("It takes 48 minutes.", "'48 minutes' has no source"),
        ("0.29–0.35 s", "has no source"),
        ("- A list: 3x as fast", "'3x' has no source"),
        ("| A | 81.65 |", "'81.65' has no source"),
        ("It loses 0.12 and 0.3 points <!-- mine: loss of model=A -->", "1 values for 2 numbers"),
        ("It loses 0.3 points <!-- mine: loss of model=B; policy=exit 1 -->", "is -0.3"),
        ("80 % <!-- mine: accuracy of model=B -->", "is 2 values"),
        ("80 % <!-- mine: acuracy of model=B -->", "no column 'acuracy'"),
        ("80 % <!-- yours: accuracy of model=B -->", "no table yours.csv"),
        ("51,235 times <!-- benchmarks/speed: ratio -->", "51,235 times is 51234"),
        ("Python 3.11 s", "'3.11 s' has no source"),
        ("95 % of all", "'95 %' has no source"),
    ],
)
def test_what_no_record_holds_is_caught(results, text, sentence):
    assert any(sentence in line for line in said(results, text)), said(results, text)
