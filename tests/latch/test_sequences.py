"""Sequences: how an update pools their positions, and what a causal model may see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused

WORDS, B, T, D = 8, 3, 6, 5


class Block(nn.Module):
    """A pre-norm decoder block."""

    decode: bool = False

    @nn.compact
    def __call__(self, x, mask=None):
        h = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, decode=self.decode, name="attention")(
            h, mask=mask
        )
        h = nn.Dense(8, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(8, name="down")(nn.gelu(h))


class LM(nn.Module):
    """A causal language model: position t predicts token t + 1."""

    decode: bool = False

    @nn.compact
    def __call__(self, tokens, padding=None):
        x = nn.Embed(WORDS, 8, name="embed")(tokens)
        x = x + self.positions(x)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        if padding is not None:
            mask = nn.combine_masks(mask, nn.make_attention_mask(padding, padding))
        for i in range(2):
            x = Block(self.decode, name=f"block{i}")(x, mask)
        return nn.Dense(WORDS, name="head")(nn.LayerNorm(name="norm")(x))

    def positions(self, x):
        table = self.param("positions", nn.initializers.normal(), (2 * T, 8))
        start = 0
        if self.decode:
            known = self.has_variable("cache", "position")
            position = self.variable("cache", "position", lambda: jnp.zeros((), jnp.int32))
            start = position.value
            if known:
                position.value = start + x.shape[1]
        return jax.lax.dynamic_slice_in_dim(table, start, x.shape[1])


def latched(pool="causal", decode=False, **options):
    given = dict(
        read=r"block\d/(up|down)|head",
        update_after=r"block\d",
        read_mode="add",
        update=MemoryUpdate(features=(4, 4), pool=pool, mode=options.pop("mode", "replace")),
    )
    return AiM(LM(decode), Memory((D,), "direct"), **{**given, **options})


def words(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, WORDS, shape).astype(np.int32)


def test_a_dense_update_from_positions_says_how_it_pools():
    message = (
        r"update_after matches 'block0': a memory \(5,\) is updated from an array \(3, 6, 8\), .*"
        r"ask for that with MemoryUpdate\(pool='mean'\), or .*, with pool='causal'$"
    )
    with refused(message):
        jax.eval_shape(latched(pool=None).init, KEY, words(B, T))
    images = AiM(nn.Sequential([nn.Conv(4, (1, 1))]), Memory((D,), "dense"), "", "layers_0")
    with refused(r"from an array \(2, 4, 4, 4\), so it would hold the mean over all its positions"):
        jax.eval_shape(images.init, KEY, draw(2, 4, 4, 3))
    with refused("the update block's pool is 'max', expected one of mean, causal"):
        jax.eval_shape(latched(pool="max").init, KEY, words(B, T))
    with refused(r"pool 'causal' is for arrays \(B, T, C\), not \(2, 4, 4, 4\)"):
        jax.eval_shape(images.clone(update=MemoryUpdate(pool="causal")).init, KEY,
                       draw(2, 4, 4, 3))  # fmt: skip
    with refused("carry 'state' keeps one memory for the next batch, but pool 'causal' writes"):
        jax.eval_shape(latched(carry="state").init, KEY, words(B, T))


@pytest.mark.parametrize("mode", ["replace", "residual", "gated"])
def test_a_causal_model_with_memory_sees_nothing_of_what_comes(mode):
    tokens = words(B, T)
    aim = latched(mode=mode)
    variables = random_variables(aim, tokens)
    assert "batch_stats" not in variables
    for train in (False, True):
        run = jax.jit(partial(aim.apply, train=train))
        expected = run(variables, tokens)
        assert expected.shape == (B, T, WORDS)
        for t in range(T):
            changed = tokens.copy()
            changed[:, t + 1 :] = words(B, T, seed=1)[:, t + 1 :]
            assert_equal(run(variables, changed)[:, : t + 1], expected[:, : t + 1])
    # And the memory does count, from the first position on.
    other = jax.tree.map(np.copy, variables)
    other["params"]["block0"]["memory_update"]["output"]["bias"] += 1
    assert (np.abs(run(other, tokens) - expected).max(axis=-1) > 1e-3).all()


@pytest.mark.slow
def test_a_mean_over_positions_shows_the_future():
    """Why it has to be asked for."""
    tokens = words(B, T)
    aim = latched("mean")
    variables = random_variables(aim, tokens)
    changed = tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % WORDS
    difference = aim.apply(variables, changed) - aim.apply(variables, tokens)
    assert np.abs(difference[:, 0]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_random_words_cannot_be_predicted():
    """Their loss is log 8 at best; a memory that looked ahead took it far below."""
    aim = latched()
    tokens = words(64, T)
    variables = jax.jit(aim.init)(KEY, tokens[:2])
    optimizer = optax.adam(1e-2)

    def loss(params, tokens):
        logits = aim.apply({"params": params}, tokens, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return losses.mean()

    @jax.jit
    def step(params, slots, key):
        tokens = jax.random.randint(key, (32, T), 0, WORDS)
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, slots = optimizer.update(gradients, slots)
        return optax.apply_updates(params, updates), slots, value

    params, slots, values = variables["params"], optimizer.init(variables["params"]), []
    for i in range(250):
        params, slots, value = step(params, slots, jax.random.fold_in(KEY, i))
        values.append(float(value))
    assert np.mean(values[-50:]) > np.log(WORDS) - 0.01


@pytest.mark.slow
def test_decoding_step_by_step_is_the_full_pass():
    tokens = words(B, T)
    aim = latched()
    variables = random_variables(aim, tokens)
    expected = aim.apply(variables, tokens)
    stepwise = latched(decode=True)
    cache = jax.tree.map(np.zeros_like, LM(decode=True).init(KEY, tokens)["cache"])
    run = jax.jit(partial(stepwise.apply, mutable=["cache"]))
    state, found = {"cache": cache}, []
    for t in range(T):
        logits, state = run({**variables, **state}, tokens[:, t : t + 1])
        found.append(logits)
    assert_close(jnp.concatenate(found, axis=1), expected)


@pytest.mark.slow
def test_decoding_in_a_compiled_loop_begins_with_the_cache_of_init():
    """Whose structure is that of every later step, as `jax.lax.scan` needs it."""
    tokens = words(B, T)
    aim, stepwise = latched(), latched(decode=True)
    variables = random_variables(aim, tokens)

    def step(cache, token):
        logits, state = stepwise.apply(
            {**variables, "cache": cache}, token[:, None], mutable=["cache"]
        )
        return state["cache"], logits[:, 0]

    cache = stepwise.init(KEY, tokens)["cache"]
    assert cache["block0"]["memory_update"]["total"].shape == (B, 8)
    _, found = jax.lax.scan(step, cache, tokens.T)
    assert_close(jnp.swapaxes(found, 0, 1), aim.apply(variables, tokens))
    # A network that keeps nothing has no cache.
    assert "cache" not in aim.init(KEY, tokens)


class EncoderDecoder(nn.Module):
    """A decoder that sees the mean of what is encoded."""

    @nn.compact
    def __call__(self, source, target):
        code = nn.Dense(8, name="encode")(source).mean(axis=1, keepdims=True)
        return nn.Dense(3, name="out")(nn.Dense(8, name="decode")(target) + code)


@pytest.mark.slow
def test_a_causal_memory_follows_the_sequence_of_the_decoder():
    source, target = draw(2, 6, 4), draw(2, 5, 4)
    update = MemoryUpdate((3,), pool="causal")
    given = dict(memory=Memory((D,), "dense"), read="out", update=update)
    aim = AiM(EncoderDecoder(), update_after="decode", **given)
    variables = random_variables(aim, source, target)
    y = aim.apply(variables, source, target)
    assert y.shape == (2, 5, 3)
    changed = aim.apply(variables, source, np.where(np.arange(5)[:, None] < 3, target, 1.0))
    assert_equal(changed[:, :3], y[:, :3])
    # What the encoder writes is of another sequence.
    with refused("'out', which has an array .* its second axis is not the sequence|not as many"):
        AiM(EncoderDecoder(), update_after="encode", **given).init(KEY, source, target)


def test_decoding_is_refused_where_it_would_differ():
    tokens = words(B, T)
    aim = latched("mean", decode=True)
    variables = random_variables(aim, tokens)
    with refused(r"'block0': the network decodes step by step .* use pool='causal', or"):
        aim.apply(variables, tokens[:, :1], mutable=["cache"])


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "causal"])
def test_padding_that_is_masked_changes_no_real_token(pool):
    tokens, real = words(B, T), np.ones((B, T), bool)
    aim = latched(pool)
    variables = random_variables(aim, tokens)
    run = jax.jit(aim.apply)
    expected = run(variables, tokens, real, memory_mask=real)
    assert_close(run(variables, tokens, real), expected, 1e-6)
    padded = np.concatenate([tokens, np.zeros((B, 3), np.int32)], axis=1)
    mask = np.concatenate([real, np.zeros((B, 3), bool)], axis=1)
    assert_close(run(variables, padded, mask, memory_mask=mask)[:, :T], expected)
    if pool == "mean":
        assert not np.allclose(run(variables, padded, mask)[:, :T], expected, atol=1e-4)
    # Padding in front, too; causal attention is told by the network's own mask.
    holes = mask.copy()
    holes[:, 2] = False
    other = padded.copy()
    other[:, 2] = (other[:, 2] + 1) % WORDS
    found = [run(variables, t, holes, memory_mask=holes) for t in (padded, other)]
    keep = [0, 1, 3, 4, 5]
    assert_close(found[0][:, keep], found[1][:, keep], 1e-6)


def test_masks_that_do_not_fit_are_refused():
    tokens = words(B, T)
    aim = latched("mean")
    variables = random_variables(aim, tokens)
    with refused(r"memory_mask has shape \(3, 5\), expected the leading axes of the array \(3, 6,"):
        aim.apply(variables, tokens, memory_mask=np.ones((B, 5)))
    with refused("memory_mask is of updates, but update_after is empty"):
        latched(update_after="").apply(variables, tokens, memory_mask=np.ones((B, T)))
    images = AiM(nn.Sequential([nn.Conv(4, (1, 1))]), Memory((2, 2, 3)), "", "layers_0")
    with refused("pool and memory_mask are of dense memories: a convolutional one is pooled to"):
        jax.eval_shape(partial(images.init, memory_mask=np.ones((2, 4))), KEY, draw(2, 4, 4, 3))


def test_what_a_causal_block_computes():
    """By hand: means so far, layer norm in batch norm's place, a memory per position."""
    x, m = draw(2, 4, 3), draw(1, D, seed=1)
    block = MemoryUpdate(features=(4,), pool="causal")
    variables = random_variables(block, x, m)
    params = variables["params"]
    means = np.cumsum(x, axis=1) / np.arange(1, 5)[:, None]
    h = np.concatenate([means, np.broadcast_to(m[:, None], (2, 4, D))], axis=-1)
    h = h @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    h = (h - h.mean(axis=-1, keepdims=True)) / np.sqrt(h.var(axis=-1, keepdims=True) + 1e-3)
    h = jax.nn.sigmoid(h * params["norm1"]["scale"] + params["norm1"]["bias"])
    new = h @ params["output"]["kernel"] + params["output"]["bias"]
    assert_close(block.apply(variables, x, m), new)
    again = block.apply(variables, x, new)
    assert again.shape == (2, 4, D)


class Summary(nn.Module):
    """A layer after the sequence is gone, and one over heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="early")(x)
        heads = nn.Dense(2, name="heads")(x.reshape(*x.shape[:2], 2, 2))
        crossed = nn.Dense(2, name="crossed")(heads.swapaxes(1, 2)).swapaxes(1, 2)
        return nn.Dense(2, name="pooled")((heads + crossed).mean(axis=(1, 2)))


def test_a_memory_per_position_is_read_where_positions_are():
    x = draw(3, 2, 4)  # as many positions as heads

    def aim(read):
        update = MemoryUpdate(features=(3,), pool="causal")
        return AiM(Summary(), Memory((D,), "direct"), read, "early", update=update, read_mode="add")

    assert aim("heads").apply(random_variables(aim("heads"), x), x).shape == (3, 2)
    with refused("'pooled', but the memory has one content for each of 2 positions, and its inp"):
        jax.eval_shape(aim("pooled").init, KEY, x)
    with refused(r"'crossed', .* \(3, 2, 4, 2\) for a sequence of 4: its second axis is not the s"):
        jax.eval_shape(aim("crossed").init, KEY, x)
