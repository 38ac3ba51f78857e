"""Activations that are computed again: the same numbers, a memory that goes on, and fewer kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory
from aim_flax.train.experiment import Experiment
from aim_flax.train.remat import recomputing
from tests.arrays import draw
from tests.asserts import assert_close, refused
from tests.runs import digits, first_steps

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="dense1")(x)
        x = nn.BatchNorm(not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.relu(nn.Dense(8, name="dense2")(x))


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for i in range(3):
            x = Block(name=f"block{i}")(x, train)
        return nn.Dense(2, name="head")(x)


X = draw(16, 8)
LATCHED = dict(
    memory=Memory((3,), "dense"),
    read="block./dense2|head",
    # Within blocks, after them, and after what is in them: read by what comes next.
    update_after="block0/norm|block1/dense1|block1",
)
NETWORKS = {
    "plain": Blocks(),
    "carried": AiM(Blocks(), **LATCHED, carry="state"),
    "two": AiM(
        AiM(Blocks(), **LATCHED, carry="state"),
        Memory((2,), "noise"),
        read="block./dense1",
        update_after="block0/dense2",
        called="notes",
    ),
    "apart": AiM(Blocks(), **LATCHED, carry="state", per=("block0", "block", "head")),
}


def loss_of(net, pattern):
    """Returns (parameters -> loss, (outputs, new state)), and the initial parameters."""
    variables = jax.jit(net.init)({"params": jax.random.key(0), "memory": jax.random.key(2)}, X)
    mutable = [name for name in variables if name != "params"]
    rngs = {"dropout": jax.random.key(1), "memory": jax.random.key(2)}

    def loss(params):
        with recomputing(pattern):
            y, state = net.apply(
                {**variables, "params": params}, X, train=True, mutable=mutable, rngs=rngs
            )
        return jnp.square(y - 1).mean(), (y, state)

    return loss, variables["params"]


def gradients(net, pattern):
    """Returns the gradients, and (outputs, new state)."""
    loss, params = loss_of(net, pattern)
    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    "network", ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("two", "apart"))]
)
def test_what_is_computed_again_is_the_same(network):
    expected = gradients(NETWORKS[network], "")
    for pattern in ("block.", "block1/.*|block0/norm|memory"):
        found = gradients(NETWORKS[network], pattern)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert_close(found, expected, 1e-6)


def kept(loss, params) -> int:
    """Returns how many numbers are kept for the backward pass."""
    shapes = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(p)[0], params)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("network", ["plain", pytest.param("carried", marks=pytest.mark.slow)])
def test_less_is_kept(network):
    sizes = [kept(*loss_of(NETWORKS[network], p)) for p in ("", "block1", "block.")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < sizes[0] / 2


@pytest.mark.slow
def test_a_run_is_the_same_with_it_on_any_devices():
    changes = ("train.accumulate=2", "train.ema_decay=0.9", "train.epochs=1")
    changes += ("optimizer.name=sgd", "optimizer.weight_decay=None")
    expected, *_, state = first_steps(digits("aim_state", *changes), 1, 3)
    for count, kind in ((1, "pmap"), (2, "shard_map")):
        config = digits("aim_state", *changes, f"parallel={kind}", r"train.remat=layer\d+")
        losses, *_, found = first_steps(config, count, 3)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert_close(found.model_state, state.model_state, 1e-4)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "layr1",
            r"^train.remat 'layr1' matches no module of the network, such as .*'layer1'\?\)$",
        ),
        ("layer", r"^train.remat 'layer' matches no module .*did you mean 'layer"),
        ("layer(", r"^train.remat: 'layer\(' is no regular expression: "),
    ],
)
def test_wrong_patterns_are_refused(pattern, message):
    with refused(message):
        Experiment(digits("aim", f"train.remat={pattern}"), 1)
