"""The memory parameter, reshape-and-pad, the update block and its pooling."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax import Memory, MemoryUpdate, fit
from aim_flax.memory import check_memory, distinct_values, kernel_of, resize
from aim_flax.updates import average_pool_to
from tests.arrays import KEY, count, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused
from tests.networks import weights_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def counting_memory(shape, batch=1, dtype=np.int32):
    """A memory of 1, 2, 3, ...: no float is zero and no two are equal."""
    return np.arange(1, batch * math.prod(shape) + 1, dtype=dtype).reshape(batch, *shape)


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


@pytest.mark.parametrize("axes", [1, 3])
def test_fit_keeps_every_float_once_with_any_number_of_axes(axes):
    rng = np.random.default_rng(axes)
    for _ in range(30):
        shape = tuple(int(n) for n in rng.integers(1, 4, axes + 1))
        size = tuple(int(n) for n in rng.integers(1, 7 if axes == 3 else 60, axes))
        m = counting_memory(shape, 2)
        out = np.asarray(fit(m, *size))
        assert out.shape[:-1] == (2, *size)
        for example, original in zip(out, m, strict=True):
            np.testing.assert_array_equal(example[example != 0], original.ravel())
    # 7 floats on 3 x 3 x 4: a cube of 8 in the middle, with the zero behind.
    cube = np.asarray(fit(counting_memory((1, 1, 1, 7)), 3, 3, 4))[0, ..., 0]
    assert cube[:2, :2, 1:3].ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert np.asarray(fit(counting_memory((3, 1)), 6))[0, :, 0].tolist() == [0, 1, 2, 3, 0, 0]


def test_a_resized_memory_keeps_places():
    m = draw(2, 3, 2, 4)
    assert_close(resize(m, 3, 2), m)
    tall = np.asarray(resize(m, 6, 2))
    assert tall.shape == (2, 6, 2, 4)
    # Rows of the map lie at 1/4, 3/4, ... of the memory's rows.
    assert_close(tall[:, 0], m[:, 0])
    assert_close(tall[:, 1], 0.75 * m[:, 0] + 0.25 * m[:, 1])
    assert_close(tall[:, 2], 0.25 * m[:, 0] + 0.75 * m[:, 1])
    assert_close(resize(m, 1, 1).mean(), m.mean(), 0.1)
    assert resize(draw(1, 3, 2), 7).shape == (1, 7, 2)
    assert resize(draw(1, 2, 2, 2, 3), 4, 3, 5).shape == (1, 4, 3, 5, 3)
    assert resize(jnp.asarray(m, jnp.bfloat16), 5, 5).dtype == jnp.bfloat16
    with refused(r"fit 'resize' takes .* spatial axes of the map, 1, but this one is \(3, 2, 4\)"):
        resize(m, 6)


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


SQUARE = np.arange(1, 65).reshape(8, 8)
# Of 6 floats in a square of 9 in the middle: 1 zero in front, 2 behind.
IN_A_SQUARE = [[0, 0, 1, 2, 0, 0], [0, 3, 4, 5, 0, 0], [0, 6, 0, 0, 0, 0], [0] * 6]


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 3, 2), (4, 6), IN_A_SQUARE),
        # Maps that are as high, or as wide, as the square.
        ((1, 3, 2), (3, 6), IN_A_SQUARE[:3]),
        ((1, 3, 2), (4, 3), [row[1:4] for row in IN_A_SQUARE]),
        # A square of 8 x 8 in the middle of larger maps.
        *(((4, 4, 4), (8 + n, 8 + n), np.pad(SQUARE, (n // 2, n - n // 2))) for n in (1, 4, 7)),
        # 10 floats on 2 x 2: 3 channels, 2 zeros at the end.
        ((1, 5, 2), (2, 2), [*range(1, 11), 0, 0]),
        # Maps too thin for 8 floats in a square of 3 x 3.
        ((2, 2, 2), (2, 9), [*range(1, 9), *[0] * 10]),
        ((2, 2, 2), (9, 2), [*range(1, 9), *[0] * 10]),
        ((2, 2, 2), (1, 11), [*range(1, 9), *[0] * 3]),
        ((2, 2, 2), (11, 1), [*range(1, 9), *[0] * 3]),
    ],
)
def test_fit_pads_where_memory_and_map_do_not_go_together(shape, size, expected):
    found = fit(counting_memory(shape), *size)
    assert found.shape[1:3] == size
    np.testing.assert_array_equal(found.ravel(), np.ravel(expected))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (7, 7), (2, 30)])
def test_fit_keeps_the_dtype_and_the_examples_apart(dtype, size):
    m = jnp.asarray(counting_memory((3, 2, 3), batch=3), dtype)
    together = fit(m, *size)
    assert together.dtype == dtype
    for i in range(3):
        np.testing.assert_array_equal(together[i : i + 1], fit(m[i : i + 1], *size))


@pytest.mark.parametrize(
    ("kind", "shape", "kernel_size", "parameters"),
    [
        ("conv", (7, 7, 1024), 1, 1024 * 1024 + 1024),  # published: 1,049,600
        ("conv", (7, 7, 64), 7, 7 * 7 * 64 * 64 + 64),  # the author's suggestion, R x K
        ("conv", (3, 5, 8), (3, 5), 3 * 5 * 8 * 8 + 8),
        ("conv", (5, 8), 3, 3 * 8 * 8 + 8),
        ("conv", (2, 3, 4, 8), (1, 3, 2), 6 * 8 * 8 + 8),
        ("dense", (16,), 1, 16 * 16 + 16),
        ("dense", (5, 16), 1, 5 * (16 * 16 + 16)),
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


@pytest.mark.parametrize(("shape", "kind"), [((2, 2, 5), "conv"), ((5,), "dense")])
def test_content_is_weights_plus_bias_everywhere(shape, kind):
    memory = Memory(shape, kind)
    variables = random_variables(memory)
    expected = weights_of({"params": {"memory": variables["params"]}})
    assert_close(memory.apply(variables), expected)


def test_content_of_direct_memories_is_their_parameter():
    memory = Memory((2, 3, 4), "direct")
    variables = random_variables(memory)
    assert_equal(memory.apply(variables)[0], variables["params"]["content"])


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
    assert distinct_values((7, 7, 1024), "conv") == 1024
    assert distinct_values((7, 7, 1024), "conv", 7) == 50176
    assert distinct_values((16,), "dense") == 16
    assert distinct_values((7, 7, 1024), "direct") == 50176
    assert distinct_values((7, 7, 8), "noise") == 392
    assert distinct_values((7, 7, 8), "zero") == 1


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((7,), "conv", r"a conv memory has shape \(R, K, D\), .*, each at least 1, not \(7,\)"),
        ((0, 7, 8), "conv", r"not \(0, 7, 8\)"),
        (
            (7, 0, 8),
            "direct",
            r"has shape \(D,\), \(R, K, D\), .*, each at least 1, not \(7, 0, 8\)",
        ),
        ((7, 7, -1), "conv", r"not \(7, 7, -1\)"),
        ((7, 7, 8.0), "conv", r"not \(7, 7, 8.0\)"),
        (7, "conv", r"not \(7,\)"),
        (None, "conv", r"not \(None,\)"),
        ((), "direct", r"not \(\)"),
        ((7, 7, 8), "dense", r"a dense memory has shape \(D,\) or \(S, D\), each at least 1, not"),
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
        with refused(message):
            use(shape, kind)


@pytest.mark.parametrize("size", [0, -1, (3,), (3, 0), (3, 3, 3), 2.5, (3, 2.5), None])
def test_bad_kernel_sizes_are_told_in_one_line(size):
    image, m = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2, 2, 3))
    for use in (
        lambda: kernel_of(size),
        lambda: distinct_values((2, 2, 3), "conv", size),
        lambda: Memory((2, 2, 3), "conv", size).init(KEY),
        lambda: MemoryUpdate(kernel_size=size).init(KEY, image, m),
    ):
        with refused("a kernel size is a positive int or two of them"):
            use()


@pytest.mark.parametrize(
    ("x", "m", "new"),
    [
        ((3, 8, 8, 5), (1, 2, 2, 4), (3, 2, 2, 4)),
        ((3, 8, 8, 5), (3, 2, 2, 4), (3, 2, 2, 4)),
        ((3, 5, 9, 5), (1, 4, 3, 2), (3, 4, 3, 2)),  # no windows give this size
        ((3, 2, 1, 5), (1, 4, 3, 2), (3, 4, 3, 2)),  # a map smaller than the memory
        ((3, 6), (1, 4), (3, 4)),
        ((3, 6), (3, 4), (3, 4)),
        ((3, 9, 5), (1, 4, 2), (3, 4, 2)),
        ((3, 4, 6, 2, 5), (1, 2, 3, 4, 2), (3, 2, 3, 4, 2)),
        ((3, 7, 6), (1, 4), (3, 4)),
        ((3, 8, 8, 6), (1, 4), (3, 4)),
    ],
)
def test_update_gives_every_example_a_memory_of_the_same_size(x, m, new):
    pool = "mean" if len(m) < 4 and len(x) > 2 else None
    update = partial(MemoryUpdate(pool=pool).init_with_output, KEY)
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


def update_by_hand(variables, kind, h, train=False):
    """Returns the last features and norms' inputs; kernels are of 1x1, so all is products."""
    params, seen = variables["params"], []
    axes = tuple(range(h.ndim - 1))
    for i in (1, 2, 3):
        layer, norm = params[f"{kind}{i}"], params[f"norm{i}"]
        h = h @ layer["kernel"].reshape(h.shape[-1], -1) + layer["bias"]
        seen.append({"mean": h.mean(axis=axes), "var": h.var(axis=axes)})
        stats = seen[-1] if train else variables["batch_stats"][f"norm{i}"]
        h = (h - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * norm["scale"] + norm["bias"]
        h = 1 / (1 + np.exp(-h))
    return h, seen


def last_layer(variables, h):
    layer = variables["params"]["output"]
    return h @ layer["kernel"].reshape(h.shape[-1], -1) + layer["bias"]


@pytest.mark.parametrize("train", [False, True])
def test_dense_update_is_what_the_formula_says(train):
    x, m = draw(6, 3, 5), np.float32([[0.3, -1.0]])
    update = MemoryUpdate(pool="mean")
    variables = random_variables(update, x, m)
    new, after = update.apply(variables, x, m, train=train, mutable=["batch_stats"])
    # Axes between batch and features are averaged; the memory is the same for all examples.
    joined = np.concatenate([x.mean(axis=1), np.repeat(m, 6, axis=0)], axis=1)
    h, seen = update_by_hand(variables, "dense", joined, train)
    assert_close(new, last_layer(variables, h))
    before = variables["batch_stats"]
    expected = dict(before)
    if train:
        for i, stats in enumerate(seen, start=1):
            moved = {n: 0.99 * before[f"norm{i}"][n] + 0.01 * stats[n] for n in stats}
            expected[f"norm{i}"] = moved
        assert_close(after["batch_stats"], expected)
    else:
        assert_equal(after["batch_stats"], expected)


def test_convolutional_update_is_what_the_formula_says():
    x, m = draw(3, 6, 4, 5), draw(3, 3, 2, 4)
    update = MemoryUpdate(kernel_size=1)
    variables = random_variables(update, x, m)
    joined = np.concatenate([x, m.reshape(3, 6, 4, 1)], axis=-1)  # 24 floats on 24 positions
    h, _ = update_by_hand(variables, "conv", joined)
    h = h.reshape(3, 3, 2, 2, 2, 32).mean(axis=(2, 4))
    assert_close(update.apply(variables, x, m), last_layer(variables, h))


def test_momentum_and_epsilon_reach_the_norms():
    x, m = np.float32([[1.0, 2.0], [3.0, 5.0]]), np.ones((1, 2), np.float32)
    variables = random_variables(MemoryUpdate(), x, m)
    update = MemoryUpdate(momentum=0.0, epsilon=10.0)
    _, trained = update.apply(variables, x, m, train=True, mutable=["batch_stats"])
    _, seen = update_by_hand(variables, "dense", np.float32([[1, 2, 1, 1], [3, 5, 1, 1]]))
    assert_close(trained["batch_stats"]["norm1"], seen[0])
    usual = MemoryUpdate().apply(variables, x, m)
    assert not np.allclose(update.apply(variables, x, m), usual, atol=1e-3)


def test_update_computes_in_its_dtype_and_keeps_float32_parameters():
    x, m = jnp.ones((2, 4, 4, 3), jnp.bfloat16), jnp.ones((1, 2, 2, 4))
    update = MemoryUpdate(dtype=jnp.bfloat16)
    # Flax's batch norm itself mixes bfloat16 activations with float32 statistics.
    with jax.numpy_dtype_promotion("standard"):
        new, variables = jax.eval_shape(update.init_with_output, KEY, x, m)
    assert new.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    # Every layer is told, also where x is float32.
    layers = partial(update.apply, capture_intermediates=True, mutable=["intermediates"])
    with jax.numpy_dtype_promotion("standard"):
        _, seen = jax.eval_shape(layers, variables, x.astype(jnp.float32), m)
    assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype(jnp.bfloat16)}


def adaptive(n, out):
    """Returns PyTorch's windows: the i-th covers floor(i n / out) to ceil((i + 1) n / out)."""
    return [slice(math.floor(i * n / out), math.ceil((i + 1) * n / out)) for i in range(out)]


def equal(n, out):
    """Returns windows of the same size; what is left over at the end is left out."""
    return [slice(i * (n // out), (i + 1) * (n // out)) for i in range(out)]


@pytest.mark.parametrize(
    ("size", "out", "windows"),
    [
        ((10, 9), (7, 4), adaptive),  # windows that overlap
        ((13, 13), (7, 7), adaptive),
        ((3, 2), (5, 7), adaptive),  # smaller than the memory
        ((1, 1), (3, 2), adaptive),
        ((3, 8), (5, 4), adaptive),  # smaller in one direction
        ((20, 20), (7, 7), adaptive),  # windows of 2 would give 10
        ((28, 14), (7, 7), equal),
        ((15, 15), (7, 7), equal),  # windows of 2, the last row and column left out, as published
        ((7, 6), (7, 2), equal),
        ((9, 4), (4, 4), equal),
    ],
)
def test_pooling_is_adaptive_where_equal_windows_do_not_fit(size, out, windows):
    x = draw(2, *size, 3)
    expected = np.zeros((2, *out, 3))
    for i, rows in enumerate(windows(size[0], out[0])):
        for j, columns in enumerate(windows(size[1], out[1])):
            expected[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    assert_close(average_pool_to(x, *out), expected, 1e-6)


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (2, 3)])
def test_pooling_keeps_the_dtype_and_passes_gradients_to_every_position_it_reads(size):
    x = jnp.ones((1, *size, 1), jnp.bfloat16)
    assert average_pool_to(x, 4, 4).dtype == jnp.bfloat16
    grad = jax.grad(lambda x: average_pool_to(x, 4, 4).sum())(x.astype(jnp.float32))
    assert float(grad.min()) > 0
    np.testing.assert_allclose(float(grad.sum()), 16, rtol=1e-5)
