"""Which Jetson it is and in which state: what its files and NVIDIA's tools say, as text read on the board."""

from __future__ import annotations

import re
from typing import NamedTuple

from anytime.errors import AnytimeError

# Module of /proc/device-tree/compatible -> board. The model string differs by JetPack, and carriers bear the developer kit's.
MODULES = {
    "p3448": "Nano",
    "p3310": "TX2",
    "p2888": "AGX Xavier",
    "p3668": "Xavier NX",
    "p3701": "AGX Orin",
    **dict.fromkeys(("p3767-0000", "p3767-0001"), "Orin NX"),
    **dict.fromkeys(("p3767-0003", "p3767-0004", "p3767-0005"), "Orin Nano"),
    "p3834": "AGX Thor",
}
JETPACKS = {
    **{"32.6.1": "4.6", "32.7.1": "4.6.1", "32.7.2": "4.6.2", "32.7.3": "4.6.3", "32.7.4": "4.6.4", "32.7.5": "4.6.5"},
    **{"32.7.6": "4.6.6", "35.1.0": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3"},
    **{"35.6.0": "5.1.4", "35.6.1": "5.1.5", "35.6.4": "5.1.6", "36.2.0": "6.0 DP", "36.3.0": "6.0", "36.4.0": "6.1"},
    **{"36.4.3": "6.2", "36.4.4": "6.2.1", "36.5.0": "6.2.2", "38.2.0": "7.0", "38.4.0": "7.1", "39.2.0": "7.2"},
}


class Identity(NamedTuple):
    """What a Jetson is; None where the board does not say, or says what we do not know.

    ``board``: a value of MODULES. ``module``: "p3701-0005". ``l4t``: "36.4.4". ``jetpack``: "6.2.1".
    """

    model: str | None
    board: str | None
    module: str | None
    l4t: str | None
    jetpack: str | None


class PowerMode(NamedTuple):
    """nvpmodel's mode; ids mean different things on different boards, so neither stands for the other."""

    name: str
    id: int | None
    fan: str | None


def identity(model: str = "", compatible: str = "", nv_tegra_release: str = "") -> Identity:
    """Read the texts of /proc/device-tree/model, /proc/device-tree/compatible and /etc/nv_tegra_release ("" where there is none).

    NUL bytes may be left in. The release file's BOARD is not used: it names several boards alike.
    Source: L4T's public files; P-numbers and releases restated from public tables (shared/reference/boards.md, section 3).
    """
    found = [
        (number, MODULES[name])
        for number in re.findall(r"(?<![a-z0-9])p\d{4}-\d{4}", compatible)
        for name in (number, number[:5])
        if name in MODULES
    ]
    module, board = found[0] if found else (None, None)
    release = re.search(r"^# R(\d+) \(release\), REVISION: ([\d.]+),", nv_tegra_release, re.MULTILINE)
    l4t = ".".join(release.groups()) if release else None
    said = model.replace("\0", "").strip()
    return Identity(said or None, board, module, l4t, JETPACKS.get(l4t or ""))


def power_mode(text: str) -> PowerMode:
    """Read what ``nvpmodel -q`` wrote, with or without --verbose, up to and with its last newline; AnytimeError where it names no mode."""
    errors = re.findall(r"^NVPM ERROR: (.*)$", text, re.MULTILINE)
    if errors:
        raise AnytimeError(f"nvpmodel failed: {errors[0]}: run sudo nvpmodel -q on the board")
    # Only whole lines: half a name or half a number would be another mode.
    mode = re.search(
        r"^(?:NVPM VERB: Current mode: )?NV Power Mode(?:\[(\d+)\])?: *(\S+)\r?\n(?:(\d+)\r?\n)?", text, re.MULTILINE
    )
    if not mode:
        raise AnytimeError(f"nvpmodel -q names no power mode, it says {text[-80:]!r}: run it by hand on the board")
    one_line, name, below = mode.groups()
    fan = re.search(r"^NV Fan Mode: *(\S+)$", text, re.MULTILINE)
    number = one_line or below
    return PowerMode(name, int(number) if number else None, fan.group(1) if fan else None)
