"""A board whose engine is one of its own: what it answers is scored, and its policies are fitted on it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from anytime.backends.float import Float32
from anytime.config import Experiment, Suite
from anytime.datasets.synthetic import Synthetic
from anytime.policies.fixed import Fixed
from anytime.run import Runner
from anytime.train import Recipe
from tests.test_contract_board import Bench
from tests.worlds import Tiny


@dataclass(frozen=True)
class Contrary(Bench):
    """Its engine says the next class than is right here."""

    def answers(self, nets, parts):
        return [{part: np.roll(net.predict(x), 1, axis=-1) for part, x in parts.items()} for net in nets]


def records(tmp_path, board, **fields):
    exp = Experiment(
        name="answered", question="Whose?", boards=(board,), currency="ms", budgets=(1e6,),
        suites=(Suite(Synthetic(n=800, noise=0.25, size=16, channels=3, n_classes=4), (Tiny(),)),),
        recipe=Recipe(epochs=2, batch=64, lr=1e-2), backends=(Float32(),), policies=(Fixed(),), time_samples=4, replay_samples=8, **fields,
    )  # fmt: skip
    runner = Runner(exp, tmp_path, log=lambda line: None)
    runner.run()
    return runner


def by_kind(runner):
    return {r.kind: r for r, _ in runner.known.values()}


@dataclass(frozen=True)
class Listening(Bench):
    """Remembers which val samples it was asked."""

    heard: ClassVar[list[bytes]] = []

    def answers(self, nets, parts):
        self.heard.extend(parts["val"].tobytes() for _ in nets)
        return [{part: net.predict(x) for part, x in parts.items()} for net in nets]


def test_each_seed_s_network_is_asked_its_own_val_part(tmp_path):
    runner = records(tmp_path, Listening(), seeds=(0, 1))
    own = [runner.shop.data(cell.data, cell.seed).val.x.numpy().tobytes() for cell in runner.exp.cells()]
    assert sorted(Listening.heard) == sorted(own) and len(set(own)) == 2


def test_what_a_board_answers_is_scored_and_decided_on(tmp_path):
    plain = by_kind(records(tmp_path / "plain", Bench()))
    assert "board_accuracy" not in plain["measure"].exits[0]
    found = by_kind(records(tmp_path / "contrary", Contrary()))
    here = [row["accuracy"] for row in found["eval"].exits]
    there = [row["board_accuracy"] for row in found["measure"].exits]
    assert here == [row["accuracy"] for row in plain["eval"].exits] and here[-1] > 0.5 > max(there)
    assert max(row["board_agreement"] for row in found["measure"].exits) == 0.0
    k = plain["decide"].points[0]["share"].index(1.0)  # a fixed exit
    assert plain["decide"].points[0]["accuracy"] == here[k]
    assert found["decide"].points[0]["accuracy"] == there[found["decide"].points[0]["share"].index(1.0)]
