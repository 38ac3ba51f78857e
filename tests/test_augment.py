"""Augmentation does what it says, per example, however the batch is shared out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax.data import augment_host
from aim_flax.data.augment import augment, check_options, warp
from tests.arrays import KEY
from tests.asserts import refused

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


def draw(*shape) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)


SQUARE, TALL = draw(6, 6, 3), draw(6, 5, 2)
REFLECTED = np.pad(TALL, ((6, 6), (5, 5), (0, 0)), mode="symmetric")


@pytest.mark.parametrize(
    ("image", "angle", "shift", "expected"),
    [
        (SQUARE, np.pi / 2, (0, 0), np.rot90(SQUARE)),
        # The edge is filled by reflection.
        (TALL, 0.0, (2, 0), REFLECTED[4:10, 5:10]),
        (TALL, 0.0, (0, -1), REFLECTED[6:12, 6:11]),
        (TALL, 0.0, (-3, 2), REFLECTED[9:15, 3:8]),
        # Half a pixel is interpolated.
        (TALL, 0.0, (0.5, 0), (REFLECTED[6:12, 5:10] + REFLECTED[5:11, 5:10]) / 2),
    ],
)
def test_warp_turns_shifts_reflects_and_interpolates(image, angle, shift, expected):
    np.testing.assert_allclose(warp(image, angle, shift), expected, atol=1e-3)


def test_flips_happen_to_about_half_and_are_exact():
    images = np.broadcast_to(draw(1, 4, 5, 3), (200, 4, 5, 3))
    changed = np.asarray(augment(images, KEY, 0, {"flip_horizontal": True, "flip_vertical": True}))
    forms = [images[0], images[0, ::-1], images[0, :, ::-1], images[0, ::-1, ::-1]]
    counts = [sum((image == form).all() for image in changed) for form in forms]
    assert sum(counts) == 200
    assert min(counts) > 30


def test_contrast_keeps_each_channels_mean_and_scales_the_rest():
    images = draw(50, 4, 4, 3)
    changed = np.asarray(augment(images, KEY, 0, {"contrast": 0.1}))
    np.testing.assert_allclose(changed.mean((1, 2)), images.mean((1, 2)), rtol=1e-4)
    centred = [x - x.mean((1, 2), keepdims=True) for x in (changed, images)]
    factors = (centred[0] * centred[1]).sum((1, 2, 3)) / (centred[1] ** 2).sum((1, 2, 3))
    assert 0.9 <= factors.min() < 0.93
    assert 1.07 < factors.max() <= 1.1


def test_rotation_and_translation_stay_within_their_limits():
    """Measured on a spot, whose centre of mass moves as the image does."""
    size = 65
    y, x = np.mgrid[:size, :size] - size // 2
    spot = np.exp(-(((y - 0) ** 2 + (x - 8) ** 2) / 8)).astype(np.float32)
    images = jnp.asarray(np.broadcast_to(spot[None, ..., None], (100, size, size, 1)))

    def centres(options):
        mass = np.asarray(augment(images, KEY, 0, options))[..., 0]
        total = mass.sum((1, 2))
        return (mass * y).sum((1, 2)) / total, (mass * x).sum((1, 2)) / total

    down, right = centres({"rotation": 0.15})
    angles = np.degrees(np.arctan2(-down, right))
    np.testing.assert_allclose(np.hypot(down, right), 8, atol=0.1)
    assert -54 <= angles.min() < -45
    assert 45 < angles.max() <= 54
    down, right = centres({"translation": 0.1})
    for moved in (down, right - 8):
        assert -6.6 < moved.min() < -5
        assert 5 < moved.max() < 6.6


def test_changes_depend_on_key_and_position_alone():
    options = {"rotation": 0.15, "translation": 0.1, "flip_vertical": True, "contrast": 0.1}
    images = draw(6, 8, 8, 3)
    compiled = jax.jit(partial(augment, options=options))
    whole = compiled(images, KEY, 0)
    np.testing.assert_allclose(compiled(images[4:], KEY, 4), whole[4:], rtol=1e-5)
    assert not np.allclose(compiled(images, jax.random.key(1), 0), whole)
    same = compiled(np.broadcast_to(images[:1], images.shape), KEY, 0)
    assert not np.allclose(same[0], same[1])


def test_nothing_asked_nothing_done():
    images = draw(3, 8, 8, 3)
    off = {"rotation": 0.0, "flip_horizontal": False, "contrast": 0.0}
    np.testing.assert_array_equal(augment(images, KEY, 0, off), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotatoin": 0.1}, "augment.rotatoin is no option .did you mean 'rotation'"),
        ({"crop": -0.1}, "augment.crop is -0.1, expected a share from 0 to 1"),
        ({"crop": 1.5}, "augment.crop is 1.5, expected a share from 0 to 1"),
    ],
)
def test_wrong_options_are_told(options, message):
    with refused(message):
        check_options(options)


def test_shift_moves_whole_pixels_and_reflects():
    image = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    images = np.broadcast_to(image, (300, 6, 5, 3))
    changed = np.asarray(augment(images, KEY, 0, {"shift": 2, "flip_horizontal": True}))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="symmetric")
    moved = [padded[down : down + 6, right : right + 5] for down in range(5) for right in range(5)]
    forms = {form.tobytes() for one in moved for form in (one, one[:, ::-1])}
    assert len(forms) == 50
    assert {one.astype(np.uint8).tobytes() for one in changed} == forms


def test_crop_shows_a_part_of_at_least_the_share():
    """On a ramp the differences between neighbours tell the crop's height and width."""
    rows, columns = np.meshgrid(np.arange(32.0), np.arange(32.0), indexing="ij")
    ramps = np.stack([rows, columns], axis=-1).astype(np.float32)
    images = np.broadcast_to(ramps, (100, *ramps.shape))
    changed = np.asarray(augment(images, KEY, 0, {"crop": 0.3}))
    heights = (changed[:, 20, 16, 0] - changed[:, 10, 16, 0]) / 10
    widths = (changed[:, 16, 20, 1] - changed[:, 16, 10, 1]) / 10
    assert (heights <= 1.0001).all()
    assert (widths <= 1.0001).all()
    areas, aspects = heights * widths, widths / heights
    assert 0.29 < areas.min() < 0.4
    assert areas.max() > 0.85
    assert 0.7 < aspects.min() < 0.85
    assert 1.2 < aspects.max() < 1.4
    centres = changed[:, 15:17, 15:17].mean(axis=(1, 2))
    assert (np.abs(centres - 15.5) <= 15.6 * (1 - np.stack([heights, widths], -1)) + 0.1).all()


def photograph() -> np.ndarray:
    rows, columns = np.meshgrid(np.linspace(0, 3, 20), np.linspace(0, 2, 17), indexing="ij")
    waves = [np.sin(rows + i) * np.cos(columns * i) for i in range(3)]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize(
    ("angle", "shift"), [(0.4, (0, 0)), (0.0, (2.3, -1.6)), (-0.8, (1.25, 4.0)), (0.0, (3, -2))]
)
def test_host_warps_as_the_device_does(angle, shift):
    image = photograph()
    expected = np.asarray(warp(image.astype(np.float32), angle, shift))
    found = augment_host.warp(image, angle, shift).astype(np.float32)
    # OpenCV places pixels to 1/32, and rounds.
    assert np.abs(found - expected).max() <= 2.5


def test_host_draws_within_the_limits():
    options = {"crop": 0.3, "rotation": 0.1, "translation": 0.2, "shift": 3, "flip_vertical": True}
    changes = [augment_host.draw(np.random.default_rng(i), options) for i in range(400)]
    regions = np.array([change.region for change in changes])
    assert (regions[:, :2] >= 0).all()
    assert (regions[:, :2] + regions[:, 2:] <= 1 + 1e-9).all()
    areas = regions[:, 2] * regions[:, 3]
    assert 0.28 < areas.min() < 0.33
    angles = np.array([change.angle for change in changes]) / (2 * np.pi)
    assert 0.095 < np.abs(angles).max() <= 0.1
    assert 0.19 < np.abs([change.shift for change in changes]).max() <= 0.2
    assert {pixel for change in changes for pixel in change.pixels} == set(range(-3, 4))
    assert {change.flips for change in changes} == {(), (0,)}
    assert 150 < sum(change.flips == (0,) for change in changes) < 250


def test_host_does_nothing_unasked():
    image = photograph()
    change = augment_host.draw(np.random.default_rng(0), {"rotation": 0.0, "contrast": 0.1})
    np.testing.assert_array_equal(augment_host.apply(image, change), image)
    both = augment_host.Change((0, 0, 1, 1), 0.0, (0, 0), (2, -1), (0, 1))
    padded = np.pad(image, ((2, 0), (0, 1), (0, 0)), mode="symmetric")[:20, 1:]
    np.testing.assert_array_equal(augment_host.apply(image, both), padded[::-1, ::-1])
