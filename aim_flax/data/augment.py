"""Random changes to training images, on the device and per example.

The operations and their order are those of the published recipe, with the semantics of the Keras
layers RandomRotation, RandomTranslation, RandomFlip and RandomContrast (keras.io); rotation and
translation are one affine warp here, so that pixels are interpolated once.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from aim_flax.errors import UsageError, nearest

OPTIONS = ("rotation", "translation", "flip_horizontal", "flip_vertical", "contrast")


def check_options(options: Mapping[str, float | bool]) -> None:
    """Raises UsageError for an option that `augment` does not know."""
    for option in options:
        if option not in OPTIONS:
            raise UsageError(f"augment.{option} is no option{nearest(option, OPTIONS)}")


def augment(
    images: jax.Array, key: jax.Array, first: jax.Array | int, options: Mapping[str, float | bool]
) -> jax.Array:
    """Returns randomly changed images.

    Args:
      images: (B, H, W, C) float32, any range of values; nothing is clipped.
      key: of this step.
      first: position of the first image in the batch of all devices: an image's changes depend
        on the key and its position alone, however the batch is shared out.
      options: `rotation`, at most so many turns either way; `translation`, at most this share
        of height and width; `flip_horizontal` and `flip_vertical`, each with probability 1/2;
        `contrast`, each channel's distance from its mean times 1 ± at most this much. What is
        left out, zero or False is not done. Edges are filled by reflection, pixels are
        interpolated bilinearly.
    """
    positions = first + jnp.arange(images.shape[0])
    keys = jax.vmap(partial(jax.random.fold_in, key))(positions)
    return jax.vmap(partial(_augment_one, **options))(images, keys)


def _augment_one(
    image: jax.Array,
    key: jax.Array,
    rotation: float = 0.0,
    translation: float = 0.0,
    flip_horizontal: bool = False,
    flip_vertical: bool = False,
    contrast: float = 0.0,
) -> jax.Array:
    key_warp, key_vertical, key_horizontal, key_contrast = jax.random.split(key, 4)
    if rotation or translation:
        turn, down, right = jax.random.uniform(key_warp, (3,), minval=-1.0)
        height, width = image.shape[:2]
        shift = (down * translation * height, right * translation * width)
        image = warp(image, 2 * jnp.pi * rotation * turn, shift)
    if flip_vertical:
        image = jnp.where(jax.random.bernoulli(key_vertical), image[::-1], image)
    if flip_horizontal:
        image = jnp.where(jax.random.bernoulli(key_horizontal), image[:, ::-1], image)
    if contrast:
        factor = jax.random.uniform(key_contrast, minval=1 - contrast, maxval=1 + contrast)
        mean = image.mean(axis=(0, 1))
        image = (image - mean) * factor + mean
    return image


def warp(
    image: jax.Array, angle: jax.Array | float, shift: tuple[jax.Array | float, ...]
) -> jax.Array:
    """Rotates an image about its centre, then shifts it.

    Args:
      image: (H, W, C).
      angle: in radians, counter-clockwise.
      shift: (down, right), in pixels.

    Returns:
      (H, W, C): bilinear, edges filled by reflection (d c b a | a b c d | d c b a).
    """
    height, width = image.shape[:2]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y = jnp.arange(height)[:, None] - centre_y - shift[0]
    x = jnp.arange(width)[None, :] - centre_x - shift[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    source = [cos * y + sin * x + centre_y, cos * x - sin * y + centre_x]
    sample = partial(map_coordinates, coordinates=source, order=1, mode="reflect")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)
