"""Datasets whose pixels live on the device; batches are gathered inside the compiled step."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, H, W, C) uint8 and labels (N,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Named splits of labelled images.

    Attributes:
      classes: class names; a label is an index into them.
      splits: "train", "val" and "test".
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Split]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole batches; what is left over differs from epoch to epoch."""
    return num_examples // batch_size


def epoch_order(key: jax.Array, epoch: jax.Array, num_examples: int) -> jax.Array:
    """Returns the order, (num_examples,) int32, in which an epoch visits the training split."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


def gather(
    split: tuple[jax.Array, jax.Array], indices: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns images (B, H, W, C) float32, pixels divided by `scale`, and labels (B,) int32."""
    images, labels = split
    return images[indices].astype(jnp.float32) / scale, labels[indices]
