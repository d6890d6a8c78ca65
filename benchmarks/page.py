"""How large the page of an experiment is, how fast it is painted, and how it does with 5,000 rows: headless Chromium.

    python benchmarks/page.py [EXP ...]      by default every experiment with records, then one of 5,000 rows

The large one is qat_branchynet's records, copied under other names until there are 5,000 rows. Bars: under 5 MB, first paint
under 2 s; exit code 1 where one is missed. Sorting or filtering 5,000 rows should take the time of a key press.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from anytime import report
from anytime.page import page

RECORDS = Path("results/records").resolve()


def enlarge(root: Path, n_rows: int) -> str:
    """Copies of an experiment's records, as other backends."""
    exp, source = "large", RECORDS / "qat_branchynet"
    (root / exp).mkdir(parents=True)
    for i in range(-(-n_rows // len(report.rows(RECORDS, source.name)))):
        for path in source.glob("*.json"):
            said = json.loads(path.read_text())
            said |= {"exp": exp, "cell": f"{said['cell']}{i}", "fact": f"{said['fact']}{i}"}
            said["spec"]["backend"]["copy"] = i
            for name in ("backend", "column"):
                said["facts"][name] += f" #{i}"
            stem = root / exp / f"{path.stem}-{i}"
            stem.with_suffix(".json").write_text(json.dumps(said))
            if path.with_suffix(".npz").exists():
                stem.with_suffix(".npz").symlink_to(path.with_suffix(".npz"))
    return exp


TIMED = """async ([what, value]) => {
  const titled = (word) => [...document.querySelectorAll("table[data-sort]")].find((t) => t.caption.textContent.startsWith(word));
  const table = titled("Policies") || titled("Exits");
  const start = performance.now();
  if (what === "sort") table.tHead.rows[0].cells[value].querySelector("button").click();
  else { const box = table.parentElement.previousElementSibling.querySelector("input");
    box.value = value; box.dispatchEvent(new Event("input")); await new Promise((done) => setTimeout(done, 81)); }
  table.getBoundingClientRect();
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return [performance.now() - start, table.parentElement.previousElementSibling.querySelector("output").textContent];
}"""


def show(browser, path: Path) -> tuple[str, float]:  # type: ignore[no-untyped-def]
    """What a reader waits for; the seconds to the first paint."""
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    start = time.perf_counter()
    tab.goto(path.as_uri())
    tab.locator(".bk-Figure").first.wait_for(state="attached")
    ready = time.perf_counter() - start
    paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    (sort, of), (search, found) = (tab.evaluate(TIMED, said) for said in (["sort", 10], ["filter", "int8 0.25"]))
    tab.close()
    return f"first paint {paint:.2f} s, charts {ready:.2f} s, sort {sort:.0f} ms ({of}), filter {search:.0f} ms ({found})", paint


def main(names: list[str]) -> list[str]:
    """A line per experiment; those that miss a bar."""
    missed = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        out = Path(folder)
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        asked = [(RECORDS, name) for name in names or sorted(p.name for p in RECORDS.iterdir())]
        for root, exp in [*asked, *([] if names else [(out / "records", enlarge(out / "records", 5000))])]:
            rows = report.rows(root, exp)
            start = time.perf_counter()
            text = page(rows, root, Path("results"), out / "pages")
            took, size, path = time.perf_counter() - start, len(text.encode()) / 1e6, out / f"{exp}.html"
            path.write_text(text, encoding="utf-8")
            said, paint = show(browser, path)
            print(f"{exp}: {len(rows)} rows, {size:.2f} MB, written in {took:.1f} s; {said}", flush=True)
            missed += [exp] * (size >= 5 or paint >= 2)
    return missed


if __name__ == "__main__":
    if missed := main(sys.argv[1:]):
        sys.exit(f"over 5 MB, or painted after 2 s: {', '.join(missed)}")
