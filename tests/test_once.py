"""Gradients that are computed once: equal, and once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax.layers.batch_norm import BatchNorm
from aim_flax.layers.depthwise import depthwise_taps
from aim_flax.layers.once import gradient_once


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_as_they_were(dtype):
    """To the bit, below zero and above one, infinite and undefined."""
    changes = jnp.asarray(
        [-jnp.inf, -3e5, -0.25, -0.0, 0.0, 0.3, 1.0, 7.0, jnp.inf, jnp.nan], dtype
    )
    y, pullback = jax.vjp(gradient_once, changes)
    (found,) = jax.jit(pullback)(changes)
    assert y is changes
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), changes.astype(jnp.float32))
    assert np.signbit(found[3])
    assert not np.signbit(found[4])


def test_what_lies_behind_a_batch_norm_is_computed_once():
    """Of a depthwise convolution behind it, whose change the norm needs in three places."""
    x, kernel = jnp.ones((4, 16, 16, 8)), jnp.ones((3, 3, 1, 8))
    norm = BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)

    def operations(kept) -> float:
        def loss(x: jax.Array) -> jax.Array:
            y = kept(norm.apply(variables, x, mutable=["batch_stats"])[0])
            options = dict(feature_group_count=8, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.square(depthwise_taps(y, kernel, (1, 1), "SAME", **options)).sum()

        return jax.jit(jax.grad(loss)).lower(x).compile().cost_analysis()["flops"]

    taps = 2 * 9 * x.size
    assert operations(lambda y: y) - operations(gradient_once) > 1.5 * taps
