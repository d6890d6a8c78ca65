"""What a spec names that may change under its name: files of weights, and code of the user's own."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from anytime.model import ModelSpec
from anytime.spec import Spec


def digests_of(spec: object) -> tuple[str, ...]:
    """sha256 of every file that a spec names, if all are there: of weights, but where its name bears it ("resnet20-12fca82f.th"),
    and of the Python of a network of the user's own ("mynet:make"), which has no version to be counted up. What was typed into a
    notebook ("__main__:make") lies in no file: there it is the code that the name stands for now.
    """
    if isinstance(spec, tuple):
        return tuple(digest for part in spec for digest in digests_of(part))
    if not isinstance(spec, Spec):
        return ()
    found = digests_of(tuple(getattr(spec, f.name) for f in fields(spec)))
    if isinstance(spec, ModelSpec):
        weights, (module, own, name) = getattr(spec, "weights", ""), str(getattr(spec, "backbone", "")).partition(":")
        typed = _typed(module, name) if own and not _code(module).is_file() else ""
        files = [Path(weights).expanduser()] * bool(weights) + [_code(module)] * bool(own and not typed)
        if all(file.is_file() for file in files):
            digests = [(file, _sha256(file, file.stat().st_mtime_ns, file.stat().st_size)) for file in files]
            found += tuple(digest for file, digest in digests if digest[:8] not in file.name) + (typed,) * bool(typed)
    return found


def _code(module: str) -> Path:
    """The file of a Python module; none where it is not found."""
    if module == "__main__":  # a script has no spec, one that runs by -m another's
        return Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    with contextlib.suppress(ImportError, ValueError):
        found = find_spec(module)
        return Path((found and found.origin) or "")
    return Path()


def _typed(module: str, name: str) -> str:
    """sha256 of the code of a function or class, and of all that it names in its module; "" where there is none."""
    room = vars(sys.modules[module]) if module in sys.modules else {}
    found: dict[str, str] = {}
    todo: list[tuple[str, Any]] = [(name, room.get(name))]
    while todo:
        path, it = todo.pop()
        if path in found:
            continue
        if isinstance(it, type) and it.__module__ == module:
            found[path] = " ".join(base.__qualname__ for base in it.__bases__)
            todo += [(base.__name__, base) for base in it.__bases__]
            todo += [(f"{path}.{part}", value) for part, value in vars(it).items() if part not in _NO_CODE]
        elif isinstance(it, FunctionType) and it.__module__ == module:
            found[path] = repr(it.__defaults__) if _is_plain(it.__defaults__ or ()) else ""
            todo.append((f"{path}()", it.__code__))
        elif isinstance(it, staticmethod | classmethod | property):
            todo.append((f"{path} of it", it.fget if isinstance(it, property) else it.__func__))
        elif isinstance(it, CodeType):
            inner = [c for c in it.co_consts if isinstance(c, CodeType)]
            # A set has another order in another process.
            consts = [
                sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in it.co_consts if not isinstance(c, CodeType)
            ]
            found[path] = repr((it.co_code, consts, it.co_names, it.co_varnames))
            todo += [(f"{path}/{i}", code) for i, code in enumerate(inner)]
            todo += [(called, room[called]) for called in it.co_names if called in room]
        elif _is_plain(it):
            found[path] = repr(it)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest() if len(found) > 1 else ""


_NO_CODE = ("__module__", "__doc__", "__firstlineno__", "__static_attributes__")


def _is_plain(value: object) -> bool:
    """Whether it is written alike in every process."""
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, bool | int | float | str)


@lru_cache
def _sha256(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
