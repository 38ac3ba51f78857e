"""From a record to pixels and a label, and what becomes of records that can't be read."""

import sys
from collections.abc import Iterable

import numpy as np

from aim_flax.data.images import FITS, WHOLE, ImageError, Region, load
from aim_flax.data.records import EncodedDataset, Records
from aim_flax.errors import DataError, check_choice

ON_ERROR = ("stop", "skip")
# Of a split: more damage than that is no accident that a result survives.
MOST_SKIPPED = 0.01


class Reader:
    """Reads the records of a dataset at one size; may be used from several threads.

    Attributes:
      dataset: the records.
      shape: (H, W, C) of the images.
      skipped: for each split, the indices of the records that were left out.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        shape: tuple[int, int, int],
        fit: str = "stretch",
        on_error: str = "stop",
    ):
        """`fit` is that of `images.load`; `on_error`: "stop", or "skip" damaged images.

        Raises:
          UsageError: another word for either.
        """
        check_choice("data.fit", fit, FITS)
        check_choice("data.on_error", on_error, ON_ERROR)
        self.dataset, self.shape = dataset, shape
        self.skipped: dict[str, set[int]] = {name: set() for name in dataset.splits}
        self._fit, self._stop = fit, on_error == "stop"
        self._reasons: dict[tuple[str, int], str] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(records) for name, records in self.dataset.splits.items()}

    def read(self, split: str, index: int, region: Region = WHOLE) -> tuple[np.ndarray, int] | None:
        """Returns an image, (H, W, C) uint8, and its label; None for one that is to be skipped.

        Raises:
          DataError: the record can't be read and isn't to be skipped, or its label is none of the
            dataset's; the message names it.
        """
        records: Records = self.dataset.splits[split]
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
        classes = len(self.dataset.classes)
        if not 0 <= label < classes:
            raise DataError(
                f"{records.name(index)} has the label {label}, expected 0 to {classes - 1}"
            )
        return pixels, int(label)

    def skip(self, split: str, indices: Iterable[int]) -> None:
        """Counts records as left out, and says so once.

        Raises:
          DataError: they have become more than 1 % of the split.
        """
        skipped, total = self.skipped[split], len(self.dataset.splits[split])
        for index in sorted(set(indices) - skipped):
            skipped.add(index)
            print(f"left out: {self._reasons[split, index]}", file=sys.stderr, flush=True)
        if len(skipped) > MOST_SKIPPED * total:
            raise DataError(
                f"{len(skipped)} of {total:,} images of the split {split!r} can't be read, more"
                f" than {MOST_SKIPPED:.0%}; the last one: {self._reasons[split, max(skipped)]}"
            )
