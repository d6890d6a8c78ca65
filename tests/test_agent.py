"""The board's agent: plain Python 3.6, the same answers under every interpreter and engine of a JetPack, and nothing lost."""

import ast
import asyncio
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from anytime import cpu, stops
from anytime.backend import links
from anytime.boards.ssh import Ssh
from anytime.boards.ssh.job import AGENT, FILES, MACHINE, Job, on_board
from anytime.boards.ssh.said import said_of
from anytime.errors import AnytimeError, UsageError
from anytime.onnx_net import OnnxNet, written
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.patience import Patience
from anytime.quant.graph import Widths, prepared, traced
from tests.worlds import Restarting, data, trained

BOARDS = {"3.6.15": "1.10.0", "3.8.18": "1.19.2", "3.10.13": "1.23.2"}  # JetPack 4, 5, 6; this interpreter is the fourth
CACHE = Path.home() / ".cache" / "anytime" / "agents"
SHAPE = (3, 16, 16)


@cache
def net(kind):
    """FP32, INT8, or one whose stages restart, as ONNX Runtime runs it."""
    if kind == "restarting":
        chain = traced(trained(Restarting()))
    elif kind == "fp32":
        chain = traced(trained())
    else:
        chain = prepared(trained(), data().calib.x, Widths(8, 8), "u8s8", "mse", "mse").freeze(round_bias=True)
    return OnnxNet(chain, {}, partial(written, chain, SHAPE, channels_last=kind == "int8"), {})


def x(n):
    return data().test.x[:n].numpy()


@cache
def python_of(version):
    """An interpreter with the ONNX Runtime of its JetPack, made once and kept; skips where neither can be had."""
    base = Path.home() / ".pyenv" / "versions" / version / "bin" / "python"
    if not base.exists():
        pytest.skip(f"pyenv has no Python {version} here")
    home = CACHE / f"py{version}"
    python, ready = home / "bin" / "python", home / f"onnxruntime-{BOARDS[version]}"
    if not ready.exists():
        try:
            subprocess.run([base, "-m", "venv", home], check=True, capture_output=True, timeout=120)
            for wanted in (["pip==21.3.1"], [f"onnxruntime=={BOARDS[version]}", "numpy"]):
                subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, capture_output=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"pip cannot get ONNX Runtime {BOARDS[version]} for Python {version} here ({error})")
        ready.touch()
    return str(python)


class Bench:
    """A job in a folder here, and the agent that runs it."""

    def __init__(self, state=None, **fields):
        what = {"provider": "CPUExecutionProvider", "threads": 1, "warmup": 1, **fields}
        self.job = Job("bench", state or {}, what)

    def run(self, python=sys.executable, **env):
        self.job.seal()
        self.agent(python, **env)
        self.job.results = self.job.folder / "results"
        return self

    def agent(self, python=sys.executable, **env):
        done = subprocess.run(
            [python, "-B", "agent.py", "run"], cwd=self.job.folder, env={**os.environ, **env}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def piece(self, name):
        return self.job.piece(name)

    def error(self, name):
        return (self.job.folder / "results" / f"{name}.error").read_text()


@pytest.fixture
def bench():
    made = Bench()
    with made.job:
        yield made


def add_predict(bench, kind, n=20):
    bench.job.samples("test", x(n))
    whole = list(net(kind).plan(range(net(kind).n_exits)))
    bench.job.task(
        f"predict-{kind}", kind="predict", folder=bench.job.net(net(kind), whole), x="test.npy", first=0, stop=n, batch=8
    )


def output_step(kind):
    """What one step of the grid that a head's last layer reads does to the logits, at most, over all exits."""
    steps = []
    for segment in net(kind).plan(range(net(kind).n_exits)):
        model = onnx.ModelProto.FromString(net(kind).graph(segment))
        values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        made = {out: node for node in model.graph.node for out in node.output}
        (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm" and node.name.startswith("heads"))
        activation, weight = (made[name] for name in gemm.input[:2])
        w = values[weight.input[0]].astype(float) * np.max(values[weight.input[1]])
        steps.append(float(values[activation.input[1]]) * np.abs(w).max())
    return max(steps)


def test_it_is_python_3_6():
    newer = "capture_output", "text=True", "perf_counter_ns", "process_time_ns", "removeprefix", "dataclass", "from __future__"
    for file in FILES:
        ast.parse(file.read_text(), feature_version=(3, 6))
        assert not [word for word in newer if word in file.read_text()]


def test_it_imports_nothing_but_the_standard_library_numpy_and_an_engine():
    imported = {"__init__": set()}
    for file in FILES:
        tree = ast.parse(file.read_text())
        imported[file.stem] = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported[file.stem] |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {p.stem for p in AGENT.glob("*.py")} | {"stops"} == set(imported)
    everything = set().union(*imported.values())
    assert everything - sys.stdlib_module_names - set(imported) == {"numpy", "onnxruntime", "tensorrt"}
    assert not imported["machine"] - sys.stdlib_module_names  # handed over alone, through a pipe


class Ticking:
    """A network of two exits by clocks that only it moves: stage k takes 10 (k + 1) s, a head 1; two fifths of each on the CPU."""

    n_exits, restarts, facts, heads = 2, False, {"engine": "none"}, [(0, 1, 0), (1, 2, 1)]

    def __init__(self, name="", log=None):
        self.name, self.log, self.now = name, log, [0.0, 0.0]

    def step(self, segment, state):
        if self.log is not None and segment[0] == 0:
            self.log.append((self.name, int(state[0].flat[0])))
        for s in [10.0 * (k + 1) for k in range(segment[0], segment[1])] + [1.0] * (segment[2] is not None):
            self.now[0], self.now[1] = self.now[0] + s, self.now[1] + 0.4 * s
        return state, np.eye(3, dtype=np.float32)[[segment[2] or 0]]


@pytest.fixture
def agent(monkeypatch):
    monkeypatch.syspath_prepend(str(AGENT))
    for name in ("agent", "machine", "tools", "engines", "stops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "stops", stops)
    yield importlib.import_module("agent")
    for name in ("agent", "machine", "tools", "engines"):  # experiments may be called so
        sys.modules.pop(name, None)


def by(clock, monkeypatch, agent):
    ticks = SimpleNamespace(perf_counter=lambda: clock[0], process_time=lambda: clock[1])
    monkeypatch.setattr(agent, "time", ticks)


def test_its_stopwatch_times_stage_and_head_apart_in_ms(agent, monkeypatch):
    net = Ticking()
    by(net.now, monkeypatch, agent)
    links = agent.Links(net)
    links.go(np.zeros((1, 3)), False)
    links.go(np.zeros((1, 3)), True)
    said = {name: values.tolist() for name, values in links.arrays().items()}
    assert said["stage_ms"] == [[10e3], [20e3]] and said["head_ms"] == [[1e3], [1e3]]
    assert said["stage_cpu_ms"] == [[pytest.approx(4e3)], [pytest.approx(8e3)]]
    assert said["head_cpu_ms"] == [[pytest.approx(400)], [pytest.approx(400)]]


def test_its_replays_run_what_the_policy_reads_and_no_more(agent, monkeypatch):
    for threshold, exit, s in ((0.0, 0, 11.0), (0.9, 1, 11.0 + 21.0)):
        net = Ticking()
        by(net.now, monkeypatch, agent)
        tests = [{"test": "by_max_probability", "arguments": {"thresholds": [threshold]}}]
        replay = agent.Replay(net, {"tests": tests, "uses": [0, 1], "temperatures": []})
        replay.go(np.zeros((1, 3)), True)
        said = replay.arrays()
        assert (said["exits"].tolist(), said["answers"].tolist()) == ([exit], [exit])
        assert said["wall_ms"] == pytest.approx([1e3 * s]) and said["cpu_ms"] == pytest.approx([400 * s])
        assert np.isnan(said["logits"]).all(-1).tolist() == [[False], [exit == 0]]


def test_its_networks_take_turns_as_on_this_machine(agent, monkeypatch, tmp_path):
    log, beats = [], []
    monkeypatch.setattr(agent, "Net", lambda folder, job: Ticking(folder, log))
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(12, 1))
    task = {"x": tmp_path / "x.npy", "nets": [{"folder": "a"}, {"folder": "b"}]}
    arrays, said = agent.timed({"warmup": 2}, task, lambda: beats.append(1))
    turns, order = [("a", 0), ("a", 1), ("b", 0), ("b", 1)], np.random.RandomState(0)
    for runs in ([9, 10, 11, *range(8)], [5, 6, 7, *range(8, 12)]):
        turns += [("ab"[i], r) for i in order.permutation(2) for r in runs]
    assert log == turns and arrays["1.stage_ms"].shape == (2, 12) and len(beats) == 2 + 4 + 24
    assert said["engines"] == [Ticking.facts] * 2 and gc.isenabled()


@pytest.mark.parametrize("version", [*BOARDS, "this"])
def test_every_board_gives_the_answers_of_this_machine(bench, version):
    python = sys.executable if version == "this" else python_of(version)
    for kind in ("fp32", "int8", "restarting"):
        add_predict(bench, kind)
    asked = [{"folder": bench.job.net(net("int8"), links(net("int8")))}]
    bench.job.task("time-0", kind="time", nets=asked, x="test.npy")
    bench.run(python)
    exact = not (version == "3.6.15" and cpu.saturates())  # ONNX Runtime 1.10 cannot be told to add exactly
    for kind in ("fp32", *(["int8"] if exact else []), "restarting"):
        logits, here = bench.piece(f"predict-{kind}")["logits"], net(kind).predict(x(20))
        apart = np.abs(logits - here).max()
        assert apart <= (output_step(kind) if kind == "int8" else 1e-5), f"{kind}: {apart}"
        assert (logits.argmax(-1) == here.argmax(-1)).all()
    timed = bench.piece("time-0")
    assert timed["0.stage_ms"].shape == timed["0.head_cpu_ms"].shape == (3, 20)
    assert (timed["0.stage_ms"] > 0).all() and timed["said"]["engines"][0]["provider"] == "CPUExecutionProvider"
    if version != "this":
        assert timed["said"]["engines"][0]["engine"] == f"onnxruntime {BOARDS[version]}"
        assert timed["said"]["before"]["python"] == version


@pytest.mark.parametrize("kind", ["int8", "restarting"])
@pytest.mark.parametrize("policy", [MaxProb, Entropy, Patience], ids=lambda p: p.__name__)
def test_a_policy_ends_where_it_ends_offline(bench, kind, policy):
    logits = net(kind).predict(x(40), batch=1)
    if policy is Patience:
        fitted = Patience(patience=1)
    else:
        score = stops.max_probability if policy is MaxProb else stops.entropy
        fitted = policy(thresholds=tuple(float(np.median(score(z))) for z in logits[:-1]))
    fitted = fitted.tempered([1.5] * len(logits))
    said = on_board(net(kind), fitted, x(40))
    bench.job.samples("replay", x(40))
    folder = bench.job.net(net(kind), list(net(kind).plan(said["uses"])))
    bench.job.task("replay-0", kind="time", nets=[{"folder": folder, "policy": said}], x="replay.npy")
    piece = bench.run().piece("replay-0")
    exits = fitted.exits(logits)
    assert len(set(exits)) > 1 or (policy, kind) == (Patience, "restarting")  # of two exits the last
    assert (piece["0.exits"] == exits).all()
    assert (piece["0.answers"] == fitted.answer(logits, exits).argmax(-1)).all()
    unread = np.isnan(piece["0.logits"]).all(-1)
    assert (unread == (np.arange(len(logits))[:, None] > exits)).all()


def test_a_crash_in_the_engine_is_a_result_and_the_rest_goes_on(bench, tmp_path):
    """ONNX Runtime has died of a signal while it was imported on real boards."""
    package = tmp_path / "onnxruntime"
    package.mkdir()
    crash = "import os, signal\nif os.path.exists('crash'):\n    os.unlink('crash'); os.kill(os.getpid(), signal.SIGSEGV)\n"
    real = f"import sys; del sys.modules['onnxruntime']; sys.path.remove({str(tmp_path)!r}); import onnxruntime"
    (package / "__init__.py").write_text(crash + real)
    (bench.job.folder / "crash").touch()
    add_predict(bench, "fp32")
    add_predict(bench, "int8")
    bench.run(PYTHONPATH=str(tmp_path))
    assert bench.error("predict-fp32") == "was killed by SIGSEGV, without a word"
    assert bench.piece("predict-int8")["logits"].shape == (3, 20, 4)


def edit(job, **fields):
    path = job.folder / "net-0" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda job: {"provider": "CUDAExecutionProvider"}, "runs on CPUExecutionProvider here, not on CUDAExecutionProvider"),
        (lambda job: edit(job, engine="abacus"), "there is no engine 'abacus'; there is onnxruntime, tensorrt"),
        (lambda job: next((job.folder / "net-0").glob("*.onnx")).write_bytes(b"no graph"), "is not as it was written"),
        (lambda job: (job.folder / "net-0" / "manifest.json").write_text('{"kind": "other"}'), "is no bundle of schema 1"),
        (lambda job: np.save(job.folder / "test.npy", np.full((20, *SHAPE), np.nan, np.float32)), "logits that are not finite"),
        (lambda job: (job.folder / "test.npy").unlink(), "No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(bench, spoil, said):
    add_predict(bench, "fp32")
    bench.job.seal()
    change = spoil(bench.job)
    if isinstance(change, dict):
        path = bench.job.folder / "job.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    subprocess.run([sys.executable, "-B", "agent.py", "run"], cwd=bench.job.folder, check=True, capture_output=True)
    assert said in bench.error("predict-fp32")
    assert "\n" not in bench.error("predict-fp32")


def test_a_silent_task_is_ended(bench, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("import time; time.sleep(60)")
    add_predict(bench, "fp32")
    bench.job.seal()
    path = bench.job.folder / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"silence_s": 3}))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-B", "agent.py", "run"], cwd=bench.job.folder, check=True, env=env, timeout=50)
    assert bench.error("predict-fp32") == "gave no sign of life for 3 s and was ended"


def test_killed_and_started_again_it_does_only_what_is_missing(bench):
    for kind in ("fp32", "int8", "restarting"):
        add_predict(bench, kind)
    bench.job.seal()
    results = bench.job.folder / "results"
    agent = subprocess.Popen([sys.executable, "-B", "agent.py", "run"], cwd=bench.job.folder, start_new_session=True)
    while not (results / "predict-fp32.npz").exists():
        assert agent.poll() is None
        time.sleep(0.05)
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    first = (results / "predict-fp32.npz").stat().st_mtime_ns
    bench.run()
    assert (results / "predict-fp32.npz").stat().st_mtime_ns == first
    assert bench.piece("predict-restarting")["logits"].shape == (2, 20, 4)


def test_a_jobs_name_is_its_content():
    def id_of(n, **fields):
        made = Bench(**fields)
        with made.job:
            add_predict(made, "fp32", n)
            made.job.seal()
            return made.job.id

    assert id_of(20) == id_of(20) != id_of(19)
    assert id_of(20) != id_of(20, threads=2)


# A planted machine


XAVIER_NX = {
    "model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    "compatible": "nvidia,p3449-0000+p3668-0000\0nvidia,p3668-0000\0nvidia,tegra194\0",
    "release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 19:57:35 UTC 2023\n",
    "mode": "NV Power Mode: MODE_15W_6CORE\n2\n",
    "least": "1190400",
}


def planted(root, **changed):
    """The files by which a Jetson is known. Values: shared/boards/transcripts/board_identity.txt and nvpmodel_q.txt."""
    said = {**XAVIER_NX, **changed}
    model, compatible, release, mode, least = (said[k] for k in XAVIER_NX)
    files = {
        "proc/device-tree/model": model, "proc/device-tree/compatible": compatible, "etc/nv_tegra_release": release,
        "usr/sbin/nvpmodel": f"#!/bin/sh\nprintf '{mode}'\n",
        "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "11.4.19"}}',
        "var/lib/dpkg/status": "Package: tensorrt\nStatus: install ok installed\nVersion: 8.5.2.2-1+cuda11.4\n\n"
        "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.0.1\n",
        "sys/class/thermal/thermal_zone0/type": "GPU-therm\n", "sys/class/thermal/thermal_zone0/temp": "37500\n",
        "sys/class/thermal/thermal_zone1/type": "CV0-therm\n", "sys/class/thermal/thermal_zone1/temp": "-256000\n",
        "sys/class/thermal/thermal_zone2/type": "PMIC-Die\n", "sys/class/thermal/thermal_zone2/temp": "100000\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n", "sys/class/thermal/cooling_device0/cur_state": "3\n",
        "sys/class/thermal/cooling_device1/type": "cpufreq\n", "sys/class/thermal/cooling_device1/cur_state": "2\n",
        "sys/class/devfreq/17000000.gv11b/cur_freq": "510000000\n", "sys/class/devfreq/17000000.gv11b/min_freq": "510000000\n",
        "sys/class/devfreq/17000000.gv11b/max_freq": "510000000\n",
        **{
            f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{k}_freq": f"{v}\n"
            for k, v in {"cur": "1190400", "min": least, "max": "1190400"}.items()
        },
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "usr/sbin/nvpmodel").chmod(0o755)
    return root


def state_of(root):
    done = subprocess.run(
        [sys.executable, "-B", "-", "alone"], input=MACHINE.read_bytes(), env={**os.environ, "JETSON_SYSROOT": str(root)},
        capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_a_jetson_says_what_it_is(tmp_path):
    said = said_of(state_of(planted(tmp_path)))
    wanted = {
        "board": "Xavier NX", "module": "p3668-0000", "l4t": "35.4.1", "jetpack": "5.1.2", "tensorrt": "8.5.2.2-1+cuda11.4",
        "cuda": "11.4.19", "power_mode": "MODE_15W_6CORE", "power_mode_id": "2", "clocks": "fixed", "cpu_mhz": "1190",
        "gpu_mhz": "510", "celsius": "GPU-therm 37.5", "throttling": "cpufreq 2", "emulated": "yes",
    }  # fmt: skip
    assert {name: said[name] for name in wanted} == wanted
    assert all(isinstance(text, str) and text for text in said.values())


@pytest.mark.parametrize(
    "plant, board, said",
    [
        (
            {},
            Ssh("b", board="AGX Xavier", emulated=True),
            "b is a Xavier NX (NVIDIA Jetson Xavier NX Developer Kit), not the AGX Xavier",
        ),
        ({}, Ssh("b", power_mode="MAXN", emulated=True), "runs in power mode MODE_15W_6CORE (id 2), not in MAXN"),
        ({"least": "115200"}, Ssh("b", fixed_clocks=True, emulated=True), "its clocks are moving, not fixed"),
        ({"mode": "NVPM ERROR: failed\n"}, Ssh("b", power_mode="MAXN", emulated=True), "unreadable: nvpmodel failed"),
        ({}, Ssh("b"), "is emulated"),
        ({}, Ssh("b", board="Xavier NX", power_mode="MODE_15W_6CORE", fixed_clocks=True, emulated=True), None),
    ],
)
def test_another_machine_than_is_wanted_is_named(tmp_path, plant, board, said):
    wrong = board.wrong(state_of(planted(tmp_path, **plant)))
    assert len(wrong) == (said is not None)
    assert said is None or said in wrong[0]


def test_a_power_mode_that_changes_in_the_middle_spoils_the_measurement(tmp_path):
    before = state_of(planted(tmp_path))
    after = state_of(planted(tmp_path, mode="NV Power Mode: MAXN\\n0\\n"))

    def facts(*states):
        said = {"before": states[0], "after": states[-1], "job": "1", "wall_s": 2.0, "cpu_s": 1.9, "stalled_us": 300000}
        return Ssh("b", emulated=True)._facts([{"said": said}], {"engine": "onnxruntime 1"}, 1, 8, SimpleNamespace(id="1"))

    said = facts(before, before)
    assert (said["noisy"], said["pressure_share"], said["waiting_share"], said["emulated"]) == ("yes", "0.150", "0.050", "yes")
    with pytest.raises(AnytimeError, match="b: its power mode changed during the measurement"):
        facts(before, after)


def test_a_state_that_is_not_what_is_wanted_spoils_a_result_of_before_too(tmp_path):
    state = state_of(planted(tmp_path, least="115200"))
    said = {"before": state, "after": state, "job": "1", "wall_s": 2.0, "cpu_s": 1.9, "stalled_us": 0}

    def facts(board):
        return board._facts([{"said": said}], {"engine": "onnxruntime 1"}, 1, 8, SimpleNamespace(id="1"))

    assert facts(Ssh("b", power_mode="MODE_15W_6CORE", emulated=True))["power_mode"] == "MODE_15W_6CORE"
    with pytest.raises(AnytimeError, match=r"while it was measured, b runs in power mode MODE_15W_6CORE .* not in MAXN"):
        facts(Ssh("b", power_mode="MAXN", emulated=True))
    with pytest.raises(AnytimeError, match="its clocks are moving"):
        facts(Ssh("b", fixed_clocks=True, emulated=True))


@pytest.mark.parametrize("python", ["~/venv/bin/python", "venv/bin/python"])
def test_an_interpreter_is_a_name_or_a_whole_path(python):
    with pytest.raises(UsageError, match="no whole path"):
        Ssh("agx", python=python)
    assert Ssh("agx", python=f"/home/me/{python[2:]}") and Ssh("agx", python="python3.11")


def test_without_asyncssh_a_screen_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    (said,) = asyncio.run(Ssh("agx").inspect())
    assert said.startswith("WRONG") and "asyncssh is not installed here: pip install -e '.[boards]'" in said


def test_this_machine_is_no_jetson():
    state = state_of("")
    assert state["emulated"] == "" and said_of(state)["board"] == "unknown"
    assert "no Jetson that we know" in Ssh("here", board="Xavier NX").wrong(state)[0]


def test_a_result_of_another_job_is_not_taken(bench):
    add_predict(bench, "fp32")
    bench.run()
    path, name = bench.job.folder / "results" / "predict-fp32.npz", bench.job.id
    bench.job.id = "0" * 16
    with pytest.raises(AnytimeError, match="of another job"):
        bench.piece("predict-fp32")
    bench.job.id = name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AnytimeError, match="cannot be read"):
        bench.piece("predict-fp32")
