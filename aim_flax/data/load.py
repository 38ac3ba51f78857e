"""From a config to the dataset it names.

What a dataset needs is imported when the dataset is named: OpenCV, Grain and TFDS take seconds to
import, and the embedded digits don't need them.
"""

import copy
import dataclasses
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from aim_flax.config import LEFT_OUT
from aim_flax.data.dataset import Dataset
from aim_flax.data.digits import load_digits
from aim_flax.data.in_memory import InMemory, Split
from aim_flax.data.preprocessing import decoding
from aim_flax.data.records import SEED, EncodedDataset, Subset
from aim_flax.errors import UsageError, nearest
from aim_flax.names import printable

if TYPE_CHECKING:
    from aim_flax.data.streamed import Streamed

_TFDS = "tfds:"
# What was said of passed-over files already: a study opens the same folder again and again.
_said: set[str] = set()


def load_dataset(config: ConfigDict) -> Dataset:
    """Returns the dataset of `config.data`, in memory if it fits there; see `open_dataset`."""
    return decode_if_small(open_dataset(config), config)


def open_dataset(config: ConfigDict) -> Dataset:
    """Returns the dataset of `config.data`; no image is decoded yet.

    Raises:
      UsageError: there is no such dataset, it isn't prepared, or the config doesn't fit it.
    """
    data = config.data
    shape = tuple(data.image_shape)
    if data.name == "digits":
        dataset = load_digits()
        actual = dataset.splits["train"].images.shape[1:]
        if shape != actual:
            raise UsageError(f"data.image_shape is {shape}, but digits has images of {actual}")
        _check_unused(data)
    else:
        if len(shape) != 3 or shape[2] not in (1, 3) or min(shape) < 1:
            raise UsageError(
                f"data.image_shape is {shape}, expected height, width, and 3 channels or 1 (grey)"
            )
        encoded = _mixed(_subset(_read_encoded(data), data.train_images))
        _say_passed_over(data, encoded)
        from aim_flax.data.streamed import Streamed

        how = decoding(data)
        dataset = Streamed(encoded, threads=data.threads, on_error=data.on_error, **how)
    for split in dict.fromkeys(("train", config.eval.select_on, "test")):
        if not dataset.sizes.get(split):
            why = "; data.val_fraction holds out none" if split == "val" else ""
            raise UsageError(f"{data.name} has no images in the split {split!r}{why}")
    return dataset


def decode_if_small(dataset: Dataset, config: ConfigDict) -> Dataset:
    """Returns a dataset with all images decoded, if they take at most `data.in_memory_mb` MiB.

    Raises:
      DataError: an image can't be read.
    """
    if isinstance(dataset, InMemory):
        return dataset
    images = sum(dataset.sizes.values())
    if images * math.prod(dataset.shape) <= config.data.in_memory_mb * 2**20:
        return _decode_all(dataset)
    return dataset


def with_classes(config: ConfigDict, classes: Sequence[str]) -> ConfigDict:
    """Returns the config with `model.num_classes`, where it is None, set to a dataset's.

    Raises:
      UsageError: it is another number, or 1.
    """
    if len(classes) == 1:
        raise UsageError(
            f"{config.data.name} has one class, {classes[0]!r}, expected at least two, to be told"
            " apart"
        )
    if config.model.num_classes is None:
        config = copy.deepcopy(config)
        with config.unlocked():
            config.model.num_classes = len(classes)
    if config.model.num_classes != len(classes):
        raise UsageError(
            f"model.num_classes is {config.model.num_classes}, but {config.data.name} has"
            f" {len(classes)} classes"
        )
    return config


def _read_encoded(data: ConfigDict) -> EncodedDataset:
    if data.name == "folder":
        from aim_flax.data.folder import read_folder

        if not data.dir:
            raise UsageError("data.dir is empty, expected a folder: --config.data.dir=DIR")
        try:
            return read_folder(
                data.dir, data.val_fraction, data.test_fraction, data.get("formats", "usual")
            )
        except UsageError as error:
            if Path(data.dir).expanduser().is_dir():
                raise
            raise UsageError(f"{error}; --config.data.dir=DIR says where it is") from None
    if data.name.startswith(_TFDS):
        from aim_flax.data.tfds_records import read_tfds

        return read_tfds(data.name.removeprefix(_TFDS), data.dir or None, data.val_fraction)
    raise UsageError(
        f"data.name is {data.name!r}, expected digits, folder or {_TFDS}NAME"
        + nearest(data.name, ["digits", "folder"])
    )


def _say_passed_over(data: ConfigDict, dataset: EncodedDataset) -> None:
    """Says once how many files are no images of the dataset, if there are any."""
    if not dataset.passed_over:
        return
    from aim_flax.data.folder import passed_over

    text = f"{data.dir}: passed over {passed_over(dataset)}"
    if text not in _said:
        print(printable(text), file=sys.stderr, flush=True)
    _said.add(text)


def _check_unused(data: ConfigDict) -> None:
    """Raises UsageError if an option that digits have no use for is set."""
    for key, value in data.items():
        unset = LEFT_OUT.get(f"data.{key}")
        used = ("name", "image_shape", "scale", "mean", "deviation")
        if key not in used and value != unset:
            raise UsageError(
                f"data.{key} is {value!r}, but digits have no use for it: leave it {unset!r}"
            )


def _subset(dataset: EncodedDataset, train_images: int | None) -> EncodedDataset:
    """Returns a dataset with this number of training images, the same ones for every run."""
    if train_images is None:
        return dataset
    available = len(dataset.splits["train"])
    if not 1 <= train_images <= available:
        raise UsageError(
            f"data.train_images is {train_images}, expected 1 to {available}, or None for all"
        )
    chosen = np.random.default_rng(SEED).permutation(available)[:train_images]
    train = Subset(dataset.splits["train"], np.sort(chosen))
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": train})


def _mixed(dataset: EncodedDataset) -> EncodedDataset:
    """Returns a dataset whose splits for evaluation are in a random order, always the same.

    A folder's images are sorted by class. In batches of one class, the mean of a batch's memories,
    or the memory of the next image, would reveal the class (`aim_flax.evaluate.interventions`).
    """
    splits = dict(dataset.splits)
    for name, records in splits.items():
        if name != "train":
            order = np.random.default_rng(SEED).permutation(len(records))
            splits[name] = Subset(records, order)
    return dataclasses.replace(dataset, splits=splits)


def _decode_all(dataset: "Streamed") -> InMemory:
    splits, readable = {}, {}
    for name, size in dataset.sizes.items():
        images = np.empty((size, *dataset.shape), np.uint8)
        labels = np.full(size, -1, np.int32)

        def read(i: int, name=name, images=images, labels=labels) -> None:
            if found := dataset.read_one(name, i):
                images[i], labels[i] = found

        with ThreadPoolExecutor(dataset.threads) as pool:
            for _ in pool.map(read, range(size)):
                pass
        readable[name] = np.flatnonzero(labels >= 0)
        if len(readable[name]) < size:
            dataset.skip(name, np.flatnonzero(labels < 0).tolist())
            images, labels = images[readable[name]], labels[readable[name]]
        splits[name] = Split(images, labels)

    def name_of(split: str, index: int) -> str:
        return dataset.name(split, int(readable[split][index]))

    return InMemory(dataset.classes, splits, dataset.skipped, dataset, name_of)
