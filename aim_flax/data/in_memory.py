"""Datasets whose pixels live on the device; batches are gathered inside the compiled step."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aim_flax.data.augment import augment
from aim_flax.data.order import epoch_order, steps_per_epoch
from aim_flax.devices import AXIS, Devices
from aim_flax.keys import augment_key, data_key


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, H, W, C) uint8 and labels (N,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A `dataset.Dataset` of decoded images."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    skipped: Mapping[str, set[int]] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(split) for name, split in self.splits.items()}

    @property
    def records(self) -> dict[str, int]:
        return {name: size + len(self.skipped.get(name, ())) for name, size in self.sizes.items()}

    def first_images(self, split: str, count: int) -> np.ndarray:
        return self.splits[split].images[:count]

    def train_batches(
        self,
        devices: Devices,
        batch_size: int,
        scale: float,
        augmentation: Mapping[str, Any] | None,
    ) -> "TrainBatches":
        return TrainBatches(self.splits["train"], devices, batch_size, scale, augmentation)

    def eval_batches(
        self, devices: Devices, split: str, batch_size: int, scale: float
    ) -> "EvalBatches":
        return EvalBatches(self.splits[split], devices, batch_size, scale)


class TrainBatches:
    """`dataset.TrainBatches` that each device takes from the whole split."""

    sharded = False
    steps_per_call = None
    seed_axes = (None, None, 0)

    def __init__(
        self,
        split: Split,
        devices: Devices,
        batch_size: int,
        scale: float,
        augmentation: Mapping[str, Any] | None,
    ):
        self._split, self._devices = split, devices
        self._batch_size, self._local = batch_size, batch_size // devices.count
        self._scale, self._augmentation = scale, augmentation

    def feed(self, seed: int | np.ndarray, start: int, stop: int) -> "Feed":
        return Feed(self._devices, self._split, self._batch_size, seed)

    def on_device(self, data: Any, seed: jax.Array, step: jax.Array) -> Callable:
        images, labels, order = data
        epoch_steps = steps_per_epoch(len(labels), self._batch_size)
        first = jax.lax.axis_index(AXIS) * self._local

        def batch(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            start = step % epoch_steps * self._batch_size + first
            indices = jax.lax.dynamic_slice_in_dim(order, start, self._local)
            batch_images = images[indices]
            if self._augmentation is not None:
                key = augment_key(seed, step)
                batch_images = augment(batch_images, key, first, self._augmentation)
            return batch_images.astype(jnp.float32) / self._scale, labels[indices]

        return batch


class Feed:
    """The training split on the devices, with the order of an epoch for each seed."""

    def __init__(self, devices: Devices, split: Split, batch_size: int, seed: int | np.ndarray):
        self._devices, self._seed = devices, np.asarray(seed, np.uint32)
        self._data = devices.replicate((split.images, split.labels))
        self._epoch_steps = steps_per_epoch(len(split), batch_size)
        self._epoch = None

        def order_of(seed: jax.Array, epoch: int) -> jax.Array:
            return epoch_order(data_key(seed), epoch, len(split))

        # Not within the training step: on a CPU sorting 50,000 keys takes longer than a small step.
        self._order_of = jax.jit(
            jax.vmap(order_of, in_axes=(0, None)) if self._seed.ndim else order_of
        )

    def at(self, step: int) -> Any:
        """Returns what `on_device` takes for this step, and those after it in its epoch."""
        epoch = step // self._epoch_steps
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self._devices.replicate(self._order_of(self._seed, epoch))
        return (*self._data, self._order)

    def close(self) -> None:
        """Nothing to end; a streamed feed has threads."""


class EvalBatches:
    """`dataset.EvalBatches` that each device takes from the whole split."""

    sharded = False

    def __init__(self, split: Split, devices: Devices, batch_size: int, scale: float):
        self._local = -(-batch_size // devices.count)
        self.examples, self._scale = len(split), scale
        data = devices.replicate((split.images, split.labels))
        starts = range(0, len(split), self._local * devices.count)
        self._data = [(*data, devices.replicate(np.int32(start))) for start in starts]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)

    def on_device(self, data: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        images, labels, start = data
        indices = start + jax.lax.axis_index(AXIS) * self._local + jnp.arange(self._local)
        counted = indices < self.examples
        indices %= self.examples
        images = images[indices].astype(jnp.float32) / self._scale
        return images, labels[indices], counted, jnp.zeros_like(counted)
