"""Several boards asked at once: machines side by side, boards of one machine in turn."""

from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from anytime import measure
from anytime.boards.host import Host
from anytime.boards.ssh import Ssh
from anytime.find import experiment


@pytest.mark.parametrize("quiet", [False, True])
def test_boards_of_one_machine_take_turns_and_standard_output_is_left_alone(monkeypatch, tmp_path, capsys, quiet):
    boards = {"one": Host(threads=1), "agx": Ssh("agx"), "two": Host(threads=2)}
    begun = []

    class Pool:
        def submit(self, work, exps, *more):
            begun.append([exp.boards[0].name for exp in exps])
            future = Future()
            future.set_result(work(exps, *more))
            return future

    def on_one(exp, results, log, debug, progress=None):
        log(f"said on {exp.boards[0].name}")
        return [(exp.boards[0].name, "todo", "")]

    monkeypatch.setattr(measure, "board", boards.get)
    monkeypatch.setattr(measure, "workers", lambda n: nullcontext(Pool()))
    monkeypatch.setattr(measure, "_on_one", on_one)
    monkeypatch.setattr(measure, "Runner", lambda *_: SimpleNamespace(todo=lambda: [], predict_and_decide=lambda facts: None))
    monkeypatch.setattr(Ssh, "lacks", lambda *_: None)
    left = measure.measure(experiment("quickstart"), list(boards), tmp_path, lambda line: None, quiet=quiet)
    said = capsys.readouterr()
    assert begun == [["host", "host"], ["agx"]] and said.out == ""
    assert sorted(said.err.split("\n")[:-1]) == ([] if quiet else ["said on agx", "said on host", "said on host"])
    assert sorted(name for name, *_ in left) == ["agx", "host", "host"]
