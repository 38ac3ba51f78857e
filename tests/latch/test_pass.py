"""Within a pass: what reads see, when updates write, whom they concern; arguments; the norms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate
from aim_flax.evaluate.memory_use import memory_use
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal
from tests.networks import D, probed, weights_of, written


def test_memory_is_one_per_batch_until_it_is_written():
    x = draw(5, 4)
    aim, variables = probed(x)
    looks = aim.apply(variables, x)
    assert_close(looks["look0"], np.repeat(weights_of(variables), 5, axis=0))
    # The memory's half of the first read has batch size 1 in the traced program.
    program = str(jax.make_jaxpr(aim.apply)(variables, x))
    assert f"f32[1,{D}] = dot_general" in program


def test_read_initial_never_sees_an_update():
    x = draw(5, 4)
    aim, variables = probed(x, read_initial="look2")
    looks = aim.apply(variables, x)
    initial = np.repeat(weights_of(variables, "memory_initial"), 5, axis=0)
    assert_close(looks["look2"], initial)
    assert not np.allclose(looks["look1"], initial, atol=0.01)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer, other = nn.Dense(4, name="layer"), nn.Dense(4, name="other")
        return other(layer(layer(x)))


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_places_share_nothing_and_calls_share_everything(mode):
    x = draw(5, 4)
    aim = AiM(Twice(), Memory((D,), "dense"), ".*", ".*", read_mode=mode)
    variables = random_variables(aim, x)
    params = variables["params"]
    own = {"kernel", "bias", "memory_update"} | ({"memory_read"} if mode == "add" else set())
    assert set(params) == {"memory", "layer", "other"}
    assert set(params["layer"]) == set(params["other"]) == own
    h, m = x, np.repeat(weights_of(variables), 5, axis=0)
    for name in ("layer", "layer", "other"):
        kernel = params[name]["kernel"]
        if mode == "add":
            kernel = np.concatenate([kernel, params[name]["memory_read"]["kernel"]])
        h = np.concatenate([h, m], axis=1) @ kernel + params[name]["bias"]
        m = written(variables, name, h, m)
    found, seen = aim.apply(variables, x, mutable=["intermediates"])
    assert_close(found, h)
    for what in ("memory_use", "memory_update_use"):
        calls = {name: len(seen["intermediates"][name][what]) for name in ("layer", "other")}
        assert calls == {"layer": 2, "other": 1}


def test_memory_is_one_per_example_once_it_is_written():
    x = draw(5, 4)
    aim, variables = probed(x)
    train = jax.jit(partial(aim.apply, train=True, mutable=["batch_stats"]))
    evaluate = jax.jit(aim.apply)
    memories = evaluate(variables, x)["look2"]
    assert memories.shape == (5, D)
    assert len(np.unique(memories[:, 0])) == 5
    changed = x.copy()
    changed[1] = 7
    others = np.array([0, 2, 3, 4])
    assert_equal(evaluate(variables, changed)["look2"][others], memories[others])
    trained, changed_trained = (train(variables, images)[0]["look2"] for images in (x, changed))
    assert not np.isclose(trained[others], changed_trained[others], atol=1e-4).all()


@pytest.mark.slow
def test_batch_norm_removes_what_all_examples_have_in_common():
    x = draw(5, 4)
    aim, variables = probed(x)
    other = jax.tree.map(np.copy, variables)
    other["params"]["memory"]["dense"]["bias"] += 3
    train = jax.jit(partial(aim.apply, train=True, mutable=["batch_stats"]))
    looks, changed = (train(given, x)[0] for given in (variables, other))
    assert not np.allclose(looks["look0"], changed["look0"], atol=1)
    assert_close(changed["look1"], looks["look1"], 1e-4)

    def loss(memory):
        given = {**variables, "params": {**variables["params"], "memory": memory}}
        return jnp.square(train(given, x)[0]["look1"]).sum()

    gradients = jax.grad(loss)(variables["params"]["memory"])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) < 1e-5
    # The running statistics of an evaluation do not follow, so there it counts.
    looks, changed = (aim.apply(given, x) for given in (variables, other))
    assert not np.allclose(looks["look1"], changed["look1"], atol=1e-3)
    # Nor is it removed from a map, where the positions see different floats.
    maps, m = draw(3, 4, 4, 2), draw(1, 2, 2, 3)
    update = MemoryUpdate()
    block = random_variables(update, maps, m)
    new, shifted = (
        update.apply(block, maps, memory, train=True, mutable=["batch_stats"])[0]
        for memory in (m, m + 3)
    )
    assert not np.allclose(new, shifted, atol=1e-3)


class WithTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(nn.Dropout(0.5)(x, deterministic=not train))


class WithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, *, scale=1.0):
        x = x if mask is None else x * mask
        return nn.Dense(3, name="head")(x * scale)


def latch_on_head(net, x):
    aim = AiM(net, Memory((4,), "dense"), "head", update_after="head", read_mode="add")
    return aim, random_variables(aim, x)


def update_mean(variables):
    return variables["batch_stats"]["head"]["memory_update"]["norm1"]["mean"]


@pytest.mark.slow
def test_train_reaches_a_backbone_that_has_it():
    x = draw(8, 5)
    aim, variables = latch_on_head(WithTrain(), x)
    apply = partial(aim.apply, variables, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    evaluated, stats = apply()
    _, stats_evaluated = apply(train=False)
    trained, stats_trained = apply(train=True)
    for after in (stats, stats_evaluated):
        assert_equal(after["batch_stats"], variables["batch_stats"])
    assert not np.allclose(update_mean(stats_trained), update_mean(variables))
    means = [tree["batch_stats"]["norm"]["mean"] for tree in (stats_trained, variables)]
    assert not np.allclose(*means)
    assert not np.allclose(evaluated, trained)


def test_train_does_not_reach_a_backbone_that_lacks_it():
    x = draw(8, 5)
    aim, variables = latch_on_head(WithoutTrain(), x)
    y, state = aim.apply(variables, x, train=True, mutable=["batch_stats"])
    assert not np.allclose(update_mean(state), update_mean(variables))
    assert_close(y, aim.apply(variables, x))


def test_other_arguments_are_passed_on_as_they_are():
    x, mask = draw(8, 5), np.float32([1, 0, 1, 0, 0])
    aim, variables = latch_on_head(WithoutTrain(), x)
    expected = aim.apply(variables, x * mask)
    assert not np.allclose(expected, aim.apply(variables, x))
    assert_close(aim.apply(variables, x, mask), expected)
    assert_close(aim.apply(variables, x, mask=mask), expected)
    assert_close(aim.apply(variables, x, scale=3.0), aim.apply(variables, 3 * x))


class Measured(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Conv(4, (1, 1), name="conv1")(x)
        h = nn.Conv(4, (1, 1), name="conv2")(h)
        return nn.Dense(3, name="tokens")(h.reshape(h.shape[0], -1, 4))


def mean_norm(y):
    y = np.asarray(y, np.float64)
    return np.sqrt((y**2).reshape(len(y), -1).sum(axis=1)).mean()


@pytest.mark.parametrize("mode", [pytest.param("add", marks=pytest.mark.slow), "concat"])
def test_recorded_norms_are_those_of_the_memorys_share_and_the_rest(mode):
    """All layers are matrix products, whose kernels are one above the other with `concat`."""
    x = draw(3, 4, 4, 2)
    latch = partial(AiM, Measured(), Memory((2, 2, 4)), update_after="conv1")
    add = latch(("conv1", "conv2", "tokens"), read_mode="add")
    variables = given = random_variables(add, x)
    if mode == "concat":
        params = dict(variables["params"])
        for name in ("conv1", "conv2", "tokens"):
            layer = dict(params[name])
            halves = [layer["kernel"], layer.pop("memory_read")["kernel"]]
            params[name] = layer | {"kernel": np.concatenate(halves, axis=-2)}
        given = {**variables, "params": params}
    aim = latch(add.read, read_mode=mode)
    _, found = aim.apply(given, x, mutable=["intermediates"])

    _, seen = add.apply(
        variables, x, mutable=["intermediates"], capture_intermediates=lambda *_: True
    )
    (m, new) = weights_of(variables), seen["intermediates"]["conv1"]["memory_update"]
    (new,) = new["__call__"]
    for name in ("conv1", "conv2", "tokens"):
        place = seen["intermediates"][name]
        (y,), (share,) = place["__call__"], place["memory_read"]["__call__"]
        (use,) = found["intermediates"][name]["memory_use"]
        np.testing.assert_allclose(use["own"], mean_norm(y - share), rtol=1e-4)
        # It counts at each position, and in each example, where it is the same for all.
        share = np.broadcast_to(share, y.shape)
        np.testing.assert_allclose(use["share"], mean_norm(share), rtol=1e-4)
    (use,) = found["intermediates"]["conv1"]["memory_update_use"]
    np.testing.assert_allclose(use["own"], mean_norm(m), rtol=1e-4)
    np.testing.assert_allclose(use["share"], mean_norm(new - m), rtol=1e-4)


class Scanned(nn.Module):
    """Two layers in a loop, of which nothing is taken out but parameters, and one behind it."""

    taken_out: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(4, name="dense")(x), None

        axes = dict.fromkeys(("params", *self.taken_out), 0)
        loop = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)
        x, _ = loop(name="loop")(x, None)
        return nn.Dense(2, name="last")(x)


def test_uses_that_a_scan_does_not_take_out_are_told():
    x = draw(3, 4)
    given = dict(memory=Memory((D,), "direct"), read="loop/dense|last", read_mode="add")
    inner = AiM(Scanned(), **given)
    variables = random_variables(inner, x)
    with pytest.warns(UserWarning, match="use of memory is not measured in read loop/dense: with"):
        assert list(memory_use(inner, variables, x)) == ["read last"]
    # Of memories within each other, too.
    outer = AiM(inner, Memory((D,), "direct"), "last", read_mode="add", called="notes")
    with pytest.warns(UserWarning, match="not measured in read loop/dense: "):
        memory_use(outer, random_variables(outer, x), x)
    assert list(memory_use(AiM(Scanned(("intermediates",)), **given), variables, x)) == [
        "read loop/dense",
        "read last",
    ]


def test_nothing_is_recorded_unless_asked():
    x = draw(3, 4, 4, 2)
    for mode in ("add", "concat"):
        aim = AiM(Measured(), Memory((2, 2, 4)), "conv2", "conv1", read_mode=mode)
        variables = random_variables(aim, x)
        assert "intermediates" not in variables
        _, state = jax.eval_shape(partial(aim.apply, mutable=["batch_stats"]), variables, x)
        assert set(state) == {"batch_stats"}
        traced = [
            str(jax.make_jaxpr(partial(aim.apply, mutable=mutable))(variables, x))
            for mutable in (["batch_stats"], ["batch_stats", "intermediates"])
        ]
        assert traced[0].count("sqrt") < traced[1].count("sqrt")
