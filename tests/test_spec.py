"""Keys, plain forms and overrides."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytime.errors import UsageError
from anytime.gather import said_of
from anytime.spec import Spec, check_said, defaults, key, override, plain


@dataclass(frozen=True)
class Inner(Spec):
    epochs: int = 2
    lr: float = 0.1
    kind: Literal["a", "b"] = "a"
    note: str = ""
    on: bool = False
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer(Spec):
    name: str
    inner: Inner = Inner()
    many: tuple[Inner, ...] = (Inner(), Inner(epochs=3))
    maybe: Inner | None = None
    weight: float | None = None


def grown(**defaults):
    """Inner as a later version of the code has it: with one more field."""

    @dataclass(frozen=True)
    class Inner(Spec):  # the same class name: that is what a key sees
        epochs: int = 2
        lr: float = 0.1
        later: int = 7

    return Inner(**defaults)


def test_a_new_field_with_a_default_moves_no_key():
    assert key(Inner(epochs=5)) == key(grown(epochs=5))
    assert key(Inner(epochs=5)) != key(grown(epochs=5, later=8))


def test_a_new_field_with_a_default_moves_nothing_that_is_recorded_either():
    """Without the classes, by the defaults that the later version recorded."""
    known = defaults((Outer("x"), grown()))
    inner, outer = f"{__name__}.Inner 1", f"{__name__}.Outer 1"
    assert known[inner] == {"epochs": 2, "lr": 0.1, "later": 7} and "name" not in known[outer]
    before, after, other = (said_of(plain(s), known) for s in (Inner(epochs=5), grown(epochs=5), grown(epochs=5, later=8)))
    assert before["epochs"] == 5 and after == {n: v for n, v in before.items() if n not in ("kind", "note", "on", "sizes")}
    assert other == after | {"later": 8}
    assert said_of(plain(Outer("x")), known | defaults(Inner())) == {
        "is": f"{__name__}.Outer", "version": 1, "name": "x",
    }  # fmt: skip


def test_a_version_moves_the_key():
    @dataclass(frozen=True)
    class Inner(Spec):
        version: ClassVar[int] = 2
        epochs: int = 2

    assert key(Inner(epochs=5)) != key(globals()["Inner"](epochs=5))


def test_two_files_may_each_have_a_class_of_one_name():
    def made(module):
        return dataclass(frozen=True)(
            type("MyNet", (Spec,), {"__module__": module, "__annotations__": {"width": int}, "width": 8})
        )()

    assert key(made("a")) != key(made("b")) and key(made("a")) == key(made("a"))
    assert key(made("__main__")) == key(made("__mp_main__")), "a script's own, in another process"


def test_keys_are_what_they_were():
    """Keys name files that users have: they may not move. Regenerate only together with a version bump."""
    from anytime.backends.ptq import PTQ
    from anytime.models.branchynet import BLeNet
    from anytime.models.static import Static
    from anytime.train import Recipe

    assert key(Inner()) == "988744daf528"
    assert [key(s) for s in (Recipe(), PTQ(4, 8), Static(BLeNet()))] == ["c71c4c013cd3", "f82bd1a18e97", "5b0e9917e523"]


specs = st.builds(
    Inner, epochs=st.integers(0, 99), lr=st.floats(1e-6, 1), kind=st.sampled_from("ab"), note=st.text(max_size=5), on=st.booleans(),
    sizes=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)  # fmt: skip


@given(specs, specs)
def test_keys_differ_exactly_when_specs_differ(a, b):
    assert (key(a) == key(b)) == (a == b)
    assert (plain(a) == plain(b)) == (a == b)


@given(specs)
def test_every_field_can_be_set_from_its_text(spec):
    got = Inner()
    for name in ("epochs", "lr", "kind", "note", "on", "sizes"):
        got = override(got, name, str(getattr(spec, name)))
    assert got == spec


def test_one_is_the_same_value_as_a_float_and_not_as_a_truth():
    assert key(Inner(lr=1)) == key(Inner(lr=1.0)) and type(Inner(lr=1).lr) is float
    with pytest.raises(UsageError, match="Inner: epochs=True must be int"):
        Inner(epochs=True)


def test_override_reaches_into_specs_and_tuples():
    out = Outer("x")
    assert override(out, "inner.epochs", "9").inner.epochs == 9
    assert override(out, "many.1.lr", "1").many[1].lr == 1.0
    assert [i.epochs for i in override(out, "many.*.epochs", "7").many] == [7, 7]
    assert override(out, "weight", "0.5").weight == 0.5
    assert override(out, "weight", "None").weight is None


@pytest.mark.parametrize(
    "path, text, said",
    [
        ("inner.epoch", "1", "did you mean 'epochs'"),
        ("inner.epochs", "1.5", "must be int"),
        ("inner.epochs", "True", "must be int"),
        ("inner.kind", "c", "one of 'a', 'b'"),
        ("inner.sizes", "3", "must be tuple"),
        ("many.5.lr", "1", "no index into 2 elements"),
        ("many.--1.lr", "1", "no index into 2 elements"),
        ("many.².lr", "1", "no index into 2 elements"),
        ("many.*.nothing", "1", "no field 'nothing'"),
        ("name.x", "1", "has no parts"),
        ("maybe.epochs", "1", "has no parts"),
    ],
)
def test_a_wrong_override_says_what_to_do(path, text, said):
    with pytest.raises(UsageError, match=said):
        override(Outer("x"), path, text)


@pytest.mark.parametrize(
    "path, said",
    [
        ("inner", r"no text says a Inner: set a field of it, as inner\.\w+=\.\.\., or write another"),
        ("many", r"as many\.0\.\w+=\.\.\., or write another"),
    ],
)
def test_an_override_does_not_propose_what_cannot_be_said(path, said):
    with pytest.raises(UsageError, match=said):
        override(Outer("x"), path, "Inner(epochs=3)")


def test_a_spec_of_strange_things_is_refused():
    with pytest.raises(TypeError, match="cannot be part of a spec"):
        plain((1, object()))

    @dataclass(frozen=True)
    class Odd(Spec):
        held: object = ()
        widths: list[int] | tuple[int, ...] = ()

    check_said(Odd((1, Odd()), (8, 16)))
    for wrong in ({"held": Spec}, {"held": [8, 16]}, {"held": ({},)}, {"widths": [8, 16]}):
        with pytest.raises(UsageError, match=rf"Odd: {next(iter(wrong))}=.* cannot be part of a spec"):
            check_said(Odd((1, Odd(**wrong))))


def test_a_spec_without_fields_for_what_it_takes_is_refused():
    with pytest.raises(UsageError, match="Own has an __init__ of its own.*write them as fields"):

        class Own(Spec):
            def __init__(self, width):
                self.width = width


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"kind": "c"}, "Inner: kind='c' must be one of 'a', 'b'"),
        ({"epochs": "2"}, "Inner: epochs='2' must be int"),
        ({"epochs": 2.0}, "Inner: epochs=2.0 must be int"),
        ({"sizes": 3}, r"Inner: sizes=3 must be tuple\[int, ...\]"),
        ({"lr": float("nan")}, "Inner: lr=nan must be float"),
    ],
)
def test_a_value_of_another_type_is_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Inner(**wrong)


@dataclass(frozen=True)
class Told(Spec):
    args: tuple[tuple[str, float], ...] = (("momentum", 0.9),)
    floats: tuple[float, ...] = (0.5,)
    name: str = ""


def test_whole_numbers_are_floats_within_tuples_too():
    assert Told(floats=(1, 0.5)) == Told(floats=(1.0, 0.5)) and key(Told(floats=(1,))) == key(Told(floats=(1.0,)))
    assert override(Told(), "floats", "(1, 2)").floats == (1.0, 2.0)
    with pytest.raises(UsageError, match="floats"):
        Told(floats=("1",))


def test_elements_of_a_pair_have_types_of_their_own():
    assert override(Told(), "args.0.1", "0.8").args == (("momentum", 0.8),)
    assert override(Told(), "args.*.0", "dampening").args == (("dampening", 0.9),)
    with pytest.raises(UsageError, match="must be float"):
        override(Told(), "args.0.1", "much")


@pytest.mark.parametrize("text, meant", [("cpu", "cpu"), ('"cpu"', "cpu"), ("'a b'", "a b"), ("1", "1"), ("x=1", "x=1")])
def test_words_may_be_quoted(text, meant):
    assert override(Told(), "name", text).name == meant
