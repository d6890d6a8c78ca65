"""Finds an experiment by name or path, and reads it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anytime.config import Experiment
from anytime.errors import AnytimeError, UsageError, near
from anytime.spec import key, override


def folders() -> list[Path]:
    """Where experiments lie: ``experiments/`` of the current folder, then that of the checkout."""
    found = [Path.cwd() / "experiments", Path(__file__).resolve().parent.parent / "experiments"]
    return [f for i, f in enumerate(found) if f.is_dir() and f not in found[:i]]


def names() -> list[str]:
    """Every experiment by name."""
    return sorted({p.stem for f in folders() for p in f.glob("*.py") if not p.stem.startswith("_") and p.stem != "common"})


def path_of(name: str) -> Path:
    """The file of an experiment: a name in ``experiments/``, or a path. UsageError with the near misses."""
    if name.endswith(".py") or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"there is no experiment file {name}: give a path that exists, or a name of {', '.join(names())}")
        return path.resolve()
    for folder in folders():
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    if Path(f"{name}.py").is_file():
        raise UsageError(f"there is no experiment {name!r} in experiments/, but {name}.py lies here: say {name}.py")
    raise UsageError(f"there is no experiment {name!r}; {near(name, names())}")


def experiment(name: str, sets: Sequence[str] = ()) -> Experiment:
    """Read an experiment and override its fields: "recipe.epochs=1".

    An overridden experiment is another one: its name gets the key of what was said, so its records lie apart.
    """
    path = path_of(name)
    found = getattr(loaded(path), "EXPERIMENT", None)
    if not isinstance(found, Experiment):
        raise UsageError(f"{path} defines no EXPERIMENT: write EXPERIMENT = Experiment(...), as experiments/quickstart.py does")
    if found.name != path.stem:
        raise UsageError(f"{path} names its experiment {found.name!r}: an experiment is called as its file, {path.stem!r}")
    as_written, said_of = key(found), dict[str, str]()
    for said in sets:
        where, equals, text = said.partition("=")
        if not equals:
            raise UsageError(f"--set {said}: say which field and which value, as in --set recipe.epochs=1")
        said_of[where.strip()] = text.strip()
        found = override(found, where.strip(), text.strip())
    # Not the key of the whole: it would be another experiment after every change of its file.
    return found if key(found) == as_written else replace(found, name=f"{found.name}-{key(tuple(sorted(said_of.items())))[:6]}")


def loaded(path: Path) -> Any:
    """The module of a user's file; UsageError says what is wrong in it and where."""
    # An experiment may import `experiments.common` of its own tree, and other processes get its classes by module name.
    for root in (str(path.parent), str(path.parent.parent)):
        if root not in sys.path:
            sys.path.append(root)
    name, other = path.stem, sys.modules.get(path.stem)
    if other is not None and getattr(other, "__file__", None) != str(path):
        raise UsageError(f"{path} is called as the Python module {name!r}, which is in use: give the experiment another name")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except AnytimeError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), None)
        # Where a file that it imports is no Python, the error itself says which, and its line.
        line = error.lineno if isinstance(error, SyntaxError) and error.filename in (None, str(path)) else line
        raise UsageError(f"{path}, line {line}: {type(error).__name__}: {error}; mend the experiment file") from error
    return module
