"""NVIDIA's tegrastats: what one line says on every JetPack, and the energy of what ran meanwhile."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from anytime.errors import AnytimeError

# Rails whose sum is what the module draws; on AGX boards no single rail is. Those of the Thor are not known.
RAILS = {
    "Nano": ("POM_5V_IN",),
    "TX2": ("VDD_IN",),
    "AGX Xavier": ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
    "Xavier NX": ("VDD_IN",),
    "AGX Orin": ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    "Orin NX": ("VDD_IN",),
    "Orin Nano": ("VDD_IN",),
}
LEAST_WINDOW_S = 10.0  # the sensors resolve no less
MOST_GAP_S = 1.0  # between two readings


class Sample(NamedTuple):
    """One line; what it does not say is None or missing.

    ``rails_mw``: the reading of that moment, not the average since tegrastats began. ``cores``: load [0, 1] and MHz of each,
    None for one that is off. ``gpu_mhz`` and ``memory_mhz`` only under sudo. ``temperatures_c``: by sensor, without those that
    are off and without PMIC's constant.
    """

    rails_mw: dict[str, float]
    gpu_load: float | None
    gpu_mhz: tuple[float, ...]
    memory_mhz: float | None
    cores: tuple[tuple[float, float] | None, ...]
    temperatures_c: dict[str, float]


class Energy(NamedTuple):
    """mJ of one inference above idle, over a window of ``window_s``; None with the ``reason`` where it is not to be had.

    ``busy_w`` and ``idle_w``: mean power of the module in the window and at rest.
    """

    mj: float | None
    window_s: float
    inferences: int
    busy_w: float | None
    idle_w: float | None
    rails: tuple[str, ...]
    reason: str


def sample(line: str) -> Sample:
    """Read one whole line; AnytimeError where it is none of tegrastats."""
    if not re.search(r"(?:^|\s)RAM \d+/\d+MB ", line):
        raise AnytimeError(f"this is no line of tegrastats: {line[:60]!r}; give its output as it came")
    # Two or three readings: now, average (, peak); units from JetPack 5 on. NC is a pin without a rail.
    rails = re.findall(r"(?<!\S)([A-Z]\w*) (\d+)(?:mW)?/\d+(?:mW)?(?:/\d+mW)?(?!\S)", line)
    gpu = re.search(r"(?<!\S)GR3D_FREQ (?:(\d+)%)?(?:@(?:(\d+)|\[([\d,]+)\]))?(?!\S)", line)
    memory = re.search(r"(?<!\S)EMC_FREQ \d+%@(\d+)(?!\S)", line)
    cpu = re.search(r"(?<!\S)CPU \[([^\]]*)\]", line)
    heat = re.findall(r"(?<!\S)(\w+)@(-?\d+(?:\.\d+)?)C(?:/-?\d+(?:\.\d+)?C)?(?!\S)", line)
    load, one, several = gpu.groups() if gpu else (None, None, None)
    return Sample(
        {name: float(now) for name, now in rails if name != "NC"},
        float(load) / 100 if load else None,
        tuple(float(mhz) for mhz in (one or several or "").split(",") if mhz),
        float(memory[1]) if memory else None,
        tuple(_core(core) for core in cpu[1].split(",")) if cpu else (),
        {name.lower(): float(value) for name, value in heat if name != "PMIC" and float(value) > -200},
    )


def samples(text: str) -> list[Sample]:
    """Read every whole line: a last one without its newline was cut off and does not count."""
    return [sample(line) for line in text.split("\n")[:-1] if line.strip()]


def module_mw(board: str, reading: Sample) -> float | None:
    """What the whole module draws, in mW; None where the board's rails are not known or not all there."""
    watched = RAILS.get(board, ())
    if not watched or not all(rail in reading.rails_mw for rail in watched):
        return None
    return sum(reading.rails_mw[rail] for rail in watched)


def energy(
    board: str, busy_s: Sequence[float], busy: Sequence[Sample], idle_s: Sequence[float], idle: Sequence[Sample], inferences: int
) -> Energy:
    """Integrate power over the readings under load, take that of idling for as long away, and share it among ``inferences``.

    ``busy_s`` and ``idle_s``: when each line was read, in seconds on the board's monotonic clock (tegrastats' own dates have no
    fractions). ``inferences``: how many ended from the first reading under load to the last. ``board``: as jetson.identity says.
    Trapezoids; both windows take at least 10 s, with at most 1 s between two readings.
    Source: this project; windows as ``reference/quantization.md``, section d4.
    """
    rails = RAILS.get(board, ())
    window = float(busy_s[-1] - busy_s[0]) if len(busy_s) else 0.0

    def none(reason: str) -> Energy:
        return Energy(None, window, inferences, None, None, rails, reason)

    if not rails:
        return none(f"which rails make up the power of {board!r} is not known")
    watts = []
    for what, at, readings in (("under load", busy_s, busy), ("idle", idle_s, idle)):
        if len(at) != len(readings):
            raise AnytimeError(f"energy {what}: {len(at)} times and {len(readings)} readings; give a time for each")
        if len(at) < 2 or at[-1] - at[0] < LEAST_WINDOW_S:
            lasted = at[-1] - at[0] if len(at) else 0.0
            return none(f"the window {what} is {lasted:.1f} s, at least {LEAST_WINDOW_S:g} s are needed")
        steps = np.diff(at)
        if (steps <= 0).any() or steps.max() > MOST_GAP_S:
            return none(f"readings {what} are missing: {steps.max():.1f} s lie between two of them")
        mw = [module_mw(board, reading) for reading in readings]
        if any(value is None for value in mw):
            return none(f"tegrastats does not show {', '.join(rails)} in every line {what}")
        power = np.array(mw, float) / 1e3
        watts.append(float((steps * (power[1:] + power[:-1]) / 2).sum() / (at[-1] - at[0])))
    if inferences < 1:
        return none("no inference ended in the window")
    busy_w, idle_w = watts
    if busy_w <= idle_w:
        return none(f"under load it drew {busy_w:.2f} W, idle {idle_w:.2f} W")._replace(busy_w=busy_w, idle_w=idle_w)
    return Energy((busy_w - idle_w) * window / inferences * 1e3, window, inferences, busy_w, idle_w, rails, "")


def _core(said: str) -> tuple[float, float] | None:
    found = re.fullmatch(r"(\d+)%@(\d+)", said.strip())
    return (float(found[1]) / 100, float(found[2])) if found else None
