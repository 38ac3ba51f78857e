"""From pixels to what a network gets."""

import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from aim_flax.errors import UsageError

Images = TypeVar("Images", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """(pixel / scale - mean) / deviation.

    Attributes:
      scale: what pixels are divided by.
      mean, deviation: a number for each channel, of what is then there; (): left out.
    """

    scale: float
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __call__(self, images: Images) -> Images:
        """Returns (..., channels) float32, numpy or JAX as it was given."""
        images = images.astype(jnp.float32) / self.scale
        if self.mean:
            images = images - np.asarray(self.mean, np.float32)
        if self.deviation:
            images = images / np.asarray(self.deviation, np.float32)
        return images


def scaling(data: ConfigDict) -> Scaling:
    """Returns the scaling of a config's group `data`.

    Raises:
      UsageError: `mean` or `deviation` are not one number for each channel, or one of those that
        are divided by is not a positive number.
    """
    channels = data.image_shape[-1]
    mean, deviation = (tuple(data.get(key, ())) for key in ("mean", "deviation"))
    for key, values in (("mean", mean), ("deviation", deviation)):
        if len(values) not in (0, channels) or not all(map(math.isfinite, values)):
            raise UsageError(
                f"data.{key} is {values}, expected a number for each of {channels} channels, or ()"
            )
    if not all(value > 0 for value in deviation):
        raise UsageError(f"data.deviation is {deviation}, expected positive numbers")
    return Scaling(data.scale, mean, deviation)
