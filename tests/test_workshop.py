"""What a workshop keeps is found again only as long as nothing that it hangs on has changed."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from anytime import workshop
from anytime.backend import Backend
from anytime.backends.float import Float32
from anytime.config import Cell
from anytime.datasets.npz import Npz
from anytime.datasets.synthetic import Synthetic
from anytime.errors import AnytimeError
from anytime.losses import FrozenTrunk
from anytime.model import AnytimeModel, ModelSpec
from anytime.models.attached import Attached
from anytime.models.iresnext import IResNeXt
from anytime.models.resnet import ResNet20
from anytime.models.static import Static
from anytime.train import Recipe
from anytime.workshop import Workshop, _inherit
from tests.worlds import Tiny

SMALL = {"calib": 8, "tune": 8, "val": 8, "hold": 8}
DATA = Synthetic(n=160, size=16, channels=3, n_classes=4, **SMALL)
TINY, BRIEF = Tiny(), Recipe(epochs=1, batch=16, lr=1e-2)


def cell(data=DATA, model=TINY):
    return Cell(data, model, BRIEF, Float32(), 0, 0)


def asked(folder, what):
    """What a new workshop says about test."""
    workshop._loaded.cache_clear()
    return Workshop(folder).predictions(what)["test"].logits


def without_what_was_learned(folder, what):
    """The file of predictions as it was written before it held more than the digests of its parts."""
    (path,) = (folder / "cache" / "predictions").glob("*.npz")
    held = workshop._read_arrays(path)
    workshop._write_arrays(path, held | {"content": held["content"][:5], "test": held["test"] + 1})


def test_predictions_are_made_again_when_only_images_to_train_on_have_changed(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "d.npz"
    arrays = {f"x_{part}": rng.integers(0, 255, (n, 3, 16, 16), dtype=np.uint8) for part, n in (("train", 80), ("test", 20))}
    arrays |= {"y_train": np.arange(80) % 4, "y_test": np.arange(20) % 4}
    np.savez(path, **arrays)
    own = cell(Npz(path=str(path), **SMALL))
    first = asked(tmp_path, own)
    assert np.array_equal(first, asked(tmp_path, own))
    train = Workshop(tmp_path).data(own.data, 0).train
    pixels = np.rint((train.x.numpy() - train.x.numpy().min()) / np.ptp(train.x.numpy()) * 255)
    mine = [any(np.abs(image - x).max() < 3 for x in pixels) for image in arrays["x_train"].astype(float)]
    assert sum(mine) == len(train)
    arrays["x_train"][mine] = 255 - arrays["x_train"][mine]
    np.savez(path, **arrays)
    again = asked(tmp_path, own)
    assert not np.allclose(first, again) and np.array_equal(again, asked(tmp_path, own))
    without_what_was_learned(tmp_path, own)
    assert np.array_equal(again, asked(tmp_path, own))  # nobody knows what those were learned from


def test_older_predictions_on_published_samples_are_taken(tmp_path):
    first = asked(tmp_path, cell())
    without_what_was_learned(tmp_path, cell())
    assert np.array_equal(first + 1, asked(tmp_path, cell()))


class Backbone(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.Flatten(), nn.Linear(36, num_classes))


def test_another_file_of_weights_under_the_same_path_is_another_network(tmp_path):
    def write(path, seed):
        torch.manual_seed(seed)
        torch.save(Backbone(4).state_dict(), path)

    path = tmp_path / "w.pt"
    model = Attached(f"{__name__}:Backbone", ("0",), weights=str(path), trained_on=("elsewhere",))
    for net in (model, Static(model)):
        write(path, 1)
        first = asked(tmp_path, cell(model=net))
        assert np.array_equal(first, asked(tmp_path, cell(model=net)))
        write(path, 2)
        assert not np.allclose(first, asked(tmp_path, cell(model=net)), atol=1e-3)


def test_a_file_that_is_called_by_its_digest_moves_no_training(tmp_path):
    """So published weights keep the names of what was trained from them."""
    path = tmp_path / "resnet20-5feceb66.th"  # the first digits of the sha256 of "0"
    plain = [Workshop(tmp_path).trainer(DATA, ResNet20(str(path)), BRIEF, 0, 0).key]
    for content in ("0", "1"):
        path.write_text(content)
        plain.append(Workshop(tmp_path).trainer(DATA, ResNet20(str(path)), BRIEF, 0, 0).key)
    assert plain[0] == plain[1] != plain[2]


def test_sub_networks_begin_from_the_largest_alone(tmp_path):
    spec = IResNeXt(blocks=1, width=8, bottleneck=2, cardinality=4, subnets=2)
    net, alone = spec.build((3, 16, 16), 4).eval(), Static(spec).build((3, 16, 16), 4).eval()
    _inherit(net, alone, alike=False)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(net(x)[-1], alone(x)[0])
    first, last = (stage[1].residual[2] for stage in net.stages)
    assert first.slice_0 is last.slice_0  # shared still, so the smaller one begins from them too
    assert Workshop(tmp_path).trained(DATA, spec, replace(BRIEF, start="static"), 0, 0).restarts


@pytest.mark.parametrize("model", [TINY, Static(TINY)], ids=lambda v: v.label)
def test_a_frozen_trunk_is_trained_by_itself_first(tmp_path, model):
    shop, recipe = Workshop(tmp_path), replace(BRIEF, start="static", loss=FrozenTrunk())
    net, base = shop.trained(DATA, model, recipe, 0, 0), shop.trained(DATA, Static(TINY), recipe.from_scratch(), 0, 0)
    same = [torch.equal(a, b) for a, b in zip(net.stages.parameters(), base.stages.parameters(), strict=True)]
    assert all(same) if net.n_exits > 1 else not any(same)  # the network's twin is trained on


@dataclass(frozen=True)
class Made(ModelSpec):
    """A network of the user's own, as ``kind`` says."""

    kind: str = "fine"

    def build(self, input_shape, n_classes):
        def head(more=0):
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_classes + more))

        body = nn.Sequential(
            nn.Conv2d(input_shape[0], 4, 3), nn.BatchNorm2d(4, track_running_stats=self.kind != "batch"), nn.ReLU()
        )
        if self.kind == "no chain":
            return nn.Sequential(body, head())
        channels = 5 if self.kind == "channels" else 4
        return AnytimeModel([body, nn.Conv2d(channels, 4, 3)], [head(), head(self.kind == "classes")])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no chain", "build gave a Sequential: return an AnytimeModel"),
        ("classes", r"exit 2 gives \[2, 5\] for 2 images: of 4 classes it must be \[2, 4\]"),
        ("channels", "stage or head 2 cannot take what reaches it .*5 channels"),
        ("batch", "exit 1 answers an image otherwise when it stands alone"),
    ],
)
def test_a_network_that_is_no_classifier_of_these_data_is_refused(tmp_path, kind, message):
    shop, data = Workshop(tmp_path), Synthetic(n=200, noise=0.25, n_classes=4, calib=8, tune=8, val=8, hold=8)
    assert shop.trained(data, Made(), Recipe(epochs=0), 0, 0).n_exits == 2
    with pytest.raises(AnytimeError, match=message):
        shop.trained(data, Made(kind), Recipe(epochs=0), 0, 0)


@dataclass(frozen=True)
class Forgetful(Backend):
    """Returns nothing."""

    def compress(self, model, calib, trainer, target="u8s8"): ...


def test_a_backend_that_returns_nothing_is_told_so(tmp_path):
    data = Synthetic(n=200, noise=0.25, n_classes=4, calib=8, tune=8, val=8, hold=8)
    with pytest.raises(AnytimeError, match="compress gave a NoneType: return a Deployable"):
        Workshop(tmp_path).net(Cell(data, Made(), Recipe(epochs=0), Forgetful(), 0, 0))
