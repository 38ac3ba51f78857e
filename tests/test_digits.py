"""The digits are scikit-learn's, and so is how they are split."""

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split

from aim_flax.data.digits import load_digits


def test_digits_are_those_of_scikit_learn():
    digits = datasets.load_digits()
    labels, whole = digits.target, np.arange(len(digits.target))
    options = dict(random_state=0, shuffle=True)
    rest, test = train_test_split(whole, test_size=360, stratify=labels, **options)
    train, val = train_test_split(rest, test_size=180, stratify=labels[rest], **options)
    found = load_digits()
    assert found.classes == tuple(map(str, digits.target_names))
    assert found.splits.keys() == {"train", "val", "test"}
    for name, part in {"train": train, "val": val, "test": test}.items():
        split = found.splits[name]
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(split.images[..., 0], digits.images[part])
        np.testing.assert_array_equal(split.labels, labels[part])
