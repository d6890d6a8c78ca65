"""Training: the same weights however often it was interrupted, and every file checked."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime import cpu, train
from anytime.backends.float import Float32
from anytime.backends.qat import QAT
from anytime.datasets.synthetic import Synthetic
from anytime.errors import CorruptFile, Diverged, UsageError, WriteError
from anytime.files import write_atomically
from anytime.losses import FromTeacher, FrozenTrunk, Joint, TrunkThenJoint
from anytime.model import AnytimeModel
from anytime.models.static import Static
from anytime.train import Recipe, _batch_sizes, _compiled, _device, _optimizer
from anytime.weights import load_weights, save_weights
from anytime.workshop import Workshop
from tests.worlds import Restarting, Tiny, data, fresh, trained, trainer


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
    assert last.returncode == 0


def test_a_finished_training_is_loaded_not_repeated(tmp_path):
    want = kept(tmp_path).fit(fresh())

    def never(what, done, total):
        raise AssertionError("it trained again")

    got = replace(kept(tmp_path), progress=never).fit(fresh())
    assert same(got, want) and got.trained_on == want.trained_on == {data().train.digest}


def test_bf16_is_taken_where_the_cpu_multiplies_it_and_the_weights_say_so(tmp_path, monkeypatch):
    def on(folder, *flags, until=3, precision="bf16"):
        def stop(what, done, total):
            if done > until * total // 3:
                raise Killed

        monkeypatch.setattr(cpu, "flags", lambda: frozenset(flags))
        with suppress(Killed):
            return replace(kept(tmp_path / folder, precision=precision), progress=stop).fit(fresh())

    plain, imitated = on("plain", "avx2", precision="fp32"), on("imitated", "avx2")
    assert same(plain, imitated) and kept(tmp_path / "imitated").said()["precision"] == "fp32"
    assert not same(plain, on("real", "avx512_bf16")) and kept(tmp_path / "real").said()["precision"] == "bf16"
    on("moved", "avx512_bf16", until=1)
    on("moved", "avx2")
    assert kept(tmp_path / "moved").said()["precision"] == "bf16, then fp32"


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


def test_a_trained_network_that_is_being_destroyed_is_not_trained_to_the_end(tmp_path):
    """The first epoch's loss is known to a run that goes on, too."""
    again, done = replace(trainer(epochs=9), folder=tmp_path, key="k"), []
    model = again.fit(fresh(), name="base")

    def each_epoch(model, share):
        done.append(share)
        if len(done) == 2:
            raise KeyboardInterrupt
        if len(done) == 4:
            with torch.no_grad():
                model.heads[-1][-1].weight.mul_(1e5)

    with pytest.raises(KeyboardInterrupt):
        again.fit(model, name="more", epochs=5, each_epoch=each_epoch)
    with pytest.raises(
        Diverged, match=r"'more' ran away: its mean loss was [\d.]+ in the first epoch and is .* in epoch 3: lower recipe.lr"
    ):
        again.fit(model, name="more", epochs=5, each_epoch=each_epoch)
    assert done == [0, 0.2, 0.2, 0.4]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"optimizer": "SDG"}, "did you mean 'SGD'"),
        ({"schedule": "CosineLR"}, "recipe.schedule='CosineLR' is not in torch"),
        ({"schedule": "ReduceLROnPlateau"}, "recipe.schedule='ReduceLROnPlateau' cannot be used here"),
        ({"schedule": "LRScheduler"}, "recipe.schedule='LRScheduler' cannot be used here"),
        ({"optimizer": "Optimizer"}, "recipe.optimizer='Optimizer' cannot be used here"),
        ({"schedule": "OneCycleLR", "schedule_args": (("max_lr", 0.1),)}, "schedule_args: max_lr is what recipe.lr says"),
        ({"optimizer_args": (("lr", 0.1),)}, "optimizer_args: lr is what recipe.lr says"),
        ({"epochs": -1}, "epochs >= 0"),
        ({"trunk_epochs": -1}, "trunk_epochs >= 0"),
        ({"trunk_epochs": 5}, "start='static' begins with, and start is 'scratch'"),
    ],
)
def test_a_wrong_recipe_is_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Recipe(**wrong)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"optimizer_args": (("momentun", 0.9),)}, "recipe.optimizer='AdamW' with optimizer_args=.*momentun"),
        ({"optimizer": "SGD", "optimizer_args": (("nesterov", True),)}, "recipe.optimizer='SGD' with .*Nesterov"),
        ({"optimizer": "Muon"}, "recipe.optimizer='Muon' with .*2D"),
        ({"optimizer": "LBFGS"}, "recipe.optimizer='LBFGS' with .*weight_decay"),
        ({"schedule": "SequentialLR"}, "recipe.schedule='SequentialLR' with .*missing"),
        ({"schedule": "CosineAnnealingWarmRestarts", "schedule_args": (("T_0", 10.0),)}, "with schedule_args=.*integer T_0"),
    ],
)
def test_what_torch_refuses_names_the_recipes_field(wrong, said):
    with pytest.raises(UsageError, match=said):
        trainer(**wrong).fit(fresh())


def test_whole_numbers_are_arguments_of_schedules():
    own = trainer(schedule="CosineAnnealingWarmRestarts", schedule_args=(("T_0", 1), ("eta_min", 1e-4)))
    _, schedule = _optimizer(fresh(), own.recipe, steps=4)
    assert (type(schedule.T_0), schedule.T_0, schedule.eta_min) == (int, 1, 1e-4), "torch refuses 1.0 here"
    model = fresh()
    own.fit(model)
    assert model.trained_on == {own.train.digest}


def test_learning_rates_of_a_schedule_are_scaled_too(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "_optimizer", lambda model, recipe, steps: seen.append(recipe) or _optimizer(model, recipe, steps))
    args = (("base_lr", 0.01), ("max_lr", 0.1), ("step_size_up", 4), ("cycle_momentum", False))
    trainer(schedule="CyclicLR", schedule_args=args).fit(fresh(), epochs=1, lr_scale=0.5)
    (recipe,) = seen
    assert recipe.schedule_args == (("base_lr", 0.005), ("max_lr", 0.05), ("step_size_up", 4), ("cycle_momentum", False))


@dataclass(frozen=True)
class Watched(Joint):
    said: ClassVar[list[float]] = []

    def __call__(self, logits, y, done, state):
        self.said.append(done)
        return super().__call__(logits, y, done, state)


def test_a_trained_network_goes_on_at_the_end_of_its_losses_schedule():
    shares = []
    Watched.said.clear()
    trainer(loss=Watched(), epochs=2).fit(fresh())
    assert sorted(set(Watched.said)) == [0.0, 0.5]
    Watched.said.clear()
    trainer(loss=Watched(), epochs=2).fit(fresh(), epochs=4, each_epoch=lambda model, done: shares.append(done))
    assert set(Watched.said) == {1.0} and shares == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("backend", [Float32(epochs=1), QAT(epochs=1)], ids=lambda v: v.label)
def test_side_heads_are_tuned_whatever_they_waited_for(backend):
    model, own = trained(), replace(trainer(loss=TrunkThenJoint()), key="k")
    twin = backend.compress(model, data().calib, own).twin
    before, after = (m.heads[0].state_dict()["2.bias"] for m in (model, twin))
    assert (before - after).abs().max() > 1e-4


def test_a_trained_network_lies_in_memory_as_a_loaded_one_does(tmp_path):
    def strides(model):
        return {name: t.stride() for name, t in model.state_dict().items()}

    assert strides(kept(tmp_path).fit(fresh())) == strides(kept(tmp_path).fit(fresh())) == strides(fresh())


@given(st.integers(1, 300), st.integers(1, 70))
def test_no_batch_is_left_with_one_sample(n, batch):
    sizes = _batch_sizes(n, batch)
    assert sum(sizes) == n and (1 not in sizes or 1 in (n, batch))
    if n % batch != 1:
        assert sizes == [len(part) for part in torch.arange(n).split(batch)]


def test_a_last_step_to_nowhere_is_no_finished_training(tmp_path):
    whole = kept(tmp_path, optimizer="SGD", schedule="constant", epochs=1, batch=10**4, lr=1e38, weight_decay=1e3)
    with pytest.raises(Diverged, match="ended with weights that are not finite: lower recipe.lr"):
        whole.fit(fresh())
    assert not whole.finished()


def test_wrong_arguments_and_weights_are_refused():
    with pytest.raises(UsageError, match="2 numbers for a network of 3 exits"):
        trainer(loss=Joint(weights=(1.0, 1.0))).fit(fresh())


def test_heads_alone_are_not_taught_on_a_trunk_that_nobody_trained(tmp_path):
    with pytest.raises(UsageError, match="nothing has trained the trunk .* recipe.start='static', or take another loss"):
        trainer(loss=FrozenTrunk()).fit(fresh())
    with pytest.raises(UsageError, match="nothing has trained the trunk"):
        trainer(loss=FromTeacher(of=FrozenTrunk())).fit(fresh())
    shop, data = Workshop(tmp_path), Synthetic(n=800, size=16, channels=3, n_classes=4)
    recipe = Recipe(epochs=1, batch=16, lr=1e-2, loss=FrozenTrunk())
    with pytest.raises(UsageError, match="nothing has trained the trunk"):
        shop.trained(data, Tiny(), recipe, 0, 0)
    assert shop.trained(data, Static(Tiny()), recipe, 0, 0).trained_on  # one exit learns whole


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
    said = "do not fit" if hurt == "other network" else r"w\.safetensors (cannot|are not).*: delete it and run again"
    with pytest.raises(CorruptFile, match=said):
        load_weights(model, path)


def test_weights_of_another_network_say_which_keys(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(fresh(), path)
    with pytest.raises(CorruptFile, match=r"do not fit the network \(size mismatch for stages.0.0.weight: .* \.\.\.\): delete"):
        load_weights(Tiny(width=4).build((3, 16, 16), 4), path)
    with pytest.raises(CorruptFile, match=r'Missing key\(s\) in state_dict: "stages.0.0.bias"'):
        load_weights(Restarting().build((3, 16, 16), 4), path)


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


# Devices --------------------------------------------------------------------------------------------------------


def test_auto_takes_cuda_where_there_is_some(monkeypatch):
    for n in (0, 2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda n=n: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=n: n)
        assert _device("auto").type == ("cuda" if n else "cpu") and _device("cpu").type == "cpu"
    assert str(_device("cuda:1")) == "cuda:1" and str(_device("cuda")) == "cuda"
    with pytest.raises(UsageError, match="'cuda:2' is not on this machine: use one of auto, cpu, cuda, cuda:0, cuda:1"):
        _device("cuda:2")


def test_a_device_that_is_not_here_is_said_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="recipe.device='cuda' is not on this machine: use one of auto, cpu"):
        trainer(device="cuda").fit(fresh())


def test_weights_say_the_device_of_their_training(tmp_path):
    kept(tmp_path, device="cpu").fit(fresh())
    facts = load_weights(fresh(), tmp_path / "k-base" / "weights.safetensors")
    assert facts["device"] == "cpu" and float(facts["wall_s"]) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("orthogonal", ["no", "vector"])
def test_a_training_on_cuda_comes_back_to_the_cpu_and_has_learned(tmp_path, orthogonal):
    model = kept(tmp_path, epochs=6, device="cuda", precision="bf16", orthogonal=orthogonal).fit(fresh())
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    with torch.inference_mode():
        assert (model(data().test.x).argmax(-1) == data().test.y).float().mean(1).max() > 0.5  # chance is 0.25


def test_compiled_it_learns_the_same():
    part = data().train
    short = replace(part, x=part.x[:128], y=part.y[:128])  # whole batches: compiled once

    def fit(compile):
        torch.manual_seed(0)
        stage = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten())
        model = AnytimeModel([stage], [torch.nn.Linear(4 * 7 * 7, 4)])
        before = {n: t.clone() for n, t in model.state_dict().items()}
        recipe = {"epochs": 1, "optimizer": "SGD", "schedule": "constant", "lr": 0.1, "compile": compile, "device": "cpu"}
        return before, replace(trainer(**recipe), train=short).fit(model)

    (start, plain), (_, compiled) = fit(False), fit(True)
    assert type(compiled) is AnytimeModel and list(start) == list(compiled.state_dict())  # itself, not what wraps it
    for name, a in plain.state_dict().items():
        assert torch.allclose(a, compiled.state_dict()[name], atol=1e-5), name
    assert (start["stages.0.0.weight"] - compiled.stages[0][0].weight).abs().max() > 1e-3


def test_more_networks_than_torch_would_compile(monkeypatch):
    """It stops at 8 of one class, and the rest would run as if nobody had asked."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    for c in range(10):
        _compiled(AnytimeModel([torch.nn.Flatten()], [torch.nn.Linear(3, c + 1)]))(torch.zeros(2, 3))
    assert len(graphs) == 10


def test_a_recipe_cannot_learn_from_a_teacher_that_is_not_there():
    with pytest.raises(UsageError, match="QAT"):
        trainer(loss=FromTeacher()).fit(fresh())
    with pytest.raises(UsageError, match="nothing has trained the trunk"):
        trainer(loss=FromTeacher(of=FrozenTrunk())).fit(fresh())
    net = QAT(8, 8, epochs=1, teach=0.5).compress(fresh().eval(), data().calib, trainer(epochs=0))
    assert net.n_exits == fresh().n_exits  # its teacher is there, and no part of what it leaves
