"""Slots: reads that attend to the positions of a memory, and updates that write them apart."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate
from tests.arrays import KEY, draw, paths, random_variables
from tests.asserts import assert_close, assert_equal, refused

B, T, S, D = 3, 5, 4, 2
X = draw(B, T, 6)


class Net(nn.Module):
    """Writes after `body`, reads in `head`; (B, T, C) -> (B, T, 3)."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(6, name="body")(x)))


def latched(update_after="", memory=None, **options):
    memory = memory or Memory((S, D), "direct")
    given = dict(read="head", update_after=update_after, read_mode="attend")
    return AiM(Net(), memory, **{**given, **options})


def test_an_attending_read_gives_each_position_what_it_asks_for():
    aim = latched()
    variables = random_variables(aim, X)
    params = variables["params"]
    slots, head = params["memory"]["content"], params["head"]
    h = np.tanh(X @ params["body"]["kernel"] + params["body"]["bias"])
    scores = h @ head["memory_read"]["query"]["kernel"] @ slots.T / np.sqrt(D)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    expected = h @ head["kernel"] + head["bias"]
    share = weights @ slots @ head["memory_read"]["output"]["kernel"]
    y, seen = aim.apply(variables, X, mutable=["intermediates"])
    assert_close(y, expected + share)
    # Every token finds something else, where other reads give the same to all.
    assert np.ptp(share, axis=1).min() > 1e-3
    (use,) = seen["intermediates"]["head"]["memory_use"]
    assert_close(use["share"], np.sqrt((share**2).sum(axis=(1, 2))).mean())


def test_an_attending_convolution_tells_places_apart_that_its_memory_knows():
    x = draw(B, 4, 4, 2)
    conv = nn.Sequential([nn.Conv(5, (3, 3), strides=2)])
    aim = AiM(conv, Memory((2, 3, D), "direct"), "layers_0", read_mode="attend")
    variables = random_variables(aim, x)
    layer, slots = variables["params"]["layers_0"], variables["params"]["memory"]["content"]
    q = x @ layer["memory_read"]["query"]["kernel"]
    weights = jax.nn.softmax(q @ slots.reshape(-1, D).T / np.sqrt(D))
    found = np.concatenate([x, weights @ slots.reshape(-1, D)], axis=-1)
    kernel = np.concatenate([layer["kernel"], layer["memory_read"]["output"]["kernel"]], axis=2)
    expected = nn.Conv(5, (3, 3), strides=2).apply(
        {"params": {"kernel": kernel, "bias": layer["bias"]}}, found
    )
    assert_close(aim.apply(variables, x), expected)


@pytest.mark.slow
def test_attending_starts_out_as_the_plain_network_with_zero_init():
    aim = latched(zero_init=True)
    variables = aim.init(KEY, X)
    assert_equal(aim.apply(variables, X), Net().apply(Net().init(KEY, X), X))
    gradients = jax.grad(lambda v: aim.apply(v, X).sum())(variables)["params"]["head"]
    assert np.abs(gradients["memory_read"]["output"]["kernel"]).max() > 1e-3


def test_attending_needs_slots():
    with refused("read matches 'head', but read_mode 'attend' chooses .*: give it slots, shape"):
        latched(memory=Memory((D,), "dense")).init(KEY, X)


def test_dense_slots_are_independent_and_drawn_like_one():
    content, variables = Memory((S, 64), "dense").init_with_output(KEY)
    assert content.shape == (1, S, 64)
    assert 0.8 < float(content.std()) < 1.2
    assert len(np.unique(content)) == S * 64
    assert variables["params"]["dense"]["kernel"].shape == (64, S * 64)


# --- Writing -------------------------------------------------------------------------------------


def hidden(params, stats, h):
    """Returns the hidden layers of an update block, by hand."""
    for i, name in enumerate(sorted(n for n in params if n.startswith("dense")), start=1):
        h = h @ params[name]["kernel"] + params[name]["bias"]
        norm = {**params[f"norm{i}"], **stats[f"norm{i}"]}
        h = (h - norm["mean"]) / np.sqrt(norm["var"] + 1e-3) * norm["scale"] + norm["bias"]
        h = 1 / (1 + np.exp(-h))
    return h


def dense(params, name, h):
    return h @ params[name]["kernel"] + params[name].get("bias", 0)


def block(x, m, mask=None, **options):
    update = MemoryUpdate((3,), **options)
    variables = random_variables(update, x, m, mask=mask)
    new = update.apply(variables, x, m, mask=mask)
    return new, variables["params"], variables["batch_stats"]


@pytest.mark.parametrize("mode", ["replace", "residual", "gated"])
def test_erase_and_add_is_what_its_formula_says(mode):
    x, m = draw(B, T, 6), draw(B, S, D, seed=1)
    new, params, stats = block(x, m, form="erase_add", mode=mode, pool="mean")
    h = hidden(params, stats, np.concatenate([x.mean(axis=1), m.mean(axis=1)], axis=-1))
    agreement = np.einsum("bsd,bd->bs", m, dense(params, "query", h)) / np.sqrt(D)
    w = np.asarray(jax.nn.softmax(dense(params, "place", h) + agreement))[..., None]
    add = dense(params, "add", h)[:, None]
    if mode == "residual":
        expected = m + w * add
    else:
        erase = np.asarray(jax.nn.sigmoid(dense(params, "erase", h)))[:, None]
        expected = m * (1 - w * erase) + w * add
    if mode == "gated":
        gate = np.asarray(jax.nn.sigmoid(dense(params, "gate", h)))[:, None]
        expected = m + gate * (expected - m)
    assert_close(new, expected)


@pytest.mark.parametrize("mode", ["replace", "residual", "gated"])
def test_attending_slots_find_what_their_queries_ask_for(mode):
    x, m = draw(B, 3, 3, 6), draw(1, 2, 2, D, seed=1)
    mask = np.arange(3)[None, :, None] < np.array([3, 2, 0])[:, None, None]
    mask = np.broadcast_to(mask, (B, 3, 3))
    new, params, stats = block(x, m, mask, form="attend", mode=mode)
    flat, slots = x.reshape(B, 9, 6), m.reshape(1, 4, D)
    q, k, v = (dense(params, n, a) for n, a in (("query", slots), ("key", flat), ("value", flat)))
    scores = np.einsum("bsd,btd->bst", np.repeat(q, B, 0), k) / np.sqrt(D)
    weights = np.exp(scores) * mask.reshape(B, 1, 9)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    slots = np.repeat(slots, B, axis=0)
    h = hidden(params, stats, np.concatenate([weights @ v, slots], axis=-1))
    expected = dense(params, "output", h)
    if mode == "residual":
        expected = slots + expected
    if mode == "gated":
        gate = np.asarray(jax.nn.sigmoid(dense(params, "gate", h)))
        expected = slots + gate * (expected - slots)
    assert_close(new, expected.reshape(B, 2, 2, D))


@pytest.mark.parametrize("form", ["erase_add", "attend"])
@pytest.mark.parametrize("shape", [(D,), (S, D), (2, 3, D), (2, 1, 2, D)])
def test_slots_of_any_shape_are_written_from_any_features(form, shape):
    for x in (draw(B, 6), X, draw(B, 4, 4, 6)):
        pool = "mean" if form == "erase_add" and x.ndim > 2 else None
        update = MemoryUpdate((3,), form=form, pool=pool)
        new, _ = jax.eval_shape(partial(update.init_with_output, KEY), x, draw(1, *shape))
        assert new.shape == (B, *shape)


@pytest.mark.parametrize("form", ["erase_add", "attend"])
def test_new_residual_blocks_of_slots_change_nothing(form):
    m = draw(B, S, D)
    update = MemoryUpdate(form=form, mode="residual")
    x = draw(B, 6)
    assert_equal(update.apply(update.init(KEY, x, m), x, m), m)


def test_causal_erasing_and_adding_sees_nothing_later():
    update = MemoryUpdate((3,), form="erase_add", pool="causal")
    m = draw(1, D)
    variables = random_variables(update, X, m)
    new = update.apply(variables, X, m)
    assert new.shape == (B, T, D)
    later = X.copy()
    later[:, 3:] += 1
    changed = update.apply(variables, later, m)
    assert_equal(changed[:, :3], new[:, :3])
    assert np.abs(changed[:, 3:] - new[:, 3:]).min() > 1e-6


def test_slots_are_written_and_read_by_attention_in_a_network():
    aim = latched("body", update=MemoryUpdate((3,), form="attend"))
    variables = random_variables(aim, X)
    update = {n: variables[n]["body"]["memory_update"] for n in ("params", "batch_stats")}
    params = variables["params"]
    h = dense(params, "body", X)
    m = aim.update.apply(update, h, params["memory"]["content"][None])
    reader = params["head"]["memory_read"]
    h = np.tanh(h)
    weights = jax.nn.softmax(
        jnp.einsum("btd,bsd->bts", h @ reader["query"]["kernel"], m) / np.sqrt(D)
    )
    expected = dense(params, "head", h) + weights @ m @ reader["output"]["kernel"]
    assert_close(aim.apply(variables, X), expected)
    assert "head/memory_read/query/kernel" in paths(variables)


REFUSED = {
    "form": (dict(form="slots"), X, (S, D), "form is 'slots', expected one of published, erase_a"),
    "sequence": (dict(), X, (S, D), r"a memory \(4, 2\) is updated from a sequence \(3, 5, 6\)"),
    "erase_add": (dict(form="erase_add"), X, (S, D), r"memory \(4, 2\) .* ask for that .*'mean'\)"),
    "attend": (dict(form="attend", pool="mean"), X, (S, D), "form 'attend' attends to all .* pool"),
    "causal": (dict(form="erase_add", pool="causal"), X, (2, S, D), "'causal' is for a dense memo"),
    "vector": (dict(), draw(B, 6), (S, D), r"is updated from an array \(B, T, C\), not \(3, 6\)"),
    "mask": (
        dict(form="attend"), X, (S, D), r"memory_mask has shape \(3, 4\), expected the leading axes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_do_not_fit_are_refused(name):
    options, x, shape, message = REFUSED[name]
    mask = np.ones((3, 4)) if name == "mask" else None
    with refused(message):
        MemoryUpdate((3,), **options).init(KEY, x, draw(1, *shape), mask=mask)


def test_attending_updates_cannot_decode_step_by_step():
    update = MemoryUpdate((3,), form="attend")
    with refused("decodes step by step .*, where form 'attend' sees other positions"):
        update.init(KEY, X, draw(1, S, D), decode=True)
