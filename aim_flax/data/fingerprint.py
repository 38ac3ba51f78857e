"""Which images a dataset has, known by their names and sizes: none of them is read."""

import base64
import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aim_flax.data.records import Records

_CHUNK = 1024  # images per task of a thread
_MARK = np.dtype("<u4")


@dataclasses.dataclass(frozen=True, eq=False)
class Fingerprint:
    """The images of a dataset.

    Attributes:
      classes: class names; a label is an index into them.
      marks: for each split, (N,) uint32, a checksum of each image's mark, see `records.Records`.
    """

    classes: tuple[str, ...]
    marks: Mapping[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` makes it from again: classes, and per split the number of images
        and their marks in base64."""
        splits = {
            name: {
                "images": len(marks),
                "marks": base64.b64encode(marks.astype(_MARK).tobytes()).decode(),
            }
            for name, marks in self.marks.items()
        }
        return {"classes": list(self.classes), "splits": splits}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Fingerprint":
        marks = {
            name: np.frombuffer(base64.b64decode(split["marks"]), _MARK)
            for name, split in content["splits"].items()
        }
        return cls(tuple(content["classes"]), marks)


@dataclasses.dataclass(frozen=True)
class Change:
    """What differs between the images that a split had and those that it has.

    Attributes:
      new: how many it has that it had not.
      gone: how many it had that it has no more.
      images: how many it has.
    """

    new: int
    gone: int
    images: int


def of_records(
    classes: tuple[str, ...], splits: Mapping[str, Records], threads: int = 1
) -> Fingerprint:
    """Returns the fingerprint of encoded images; `threads` ask for their sizes."""

    def marks(records: Records) -> np.ndarray:
        def some(start: int) -> list[int]:
            stop = min(start + _CHUNK, len(records))
            return [zlib.crc32(records.mark(i)) for i in range(start, stop)]

        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(some, range(0, len(records), _CHUNK)))
        return np.array([mark for part in found for mark in part], _MARK)

    return Fingerprint(classes, {name: marks(records) for name, records in splits.items()})


def of_pixels(
    classes: tuple[str, ...], splits: Mapping[str, Iterable[tuple[np.ndarray, Any]]]
) -> Fingerprint:
    """Returns the fingerprint of images that have no names: (pixels, label) of each."""
    marks = {
        name: [zlib.crc32(np.ascontiguousarray(pixels), int(label)) for pixels, label in split]
        for name, split in splits.items()
    }
    return Fingerprint(classes, {name: np.array(found, _MARK) for name, found in marks.items()})


def taken_over(there: Fingerprint, here: Fingerprint, split: str, of: str) -> int:
    """Returns how many images of a split are new to it, and were in the split `of` before."""
    marks = {name: there.marks.get(name, np.empty(0, _MARK)) for name in (split, of)}
    new = here.marks[split][~np.isin(here.marks[split], marks[split])]
    return int(np.isin(new, marks[of]).sum())


def changes(there: Fingerprint, here: Fingerprint) -> dict[str, Change]:
    """Returns the change of each split that differs, in whatever order its images are."""
    found = {}
    for name in dict.fromkeys([*there.marks, *here.marks]):
        old, new = (side.marks.get(name, np.empty(0, _MARK)) for side in (there, here))
        marks, places = np.unique(np.concatenate([old, new]), return_inverse=True)
        times_old, times_new = (
            np.bincount(part, minlength=len(marks))
            for part in (places[: len(old)], places[len(old) :])
        )
        surplus = times_new - times_old
        if surplus.any():
            counts = (int(surplus.clip(0).sum()), int((-surplus).clip(0).sum()))
            found[name] = Change(*counts, len(new))
    return found
