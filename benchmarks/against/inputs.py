"""What all sides of a comparison are given: the same images, labels and weights."""

import zlib
from collections.abc import Callable

import numpy as np

# Small, so that the loss falls in the first step by the gradient's size, and not by chance. Steps
# of another length take as long.
LEARNING_RATE = 1e-5


def batch(pixels: int, batch_size: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (B, H, W, 3) float32 from -1 to 1, of random bytes, and labels (B,) int32."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, pixels, pixels, 3)).astype(np.float32)
    return images / 127.5 - 1, rng.integers(0, classes, batch_size).astype(np.int32)


def two_steps(step: Callable[[], float]) -> dict[str, list[float]]:
    """Returns the loss of a first training step, and how much lower that of the next one is."""
    loss = step()
    return {"loss": [loss], "fall": [loss - step()]}


def drawn(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a weight by rule from its name, so that sides need not hand weights to each other.

    Signals stay about as large as they are, and variances are positive.

    Args:
      path: that of our variables, such as "params/stem/conv/kernel".
      shape: as ours: kernels end with their inputs and outputs.

    Returns:
      float32, of that shape.
    """
    numbers = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape, np.float32)
    role = path.rpartition("/")[2]
    if role in ("kernel", "content"):
        return numbers * np.float32((2 / np.prod(shape[:-1])) ** 0.5)
    return 0.1 * (np.abs(numbers) if role == "var" else numbers) + (role in ("scale", "var"))
