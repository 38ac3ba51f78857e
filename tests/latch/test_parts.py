"""A memory for each part of a network: AiM(per=...)."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate, intervene
from aim_flax.evaluate.interventions import layers
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused

X = draw(6, 5)
# The second begins as the first does.
PARTS = ("stage1", "stage10")
LAYERS = [f"{part}_{layer}" for part in PARTS for layer in "ab"]


class Stages(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in LAYERS:
            x = nn.tanh(nn.Dense(4, name=name)(x))
        return x


def latched(net, read="stage.*", update_after="stage.*_a", **options):
    given = dict(read_mode="add", update=MemoryUpdate((3,)))
    return AiM(net, Memory((4,), "direct"), read, update_after, **{**given, **options})


def one_by_one(read_initial, **options):
    """Returns a network with two memories, each latched on to the layers of one part."""
    net = Stages()
    for part in PARTS:
        own = dict(called=f"of_{part}", read_initial=f"{part}_b" if read_initial else "")
        net = latched(net, f"{part}_.", f"{part}_a", **own, **options)
    return net


def with_names_of_parts(variables):
    """Returns variables of `one_by_one` with the names that they have with `per`."""
    named = {}
    for collection, tree in variables.items():
        named[collection] = new = {}
        for name, value in tree.items():
            if name in LAYERS:
                part = name.partition("_")[0]
                new[name] = {key.replace(f"of_{part}", "memory"): v for key, v in value.items()}
                continue
            part = name.removeprefix("of_").partition("_")[0]
            memory = name.replace(f"of_{part}", "memory")
            if collection == "memory":
                new[f"carried_{part}"] = value
            else:
                new.setdefault(memory, {})[part] = value
    return named


@pytest.mark.parametrize("read_initial", [False, True])
def test_a_memory_for_each_part_is_one_latched_on_to_each(read_initial):
    carry = dict(carry="state", carry_rate=0.25)
    several = one_by_one(read_initial, **carry)
    together = latched(
        Stages(), per=PARTS, read_initial="stage.*_b" if read_initial else "", **carry
    )
    variables = random_variables(several, X)
    own = with_names_of_parts(variables)
    shapes = jax.eval_shape(lambda key: together.init(key, X), KEY)
    assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, shapes)

    def step(net, variables):
        def loss(params):
            given = {**variables, "params": params}
            y, state = net.apply(given, X, train=True, mutable=["memory", "batch_stats"])
            return (y**2).sum(), (y, state)

        gradients, (y, state) = jax.grad(loss, has_aux=True)(variables["params"])
        return {"params": gradients, **state}, y

    expected, expected_y = step(several, variables)
    found, y = step(together, own)
    assert_close(y, expected_y)
    assert_close(found, with_names_of_parts(expected))
    assert_close(together.apply(own, X), several.apply(variables, X))


def test_parts_start_out_different():
    memories = latched(Stages(), per=PARTS).init(KEY, X)["params"]["memory"]
    assert set(memories) == set(PARTS)
    apart = memories["stage1"]["content"] - memories["stage10"]["content"]
    assert np.abs(apart).max() > 0.1


def test_what_one_part_writes_no_other_reads():
    found = {}
    for per in (PARTS, ("stage",)):
        aim = latched(Stages(), per=per, capture=True)
        variables = random_variables(aim, X)
        _, state = aim.apply(variables, X, mutable=["intermediates"])
        (found[per],) = state["intermediates"]["stage10_a"]["memory_as_read"]
        if per == PARTS:
            (start,) = state["intermediates"]["memory_at_start"]
            assert set(start) == set(PARTS)
            learned = variables["params"]["memory"]["stage10"]["content"][None]
            assert_equal(start["stage10"], learned)
    # With a memory of its own it finds what was learned, else what stage 1 has written.
    assert_equal(found[PARTS], learned)
    assert len(found["stage",]) == len(X)


def test_parts_are_altered_by_what_they_are():
    aim = latched(Stages(), per=PARTS)
    assert layers(aim, X) == (LAYERS, ["stage1_a", "stage10_a"])
    variables = random_variables(aim, X)
    removed = jax.tree.map(np.copy, variables)
    layer = removed["params"]["stage10_b"]
    kernel = layer["memory_read"]["kernel"].copy()
    layer["memory_read"]["kernel"][:] = 0
    zeroed = intervene(aim, "zero", "stage10_b").apply(variables, X)
    assert_close(zeroed, aim.apply(removed, X))
    # Reset to what was learned for this part.
    layer["bias"] += variables["params"]["memory"]["stage10"]["content"] @ kernel
    reset = intervene(aim, "reset", "stage10_b").apply(variables, X)
    assert_close(reset, aim.apply(removed, X))


class TimeMajor(nn.Module):
    """(B, T, C) -> (T, B, C) between two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="early")(x).swapaxes(0, 1)
        return nn.Dense(6, name="late")(x).swapaxes(0, 1)


def test_a_part_that_is_not_written_is_read_along_any_axis():
    """As many steps as examples, so that sizes tell nothing."""
    x, update = draw(4, 4, 5), MemoryUpdate((3,), pool="mean")
    with refused("read matches 'late', which has an array"):
        latched(TimeMajor(), ".*", "early", update=update).init(KEY, x)
    aim = latched(TimeMajor(), ".*", "early", update=update, per=("early", "late"))
    variables = random_variables(aim, x)
    both = aim.apply(variables, np.concatenate([x, x]))
    assert_close(both[:4], aim.apply(variables, x))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Stages(name="encoder")(Stages(name="stem")(x))


def test_of_several_beginnings_the_longest_counts_and_slashes_become_dots():
    per = ("encoder", "encoder/stage10", "stem/")
    aim = latched(Nested(), "encoder/.*|stem/stage1_a", "", per=per)
    assert set(aim.init(KEY, X)["params"]["memory"]) == {"encoder", "encoder.stage10", "stem"}
    assert {place.path: place.memory for place in aim.places(X)} == {
        "stem/stage1_a": "memory/stem",
        "encoder/stage1_a": "memory/encoder",
        "encoder/stage1_b": "memory/encoder",
        "encoder/stage10_a": "memory/encoder.stage10",
        "encoder/stage10_b": "memory/encoder.stage10",
    }


@pytest.mark.parametrize(
    ("per", "told"),
    [
        (
            ("stage10",),
            "'stage1_a' reads or writes the memory, but begins with none of per: stage10",
        ),
        (
            (*PARTS, "stage2"),
            "per has 'stage2', but no module whose path begins with it reads the memory; it is"
            " read in: stage1_a, stage1_b, stage10_a, stage10_b",
        ),
        (("",), "per is ('',), expected beginnings of module paths"),
        (("stage1", "stage1/"), "per is ('stage1', 'stage1/'): two of them are the same"),
        (("stage1", "stage1"), "per is ('stage1', 'stage1'): two of them are the same"),
    ],
)
def test_parts_that_are_none_are_refused(per, told):
    with refused(exactly=told):
        latched(Stages(), per=per).init(KEY, X)
