"""From batch to batch, in evaluation, and on several devices."""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from aim_flax import MemoryUpdate
from tests.arrays import draw, random_variables
from tests.asserts import assert_close, assert_equal
from tests.networks import Net, dense, gradients_and_state, latched_net, probed, weights_of, written


def test_carry_weights_leaves_nothing_behind():
    x = draw(5, 4)
    aim, variables = probed(x)
    y, state = aim.apply(variables, x, train=True, mutable=True)
    assert {*state} - {"intermediates"} == {"params", "batch_stats"}
    assert_equal(state["params"], variables["params"])
    again, _ = aim.apply(
        {**variables, "batch_stats": state["batch_stats"]}, x, train=True, mutable=True
    )
    assert_equal(again, y)  # training passes use the statistics of their own batch


def test_carry_state_follows_its_formula():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state", carry_rate=0.25)
    train = jax.jit(partial(aim.apply, train=True, mutable=["memory", "batch_stats"]))
    weights = weights_of(variables)
    for _ in range(3):
        carried = variables["memory"]["carried"]
        looks, state = train(variables, x)
        assert_close(looks["look0"], np.repeat(weights + carried, 5, axis=0))
        # The last look comes after the last update.
        moved = 0.75 * carried + 0.25 * (looks["look2"].mean(axis=0) - weights[0])
        assert_close(state["memory"], {"carried": moved})
        assert not np.allclose(moved, carried, atol=0.01)
        variables = {**variables, **state}


def test_no_gradient_flows_through_the_carry():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")

    @jax.jit
    def gradients(params):
        def outputs(params):
            looks, state = aim.apply(
                {**variables, "params": params}, x, train=True, mutable=["memory", "batch_stats"]
            )
            loss = sum(jnp.square(look).sum() for look in looks.values())
            return loss, jnp.square(state["memory"]["carried"]).sum()

        pick = (lambda p, i=i: outputs(p)[i] for i in (0, 1))
        return [jax.grad(output)(params) for output in pick]

    of_outputs, of_carried = gradients(variables["params"])
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_carried))
    # While the loss of this pass does reach the memory's weights.
    assert np.abs(of_outputs["memory"]["dense"]["kernel"]).max() > 1e-4


def test_training_passes_say_what_they_write():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    for mutable in (False, ["batch_stats"], ["memory"]):
        with pytest.raises(flax.errors.ModifyScopeVariableError):
            aim.apply(variables, x, train=True, mutable=mutable)
    _, state = aim.apply(variables, x, train=True, mutable=["batch_stats", "memory"])
    assert set(state) == {"batch_stats", "memory"}


def test_evaluation_sees_the_carried_memory_and_writes_nothing():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    start = weights_of(variables) + variables["memory"]["carried"]
    looks, state = aim.apply(variables, x, mutable=["batch_stats", "memory"])
    assert_close(looks["look0"], np.repeat(start, 5, axis=0))
    # The update uses the running statistics.
    assert_close(looks["look1"], written(variables, "write1", dense(variables, "write1", x), start))
    assert_equal(state, {name: variables[name] for name in ("batch_stats", "memory")})
    assert_equal(aim.apply(variables, x), looks)


def test_examples_do_not_see_each_other_in_evaluation():
    x = draw(6, 4)
    aim = latched_net(carry="state")
    variables = random_variables(aim, x)
    evaluate = jax.jit(aim.apply)
    y = evaluate(variables, x)
    for filling in (0, 1e6, np.inf, np.nan):
        padded = x.copy()
        padded[4:] = filling
        assert_equal(evaluate(variables, padded)[:4], y[:4])


def one_step(aim, variables, x, axis_name=None):
    gradients, state = gradients_and_state(aim, variables, x)
    if axis_name is not None:
        gradients = jax.lax.pmean(gradients, axis_name)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
    return {**state, "params": params}


def on_devices(n, axis_name):
    """Returns a latched network's variables before and after one step on n devices."""
    x = draw(8, 4)
    aim = latched_net(
        Net(axis_name=axis_name, dropout=0.0),
        carry="state",
        update=MemoryUpdate(axis_name=axis_name),
    )
    variables = random_variables(latched_net(Net(), carry="state"), x)
    if n == 1:
        return variables, jax.jit(partial(one_step, aim))(variables, x)
    step = jax.pmap(
        lambda variables, x: one_step(aim, variables, x, "batch"),
        axis_name="batch", in_axes=(None, 0), devices=jax.devices()[:n],
    )  # fmt: skip
    return variables, step(variables, x.reshape(n, 8 // n, 4))


@pytest.mark.slow
def test_a_step_on_several_devices_is_the_step_on_the_whole_batch():
    before, expected = on_devices(1, None)
    _, after = on_devices(4, "batch")
    for path, leaf in flatten_dict(after).items():
        old, new = flatten_dict(before)[path], flatten_dict(expected)[path]
        for device in np.asarray(leaf):
            np.testing.assert_allclose(device, new, atol=1e-5, err_msg=str(path))
        if path[0] != "params":
            assert not np.allclose(old, new, atol=1e-4), path


def test_nothing_is_averaged_without_an_axis_name():
    _, after = on_devices(2, None)
    stats = after["batch_stats"]["dense1"]["memory_update"]["norm1"]["mean"]
    for leaf in (after["memory"]["carried"], stats):
        first, second = np.asarray(leaf)
        assert not np.allclose(first, second, atol=1e-4)
