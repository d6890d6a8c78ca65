"""What produced a number: versions, commit, host. Quick to ask, and the same for a whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from anytime import __version__, cpu

PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "torchao", "ptflops", "scikit-learn")


@lru_cache
def versions() -> dict[str, str]:
    """Of Python, of us and of every package that shapes a number."""
    found = {"python": platform.python_version(), "anytime": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache
def commit() -> dict[str, Any]:
    """The source's git commit and whether the source differed from it; empty where git does not hold this file.

    What a run itself writes (``results/``) does not count as a difference.
    """
    here = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # else it is installed inside somebody else's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", ".", ":(exclude)results"))}
    except (OSError, subprocess.SubprocessError):
        return {}


@lru_cache
def facts() -> dict[str, Any]:
    """The host that predicted: processor, its flags, cores, threads. Boards say more of themselves."""
    return {
        "cpu": cpu.info("model name") or platform.processor() or platform.machine(),
        "flags": cpu.of_note(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": sys.executable.rsplit(os.sep, 1)[-1],
    }
