"""What can go wrong, each with the exit code that the command line gives it.

Every message is one sentence that says what is wrong, where, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches


def install(extra: str) -> str:
    """What to type for an optional part. From the checkout: PyPI's ``anytime`` is somebody else's."""
    return f"pip install -e '.[{extra}]' in the checkout of anytime"


class AnytimeError(Exception):
    """Something failed that the user can read about in one sentence; exit code 1."""

    exit_code = 1


class UsageError(AnytimeError):
    """What was asked for cannot be meant: an unknown name, a wrong type, a bad value; exit code 2."""

    exit_code = 2


class DataError(AnytimeError):
    """A data file is missing, truncated or not the published one, or its content cannot be used."""


class CorruptFile(AnytimeError):
    """A file that we wrote earlier (checkpoint, record, cache) does not read back as written."""


class WriteError(AnytimeError):
    """The disk is full or may not be written: nothing can go on."""


class Diverged(AnytimeError):
    """A training met a NaN or infinite loss; the message names the epoch and the step."""


class Unsupported(AnytimeError):
    """This network cannot go through this backend; the message names the layer and the reason."""


class Collapsed(AnytimeError):
    """An exit of a compressed network answers no better than chance; the message names the first bad layer."""


class Unreachable(AnytimeError):
    """A board does not answer: nothing is known of what runs there, and nothing has failed."""


class Leak(AnytimeError):
    """A fit was about to see test data, or samples that the network was trained on."""


class Infeasible(AnytimeError):
    """What is asked of a policy cannot be had.

    ``least``: the least possible budget, in its unit, when the budget lies under it; ``best``: the best accuracy that
    was found, a share, when a better one is wanted. The other is NaN.
    """

    def __init__(self, message: str, least: float = math.nan, best: float = math.nan) -> None:
        super().__init__(message)
        self.least, self.best = least, best

    def __reduce__(self) -> tuple[type, tuple[str, float, float]]:
        return type(self), (str(self), self.least, self.best)


def first_line(error: BaseException) -> str:
    """What an exception says first; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def near(name: str, names: Iterable[str]) -> str:
    """A clause for an unknown ``name``: its near misses if there are any, else all that there is."""
    known = sorted(set(names))
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"there is {', '.join(repr(k) for k in known)}" if known else "there is none"
