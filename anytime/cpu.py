"""What this machine's processor can do, and how long tasks have waited for it."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

FP16_KERNELS = ("avx512_fp16", "amx_fp16", "asimdhp")  # any one: half-precision arithmetic, not conversions
BF16_KERNELS = ("avx512_bf16", "amx_bf16", "bf16")
NOTED = (  # what shapes speed or, in 8 and 16 bits, answers
    *("avx2", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")  # products of u8 and s8 added up in 32 bits


@lru_cache
def flags() -> frozenset[str]:
    """Feature flags as Linux names them (x86 "flags", Arm "Features"); empty where there is no /proc/cpuinfo."""
    return frozenset((info("flags") or info("Features")).split())


def has_any(wanted: tuple[str, ...]) -> bool:
    """Whether the processor has one of the flags."""
    return bool(flags() & set(wanted))


def of_note() -> str:
    """The flags that a reader of a number should know."""
    return " ".join(f for f in NOTED if f in flags()) or ("none of note" if flags() else "unknown")


def saturates() -> bool:
    """Whether its instructions for u8 times s8 add two products in 16 bits: an x86 without VNNI."""
    return has_any(("sse2",)) and not has_any(VNNI)


def stalled_us() -> int | None:
    """us since the start of the system in which some task waited for a CPU; None where the kernel does not say."""
    total = re.search(r"some .*total=(\d+)", read("/proc/pressure/cpu"))
    return int(total[1]) if total else None


def info(field: str) -> str:
    """What /proc/cpuinfo says of the first processor; "" where it does not say it."""
    line = re.search(rf"^{field}\s*:(.*)$", read("/proc/cpuinfo"), re.MULTILINE)
    return line[1].strip() if line else ""


def read(path: str) -> str:
    """What the system says in a file; "" where it has none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
