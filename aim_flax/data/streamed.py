"""Datasets whose images are read, decoded and moved by the host while the devices compute.

Batches are the same function of (seed, step) whatever the number of threads, devices and hosts;
their order is that of `in_memory.py`. The pipeline is Grain's (google/grain).
"""

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Mapping
from functools import lru_cache
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from aim_flax.data import augment_host
from aim_flax.data.augment import augment
from aim_flax.data.augment_host import Change
from aim_flax.data.images import WHOLE
from aim_flax.data.order import epoch_order, steps_per_epoch
from aim_flax.data.reading import Reader
from aim_flax.devices import AXIS, Devices
from aim_flax.errors import DataError
from aim_flax.keys import augment_key, data_key

# Batches that wait on the host, and those already on the devices.
_HOST_BUFFER, _DEVICE_BUFFER = 8, 2


class Streamed:
    """Named splits of images that stay encoded.

    Attributes:
      classes: class names; a label is an index into them.
      skipped: for each split, the indices of records that can't be read and were left out.
    """

    def __init__(self, reader: Reader, threads: int):
        self._reader, self._threads = reader, threads
        self.classes = reader.classes
        self.skipped = reader.skipped

    @property
    def sizes(self) -> dict[str, int]:
        return self._reader.sizes

    @property
    def records(self) -> dict[str, int]:
        """The same: what can't be read is replaced in training, and left out in evaluation."""
        return self.sizes

    def first_images(self, split: str, count: int) -> np.ndarray:
        """Returns the first images of a split, (at most count, H, W, C) uint8."""
        order = np.arange(self.sizes[split])
        images = [self.read(split, order, i)["images"] for i in range(min(count, len(order)))]
        return np.stack(images)

    def train_batches(
        self,
        devices: Devices,
        batch_size: int,
        scale: float,
        augmentation: Mapping[str, Any] | None,
    ) -> "TrainBatches":
        return TrainBatches(self, devices, batch_size, scale, augmentation)

    def eval_batches(
        self, devices: Devices, split: str, batch_size: int, scale: float
    ) -> "EvalBatches":
        return EvalBatches(self, devices, split, batch_size, scale)

    def read(
        self, split: str, order: np.ndarray, position: int, change: Change | None = None
    ) -> dict[str, np.ndarray]:
        """Reads the record at a position of an order.

        Returns:
          images: (H, W, C) uint8 and labels: () int32; of the next record that can be read where
          this one can't. skipped: () int64, the index of this one in that case, otherwise -1.
        """
        skipped = -1
        for index in itertools.chain(order[position:], order[:position]):
            found = self._reader.read(split, int(index), change.region if change else WHOLE)
            if found is not None:
                image, label = found
                if change is not None:
                    image = augment_host.apply(image, change)
                return {"images": image, "labels": np.int32(label), "skipped": np.int64(skipped)}
            if skipped < 0:
                skipped = int(index)
        raise DataError(f"no image of the split {split!r} can be read")

    def batches(
        self, split: str, size: int, positions: range, record: Callable[[int], dict[str, Any]]
    ) -> Generator[dict[str, np.ndarray]]:
        """Yields batches of `size` of `record(position)`, read ahead of time by threads."""
        pipeline = grain.MapDataset.range(positions.start, positions.stop).map(record).batch(size)
        options = grain.ReadOptions(self._threads, prefetch_buffer_size=_HOST_BUFFER)
        iterator = iter(pipeline.to_iter_dataset(options))
        try:
            for batch in iterator:
                skipped = batch.pop("skipped")
                self._reader.skip(split, skipped[skipped >= 0].tolist())
                yield batch
        finally:
            iterator.close()


class TrainBatches:
    """The training split's batches, a function of (seed, step).

    Attributes: those of in_memory.TrainBatches.
    """

    sharded = True
    steps_per_call = 1

    def __init__(
        self,
        dataset: Streamed,
        devices: Devices,
        batch_size: int,
        scale: float,
        augmentation: Mapping[str, Any] | None,
    ):
        self._dataset, self._devices = dataset, devices
        self._batch_size, self._scale = batch_size, scale
        self._augmentation = augmentation
        self._examples = dataset.sizes["train"]

    def feed(self, seed: int, start: int, stop: int) -> "Feed":
        """Returns the data of the steps from `start` until before `stop`."""
        rows = self._devices.local_rows(self._batch_size)
        epoch_steps = steps_per_epoch(self._examples, self._batch_size)

        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.asarray(epoch_order(data_key(seed), epoch, self._examples))

        def record(position: int) -> dict[str, Any]:
            step, i = divmod(position, len(rows))
            epoch, step_in_epoch = divmod(step, epoch_steps)
            row = int(rows[i])
            change = None
            if self._augmentation is not None:
                rng = np.random.default_rng((seed, step, row))
                change = augment_host.draw(rng, self._augmentation)
            place = step_in_epoch * self._batch_size + row
            return self._dataset.read("train", order(epoch), place, change)

        positions = range(start * len(rows), stop * len(rows))
        batches = self._dataset.batches("train", len(rows), positions, record)
        return Feed(_put_ahead(batches, self._devices), start)

    def on_device(self, data: Any, seed: jax.Array, step: jax.Array) -> Callable:
        """Returns step -> this device's (images float32, labels), for `step` alone.

        Args:
          data: what `feed` has for `step`, in a mapped function.
        """
        images, labels = data["images"], data["labels"]

        def batch(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            scaled = images
            if self._augmentation is not None:
                first = jax.lax.axis_index(AXIS) * len(labels)
                rest = {"contrast": self._augmentation.get("contrast")}
                scaled = augment(images, augment_key(seed, step), first, rest)
            return scaled.astype(jnp.float32) / self._scale, labels

        return batch


class Feed:
    """The training batches, in turn; threads read ahead of them."""

    def __init__(self, batches: Generator[Any], start: int):
        self._batches, self._next = batches, start

    def at(self, step: int) -> Any:
        """Returns what `on_device` takes for this step, which is the one after the last."""
        if step != self._next:
            raise ValueError(f"step {step} was asked for, expected step {self._next}")
        self._next += 1
        return next(self._batches)

    def close(self) -> None:
        """Ends the threads."""
        self._batches.close()


class EvalBatches:
    """All batches of a split, in its order, the last one filled up.

    Attributes: those of in_memory.EvalBatches.
    """

    sharded = True

    def __init__(
        self, dataset: Streamed, devices: Devices, split: str, batch_size: int, scale: float
    ):
        """`batch_size` is over all devices, and rounded up to a multiple of their number."""
        self._dataset, self._devices, self._split = dataset, devices, split
        self._batch_size = -(-batch_size // devices.count) * devices.count
        self.examples, self._scale = dataset.sizes[split], scale

    def __iter__(self) -> Generator[Any]:
        """Yields what `on_device` takes, a batch at a time."""
        rows = self._devices.local_rows(self._batch_size)
        order = np.arange(self.examples)

        def record(position: int) -> dict[str, Any]:
            batch, i = divmod(position, len(rows))
            index = batch * self._batch_size + int(rows[i])
            found = self._dataset.read(self._split, order, index % self.examples)
            real = index < self.examples
            left_out = found["skipped"] >= 0
            if not real:
                found["skipped"] = np.int64(-1)
            return found | {"counted": real and not left_out, "left_out": real and left_out}

        count = -(-self.examples // self._batch_size) * len(rows)
        batches = self._dataset.batches(self._split, len(rows), range(count), record)
        return _put_ahead(batches, self._devices)

    def on_device(self, data: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns this device's images float32, labels, and two (B,) bool: which of them count,
        and which stand for images that were left out."""
        images = data["images"].astype(jnp.float32) / self._scale
        return images, data["labels"], data["counted"], data["left_out"]


def _put_ahead(
    batches: Generator[dict[str, np.ndarray]], devices: Devices
) -> Generator[dict[str, jax.Array]]:
    """Yields batches from the devices, where the next ones are on their way already."""
    waiting: collections.deque = collections.deque()
    with contextlib.closing(batches):
        for batch in batches:
            waiting.append(devices.shard(batch))
            if len(waiting) > _DEVICE_BUFFER:
                yield waiting.popleft()
        yield from waiting
