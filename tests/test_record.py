"""Records: whole or not at all, by any number of writers; what cannot be read is a sentence."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytime.errors import AnytimeError, CorruptFile, WriteError
from anytime.record import KINDS, SCHEMA, Kind, Record, append, load, newest, read

REPO = Path(__file__).parents[1]


def a_record(kind: Kind = "eval", fact: str = "f", **more: Any) -> Record:
    return Record("exp", "cell", kind, fact, {"is": "Cell", "train_seed": 0}, **more)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def _write_many(job: tuple[Path, int, int]) -> list[str]:
    root, writer, n = job
    paths = []
    for i in range(n):
        said = a_record(fact=f"{writer}-{i}", exits=[{"exit": 0, "writer": writer, "i": i, "pad": "x" * 500}])
        paths.append(str(append(said, root, {".npz": bytes([writer]) * 64})))
    return paths


def test_eight_processes_append_2000_records_and_none_is_lost_or_torn(tmp_path: Path) -> None:
    with get_context("spawn").Pool(8) as pool:
        paths = [p for many in pool.map(_write_many, [(tmp_path, w, 250) for w in range(8)]) for p in many]
    loaded = load(tmp_path, "exp")
    assert loaded.troubles == []
    said = {(r.exits[0]["writer"], r.exits[0]["i"]) for r, _ in loaded.records}
    assert said == {(w, i) for w in range(8) for i in range(250)}
    assert len(set(paths)) == 2000 == len(loaded.records)
    assert all(p.with_suffix(".npz").read_bytes() == bytes([r.exits[0]["writer"]]) * 64 for r, p in loaded.records)
    assert len(names(tmp_path / "exp")) == 4000  # nothing temporary is left


def test_a_writer_killed_at_any_moment_leaves_whole_records_only(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from anytime.record import Record, append\n"
        "for i in range(10**6):\n"
        "    said = Record('exp', 'c', 'eval', str(i), {}, exits=[{'pad': 'x' * 20000}])\n"
        "    append(said, Path(sys.argv[1]), {'.npz': b'y' * 20000})\n"
    )
    seen, rng = 0, random.Random(0)
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPO)
        while len(names(tmp_path / "exp")) < seen + 10:
            assert writer.poll() is None
            time.sleep(0.005)
        time.sleep(rng.random() * 0.02)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        loaded = load(tmp_path)
        assert loaded.troubles == []
        assert all(len(p.with_suffix(".npz").read_bytes()) == 20000 for _, p in loaded.records), (
            "a record came before its attachment"
        )
        assert len(loaded.records) > 0
        seen = len(names(tmp_path / "exp"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("where", ["write", "rename", "folder"])
def test_a_disk_that_refuses_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: int
) -> None:
    append(a_record(fact="before"), tmp_path)
    before = names(tmp_path / "exp")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    if where == "write":
        monkeypatch.setattr(os, "fsync", refuse)
    elif where == "rename":
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "rename", refuse)
    else:
        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WriteError) as caught:
        append(a_record(fact="after"), tmp_path, {".npz": b"x"})
    assert os.strerror(code) in str(caught.value) and "\n" not in str(caught.value)
    assert "free space" in str(caught.value), "it must say what to do"
    assert names(tmp_path / "exp") == before
    monkeypatch.undo()
    assert [r.fact for r, _ in load(tmp_path, "exp").records] == ["before"], "what was finished stays"


def test_a_file_that_may_not_grow_is_a_sentence(tmp_path: Path) -> None:
    """The kernel itself refuses: a limit on the size of files, as a full disk would, in the middle of a write."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from anytime.record import Record, append; from anytime.errors import WriteError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    append(Record('exp', 'c', 'eval', 'f', {}, exits=[{'pad': 'x' * 9999}]), Path(sys.argv[1]))\n"
        "except WriteError as error:\n    print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPO, capture_output=True, text=True)
    assert ran.stdout.startswith("cannot write a record to"), ran.stderr
    assert names(tmp_path / "exp") == []


def test_a_file_system_without_links_still_gets_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = append(a_record(), tmp_path, {".npz": b"x"})
    assert read(path).fact == "f"
    assert len(names(tmp_path / "exp")) == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_a_failure_and_not_a_number(tmp_path: Path, number: float) -> None:
    with pytest.raises(AnytimeError, match="NaN or infinity"):
        append(a_record(exits=[{"exit": 0, "accuracy": number}]), tmp_path, {".npz": b"x"})
    assert names(tmp_path / "exp") == []


def test_the_same_record_twice_is_two_files(tmp_path: Path) -> None:
    said = a_record()
    paths = {append(said, tmp_path) for _ in range(20)}
    assert len(paths) == 20 == len(load(tmp_path).records)


TORN = {
    "torn": ('{"exp": "exp", "cell"', "cannot be read"),
    "empty": ("", "cannot be read"),
    "foreign": ('{"epochs": 3}', "no record of ours"),
    "a list": ("[1, 2]", "no record of ours"),
    "newer": (json.dumps(asdict(a_record()) | {"schema": SCHEMA + 1}), "newer version"),
    "a field too many": (json.dumps(asdict(a_record()) | {"colour": "red"}), "colour"),
    "a field too few": (json.dumps({k: v for k, v in asdict(a_record()).items() if k != "fact"}), "fact"),
    "a wrong type": (json.dumps(asdict(a_record()) | {"exits": None}), "exits"),
    "a wrong row": (json.dumps(asdict(a_record()) | {"points": [3]}), "points"),
    "not a number": (json.dumps(asdict(a_record(exits=[{"accuracy": float("nan")}]))), "holds NaN"),
    "a wrong schema": (json.dumps(asdict(a_record()) | {"schema": "1"}), "schema"),
}


@pytest.mark.parametrize("what", TORN)
def test_a_file_that_cannot_be_used_is_a_sentence_and_its_neighbours_stay(tmp_path: Path, what: str) -> None:
    text, expected = TORN[what]
    append(a_record(fact="good"), tmp_path)
    bad = tmp_path / "exp" / "bad.json"
    bad.write_text(text)
    loaded = load(tmp_path, "exp")
    assert [r.fact for r, _ in loaded.records] == ["good"]
    (trouble,) = loaded.troubles
    assert expected in trouble and str(bad) in trouble and "\n" not in trouble
    with pytest.raises(CorruptFile):
        read(bad)


def test_bytes_that_are_no_text_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00{")
    assert "cannot be read" in load(tmp_path).troubles[0]


def test_a_record_written_today_reads_as_it_did_when_it_was_committed() -> None:
    """The file format is a promise: this file was written once and every later version must read it to the same values."""
    path = REPO / "tests/golden/records/golden/000-eval-lenet-fp32-0-eval.json"
    said = read(path)
    assert (said.exp, said.kind, said.cell, said.schema) == ("golden", "eval", "lenet-fp32-0", 1)
    assert said.spec["recipe"] == {"is": "Recipe", "version": 1, "epochs": 4}, "the full spec, and no class is needed to read it"
    assert said.exits[0]["n_right"] == 37 and said.facts["git"]["dirty"] is False
    assert json.dumps(asdict(said), indent=1, sort_keys=True) + "\n" == path.read_text()


texts = st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
tables = st.dictionaries(texts, values, max_size=3)


@given(spec=tables, exits=st.lists(tables, max_size=2), facts=tables, reason=texts, kind=st.sampled_from(KINDS))
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, spec: Any, exits: Any, facts: Any, reason: str, kind: Kind
) -> None:
    said = Record("exp", "cell", kind, "fact", spec, exits=exits, facts=facts, reason=reason)
    got = read(append(said, tmp_path_factory.mktemp("r")))
    assert replace(got, created="") == said and got.created.endswith("Z")


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8))
def test_the_newest_is_the_last_one_but_a_skip_gives_way(kinds: list[Kind]) -> None:
    records = [(a_record(kind, created=f"{i:02d}"), Path(f"{i}")) for i, kind in enumerate(kinds)]
    tried = [i for i, kind in enumerate(kinds) if kind != "skip"]
    last = tried[-1] if tried and kinds[tried[-1]] != "fail" else len(kinds) - 1
    assert newest(records)["f"][1] == Path(str(last))


def test_records_come_in_the_order_of_their_creation(tmp_path: Path) -> None:
    facts = [f"{i}" for i in (5, 3, 9, 1)]
    for fact in facts:
        append(a_record(fact=fact), tmp_path)
    append(Record("other", "cell", "eval", "else", {}), tmp_path)
    assert [r.fact for r, _ in load(tmp_path, "exp").records] == facts
    assert [r.fact for r, _ in load(tmp_path).records] == [*facts, "else"]
    assert load(tmp_path, "unknown").records == []
