"""TensorRT and energy over a real sshd: timed, executed, answered, refused, and in an experiment; see test_jetson.py."""

import asyncio

import numpy as np
import pytest

from anytime.boards import ssh
from anytime.boards.ssh import Ssh
from anytime.errors import AnytimeError, Unsupported
from anytime.nvidia import tegrastats
from anytime.policies.confidence import MaxProb
from anytime.stops import max_probability
from tests import test_ssh
from tests.nvidia import TRANSCRIPTS, Jetson
from tests.test_agent import net as onnx_net
from tests.test_agent import planted, x
from tests.test_jetson import close, net
from tests.test_tegrastats import LINES

world = test_ssh.world  # sshd's account and its daemons
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def jetson(world, alias, version, has, fields=None, also="", **env):
    """A daemon whose Python finds these tools, and no others of NVIDIA's."""
    board = world.board(alias, fields)
    daemon = world.daemons[alias]
    base = daemon.python.read_text().split()[-2]
    folder = daemon.folder / f"nvidia-{len(list(daemon.folder.glob('nvidia-*')))}"
    made = Jetson(folder, version, has, python=base, **env)
    env = {**made.env, "PYTHONPATH": f"{made.folder}:{daemon.folder}/site"}
    said = " ".join(f"'{name}={value}'" for name, value in env.items())
    daemon.python.write_text(f'#!/bin/sh\nexec env {said} {also} {base} "$@"\n')
    return board, made


def cleaned(world):
    """What jobs have left there, but for the timing cache, which is swept up."""
    left = world.left()
    for path in world.account.home.glob(".anytime/timing-*.cache"):
        path.unlink()
    return [name for name in left if name != ".anytime" and not name.endswith(".cache")]


def test_engines_are_timed_and_a_policy_is_executed(world, monkeypatch):
    board, made = jetson(world, "trt", "8.5.2", ("tensorrt", "trtexec"))
    int8, samples = net("int8"), x(20)
    ours, other = board.time([int8, onnx_net("int8")], samples)
    for timing in (ours, other):
        test_ssh.whole(timing, 20, 2)
    assert made.told() and ours.facts["interleaved"] == other.facts["interleaved"] == "2"
    wanted = {"engine": "tensorrt 8.5.2.1", "gpu": "Xavier", "tensorrt_by": "its Python", "executed": "fp16 6, int8 2, unknown 0"}
    assert {k: ours.facts[k] for k in wanted} == wanted
    assert ours.facts["waiting_share"] == "unknown"  # the thread may rest while the GPU works
    assert int(ours.facts["engine_bytes"]) > 1000 and float(ours.facts["build_s"]) > 0
    assert "tensorrt_by" not in other.facts and other.layers == () == other.energy_mj
    said = {layer: row for row in ours.layers for layer in row["layers"]}
    wanted = {path: "int8" if path in int8.bits and int8.bits[path] == (8, 8) else "fp16" for path in said}
    assert len(said) > 5 and {layer: row["executed"] for layer, row in said.items()} == wanted
    assert {row["head"] for row in ours.layers} == {True, False} and {row["exit"] for row in ours.layers} == {0, 1, 2}
    assert all(row["weights"] > 0 for row in said.values()) and any(row["reformat"] for row in ours.layers)
    logits = int8.predict(samples, batch=1)
    policy = MaxProb(thresholds=tuple(float(np.median(max_probability(z))) for z in logits[:-1]))
    (ran,) = board.run([(int8, policy)], samples)
    exits = policy.exits(logits)
    assert len(set(exits)) == 3 and (ran.exits == exits).all()
    assert (ran.answers == policy.answer(logits, exits).argmax(-1)).all() and (ran.wall_ms > 0).all()
    none, answers = board.answers([onnx_net("int8"), int8], {"val": samples, "test": samples[:7]})
    assert close(answers["val"], logits) and answers["test"].shape == (3, 7, 4) and none is None
    monkeypatch.setattr(ssh, "MOST_BYTES", 1000)
    assert board.answers([int8], {"val": samples}) == [None]
    assert cleaned(world) == []


@pytest.mark.parametrize(
    "version, log, launches", [("8.4.1", "trt84_agx_xavier_mnist", 2), ("8.5.2", "trt85_orin_nano_yolox", 1)]
)
def test_with_trtexec_alone_there_are_times_of_the_gpu(world, version, log, launches):
    """By hand from the times that the tool beside it writes: 0.25 ms there, 0.5 or 0.75 of compute in turn, 0.125 back."""
    board, made = jetson(world, "trt", version, ("trtexec",), {"launches": launches})
    made.logs(log)
    ours, other = board.time([net("int8"), onnx_net("int8")], x(5))
    assert ours.stage_ms.shape == (3, launches * 1200)
    np.testing.assert_allclose(ours.stage_ms[:, :2], [[0.75, 1.0], [0.5, 0.75], [0.5, 0.75]])
    np.testing.assert_allclose(ours.head_ms[:, :2], [[0.625, 0.875]] * 3)
    assert np.unique(ours.stage_ms).tolist() == [0.5, 0.75, 1.0]  # none of the warm-up
    assert np.isnan(ours.stage_cpu_ms).all() and np.isnan(ours.head_cpu_ms).all()
    assert ours.facts["engine"] == f"trtexec {version}" and "GPU times of trtexec" in ours.facts["times"]
    assert ours.facts["tensorrt_by"] == "trtexec (its Python has no tensorrt)" and len(ours.layers) > 5
    assert [t for t in made.told() if "timed" in t] and other.facts["engine"].startswith("onnxruntime")
    test_ssh.whole(other, 5, launches)
    policy = MaxProb(thresholds=(0.5, 0.5))
    assert board.answers([net("int8")], {"val": x(5)}) == [None]
    with pytest.raises(Unsupported, match="uses TensorRT by trtexec .* runs no policy on samples: install TensorRT's Python"):
        board.run([(net("int8"), policy)], x(5))
    assert cleaned(world) == []


def test_trtexec_that_fails_says_why(world):
    board, _ = jetson(world, "trt", "8.5.2", ("trtexec",), FAKE_FAILED=str(world.folder / "failed"))
    (world.folder / "failed").write_text((TRANSCRIPTS / "trtexec_failed_banner.txt").read_text())
    with pytest.raises(AnytimeError, match="trt, build: .* the builder of net-0/0-1-state.plan failed: "):
        board.time([net("int8")], x(5))
    assert cleaned(world) == []


def test_no_tensorrt_there_is_one_sentence_and_a_screen_says_what_is_there(world):
    board, _ = jetson(world, "trt", "8.5.2", ())
    with pytest.raises(
        AnytimeError, match="trt has no TensorRT that can be used: its Python has no tensorrt, and there is no trtexec"
    ):
        board.time([net("int8")], x(5))
    board, _ = jetson(world, "trt", "10.3.0", ("trtexec",))
    assert any(line.startswith("trtexec") and line.endswith("/trtexec v100300") for line in asyncio.run(board.inspect()))
    board, _ = jetson(world, "trt", "10.3.0", ("tensorrt",), FAKE_CRASH="import")
    assert [line for line in asyncio.run(board.inspect()) if line.startswith("WRONG")] == [
        "WRONG    trt: tensorrt is broken: was killed by SIGSEGV, without a word"
    ]


def test_energy_is_that_above_idle_per_exit(world, monkeypatch):
    """4 W more under load, so that a window of s seconds and n inferences gives 4000 s / n mJ."""
    monkeypatch.setattr(ssh, "WINDOW_S", 2)
    monkeypatch.setattr(tegrastats, "LEAST_WINDOW_S", 1.5)
    root = planted(world.folder / "xavier_nx")
    board, _ = jetson(
        world, "trt", "8.5.2", ("tensorrt", "tegrastats"), {"emulated": True, "launches": 1}, f"'JETSON_SYSROOT={root}'",
        FAKE_LINE=LINES[1][1][0],
    )  # fmt: skip
    (timing,) = board.time([onnx_net("int8")], x(5))
    facts = timing.facts
    assert facts["energy"] == "tegrastats, above idle" and facts["energy_rails"] == "VDD_IN", facts
    windows, counts = (np.array(facts[f"energy_{name}"].split(), float) for name in ("window_s", "inferences"))
    assert len(timing.energy_mj) == 3 and (windows > 1.5).all() and (counts > 100).all()
    np.testing.assert_allclose(timing.energy_mj, 4000 * windows / counts, rtol=0.2)  # the load's rim may be read as rest
    assert float(facts["energy_idle_w"]) == pytest.approx(5, abs=0.3)
    assert "VDD_SOC 1104 -> 1104" in facts["rails_mw"]
    (without,) = Ssh(**{**vars(board), "energy": False}).time([onnx_net("int8")], x(5))
    assert without.energy_mj == () and "energy" not in without.facts
    assert cleaned(world) == []


def test_rows_of_tensorrt_join_an_experiment(world, tmp_path, capsys):
    """`make measure EXP=... BOARD=...`, on a board with TensorRT's Python, then on one that has only trtexec."""
    from anytime.__main__ import main
    from anytime.record import load
    from anytime.rows import rows

    where = ["--results", str(tmp_path / "results")]
    text = test_ssh.EXPERIMENT.replace("mine_on_a_board", "on_a_jetson").replace(
        "OnnxRuntime(of=PTQ())", "TensorRT(of=PTQ(8, 8))"
    )
    text = text.replace("from anytime.backends.onnxruntime import OnnxRuntime", "from anytime.backends.tensorrt import TensorRT")
    (tmp_path / "on_a_jetson.py").write_text(text)
    found = {}
    for has, version in (("tensorrt", "10.3.0"), ("trtexec", "8.5.2")):
        alias = f"by-{has}"
        board, made = jetson(world, alias, version, (has,))
        made.logs("trt85_orin_nano_yolox")
        file = tmp_path / f"{alias}.py"
        file.write_text(
            f"from anytime.boards.ssh import Ssh\nBOARD = Ssh({alias!r}, python={board.python!r}, launches=1, warmup=1)\n"
        )
        main(["measure", str(tmp_path / "on_a_jetson.py"), "--board", str(file), *where])
        records = [r for r, _ in load(tmp_path / "results" / "records", "on_a_jetson").records if r.board == alias]
        found[has] = {r.of or r.kind: r for r in records}
    by_python, by_trtexec = found["tensorrt"], found["trtexec"]
    assert {name: r.kind for name, r in by_python.items()} == {"measure": "measure", "replay": "replay"}
    assert {name: r.kind for name, r in by_trtexec.items()} == {"measure": "measure", "replay": "skip"}
    measured = by_python["measure"]
    assert measured.facts["device"]["engine"] == "tensorrt 10.3.0.1" and measured.facts["column"] == "INT8 PTQ"
    assert {row["executed"] for row in measured.layers} >= {"int8"} and len(measured.exits) == 3
    assert by_python["replay"].points[0]["same_exits"] == 1.0
    shares = [row["int8_macs_share"] for row in measured.exits]
    assert all(0 < share < 1 for share in shares[1:]) and shares[0] <= 1
    assert [row["board_agreement"] for row in measured.exits] == pytest.approx([1, 1, 1], abs=0.02)
    assert 0.25 < measured.exits[-1]["board_accuracy"] <= 1 and "board_accuracy" not in by_trtexec["measure"].exits[0]
    assert by_trtexec["measure"].exits[0]["latency_ms_p50"] == pytest.approx(0.25 + 0.625 + 0.625, abs=0.26)
    assert by_trtexec["measure"].exits[0]["cpu_ms"] is None
    assert "runs no policy on samples" in by_trtexec["replay"].reason
    said = capsys.readouterr().out
    table = rows(tmp_path / "results" / "records", "on_a_jetson")
    last = table[(table["board"] == "by-tensorrt") & (table["exit"] == 2)].iloc[0]
    assert last["int8_macs_share"] == shares[2] and last["board_accuracy"] == measured.exits[2]["board_accuracy"]
    assert "by-tensorrt" in said and "by-trtexec" in said and cleaned(world) == []
