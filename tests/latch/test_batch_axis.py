"""Networks whose first axis is not the batch, or not everywhere, and how that is found."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate, batch_axis
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused

B, T = 4, 4  # the same, so that sizes tell nothing


def latched(net, read="late", update_after="early", pool="mean", **options):
    update = MemoryUpdate(features=(3,), pool=pool)
    return AiM(net, Memory((5,), "dense"), read, update_after, update=update, **options)


class TimeMajor(nn.Module):
    """(B, T, C) -> (T, B, C), as recurrent code likes it; a layer before, and one within."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="early")(x)
        x = nn.Dense(6, name="late")(x.swapaxes(0, 1)).swapaxes(0, 1)
        return nn.Dense(2, name="head")(x)


class OverExamples(nn.Module):
    """A layer that is written for one example, (T, C), and mapped over the batch."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="early")(x)
        late = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
        return late(6, name="late")(x)


class Experts(nn.Module):
    """Tokens go to as many experts as there are examples: (E, capacity, C)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="early")(x)
        tokens = x.reshape(4, -1, 6)
        return nn.Dense(6, name="late")(tokens).reshape(x.shape)


class Windows(nn.Module):
    """Swin's windows: folded into the batch, which goes unseen while that is 1."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="early")(x)
        windows = x.reshape(-1, 2, 6)
        return nn.Dense(6, name="late")(windows).reshape(x.shape)


class Graph(nn.Module):
    """Nodes and edges, as many of both here."""

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        nodes = nn.Dense(6, name="early")(nodes)
        edges = nn.Dense(6, name="late")(nodes[senders] + nodes[receivers])
        return jax.ops.segment_sum(edges, receivers, nodes.shape[0])


OFF_BATCH = r"matches 'late', which has an array \({}\) for a batch of {}: its first axis is not"
SEQUENCE = draw(B, T, 3)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (TimeMajor(), "4, 8, 6"),
        (OverExamples(), "4, 6"),
        (Experts(), "4, 8, 6"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_axis_than_the_batch_is_refused(net, shape):
    with refused("read " + OFF_BATCH.format(shape, 8)):
        jax.eval_shape(latched(net).init, KEY, SEQUENCE)
    if not isinstance(net, OverExamples):  # There no update is possible anyway.
        with refused("update_after " + OFF_BATCH.format(shape, 8)):
            jax.eval_shape(latched(net, "early", "late").init, KEY, SEQUENCE)


def test_windows_folded_into_the_batch_are_found_at_initialisation():
    """With one example the memory is one for all, and fits whatever becomes of it."""
    with refused("read " + OFF_BATCH.format("4, 2, 6", 2)):
        jax.eval_shape(latched(Windows()).init, KEY, SEQUENCE[:1])


@pytest.mark.parametrize("net", [TimeMajor(), OverExamples(), Experts(), Windows()])
def test_before_the_first_update_any_axis_may_be_the_first(net):
    """The memory is one for all, so nothing can be mixed up."""
    nets = [latched(net, update_after=""), latched(net, read_initial="late")]
    if isinstance(net, TimeMajor):
        nets.append(latched(net, update_after="head"))
    for aim in nets:
        assert aim.apply(random_variables(aim, SEQUENCE), SEQUENCE).shape[:2] == (B, T)


def test_edges_are_no_nodes():
    nodes, senders, receivers = draw(4, 3), np.arange(4), np.roll(np.arange(4), 1)
    aim = latched(Graph(), pool=None)
    with refused("read matches 'late', which sees another input than the network's first"):
        jax.eval_shape(aim.init, KEY, nodes, senders, receivers)
    # With another number of edges the sizes tell.
    with refused("'late'"):
        jax.eval_shape(aim.init, KEY, nodes, senders[:3], receivers[:3])


class Towers(nn.Module):
    """Two inputs that meet only in the loss."""

    @nn.compact
    def __call__(self, image, text):
        image = nn.Dense(6, name="early")(image)
        return image, nn.Dense(6, name="late")(text)


class Meeting(Towers):
    @nn.compact
    def __call__(self, image, text):
        image, text = super().__call__(image, text)
        return image + text


def test_inputs_that_hold_the_same_examples():
    image, text = draw(4, 3), draw(4, 2)
    # Added to each other they must be as many.
    meeting = latched(Meeting(), pool=None)
    variables = random_variables(meeting, image, text)
    y = meeting.apply(variables, image, text)
    with refused(r"another input .*: if row i of both .* with AiM\(..., check_batch=False\)"):
        jax.eval_shape(latched(Towers(), pool=None).init, KEY, image, text)
    towers = latched(Towers(), pool=None, check_batch=False)
    assert_close(sum(towers.apply(variables, image, text)), y)


class OfOneSize(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="early")(x)
        return nn.Dense(6, name="late")(x.reshape(2, 2, 6).reshape(4, 6))


def test_a_network_of_one_batch_size_says_that_it_is():
    x = draw(4, 3)
    with refused(r"OfOneSize cannot be traced at another batch size \(TypeError: .*check_batch=F"):
        jax.eval_shape(latched(OfOneSize(), pool=None).init, KEY, x)
    trusting = latched(OfOneSize(), pool=None, check_batch=False)
    assert trusting.apply(random_variables(trusting, x), x).shape == (4, 6)
    reading = latched(OfOneSize(), update_after="")
    assert reading.apply(random_variables(reading, x), x).shape == (4, 6)


class Chain(nn.Module):
    """As many networks are: the batch is the first axis throughout."""

    @nn.compact
    def __call__(self, x, mask=None, train=False):
        x = nn.Dense(6, name="early")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.Dense(6, name="late")(x if mask is None else x * mask[..., None])
        return nn.Dense(2, name="head")(x.mean(axis=1))


@pytest.mark.slow
def test_the_check_works_under_transformations_and_is_made_once(monkeypatch):
    aim = latched(Chain())
    variables = random_variables(aim, SEQUENCE)
    traces = []
    trace = batch_axis._trace
    monkeypatch.setattr(batch_axis, "_trace", lambda *args: traces.append(1) or trace(*args))
    expected = aim.apply(variables, SEQUENCE)
    assert not traces  # found at initialisation
    assert_close(jax.jit(aim.apply)(variables, SEQUENCE), expected)
    half = draw(2, T, 3)
    jax.jit(aim.apply)(variables, half)
    assert len(traces) == 1
    jax.jit(jax.grad(lambda v: aim.apply(v, half).sum()))(variables)
    jax.vmap(partial(aim.apply, variables))(half[None])
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    assert_close(jax.jit(jax.vmap(aim.apply, (0, None)))(seeds, SEQUENCE)[1], expected)
    assert len(traces) == 1
    devices = jax.pmap(aim.apply, in_axes=(None, 0), devices=jax.devices()[:2])
    assert_close(devices(variables, SEQUENCE.reshape(2, 2, T, 3)).reshape(4, 2), expected)
    mask = np.ones((B, T), np.float32)
    assert_close(jax.jit(aim.apply)(variables, SEQUENCE, mask), expected)


def test_the_check_leaves_no_trace_in_tables_and_captures():
    aim = latched(Chain())
    batch_axis._FOUND.clear()
    table = aim.tabulate(KEY, SEQUENCE, console_kwargs={"width": 200})
    assert sum(line.startswith("│ early ") for line in table.splitlines()) == 1
    variables = random_variables(aim, SEQUENCE)
    batch_axis._FOUND.clear()
    _, state = aim.apply(variables, SEQUENCE, capture_intermediates=True)
    assert len(state["intermediates"]["early"]["__call__"]) == 1
    dropped = partial(aim.apply, train=True, mutable=["batch_stats"], rngs={"dropout": KEY})
    first = dropped(variables, SEQUENCE)
    batch_axis._FOUND.clear()
    assert_equal(dropped(variables, SEQUENCE), first)
