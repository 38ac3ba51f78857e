"""What a dataset gives to training and evaluation, in memory or streamed."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from aim_flax.data.augment import roll_in_evaluation
from aim_flax.data.balance import BalancedOrder
from aim_flax.data.fingerprint import Fingerprint
from aim_flax.data.scaling import Scaling
from aim_flax.devices import Devices
from aim_flax.keys import data_key


@runtime_checkable
class Feed(Protocol):
    """The data of a run's training steps."""

    def at(self, step: int) -> Any:
        """Returns what `TrainBatches.on_device` takes for this step; steps come in order."""

    def close(self) -> None:
        """Ends the threads, if there are any."""


@dataclasses.dataclass(eq=False)
class TrainBatches(abc.ABC):
    """The training split's batches, a function of (seed, step).

    Attributes:
      batch_size: over all devices.
      scale: from pixels to what the network gets.
      augmentation: the options of `augment.augment`.
      balanced: whether all classes come equally often; else all images do.
      sharded: whether each device gets its own part of a batch, instead of the whole split.
      steps_per_call: for how many steps the data of one step can be used; None: for its epoch.
      seed_axes: for each part of the data of several seeds, its axis of seeds, or None where they
        share it; None: a feed is of one seed.
      examples, epoch_steps: images in the split, and whole batches in an epoch; each epoch leaves
        out other images.
    """

    dataset: "Dataset"
    devices: Devices
    batch_size: int
    scale: Scaling
    augmentation: Mapping[str, Any] | None
    balanced: bool = False
    sharded: ClassVar[bool]
    steps_per_call: ClassVar[int | None]
    seed_axes: ClassVar[tuple[int | None, ...] | None]

    def __post_init__(self):
        self.examples = self.dataset.sizes["train"]
        self.epoch_steps = self.examples // self.batch_size
        self._balanced = BalancedOrder(self.dataset.labels("train")) if self.balanced else None

    def order(self, seed: jax.Array | int, epoch: jax.Array | int) -> jax.Array:
        """Returns the order, (examples,) int32, in which an epoch visits the training split."""
        key = jax.random.fold_in(data_key(seed), epoch)
        if self._balanced is not None:
            return self._balanced(key)
        return jax.random.permutation(key, self.examples)

    @abc.abstractmethod
    def feed(self, seed: int | np.ndarray, start: int, stop: int) -> Feed:
        """Returns the data of the steps from `start` until before `stop`, for a seed or several."""

    @abc.abstractmethod
    def shapes(self) -> Any:
        """Returns the shapes and dtypes, over all devices, of what a seed's feed has for a step."""

    @abc.abstractmethod
    def on_device(
        self, data: Any, seed: jax.Array, step: jax.Array
    ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        """Returns step -> this device's (images float32, labels), for `step` and as many steps
        after it as `steps_per_call` allows; `data` is what `feed` has for `step`."""


@dataclasses.dataclass(eq=False)
class EvalBatches(abc.ABC):
    """All batches of a split, in its order, the last one filled up.

    Attributes:
      batch_size: over all devices, rounded up to a multiple of their number.
      scale, sharded: as in `TrainBatches`.
      roll: whether images are rolled, see `augment.roll`.
      examples: number of images in the split.
    """

    dataset: "Dataset"
    devices: Devices
    split: str
    batch_size: int
    scale: Scaling
    roll: bool = False
    sharded: ClassVar[bool]

    def __post_init__(self):
        self.batch_size += -self.batch_size % self.devices.count
        self.examples = self.dataset.sizes[self.split]

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yields what `on_device` takes, a batch at a time."""

    @abc.abstractmethod
    def on_device(
        self, data: Any, seed: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns this device's images float32, labels, and two (B,) bool: which images count, and
        which of the others stand for images that were left out.

        Args:
          data: a batch.
          seed: of the run, () uint32, which `roll` depends on.
        """

    def _prepared(self, images: jax.Array, seed: jax.Array, indices: jax.Array) -> jax.Array:
        """Returns what the network gets of a batch; `indices` are those of `record_indices`."""
        return self.scale(roll_in_evaluation(images, seed, indices) if self.roll else images)


class Dataset(abc.ABC):
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
    _train_batches: ClassVar[type[TrainBatches]]
    _eval_batches: ClassVar[type[EvalBatches]]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The images by their names and sizes, those that were left out among them."""
        return self._fingerprint()

    @abc.abstractmethod
    def _fingerprint(self) -> Fingerprint: ...

    @abc.abstractmethod
    def first_images(self, split: str, count: int) -> np.ndarray:
        """Returns the first images of a split, (at most count, H, W, C) uint8."""

    @abc.abstractmethod
    def image(self, split: str, index: int) -> np.ndarray:
        """Returns an image of a split that was not left out, (H, W, C) uint8."""

    @abc.abstractmethod
    def labels(self, split: str) -> np.ndarray:
        """Returns the labels of a split, (N,) int32, without decoding any image."""

    def record_indices(self, split: str) -> np.ndarray:
        """Returns the index of each image of a split, (N,) int32, among all of its records: those
        that were left out are counted, whether images are decoded at once or not."""
        return np.arange(self.records[split], dtype=np.int32)

    @abc.abstractmethod
    def name(self, split: str, index: int) -> str:
        """Returns a name by which a person finds an image, for example its path."""

    def train_batches(
        self,
        devices: Devices,
        batch_size: int,
        scale: Scaling,
        augmentation: Mapping[str, Any] | None,
        balanced: bool = False,
    ) -> TrainBatches:
        """Returns the batches of "train"."""
        return self._train_batches(self, devices, batch_size, scale, augmentation, balanced)

    def eval_batches(
        self,
        devices: Devices,
        split: str,
        batch_size: int,
        scale: Scaling,
        roll: bool = False,
    ) -> EvalBatches:
        """Returns the batches of a split; `batch_size` is rounded up as `EvalBatches` says."""
        return self._eval_batches(self, devices, split, batch_size, scale, roll)
