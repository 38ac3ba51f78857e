"""The quick max pooling is flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax.layers.pooling import max_pool
from tests.arrays import draw

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("padding", ["VALID", "SAME", [(1, 1), (1, 1)], [(0, 1), (1, 0)]])
@pytest.mark.parametrize(
    ("window", "strides"), [((3, 3), (2, 2)), ((2, 2), (2, 2)), ((2, 3), (1, 3)), ((2, 2), (3, 3))]
)
@pytest.mark.parametrize("size", [(9, 8), (1, 4)])
def test_outputs_and_gradients_are_flaxs(window, strides, padding, size):
    # Whole numbers, so that windows have several that are the largest, and sums are exact.
    x = jnp.round(2 * jnp.asarray(draw(2, *size, 3)))

    def run(pool):
        y, pullback = jax.vjp(lambda x: pool(x, window, strides, padding), x)
        return y, *pullback(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))

    for ours, theirs in zip(
        jax.jit(run, static_argnums=0)(max_pool), run(nn.max_pool), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
