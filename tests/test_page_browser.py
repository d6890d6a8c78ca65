"""What the page does in a real headless Chromium; skipped with a sentence where there is none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anytime import report
from anytime.tables import sections
from tests.golden.make import EXP, Cell, Maker, first

REPO = Path(__file__).parents[1]
HOSTILE = """"><img src=x onerror="document.title='owned'"><!--'{{}}"""
SCRIPT = "</script><script>document.title='owned'</script>"


def make(records: Path, exp: str, out: Path) -> Path:
    """Write the page; where it lies."""
    return report.write(records, exp, out, ["html"])[0]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page in a browser is not tested: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("the page in a browser is not tested: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page in the browser, without network, and what it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, drawn: bool = True, **context: Any) -> None:
        self.said: list[str] = []
        self.page = browser.new_context(offline=True, **context).new_page()
        self.page.on("console", lambda m: self.said.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda r: self.said.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        self.page.goto(path.as_uri())
        if drawn and context.get("java_script_enabled", True):
            # The page's own policy forbids wait_for_function, which evaluates strings.
            self.page.locator(".bk-Figure").first.wait_for(state="attached")

    def source(self, name: str) -> dict[str, list[Any]]:
        """The data of a source of a chart."""
        code = "name => { for (const d of Bokeh.documents) { const s = d.get_model_by_name(name); if (s) return {...s.data} } }"
        found: dict[str, list[Any]] = self.page.evaluate(code, name)
        return found

    def column(self, table: str, title: str) -> list[str]:
        """The texts that stand under a heading."""
        head = self.page.locator(f"{table} thead th").all_text_contents()
        at = next(i for i, text in enumerate(head) if text.startswith(title))
        cells: list[str] = self.page.locator(f"{table} tbody tr").evaluate_all(
            "(rows, i) => rows.map((r) => r.cells[i].textContent)", at
        )
        return cells

    def table(self, title: str) -> str:
        """The selector of the first table of a section."""
        code = "t => [...document.querySelectorAll('section')].find((s) => s.querySelector('h2').textContent === t).querySelector('table')"
        return f"#{self.page.evaluate(f'{code}.id', title)}"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(REPO / "results/records", "quickstart", tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def tab(chromium: Any, quickstart: Path) -> Iterator[Tab]:
    tab = Tab(chromium, quickstart)
    yield tab
    assert tab.said == [], "no error, no warning, no dialog, nothing asked of the network"
    tab.page.context.close()


def test_it_loads_without_errors_and_draws_every_row(tab: Tab) -> None:
    assert tab.page.locator("#by-macs canvas, #by-ms canvas").count() >= 2
    rows = report.rows(REPO / "results/records", "quickstart")
    exits = rows[(rows["of"].isin(["eval", "measure"])) & (rows["status"] == "done")].drop_duplicates(["cell", "exit"])
    drawn = tab.source("by-macs exits")
    assert sorted(round(y, 2) for y in drawn["y"]) == sorted(round(100 * a, 2) for a in exits["accuracy"])
    assert len(tab.source("by-ms exits")["x"]) == exits["latency_ms_p50"].notna().sum()


def test_the_slider_moves_every_policy_to_recorded_points(tab: Tab) -> None:
    rows = report.rows(REPO / "results/records", "quickstart")
    refitted = rows[(rows["arm"] == "refitted") & (rows["status"] == "done")]
    recorded = {(round(m / 1e6, 3), round(100 * a, 2)) for m, a in zip(refitted["macs"], refitted["accuracy"], strict=True)}
    slider = tab.page.locator("#budget")
    slider.focus()
    seen = []
    for key in ("Home", "End", *["PageDown"] * 3, "ArrowLeft"):
        slider.press(key)
        now = tab.source("by-macs now")
        points = {(round(x, 3), round(y, 2)) for x, y in zip(now["x"], now["y"], strict=True)}
        assert points <= recorded
        assert len(tab.column("#now", "policy")) == 5 and tab.column("#now", "MACs").count("–") == 5 - len(now["x"])
        seen.append(points)
    assert seen[0] == set(), "under the least budget nothing is recorded, so nothing is drawn"
    dearest = refitted[refitted["budget"] == 1]
    assert {x for x, _ in seen[1]} == {round(m / 1e6, 3) for m in dearest["macs"]}
    assert seen[2] != seen[1], "the points have moved"
    assert tab.page.locator("#budget-said").text_content() == slider.input_value()
    assert {f"{x:.3f}" for x, _ in seen[-1]} == set(tab.column("#now", "MACs"))


def test_a_backend_can_be_left_out(tab: Tab) -> None:
    before = len(tab.source("by-macs exits")["x"])
    box = tab.page.locator("#columns label", has_text="INT8 QAT").locator("input")
    box.focus()
    box.press("Space")
    assert len(tab.source("by-macs exits")["x"]) == before - 3
    assert not [who for who in tab.source("by-macs now")["who"] if "INT8 QAT" in who]


def test_other_thresholds_are_held_against_the_reference_s_own(tab: Tab) -> None:
    tab.page.locator("#arm").select_option("kept")
    assert sorted(tab.column("#now", "policy")) == ["Entropy, kept"] * 4 + ["Entropy, refitted"]
    assert tab.column("#now", "backend")[tab.column("#now", "policy").index("Entropy, refitted")] == "FP32, torch"


def test_sorting_sorts_and_ends_where_it_began(tab: Tab) -> None:
    table = tab.table("Exits")
    original = tab.column(table, "mean (ms)")
    button = tab.page.locator(f"{table} th", has_text="mean (ms)").locator("button")
    button.click()
    down = tab.column(table, "mean (ms)")
    button.focus()
    button.press("Enter")
    up = tab.column(table, "mean (ms)")
    known = sorted(float(text) for text in original if text != "–")
    absent = ["–"] * original.count("–")
    assert absent and down == [f"{ms:.3f}" for ms in reversed(known)] + absent, "what was not measured comes last"
    assert up == [f"{ms:.3f}" for ms in known] + absent
    assert tab.page.locator(f"{table} th[aria-sort=ascending]").count() == 1
    button.click()
    assert tab.column(table, "mean (ms)") == original and tab.page.locator(f"{table} th[aria-sort]").count() == 0


def test_filtering_filters(tab: Tab) -> None:
    table = tab.table("Policies")
    section = tab.page.locator("section", has=tab.page.locator(table))
    section.locator("input[type=search]").fill("int8 kept")
    section.locator("output", has_text=re.compile("^8 of 36")).wait_for()
    assert set(tab.column(table, "arm")) == {"kept"} and set(tab.column(table, "column")) == {"INT8 PTQ", "INT8 QAT"}
    section.locator("select[aria-label^=budget]").select_option("=0.5 × macs")
    assert tab.column(table, "budget") == ["0.5 × macs"] * 2
    section.locator("input[type=search]").fill("no such row")
    section.locator("output", has_text=re.compile("^0 of 36")).wait_for()
    assert tab.column(table, "arm") == []


def test_the_keyboard_reaches_a_row_s_facts(tab: Tab) -> None:
    link = tab.page.locator(f"{tab.table('Policies')} a").first
    target = tab.page.locator(link.get_attribute("href"))
    assert target.get_attribute("open") is None
    link.focus()
    link.press("Enter")
    tab.page.locator(f"{link.get_attribute('href')}[open]").wait_for()
    assert link.get_attribute("aria-label") == "spec, facts and records of this row"
    assert tab.page.evaluate("document.querySelectorAll('.frame:not([tabindex])').length") == 0, (
        "every frame can be scrolled by keys"
    )
    assert (
        tab.page.evaluate(
            "[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length && !e.ariaLabel).length"
        )
        == 0
    )


def test_hovering_tells_a_point(tab: Tab) -> None:
    tab.page.locator("#by-macs").scroll_into_view_if_needed()
    code = """() => {
      const view = [...Bokeh.index.roots].find((v) => v.model.renderers.some((r) => r.data_source.name === 'by-macs exits'));
      const {x, y} = Bokeh.documents.map((d) => d.get_model_by_name('by-macs exits')).find(Boolean).data;
      const box = view.el.getBoundingClientRect();
      return [box.x + view.frame.x_scale.compute(x[0]), box.y + view.frame.y_scale.compute(y[0])] }"""
    tab.page.mouse.move(*tab.page.evaluate(code))
    said = tab.page.locator(".bk-Tooltip")
    said.get_by_text("B-LeNet static, FP32, torch").wait_for()
    assert said.get_by_text(re.compile(r"^98\.89 % at 1\.140 M MACs, \d\.\d+ ms on host$")).count() > 0


def test_a_dark_page_is_dark(chromium: Any, quickstart: Path) -> None:
    shades = []
    for scheme in ("light", "dark"):
        tab = Tab(chromium, quickstart, color_scheme=scheme)
        shades.append(
            (tab.page.evaluate("getComputedStyle(document.body).backgroundColor"), tab.source("by-macs exits")["color"][0])
        )
        kept = tab.page.evaluate("[Bokeh.documents.length, [...Bokeh.index.roots].length]")
        assert tab.said == []
        tab.page.emulate_media(color_scheme="light")
        for _ in range(500):
            if tab.source("by-macs exits")["color"][0] == shades[0][1]:
                break
            tab.page.wait_for_timeout(20)
        else:
            pytest.fail("the charts do not follow")
        assert tab.page.evaluate("[Bokeh.documents.length, [...Bokeh.index.roots].length]") == kept, "and replace the old ones"
        assert tab.page.locator(".bk-Figure").count() == 2
        tab.page.context.close()
    assert shades[0] != shades[1] and shades[0][0] == "rgb(255, 255, 255)"


def test_without_javascript_the_tables_are_there(chromium: Any, quickstart: Path) -> None:
    tab = Tab(chromium, quickstart, java_script_enabled=False)
    rows = report.rows(REPO / "results/records", "quickstart")
    for section in sections(rows):
        parts = tab.page.locator("section", has=tab.page.locator("h2", has_text=re.compile(f"^{re.escape(section.title)}$")))
        if section.body:
            assert parts.locator("table").first.is_visible()
            assert parts.locator("table").first.locator("tbody tr").count() == len(section.body)
    assert tab.page.locator("#pivot table").is_visible() and tab.page.locator(".bars").first.is_visible()
    assert not tab.page.locator("#budget").is_visible() and tab.page.locator(".if-no-script").is_visible()
    tab.page.context.close()


def test_hostile_names_do_nothing(chromium: Any, tmp_path: Path) -> None:
    to = Maker(tmp_path / "records")
    for i, name in enumerate((HOSTILE, SCRIPT)):
        for j, model in enumerate((f"{name}-a", f"{name}-b")):
            cell = Cell(to, 2 * i + j, model, name, name, name)
            cell.facts |= {"dataset": name, "question": SCRIPT, "reference": True, name: name, "device": {name: SCRIPT}}
            cell.spec |= {"model": {"is": model, "note": SCRIPT}, "data": {"is": name}}
            cell.eval([first(8), first(4)]).measure(0.5, 1.0).decide(20)
            cell.record("skip", "skip", of="measure", board=name, reason=f"no {name}")
    (to.folder / "torn.json").write_text(SCRIPT)
    exp = HOSTILE.replace("/", "")
    for path in to.folder.glob("*-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"exp": exp}))
    to.folder.rename(to.folder.with_name(exp))
    written = make(tmp_path / "records", exp, tmp_path)
    tab = Tab(chromium, written.rename(tmp_path / "pages/hostile.html"))
    assert tab.page.title() == f"{exp} · anytime" and tab.page.locator("h1").text_content() == exp
    for value in (HOSTILE, SCRIPT):
        tab.page.locator("#dataset").select_option(value)
        now = tab.source("by-macs now")
        assert len(now["x"]) == 2 and all(value in who for who in now["who"])
    tab.page.locator("#budget").press("End")
    tab.page.locator("th button").first.click()
    assert tab.page.locator("img, main script").count() == 0 and tab.page.evaluate("document.scripts.length") == 4
    assert tab.page.title() == f"{exp} · anytime" and tab.said == []
    tab.page.context.close()


def test_an_experiment_without_a_finished_cell_has_no_charts(chromium: Any, tmp_path: Path) -> None:
    to = Maker(tmp_path / "records")
    Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").miss("fail", "eval", "the loss is NaN")
    tab = Tab(chromium, make(tmp_path / "records", EXP, tmp_path), drawn=False)
    assert tab.page.locator("#charts").count() == 0 and tab.page.get_by_text("No cell has finished yet.").is_visible()
    assert tab.page.evaluate("document.documentElement.className") == "script" and tab.said == []
    tab.page.context.close()


def test_thousands_of_rows_are_shown_piece_by_piece(chromium: Any, tmp_path: Path) -> None:
    to = Maker(tmp_path / "records")
    for i in range(130):
        Cell(to, i, "B-LeNet", f"PTQ({i})", f"INT{i}", "torch").eval([first(i % 17), first(i % 13)])
    tab = Tab(chromium, make(tmp_path / "records", EXP, tmp_path))
    table = tab.table("Exits")
    section = tab.page.locator("section", has=tab.page.locator(table))
    assert tab.page.locator(f"{table} tbody tr").count() == 200
    assert section.locator("output").text_content() == "the first 200 of 260 rows"
    tab.page.locator(f"{table} th", has_text="accuracy").locator("button").click()
    assert tab.column(table, "accuracy")[0].startswith("100.00"), "all are sorted, not only those shown"
    section.locator("input[type=search]").fill("int129")
    section.locator("output", has_text=re.compile("^2 of 260")).wait_for()
    section.locator("input[type=search]").fill("")
    section.locator("button", has_text="show all").click()
    assert tab.page.locator(f"{table} tbody tr").count() == 260 and tab.said == []
    tab.page.context.close()
