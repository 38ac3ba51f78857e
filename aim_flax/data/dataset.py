"""What a dataset gives to training and evaluation, in memory or streamed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from aim_flax.devices import Devices


@runtime_checkable
class Feed(Protocol):
    """The data of a run's training steps."""

    def at(self, step: int) -> Any:
        """Returns what `TrainBatches.on_device` takes for this step; steps come in order."""

    def close(self) -> None:
        """Ends the threads, if there are any."""


@runtime_checkable
class TrainBatches(Protocol):
    """The training split's batches, a function of (seed, step).

    Attributes:
      sharded: whether each device gets its own part of a batch, instead of the whole split.
      steps_per_call: for how many steps the data of one step can be used; None: for its epoch.
      seed_axes: for each part of the data of several seeds, its axis of seeds, or None where they
        share it; None: a feed is of one seed.
    """

    sharded: bool
    steps_per_call: int | None
    seed_axes: tuple[int | None, ...] | None

    def feed(self, seed: int | np.ndarray, start: int, stop: int) -> Feed:
        """Returns the data of the steps from `start` until before `stop`, for a seed or several."""

    def on_device(
        self, data: Any, seed: jax.Array, step: jax.Array
    ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        """Returns step -> this device's (images float32, labels), for `step` and as many steps
        after it as `steps_per_call` allows.

        Args:
          data: what `feed` has for `step`, in a mapped function.
        """


@runtime_checkable
class EvalBatches(Protocol):
    """All batches of a split, in its order, the last one filled up.

    Attributes:
      sharded: whether each device gets its own part of a batch, instead of the whole split.
      examples: number of images in the split.
    """

    sharded: bool
    examples: int

    def __iter__(self) -> Iterator[Any]:
        """Yields what `on_device` takes, a batch at a time."""

    def on_device(self, data: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns this device's images float32, labels, and two (B,) bool: which images count, and
        which of the others stand for images that were left out."""


@runtime_checkable
class Dataset(Protocol):
    """Named splits of labelled images: "train", "test" and, unless nothing is held out, "val".

    Attributes:
      classes: class names; a label is an index into them.
      sizes: the number of images in each split.
      records: the sizes before any image was left out.
      skipped: for each split, the indices of records that can't be read and were left out.
    """

    classes: tuple[str, ...]
    sizes: Mapping[str, int]
    records: Mapping[str, int]
    skipped: Mapping[str, set[int]]

    def first_images(self, split: str, count: int) -> np.ndarray:
        """Returns the first images of a split, (at most count, H, W, C) uint8."""

    def train_batches(
        self,
        devices: Devices,
        batch_size: int,
        scale: float,
        augmentation: Mapping[str, Any] | None,
    ) -> TrainBatches:
        """Returns the batches of "train"; `batch_size` is over all devices, pixels are divided by
        `scale`, and the options of `augmentation` are those of `augment.augment`."""

    def eval_batches(
        self, devices: Devices, split: str, batch_size: int, scale: float
    ) -> EvalBatches:
        """Returns the batches of a split; `batch_size` is over all devices, and rounded up to a
        multiple of their number."""
