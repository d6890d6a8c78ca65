"""What `list` says of the time that is left."""

import pytest

from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.config import Experiment, Suite
from anytime.datasets.synthetic import Synthetic
from anytime.listing import listing
from anytime.record import Record, append
from anytime.train import Recipe
from tests.worlds import Tiny

SYNTHETIC = Synthetic()


def took(backend, seconds):
    facts = {"dataset": SYNTHETIC.label, "model": Tiny().label, "backend": backend.label, "wall_s": {"all": seconds}}
    return Record("another", "k", "eval", f"eval-{backend.label}", {}, facts=facts)


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
    for backend, s in ((PTQ(8), 10), (PTQ(4), 20), (PTQ(3), 20), (PTQ(5), 20), (QAT(8, epochs=3), 6000)):
        append(took(backend, s), tmp_path / "records")
    exp = Experiment("e", "?", (Suite(SYNTHETIC, (Tiny(),)),), Recipe(), (asked,), policies=(), budgets=())
    said = listing(exp, tmp_path)
    assert said.left_s == pytest.approx(seconds) and said.n_unknown == 0
    assert f"about {'1.7 hours' if seconds > 5400 else f'{seconds / 60:.1f} minutes'}" in said.text()
