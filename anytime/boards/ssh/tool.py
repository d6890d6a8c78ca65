"""By what a board can use TensorRT: its Python, else trtexec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from anytime.errors import AnytimeError
from anytime.nvidia.trtexec import Version, banner_version


class Tool(NamedTuple):
    """``trtexec``: where it lies, if it must do; "" where TensorRT's own Python does. ``facts`` say so to who reads a record."""

    version: Version
    trtexec: str
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """The version as text."""
        return ".".join(map(str, self.version))


def tool_of(board: str, engines: Mapping[str, str], tools: Mapping[str, str], packages: Mapping[str, str]) -> Tool:
    """Choose by what the agent says of a board (agent/machine.py): its engines, NVIDIA's tools, installed packages.

    AnytimeError where there is no TensorRT, or none whose version can be told.
    """
    python, path = engines.get("tensorrt", ""), tools.get("trtexec", "")
    if python and not python.startswith("broken") and (version := _version(python)):
        return Tool(version, "", {"tensorrt_by": "its Python"})
    why = f"its Python's tensorrt is {python}" if python else "its Python has no tensorrt"
    if not path:
        raise AnytimeError(
            f"{board} has no TensorRT that can be used: {why}, and there is no trtexec: install both there from JetPack "
            "(python3-libnvinfer, libnvinfer-bin), or set python= to an interpreter that has tensorrt"
        )
    said = engines.get("trtexec", "")
    found = re.fullmatch(r"v(\d{4,6})", said)
    installed = next((v for name, v in packages.items() if name.startswith("libnvinfer") or name == "tensorrt"), "")
    named = banner_version(found[1]) if found else _version(installed)  # 7.x does not say its own
    if named is None or said.startswith("broken"):
        raise AnytimeError(f"{board}: {why}, and {path} is {said or 'silent'}: run {path} --help there")
    return Tool(named, path, {"tensorrt_by": f"trtexec ({why})"})


def _version(text: str) -> Version | None:
    """ "8.5.2.2-1+cuda11.4" -> (8, 5, 2)."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None
