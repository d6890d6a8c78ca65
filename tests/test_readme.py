"""The README is true: its examples run, its commands exist, its tables stand in results/tables."""

import re
import subprocess
from pathlib import Path

import pytest

from anytime.board import Board
from anytime.nvidia import jetson
from tests.contracts import policy as policy_contract
from tests.contracts.backend import backend_keeps_its_promise
from tests.contracts.model import model_keeps_its_promise
from tests.worlds import data, trained, trainer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def run(block):
    scope = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), scope)
    return scope


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """What the examples define can be pickled, as what lies in a file can."""
    import sys
    import types

    monkeypatch.setitem(sys.modules, "readme", types.ModuleType("readme"))


def test_the_model_example_keeps_the_contract():
    model_keeps_its_promise(run(BLOCKS[0])["TwoExits"](), (1, 28, 28))


def test_the_backend_example_keeps_the_contract():
    net = backend_keeps_its_promise(run(BLOCKS[1])["Pruned"](share=0.1), trained(), data(), trainer())
    weights = net.twin.state_dict()["stages.2.0.weight"]
    assert (weights == 0).float().mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("check", policy_contract.CHECKS, ids=lambda c: c.__name__)
def test_the_policy_example_keeps_the_contract(check):
    check(run(BLOCKS[2])["Falling"]())


def test_the_board_example_is_a_board():
    board = run(BLOCKS[3])["BOARD"]
    assert isinstance(board, Board) and board.board in jetson.MODULES.values()


def test_every_example_is_run():
    assert len(BLOCKS) == 4


def test_every_make_target_it_names_exists():
    named = set(re.findall(r"make ([a-z][a-z-]+)", README))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named <= known and {"exp", "test", "list", "report", "cite", "clean-cache", "help"} <= named


def test_every_file_it_links_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_its_table_is_the_one_that_the_records_give():
    section = README.partition("## A real table\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 5, "the README shows no table"
    table = (ROOT / "results" / "tables" / "qat_branchynet.md").read_text().splitlines()
    assert [line for line in lines if line not in table] == []


def test_nothing_large_is_committed():
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    large = [p for p in tracked.stdout.split("\0") if p and (ROOT / p).is_file() and (ROOT / p).stat().st_size > 5_000_000]
    assert not large
