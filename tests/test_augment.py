"""Augmentation: against counts by hand and scipy's resampling."""

from __future__ import annotations

import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Generator, Tensor

from anytime.augment import affine, compose, crop, cutout, flip, warp
from anytime.dataset import Augment

ALL: dict[str, Augment] = {
    "crop": crop,
    "flip": flip,
    "cutout": partial(cutout, side=4),
    "affine": partial(affine, shear=5.0),
    "compose": compose(partial(crop, padding=2), flip),
}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(99))


@pytest.mark.parametrize("name", ALL)
@given(
    b=st.integers(1, 5),
    c=st.integers(1, 3),
    h=st.integers(2, 12),
    w=st.integers(2, 12),
    seed=st.integers(0, 2**31),
    last=st.booleans(),
)
def test_shape_type_and_determinism(name: str, b: int, c: int, h: int, w: int, seed: int, last: bool) -> None:
    x = noise(b, c, h, w)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    before = x.clone()
    one, two = ALL[name](x, seeded(seed)), ALL[name](x, seeded(seed))
    assert one.shape == x.shape and one.dtype == x.dtype
    assert torch.equal(one, two)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ALL)
def test_draws_from_the_generator_and_nothing_else(name: str) -> None:
    x = noise(16, 1, 8, 8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    generator = seeded()
    first, second = ALL[name](x, generator), ALL[name](x, generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ALL)
def test_goes_to_other_processes(name: str) -> None:
    x = noise(4, 1, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(ALL[name]))(x, seeded()), ALL[name](x, seeded()))


def test_crop_is_a_window_of_the_padded_image() -> None:
    x = noise(64, 2, 6, 5)
    out = crop(x, seeded(), padding=2, fill=(7.0, -7.0))
    places = set()
    for image, got in zip(x, out, strict=True):
        padded = np.stack([np.pad(image[c].numpy(), 2, constant_values=fill) for c, fill in enumerate((7.0, -7.0))])
        found = [(i, j) for i in range(5) for j in range(5) if np.array_equal(padded[:, i : i + 6, j : j + 5], got.numpy())]
        assert len(found) == 1
        places.add(found[0])
    assert {i for i, _ in places} == {j for _, j in places} == set(range(5)), "each shift from -2 to 2 is drawn on each axis"


def test_cutout_paints_one_square_that_may_be_cut_off() -> None:
    x = torch.ones(400, 3, 12, 10)
    painted = (cutout(x, seeded(), 4) == 0).float()
    assert torch.equal(painted[:, :1].expand_as(painted), painted), "all channels alike"
    rows, columns = painted[:, 0].amax(2).sum(1), painted[:, 0].amax(1).sum(1)
    assert torch.equal(painted[:, 0].sum((1, 2)), rows * columns), "a rectangle"
    # the centre is any of 12 rows: 4 pixels high, but 2 or 3 where its top is cut off and 3 where its end is
    assert set(rows.tolist()) == {2.0, 3.0, 4.0} == set(columns.tolist())
    assert float((rows == 4).float().mean()) == pytest.approx(9 / 12, abs=0.1)


def test_crop_without_padding_changes_nothing() -> None:
    x = noise(4, 3, 5, 5)
    assert torch.equal(crop(x, seeded(), padding=0), x)


def test_flip_mirrors_whole_images_half_of_the_time() -> None:
    x = noise(20_000, 1, 2, 3)
    out = flip(x, seeded())
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    kept = (out == x).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert abs(int(mirrored.sum()) - 10_000) < 5 * math.sqrt(5000)  # five standard deviations of a binomial


def still(b: int, **given: Tensor) -> dict[str, Tensor]:
    return {"turn": torch.zeros(b), "shift": torch.zeros(b, 2), "scale": torch.ones(b), "shear": torch.zeros(b)} | given


def test_warp_of_nothing_is_the_identity() -> None:
    x = noise(3, 2, 7, 9)
    torch.testing.assert_close(warp(x, **still(3)), x, atol=1e-5, rtol=0)


def test_warp_shifts_by_pixels_and_fills() -> None:
    x = noise(1, 1, 6, 8)
    out = warp(x, **still(1, shift=torch.tensor([[2.0, -1.0]])), fill=(5.0,))
    torch.testing.assert_close(out[0, 0, :5, 2:], x[0, 0, 1:, :6], atol=1e-4, rtol=0)
    torch.testing.assert_close(out[0, 0, :, :2], torch.full((6, 2), 5.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[0, 0, 5], torch.full((8,), 5.0), atol=1e-4, rtol=0)


def test_warp_turns_clockwise() -> None:
    x = noise(1, 1, 6, 6)
    quarter = warp(x, **still(1, turn=torch.tensor([math.pi / 2])))
    torch.testing.assert_close(quarter[0, 0], torch.rot90(x[0, 0], -1), atol=1e-4, rtol=0)


@given(
    turn=st.floats(-3, 3), dx=st.floats(-3, 3), dy=st.floats(-3, 3), scale=st.floats(0.5, 2), shear=st.floats(-0.5, 0.5),
    size=st.sampled_from([(9, 9), (8, 13), (13, 8)]),
)  # fmt: skip
def test_warp_is_scipys_affine_transform(
    turn: float, dx: float, dy: float, scale: float, shear: float, size: tuple[int, int]
) -> None:
    # Smooth towards a black frame, so that the two ways of treating the outer half pixel do not matter.
    image = np.zeros(size)
    image[2:-2, 2:-2] = np.random.default_rng(0).random((size[0] - 4, size[1] - 4))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    forward = scale * rotation @ np.array([[1, math.tan(shear)], [0, 1]])
    back = np.linalg.inv(forward)[::-1, ::-1]  # scipy's axes are rows, columns
    centre = (np.array(size) - 1) / 2
    wanted = ndimage.affine_transform(image, back, centre - back @ (centre + [dy, dx]), order=1, mode="constant")
    x = torch.from_numpy(image).float()[None, None]
    values = [torch.tensor([v]) for v in (turn, scale, shear)]
    out = warp(x, turn=values[0], shift=torch.tensor([[dx, dy]]), scale=values[1], shear=values[2])
    np.testing.assert_allclose(out[0, 0].numpy(), wanted, atol=1e-4)


def test_affine_stays_within_its_limits() -> None:
    # One bright pixel three right of the centre of a 15x15 image tells where the map sends it.
    x = torch.zeros(3000, 1, 15, 15)
    x[:, :, 7, 10] = 1
    rows, columns = torch.meshgrid(torch.arange(15.0) - 7, torch.arange(15.0) - 7, indexing="ij")

    def place(**limits: float | tuple[float, float]) -> tuple[Tensor, Tensor]:
        out = affine(x, seeded(), **({"degrees": 0.0, "translate": 0.0, "scale": (1.0, 1.0)} | limits))[:, 0]  # type: ignore[arg-type]
        mass = out.sum((1, 2))
        return (out * columns).sum((1, 2)) / mass, (out * rows).sum((1, 2)) / mass

    px, py = place(translate=2.0)
    for shift in (px - 3, py):
        assert 1.9 < shift.max() < 2.01 and -2.01 < shift.min() < -1.9 and abs(shift.mean()) < 0.15
    px, py = place(degrees=30.0)
    turned = torch.rad2deg(torch.atan2(py, px))
    assert 27 < turned.max() < 33 and -33 < turned.min() < -27


def test_fill_is_what_comes_in() -> None:
    x = torch.full((8, 2, 10, 10), 3.0)
    x[:, 1] = -4
    out = affine(x, seeded(), degrees=45.0, translate=3.0, scale=(0.5, 0.6), fill=(3.0, -4.0))
    torch.testing.assert_close(out, x, atol=1e-5, rtol=0)


def test_compose_goes_in_order() -> None:
    steps = compose(lambda x, g: x + 1, lambda x, g: x * 2)
    assert steps(torch.ones(1, 1, 1, 1), seeded()).item() == 4
