"""TensorRT on a board, with everything but NVIDIA's own code: builders and runtimes of every version, trtexec, tegrastats."""

import json
from functools import cache

import numpy as np
import pytest

from anytime.backend import links
from anytime.backends.float import Float32
from anytime.backends.ptq import PTQ
from anytime.backends.tensorrt import TensorRT, Torch2TRTNet
from anytime.boards.ssh import Ssh, results
from anytime.boards.ssh.job import stem
from anytime.boards.ssh.tool import tool_of
from anytime.errors import AnytimeError, Unsupported
from anytime.nvidia.trtexec import banner_digits
from tests.nvidia import Jetson
from tests.test_agent import Bench, python_of, x
from tests.test_tegrastats import LINES
from tests.worlds import Restarting, data, trained

VERSIONS = ["8.0.1", "8.4.1", "8.5.2", "10.3.0", "11.1.0"]  # each has names that those before it lack, or lacks some
NETS = {
    "fp32": TensorRT(of=Float32()),
    "fp16": TensorRT(of=Float32(), precision="fp16"),
    "int8": TensorRT(of=PTQ()),
    "entropy2": TensorRT(of=Float32(), calibrator="entropy2"),
    "restarting": TensorRT(of=Float32()),
}


@cache
def net(kind):
    spec = (Restarting(),) if kind == "restarting" else ()
    return NETS[kind].compress(trained(*spec), data().calib, None)


def state_with(version, has):
    """What machine.py would say of such a board."""
    digits = banner_digits(tuple(int(part) for part in version.split(".")))
    engines = {"tensorrt": f"{version}.1" if "tensorrt" in has else "", "trtexec": f"v{digits}" if "trtexec" in has else ""}
    return {"engines": engines, "tools": {"trtexec": "trtexec", "tegrastats": ""}, "packages": {}} | BARE


BARE = {
    **dict.fromkeys(("model", "compatible", "nv_tegra_release", "nvpmodel", "cuda", "cpu", "machine", "os", "python", "emulated"), ""),
    **{"cores": 4, "cpu_khz": [], "gpu_hz": [], "celsius": {}, "throttling": {}},
}  # fmt: skip


class Board:
    """A bench with a Jetson's TensorRT; ``run`` lets the agent do what was asked."""

    def __init__(self, folder, version="8.5.2", has=("tensorrt", "trtexec"), **env):
        self.jetson = Jetson(folder / "nvidia", version, has, **env)
        self.home = folder / "home"
        self.home.mkdir(exist_ok=True)
        self.bench = Bench(state_with(version, has))
        self.job = self.bench.job

    def predict(self, kind, n=6):
        """Ask for the logits of samples."""
        if not (self.job.folder / "test.npy").exists():
            self.job.samples("test", x(20))
        folder = self.job.net(net(kind), list(net(kind).plan(range(net(kind).n_exits))))
        self.job.task(f"predict-{kind}", kind="predict", folder=folder, x="test.npy", first=0, stop=n, batch=1)
        return folder

    def run(self, *python):
        self.bench.run(*python, HOME=str(self.home), **self.jetson.env)
        return self

    def error(self, name):
        return self.bench.error(name)

    def __enter__(self):
        self.job.__enter__()
        return self

    def __exit__(self, *_):
        self.job.__exit__(None, None, None)


def close(got, want):
    return np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


# By TensorRT's own Python


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_runs_and_says_its_layers(tmp_path, version):
    with Board(tmp_path, version) as board:
        folder = board.predict("int8")
        board.run()
        assert close(board.bench.piece("predict-int8")["logits"], net("int8").predict(x(6), batch=1))
        told, built = board.jetson.told(), board.bench.piece("build")
        weak = board.jetson.version < (10,)
        assert [t["flags"] for t in told] == [["FP16", "INT8"] if weak else []] * 3  # no TF32
        assert {t["typed"] for t in told} == {not weak} and {t["explicit_batch"] for t in told} == {weak}
        assert {t["workspace"] for t in told} == {1 << 30} and {t["scales"] for t in told} == {None}
        assert [t["timing_cache"] for t in told] == ["", "!", "!!"]  # one for all
        assert (board.home / ".anytime" / f"timing-{version}-none.cache").read_text() == "!!!"
        names = [f"{folder}/{stem(s)}.plan" for s in net("int8").plan(range(3))]
        assert list(built["said"]["engine_bytes"]) == names and min(built["said"]["engine_bytes"].values()) > 1000
        assert (set(names) <= set(built)) == (board.jetson.version >= (8, 2))
        facts = board.bench.piece("predict-int8")["said"]["engines"][0]
        assert facts == {"engine": f"tensorrt {version}.1", "gpu": "Xavier"}


def test_python_3_6_of_jetpack_4_does_it_too(tmp_path):
    python = python_of("3.6.15")
    with Board(tmp_path, "8.0.1") as board:
        board.predict("int8")
        board.predict("restarting")
        board.run(python)
        assert board.bench.piece("build")["said"]["before"]["python"] == "3.6.15"
        for kind in ("int8", "restarting"):
            assert close(board.bench.piece(f"predict-{kind}")["logits"], net(kind).predict(x(6), batch=1))


def test_a_later_job_finds_the_timing_cache(tmp_path):
    for n, want in ((6, "!!!"), (7, "!!!!!!")):
        (tmp_path / str(n)).mkdir()
        with Board(tmp_path / str(n)) as board:
            board.home = tmp_path
            board.predict("int8", n)
            board.run()
            assert (tmp_path / ".anytime" / "timing-8.5.2-none.cache").read_text() == want


@pytest.mark.parametrize("version, header", [("8.5.2", 8502), ("10.3.0", 100300)])
def test_a_calibrator_hands_over_the_ranges_that_we_chose(tmp_path, version, header):
    """In the bits that NVIDIA's cache has; the module beside it refuses another version's header, and asks for no sample."""
    with Board(tmp_path, version) as board:
        folder = board.predict("entropy2")
        board.run()
        for segment, told in zip(net("entropy2").plan(range(3)), board.jetson.told(), strict=True):
            wanted = json.loads(net("entropy2").files(segment)["scales.json"])
            got = {name: float(np.frombuffer(bytes.fromhex(bits), ">f4")[0]) for name, bits in told["scales"].items()}
            assert got == pytest.approx(wanted) and (told["flags"], told["typed"]) == (["FP16", "INT8"], False)
        head = (board.job.folder / folder / "0-1-0.calibration").read_text().split("\n")[0]
        assert head == f"TRT-{header}-EntropyCalibration2"


@pytest.mark.parametrize(
    "kind, version, flags",
    [("fp32", "8.5.2", []), ("fp16", "8.5.2", ["FP16"]), ("fp16", "10.3.0", [])],
)
def test_the_backend_says_which_numbers(tmp_path, kind, version, flags):
    with Board(tmp_path, version) as board:
        board.predict(kind)
        board.run()
        assert [t["flags"] for t in board.jetson.told()] == [flags] * 3


@pytest.mark.parametrize(
    "version, kind, said",
    [("11.1.0", "entropy2", "11.1.0 has no calibrators"), ("7.1.3", "int8", "7.1.3 cannot read Q/DQ graphs")],
)
def test_what_a_version_cannot_take_is_refused_before_anything_is_sent(tmp_path, version, kind, said):
    with Bench(state_with(version, ("tensorrt",))).job as job, pytest.raises(Unsupported, match=said):
        job.net(net(kind), list(net(kind).plan(range(3))))


@pytest.mark.parametrize(
    "env, task, said",
    [
        ({"FAKE_CRASH": "import"}, "build", "the builder of net-0/0-1-0.plan was killed by SIGSEGV, without a word"),
        ({"FAKE_CRASH": "build"}, "build", "the builder of net-0/0-1-0.plan was killed by SIGSEGV, without a word"),
        ({"FAKE_CRASH": "build"}, "predict-int8", "net-0/0-1-0.plan is not there: its engine could not be built"),
        ({"FAKE_CRASH": "run"}, "predict-int8", "was killed by SIGSEGV, without a word"),
        ({"FAKE_CRASH": "enqueue"}, "predict-int8", "TensorRT could not run an engine"),
        ({"FAKE_FULL": "1"}, "predict-int8", "CUDA: cuMemAlloc_v2 failed (2, out of memory)"),
        ({"FAKE_HALF": "x"}, "predict-int8", "at the border of an engine, where float32 was asked for"),
        ({"LD_LIBRARY_PATH": "/nowhere"}, "predict-int8", "the CUDA driver cannot be opened (libcuda.so.1"),
    ],
    ids=str,
)
def test_whatever_the_engine_dies_of_is_one_sentence(tmp_path, env, task, said):
    with Board(tmp_path, **env) as board:
        board.predict("int8")
        board.run()
        assert said in board.error(task) and "\n" not in board.error(task)


def test_the_builders_own_words_are_told(tmp_path):
    with Board(tmp_path, "8.5.2") as board:
        board.predict("int8")
        board.job._builds[0]["options"]["flags"] = []
        board.run()
        assert "failed: Error Code 4: Internal Error (Int8 precision has been set for a layer" in board.error("build")
        (board.job.folder / "results" / "build.error").unlink()
        (board.job.folder / "net-0" / "0-1-0.onnx").write_bytes(b"no graph")
        board.bench.agent(HOME=str(board.home), **board.jetson.env)
        assert "failed: TensorRT 8.5.2.1 cannot read the graph: In node 0" in board.error("build")


def test_a_head_may_leave_a_part_of_the_state_unread(tmp_path):
    """Its engine then lacks that input."""
    with Board(tmp_path) as board:
        folder = board.predict("fp32")
        manifest = board.job.folder / folder / "manifest.json"
        said = json.loads(manifest.read_text())
        for segment in said["segments"]:
            segment["inputs"].append("nobody reads it")
        manifest.write_text(json.dumps(said))
        board.run()
        assert close(board.bench.piece("predict-fp32")["logits"], net("fp32").predict(x(6), batch=1))


@pytest.mark.parametrize(
    "engines, tools, packages, version, by",
    [
        ({"tensorrt": "8.5.2.2", "trtexec": "v8502"}, {"trtexec": "/t"}, {}, (8, 5, 2), ""),
        ({"tensorrt": "broken: was killed by SIGSEGV", "trtexec": "v100300"}, {"trtexec": "/t"}, {}, (10, 3, 0), "/t"),
        ({"tensorrt": "", "trtexec": "of an unnamed version"}, {"trtexec": "/t"}, {"libnvinfer7": "7.1.3-1+cuda10.2"}, (7, 1, 3), "/t"),
    ],
)  # fmt: skip
def test_python_first_then_trtexec(engines, tools, packages, version, by):
    tool = tool_of("b", engines, tools, packages)
    assert (tool.version, tool.trtexec) == (version, by)
    assert tool.facts["tensorrt_by"].startswith("trtexec" if by else "its Python")


@pytest.mark.parametrize(
    "engines, tools, said",
    [
        ({"tensorrt": "", "trtexec": ""}, {"trtexec": ""}, "b has no TensorRT that can be used: its Python has no tensorrt"),
        (
            {"tensorrt": "broken: failed: ImportError: libnvinfer.so.8"},
            {"trtexec": ""},
            "tensorrt is broken: failed: ImportError",
        ),
        ({"tensorrt": "", "trtexec": "broken: was killed by SIGSEGV"}, {"trtexec": "/t"}, "/t is broken: was killed by SIGSEGV"),
    ],
)
def test_a_board_without_tensorrt_is_told_so(engines, tools, said):
    with pytest.raises(AnytimeError, match=said):
        tool_of("b", engines, tools, {"libnvinfer8": "8.5.2-1"})


def test_what_torch2trt_made_stays_where_it_was_made():
    built = Torch2TRTNet(trained(), {}, {}, [], [])
    assert "engines of torch2trt run only where torch has made them, not on agx" in Ssh("agx").why_not(built)


# What results come to


def energies(**changed):
    line = LINES[1][1][0] + "\n"
    piece = {"said": {"why": ""}}
    for name in ("idle", "0"):
        piece |= {f"{name}.s": np.arange(0, 12, 0.1), f"{name}.lines": np.frombuffer(line.encode() * 120, np.uint8)}
    return results.energy("Xavier NX", piece | {"0.ended": np.arange(0, 13, 0.01)} | changed, 1)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"said": {"why": "tegrastats said nothing within 10 s"}}, "none: tegrastats said nothing within 10 s"),
        ({}, "none: under load it drew 5.08 W, idle 5.08 W"),
        ({"0.lines": np.frombuffer(b"no such line\n", np.uint8), "0.s": np.zeros(1)}, "none: this is no line of tegrastats"),
        ({"0.lines": np.zeros(0, np.uint8), "0.s": np.zeros(0)}, "none: the window under load is 0.0 s, at least 10 s"),
    ],
    ids=["silent", "no more than idle", "another text", "no line"],
)
def test_absent_energy_says_why(changed, said):
    mj, facts = energies(**changed)
    assert mj == (None,) and facts["energy"].startswith(said)


def test_layers_that_cannot_be_read_do_not_end_a_measurement():
    names = [f"net-0/{stem(s)}.plan" for s in links(net("int8"))]
    built = {"said": {"engine_bytes": dict.fromkeys(names, 7), "build_s": dict.fromkeys(names, 0.5)}}
    rows, facts = results.engines(built, {}, "net-0", net("int8"))
    assert rows == () and facts == {"engine_bytes": "42", "build_s": "3.0", "engine_layers": facts["engine_layers"]}
    assert "from 8.2 on" in facts["engine_layers"]
    rows, facts = results.engines(built | dict.fromkeys(names, np.frombuffer(b"{}", np.uint8)), {}, "net-0", net("int8"))
    assert rows == () and "has no Layers" in facts["engine_layers"]
