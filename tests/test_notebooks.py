"""The notebooks as a reader meets them: they run and say what they said when they were committed; and the names they import."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import anytime
from anytime.errors import UsageError

ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

spec = importlib.util.spec_from_file_location("notebooks_execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def test_there_are_five():
    assert [book.stem[:2] for book in BOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_it_runs_and_says_what_is_committed(book):
    if book.stem.startswith("03") and not (Path(os.environ.get("ANYTIME_DATA", "-")) / "cifar-10-batches-py").is_dir():
        pytest.skip("03 reads CIFAR-10: set ANYTIME_DATA to a folder that holds it")
    said = execute.differences(nbformat.read(book, as_version=4), execute.executed(book))
    assert not said, "\n".join([f"{book.name} says something else: make notebooks, and read what changed", *said])


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_it_is_committed_whole(book):
    cells = nbformat.read(book, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not executed from top to bottom"
    streams = [output.name for cell in code for output in cell.outputs if output.output_type == "stream"]
    assert "stderr" not in streams
    assert any(cell.outputs for cell in code)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_its_text_holds_no_result(book):
    """Results come from cells: in the text a number with decimals, or a per cent of anything but a limit, would grow stale."""
    for cell in nbformat.read(book, as_version=4).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"`[^`]*`|\]\([^)]*\)|^    .*$", "", cell.source, flags=re.M)
            assert not re.search(r"\d\.\d|\d ms\b|(?<!95) %", text), cell.source


def test_the_fifteen_lines_are_fifteen():
    cells = nbformat.read(BOOKS[3], as_version=4).cells
    (lines,) = (cell.source.splitlines() for cell in cells if "Experiment(" in cell.source and cell.cell_type == "code")
    assert len([line for line in lines if line.strip()]) == 15


def book_of(text, tags=()):
    cell = new_code_cell("print(1)", outputs=[new_output("stream", name="stdout", text=text)], metadata={"tags": list(tags)})
    return new_notebook(cells=[cell])


@pytest.mark.parametrize(
    "before, after, tags, differ",
    [
        ("loss 0.75", "loss 0.75", (), False),
        ("loss 0.75", "loss 0.76", (), True),
        ("took 1.25 ms, -3", "took  17 ms, 4e-05", ("varies",), False),
        ("took 1.25 ms", "failed", ("varies",), True),
    ],
)
def test_what_counts_as_a_difference(before, after, tags, differ):
    assert bool(execute.differences(book_of(before, tags), book_of(after, tags))) == differ


# What notebooks import from `anytime` itself


def test_the_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "anytime" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"anytime.{file}" for name, file in anytime._FILES.items()}


@pytest.mark.parametrize("name", anytime._FILES)
def test_each_name_is_there(name):
    assert getattr(anytime, name).__name__ == name
    assert name in dir(anytime)


def test_importing_anytime_imports_nothing():
    code = "import sys, anytime; print(sorted({'torch', 'numpy', 'pandas', 'onnxruntime'} & set(sys.modules)), hasattr(anytime, 'nothing'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[] False\n"


def mine(**data):
    from anytime.datasets.synthetic import Synthetic
    from tests.worlds import Tiny

    small = Synthetic(n=240, size=16, channels=3, n_classes=4, **data)
    return anytime.Experiment(
        name="mine",
        question="Mine?",
        suites=(anytime.Suite(small, (Tiny(),)),),
        recipe=anytime.Recipe(epochs=1, batch=64),
        backends=(anytime.Float32(), anytime.OnnxRuntime(of=anytime.PTQ())),
        policies=(anytime.MaxProb(),),
        budgets=(0.9,),
    )


@pytest.mark.parametrize(
    "words, how, said",
    [
        ((), {}, "means 2 networks: add a word"),
        (("INT8 PTP",), {}, "did you mean 'INT8 PTQ'"),
        (("INT8 PTQ",), {"budget": 0.9}, "belongs to a policy"),
        (("INT8 PTQ",), {"policy": "MaxProb", "budget": 0.5}, "it has 0.9"),
    ],
)
def test_save_asks_for_what_is_not_there(tmp_path, words, how, said):
    with pytest.raises(UsageError, match=said):
        anytime.save(mine(), *words, to=tmp_path / "net", results=tmp_path, **how)
    with pytest.raises(UsageError, match="there is no experiment 'quickstard'; did you mean 'quickstart'"):
        anytime.save("quickstard", *words, to=tmp_path / "net")


def test_a_small_data_set_may_leave_a_part_empty(tmp_path):
    """Nothing of `mine` learns from hold, so it runs without any sample there."""
    exp = mine(calib=16, tune=16, val=40, hold=0)
    runner = anytime.Runner(exp, tmp_path)
    runner.run()
    assert {state for state, _ in runner.states()} == {"done"}
