"""Random changes to images, on the device and per example.

They are for training, but for `roll`, which evaluation does, too.

Rotation, translation, flips and contrast have the semantics of the Keras layers RandomRotation,
RandomTranslation, RandomFlip and RandomContrast (keras.io). All moves by fractions of a pixel are
one affine warp, so that pixels are interpolated once. `augment_host.py` does the same to images
that stream through the host.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from aim_flax.errors import UsageError, nearest
from aim_flax.keys import Seed, roll_key

OPTIONS = (
    "crop",
    "rotation",
    "translation",
    "shift",
    "flip_horizontal",
    "flip_vertical",
    "contrast",
    "roll",
)
# The proportions of a crop relative to the image's, as in C. Szegedy et al., Going Deeper with
# Convolutions (2015).
CROP_ASPECT = (3 / 4, 4 / 3)
# What the key of an image's offset is folded with: one more than the keys that are split from it.
_ROLL = 6


def check_options(options: Mapping[str, float | bool]) -> None:
    """Raises UsageError for an option that `augment` does not know, or a value out of range."""
    for option in options:
        if option not in OPTIONS:
            raise UsageError(f"augment.{option} is no option{nearest(option, OPTIONS)}")
    if not 0 <= options.get("crop", 0.0) <= 1:
        raise UsageError(f"augment.crop is {options['crop']}, expected a share from 0 to 1")


def augment(
    images: jax.Array, key: jax.Array, first: jax.Array | int, options: Mapping[str, float | bool]
) -> jax.Array:
    """Returns randomly changed images, float32.

    Args:
      images: (B, H, W, C), any dtype and range of values; nothing is clipped.
      key: of this step.
      first: position of the first image in the batch of all devices. An image's changes depend
        only on the key and its position, not on how the devices share the batch.
      options: `crop`, a random part of at least this share of the image's area, resized to the
        image's size; `rotation`, at most this many turns either way; `translation`, at most this
        share of height and width; `shift`, at most this many whole pixels either way;
        `flip_horizontal` and `flip_vertical`, each with probability 1/2; `contrast`, each channel's
        distance from its mean times 1 ± at most this much; at last `roll`, see `roll`. An option
        that is missing, zero or False is not done. Edges are filled by reflection, pixels are
        interpolated bilinearly.
    """
    positions = first + jnp.arange(images.shape[0])
    keys = jax.vmap(partial(jax.random.fold_in, key))(positions)
    split = jax.vmap(partial(jax.random.split, num=6))(keys)
    key_warp, key_crop, *keys_whole, key_contrast = split.T
    options = {name: options.get(name) or 0 for name in OPTIONS}
    images = _move_whole_pixels(images, options, keys_whole)
    images = images.astype(jnp.float32)
    if options["rotation"] or options["translation"] or options["crop"]:
        images = jax.vmap(partial(_warp_randomly, options=options))(images, key_warp, key_crop)
    if options["contrast"]:
        bounds = dict(minval=1 - options["contrast"], maxval=1 + options["contrast"])
        factors = jax.vmap(partial(jax.random.uniform, **bounds))(key_contrast)
        means = images.mean(axis=(1, 2), keepdims=True)
        images = (images - means) * factors[:, None, None, None] + means
    if options["roll"]:
        # Last: then no place in an image differs from another, and edges are filled before.
        images = roll(images, jax.vmap(partial(jax.random.fold_in, data=_ROLL))(keys))
    return images


def roll(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Shifts images around: what leaves at one edge comes in at the opposite one, as `numpy.roll`
    does along rows and columns.

    Each place in an image then holds all of it alike, so that where something is tells nothing.

    Args:
      images: (B, H, W, C), any dtype, which the result has, too.
      keys: (B,), from which each image's offset is drawn: rows down, uniform over 0 to H - 1, and
        columns to the right, uniform over 0 to W - 1.
    """
    sizes = images.shape[1:3]
    draw = partial(jax.random.randint, shape=(2,), minval=0, maxval=jnp.array(sizes))
    offsets = jax.vmap(draw)(keys)
    rows, columns = ((jnp.arange(n) - offsets[:, i, None]) % n for i, n in enumerate(sizes))
    # On CPU up to four times as fast as a vmapped jnp.roll.
    return _take(images, rows, columns)


def roll_in_evaluation(images: jax.Array, seed: Seed, indices: jax.Array) -> jax.Array:
    """Rolls images, (B, H, W, C), by offsets that depend on the run's seed and on each image's
    index in its split, (B,) int32, alone: they are the same at each evaluation."""
    return roll(images, jax.vmap(partial(jax.random.fold_in, roll_key(seed)))(indices))


def rolls(options: Mapping[str, float | bool] | None) -> bool:
    """Returns whether images are rolled, by the options of a config, which older runs lack."""
    return bool((options or {}).get("roll"))


def _move_whole_pixels(
    images: jax.Array, options: Mapping[str, float | bool], keys: Sequence[jax.Array]
) -> jax.Array:
    """Shifts and flips in the images' own dtype, which is smaller than float32."""
    limit = int(options["shift"])
    if not (limit or options["flip_vertical"] or options["flip_horizontal"]):
        return images
    draw = partial(jax.random.randint, shape=(2,), minval=-limit, maxval=limit + 1)
    shifts = jax.vmap(draw)(keys[0])
    sources = []
    for axis, name in enumerate(("flip_vertical", "flip_horizontal")):
        size = images.shape[axis + 1]
        # Reflected at the edges: d c b a | a b c d | d c b a.
        source = (jnp.arange(size) - shifts[:, axis, None]) % (2 * size)
        source = jnp.minimum(source, 2 * size - 1 - source)
        if options[name]:
            flips = jax.vmap(jax.random.bernoulli)(keys[1 + axis])
            source = jnp.where(flips[:, None], source[:, ::-1], source)
        sources.append(source)
    # On CPU several times as fast as choosing between an image and its mirror image.
    return _take(images, *sources)


def _take(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns images made of other rows, (B, H) int, and columns, (B, W) int, of themselves."""
    examples = jnp.arange(len(images))[:, None, None]
    places = (examples, rows[:, :, None], columns[:, None, :])
    return jnp.asarray(images).at[places].get(mode="promise_in_bounds")


def _warp_randomly(
    image: jax.Array, key_warp: jax.Array, key_crop: jax.Array, options: Mapping[str, float]
) -> jax.Array:
    height, width = image.shape[:2]
    turn, down, right = jax.random.uniform(key_warp, (3,), minval=-1.0)
    angle = 2 * jnp.pi * options["rotation"] * turn
    shift = (down * options["translation"] * height, right * options["translation"] * width)
    if not options["crop"]:
        return warp(image, angle, shift)
    share, aspect, top, left = jax.random.uniform(key_crop, (4,))
    share = options["crop"] + (1 - options["crop"]) * share
    ratio = CROP_ASPECT[0] * (CROP_ASPECT[1] / CROP_ASPECT[0]) ** aspect
    size = (jnp.minimum(jnp.sqrt(share / ratio), 1.0), jnp.minimum(jnp.sqrt(share * ratio), 1.0))
    offset = ((top - 0.5) * (1 - size[0]) * height, (left - 0.5) * (1 - size[1]) * width)
    return warp(image, angle, shift, size, offset)


def warp(
    image: jax.Array,
    angle: jax.Array | float,
    shift: tuple[jax.Array | float, ...],
    size: tuple[jax.Array | float, ...] = (1.0, 1.0),
    offset: tuple[jax.Array | float, ...] = (0.0, 0.0),
) -> jax.Array:
    """Crops an image, (H, W, C), rotates the result about its centre, then shifts it.

    Interpolation is bilinear, edges are filled by reflection (d c b a | a b c d | d c b a).

    Args:
      angle: in radians, counter-clockwise.
      shift: (down, right), in pixels.
      size: height and width of the crop, as shares of the image's height and width.
      offset: (down, right), in pixels, from the image's centre to the crop's.
    """
    height, width = image.shape[:2]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y = jnp.arange(height)[:, None] - centre_y - shift[0]
    x = jnp.arange(width)[None, :] - centre_x - shift[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    source = [
        size[0] * (cos * y + sin * x) + offset[0] + centre_y,
        size[1] * (cos * x - sin * y) + offset[1] + centre_x,
    ]
    sample = partial(map_coordinates, coordinates=source, order=1, mode="reflect")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)
