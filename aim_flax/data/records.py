"""A dataset of encoded images, wherever its files are."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

# Which examples are in which split, and in which order, never depends on a run's seed, so that runs
# can be compared.
SEED = 0


class Records(Protocol):
    """A split of encoded images with random access; its methods may be called from threads."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns an encoded image (JPEG, PNG, WebP, ...) and its label."""

    def label(self, index: int) -> int:
        """Returns the label alone."""

    def name(self, index: int) -> str:
        """Returns a name by which a person finds the record, for example its path."""

    def mark(self, index: int) -> bytes:
        """Returns what tells the record from others without reading it: its name and size."""


@dataclasses.dataclass(frozen=True)
class Subset:
    """The records of a split with these indices, (N,) int, in this order."""

    records: Records
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.records.read(int(self.indices[index]))

    def label(self, index: int) -> int:
        return self.records.label(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.records.name(int(self.indices[index]))

    def mark(self, index: int) -> bytes:
        return self.records.mark(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class EncodedDataset:
    """Named splits of encoded images.

    Attributes:
      classes: class names; a label is an index into them.
      splits: "train", "test" and, unless nothing is held out, "val".
      passed_over: how many files and folders of each kind are no images of it.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Records]
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)


def hold_out(
    labels: np.ndarray, fraction: float, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples in two, with the same fraction of each class.

    Args:
      labels: (N,) int; all equal if the classes aren't known.
      fraction: of each class that is held out, rounded; a class keeps at least one example.

    Returns:
      The indices to keep and the indices to hold out, each sorted.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    starts = np.cumsum(np.unique(labels, return_counts=True)[1])[:-1]
    for members in np.split(np.argsort(labels, kind="stable"), starts):
        count = min(round(fraction * len(members)), len(members) - 1)
        held[rng.permutation(members)[: max(0, count)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
