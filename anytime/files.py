"""Files that are there whole or not at all, and folders that one process holds alone."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anytime.errors import WriteError


def write_atomically(path: Path, body: bytes) -> None:
    """Write to a temporary name, then move it to ``path``: whole or not at all."""
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix="tmp-")
        with os.fdopen(fd, "wb") as f:
            f.write(body)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        os.replace(name, path)
        name = ""
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; free space or change its rights, then run again"
        ) from error
    finally:
        if name:
            os.unlink(name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` alone; another process waits. The system lets go of it when the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {error.strerror or error}; free space or change its rights") from error
    with lock as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
