"""The quick batch norm is flax's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax.layers.batch_norm import BatchNorm
from tests.arrays import draw, random_variables
from tests.asserts import assert_close

pytestmark = pytest.mark.usefixtures("quick_compile", "standard_promotion")


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_outputs_gradients_and_statistics_are_flaxs(running, dtype):
    x = jnp.asarray(3 + 2 * draw(5, 4, 3, 6), dtype or jnp.float32)
    options = dict(use_running_average=running, momentum=0.9, epsilon=1e-3, dtype=dtype)
    results, variables = [], random_variables(nn.BatchNorm(**options), x)
    for norm in (BatchNorm(**options), nn.BatchNorm(**options)):

        @jax.jit
        def run(params, x, norm=norm):
            def loss(params, x):
                y, state = norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])
                return jnp.sin(y.astype(jnp.float32)).sum(), (y, state)

            return jax.grad(loss, (0, 1), has_aux=True)(params, x)

        results.append(run(variables["params"], x))
        shapes = jax.eval_shape(norm.init, jax.random.key(0), x)
        assert jax.tree.map(lambda a, b: a.dtype == b.dtype, shapes, variables)
    dtypes = [jax.tree.map(lambda leaf: str(leaf.dtype), result) for result in results]
    assert dtypes[0] == dtypes[1]
    floats = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), result) for result in results]
    assert_close(*floats, 1e-5 if dtype is None else 2e-2)
    moved = results[0][1][1]["batch_stats"]["mean"] != variables["batch_stats"]["mean"]
    assert moved.all() == (not running)


@pytest.mark.slow
def test_statistics_are_those_of_all_devices():
    x = jnp.asarray(draw(4, 3, 3, 2))
    one, many = (BatchNorm(use_running_average=False, axis_name=axis) for axis in (None, "batch"))
    variables = random_variables(one, x)
    apply = partial(many.apply, variables, mutable=["batch_stats"])
    y, state = jax.vmap(apply, axis_name="batch")(x.reshape(2, 2, 3, 3, 2))
    expected, expected_state = one.apply(variables, x, mutable=["batch_stats"])
    assert_close(y.reshape(x.shape), expected)
    assert_close(jax.tree.map(lambda leaf: leaf[1], state), expected_state)
