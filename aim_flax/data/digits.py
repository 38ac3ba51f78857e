"""The handwritten digits that come with scikit-learn: no download."""

import numpy as np

from aim_flax.data.in_memory import InMemory, Split
from aim_flax.data.records import SEED


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
    whole = np.arange(len(labels))
    rest, test = train_test_split(whole, test_size=360, stratify=labels, **stratify)
    train, val = train_test_split(rest, test_size=180, stratify=labels[rest], **stratify)
    images = digits.images.astype(np.uint8)[..., None]
    indices = {"train": train, "val": val, "test": test}
    splits = {name: Split(images[part], labels[part]) for name, part in indices.items()}
    return InMemory(tuple(map(str, digits.target_names)), splits)
