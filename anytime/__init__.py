"""Anytime networks under compression: one experiment, one honest table."""

__version__ = "0.1.0"
