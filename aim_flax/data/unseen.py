"""A dataset of which nothing but its kind is known: what compiling a training step needs of one."""

import dataclasses

from aim_flax.data.records import EncodedDataset
from aim_flax.data.streamed import Streamed


@dataclasses.dataclass(frozen=True)
class _Unseen:
    """So many images with labels in turn, none of which can be read."""

    images: int
    classes: int

    def __len__(self) -> int:
        return self.images

    def label(self, index: int) -> int:
        return index % self.classes


def unseen(shape: tuple[int, int, int], classes: int, images: int) -> Streamed:
    """Returns a streamed dataset with a training split whose images can't be read.

    Args:
      shape: (H, W, C) of the images.
      classes, images: how many there are.
    """
    names = tuple(map(str, range(classes)))
    return Streamed(EncodedDataset(names, {"train": _Unseen(images, classes)}), shape, threads=1)
