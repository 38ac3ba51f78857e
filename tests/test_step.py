"""One training step, by hand: its loss, accuracy, gradient and keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from aim_flax.train.step import create_state, train_step
from tests.asserts import assert_close

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


class Probe(nn.Module):
    """A linear layer that keeps what it was called with, and a number drawn from each key."""

    @nn.compact
    def __call__(self, images, train):
        seen = {"train": jnp.float32(train), "batch": jnp.float32(len(images))}
        if train:
            seen |= {name: jax.random.uniform(self.make_rng(name)) for name in self.names}
        for name in ("train", "batch", *self.names):
            self.variable("seen", name, lambda: 0.0).value = seen.get(name, jnp.zeros(()))
        self.sow("intermediates", "noted", images)
        return nn.Dense(3)(images.reshape(len(images), -1))

    names = ("dropout", "memory")


SGD = optax.sgd(0.5)
IMAGES = np.random.default_rng(0).normal(size=(6, 2, 2, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 2, 1, 1], np.int32)


def test_a_new_state_is_of_one_image_in_evaluation():
    state = create_state(Probe(), optax.adam(1e-3), 3, (2, 2, 1))
    assert (int(state.step), float(state.learning_rate_scale)) == (0, 1.0)
    assert set(state.model_state) == {"seen"}
    assert (float(state.model_state["seen"]["train"]), state.model_state["seen"]["batch"]) == (0, 1)
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(state.params)


def test_a_step_is_what_the_formula_says():
    state = create_state(Probe(), SGD, 3, (2, 2, 1)).replace(learning_rate_scale=jnp.float32(0.1))
    after, metrics = train_step(Probe(), SGD, state, IMAGES, LABELS, 3)
    kernel, bias = (np.asarray(state.params["Dense_0"][name]) for name in ("kernel", "bias"))
    flat = IMAGES.reshape(6, 4)
    logits = flat @ kernel + bias
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    # No two of these are equal, so no other comparison has this accuracy.
    assert [np.sum(f(predicted, LABELS)) for f in (np.less, np.equal, np.greater)] == [2, 1, 3]
    assert float(metrics["accuracy"]) == pytest.approx(1 / 6)
    loss = -np.log(shares[range(6), LABELS]).mean()
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    error = (shares - np.eye(3)[LABELS]) / 6
    expected = {"kernel": kernel - 0.05 * flat.T @ error, "bias": bias - 0.05 * error.sum(axis=0)}
    for name, value in expected.items():
        np.testing.assert_allclose(after.params["Dense_0"][name], value, atol=1e-6)
    assert int(after.step) == 1
    assert float(after.learning_rate_scale) == np.float32(0.1)
    assert float(after.model_state["seen"]["train"]) == 1


def test_steps_go_on_from_each_other():
    """With momentum: a step is what is left of the one before, and its own gradient's."""
    optimizer = optax.sgd(0.5, momentum=0.9)
    states = [create_state(Probe(), optimizer, 3, (2, 2, 1))]
    for _ in range(3):
        states.append(train_step(Probe(), optimizer, states[-1], IMAGES, LABELS, 3)[0])
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    before = jax.tree.map(jnp.zeros_like, states[0].params)
    for state, after in itertools.pairwise(states):
        # Without momentum, a step of the same size.
        alone = train_step(
            Probe(), SGD, state.replace(opt_state=SGD.init(state.params)), IMAGES, LABELS, 3
        )[0]
        moved = jax.tree.map(jnp.subtract, after.params, state.params)
        own = jax.tree.map(jnp.subtract, alone.params, state.params)
        expected = jax.tree.map(lambda old, new: 0.9 * old + new, before, own)
        assert_close(moved, expected, 1e-6)
        before = moved


@pytest.mark.slow
def test_devices_share_the_gradient_and_the_memorys_key_but_not_the_dropouts():
    state = create_state(Probe(), SGD, 3, (2, 2, 1))
    whole, expected = train_step(Probe(), SGD, state, IMAGES, LABELS, 3)

    def step(state, images, labels, seed=3):
        return train_step(Probe(), SGD, state, images, labels, seed, axis_name="devices")

    halves = IMAGES.reshape(2, 3, 2, 2, 1), LABELS.reshape(2, 3)
    over = jax.vmap(step, in_axes=(None, 0, 0, None), axis_name="devices")
    after, metrics = over(state, *halves, 3)
    for found, value in ((after.params, whole.params), (metrics, expected)):
        for i in range(2):
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6), found, value
            )
    draws = [after.model_state["seen"]]
    for changed, seed in ((state.replace(step=state.step + 1), 3), (state, 4)):
        draws.append(over(changed, *halves, seed)[0].model_state["seen"])
    # Anew in each step and with each seed: a number per device and draw, or one for all devices.
    assert len({float(x) for draw in draws for x in draw["dropout"]}) == 6
    assert all(draw["memory"][0] == draw["memory"][1] for draw in draws)
    assert len({float(draw["memory"][0]) for draw in draws}) == 3
