"""How long facts will take, and how long a run still needs."""

import pytest

from anytime import pace
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.config import Experiment, Suite
from anytime.datasets.synthetic import Synthetic
from anytime.facts import facts_of
from anytime.listing import listing
from anytime.pace import UNKNOWN_S, Pace
from anytime.record import Record, append
from anytime.train import Recipe
from tests.worlds import Tiny

SYNTHETIC = Synthetic()


def took(backend, seconds):
    facts = {"dataset": SYNTHETIC.label, "model": Tiny().label, "backend": backend.label, "wall_s": {"all": seconds}}
    return Record("another", "k", "eval", f"eval-{backend.label}", {}, facts=facts)


def asking(*backends):
    return Experiment("e", "?", (Suite(SYNTHETIC, (Tiny(),)),), Recipe(), backends, policies=(), budgets=())


EARLIER = [took(b, s) for b, s in ((PTQ(8), 10), (PTQ(4), 20), (PTQ(3), 20), (PTQ(5), 20), (QAT(8, epochs=3), 6000))]


@pytest.mark.parametrize(
    "asked, seconds",
    [
        (PTQ(8), 10.0),  # itself
        (PTQ(2), 20.0),  # the median of its kind, not of trainings
        (QAT(4, 4, epochs=9), 6000.0),  # trainings of its kind, not the many short PTQ
        (OnnxRuntime(of=QAT(8)), 20.0),  # nothing of its kind: of the network
    ],
)
def test_the_time_left_is_judged_by_the_kind_of_backend(tmp_path, asked, seconds):
    for record in EARLIER:
        append(record, tmp_path / "records")
    said = listing(asking(asked), tmp_path)
    assert said.left_s == pytest.approx(seconds) and said.n_unknown == 0
    assert f"about {'100 min' if seconds > 20 else f'{seconds:.0f} s'} by" in said.text()


def test_a_run_is_judged_by_records_and_then_by_its_own_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "perf_counter", lambda: now[0])
    short, long, other = facts_of(asking(PTQ(8), QAT(4), PTQ(4)))
    run = Pace([short, long, other], EARLIER)
    assert run.done([]) == (0, 6030.0)
    now[0] += 40  # four times what was expected, but of ten seconds nothing can be judged
    assert run.done([short]) == (1, 6020.0)
    now[0] = 100 + 2 * 6010  # at half the speed
    assert run.done([long]) == (2, pytest.approx(40.0))
    assert Pace([short], []).done([]) == (0, UNKNOWN_S)
