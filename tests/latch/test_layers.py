"""Layers that nobody here wrote: other dtypes, subclasses, wrappers, groups, boxed parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from aim_flax import AiM, Memory, MemoryUpdate, fit
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused


def content(variables):
    """Returns the floats of a `direct` memory, with its batch axis."""
    return variables["params"]["memory"]["content"][None]


# --- Integers and booleans ---------------------------------------------------------------------


class Head(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype, name="head")(x)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("mode", ["add", "concat", "scale"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_integer_inputs_leave_the_memory_whole(mode, dtype):
    x = (np.abs(draw(4, 5)) * 3).astype(dtype)
    aim = AiM(Head(), Memory((6,), "direct"), "head", read_mode=mode)
    variables = random_variables(aim, x)
    expected = aim.apply(variables, x.astype(np.float32))
    assert_close(aim.apply(variables, x), expected)
    assert_close(aim.apply(variables, x, mutable=["intermediates"])[0], expected)

    def loss(params):
        return jnp.sin(aim.apply({"params": params}, x)).sum()

    assert np.abs(jax.grad(loss)(variables["params"])["memory"]["content"]).max() > 1e-3


@pytest.mark.usefixtures("standard_promotion")
def test_a_layer_that_computes_in_float32_reads_a_memory_of_float32():
    x = draw(4, 5)
    for mode in ("add", "concat"):
        aim = AiM(Head(jnp.float32), Memory((6,), "direct"), "head", read_mode=mode)
        variables = random_variables(aim, x)
        half = jnp.asarray(x, jnp.bfloat16)
        expected = aim.apply(variables, half.astype(np.float32))
        assert_close(aim.apply(variables, half), expected, 1e-6)


class Pixels(nn.Module):
    """Its stem passes whole numbers on."""

    @nn.compact
    def __call__(self, x):
        x = nn.Sequential([lambda x: x // 2], name="halve")(x)
        return nn.Dense(3, name="head")(x)


@pytest.mark.usefixtures("standard_promotion")
def test_updates_from_integers_leave_the_memory_whole():
    x = (np.abs(draw(4, 5)) * 30).astype(np.uint8)
    aim = AiM(Pixels(), Memory((6,), "direct"), "head", "halve", read_mode="add")
    variables = random_variables(aim, x)
    m = content(variables)
    block = {name: variables[name]["halve"]["memory_update"] for name in ("params", "batch_stats")}
    expected = MemoryUpdate().apply(block, (x // 2).astype(np.float32), m)
    assert_close(MemoryUpdate().apply(block, x // 2, m), expected)
    changed = jax.tree.map(np.copy, variables)
    changed["params"]["memory"]["content"] += 0.5
    assert not np.allclose(aim.apply(changed, x), aim.apply(variables, x), atol=1e-3)


# --- Subclasses that transform their kernel ----------------------------------------------------


class StdConv(nn.Conv):
    """Weight standardisation, as BiT has it (S. Qiao et al., 2019)."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = value - value.mean(axis=(0, 1, 2))
            value = value / value.std(axis=(0, 1, 2))
        return value


class StdConvByHand(nn.Conv):
    """The same with a `__call__` of its own."""

    @nn.compact
    def __call__(self, inputs):
        shape = (*self.kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        kernel = (kernel - kernel.mean(axis=(0, 1, 2))) / kernel.std(axis=(0, 1, 2))
        bias = self.param("bias", self.bias_init, (self.features,))
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return y + bias


class OneConv(nn.Module):
    conv: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.conv(4, (3, 3), name="conv")(x)


@pytest.mark.parametrize("conv", [StdConv, StdConvByHand])
@pytest.mark.parametrize("zero_init", [False, True])
def test_the_read_of_a_standardised_convolution_is_a_plain_one(conv, zero_init):
    x = draw(2, 4, 4, 3)
    aim = AiM(
        OneConv(conv), Memory((2, 2, 8), "direct"), "conv", read_mode="add", zero_init=zero_init
    )
    variables = jax.jit(aim.init)(KEY, x)
    if not zero_init:
        variables = random_variables(aim, x)
    kernel = variables["params"]["conv"]["memory_read"]["kernel"]
    own = OneConv(conv).apply(variables, x)
    share = nn.Conv(4, (3, 3), use_bias=False).apply(
        {"params": {"kernel": kernel}}, fit(content(variables), 4, 4)
    )
    assert_close(aim.apply(variables, x), own + share)

    def loss(params):
        return jnp.sin(aim.apply({"params": params}, x)).sum()

    gradients = jax.grad(loss)(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["conv"]["memory_read"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (StdConv, "class StdConv has a param of its own, .*: use read_mode 'add' or 'scale'$"),
        (StdConvByHand, "class StdConvByHand multiplies .*: use read_mode 'add' or 'scale'$"),
    ],
)
def test_concat_into_a_standardised_convolution_is_refused(conv, message):
    with refused(f"read matches 'conv', but its {message}"):
        AiM(OneConv(conv), Memory((2, 2, 8)), "conv").init(KEY, draw(2, 4, 4, 3))


class HeConv(nn.Conv):
    """Other defaults, nothing else."""

    kernel_init: Any = nn.initializers.he_normal()


def test_subclasses_with_other_defaults_read_as_the_layers_that_they_are():
    x = draw(2, 4, 4, 3)
    for mode in ("add", "concat"):
        nets = [
            AiM(OneConv(conv), Memory((2, 2, 8)), "conv", read_mode=mode)
            for conv in (HeConv, lambda *a, **k: nn.Conv(*a, kernel_init=HeConv.kernel_init, **k))
        ]
        assert_equal(*(jax.jit(net.init)(KEY, x) for net in nets))


class PaddingConv(nn.Conv):
    """TensorFlow's padding, and a convolution without any."""

    padding: Any = "VALID"

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(jnp.pad(inputs, ((0, 0), (0, 2), (0, 2), (0, 0))))


class Cropping(nn.Conv):
    """Makes another size than its options say."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        return inputs[:, 1:, 1:] @ kernel


def test_a_layer_that_wraps_the_plain_one_reads_where_that_is_called():
    x = draw(2, 4, 4, 3)
    aim = AiM(OneConv(PaddingConv), Memory((2, 2, 8), "direct"), "conv", read_mode="add")
    variables = random_variables(aim, x)
    params = variables["params"]["conv"]
    padded = np.pad(x, ((0, 0), (0, 2), (0, 2), (0, 0)))
    # 32 floats on 6 x 6 positions.
    joint = np.concatenate([padded, np.repeat(fit(content(variables), 6, 6), 2, axis=0)], axis=-1)
    kernel = np.concatenate([params["kernel"], params["memory_read"]["kernel"]], axis=2)
    given = {"kernel": kernel, "bias": params["bias"]}
    expected = nn.Conv(4, (3, 3), padding="VALID").apply({"params": given}, joint)
    assert_close(aim.apply(variables, x), expected)
    concat = AiM(OneConv(PaddingConv), Memory((2, 2, 8), "direct"), "conv")
    joined = {"params": {"memory": variables["params"]["memory"], "conv": given}}
    assert_close(concat.apply(joined, x), expected)
    with refused(r"class Cropping makes \(2, 3, 3, 4\) of \(2, 4, 4, 3\), .*: read in another"):
        AiM(OneConv(Cropping), Memory((2, 2, 8)), "conv", read_mode="add").init(KEY, x)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.SpectralNorm(nn.Dense(4, name="inner"))(x, update_stats=train)
        return nn.Dense(3, name="head")(x)


class Weighted(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(4, name="inner"), name="norm")(x)
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize("net", [Spectral(), Weighted()], ids=["SpectralNorm", "WeightNorm"])
@pytest.mark.parametrize("mode", ["add", "concat"])
def test_normalised_kernels_take_no_read(net, mode):
    x = draw(2, 5)
    with refused(r"'inner', which runs inside nn.map_variables \(nn.WeightNorm, .*: read in a la"):
        AiM(net, Memory((6,), "dense"), "inner", read_mode=mode).init(KEY, x)
    with refused("'inner', which runs inside a Flax transformation"):
        AiM(net, Memory((6,), "dense"), "head", "inner").init(KEY, x)


def test_around_a_normalised_kernel_all_latched_parameters_have_their_names():
    x = draw(2, 5)
    aim = AiM(Weighted(), Memory((6,), "dense"), "head", "norm", read_mode="add")
    shapes = flatten_dict(jax.eval_shape(aim.init, KEY, x)["params"])
    own = flatten_dict(jax.eval_shape(Weighted().init, KEY, x)["params"])
    latched = {"memory", "memory_read", "memory_update"}
    assert {path for path in shapes if not latched & set(path)} == set(own)


# --- Arguments of subclasses -------------------------------------------------------------------


class Scaled(nn.Dense):
    @nn.compact
    def __call__(self, x, scale=1.0, *, shift=0.0):
        return super().__call__(x) * scale + shift


class ByKeyword(nn.Module):
    positional: bool

    @nn.compact
    def __call__(self, x):
        layer = Scaled(3, name="layer")
        if self.positional:
            return layer(x, 10.0, shift=1.0)
        return layer(x=x, scale=10.0, shift=1.0)


@pytest.mark.parametrize("positional", [True, False])
def test_arguments_of_subclasses_are_passed_on(positional):
    x = draw(4, 5)
    net = ByKeyword(positional)
    options = dict(memory=Memory((6,), "direct"), read="layer")
    add = AiM(net, read_mode="add", **options)
    variables = random_variables(add, x)
    layer = variables["params"]["layer"]
    y = x @ layer["kernel"] + layer["bias"] + content(variables) @ layer["memory_read"]["kernel"]
    assert_close(add.apply(variables, x), 10 * y + 1)
    kernel = np.concatenate([layer["kernel"], layer["memory_read"]["kernel"]])
    params = {**variables["params"], "layer": {"kernel": kernel, "bias": layer["bias"]}}
    concat = AiM(net, **options)
    assert_close(concat.apply({"params": params}, x), 10 * y + 1)
    # Once, though `super()` is a call as well.
    _, state = add.apply(variables, x, mutable=["intermediates"])
    assert len(state["intermediates"]["layer"]["memory_use"]) == 1


class ByHand(nn.Dense):
    """Never calls the layer that it inherits from."""

    @nn.compact
    def __call__(self, x, scale):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return x @ kernel * scale


class CallsByHand(nn.Module):
    @nn.compact
    def __call__(self, x):
        return ByHand(3, name="layer")(scale=2.0, x=x)


def test_a_layer_with_a_call_of_its_own_keeps_its_arguments_and_its_output():
    x = draw(4, 5)
    aim = AiM(CallsByHand(), Memory((6,), "direct"), "layer", read_mode="add")
    variables = random_variables(aim, x)
    layer = variables["params"]["layer"]
    share = content(variables) @ layer["memory_read"]["kernel"]
    assert_close(aim.apply(variables, x), 2 * x @ layer["kernel"] + share)


class Doubled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="inner")(x)


class DoubledTwice(Doubled):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class OneBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(DoubledTwice(name="block")(x))


def test_a_block_that_calls_super_writes_once():
    x = draw(4, 5)
    aim = AiM(OneBlock(), Memory((6,), "direct"), "head", "block", read_mode="add")
    variables = random_variables(aim, x)
    _, state = aim.apply(variables, x, mutable=["intermediates"])
    assert len(state["intermediates"]["block"]["memory_update_use"]) == 1


# --- One size of maps --------------------------------------------------------------------------


class TwoResolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        head = nn.Conv(2, (1, 1), name="head")
        return head(x), head(x[:, ::2, ::2])


@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_read_at_two_map_sizes_is_refused(mode, groups):
    aim = AiM(TwoResolutions(), Memory((4, 4, 4)), "head", read_mode=mode)
    with refused("'head', whose kernel does not fit an input of 2x2 with 16 channels of memory: "):
        aim.init(KEY, draw(2, 4, 4, 4))
    conv = AiM(nn.Sequential([nn.Conv(4, (1, 1), feature_group_count=groups)]),
               Memory((4, 4, 4)), "layers_0", read_mode=mode)  # fmt: skip
    variables = random_variables(conv, draw(2, 4, 4, 4))
    with refused("'layers_0', whose kernel does not fit .* 8x8 .* can read at one size only, "):
        conv.apply(variables, draw(2, 8, 8, 4))


# --- Depthwise convolutions --------------------------------------------------------------------


def test_concat_into_a_depthwise_convolution_copies_no_memory():
    x = jax.ShapeDtypeStruct((8, 14, 14, 96), jnp.float32)
    net = nn.Sequential([nn.Conv(96, (3, 3), feature_group_count=96)])
    aim = AiM(net, Memory((7, 7, 64)), "layers_0")
    variables = jax.eval_shape(aim.init, KEY, x)
    assert variables["params"]["layers_0"]["kernel"].shape == (3, 3, 1 + 16, 96)
    jaxpr = jax.make_jaxpr(aim.apply)(variables, x)
    largest = max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)
    assert largest == 8 * 14 * 14 * 96


# --- Boxed parameters --------------------------------------------------------------------------


class Sharded(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(4, kernel_init=init, name="layer")(x)


def test_zero_init_keeps_how_parameters_are_partitioned():
    x = draw(2, 5)
    for zero_init in (False, True):
        aim = AiM(Sharded(), Memory((6,), "dense"), "layer", read_mode="add", zero_init=zero_init)
        kernel = aim.init(KEY, x)["params"]["layer"]["memory_read"]["kernel"]
        assert isinstance(kernel, nn.Partitioned)
        assert kernel.names == (None, "model")
        assert kernel.value.shape == (6, 4)
        assert bool(kernel.value.any()) != zero_init


# --- Attention ---------------------------------------------------------------------------------


class Attention(nn.Module):
    normalize: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, normalize_qk=self.normalize, name="attention")(x)


def test_a_read_that_softmax_ignores_is_warned_of():
    x = draw(2, 5, 8)
    options = dict(memory=Memory((6,), "direct"), read="attention/key")
    aim = AiM(Attention(), read_mode="add", **options)
    with pytest.warns(UserWarning, match="'attention/key', where it does nothing: .* softmax"):
        variables = random_variables(aim, x)
    with pytest.warns(UserWarning, match="does nothing"):
        y = aim.apply(variables, x)
    assert_close(y, Attention().apply(variables, x))
    # Where it does something, nothing is said.
    for net, mode in ((Attention(), "scale"), (Attention(normalize=True), "add")):
        random_variables(AiM(net, read_mode=mode, **options), x)
