"""The page: what it says, counted by hand on the golden records. What it does in a browser: test_page_browser.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from anytime import report
from anytime.errors import UsageError
from anytime.gather import gather
from anytime.page import data, page, pieces
from anytime.page.pictures import Pictures, keep
from anytime.record import load
from anytime.tables import pivots, sections
from tests.golden.make import EXP, LABELS, Cell, Maker, N, first

REPO = Path(__file__).parents[1]
RECORDS = REPO / "tests/golden/records"


class Parsed(HTMLParser):
    """Tables as rows of texts, sections by title, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else self.inside if tag in ("b", "a", "br") else ""
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = "cell"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr", "table", "script", "style"):
            self.inside = ""

    def handle_data(self, text: str) -> None:
        if self.inside == "cell":
            self.rows[-1][-1] += text.strip("\n")


def make(records: Path, exp: str, out: Path) -> Path:
    """Write the page; where it lies."""
    return report.write(records, exp, out, ["html"])[0]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(RECORDS, EXP, tmp_path_factory.mktemp("golden"))


@pytest.fixture
def to(tmp_path: Path) -> Maker:
    return Maker(tmp_path / "records")


def the_group() -> data.Group:
    """B-LeNet of the golden records."""
    return next(g for g in data.groups(gather(load(RECORDS, EXP).records, [])) if g.network == "B-LeNet")


# What it says ------------------------------------------------------------------------------------------------------


def test_the_page_lies_beside_the_tables_and_is_not_among_the_usual_formats(golden: Path, tmp_path: Path) -> None:
    assert (golden.parent.name, golden.name) == ("pages", "golden.html")
    assert not any(path.suffix == ".html" for path in report.write(RECORDS, EXP, tmp_path))
    with pytest.raises(UsageError, match="did you mean 'html'"):
        report.write(RECORDS, EXP, tmp_path, ["htm"])


def test_every_cell_of_every_table_of_the_report_is_in_the_page(golden: Path) -> None:
    rows = report.rows(RECORDS, EXP)
    there = [line[-len(line) :] for line in Parsed(golden.read_text()).rows]
    said = [section for section in [*pivots(rows), *sections(rows)] if section.header]
    assert len(said) >= 6
    for section in said:
        for line in section.body:
            plain = [cell.replace("**", "") for cell in line]
            assert any(row[-len(plain) :] == plain for row in there), f"{section.title}: {plain}"


def test_nothing_is_fetched_and_no_other_script_may_run(golden: Path) -> None:
    text = golden.read_text()
    tags = Parsed(text).tags
    assert not [tag for tag, said in tags if tag in ("link", "iframe", "img", "base", "object") or "src" in said]
    assert not [said for _, said in tags if any(name.startswith("on") for name in said)]
    policy = next(said["content"] for tag, said in tags if tag == "meta" and said.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none';") and len(re.findall("sha256-", policy)) == 2
    assert "unsafe" not in policy.partition("script-src")[2]


def test_the_same_records_give_the_same_page_without_torch(golden: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; from anytime import report;"
        f"report.write(Path({str(RECORDS)!r}), {EXP!r}, Path(sys.argv[1]), ['html'])"
    )
    subprocess.run([sys.executable, "-c", code, str(golden.parents[2] / "again")], cwd=REPO, check=True)
    assert (golden.parents[2] / "again/pages/golden.html").read_bytes() == golden.read_bytes()


def test_each_row_leads_to_its_spec_its_facts_and_its_records(golden: Path) -> None:
    text = golden.read_text()
    links = set(re.findall(r"<td><a href=(#n\d+)>", text))
    assert links and all(f'<details id="{link[1:]}">' in text for link in links)
    details = re.search(
        r'<details id="\w+"><summary>Toy, B-LeNet, INT8 PTQ, ONNX Runtime</summary>.*?</details>', text, re.DOTALL
    )
    assert details is not None
    for said in (
        "backend=OnnxRuntime(of=PTQ)",
        "epochs=4",
        "0 (b-lenet-onnxruntime-of-ptq-0), 1 (",
        "90000",
        "Entropy kept 0.75",
    ):
        assert said in details[0], said
    records = [unquote(link) for link in re.findall(r'<li><a href=([^">]+)>', text)]
    assert len(records) == len({path.name for path in (RECORDS / EXP).glob("*.json")} - {"900-torn.json"})
    assert all((golden.parent / link).is_file() for link in records)


def test_facts_that_all_records_share_are_said_once(golden: Path) -> None:
    networks = gather(load(RECORDS, EXP).records, [])
    facts = data.Facts(networks)
    assert facts.shared["versions"] == {"numpy": "2.4.6", "torch": "2.13.0"} and "device" not in facts.shared
    own = dict(facts.of(next(n for n in networks if n.label("backend") == "OnnxRuntime(of=FP32)")))
    # Measured twice, the second time on a busy machine.
    assert own["device"] == {
        "measure on host": [
            "cpu Toy CPU, noisy no, pressure 0.4 %, threads 1",
            "cpu Toy CPU, noisy yes, pressure 0.5 %, threads 1",
        ]
    }
    assert own["column"] == {"": ["FP32"]}
    assert golden.read_text().count("0123456789abcdef") == 1


def test_a_spec_is_said_as_it_is_written_in_an_experiment() -> None:
    spec = {"is": "PTQ", "version": 1, "bits": 4, "keep": ["a"], "of": {"is": "QAT", "version": 2, "mode": "mse", "args": []}}
    assert data.constructor(spec) == "PTQ(bits=4, keep=('a',), of=QAT v2(mode='mse', args=()))"


def test_flips_are_counted_by_the_exits_of_the_reference() -> None:
    found = data.decided(the_group())
    assert found is not None and found.asked.policy == "Entropy"
    matrices = {(m.network.label("backend"), m.arm): m.counts.tolist() for m in data.flips(found)}
    # In FP32 the first 20 samples go on to exit 2; with PTQ the first 16 refitted, the first 10 with kept thresholds.
    assert matrices == {
        ("OnnxRuntime(of=FP32)", "refitted"): [[20, 0], [0, 20]],
        ("OnnxRuntime(of=FP32)", "kept"): [[20, 0], [0, 20]],
        ("OnnxRuntime(of=PTQ)", "refitted"): [[20, 0], [4, 16]],
        ("OnnxRuntime(of=PTQ)", "kept"): [[20, 0], [10, 10]],
    }


def test_an_exit_has_the_shade_of_the_key_however_many_exits_its_network_has(to: Maker) -> None:
    for i, (model, share) in enumerate((("B-LeNet", [0.5, 0.5]), ("B-AlexNet", [0.5, 0.25, 0.25]))):
        Cell(to, i, model, "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20)
        path = max(to.folder.glob("*decide*.json"))
        said = json.loads(path.read_text())
        said["points"][0]["share"] = share
        path.write_text(json.dumps(said))
    html = pieces.shares(data.groups(gather(load(to.folder.parent, EXP).records, [])))
    key = dict(enumerate(re.findall(r'class="key" style="--k:([\d.]+)"', html)))
    bars = [re.findall(r"--k:([\d.]+)", bar) for bar in re.findall(r'<div class="bar">(.*?)</div>', html)]
    assert [len(bar) for bar in bars] == [2, 3] and all(dict(enumerate(bar)).items() <= key.items() for bar in bars)


def test_the_policy_that_the_experiment_names_first_stands_for_all(to: Maker) -> None:
    for i, backend in enumerate(("FP32", "PTQ")):
        Cell(to, i, "B-LeNet", backend, backend, "torch").eval([first(8), first(4)]).decide(20)
    for path in sorted(to.folder.glob("*decide*.json")):
        said = json.loads(path.read_text())
        for position, policy in ((1, "Entropy per exit"), (0, "Patience")):
            point = said["points"][0] | {"policy_label": policy, "policy_position": position}
            new = json.dumps(said | {"fact": f"{said['fact']}-{position}", "points": [point]})
            path.with_name(f"{path.stem}-{position}.json").write_text(new)
        path.unlink()
    [group] = data.groups(gather(load(to.folder.parent, EXP).records, []))
    found = data.decided(group)
    assert found is not None and found.asked.policy == "Patience" and data.shares(group)[0] == "Patience"


def test_images_are_ordered_by_the_mean_exit_then_by_confidence(to: Maker) -> None:
    Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(30)
    Cell(to, 1, "B-LeNet", "PTQ", "INT8 PTQ", "fake-quant").eval([first(9), first(4)], 8).decide(20).decide(10, "kept")
    npz = next(to.folder.glob("*fp32-0-eval.npz"))
    said = dict(np.load(npz))
    said["confidence"][0, 25], said["confidence"][0, 3] = 255, 1
    np.savez(npz, **said)
    [group] = data.groups(gather(load(to.folder.parent, EXP).records, []))
    found = data.decided(group)
    assert found is not None
    # 0-9 go on in both, 10-19 in PTQ only, nobody else; kept thresholds have no say.
    assert found.order[:2].tolist() == [25, 20], "of those that leave first everywhere, the surest"
    assert set(found.order[20:30].tolist()) == set(range(10, 20)) and set(found.order[30:].tolist()) == set(range(10))
    assert found.order[-1] == 3, "the least sure of those that leave last everywhere"
    leave_first, leave_last = found.shown
    assert len(leave_first) == len(leave_last) == 12 and leave_last[0] == 3
    wrong = {
        network.label("backend"): set(np.flatnonzero(~right.astype(bool)))
        for network, arm, _, right in found.taken
        if arm != "kept"
    }
    assert wrong == {"FP32": set(range(4)), "PTQ": set(range(4))}


def test_points_of_the_charts_are_the_rows() -> None:
    rows = report.rows(RECORDS, EXP)
    series = data.charts(rows, gather(load(RECORDS, EXP).records, []))["series"]
    by = {(s["network"], s["backend"], s["policy"], s["arm"]): s["points"] for s in series}
    [point] = by["B-LeNet", "OnnxRuntime(of=PTQ)", "Entropy", "refitted"]
    # 24 of 40 leave after 100 kMACs, the others after 200; the first network, LeNet, has 100 k; 0.75 was asked of 200 k.
    assert point[:2] == [1.5, 140_000] and point[5:] == ["budget 0.75 × macs", {"host": 0.16}, "0.600/0.400"]
    exits = by["B-LeNet", "OnnxRuntime(of=PTQ)", "", ""]
    assert [p[1] for p in exits] == [1e5, 2e5] and [p[6] for p in exits] == [{"host": 0.1}, {"host": 0.2}]
    done = rows[(rows["status"] == "done")]
    assert sorted({p[2] for points in by.values() for p in points}) == sorted({float(f"{a:.5g}") for a in done["accuracy"]})


def test_the_curve_that_a_record_holds_gives_more_points(to: Maker) -> None:
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20)
    path = next(to.folder.glob("*decide*.json"))
    said = json.loads(path.read_text())
    said["points"][0]["curve"] = {"macs": [100_000, 150_000, 200_000], "bops": [1, 2, 3], "n_right": [32, 35, 36]}
    path.write_text(json.dumps(said))
    rows = report.rows(to.folder.parent, EXP)
    series = data.charts(rows, gather(load(to.folder.parent, EXP).records, []))["series"]
    [points] = [s["points"] for s in series if s["policy"]]
    assert [(p[0], p[2]) for p in points] == [(0.5, 0.8), (0.75, 0.875), (0.75, 0.9), (1.0, 0.9)] and cell.point["budget"] == 0.75


def test_layers_stand_side_by_side(to: Maker) -> None:
    layer = {
        "layer": "stages.0.0",
        "exit": 0,
        "head": False,
        "macs": 112_500,
        "params": 130,
        "weight_bits": 32,
        "activation_bits": 32,
    }
    head = layer | {"layer": "heads.0.0", "head": True, "macs": 1000}
    quantized = tuple(la | {"weight_bits": 4, "activation_bits": 8, "sqnr_db": db} for la, db in ((layer, 21.26), (head, None)))
    Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)], layers=(layer, head))
    Cell(to, 1, "LeNet", "PTQ", "INT4 PTQ", "fake-quant").eval([first(3)], layers=quantized)
    [group] = data.groups(gather(load(to.folder.parent, EXP).records, []))
    assert data.layers(group) == (
        ["up to", "part", "layer", "MACs (M)", "params (k)", "INT4 PTQ, fake-quant"],
        [
            ["exit 1", "stage", "stages.0.0", "0.113", "0.13", "W4A8 · 21.3 dB"],
            ["exit 1", "head", "heads.0.0", "0.001", "0.13", "W4A8"],
        ],
    )


def test_pictures_are_kept_once_and_shown(to: Maker) -> None:
    Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch").eval([first(8), first(4)]).decide(20)
    results, reads = to.folder.parents[1], []
    part = SimpleNamespace(y=LABELS, x=np.linspace(-1, 1, N * 3 * 8 * 8).reshape(N, 3, 8, 8))
    loaded = SimpleNamespace(
        test=part, classes=("cat", "dog", "<b>", "car"), preprocessing=SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    suite = SimpleNamespace(data=SimpleNamespace(load=lambda seed: reads.append(seed) or loaded))
    exp: Any = SimpleNamespace(name=EXP, suites=[suite], seeds=(0,))
    text = make(to.folder.parent, EXP, results).read_text()
    assert "class 1" in text and "Some pictures are not kept" in text and 'class="picture' not in text
    [path] = keep(exp, results)
    assert path.name == f"{data.digest_of(LABELS)}.json" and len(json.loads(path.read_text())["images"]) == 24
    assert keep(exp, results) == [] and reads == [0], "what is kept is not read again"
    text = make(to.folder.parent, EXP, results).read_text()
    assert "Some pictures are not kept" not in text and text.count('class="picture') == 24 == text.count("data:image/png;base64,")
    assert "<span>dog</span>" in text and "<span>&lt;b&gt;</span>" in text
    path.write_text(json.dumps({"classes": [], "images": {"1": "x)}</style><script>"}}))
    assert Pictures(results).html(data.digest_of(LABELS), 1) == "", "what is no picture is not shown"


@pytest.mark.parametrize("what", ["nothing finished", "no predictions", "torn decisions"])
def test_a_page_of_what_is_there(to: Maker, what: str) -> None:
    cell = Cell(to, 0, "B-LeNet", "FP32", "FP32", "torch")
    if what == "nothing finished":
        cell.miss("fail", "eval", "the loss is NaN")
    else:
        cell.eval([first(8), first(4)]).decide(20)
        for path in to.folder.glob("*.npz" if what == "no predictions" else "*decide*.json"):
            text = path.read_text() if path.suffix == ".json" else ""
            path.write_text(re.sub(r'"taken": ".*"', '"taken": "!"', text))
    text = make(to.folder.parent, EXP, to.folder.parents[1]).read_text()
    assert "Which test images leave first" not in text and ("the loss is NaN" in text) == (what == "nothing finished")
    assert "At a glance" in text


def test_without_bokeh_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.util.paths", None)
    with pytest.raises(UsageError, match="pip install bokeh"):
        make(RECORDS, EXP, tmp_path)


def test_the_committed_experiments_stay_under_five_megabytes(tmp_path: Path) -> None:
    sizes = {}
    for exp in ("quickstart", "qat_branchynet", "grid"):
        rows = report.rows(REPO / "results/records", exp)
        sizes[exp] = len(page(rows, REPO / "results/records", REPO / "results", REPO / "results/pages").encode())
    assert all(size < 5e6 for size in sizes.values()), sizes
