"""Which rows of an experiment differ in one field, and what that field is said to give."""

import numpy as np
import pytest

from anytime.gather import Asked, Network
from anytime.rows import Fold
from anytime.steps import steps

EXIT = Asked(0, "exit 1", float("nan"), "", "", "")
REACH = {"is": "Reach", "version": 1, "budget": 0.6, "policy": {"is": "MaxProb", "version": 1}}


def network(position, model="net", recipe="r", **fields):
    of = fields.pop("of", None)
    backend = {"is": "PTQ", "version": 1, **fields}
    if of is not None:
        backend = {"is": "OnnxRuntime", "version": 1, "of": backend}
    spec = {"data": "d", "seed": 0, "model": {"is": model}, "recipe": recipe, "backend": backend}
    return Network(spec, spec, {"position": position})


def found(networks):
    names = {id(n): n.facts["position"] for n in networks}
    return {names[i]: (names[id(step.plain)], step.said) for i, step in steps(networks).items()}


def test_each_repair_stands_on_what_was_there_before_it():
    grid = [
        network(0, weight_bits=4),
        network(1, weight_bits=4, equalize=True),
        network(2, weight_bits=4, equalize=True, correct_bias=True),
        network(3, weight_bits=4, correct_bias=True),
        network(4, weight_bits=4, rounding="qdrop"),
        network(5, weight_bits=4, rounding="qdrop", iterations=500),
    ]
    assert found(grid) == {
        1: (0, "equalize=True"),
        2: (1, "correct_bias=True"),  # not 3, which comes after it
        3: (0, "correct_bias=True"),
        4: (0, "rounding='qdrop'"),
        5: (4, "iterations=500"),
    }


def test_a_plain_form_that_comes_later_serves_where_none_comes_before():
    assert found([network(0, weigh=False), network(1)]) == {0: (1, "weigh=False")}


def test_of_two_plain_forms_one_of_the_same_widths_serves_whatever_the_ages_of_the_records():
    wide, narrow = {"weight_bits": 4}, {"weight_bits": 4, "activation_bits": 4}
    for places in ((1, 2, 3), (2, 1, 3), (5, 4, 3)):
        plain, wider, both = places
        grid = [network(plain, **narrow), network(wider, **wide, reach=REACH), network(both, **narrow, reach=REACH)]
        assert found(grid)[both] == (plain, "reach=Reach(budget=0.6, policy=MaxProb())")


def test_what_an_engine_wraps_is_looked_into_and_values_are_written_as_python():
    grid = [network(0, of=1), network(1, of=1, reach=REACH), network(2, observer="minmax")]
    assert found(grid) == {1: (0, "reach=Reach(budget=0.6, policy=MaxProb())")}


@pytest.mark.parametrize(
    "other",
    [
        network(1, weight_bits=4, equalize=True, correct_bias=True),  # two fields
        network(1, model="another", weight_bits=4, equalize=True),
        network(1, recipe="another", weight_bits=4, equalize=True),
        network(1, weight_bits=3),  # both say it, and differently
    ],
)
def test_what_differs_in_more_is_no_step(other):
    assert found([network(0, weight_bits=4), other]) == {}


def test_the_gain_is_that_of_the_step_and_has_its_sign(tmp_path):
    plain, more = network(0), network(1, equalize=True)
    labels = np.zeros(100, np.int64)
    for n, wrong in ((plain, 30), (more, 10)):
        said = labels.copy()
        said[:wrong] = 1
        n.files[0] = tmp_path / f"{wrong}.npz"
        np.savez(n.files[0], argmax=said[None], labels=labels)
        n.scores[EXIT][0] = {"exit": 0, "n": 100, "n_right": 100 - wrong, "accuracy": 1 - wrong / 100}
        n.cells[0] = str(wrong)
    fold = Fold([plain, more], [])
    (row,) = fold.rows_of(more)
    assert row["step"] == "equalize=True"
    assert row["step_gain"] == pytest.approx(0.2)
    assert 0 < row["step_gain_lo"] < 0.2 < row["step_gain_hi"]
    assert "step" not in next(iter(fold.rows_of(plain)))
