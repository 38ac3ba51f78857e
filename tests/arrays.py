"""Random inputs and variables, and what a network makes of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    """Returns normal numbers, float32."""
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def random_variables(net, *args, seed=0, **kwargs):
    """Returns variables of the network's shapes, all of them random; variances are positive."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype)

    shapes = jax.eval_shape(lambda key: net.init(key, *args, **kwargs), KEY)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def shapes_of(net, height, width=None):
    """Returns the shapes of a network's variables on colour images of a size."""
    images = jax.ShapeDtypeStruct((1, height, width or height, 3), jnp.float32)
    return jax.eval_shape(net.init, KEY, images)


def count(tree) -> int:
    """Returns how many numbers a tree of arrays or shapes has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def paths(variables, collection="params"):
    return set(flatten_dict(variables[collection], sep="/"))


def outputs_and_gradients(net, variables, x):
    """Returns the outputs, and the gradients of a loss in parameters and input."""

    @jax.jit
    def run(params, x):
        def loss(params, x):
            outputs = net.apply({**variables, "params": params}, x)
            return sum(jnp.sin(y).sum() for y in jax.tree.leaves(outputs)), outputs

        gradients, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return outputs, gradients

    return run(variables["params"], x)
