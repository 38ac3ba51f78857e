"""The handwritten digits that come with scikit-learn: no download."""

from importlib.metadata import distribution
from pathlib import Path

import numpy as np

from aim_flax.data.in_memory import InMemory, Split

# Read without scikit-learn, which takes seconds to import.
_IMAGES = "sklearn/datasets/data/digits.csv.gz"
# (1797,) uint16, the numbers of the images of train, then val, then test, each in its order: as
# scikit-learn's train_test_split draws them, stratified, with random_state 0. First test from all,
# then val from the rest; tests/test_digits.py does so.
_ORDER = Path(__file__).with_name("digits_order.npy")
_SIZES = {"train": 1257, "val": 180, "test": 360}


def load_digits() -> InMemory:
    """Returns 1,797 scans of 8x8 pixels, values 0 to 16, stratified 1,257 / 180 / 360.

    Source: the part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI,
    1998), that comes with scikit-learn.
    """
    file = distribution("scikit-learn").locate_file(_IMAGES)
    # A line for each image: its pixels and its class.
    rows = np.loadtxt(file, np.uint8, delimiter=",")
    images, labels = rows[:, :-1].reshape(-1, 8, 8, 1), rows[:, -1].astype(np.int32)
    parts = np.split(np.load(_ORDER), np.cumsum(list(_SIZES.values()))[:-1])
    splits = {
        name: Split(images[part], labels[part]) for name, part in zip(_SIZES, parts, strict=True)
    }
    return InMemory(tuple("0123456789"), splits)
