"""Memories without content, update blocks that keep the old memory, and reads that multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict

from aim_flax import AiM, Memory, MemoryUpdate, build_model, fit
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused
from tests.networks import D, dense, probed, weights_of, written
from tests.runs import digits, first_steps

pytestmark = pytest.mark.usefixtures("quick_compile")


class Looks(nn.Module):
    """Returns what each `look` reads, given SEEING: kernels are zero, read kernels identity."""

    @nn.compact
    def __call__(self, x):
        return [nn.Dense(64, use_bias=False, name=f"look{i}")(x) for i in (1, 2)]


def latched_looks(kind):
    return AiM(Looks(), Memory((64,), kind), "look.*", read_initial="look2", read_mode="add")


ZEROS, IDENTITY = np.zeros((4, 64), np.float32), np.eye(64, dtype=np.float32)
LOOK = {"kernel": ZEROS, "memory_read": {"kernel": IDENTITY}}
SEEING = {"params": {"look1": LOOK, "look2": LOOK}}


def test_noise_and_zero_memories_have_no_parameters():
    x = draw(5, 4)
    for kind in ("noise", "zero"):
        variables = jax.eval_shape(latched_looks(kind).init, KEY, x)
        assert jax.tree.structure(variables) == jax.tree.structure(SEEING)


def test_a_zero_memory_is_all_zeros():
    x = draw(5, 4)
    for look in latched_looks("zero").apply(SEEING, x, train=True):
        assert_equal(look, np.zeros((5, 64)))


def test_noise_is_drawn_from_the_key_in_training_and_is_fixed_in_evaluation():
    x = draw(5, 4)
    aim = latched_looks("noise")
    looks = [
        aim.apply(SEEING, x),
        aim.apply(SEEING, x),
        aim.apply(SEEING, x, rngs={"memory": KEY}),
        aim.apply(SEEING, x, train=True, rngs={"memory": KEY}),
        aim.apply(SEEING, x, train=True, rngs={"memory": KEY, "dropout": jax.random.key(1)}),
        aim.apply(SEEING, x, train=True, rngs={"memory": jax.random.key(1)}),
    ]
    drawn = np.array([[look[0] for look in pair] for pair in looks])
    for look in jax.tree.leaves(looks):
        # One for all examples.
        assert_equal(look, np.repeat(look[:1], 5, axis=0))
    assert_equal(drawn[1], drawn[0])
    assert_equal(drawn[2], drawn[0])
    assert_equal(drawn[4], drawn[3])
    # Evaluation, two keys in training, two memories: six draws of a standard normal.
    different = drawn[[0, 3, 5]].reshape(6, 64)
    assert len(np.unique(different)) == different.size
    assert np.abs(np.corrcoef(different) - np.eye(6)).max() < 0.5
    assert abs(different.mean()) < 4 / np.sqrt(different.size)
    assert abs(different.std() - 1) < 4 / np.sqrt(2 * different.size)
    with pytest.raises(InvalidRngError, match='needs PRNG for "memory"'):
        aim.apply(SEEING, x, train=True)


def steps_of(count, steps, *assignments):
    # optax's Adam promotes dtypes implicitly.
    with jax.numpy_dtype_promotion("standard"):
        return first_steps(digits("aim_no_update", *assignments), count, steps)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_all_devices_draw_the_same_noise(parallel):
    options = ("memory.kind=noise", "memory.read_mode=add", f"parallel={parallel}")
    losses, before, expected = steps_of(1, 2, *options)
    found, _, after = steps_of(4, 2, *options)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_close(after.params, expected.params, 1e-4)
    # And it does count: kernels of reads are moved by it.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.params, before.params)
    assert moved["head"]["memory_read"]["kernel"] > 1e-3


def test_noise_is_drawn_anew_at_each_step():
    """Every batch is the whole of the training images, and nothing is learned."""
    still = ("optimizer.learning_rate=0.0", "train.batch_size=1257", "train.epochs=3")
    for kind, differ in (("noise", True), ("zero", False)):
        losses, _, _ = steps_of(1, 3, f"memory.kind={kind}", *still)
        assert (np.ptp(losses) > 1e-3) == differ


FORMS = {
    "dense": ((5, 6), (4,)),
    "map larger than the memory": ((5, 6, 5, 3), (2, 2, 4)),
    "map smaller than the memory": ((5, 2, 2, 3), (3, 4, 2)),
}


def block_of(mode, form, batch=5, **options):
    """Returns an update block, random variables, its input and a memory."""
    x, m = draw(*FORMS[form][0]), draw(batch, *FORMS[form][1], seed=1)
    block = MemoryUpdate(features=(3, 2), mode=mode, **options)
    return block, random_variables(block, x, m), x, m


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_modes_are_what_their_formulas_say(form, batch):
    replace, variables, x, m = block_of("replace", form, batch)
    candidate = replace.apply(variables, x, m)
    residual = MemoryUpdate(features=(3, 2), mode="residual")
    assert_close(residual.apply(variables, x, m), m + candidate)

    gated, variables, _, _ = block_of("gated", form, batch)
    params = variables["params"]
    others = {name: params[name] for name in params if name != "gate"}
    candidate = replace.apply({**variables, "params": others}, x, m)
    # The gate is a second last layer on the same features: with its parameters in the last one's
    # place the block of mode `replace` gives what goes into the sigmoid.
    opening = replace.apply({**variables, "params": {**others, "output": params["gate"]}}, x, m)
    gate = 1 / (1 + np.exp(-opening))
    assert 0.01 < gate.min() < gate.max() < 0.99
    assert_close(gated.apply(variables, x, m), (1 - gate) * m + gate * candidate)


@pytest.mark.parametrize("form", FORMS)
def test_new_residual_blocks_change_nothing_and_new_gates_are_almost_closed(form):
    for train in (False, True):
        block, _, x, m = block_of("residual", form, batch=1)
        start = jax.jit(block.init)(KEY, x, m)
        new, _ = block.apply(start, x, m, train=train, mutable=["batch_stats"])
        assert_equal(new, np.broadcast_to(m, (5, *m.shape[1:])))

    block, _, x, m = block_of("gated", form, batch=1)
    start = jax.jit(block.init)(KEY, x, m)
    assert_equal(start["params"]["gate"]["bias"], np.full(m.shape[-1], -2))
    others = {name: leaf for name, leaf in start["params"].items() if name != "gate"}
    candidate = MemoryUpdate(features=(3, 2)).apply({**start, "params": others}, x, m)
    share = (block.apply(start, x, m) - m) / (candidate - m)
    assert 0.05 < float(jnp.median(share)) < 0.25


def test_residual_and_gated_blocks_keep_other_initial_values():
    x, m = draw(5, 6), draw(1, 4)
    blocks = [MemoryUpdate(mode=mode) for mode in ("replace", "residual", "gated")]
    start = jax.jit(lambda: [flatten_dict(b.init(KEY, x, m)["params"], sep="/") for b in blocks])
    replace, residual, gated = start()
    assert_equal({path: gated[path] for path in replace}, replace)
    assert set(gated) - set(replace) == {"gate/kernel", "gate/bias"}
    assert set(residual) == set(replace)
    changed = {path for path in replace if not np.array_equal(residual[path], replace[path])}
    assert changed == {"output/kernel"}


@pytest.mark.parametrize("mode", ["residual", "gated"])
def test_the_old_memory_gets_through_beside_the_batch_norms(mode):
    x = draw(5, 4)
    aim, variables = probed(x, update=MemoryUpdate(mode=mode))

    @jax.jit
    def gradients(memory):
        def loss(memory):
            given = {**variables, "params": {**variables["params"], "memory": memory}}
            looks, _ = aim.apply(given, x, train=True, mutable=["batch_stats"])
            return looks["look2"].sum()

        return jax.grad(loss)(memory)

    bias = gradients(variables["params"]["memory"])["dense"]["bias"]
    if mode == "residual":
        # What all examples have in common the norms remove, so only the sum with m has a gradient:
        # 1 for each of the five examples.
        assert_close(bias, np.full(D, 5), 1e-4)
    else:
        assert 0.1 < float(bias.min()) < float(bias.max()) < 5


@pytest.mark.parametrize("mode", [pytest.param("residual", marks=pytest.mark.slow), "gated"])
def test_small_changes_add_up_in_the_memorys_own_dtype(mode):
    x, m = jnp.ones((2, 6), jnp.bfloat16), jnp.full((1, 4), 1 + 2**-12)
    block = MemoryUpdate(dtype=jnp.bfloat16, mode=mode)
    # Flax's batch norm itself mixes bfloat16 activations with float32 statistics.
    with jax.numpy_dtype_promotion("standard"):
        start = block.init(KEY, x, m)
        start["params"]["output"] = jax.tree.map(jnp.zeros_like, start["params"]["output"])
        new = block.apply(start, x, m)
        assert new.dtype == m.dtype
    if mode == "residual":
        assert_equal(new, np.repeat(m, 2, axis=0))


def test_carry_takes_what_the_last_block_wrote_whatever_the_mode():
    x = draw(5, 4)
    for mode in ("residual", "gated"):
        aim, variables = probed(
            x, carry="state", carry_rate=1.0, update=MemoryUpdate(mode=mode, momentum=0.5)
        )
        variables["memory"]["carried"] = np.zeros(D, np.float32)
        looks, state = aim.apply(variables, x, train=True, mutable=["memory", "batch_stats"])
        expected = np.mean(looks["look2"], axis=0) - weights_of(variables)[0]
        assert_close(state["memory"]["carried"], expected)


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), feature_group_count=2, name="conv")(x)
        return nn.Dense(3, name="dense")(x)


@pytest.mark.parametrize("update_after", ["", "conv"])
def test_scale_multiplies_a_layers_output_by_one_plus_the_read(update_after):
    x = draw(5, 4, 4, 2)
    options = dict(memory=Memory((2, 2, 4)), read="conv|dense", update_after=update_after)
    aim = AiM(Images(), read_mode="scale", **options)
    variables = random_variables(aim, x)
    params = variables["params"]
    m = weights_of(variables)
    halves = jnp.split(x, 2, axis=-1), jnp.split(params["conv"]["kernel"][0, 0], 2, axis=-1)
    own = jnp.concatenate([h @ kernel for h, kernel in zip(*halves, strict=True)], axis=-1)
    own += params["conv"]["bias"]
    h = own * (1 + fit(m, 4, 4) @ params["conv"]["memory_read"]["kernel"][0, 0])
    if update_after:
        m = written(variables, "conv", h, m)
    own = dense(variables, "dense", h)
    read = m.mean(axis=(1, 2)) @ params["dense"]["memory_read"]["kernel"]
    expected = own * (1 + read[:, None, None])
    found, seen = aim.apply(variables, x, mutable=["intermediates"])
    assert_close(found, expected, 1e-4)
    # What is recorded is the difference that the memory makes.
    (use,) = seen["intermediates"]["dense"]["memory_use"]
    norms = [np.sqrt(np.square(y).sum(axis=(1, 2, 3))).mean() for y in (expected - own, own)]
    np.testing.assert_allclose([use["share"], use["own"]], norms, rtol=1e-4)
    # A control by construction: the variables are those of `add`.
    add = AiM(Images(), read_mode="add", **options)
    assert_equal(
        jax.tree.map(jnp.shape, variables),
        jax.tree.map(jnp.shape, jax.eval_shape(add.init, KEY, x)),
    )


def params_of(**memory):
    """Returns the shapes of the parameters of a network whose config has these options."""
    config = digits()
    with config.unlocked():
        config.memory.update(memory)
    return jax.eval_shape(build_model(config).init, KEY, draw(1, 8, 8, 1))["params"]


def test_variants_are_reached_from_a_config():
    block = {"mode": "gated", "features": (2,)}
    params = params_of(kind="noise", read_mode="scale", zero_init=True, update_block=block)
    assert set(params) == {"layer1", "layer2", "head"}
    assert set(params["layer1"]["memory_update"]) == {"dense1", "norm1", "output", "gate"}
    assert set(params["layer2"]["dense"]) == {"kernel", "bias", "memory_read"}


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (dict(kind="nois"), r"the memory's kind is 'nois', expected .* \(did you mean 'noise'\?\)"),
        (
            dict(update_block={"mode": "residul"}),
            r"the update block's mode is 'residul', expected one of replace, residual, gated \(did",
        ),
        (dict(read_mode="scales"), r"read_mode is 'scales', .* \(did you mean 'scale'\?\)"),
        (dict(learning_rate=0.1), "memory.learning_rate is no option of AiM"),
        (dict(no_write=(".*",)), "memory.no_write is no option of AiM"),
        (dict(alter_read=()), "memory.alter_read is no option of AiM"),
        (dict(backbone=None), "memory.backbone is no option of AiM"),
        (
            dict(update_block=dict(dtype=None)),
            "memory.update_block.dtype is no option of MemoryUpd",
        ),
    ],
)
def test_wrong_variants_are_told_in_one_line(memory, message):
    with refused(message):
        params_of(**memory)
