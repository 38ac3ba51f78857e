"""What is done to an image before a network sees it, in evaluation and in use."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from aim_flax.config import LEFT_OUT
from aim_flax.data.scaling import Scaling, scaling

# The value of a white pixel in datasets whose images are no files.
_WHITE = {"digits": 16}


def decoding(data: ConfigDict) -> dict[str, Any]:
    """Returns how a config's `data` has images decoded, as keyword arguments of `images.load`."""
    fit, centre = (data.get(key, LEFT_OUT[f"data.{key}"]) for key in ("fit", "centre"))
    return {"shape": tuple(data.image_shape), "fit": fit, "centre": centre}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From an image to what a network takes.

    Attributes:
      decoding: keyword arguments of `images.load`, which makes pixels of an encoded image.
      scaling: of the pixels.
      white: the value of a white pixel in the dataset: 255, but 16 in digits.
    """

    decoding: dict[str, Any]
    scaling: Scaling
    white: int

    @classmethod
    def of(cls, data: ConfigDict) -> "Preprocessing":
        return cls(decoding(data), scaling(data), _WHITE.get(data.name, 255))

    def pixels(self, encoded: bytes) -> np.ndarray:
        """Decodes an image to (H, W, C) uint8; raises `images.ImageError`."""
        # Imported here because OpenCV takes its time, and whoever has pixels doesn't need it.
        from aim_flax.data.images import load

        pixels = load(encoded, **self.decoding)
        if self.white == 255:
            return pixels
        return np.rint(pixels * (self.white / 255)).astype(np.uint8)

    def inputs(self, pixels: Any) -> Any:
        """Returns uint8 pixels, of numpy or JAX, as a network takes them: float32."""
        return self.scaling(pixels)
