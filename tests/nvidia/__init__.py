"""What of NVIDIA's a board has, made so that it can be had here: see ``Jetson``."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE, TRANSCRIPTS = Path(__file__).parent, Path(__file__).parent.parent / "transcripts"


class Jetson:
    """A folder with a driver, and as asked TensorRT's Python, trtexec and tegrastats; ``env`` is that of its processes."""

    def __init__(self, folder, version, has=("tensorrt", "trtexec"), python=sys.executable, **env):
        if not shutil.which("cc"):
            pytest.skip("no C compiler is installed here: apt-get install gcc")
        from tests.test_trtexec import OPTIONS

        self.folder, self.version = folder, tuple(int(part) for part in version.split("."))
        hidden = folder / "hidden"
        hidden.mkdir(parents=True)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", HERE / "cuda.c"], check=True)
        for name in ("trtexec.py", "tegrastats.py", "tensorrt.py"):
            shutil.copyfile(HERE / name, hidden / name)
        known = [
            o
            for o, (first, last) in OPTIONS.items()
            if (first == 0 or self.version >= first) and (last == 99 or self.version <= last)
        ]
        (hidden / "options.json").write_text(json.dumps([*known, "--help"]))
        if "tensorrt" in has:
            (folder / "tensorrt.py").write_text((HERE / "tensorrt.py").read_text())
        for tool in ("trtexec", "tegrastats"):
            if tool in has:
                (folder / tool).write_text(
                    f'#!/bin/sh\nPYTHONPATH={hidden}:$PYTHONPATH exec {python} -B {hidden}/{tool}.py "$@"\n'
                )
                (folder / tool).chmod(0o755)
        self.env = {
            "FAKE_TENSORRT": version, "LD_LIBRARY_PATH": str(folder), "FAKE_LOG": str(folder / "log"), "FAKE_TOLD": str(folder / "told"),
            "PYTHONPATH": str(folder), "PATH": f"{folder}:{os.environ['PATH']}", **env,
        }  # fmt: skip
        (folder / "told").touch()
        (folder / "told").chmod(0o666)

    def told(self):
        """What its TensorRT was told, call by call."""
        return [json.loads(line) for line in (self.folder / "told").read_text().splitlines()]

    def logs(self, name):
        """Let its trtexec say what a transcript says."""
        shutil.copyfile(TRANSCRIPTS / f"trtexec_{name}.txt", self.folder / "log")
        return self
