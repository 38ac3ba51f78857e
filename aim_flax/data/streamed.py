"""Datasets whose images the host reads, decodes and augments while the devices compute.

Batches are the same function of (seed, step) for any number of threads, devices and hosts, in the
order of `in_memory.py`. The pipeline is Grain's (google/grain).
"""

import collections
import itertools
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from aim_flax.data import augment_host, dataset, fingerprint
from aim_flax.data.augment import augment
from aim_flax.data.augment_host import UNCHANGED, Change
from aim_flax.data.images import FITS, WHOLE, ImageError, Region, load
from aim_flax.data.records import EncodedDataset
from aim_flax.devices import AXIS, Devices
from aim_flax.errors import DataError, UsageError, check_choice
from aim_flax.keys import augment_key
from aim_flax.names import printable

# Batches that wait on the host, and those already on the devices.
_HOST_BUFFER, _DEVICE_BUFFER = 8, 2
ON_ERROR = ("stop", "skip")
# The share of a split that may be left out; with more damage a result is worth little. One image
# may, however few there are.
MOST_SKIPPED = 0.01


class TrainBatches(dataset.TrainBatches):
    """Batches that the host makes."""

    sharded = True
    steps_per_call = 1
    seed_axes = None

    def feed(self, seed: int, start: int, stop: int) -> "Feed":
        order = lru_cache(maxsize=2)(lambda epoch: np.asarray(self.order(seed, epoch)))

        def record(step: int, row: int) -> dict[str, Any]:
            epoch, step_in_epoch = divmod(step, self.epoch_steps)
            change = UNCHANGED
            if self.augmentation is not None:
                rng = np.random.default_rng((seed, step, row))
                change = augment_host.draw(rng, self.augmentation)
            place = step_in_epoch * self.batch_size + row
            return self.dataset.read("train", order(epoch), place, change)

        which = range(start, stop)
        batches = self.dataset.batches("train", self.devices, self.batch_size, which, record)
        return Feed(batches, start)

    def shapes(self) -> Any:
        shape = (self.batch_size, *self.dataset.shape)
        return {
            "images": jax.ShapeDtypeStruct(shape, np.uint8),
            "labels": jax.ShapeDtypeStruct(shape[:1], np.int32),
        }

    def on_device(self, data: Any, seed: jax.Array, step: jax.Array) -> Callable:
        images, labels = data["images"], data["labels"]

        def batch(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            changed = images
            if self.augmentation is not None:
                first = jax.lax.axis_index(AXIS) * len(labels)
                rest = {name: self.augmentation.get(name) for name in ("contrast", "roll")}
                changed = augment(images, augment_key(seed, step), first, rest)
            return self.scale(changed), labels

        return batch


class Feed(dataset.Feed):
    """The training batches, in turn; threads read ahead of them."""

    def __init__(self, batches: Generator[Any], start: int):
        self._batches, self._next = batches, start

    def at(self, step: int) -> Any:
        if step != self._next:
            raise ValueError(f"step {step} was asked for, expected step {self._next}")
        self._next += 1
        return next(self._batches)

    def close(self) -> None:
        self._batches.close()


class EvalBatches(dataset.EvalBatches):
    """Batches that the host makes."""

    sharded = True

    def __iter__(self) -> Generator[Any]:
        order = np.arange(self.examples)

        def record(batch: int, row: int) -> dict[str, Any]:
            index = batch * self.batch_size + row
            found = self.dataset.read(self.split, order, index % self.examples)
            real = index < self.examples
            left_out = found["skipped"] >= 0
            if not real:
                found["skipped"] = np.int64(-1)
            found["index"] = np.int32(index % self.examples)
            return found | {"counted": real and not left_out, "left_out": real and left_out}

        which = range(-(-self.examples // self.batch_size))
        return self.dataset.batches(self.split, self.devices, self.batch_size, which, record)

    def on_device(
        self, data: Any, seed: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        images = self._prepared(data["images"], seed, data["index"])
        return images, data["labels"], data["counted"], data["left_out"]


class Streamed(dataset.Dataset):
    """Images that stay encoded.

    Attributes:
      shape: (H, W, C) of the images.
      threads: number of threads that read.
    """

    _train_batches, _eval_batches = TrainBatches, EvalBatches

    def __init__(
        self,
        dataset: EncodedDataset,
        shape: tuple[int, int, int],
        threads: int,
        fit: str = "stretch",
        on_error: str = "stop",
        centre: float = 1.0,
    ):
        """`fit` and `centre` are those of `images.load`; `on_error`: "stop", or "skip" damaged
        images."""
        check_choice("data.fit", fit, FITS)
        check_choice("data.on_error", on_error, ON_ERROR)
        if not 0 < centre <= 1:
            raise UsageError(f"data.centre is {centre}, expected a share above 0, at most 1")
        self.classes, self.shape, self.threads = dataset.classes, shape, threads
        self.sizes = {name: len(records) for name, records in dataset.splits.items()}
        # What can't be read is replaced in training and left out in evaluation.
        self.records = self.sizes
        self.skipped: dict[str, set[int]] = {name: set() for name in dataset.splits}
        self._splits, self._fit, self._centre = dataset.splits, fit, centre
        self._stop = on_error == "stop"
        self._reasons: dict[tuple[str, int], str] = {}

    def _fingerprint(self) -> fingerprint.Fingerprint:
        return fingerprint.of_records(self.classes, self._splits, self.threads)

    def first_images(self, split: str, count: int) -> np.ndarray:
        order = np.arange(self.sizes[split])
        return np.stack([self.read(split, order, i)["images"] for i in order[:count]])

    def read_one(
        self, split: str, index: int, region: Region = WHOLE
    ) -> tuple[np.ndarray, int] | None:
        """Returns an image, (H, W, C) uint8, and its label; None for one that is to be skipped.

        May be called from several threads. Raises DataError, which names the record, if it can't be
        read and isn't to be skipped, or the dataset has no such label.
        """
        records = self._splits[split]
        try:
            encoded, label = records.read(index)
            pixels = load(encoded, self.shape, region, self._fit, self._centre)
        except (ImageError, OSError) as error:
            why = str(error) if isinstance(error, ImageError) else f"can't be read: {error}"
            self._reasons[split, index] = reason = printable(f"{records.name(index)} {why}")
            if self._stop:
                raise DataError(f"{reason} (data.on_error=skip leaves such images out)") from None
            return None
        return pixels, self._check_label(split, index, label)

    def _check_label(self, split: str, index: int, label: int) -> int:
        last = len(self.classes) - 1
        if not 0 <= label <= last:
            name = self.name(split, index)
            raise DataError(f"{name} has the label {label}, expected 0 to {last}")
        return int(label)

    def image(self, split: str, index: int) -> np.ndarray:
        return self.read(split, np.array([index]), 0)["images"]

    def labels(self, split: str) -> np.ndarray:
        """As in `Dataset`; raises DataError where a label can't be read."""
        records = self._splits[split]

        def read(index: int) -> int:
            try:
                return self._check_label(split, index, records.label(index))
            except OSError as error:
                raise DataError(f"{self.name(split, index)} can't be read: {error}") from None

        with ThreadPoolExecutor(self.threads) as pool:
            return np.fromiter(pool.map(read, range(len(records))), np.int32, len(records))

    def name(self, split: str, index: int) -> str:
        return self._splits[split].name(index)

    def skip(self, split: str, indices: Iterable[int]) -> None:
        """Counts records as left out, and says so once for each; DataError: more than 1 % are, and
        more than one, or all."""
        skipped, total = self.skipped[split], self.sizes[split]
        reason = ""
        for index in sorted(set(indices) - skipped):
            skipped.add(index)
            reason = self._reasons[split, index]
            print(f"left out: {reason}", file=sys.stderr, flush=True)
        if reason and len(skipped) == total:
            raise DataError(f"no image of the split {split!r} can be read")
        if reason and len(skipped) > max(1, MOST_SKIPPED * total):
            raise DataError(
                f"{len(skipped)} of {total:,} images of the split {split!r} can't be read, more"
                f" than {MOST_SKIPPED:.0%}; the last one: {reason}"
            )

    def read(
        self, split: str, order: np.ndarray, position: int, change: Change = UNCHANGED
    ) -> dict[str, np.ndarray]:
        """Reads the record at a position of an order.

        Returns:
          images: (H, W, C) uint8 and labels: () int32; of the next readable record if this one
          can't be read. skipped: () int64, the index of this record in that case, otherwise -1.
        """
        skipped = -1
        for index in itertools.chain(order[position:], order[:position]):
            found = self.read_one(split, int(index), change.region)
            if found is not None:
                image, label = augment_host.apply(found[0], change), found[1]
                return {"images": image, "labels": np.int32(label), "skipped": np.int64(skipped)}
            if skipped < 0:
                skipped = int(index)
        raise DataError(f"no image of the split {split!r} can be read")

    def batches(
        self,
        split: str,
        devices: Devices,
        size: int,
        which: range,
        record: Callable[[int, int], dict[str, Any]],
    ) -> Generator[dict[str, jax.Array]]:
        """Yields batches of `size` of `record(batch, row)` from the devices.

        Threads read ahead of time, and the next batches are on their way to the devices already.
        """
        # Imported here because it takes seconds, which decoding all images doesn't need.
        import grain

        rows = devices.local_rows(size).tolist()
        records = grain.MapDataset.range(which.start * len(rows), which.stop * len(rows))
        local = records.map(lambda i: record(i // len(rows), rows[i % len(rows)])).batch(len(rows))
        options = grain.ReadOptions(self.threads, prefetch_buffer_size=_HOST_BUFFER)
        iterator = iter(local.to_iter_dataset(options))
        waiting: collections.deque = collections.deque()
        try:
            for batch in iterator:
                skipped = batch.pop("skipped")
                self.skip(split, skipped[skipped >= 0].tolist())
                waiting.append(devices.shard(batch))
                if len(waiting) > _DEVICE_BUFFER:
                    yield waiting.popleft()
            yield from waiting
        finally:
            iterator.close()
