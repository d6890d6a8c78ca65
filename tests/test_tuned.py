"""The best of several backends: chosen on the tune part, every trial written down, failures counted."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from anytime.backend import Backend, TorchNet
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.backends.tuned import Tuned
from anytime.dataset import Part
from anytime.errors import AnytimeError, Diverged, Unsupported, UsageError, WriteError
from anytime.model import AnytimeModel
from anytime.spec import key, plain
from tests.worlds import Tiny, data, trained, trainer

TUNE = Part(torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.int64), "tune", "t")  # every label is 0


class Scripted(TorchNet):
    """Right on so many of the 8 samples at each exit, by so large a logit."""

    def __init__(self, model: AnytimeModel, right: tuple[int, ...], logit: float) -> None:
        super().__init__(model, {}, simulated=False, facts={"mine": "kept"})
        self.right, self.logit = right, logit

    def predict(self, x, batch=256):
        assert x.shape == tuple(TUNE.x.shape), "scored on something else than the tune part"
        z = np.zeros((len(self.right), len(x), 4), np.float32)
        for e, n in enumerate(self.right):
            z[e, :n, 0] = z[e, n:, 1] = self.logit
        return z


@dataclass(frozen=True)
class Makes(Backend):
    """Source: a script."""

    right: tuple[int, ...] = (8, 8)
    logit: Any = 1.0
    raises: str = ""

    @property
    def column(self):
        return "scripted" if self.logit == 1 else "odd"

    def why_not(self):
        return "absent" if self.raises == "absent" else None

    def compress(self, model, calib, trainer, target="u8s8"):
        if self.raises:
            error = {"refuses": Unsupported, "breaks": AnytimeError, "diverges": Diverged, "disk": WriteError}[self.raises]
            raise error(f"it {self.raises}")
        net = Scripted(model, self.right, self.logit)
        net.facts["target"] = target
        return net


def tune(*candidates, part=TUNE, target="u8s8"):
    model = Tiny().build((3, 16, 16), 4)
    return Tuned(candidates).compress(model, data().calib, replace(trainer(), tune=part), target)


@pytest.mark.parametrize(
    "candidates, won",
    [
        ([Makes((2, 8)), Makes((6, 6)), Makes((7, 3))], "trial 2"),  # 10, 12 and 10 of 16: the mean over exits
        ([Makes((4, 4), 2.0), Makes((2, 6), 1.0), Makes((3, 5), 0.5)], "trial 2"),  # even: NLL 1.34, 1.24, 1.29
        ([Makes((8, 8), 1.0), Makes((8, 8), 3.0)], "trial 2"),
        ([Makes((8, 7), 9.0), Makes((8, 8), 0.1)], "trial 2"),  # accuracy first
        ([Makes((5, 5)), Makes((5, 5))], "trial 1"),  # and of equals the first
        ([Makes(raises="refuses"), Makes((1, 0)), Makes(raises="diverges")], "trial 2"),
        ([Makes(logit=float("nan")), Makes((0, 0))], "trial 2"),
    ],
)
def test_the_best_on_the_tune_part_is_kept(candidates, won):
    net = tune(*candidates)
    best = candidates[int(won[-1]) - 1]
    assert net.facts["won"] == f"{won}: {best.label}" and (net.right, net.logit) == (best.right, best.logit)
    assert net.facts["trials"] == str(len(candidates))


def test_every_trial_is_written_down():
    net = tune(Makes((4, 6)), Makes(raises="refuses"), Makes((8, 8)), target="s8s8")
    # 10 of 16 right by a logit of 1 against three of 0: -log(e / (e + 3)) each; 6 wrong: -log(1 / (e + 3))
    nll = np.log(np.e + 3) - 10 / 16
    assert net.facts == {
        "mine": "kept",
        "target": "s8s8",
        "trials": "3",
        "won": "trial 3: Makes",
        "trial 1": f"Makes(right=(4, 6)): 62.50 %, NLL {nll:.4f}",
        "trial 2": "Makes(raises='refuses'): failed: it refuses",
        "trial 3": f"Makes: 100.00 %, NLL {np.log(np.e + 3) - 1:.4f}",
    }


def test_when_all_fail():
    with pytest.raises(Unsupported, match=r"every candidate of Tuned failed: Makes.*it refuses; .*it refuses"):
        tune(Makes(raises="refuses"), Makes((1, 1), raises="refuses"))
    with pytest.raises(AnytimeError, match="it refuses; .*it breaks") as failed:
        tune(Makes(raises="refuses"), Makes(raises="breaks"))
    assert not isinstance(failed.value, Unsupported)  # a fail row


def test_what_is_not_the_candidates_fault_ends_it():
    with pytest.raises(WriteError):
        tune(Makes(), Makes(raises="disk"))


def test_what_it_cannot_be_asked():
    with pytest.raises(UsageError, match="of is empty"):
        Tuned(())
    empty = replace(TUNE, x=TUNE.x[:0], y=TUNE.y[:0])
    for part in (None, empty):
        with pytest.raises(UsageError, match="no tune part to choose by"):
            tune(Makes(), part=part)


def test_its_names():
    assert Tuned((Makes(), Makes((1, 1)))).column == "scripted tuned"
    assert Tuned((Makes(), Makes(logit=2.0))).column == "scripted / odd tuned"
    assert Tuned((Makes(), Makes((1, 1)))).label == "Tuned(Makes, Makes(right=(1, 1)))"
    assert Tuned((Makes(), Makes(raises="absent"))).why_not() == "absent" and Tuned((Makes(),)).why_not() is None
    assert key(Tuned((Makes(),))) != key(Tuned((Makes((1, 1)),))) and plain(Tuned((Makes(),)))["of"][0]["is"].endswith(".Makes")


def test_ours_and_theirs_in_an_engine():
    part, calib, x = data().tune, data().calib, data().test.x[:16].numpy()
    ours = Tuned((PTQ(observer="minmax"), PTQ()))
    net = OnnxRuntime(of=ours).compress(trained(), calib, trainer())
    assert set(net.executed(x[:1]).values()) == {"int8"} and net.facts["trials"] == "2"
    best = {}
    for backend in ours.of:
        z = backend.compress(trained(), calib, trainer()).predict(part.x.numpy())
        best[backend.label] = float((z.argmax(-1) == part.y.numpy()).mean())
    assert best[net.facts["won"].split(": ")[1]] == max(best.values())
    if OrtQuantizer().why_not() is None:
        theirs = Tuned((OrtQuantizer(), OrtQuantizer(per_channel=True)))
        net = theirs.compress(trained(), calib, trainer())
        assert theirs.column == "INT8 ORT tuned" and net.facts["library"].startswith("onnxruntime") and "won" in net.facts
