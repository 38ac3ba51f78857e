"""Random changes to training images on the host, as `augment.py` makes them on the device.

Pixels are moved here, as uint8, because OpenCV is far quicker than a device's gathers; contrast is
left to the device, and so is `roll`, which evaluation does in the same way.
"""

import dataclasses
import math
from collections.abc import Mapping

import cv2
import numpy as np

from aim_flax.data.augment import CROP_ASPECT
from aim_flax.data.images import WHOLE, Region


@dataclasses.dataclass(frozen=True)
class Change:
    """One image's changes.

    Attributes:
      region: the part that is cropped.
      angle: in radians, counter-clockwise.
      shift: (down, right), as shares of height and width.
      pixels: (down, right), in whole pixels, in addition to `shift`.
      flips: the axes that are flipped at the end.
    """

    region: Region = WHOLE
    angle: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    pixels: tuple[int, int] = (0, 0)
    flips: tuple[int, ...] = ()


UNCHANGED = Change()


def draw(rng: np.random.Generator, options: Mapping[str, float | bool]) -> Change:
    """Draws the changes of an image; `options` are those of `augment.augment`."""
    region = WHOLE
    if crop := options.get("crop"):
        # Drawn together: one by one, as numpy scalars, they take several times as long.
        share, aspect, top, left = rng.random(4).tolist()
        share = crop + (1 - crop) * share
        narrow, wide = (math.log(bound) for bound in CROP_ASPECT)
        ratio = math.exp(narrow + (wide - narrow) * aspect)
        height, width = min(math.sqrt(share / ratio), 1.0), min(math.sqrt(share * ratio), 1.0)
        region = ((1 - height) * top, (1 - width) * left, height, width)
    rotation, translation = options.get("rotation") or 0.0, options.get("translation") or 0.0
    turn, down, right = (2 * drawn - 1 for drawn in rng.random(3).tolist())
    angle = 2 * math.pi * rotation * turn
    shift = (translation * down, translation * right)
    pixels = (0, 0)
    if limit := int(options.get("shift") or 0):
        pixels = tuple(rng.integers(-limit, limit, size=2, endpoint=True).tolist())
    asked = [bool(options.get(name)) for name in ("flip_vertical", "flip_horizontal")]
    flips = tuple(axis for axis in (0, 1) if asked[axis] and rng.random() < 0.5)
    return Change(region, angle, shift, pixels, flips)


def apply(image: np.ndarray, change: Change) -> np.ndarray:
    """Returns an image, (H, W, C) uint8, with all changes but the crop: see `images.load`."""
    height, width = image.shape[:2]
    down = change.shift[0] * height + change.pixels[0]
    right = change.shift[1] * width + change.pixels[1]
    if change.angle or down or right:
        image = warp(image, change.angle, (down, right))
    for axis in change.flips:
        # Not a flipped view in numpy: copying that into a batch takes ten times as long.
        image = cv2.flip(image, axis).reshape(image.shape)
    return image


def warp(image: np.ndarray, angle: float, shift: tuple[float, float]) -> np.ndarray:
    """Rotates and shifts (H, W, C) uint8 as `augment.warp` does, rounded to 1/32 of a pixel."""
    height, width = image.shape[:2]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    # From a pixel (x, y) of the result to its place in the image.
    y, x = -centre_y - shift[0], -centre_x - shift[1]
    across = [cos, -sin, cos * x - sin * y + centre_x]
    down = [sin, cos, sin * x + cos * y + centre_y]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    options = dict(flags=flags, borderMode=cv2.BORDER_REFLECT)
    warped = cv2.warpAffine(image, np.array([across, down]), (width, height), **options)
    return warped.reshape(image.shape)
