"""A whole measurement over a real sshd, and everything that can happen to it on the way."""

import asyncio
import logging
import os
import re
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anytime import stops
from anytime.boards.ssh import Ssh, job, link, remote
from anytime.errors import AnytimeError, Unreachable, UsageError
from anytime.policies.confidence import MaxProb
from anytime.policies.sdn import SDN
from tests import sshd
from tests.contracts import board as contract
from tests.test_agent import XAVIER_NX, net, planted, x

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
LAUNCHES = 5  # each a second or more: time to break something


class World:
    """An account, daemons, and the ~/.ssh of who measures."""

    def __init__(self, folder):
        self.folder = folder
        folder.chmod(0o755)
        self.account = sshd.Account(folder)
        self.user = folder / "user"
        (self.user / ".ssh").mkdir(parents=True)
        self.daemons = {}

    def board(self, alias, fields=None, **how):
        """A daemon of this name, known to ~/.ssh, and the board that it is."""
        daemon = self.daemons.get(alias)
        if daemon is None:
            daemon = self.daemons[alias] = sshd.Sshd(self.folder / alias, self.account, **how)
            self.write()
        return Ssh(alias, python=str(daemon.python), **{"launches": 2, "warmup": 1, **(fields or {})})

    def write(self, unknown=(), extra=""):
        lines = [
            f"Host {alias}\n HostName 127.0.0.1\n Port {d.port}\n User {self.account.name}\n IdentityFile {d.folder}/user\n"
            f" UserKnownHostsFile {self.user}/.ssh/known_hosts\n{extra}"
            for alias, d in self.daemons.items()
        ]
        (self.user / ".ssh" / "config").write_text("\n".join(lines))
        known = [d.known_host for alias, d in self.daemons.items() if alias not in unknown]
        (self.user / ".ssh" / "known_hosts").write_text("".join(known))

    def left(self):
        """What lies in the account's home on its real disk."""
        return sorted(str(p.relative_to(self.account.home)) for p in self.account.home.rglob("*"))

    def close(self):
        for daemon in self.daemons.values():
            daemon.close()
        self.account.close()


@pytest.fixture(scope="module")
def world():
    sshd.needs()
    own = tempfile.TemporaryDirectory(prefix="anytime-boards-")  # pytest's are closed to others than root
    made = World(Path(own.name))
    before = {name: os.environ.get(name) for name in ("HOME", "SSH_AUTH_SOCK")}
    os.environ["HOME"] = str(made.user)
    os.environ.pop("SSH_AUTH_SOCK", None)
    yield made
    made.close()
    own.cleanup()
    for name, value in before.items():
        if value is not None:
            os.environ[name] = value


def whole(timing, n, launches):
    assert timing.stage_ms.shape == timing.head_cpu_ms.shape == (3, launches * n)
    assert (timing.stage_ms > 0).all() and np.isfinite(timing.head_ms).all()


class While:
    """``work`` in a thread of its own, while something is done to it."""

    def __init__(self, work):
        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(work)

    def __enter__(self):
        return self

    def result(self):
        return self.future.result(timeout=120)

    def until(self, there):
        """Wait for the first thing that ``there`` finds."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if found := there():
                return found
            if self.future.done():
                self.future.result()
                raise AssertionError("it was over before anything could be done to it")
            time.sleep(0.02)
        raise AssertionError("it never came so far")

    def __exit__(self, *_):
        self.pool.shutdown()


def finished(world):
    return [p for p in world.account.home.glob(".anytime/jobs/*/results/time-*.npz")]


def agent_of(world):
    for path in world.account.home.glob(".anytime/jobs/*/pid"):
        wrapper = path.read_text().strip()
        for pid in sshd.children(int(wrapper)) if wrapper else ():
            if sshd.comm(pid).startswith("timeout"):
                return sshd.children(pid)
    return []


def test_it_keeps_the_contract_of_boards(world):
    board = world.board("agx")
    contract.check(board, contract.onnx, naps=False)
    assert world.left() == []


def test_a_policy_and_predictions_are_those_of_this_machine(world):
    board = world.board("agx")
    int8, samples = net("int8"), x(30)
    logits = int8.predict(samples, batch=1)
    thresholds = tuple(float(np.median(stops.max_probability(z))) for z in logits[:-1])
    jobs = [
        (int8, MaxProb(thresholds=thresholds)),
        (int8, SDN(thresholds=thresholds)),
        (net("fp32"), MaxProb(thresholds=thresholds)),
    ]
    for (_, policy), ran in zip(jobs[:2], board.run(jobs, samples)[:2], strict=True):
        exits = policy.exits(logits)
        assert len(set(exits)) == 3
        assert (ran.exits == exits).all() and (ran.answers == policy.answer(logits, exits).argmax(-1)).all()
        assert ran.wall_ms.shape == ran.cpu_ms.shape == (2, 30) and (ran.wall_ms > 0).all()
        assert ran.facts["interleaved"] == "3" and ran.facts["emulated"] == "no"
    (said,) = board.predict([int8], {"val": samples, "test": samples[:7]})
    np.testing.assert_array_equal(said["val"].argmax(-1), int8.predict(samples).argmax(-1))
    assert said["test"].shape == (3, 7, 4)
    assert world.left() == []


def test_several_boards_at_once(world):
    boards = [world.board("agx"), world.board("nx")]
    with ThreadPoolExecutor(2) as pool:
        timings = list(pool.map(lambda board: board.time([net("int8")], x(20))[0], boards))
    for timing in timings:
        whole(timing, 20, 2)


def test_an_unknown_and_a_changed_host_key_are_refused(world):
    board, daemon = world.board("agx"), world.daemons["agx"]
    old = (daemon.folder / "host").read_bytes(), (daemon.folder / "host.pub").read_bytes()
    world.write(unknown=("agx",))
    with pytest.raises(AnytimeError, match="agx: its host key is unknown or has changed"):
        board.facts()
    world.write()
    known = (world.user / ".ssh" / "known_hosts").read_text()
    daemon.kill()
    daemon.new_host_key()
    daemon.start()
    assert daemon.known_host not in known
    with pytest.raises(AnytimeError, match="agx: its host key is unknown or has changed"):
        board.facts()
    (daemon.folder / "host").write_bytes(old[0])
    (daemon.folder / "host.pub").write_bytes(old[1])
    (daemon.folder / "host").chmod(0o600)
    daemon.kill()
    daemon.start()
    assert board.facts()["emulated"] == "no"


def test_a_config_that_checks_no_host_key_is_refused(world):
    board = world.board("agx")
    (world.user / ".ssh" / "config").write_text(
        re.sub("UserKnownHostsFile .*", "UserKnownHostsFile none", (world.user / ".ssh" / "config").read_text())
    )
    with pytest.raises(UsageError, match="no host key would be checked"):
        board.facts()
    world.write()


def test_nobody_there_and_nobody_let_in_are_two_sentences(world):
    board = world.board("agx")
    with pytest.raises(Unreachable, match="nowhere cannot be reached"):
        replace(board, alias="nowhere").facts()
    config = world.user / ".ssh" / "config"
    world.board("nx")
    text = config.read_text()
    config.write_text(text.replace("/agx/user", "/nx/user"))
    with pytest.raises(AnytimeError, match="agx lets nobody in"):
        board.facts()
    config.write_text(text.replace("/agx/user", "/agx/none"))
    with pytest.raises(UsageError, match="a key that it names, cannot be read for agx"):
        board.facts()
    world.write()


def test_a_full_disk_is_said_and_leaves_nothing(world):
    board = world.board("small", home_mb=1)
    big = np.zeros((200, 3, 16, 16), np.float32)  # 0.6 MB, with the networks over 1 MB
    with pytest.raises(
        AnytimeError, match=r"small: cannot write \d+\.\d MB to ~/.anytime/jobs .* MB are free\): free space there"
    ):
        board.predict([net("int8")], {"val": big, "test": big})
    whole(board.time([net("int8")], x(5))[0], 5, 2)  # the space is there again


def test_a_killed_agent_goes_on_with_what_is_missing(world, caplog):
    board = world.board("agx", {"launches": LAUNCHES})
    with While(lambda: board.time([net("int8")], x(20))) as work:
        first = work.until(lambda: finished(world))[0]
        written = first.stat().st_mtime_ns
        (pid,) = work.until(lambda: agent_of(world))
        os.kill(pid, signal.SIGKILL)
        work.until(lambda: [r for r in caplog.records if "the agent was killed" in r.message])
        assert not first.exists() or first.stat().st_mtime_ns == written
        whole(work.result()[0], 20, LAUNCHES)
    assert world.left() == []


def test_an_agent_that_is_always_killed_is_an_error(world, monkeypatch):
    monkeypatch.setattr(remote, "RESTARTS", 0)
    board = world.board("agx", {"launches": LAUNCHES})
    with While(lambda: board.time([net("int8")], x(20))) as work:
        work.until(lambda: finished(world))
        (pid,) = work.until(lambda: agent_of(world))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(
            AnytimeError, match=f"agx: the agent failed with exit status 137; [1-4] of {LAUNCHES} results were finished"
        ):
            work.result()
    assert world.left() == []


def test_a_job_is_bounded_on_the_board_itself(world, monkeypatch):
    monkeypatch.setattr(job, "LIMIT_S", 8)
    board = world.board("agx", {"launches": 500})
    with While(lambda: board.time([net("int8")], x(20))) as work:
        (pid,) = work.until(lambda: agent_of(world))
        with pytest.raises(AnytimeError, match="took longer than 8 s and was ended"):
            work.result()
    assert not sshd.comm(pid), "the remote process outlives its timeout"


def test_a_killed_sshd_loses_nothing(world, caplog):
    board, daemon = world.board("agx", {"launches": LAUNCHES}), world.daemons["agx"]
    with While(lambda: board.time([net("int8")], x(20))) as work:
        work.until(lambda: finished(world))
        (pid,) = work.until(lambda: agent_of(world))
        daemon.kill()
        work.until(lambda: [r for r in caplog.records if "agx: the link is lost" in r.message])
        work.until(lambda: not sshd.comm(pid))  # it has gone on, and ended
        assert len(finished(world)) == LAUNCHES
        daemon.start()
        whole(work.result()[0], 20, LAUNCHES)
    assert world.left() == []


def test_silence_is_noticed_and_every_finished_result_recovered(world, caplog):
    assert link.KEEPALIVE_S * link.MISSED + link.CALL_S <= 14, "s until it is noticed"
    caplog.set_level(logging.WARNING)
    board, lost = world.board("agx", {"launches": LAUNCHES}), threading.Event()

    class Ear(logging.Handler):
        def emit(self, record):
            if "the link is lost" in record.getMessage():
                lost.set()

    ear = Ear()
    link.LOG.addHandler(ear)
    try:
        with While(lambda: board.time([net("int8")], x(20))) as work:
            work.until(lambda: finished(world))
            (pid,) = work.until(lambda: agent_of(world))
            with sshd.Silence(world.daemons["agx"]):
                assert lost.wait(120)
                work.until(lambda: not sshd.comm(pid))
                there = {p: p.stat().st_mtime_ns for p in finished(world)}
                assert len(there) == LAUNCHES
            whole(work.result()[0], 20, LAUNCHES)
    finally:
        link.LOG.removeHandler(ear)
    assert world.left() == []


def test_another_run_collects_what_the_first_one_began(world, monkeypatch):
    """As after Ctrl-C, or when the board stays away for longer than our patience."""
    monkeypatch.setattr(link, "PATIENCE_S", 1)
    board, daemon = world.board("agx", {"launches": LAUNCHES}), world.daemons["agx"]
    with While(lambda: board.time([net("int8")], x(20))) as work:
        work.until(lambda: finished(world))
        (pid,) = work.until(lambda: agent_of(world))
        daemon.kill()
        with pytest.raises(Unreachable, match="agx did not come back within 1 s: what runs there goes on"):
            work.result()
    end = time.monotonic() + 60
    while sshd.comm(pid) and time.monotonic() < end:
        time.sleep(0.1)
    written = {p.name: p.stat().st_mtime_ns for p in finished(world)}
    assert len(written) == LAUNCHES
    daemon.start()
    began = time.time_ns()
    whole(board.time([net("int8")], x(20))[0], 20, LAUNCHES)
    assert all(t < began for t in written.values())
    assert world.left() == []


def test_a_job_that_cannot_run_says_why_and_leaves_nothing(world):
    board = world.board("agx", {"provider": "CUDAExecutionProvider"})
    with pytest.raises(AnytimeError, match="agx, time-0: .* not on CUDAExecutionProvider"):
        board.time([net("int8")], x(5))
    with pytest.raises(AnytimeError, match="there is no sample to run"):
        board.time([net("int8")], x(0))
    with pytest.raises(AnytimeError, match="cannot run torch: agx runs onnx, tensorrt, not torch"):
        board.time([contract.network(2)], contract.samples())
    assert world.left() == []


def test_the_wrong_jetson_is_refused_and_a_planted_one_marked(world):
    root = planted(world.folder / "planted")
    board = world.board("orin", {"board": "AGX Orin", "emulated": True}, env={"JETSON_SYSROOT": str(root)})
    with pytest.raises(AnytimeError, match="orin is a Xavier NX .* not the AGX Orin that is wanted"):
        board.time([net("int8")], x(5))
    with pytest.raises(AnytimeError, match="runs in power mode MODE_15W_6CORE"):
        replace(board, board="Xavier NX", power_mode="MAXN").time([net("int8")], x(5))
    with pytest.raises(AnytimeError, match="orin is emulated"):
        replace(board, board="", emulated=False).time([net("int8")], x(5))
    (timing,) = replace(board, board="Xavier NX", power_mode="MODE_15W_6CORE").time([net("int8")], x(5))
    wanted = {"emulated": "yes", "board": "Xavier NX", "power_mode": "MODE_15W_6CORE", "power_mode_id": "2", "l4t": "35.4.1"}
    assert {k: timing.facts[k] for k in wanted} == wanted
    assert XAVIER_NX["model"].strip("\0") == timing.facts["model"]


def test_a_screen_says_what_is_there_and_what_is_wrong(world):
    lines = asyncio.run(world.board("agx", {"board": "AGX Xavier"}).inspect())
    assert len(lines) < 50
    assert any(line.startswith("python onnxruntime") and "CPUExecutionProvider" in line for line in lines)
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert len(wrong) == 1 and "no Jetson that we know" in wrong[0]
    (gone,) = asyncio.run(Ssh("nowhere").inspect())
    assert gone.startswith("WRONG") and "cannot be reached" in gone


EXPERIMENT = """
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.config import Experiment, Suite
from anytime.datasets.synthetic import Synthetic
from anytime.policies.confidence import MaxProb
from anytime.train import Recipe
from tests.worlds import Tiny

EXPERIMENT = Experiment(
    name="mine_on_a_board",
    question="Mine?",
    suites=(Suite(Synthetic(n=800, noise=0.25, size=16, channels=3, n_classes=4), (Tiny(),)),),
    recipe=Recipe(epochs=2, batch=64, lr=1e-2),
    backends=(OnnxRuntime(of=PTQ()),),
    policies=(MaxProb(),),
    budgets=(0.9,),
    time_samples=8,
    replay_samples=8,
)
"""


def test_a_board_is_added_to_what_was_run_without_training_anything(world, tmp_path, capsys):
    from anytime.__main__ import main
    from anytime.record import load

    where = ["--results", str(tmp_path / "results")]
    (tmp_path / "mine_on_a_board.py").write_text(EXPERIMENT)
    assert main(["run", str(tmp_path / "mine_on_a_board.py"), *where]) == 0
    for alias in ("agx", "nx"):
        said = world.board(alias)
        (tmp_path / f"the_{alias}.py").write_text(
            f"from anytime.boards.ssh import Ssh\nBOARD = Ssh({alias!r}, python={said.python!r}, launches=1, warmup=1)\n"
        )

    trained = {p: p.stat().st_mtime_ns for p in (tmp_path / "results" / "cache" / "trained").rglob("*.safetensors")}
    assert trained
    files = [str(tmp_path / f"the_{alias}.py") for alias in ("agx", "nx")]
    assert main(["measure", str(tmp_path / "mine_on_a_board.py"), "--board", *files, *where]) == 0
    found = [(r.kind, r.board) for r, _ in load(tmp_path / "results" / "records", "mine_on_a_board").records]
    assert sorted(found) == sorted(
        [("eval", ""), ("decide", ""), *((k, b) for k in ("measure", "replay") for b in ("agx", "nx"))]
    )
    assert " agx " in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "results" / "cache" / "trained").rglob("*.safetensors")} == trained
    assert main(["board", "check", *files]) == 0
    assert "everything is as it is wanted" in capsys.readouterr().out
    (tmp_path / "gone.py").write_text("from anytime.boards.ssh import Ssh\nBOARD = Ssh('gone.invalid')\n")
    assert main(["measure", str(tmp_path / "mine_on_a_board.py"), "--board", str(tmp_path / "gone.py"), *where]) == 2
    assert "no address of gone.invalid is known here" in capsys.readouterr().err
    assert main(["board", "check", "agx_xavie"]) == 2
    assert "did you mean 'agx_xavier'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["exit 255", "kill -9 $PPID"], ids=["ssh's own status", "session killed"])
def test_a_lost_link_is_never_called_a_failure(world, monkeypatch, command):
    monkeypatch.setattr(link, "PATIENCE_S", 0)
    world.board("agx")

    async def said(command):
        async with link.Link("agx") as there:
            return await there.sh(command)

    with pytest.raises(Unreachable, match="did not come back"):
        asyncio.run(said(command))
    with pytest.raises(AnytimeError, match="agx: ls failed there .*No such file"):
        asyncio.run(said("ls /nowhere"))
    assert asyncio.run(said("echo fine")) == "fine\n"
