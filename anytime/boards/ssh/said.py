"""What the agent says of a board's state, read."""

from __future__ import annotations

from typing import Any

from anytime.errors import AnytimeError
from anytime.nvidia import jetson

Plain = dict[str, Any]


def said_of(state: Plain) -> dict[str, str]:
    """The agent's raw state, read: what a reader of a record needs to judge a number. "unknown" where the board does not say."""
    who = jetson.identity(state["model"], state["compatible"], state["nv_tegra_release"])
    try:
        mode = jetson.power_mode(state["nvpmodel"] + "\n") if state["nvpmodel"] else None
        name, number = (mode.name, mode.id) if mode else ("none", None)
    except AnytimeError as error:
        name, number = f"unreadable: {error}", None
    packages = state["packages"]
    infer = [version for package, version in packages.items() if package.startswith(("tensorrt", "libnvinfer"))]
    clocks = state["cpu_khz"] + state["gpu_hz"]
    known = [(low, high) for _, low, high in clocks if low and high]
    said: dict[str, str] = {
        "cpu": state["cpu"] or "unknown",
        "cores": str(state["cores"]),
        "machine": state["machine"],
        "os": state["os"],
        "python": state["python"],
        "model": who.model or "unknown",
        "board": who.board or "unknown",
        "module": who.module or "unknown",
        "l4t": who.l4t or "unknown",
        "jetpack": packages.get("nvidia-jetpack") or who.jetpack or "unknown",
        "tensorrt": infer[0] if infer else "not installed",
        "cuda": state["cuda"] or "not installed",
        "power_mode": name,
        "power_mode_id": "unknown" if number is None else str(number),
        "clocks": "unknown" if not known else "fixed" if all(low == high for low, high in known) else "moving",
        "cpu_mhz": " ".join(f"{int(now) / 1e3:.0f}" for now, _, _ in state["cpu_khz"] if now) or "unknown",
        "gpu_mhz": " ".join(f"{int(now) / 1e6:.0f}" for now, _, _ in state["gpu_hz"] if now) or "unknown",
        "celsius": " ".join(f"{zone} {c:g}" for zone, c in state["celsius"].items()) or "unknown",
        "throttling": " ".join(f"{what} {level}" for what, level in state["throttling"].items()) or "none seen",
        "emulated": "yes" if state["emulated"] else "no",
    }
    return said
