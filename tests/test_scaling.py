"""From pixels to what a network gets, and the part of an image that is used."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from aim_flax.data.images import load
from aim_flax.data.scaling import Scaling, scaling
from aim_flax.data.streamed import Streamed
from tests.asserts import refused
from tests.photos import encode
from tests.runs import load as load_config

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)


@pytest.mark.parametrize("images", [PIXELS, jnp.asarray(PIXELS)], ids=["numpy", "jax"])
def test_pixels_are_divided_shifted_and_divided_again(images):
    found = Scaling(2.0, (1.0, 2.0, 3.0), (1.0, 0.5, 2.0))(images)
    assert type(found) is type(images)
    assert found.dtype == np.float32
    expected = (PIXELS.astype(np.float64) / 2 - [1, 2, 3]) / [1, 0.5, 2]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(Scaling(255.0)(images), PIXELS / 255, rtol=1e-6)


def test_a_config_of_before_is_only_divided():
    assert scaling(ConfigDict(dict(image_shape=(2, 2, 3), scale=16.0))) == Scaling(16.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mean=(1.0,2.0)", r"data.mean is \(1.0, 2.0\), expected a number for each of 3 channels"),
        ("deviation=(1.0,1.0,0.0)", "data.deviation is .*, expected positive numbers"),
        ("mean=(1.0,1.0,1e999)", "data.mean is .*inf.*, expected a number for each"),
    ],
)
def test_wrong_numbers_are_refused(change, message):
    with refused(message):
        scaling(load_config("image_folder_resnet50", [f"data.{change}"]).data)


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_the_centre_is_what_is_left_of_a_cut_all_around(fit):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    whole = load(encode(pixels), (20, 20, 3), fit=fit, centre=0.5)
    np.testing.assert_array_equal(whole, pixels[10:30, 10:30])
    wide = encode(pixels[:20])
    expected = pixels[5:15, 15:25] if fit == "crop" else pixels[5:15, 10:30]
    found = load(wide, (10, expected.shape[1], 3), fit=fit, centre=0.5)
    np.testing.assert_array_equal(found, expected)


def test_a_centre_that_is_no_share_is_refused():
    for centre in (0.0, 1.5, float("nan")):
        with refused(f"data.centre is {centre}, expected a share above 0, at most 1"):
            Streamed(None, (2, 2, 3), 1, centre=centre)
