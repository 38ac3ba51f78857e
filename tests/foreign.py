"""What the tests of foreign networks share: networks in them import nothing of ours."""

import re
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from aim_flax.errors import UsageError

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def random_variables(net, *args, seed=0, **kwargs):
    """Returns variables of the network's shapes, all of them random; variances are positive."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype)

    shapes = jax.eval_shape(lambda key: net.init(key, *args, **kwargs), KEY)
    return jax.tree_util.tree_map_with_path(fill, shapes)


@contextmanager
def refused(message):
    """Expects a UsageError of one line in which the regular expression is found."""
    with pytest.raises(UsageError) as refusal:
        yield
    assert re.search(message, str(refusal.value)), str(refusal.value)
    assert "\n" not in str(refusal.value)


def assert_close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance), found, expected)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
