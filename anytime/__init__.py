"""Anytime networks under compression: one experiment, one honest table."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anytime.bundle import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``anytime.load``, imported when it is first asked for: a table needs no engine, and a bundle no torch."""
    if name == "load":
        from anytime.bundle import load

        return load
    raise AttributeError(f"module 'anytime' has no attribute {name!r}")
