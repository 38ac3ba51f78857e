"""Datasets whose images the host reads, decodes and augments while the devices compute.

Batches are the same function of (seed, step) for any number of threads, devices and hosts, in the
order of `in_memory.py`. The pipeline is Grain's (google/grain).
"""

import collections
import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aim_flax.data import augment_host
from aim_flax.data.augment import augment
from aim_flax.data.augment_host import Change
from aim_flax.data.images import FITS, WHOLE, ImageError, Region, load
from aim_flax.data.order import epoch_order, steps_per_epoch
from aim_flax.data.records import EncodedDataset
from aim_flax.devices import AXIS, Devices
from aim_flax.errors import DataError, check_choice
from aim_flax.keys import augment_key, data_key

# Batches that wait on the host, and those already on the devices.
_HOST_BUFFER, _DEVICE_BUFFER = 8, 2
ON_ERROR = ("stop", "skip")
# The share of a split that may be left out; with more damage a result is worth little.
MOST_SKIPPED = 0.01


class Streamed:
    """A `dataset.Dataset` of images that stay encoded.

    Attributes:
      shape: (H, W, C) of the images.
      threads: number of threads that read.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        shape: tuple[int, int, int],
        threads: int,
        fit: str = "stretch",
        on_error: str = "stop",
    ):
        """`fit` is that of `images.load`; `on_error`: "stop", or "skip" damaged images.

        Raises:
          UsageError: `fit` or `on_error` is something else.
        """
        check_choice("data.fit", fit, FITS)
        check_choice("data.on_error", on_error, ON_ERROR)
        self.classes, self.shape, self.threads = dataset.classes, shape, threads
        self.sizes = {name: len(records) for name, records in dataset.splits.items()}
        # What can't be read is replaced in training and left out in evaluation.
        self.records = self.sizes
        self.skipped: dict[str, set[int]] = {name: set() for name in dataset.splits}
        self._splits, self._fit, self._stop = dataset.splits, fit, on_error == "stop"
        self._reasons: dict[tuple[str, int], str] = {}

    def first_images(self, split: str, count: int) -> np.ndarray:
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

    def read_one(
        self, split: str, index: int, region: Region = WHOLE
    ) -> tuple[np.ndarray, int] | None:
        """Returns an image, (H, W, C) uint8, and its label; None for one that is to be skipped.

        May be called from several threads.

        Raises:
          DataError: the record can't be read and isn't to be skipped, or the dataset has no such
            label; the message names the record.
        """
        records = self._splits[split]
        try:
            encoded, label = records.read(index)
            pixels = load(encoded, self.shape, region, self._fit)
        except (ImageError, OSError) as error:
            why = str(error) if isinstance(error, ImageError) else f"can't be read: {error}"
            reason = f"{records.name(index)} {why}"
            if self._stop:
                message = f"{reason} (data.on_error=skip leaves such images out)"
                raise DataError(message) from None
            self._reasons[split, index] = reason
            return None
        classes = len(self.classes)
        if not 0 <= label < classes:
            raise DataError(
                f"{records.name(index)} has the label {label}, expected 0 to {classes - 1}"
            )
        return pixels, int(label)

    def skip(self, split: str, indices: Iterable[int]) -> None:
        """Counts records as left out, and says so once for each.

        Raises:
          DataError: more than 1 % of the split are left out.
        """
        skipped, total = self.skipped[split], self.sizes[split]
        for index in sorted(set(indices) - skipped):
            skipped.add(index)
            print(f"left out: {self._reasons[split, index]}", file=sys.stderr, flush=True)
        if len(skipped) > MOST_SKIPPED * total:
            raise DataError(
                f"{len(skipped)} of {total:,} images of the split {split!r} can't be read, more"
                f" than {MOST_SKIPPED:.0%}; the last one: {self._reasons[split, max(skipped)]}"
            )

    def read(
        self, split: str, order: np.ndarray, position: int, change: Change | None = None
    ) -> dict[str, np.ndarray]:
        """Reads the record at a position of an order.

        Returns:
          images: (H, W, C) uint8 and labels: () int32; of the next readable record if this one
          can't be read. skipped: () int64, the index of this record in that case, otherwise -1.
        """
        skipped = -1
        for index in itertools.chain(order[position:], order[:position]):
            found = self.read_one(split, int(index), change.region if change else WHOLE)
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
        # Imported here because it takes seconds, which decoding all images doesn't need.
        import grain

        pipeline = grain.MapDataset.range(positions.start, positions.stop).map(record).batch(size)
        options = grain.ReadOptions(self.threads, prefetch_buffer_size=_HOST_BUFFER)
        iterator = iter(pipeline.to_iter_dataset(options))
        try:
            for batch in iterator:
                skipped = batch.pop("skipped")
                self.skip(split, skipped[skipped >= 0].tolist())
                yield batch
        finally:
            iterator.close()


class TrainBatches:
    """`dataset.TrainBatches` that the host makes."""

    sharded = True
    steps_per_call = 1
    seed_axes = None

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
    """`dataset.EvalBatches` that the host makes."""

    sharded = True

    def __init__(
        self, dataset: Streamed, devices: Devices, split: str, batch_size: int, scale: float
    ):
        self._dataset, self._devices, self._split = dataset, devices, split
        self._batch_size = -(-batch_size // devices.count) * devices.count
        self.examples, self._scale = dataset.sizes[split], scale

    def __iter__(self) -> Generator[Any]:
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
