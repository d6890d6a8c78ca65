"""What a board is sent: networks, samples and the agent, in a folder whose name is made of its content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from anytime import stops
from anytime.backend import Deployable, Segment
from anytime.board import board_test
from anytime.boards.ssh.said import said_of
from anytime.boards.ssh.tool import Tool, tool_of
from anytime.errors import AnytimeError
from anytime.metrics import Floats
from anytime.nvidia import trtexec
from anytime.policy import Policy

Plain = dict[str, Any]

LIMIT_S = 2 * 3600  # of a whole job, kept on the board itself
BUILD_S = 120  # more of it for every engine to build
SILENCE_S = 180.0  # of one task's process, kept there too
AGENT = Path(__file__).parent.parent / "agent"
MACHINE = AGENT / "machine.py"  # enough to ask a board what it is
FILES = (*sorted(p for p in AGENT.glob("*.py") if p.stem != "__init__"), Path(stops.__file__))
RUNS = {"onnx": "onnxruntime", "tensorrt": "tensorrt"}  # format of a Deployable -> the agent's engine


class Job(contextlib.ExitStack):
    """A folder of its own with all that the board needs. ``state``: what the board says of itself, with its engines.

    Networks of TensorRT become a task "build" before all others. ``what``: what else sets it apart: the board's name and settings.
    """

    def __init__(self, board: str, state: Plain, what: Plain) -> None:
        super().__init__()
        self.board, self.state, self.what = board, state, what
        self.root = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="anytime-ssh-")))
        self.folder, self.results = self.root / "job", self.root / "results"
        self.folder.mkdir()
        self.results.mkdir()
        self.tasks: list[Plain] = []
        self.id = ""
        self._known: dict[tuple[int, tuple[Segment, ...]], str] = {}
        self._builds: list[Plain] = []
        self._tool: Tool | None = None

    @property
    def names(self) -> list[str]:
        return [task["name"] for task in self.tasks]

    @property
    def limit_s(self) -> int:
        """How long the board lets it run: tasks may say that they take long, ``takes_s``."""
        return LIMIT_S + BUILD_S * len(self._builds) + sum(int(task.get("takes_s", 0)) for task in self.tasks)

    @property
    def tool(self) -> Tool:
        """By what TensorRT is used there; AnytimeError where there is none."""
        self._tool = self._tool or tool_of(self.board, self.state["engines"], self.state["tools"], self.state["packages"])
        return self._tool

    def by_trtexec(self, net: Deployable) -> bool:
        """Whether only trtexec can run this network's engines there: it times them and answers nothing."""
        return net.format == "tensorrt" and bool(self.tool.trtexec)

    def samples(self, name: str, x: Floats) -> None:
        np.save(self.folder / f"{name}.npy", np.ascontiguousarray(x, dtype=np.float32))

    def task(self, name: str, **said: Any) -> None:
        self.tasks.append({"name": name, **said})

    def net(self, net: Deployable, segments: Sequence[Segment]) -> str:
        """Write these segments as a bundle (see bundle.py), once; answer its folder."""
        known = (id(net), tuple(segments))
        if known not in self._known:
            self._known[known] = folder = f"net-{len(self._known)}"
            (self.folder / folder).mkdir()
            said = [self._segment(net, segment, f"{folder}/{stem(segment)}") for segment in segments]
            manifest = {
                "kind": "anytime bundle", "schema": 1, "n_exits": net.n_exits, "restarts": net.restarts,
                "float_biases": bool(getattr(net, "float_biases", False)), "engine": RUNS[net.format], "segments": said,
            }  # fmt: skip
            (self.folder / folder / "manifest.json").write_text(json.dumps(manifest))
        return self._known[known]

    def _segment(self, net: Any, segment: Segment, path: str) -> Plain:
        if net.format != "tensorrt":
            return self._graph(path, net.graph(segment)) | segment._asdict()
        import onnx

        files, version = net.files(segment), self.tool.version
        calibration, timing_cache = "", "timing.cache" if version >= (8, 0, 0) else ""
        if "scales.json" in files:
            calibration = f"{path}.calibration"
            cache = trtexec.calibration_cache(json.loads(files["scales.json"]), version)
            (self.folder / calibration).write_text(cache)
        flags, typed = trtexec.number_types(version, net.precision, bool(calibration))
        command = trtexec.build_command(
            version, f"{path}.onnx", f"{path}.plan", net.precision, calibration, timing_cache, self.tool.trtexec
        )
        options = {
            "onnx": f"{path}.onnx", "engine": f"{path}.plan", "flags": flags, "typed": typed, "calibration": calibration,
            "timing_cache": timing_cache, "workspace_mib": trtexec.WORKSPACE_MIB,
        }  # fmt: skip
        self._builds.append({"engine": f"{path}.plan", "command": command if self.tool.trtexec else [], "options": options})
        graph = onnx.ModelProto.FromString(files["onnx"]).graph
        names = {"inputs": [i.name for i in graph.input], "outputs": [o.name for o in graph.output]}
        return self._graph(path, files["onnx"]) | names | segment._asdict()

    def _graph(self, path: str, body: bytes) -> Plain:
        (self.folder / f"{path}.onnx").write_bytes(body)
        return {"file": f"{Path(path).name}.onnx", "sha256": hashlib.sha256(body).hexdigest()}

    def timed_by_trtexec(self, net: Deployable, segments: Sequence[Segment]) -> list[Plain]:
        """What trtexec is asked, for each of these segments."""
        runs = []
        for path in (f"{self.net(net, segments)}/{stem(segment)}" for segment in segments):
            engine, times, layers = (f"{path}.{kind}" for kind in ("plan", "times", "layers"))
            command = trtexec.time_command(self.tool.version, engine, times, layers=layers, trtexec=self.tool.trtexec)
            runs.append({"engine": engine, "times": times, "layers": layers, "command": command})
        return runs

    def seal(self) -> None:
        """Write what is left and give the job its name."""
        if self._builds:
            # Other clocks, other timings.
            mode = re.sub(r"\W+", "-", said_of(self.state)["power_mode"])
            cache = f"timing-{self.tool.name}-{mode}.cache"
            self.tasks.insert(0, {"name": "build", "kind": "build", "engines": self._builds, "timing_cache": cache})
        for file in FILES:
            (self.folder / file.name).write_bytes(file.read_bytes())
        job = {**self.what, "silence_s": SILENCE_S, "tasks": self.tasks}
        digest = hashlib.sha256(json.dumps([self.board, job], sort_keys=True).encode())
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(self.folder)).encode() + hashlib.sha256(path.read_bytes()).digest())
        self.id = digest.hexdigest()[:16]
        (self.folder / "job.json").write_text(json.dumps(job | {"id": self.id}))

    def piece(self, name: str) -> Plain:
        """A result that was brought home: its arrays, and what is said of them."""
        path = self.results / f"{name}.npz"
        try:
            with np.load(path) as arrays:
                piece: Plain = dict(arrays)
            piece["said"] = json.loads(str(piece["said"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise AnytimeError(f"{self.board}: the result {name} cannot be read ({error}): measure again") from error
        if piece["said"]["job"] != self.id:
            raise AnytimeError(f"{self.board}: the result {name} is of another job: measure again")
        return piece


def stem(segment: Segment) -> str:
    """Name of a segment's files: "0-1-state", "1-1-0"."""
    return f"{segment.first}-{segment.stop}-{'state' if segment.head is None else segment.head}"


def on_board(net: Deployable, policy: Policy, x: Floats) -> Plain:
    """What the agent needs of a policy."""
    said: Plain = board_test(policy, net.predict(x[:256]))
    return said


def agent_sha256() -> str:
    """Of all the files that a board gets from us."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()[:12]
