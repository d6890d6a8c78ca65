"""Specs: frozen dataclasses that are configuration and behaviour at once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
import typing
from ast import literal_eval
from typing import Any, ClassVar, TypeVar

from anytime.errors import UsageError, near

T = TypeVar("T")
NOT_SAID = "cannot be part of a spec: use numbers, strings, tuples or Specs"


@dataclasses.dataclass(frozen=True)
class Spec:
    """Base of everything that an experiment names.

    ``version`` is part of the key: bump it when the same fields start to mean something else, or when
    a default changes.
    """

    version: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """UsageError for a class with an ``__init__`` of its own: what it takes would be in no key, and two of them be one."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls):  # slots=True makes a class once more
            raise UsageError(
                f"{cls.__name__} has an __init__ of its own, whose arguments no key would tell apart: write them as fields, under "
                "@dataclass(frozen=True), as width: int = 8"
            )

    def __post_init__(self) -> None:
        """UsageError for a value that its field's type does not hold; a subclass with checks of its own calls this first.

        A whole number for a float is taken as one: 1 and 1.0 have one key.
        """
        hints = _hints(type(self))  # type: ignore[arg-type]  # mypy takes the class for an unhashable instance
        for f in dataclasses.fields(self):
            value, hint = getattr(self, f.name), hints.get(f.name, Any)
            if _fits(value, hint):
                continue
            if not _fits(widened := _widened(value, hint), hint):
                raise UsageError(f"{type(self).__name__}: {f.name}={value!r} must be {_say(hint)}{_meant(value, hint)}")
            object.__setattr__(self, f.name, widened)

    @property
    def label(self) -> str:
        """The name that a table shows; the class name and the fields that are not defaults."""
        said = ", ".join(
            f"{name}={value.label}" if isinstance(value, Spec) else f"{name}={value!r}"
            for name, value in _not_default(self).items()
        )
        return f"{type(self).__name__}({said})" if said else type(self).__name__


def plain(obj: Any) -> Any:
    """Spec -> JSON-able value with every field, tagged with class name and version."""
    return _plain(obj, every_field=True)


def key(obj: Any) -> str:
    """12 hex digits of class, version and non-default fields.

    A new field with a default moves no key; changing a default must bump the class's ``version``.
    """
    text = json.dumps(_plain(obj, every_field=False), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def defaults(obj: Any) -> dict[str, dict[str, Any]]:
    """ "Class version" -> what its fields say when nobody says anything, JSON-able, of every spec within.

    With these, specs that were written before a field came and after it can be seen to be equal, without the classes.
    """
    if isinstance(obj, tuple | list):
        return {name: said for o in obj for name, said in defaults(o).items()}
    if not isinstance(obj, Spec):
        return {}
    own = {f.name: plain(default) for f in dataclasses.fields(obj) if (default := _default(f)) is not dataclasses.MISSING}
    within = defaults([getattr(obj, f.name) for f in dataclasses.fields(obj)])
    return within | {f"{_called(type(obj))} {obj.version}": own}


def override(spec: T, path: str, text: str) -> T:
    """``override(exp, "recipe.epochs", "1")`` -> a copy with that field replaced.

    A step of the path is a field name, an index into a tuple, or ``*``: every element of a tuple that
    has the rest of the path (at least one must). Raises UsageError for an unknown name, with the near
    misses, and for a value of a wrong type.
    """
    new: T = _override(spec, path.split("."), text, path)
    return new


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # of a class whose module does not know its own annotations, nothing can be said
        return {}


def _not_default(spec: Spec) -> dict[str, Any]:
    said = {}
    for f in dataclasses.fields(spec):
        value, default = getattr(spec, f.name), _default(f)
        # 1 == True == 1.0, so types are compared too: they are different in JSON.
        if type(value) is not type(default) or value != default:
            said[f.name] = value
    return said


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(obj: Any, every_field: bool) -> Any:
    if isinstance(obj, Spec):
        fields = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)} if every_field else _not_default(obj)
        return {"is": _called(type(obj)), "version": obj.version} | {
            name: _plain(value, every_field) for name, value in fields.items()
        }
    if isinstance(obj, tuple | list):
        return [_plain(o, every_field) for o in obj]
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    raise TypeError(f"{obj!r} {NOT_SAID}")


def check_said(spec: Spec) -> None:
    """UsageError for a value within that no key can name: lists and dicts change, and of a class or a path JSON knows nothing."""
    for f in dataclasses.fields(spec):
        todo = [getattr(spec, f.name)]
        while todo:
            value = todo.pop()
            if isinstance(value, tuple):
                todo += value
            elif isinstance(value, Spec):
                check_said(value)
            elif not (value is None or isinstance(value, bool | int | float | str)):
                raise UsageError(f"{type(spec).__name__}: {f.name}={getattr(spec, f.name)!r} {NOT_SAID}")


def _called(cls: type) -> str:
    """The name of a class; of a user's own with its module, for two files may each have their ``MyNet``."""
    module = cls.__module__.replace("__mp_main__", "__main__")  # as another process calls the script
    return cls.__name__ if module.startswith("anytime.") else f"{module}.{cls.__name__}"


def _override(obj: Any, steps: list[str], text: str, path: str, hint: Any = Any) -> Any:
    if not steps:
        return _value(text, obj, hint, path)
    head, rest = steps[0], steps[1:]
    if isinstance(obj, tuple):
        return _override_tuple(obj, head, rest, text, path, hint)
    if not isinstance(obj, Spec):
        raise UsageError(f"--set {path}: {head!r} asks for a part of {obj!r}, which has no parts")
    names = [f.name for f in dataclasses.fields(obj)]
    if head not in names:
        raise UsageError(f"--set {path}: {type(obj).__name__} has no field {head!r}; {near(head, names)}")
    field_hint = _hints(type(obj)).get(head, Any)  # type: ignore[arg-type]
    new = _override(getattr(obj, head), rest, text, path, field_hint)
    return dataclasses.replace(obj, **{head: new})


def _override_tuple(obj: tuple[Any, ...], head: str, rest: list[str], text: str, path: str, hint: Any) -> Any:
    hints = _item_hints(hint, len(obj))
    if head == "*":
        done, last_error = [], None
        for item, item_hint in zip(obj, hints, strict=True):
            try:
                done.append(_override(item, rest, text, path, item_hint))
            except UsageError as error:
                last_error = error
                done.append(item)
        if last_error is not None and all(a is b for a, b in zip(done, obj, strict=True)):
            raise last_error
        return tuple(done)
    if not re.fullmatch("-?[0-9]+", head) or not -len(obj) <= int(head) < len(obj):
        raise UsageError(f"--set {path}: {head!r} is no index into {len(obj)} elements; use 0 to {len(obj) - 1}, or *")
    i = int(head) % len(obj)
    return (*obj[:i], _override(obj[i], rest, text, path, hints[i]), *obj[i + 1 :])


def _item_hints(hint: Any, n: int) -> list[Any]:
    """The type of each of ``n`` elements of a tuple."""
    args = typing.get_args(hint)
    if len(args) == n and args[1:] != (Ellipsis,):
        return list(args)
    return [args[0] if args else Any] * n


def _value(text: str, old: Any, hint: Any, path: str) -> Any:
    try:
        new = literal_eval(text)
    except (ValueError, SyntaxError):
        new = text
    if isinstance(old, str) and not isinstance(new, str) and _fits(text, hint):
        return text  # "1" of a field that holds words
    if isinstance(new, list):
        new = tuple(new)
    if not _fits(new, hint):
        new = _widened(new, hint)
    if not _fits(new, hint):
        where, held = path, old
        while isinstance(held, tuple) and held:
            where, held = f"{where}.0", held[0]
        if isinstance(held, Spec):
            names = [f.name for f in dataclasses.fields(held)]
            field = f"set a field of it, as {where}.{names[0]}=..., or " if names else ""
            raise UsageError(
                f"--set {path}={text}: no text says a {type(held).__name__}: {field}write another into the experiment"
            )
        raise UsageError(f"--set {path}={text}: it must be {_say(hint)}, for example {path}={_example(old, hint)}")
    return new


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type, tuples and unions included."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(_fits(v, a) for v, a in zip(value, args, strict=True))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _widened(value: Any, hint: Any) -> Any:
    """``value`` with whole numbers as floats, in tuples too, where ``hint`` wants floats."""
    if isinstance(value, tuple):
        return tuple(_widened(v, h) for v, h in zip(value, _item_hints(hint, len(value)), strict=True))
    return float(value) if type(value) is int and not _fits(value, hint) and _fits(float(value), hint) else value


def _say(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _meant(value: Any, hint: Any) -> str:
    """The near miss of the first word, of a value or a tuple of them, that is none of the choices."""
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        return next((said for v in value if (said := _meant(v, typing.get_args(hint)[0]))), "")
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    said = near(value, choices) if isinstance(value, str) and choices and value not in choices else ""
    return f"; {said}" if said.startswith("did you mean") else ""  # all that there is has been said


def _example(old: Any, hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return str(typing.get_args(hint)[0])
    return str(old).replace(" ", "")
