"""Where a benchmark leaves its numbers: results/benchmarks/NAME.json, which pages cite (tests/test_numbers.py)."""

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from anytime import machine
from anytime.files import write_atomically

PLACE = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def keep(name: str, values: Mapping[str, float]) -> None:
    """Write the last run's ``values``, with the command, the machine, its CPU pressure and the versions that made them.

    ``values``: name -> number; what is no ratio ends in its unit. The pressure is the kernel's at the end of the run: other programs make
    times worthless, and this shows it.
    """
    body = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "values": {k: float(v) for k, v in values.items()},
        "cpu_pressure": _pressure(),
        "device": machine.facts(),
        "versions": machine.versions(),
        "git": machine.commit(),
    }
    path = PLACE / f"{name}.json"
    write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())
    print(f"kept in {path.relative_to(PLACE.parent.parent)}")


def _pressure() -> str:
    """The kernel's word on who waited for the CPU; "unknown" where it says none."""
    try:
        return Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return "unknown"
