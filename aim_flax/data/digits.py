"""The handwritten digits that come with scikit-learn: no download."""

import numpy as np

from aim_flax.data.in_memory import InMemory, Split
from aim_flax.data.records import SEED

_TEST_SIZE, _VAL_SIZE = 360, 180


def load_digits() -> InMemory:
    """Returns 1,797 scans of 8x8 pixels, values 0 to 16, stratified 1,257 / 180 / 360.

    Source: the part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI,
    1998), that comes with scikit-learn.
    """
    # Imported here because it takes a second, and only this dataset needs it.
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    labels = digits.target.astype(np.int32)
    stratify = dict(random_state=SEED, shuffle=True)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST_SIZE, stratify=labels, **stratify
    )
    train, val = train_test_split(rest, test_size=_VAL_SIZE, stratify=labels[rest], **stratify)
    images = digits.images.astype(np.uint8)[..., None]
    splits = {
        name: Split(images[indices], labels[indices])
        for name, indices in (("train", train), ("val", val), ("test", test))
    }
    return InMemory(tuple(str(c) for c in digits.target_names), splits)
