"""The memory parameter, reshape-and-pad, the update block and its pooling."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax import Memory, MemoryUpdate, fit
from aim_flax.errors import UsageError
from aim_flax.memory import average_pool_to, check_memory, distinct_values, pair

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


def random_like(shapes, seed=0):
    """Draws an array for every shape of a tree; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def counting_memory(shape, batch=1, dtype=np.int32):
    """A memory of 1, 2, 3, ...: no float is zero and no two are equal."""
    return np.arange(1, batch * math.prod(shape) + 1, dtype=dtype).reshape(batch, *shape)


# --- fit ---------------------------------------------------------------------------------------


def test_fit_keeps_every_float_once_whatever_the_sizes():
    rng = np.random.default_rng(0)
    cases = []
    while len(cases) < 100:
        # Half of the maps are larger than most memories, and some have one row or column.
        most = 9 if len(cases) % 2 else 24
        shape = tuple(int(n) for n in rng.integers(1, 7, 3))
        height, width = (int(n) for n in rng.integers(1, most, 2))
        cases.append((shape, height, width, int(rng.integers(1, 4))))
    memories = [counting_memory(shape, batch) for shape, _, _, batch in cases]
    fitted = jax.jit(lambda ms: [fit(m, h, w) for m, (_, h, w, _) in zip(ms, cases, strict=True)])(
        memories
    )
    kinds = set()
    for m, out, (shape, height, width, batch) in zip(memories, fitted, cases, strict=True):
        total, area = math.prod(shape), height * width
        side = math.ceil(math.sqrt(total))
        if total >= area:
            kinds.add("exact" if total % area == 0 else "remainder")
        else:
            kinds.add("square" if min(height, width) >= side else "thin")
        assert out.shape == (batch, height, width, max(1, math.ceil(total / area)))
        for example, original in zip(np.asarray(out), m, strict=True):
            # In the same order, too: with padding dropped, a fitted memory is the memory.
            np.testing.assert_array_equal(example[example != 0], original.ravel())
    assert kinds == {"exact", "remainder", "square", "thin"}


def test_fit_of_a_memory_that_the_map_divides():
    # The published network: 7x7x1024 floats on maps of 112, 56, 28, 14 and 7 pixels.
    m = counting_memory((7, 7, 1024))
    flat = m.ravel()
    for size in (112, 56, 28, 14, 7):
        channels = 50176 // size**2
        out = np.asarray(fit(m, size, size))
        assert out.shape == (1, size, size, channels)
        rows, columns, c = (a.ravel() for a in np.indices((size, size, channels)))
        expected = flat[(rows * size + columns) * channels + c]
        np.testing.assert_array_equal(out[0].ravel(), expected)


def test_fit_of_a_square_memory_is_centred_in_a_larger_map():
    m = counting_memory((4, 4, 4))  # 64 floats, a square of 8 x 8
    for size in (9, 12, 15):
        expected = np.zeros((size, size), np.int32)
        first = (size - 8) // 2
        for i in range(8):
            for j in range(8):
                expected[first + i, first + j] = m.ravel()[i * 8 + j]
        np.testing.assert_array_equal(fit(m, size, size)[0, :, :, 0], expected)


def test_fit_pads_a_memory_that_is_no_square_in_front_and_behind():
    m = counting_memory((1, 3, 2))  # 6 floats in a square of 9: 1 zero in front, 2 behind
    expected = np.zeros((4, 6), np.int32)
    expected[0:3, 1:4] = [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    np.testing.assert_array_equal(fit(m, 4, 6)[0, :, :, 0], expected)


def test_fit_pads_the_tail_where_the_map_does_not_divide_the_memory():
    m = counting_memory((1, 5, 2))  # 10 floats on 2 x 2: 3 channels, 2 zeros at the end
    expected = np.append(np.arange(1, 11), [0, 0]).reshape(2, 2, 3)
    np.testing.assert_array_equal(fit(m, 2, 2)[0], expected)


@pytest.mark.parametrize("size", [(2, 9), (9, 2), (1, 11), (11, 1)])
def test_fit_lays_out_a_memory_along_a_map_too_thin_for_its_square(size):
    m = counting_memory((2, 2, 2))  # 8 floats, a square of 3 x 3
    expected = np.zeros(math.prod(size), np.int32)
    expected[:8] = np.arange(1, 9)
    np.testing.assert_array_equal(fit(m, *size)[0, :, :, 0], expected.reshape(size))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (7, 7), (2, 30)])
def test_fit_keeps_the_dtype_and_the_examples_apart(dtype, size):
    m = jnp.asarray(counting_memory((3, 2, 3), batch=3), dtype)
    together = fit(m, *size)
    assert together.dtype == dtype
    for i in range(3):
        np.testing.assert_array_equal(together[i : i + 1], fit(m[i : i + 1], *size))


# --- Memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "kernel_size", "parameters"),
    [
        ("conv", (7, 7, 1024), 1, 1024 * 1024 + 1024),  # published: 1,049,600
        ("conv", (7, 7, 64), 7, 7 * 7 * 64 * 64 + 64),  # the author's suggestion, R x K
        ("conv", (3, 5, 8), (3, 5), 3 * 5 * 8 * 8 + 8),
        ("dense", (16,), 1, 16 * 16 + 16),
        ("direct", (7, 7, 1024), 1, 50176),
        ("direct", (16,), 1, 16),
        ("noise", (7, 7, 8), 1, 0),
        ("noise", (16,), 1, 0),
        ("zero", (7, 7, 8), 1, 0),
        ("zero", (16,), 1, 0),
    ],
)
def test_memory_has_this_shape_and_so_many_parameters(kind, shape, kernel_size, parameters):
    memory = Memory(shape, kind, kernel_size)
    content, variables = jax.eval_shape(memory.init_with_output, KEY)
    assert content.shape == (1, *shape)
    assert content.dtype == jnp.float32
    assert count(variables) == parameters


def test_content_of_a_1x1_convolution_is_weights_plus_bias_everywhere():
    memory = Memory((3, 4, 5))
    params = random_like(jax.eval_shape(memory.init, KEY))
    conv = params["params"]["conv"]
    expected = conv["kernel"][0, 0].sum(axis=0) + conv["bias"]
    content = memory.apply(params)
    np.testing.assert_allclose(content, np.broadcast_to(expected, (1, 3, 4, 5)), rtol=1e-5)


def test_content_of_dense_and_direct_memories():
    dense = Memory((5,), "dense")
    params = random_like(jax.eval_shape(dense.init, KEY))
    layer = params["params"]["dense"]
    expected = layer["kernel"].sum(axis=0) + layer["bias"]
    np.testing.assert_allclose(dense.apply(params)[0], expected, rtol=1e-5)
    direct = Memory((2, 3, 4), "direct")
    params = random_like(jax.eval_shape(direct.init, KEY))
    np.testing.assert_array_equal(direct.apply(params)[0], params["params"]["content"])


def test_new_memories_have_content_of_about_unit_variance():
    for memory in (Memory((2, 2, 256)), Memory((256,), "dense"), Memory((4, 4, 32), "direct")):
        content, _ = memory.init_with_output(KEY)
        assert 0.8 < float(content.std()) < 1.2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_param_dtype_is_the_dtype_of_parameters_and_content(dtype):
    for memory in (
        Memory((2, 2, 3), param_dtype=dtype),
        Memory((3,), "dense", param_dtype=dtype),
        Memory((3,), "direct", param_dtype=dtype),
    ):
        content, variables = jax.eval_shape(memory.init_with_output, KEY)
        assert content.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(dtype)}


KERNELS = [1, 2, 3, 4, 5, 8, 11, (1, 3), (3, 1), (2, 5), (7, 2), (11, 4)]


def test_distinct_values_is_the_number_of_different_floats():
    shape = (5, 4, 3)
    memories = [Memory(shape, "conv", kernel) for kernel in KERNELS]
    # Whole numbers, which float32 adds exactly in any order.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.integers(-(2**16), 2**16, leaf.shape).astype(np.float32),
        [jax.eval_shape(memory.init, KEY) for memory in memories],
    )
    contents = jax.jit(lambda ps: [m.apply(p) for m, p in zip(memories, ps, strict=True)])(params)
    for kernel, content in zip(KERNELS, contents, strict=True):
        assert distinct_values(shape, "conv", kernel) == len(np.unique(content)), kernel


def test_distinct_values_of_the_published_memory_and_of_the_other_kinds():
    assert distinct_values((7, 7, 1024), "conv", 1) == 1024
    assert distinct_values((7, 7, 1024), "conv", 7) == 50176
    assert distinct_values((16,), "dense") == 16
    assert distinct_values((7, 7, 1024), "direct") == 50176
    assert distinct_values((7, 7, 8), "noise") == 392
    assert distinct_values((7, 7, 8), "zero") == 1


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((7, 7), "conv", r"a conv memory has shape \(R, K, D\), each at least 1, not \(7, 7\)"),
        ((0, 7, 8), "conv", r"not \(0, 7, 8\)"),
        ((7, 0, 8), "direct", r"has shape \(D,\) or \(R, K, D\), each at least 1, not \(7, 0, 8\)"),
        ((7, 7, -1), "conv", r"not \(7, 7, -1\)"),
        ((7, 7, 8.0), "conv", r"not \(7, 7, 8.0\)"),
        (7, "conv", r"not \(7,\)"),
        (None, "conv", r"not \(None,\)"),
        ((), "direct", r"not \(\)"),
        ((7, 7, 8), "dense", r"a dense memory has shape \(D,\), each at least 1, not \(7, 7, 8\)"),
        ((0,), "dense", r"not \(0,\)"),
        (
            (7,),
            "dens",
            r"expected one of conv, dense, direct, noise, zero \(did you mean 'dense'\?\)",
        ),
    ],
)
def test_bad_shapes_and_kinds_are_told_in_one_line(shape, kind, message):
    for use in (check_memory, distinct_values, lambda *args: Memory(*args).init(KEY)):
        with pytest.raises(UsageError, match=message) as refusal:
            use(shape, kind)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [0, -1, (3,), (3, 0), (3, 3, 3), 2.5, (3, 2.5), None])
def test_bad_kernel_sizes_are_told_in_one_line(size):
    image, m = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2, 2, 3))
    for use in (
        lambda: pair(size),
        lambda: distinct_values((2, 2, 3), "conv", size),
        lambda: Memory((2, 2, 3), "conv", size).init(KEY),
        lambda: MemoryUpdate(kernel_size=size).init(KEY, image, m),
    ):
        with pytest.raises(UsageError, match="a kernel size is a positive int or two of them"):
            use()


# --- MemoryUpdate ------------------------------------------------------------------------------


def test_published_update_blocks_have_393216_parameters_and_running_statistics():
    total = 0
    for size, channels in ((112, 256), (56, 512), (28, 1024)):
        x = jax.ShapeDtypeStruct((16, size, size, channels), jnp.float32)
        m = jax.ShapeDtypeStruct((16, 7, 7, 1024), jnp.float32)
        new, variables = jax.eval_shape(MemoryUpdate().init_with_output, KEY, x, m)
        assert new.shape == (16, 7, 7, 1024)
        assert count(variables["batch_stats"]) == 2 * (16 + 16 + 32)
        total += count(variables)
    assert total == 393_216


@pytest.mark.parametrize(
    ("x", "m", "new"),
    [
        ((3, 8, 8, 5), (1, 2, 2, 4), (3, 2, 2, 4)),
        ((3, 8, 8, 5), (3, 2, 2, 4), (3, 2, 2, 4)),
        ((3, 5, 9, 5), (1, 4, 3, 2), (3, 4, 3, 2)),  # no windows give this size
        ((3, 2, 1, 5), (1, 4, 3, 2), (3, 4, 3, 2)),  # a map smaller than the memory
        ((3, 6), (1, 4), (3, 4)),
        ((3, 6), (3, 4), (3, 4)),
        ((3, 7, 6), (1, 4), (3, 4)),
        ((3, 8, 8, 6), (1, 4), (3, 4)),
    ],
)
def test_update_gives_every_example_a_memory_of_the_same_size(x, m, new):
    update = partial(MemoryUpdate().init_with_output, KEY)
    output, _ = jax.eval_shape(update, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, m)))
    assert output.shape == new
    assert output.dtype == jnp.float32


def test_parameter_counts_of_update_blocks():
    def parameters(update, x, m):
        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, m))
        return count(jax.eval_shape(update.init, KEY, *shapes)["params"])

    norms = 2 * (16 + 16 + 32)
    # 8 x 8 maps hold the 16 floats of the memory in one channel.
    conv = (9 * 6 * 16 + 16) + (9 * 16 * 16 + 16) + (9 * 16 * 32 + 32) + norms + (32 * 4 + 4)
    assert parameters(MemoryUpdate(), (1, 8, 8, 5), (1, 2, 2, 4)) == conv
    dense = (9 * 16 + 16) + (16 * 16 + 16) + (16 * 32 + 32) + norms + (32 * 4 + 4)
    assert parameters(MemoryUpdate(), (1, 5), (1, 4)) == dense
    narrow = MemoryUpdate(features=(2,), kernel_size=(1, 3))
    assert parameters(narrow, (1, 8, 8, 5), (1, 2, 2, 4)) == 3 * 6 * 2 + 2 + 4 + 2 * 4 + 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense_update_by_hand(variables, h, train):
    params, stats = variables["params"], variables["batch_stats"]
    for i in (1, 2, 3):
        layer, norm = params[f"dense{i}"], params[f"norm{i}"]
        h = h @ layer["kernel"] + layer["bias"]
        seen = {"mean": h.mean(axis=0), "var": h.var(axis=0)} if train else stats[f"norm{i}"]
        h = (h - seen["mean"]) / np.sqrt(seen["var"] + 1e-3) * norm["scale"] + norm["bias"]
        h = sigmoid(h)
    return h @ params["output"]["kernel"] + params["output"]["bias"]


@pytest.mark.parametrize("train", [False, True])
def test_dense_update_is_what_the_formula_says(train):
    rng = np.random.default_rng(1)
    x, m = rng.normal(size=(6, 3, 5)).astype(np.float32), np.float32([[0.3, -1.0]])
    update = MemoryUpdate()
    variables = random_like(jax.eval_shape(update.init, KEY, x, m))
    new = update.apply(variables, x, m, train=train, mutable=["batch_stats"] if train else False)
    new = new[0] if train else new
    # Axes between batch and features are averaged; the memory is the same for all examples.
    joined = np.concatenate([x.mean(axis=1), np.repeat(m, 6, axis=0)], axis=1)
    np.testing.assert_allclose(new, dense_update_by_hand(variables, joined, train), atol=1e-5)


def test_convolutional_update_is_what_the_formula_says():
    # 1x1 kernels, so that the convolutions are matrix products.
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 6, 4, 5)).astype(np.float32)
    m = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
    update = MemoryUpdate(kernel_size=1)
    variables = random_like(jax.eval_shape(update.init, KEY, x, m))
    params = variables["params"]
    h = np.concatenate([x, m.reshape(3, 6, 4, 1)], axis=-1)  # 24 floats on 24 positions
    for i in (1, 2, 3):
        layer, norm, seen = (
            tree[name]
            for tree, name in (
                (params, f"conv{i}"),
                (params, f"norm{i}"),
                (variables["batch_stats"], f"norm{i}"),
            )
        )
        h = h @ layer["kernel"][0, 0] + layer["bias"]
        h = (h - seen["mean"]) / np.sqrt(seen["var"] + 1e-3) * norm["scale"] + norm["bias"]
        h = sigmoid(h)
    h = h.reshape(3, 3, 2, 2, 2, 32).mean(axis=(2, 4))
    expected = h @ params["output"]["kernel"][0, 0] + params["output"]["bias"]
    np.testing.assert_allclose(update.apply(variables, x, m), expected, atol=1e-5)


def test_running_statistics_change_only_in_training():
    rng = np.random.default_rng(1)
    x, m = rng.normal(size=(6, 5)).astype(np.float32), np.ones((1, 2), np.float32)
    update = MemoryUpdate()
    variables = random_like(jax.eval_shape(update.init, KEY, x, m))
    before = variables["batch_stats"]
    _, evaluated = update.apply(variables, x, m, train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, evaluated["batch_stats"], before)
    _, trained = update.apply(variables, x, m, train=True, mutable=["batch_stats"])
    layer = variables["params"]["dense1"]
    h = np.concatenate([x, np.repeat(m, 6, axis=0)], axis=1) @ layer["kernel"] + layer["bias"]
    after = trained["batch_stats"]["norm1"]
    for name, seen in (("mean", h.mean(axis=0)), ("var", h.var(axis=0))):
        expected = 0.99 * before["norm1"][name] + 0.01 * seen
        np.testing.assert_allclose(after[name], expected, rtol=1e-5)


def test_momentum_and_epsilon_reach_the_norms():
    x, m = np.float32([[1.0, 2.0], [3.0, 5.0]]), np.ones((1, 2), np.float32)
    variables = random_like(jax.eval_shape(MemoryUpdate().init, KEY, x, m))
    update = MemoryUpdate(momentum=0.0, epsilon=10.0)
    _, trained = update.apply(variables, x, m, train=True, mutable=["batch_stats"])
    layer = variables["params"]["dense1"]
    h = np.concatenate([x, np.repeat(m, 2, axis=0)], axis=1) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(trained["batch_stats"]["norm1"]["mean"], h.mean(axis=0), rtol=1e-5)
    assert not np.allclose(
        update.apply(variables, x, m), MemoryUpdate().apply(variables, x, m), atol=1e-3
    )


def test_update_computes_in_its_dtype_and_keeps_float32_parameters():
    x, m = jnp.ones((2, 4, 4, 3), jnp.bfloat16), jnp.ones((1, 2, 2, 4))
    update = MemoryUpdate(dtype=jnp.bfloat16)
    # Flax's batch norm itself mixes bfloat16 activations with float32 statistics.
    with jax.numpy_dtype_promotion("standard"):
        new, variables = jax.eval_shape(update.init_with_output, KEY, x, m)
    assert new.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


# --- average_pool_to ---------------------------------------------------------------------------


def adaptive_by_hand(x, rows, columns):
    """PyTorch's definition: window i covers floor(i n / out) to ceil((i + 1) n / out)."""
    height, width = x.shape[1:3]
    out = np.zeros((x.shape[0], rows, columns, x.shape[3]), np.float64)
    for i in range(rows):
        top, bottom = math.floor(i * height / rows), math.ceil((i + 1) * height / rows)
        for j in range(columns):
            left, right = math.floor(j * width / columns), math.ceil((j + 1) * width / columns)
            out[:, i, j] = x[:, top:bottom, left:right].mean(axis=(1, 2))
    return out


@pytest.mark.parametrize(
    ("size", "out"),
    [
        ((10, 9), (7, 4)),  # windows that overlap
        ((13, 13), (7, 7)),
        ((3, 2), (5, 7)),  # smaller than the memory
        ((1, 1), (3, 2)),
        ((3, 8), (5, 4)),  # smaller in one direction
        ((20, 20), (7, 7)),  # windows of 2 would give 10
    ],
)
def test_pooling_is_adaptive_where_windows_do_not_fit(size, out):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    np.testing.assert_allclose(average_pool_to(x, *out), adaptive_by_hand(x, *out), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "out"),
    [
        ((28, 14), (7, 7)),
        ((15, 15), (7, 7)),  # windows of 2, the last row and column left out, as published
        ((7, 6), (7, 2)),
        ((9, 4), (4, 4)),
    ],
)
def test_pooling_uses_windows_where_they_fit(size, out):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    high, wide = (n // o for n, o in zip(size, out, strict=True))
    expected = np.zeros((2, *out, 3))
    for i in range(out[0]):
        for j in range(out[1]):
            window = x[:, i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            expected[:, i, j] = window.mean(axis=(1, 2))
    np.testing.assert_allclose(average_pool_to(x, *out), expected, atol=1e-6)


def test_windows_equal_adaptive_pooling_where_they_divide_the_map():
    x = np.random.default_rng(0).normal(size=(2, 12, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(average_pool_to(x, 4, 2), adaptive_by_hand(x, 4, 2), atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (2, 3)])
def test_pooling_keeps_the_dtype_and_passes_gradients_to_every_position_it_reads(size):
    x = jnp.ones((1, *size, 1), jnp.bfloat16)
    assert average_pool_to(x, 4, 4).dtype == jnp.bfloat16
    grad = jax.grad(lambda x: average_pool_to(x, 4, 4).sum())(x.astype(jnp.float32))
    assert float(grad.min()) > 0
    np.testing.assert_allclose(float(grad.sum()), 16, rtol=1e-5)
