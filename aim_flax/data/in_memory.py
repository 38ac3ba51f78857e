"""Datasets whose pixels live on the device; batches are gathered inside the compiled step."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aim_flax.data import dataset, fingerprint
from aim_flax.data.augment import augment
from aim_flax.devices import AXIS
from aim_flax.keys import augment_key


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, H, W, C) uint8 and labels (N,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class TrainBatches(dataset.TrainBatches):
    """Batches that each device takes from the whole split."""

    sharded = False
    steps_per_call = None
    seed_axes = (None, None, 0)

    def feed(self, seed: int | np.ndarray, start: int, stop: int) -> "Feed":
        return Feed(self, seed)

    def shapes(self) -> Any:
        split = self.dataset.splits["train"]
        arrays = (split.images, split.labels, np.empty(self.examples, np.int32))
        return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)

    def on_device(self, data: Any, seed: jax.Array, step: jax.Array) -> Callable:
        images, labels, order = data
        local = self.batch_size // self.devices.count
        first = jax.lax.axis_index(AXIS) * local

        def batch(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            start = step % self.epoch_steps * self.batch_size + first
            indices = jax.lax.dynamic_slice_in_dim(order, start, local)
            batch_images = images[indices]
            if self.augmentation is not None:
                key = augment_key(seed, step)
                batch_images = augment(batch_images, key, first, self.augmentation)
            return self.scale(batch_images), labels[indices]

        return batch


class Feed(dataset.Feed):
    """The training split on the devices, with the order of an epoch for each seed."""

    def __init__(self, batches: TrainBatches, seed: int | np.ndarray):
        split, replicate = batches.dataset.splits["train"], batches.devices.replicate
        self._data = replicate((split.images, split.labels))
        self._epoch_steps, seeds = batches.epoch_steps, np.asarray(seed, np.uint32)
        # Not within the training step: on a CPU sorting 50,000 keys takes longer than a small step.
        order = jax.vmap(batches.order, in_axes=(0, None)) if seeds.ndim else batches.order
        order = jax.jit(order)
        self._order = lru_cache(maxsize=1)(lambda epoch: replicate(order(seeds, epoch)))

    def at(self, step: int) -> Any:
        """Returns what `on_device` takes for this step, and those after it in its epoch."""
        return (*self._data, self._order(step // self._epoch_steps))


class EvalBatches(dataset.EvalBatches):
    """Batches that each device takes from the whole split."""

    sharded = False

    def __post_init__(self):
        super().__post_init__()
        split, replicate = self.dataset.splits[self.split], self.devices.replicate
        records = self.dataset.record_indices(self.split)
        data = replicate((split.images, split.labels, records))
        starts = range(0, self.examples, self.batch_size)
        self._batches = [(*data, replicate(np.int32(start))) for start in starts]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def on_device(
        self, data: Any, seed: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        images, labels, records, start = data
        local = self.batch_size // self.devices.count
        indices = start + jax.lax.axis_index(AXIS) * local + jnp.arange(local)
        counted = indices < self.examples
        indices %= self.examples
        images = self._prepared(images[indices], seed, records[indices])
        return images, labels[indices], counted, jnp.zeros_like(counted)


class InMemory(dataset.Dataset):
    """Decoded images; `splits` are without those that were left out.

    `names` gives a split's names by index; None: an image has only its number.
    """

    _train_batches, _eval_batches = TrainBatches, EvalBatches

    def __init__(
        self,
        classes: tuple[str, ...],
        splits: Mapping[str, Split],
        skipped: Mapping[str, set[int]] | None = None,
        encoded: dataset.Dataset | None = None,
        names: Callable[[str, int], str] | None = None,
    ):
        """`encoded`: the dataset that the images were decoded from, if there is one."""
        self.classes, self.splits, self.skipped = classes, splits, skipped or {}
        self._encoded = encoded
        self.sizes = {name: len(split) for name, split in splits.items()}
        self.records = {n: size + len(self.skipped.get(n, ())) for n, size in self.sizes.items()}
        # Not `skipped`, to which a run that goes on adds those of before.
        left_out = {name: sorted(self.skipped.get(name, ())) for name in splits}
        self._indices = {
            name: np.setdiff1d(np.arange(size, dtype=np.int32), left_out[name])
            for name, size in self.records.items()
        }
        self._names = names or (lambda split, index: f"{split}, image {index}")

    def _fingerprint(self) -> fingerprint.Fingerprint:
        if self._encoded is not None:
            return self._encoded.fingerprint
        pairs = {
            name: zip(split.images, split.labels, strict=True)
            for name, split in self.splits.items()
        }
        return fingerprint.of_pixels(self.classes, pairs)

    def first_images(self, split: str, count: int) -> np.ndarray:
        return self.splits[split].images[:count]

    def image(self, split: str, index: int) -> np.ndarray:
        return self.splits[split].images[index]

    def labels(self, split: str) -> np.ndarray:
        return self.splits[split].labels

    def record_indices(self, split: str) -> np.ndarray:
        return self._indices[split]

    def name(self, split: str, index: int) -> str:
        return self._names(split, index)
