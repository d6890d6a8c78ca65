"""Training: the same weights however often it was interrupted, and every file checked."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime.errors import CorruptFile, Diverged, UsageError, WriteError
from anytime.losses import Joint
from anytime.train import Recipe, load_weights, save_weights, write_atomically
from tests.worlds import Tiny, data, trainer


def fresh():
    torch.manual_seed(0)
    return Tiny().build((3, 16, 16), 4)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def kept(folder, **recipe):
    return replace(trainer(**{"epochs": 3, **recipe}), folder=folder, key="k", augment=flip_some)


def flip_some(x, generator):
    return torch.where((torch.rand(len(x), generator=generator) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)


class Killed(Exception):
    pass


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=3))
def test_interrupted_anywhere_it_ends_with_the_same_weights(tmp_path_factory, moments):
    folder = tmp_path_factory.mktemp("t")
    want = kept(folder / "whole").fit(fresh())
    for moment in moments:
        steps = iter(range(moment))

        def stop(what, done, total, steps=steps):
            if next(steps, None) is None:
                raise Killed

        with suppress(Killed):  # several interruptions may add up to a whole training
            replace(kept(folder / "cut"), progress=stop).fit(fresh())
    assert same(kept(folder / "cut").fit(fresh()), want)


def test_killed_by_the_system_and_started_again(tmp_path):
    """kill -9 of a process of its own, several times, then to the end."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
from tests.test_train import fresh, kept
kept(Path(sys.argv[1]), epochs=6).fit(fresh())
print("done")
"""

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    for epoch in range(1, 4):
        victim = start(tmp_path / "cut")
        checkpoint = tmp_path / "cut" / "k-base" / "checkpoint.pt"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and victim.poll() is None:
            if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["epoch"] >= epoch:
                break
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    last = start(tmp_path / "cut")
    assert last.communicate()[0] == "done\n" and whole.communicate()[0] == "done\n"
    a, b = fresh(), fresh()
    load_weights(a, tmp_path / "whole" / "k-base" / "weights.safetensors")
    load_weights(b, tmp_path / "cut" / "k-base" / "weights.safetensors")
    assert same(a, b)
    assert not list(tmp_path.rglob("tmp-*")) or last.returncode == 0


def test_a_finished_training_is_loaded_not_repeated(tmp_path):
    want = kept(tmp_path).fit(fresh())

    def never(what, done, total):
        raise AssertionError("it trained again")

    got = replace(kept(tmp_path), progress=never).fit(fresh())
    assert same(got, want) and got.trained_on == want.trained_on == {data().train.digest}


def test_seeds_matter_and_repeat():
    a, b = trainer().fit(fresh()), trainer().fit(fresh())
    c = replace(trainer(), train_seed=1).fit(fresh())
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize(
    "recipe",
    [
        {
            "optimizer": "SGD",
            "optimizer_args": (("momentum", 0.9), ("nesterov", True)),
            "schedule": "MultiStepLR",
            "schedule_args": (("milestones", (3,)),),
        },
        {"optimizer": "Adam", "schedule": "OneCycleLR"},
        {"schedule": "constant", "loss": Joint((1.0, 0.5, 0.3), label_smoothing=0.1)},
        {"precision": "bf16", "channels_last": False},
    ],
    ids=["SGD with steps", "Adam with one cycle", "constant", "bf16"],
)
def test_torchs_optimizers_and_schedules_learn(recipe):
    model = trainer(epochs=4, lr=0.01, **recipe).fit(fresh())
    x, y = data().test.x, data().test.y
    with torch.inference_mode():
        assert (model(x).argmax(-1) == y).float().mean(1).max() > 0.5  # chance is 0.25


def test_exit_weights_shut_an_exit_off():
    model = fresh()
    before = {k: v.clone() for k, v in model.heads[0].state_dict().items()}
    trainer(loss=Joint(weights=(0.0, 1.0, 1.0)), weight_decay=0.0).fit(model)
    assert all(torch.equal(before[k], v) for k, v in model.heads[0].state_dict().items())


def test_nan_stops_it_with_the_step():
    model = fresh()
    with pytest.raises(Diverged, match=r"epoch 1, step \d+.*lower recipe.lr"):
        trainer(optimizer="SGD", lr=1e9, epochs=5).fit(model)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"optimizer": "SDG"}, "did you mean 'SGD'"),
        ({"schedule": "CosineLR"}, "recipe.schedule='CosineLR' is not in torch"),
        ({"epochs": -1}, "epochs >= 0"),
    ],
)
def test_a_wrong_recipe_is_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Recipe(**wrong)


def test_wrong_arguments_and_weights_are_refused():
    with pytest.raises(UsageError, match="does not take its arguments"):
        trainer(optimizer_args=(("momentun", 0.9),)).fit(fresh())
    with pytest.raises(UsageError, match="2 numbers for a network of 3 exits"):
        trainer(loss=Joint(weights=(1.0, 1.0))).fit(fresh())


def test_weights_carry_what_they_were_trained_on(tmp_path):
    model = fresh()
    model.trained_on = frozenset({"abc"})
    save_weights(model, tmp_path / "w.safetensors", {"wall_s": "1"})
    other = Tiny().build((3, 16, 16), 4)
    assert load_weights(other, tmp_path / "w.safetensors") == {"wall_s": "1"}
    assert same(model, other) and other.trained_on == {"abc"}


@pytest.mark.parametrize("hurt", ["flip a bit", "cut", "no digest", "other network"])
def test_hurt_weights_are_refused(tmp_path, hurt):
    path = tmp_path / "w.safetensors"
    save_weights(fresh(), path)
    model = fresh()
    body = bytearray(path.read_bytes())
    if hurt == "flip a bit":
        body[-1] ^= 1
        path.write_bytes(body)
    elif hurt == "cut":
        path.write_bytes(body[:-10])
    elif hurt == "no digest":
        path.with_suffix(".sha256").unlink()
    else:
        model = Tiny(width=4).build((3, 16, 16), 4)
    with pytest.raises(CorruptFile, match="w.safetensors|w.sha256"):
        load_weights(model, path)


def test_a_hurt_checkpoint_is_refused(tmp_path):
    place = tmp_path / "k-base"
    place.mkdir()
    (place / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptFile, match="delete it and start again"):
        kept(tmp_path).fit(fresh())


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    place = tmp_path / "k-base"
    place.mkdir()
    torch.save({"epoch": 1, "evil": Path("x").exists}, place / "checkpoint.pt")
    with pytest.raises(CorruptFile):
        kept(tmp_path).fit(fresh())


def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path, monkeypatch):
    import os

    (tmp_path / "f").write_bytes(b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left on device; free space"):
        write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
