"""Variables of a latched network: names, initial values, saving, loading, freezing, resetting."""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_flax import AiM, Memory
from tests.arrays import KEY, draw, paths, random_variables
from tests.asserts import assert_close, assert_equal
from tests.networks import (
    D,
    Net,
    WithSetup,
    gradients_and_state,
    latched_net,
    probe,
    probed,
    weights_of,
)


class Detector(nn.Module):
    """Submodules come as attributes, under names that AiM's own attributes have."""

    backbone: nn.Module
    update: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="read")(self.update(self.backbone(x)).mean(axis=(1, 2)))


class Encoder(WithSetup):
    def __call__(self, x):
        return self.encode(x)


@pytest.mark.parametrize("mode", ["add", "scale"])
@pytest.mark.parametrize(
    ("net", "read", "update_after"),
    [
        (Net(), "last", "norm"),
        (WithSetup(), "layers_1", "layers_0"),
        (Detector(nn.Conv(4, (3, 3)), nn.Conv(5, (3, 3))), "update", "backbone"),
        (Detector(Encoder(), nn.Dense(4)), "backbone/layers_0", "backbone/layers_1"),
        (nn.Sequential([nn.Conv(4, (1, 1)), nn.relu, nn.Conv(4, (1, 1))]), "layers_2", "layers_0"),
    ],
    ids=["attribute", "setup", "attributes", "nested attributes", "Sequential"],
)
def test_add_keeps_the_backbones_variables(net, read, update_after, mode):
    x = draw(5, 4) if isinstance(net, Net) else draw(2, 4, 4, 3)
    memory = Memory((D,), "dense") if isinstance(net, Net) else Memory((2, 2, 4))
    aim = AiM(net, memory, read=read, update_after=update_after, read_mode=mode)

    @jax.jit
    def initial():
        plain, latched = (flatten_dict(n.init(KEY, x), sep="/") for n in (net, aim))
        return plain, latched

    plain, latched = initial()
    assert_equal({path: latched[path] for path in plain}, plain)
    added = {path.removeprefix("params/") for path in set(latched) - set(plain)}
    assert {f"{read}/memory_read/kernel", f"{update_after}/memory_update/output/kernel"} < added


def test_concat_widens_the_kernels_of_reading_layers_and_nothing_else():
    x = draw(5, 4)
    wider = latched_net(read_mode="concat")
    plain, latched = (
        flatten_dict(jax.eval_shape(net.init, KEY, x)["params"], sep="/") for net in (Net(), wider)
    )
    shapes = {path: leaf.shape for path, leaf in plain.items()}
    shapes |= {"dense2/kernel": (4 + D, 4), "last/kernel": (4 + D, 2)}
    assert {path: latched[path].shape for path in plain} == shapes
    initial = jax.jit(lambda: [net.init(KEY, x)["params"]["dense1"] for net in (Net(), wider)])
    plain_dense1, latched_dense1 = initial()
    assert_equal({name: latched_dense1[name] for name in plain_dense1}, plain_dense1)


@pytest.mark.parametrize("mode", [pytest.param("add", marks=pytest.mark.slow), "scale"])
def test_zero_init_starts_out_as_the_plain_network(mode):
    # As users compile it: with all optimisations.
    jax.config.update("jax_disable_most_optimizations", False)
    x = draw(5, 4)
    aim = latched_net(read_mode=mode, zero_init=True)
    own = random_variables(Net(), x)
    variables = random_variables(aim, x)
    params = jax.jit(aim.init)(KEY, x)["params"]
    initial = {name: params[name]["memory_read"] for name in ("dense2", "last")}
    assert not any(leaf.any() for leaf in jax.tree.leaves(initial))
    joint = {
        name: unflatten_dict({**flatten_dict(variables[name]), **flatten_dict(own[name])})
        for name in variables
    }
    for name, read in initial.items():
        joint["params"][name]["memory_read"] = read

    @partial(jax.jit, static_argnums=0)
    def run(net, variables):
        def loss(params):
            given = {**variables, "params": params}
            evaluated = net.apply(given, x)
            trained, state = net.apply(
                given, x, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
            )
            return jnp.sin(trained).sum(), (evaluated, trained, flatten_dict(state["batch_stats"]))

        gradients, found = jax.grad(loss, has_aux=True)(variables["params"])
        return *found, flatten_dict(gradients)

    *outputs, stats, gradients = run(Net(), own)
    *found, found_stats, found_gradients = run(aim, joint)
    assert_equal(found, outputs)
    assert_equal({path: found_stats[path] for path in stats}, stats)
    assert_close({path: found_gradients[path] for path in gradients}, gradients, 1e-6)


def test_the_two_memories_start_out_different():
    aim = probe(read_initial="look2")
    params = jax.jit(aim.init)(KEY, draw(5, 4))["params"]
    first, second = (params[name]["dense"]["kernel"] for name in ("memory", "memory_initial"))
    assert first.shape == second.shape
    assert not np.isclose(first, second).any()


def test_init_writes_nothing():
    aim = probe(carry="state")
    variables = jax.jit(partial(aim.init, train=True))(KEY, draw(5, 4))
    assert_equal(variables["memory"], {"carried": np.zeros(D, np.float32)})
    for path, leaf in flatten_dict(variables["batch_stats"]).items():
        assert_equal(leaf, np.full_like(leaf, {"mean": 0, "var": 1}[path[-1]]))


def test_no_pattern_at_all_latches_nothing_on_but_the_memory():
    x = draw(2, 4, 4, 3)
    for nothing in ("", ()):
        aim = AiM(WithSetup(), Memory((2, 2, 4)), read=nothing)
        extra = paths(random_variables(aim, x)) - paths(random_variables(WithSetup(), x))
        assert extra == {"memory/conv/kernel", "memory/conv/bias"}


def test_variables_are_plain_trees():
    x = draw(5, 4)
    for carry, collections in (("weights", set()), ("state", {"memory"})):
        aim = latched_net(carry=carry)
        variables = random_variables(aim, x)
        assert set(variables) == {"params", "batch_stats"} | collections
        flat = flatten_dict(variables, sep="/")
        assert all(isinstance(leaf, np.ndarray) for leaf in flat.values())
        assert_equal(aim.apply(unflatten_dict(flat, sep="/"), x), aim.apply(variables, x))
        restored = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
        assert_equal(restored, variables)


def test_weights_trained_without_memory_load():
    x = draw(5, 4)
    trained = random_variables(Net(), x, seed=1)
    aim = latched_net()
    joint = {}
    for name, tree in random_variables(aim, x).items():
        own, latched = flatten_dict(trained[name]), flatten_dict(tree)
        assert {path: latched[path].shape for path in own} == jax.tree.map(np.shape, own)
        for path in latched:
            if path[-2] == "memory_read":
                latched[path] = np.zeros_like(latched[path])
        joint[name] = unflatten_dict({**latched, **own})
    assert_equal(jax.jit(aim.apply)(joint, x), jax.jit(Net().apply)(trained, x))


def train_step(aim, optimizer):
    @jax.jit
    def step(variables, slots, x, key):
        gradients, state = gradients_and_state(aim, variables, x, rngs={"dropout": key})
        updates, slots = optimizer.update(gradients, slots)
        params = optax.apply_updates(variables["params"], updates)
        return {**state, "params": params}, slots

    return step


@pytest.mark.slow
def test_training_continues_bit_for_bit_from_saved_variables():
    batches, keys = draw(4, 5, 4), jax.random.split(KEY, 4)

    def start():
        aim, optimizer = latched_net(carry="state"), optax.sgd(1e-2, momentum=0.9)
        variables = random_variables(aim, batches[0])
        return train_step(aim, optimizer), (variables, optimizer.init(variables["params"]))

    step, state = start()
    for i in range(4):
        state = step(*state, batches[i], keys[i])
        if i == 1:
            saved = flax.serialization.to_bytes(state)
    # As in a new process: new objects, and nothing of the old ones but the bytes.
    step, template = start()
    restored = flax.serialization.from_bytes(template, saved)
    for i in (2, 3):
        restored = step(*restored, batches[i], keys[i])
    assert_equal(restored, state)
    assert state[0]["memory"]["carried"].any()


LATCHED_ON = {"memory", "memory_initial", "memory_read", "memory_update"}


@pytest.mark.parametrize("frozen", ["latched on", "backbone"])
def test_parts_can_be_frozen_by_name(frozen):
    x = draw(5, 4)
    aim = latched_net(update_after="dense2")
    variables = random_variables(aim, x)

    def part(path, _):
        return "latched on" if LATCHED_ON & {key.key for key in path} else "backbone"

    labels = jax.tree_util.tree_map_with_path(part, variables["params"])
    flat = flatten_dict(labels)
    own = set(flatten_dict(jax.eval_shape(Net().init, KEY, x)["params"]))
    assert {path for path, label in flat.items() if label == "backbone"} == own
    rules = {name: optax.sgd(0.1) for name in ("latched on", "backbone")}
    rules[frozen] = optax.set_to_zero()
    optimizer = optax.multi_transform(rules, labels)
    step = train_step(aim, optimizer)
    after, _ = step(variables, optimizer.init(variables["params"]), x, KEY)
    before, after = (flatten_dict(tree["params"]) for tree in (variables, after))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    free = {path for path, label in flat.items() if label != frozen}
    # Of biases in front of a batch norm only rounding may move.
    assert {path for path in free if path[-1] == "kernel"} <= changed <= free


def test_a_memory_can_be_reset():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    assert variables["memory"]["carried"].any()
    forgot = {**variables, "memory": jax.tree.map(np.zeros_like, variables["memory"])}
    assert_close(aim.apply(forgot, x)["look0"], np.repeat(weights_of(variables), 5, axis=0))
    fresh = random_variables(aim, x, seed=5)["params"]["memory"]
    learned = {**variables, "params": {**variables["params"], "memory": fresh}}
    expected = weights_of(learned) + variables["memory"]["carried"]
    assert_close(aim.apply(learned, x)["look0"], np.repeat(expected, 5, axis=0))
