"""What a read is: for every layer that can read, in networks that know nothing of it, in bfloat16.

`add` and `concat` are two forms of one function, which networks written by hand spell out.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_flax import AiM, Memory, MemoryUpdate, fit
from tests.arrays import KEY, draw, outputs_and_gradients, paths, random_variables
from tests.asserts import assert_close, refused
from tests.networks import WithSetup, weights_of

CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    "kernel1": partial(nn.Conv, 3, (1, 1)),
    "kernel3": partial(nn.Conv, 3, (3, 3)),
    "kernel5": partial(nn.Conv, 3, (5, 5), use_bias=False),
    "stride2": partial(nn.Conv, 3, (3, 3), strides=2),
    "kernel_dilation": partial(nn.Conv, 3, (3, 3), kernel_dilation=2),
    "valid": partial(nn.Conv, 3, (3, 3), padding="VALID"),
    "explicit": partial(nn.Conv, 3, (3, 3), strides=2, padding=((2, 0), (1, 3))),
    "circular": partial(nn.Conv, 3, (3, 3), padding="CIRCULAR"),
    "groups2": partial(nn.Conv, 6, (3, 3), feature_group_count=2),
    "depthwise": partial(nn.Conv, 8, (3, 3), feature_group_count=4, strides=2),
    "transposed": partial(nn.ConvTranspose, 3, (3, 3), strides=(2, 2)),
    "transposed_valid": partial(nn.ConvTranspose, 3, (2, 2), strides=(2, 2), padding="VALID"),
    "transposed_kernel": partial(nn.ConvTranspose, 3, (3, 3), transpose_kernel=True),
}
GROUPS = {"groups2": 2, "depthwise": 4}
DENSE: dict[str, Callable[..., nn.Module]] = {
    "dense": partial(nn.Dense, 3),
    "general_features": partial(nn.DenseGeneral, (2, 3), axis=(-1,)),
}
DENSE_LAYERS = [f"{form}_{name}" for form in ("vector", "tokens", "image") for name in DENSE]
LAYERS = [*CONVOLUTIONS, *DENSE_LAYERS]


class Everything(nn.Module):
    """Every layer that can read, side by side: name -> output."""

    convolutions: bool = True

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, name="stem")(x))
        forms = {"vector": x[:, 0, 0], "tokens": x[:, 0], "image": x}
        outputs = {
            f"{form}_{name}": layer(name=f"{form}_{name}")(h)
            for form, h in forms.items()
            for name, layer in DENSE.items()
        }
        if self.convolutions:
            outputs |= {name: layer(name=name)(x) for name, layer in CONVOLUTIONS.items()}
        return outputs


def input_axis(name, kernel):
    """Returns the axis of a kernel along which the memory's channels follow the input's."""
    if name == "transposed_kernel":
        return 3
    return kernel.ndim - 2 if name in CONVOLUTIONS else 0


def join_halves(params):
    """Returns the parameters of the `concat` form of a network in the `add` form."""
    joint = {}
    for name, layer in params.items():
        layer = dict(layer)
        if "memory_read" in layer:
            halves = [layer["kernel"], layer.pop("memory_read")["kernel"]]
            axis = input_axis(name, layer["kernel"])
            layer["kernel"] = np.concatenate([np.asarray(half) for half in halves], axis)
        joint[name] = layer
    return joint


@cache
def both_forms(memory):
    """Returns (outputs, gradients in parameters, gradient in the input) of `add` and `concat`."""
    dense = memory == "dense"
    options = dict(
        backbone=Everything(convolutions=not dense),
        memory=Memory((6,), "dense") if dense else Memory((2, 3, 4)),
        read="(?!stem).*",
        update_after="" if memory == "per batch" else "stem",
        update=MemoryUpdate(pool="mean" if dense else None),
    )
    # 24 floats on 5 x 4 positions: two channels, padded at the end.
    x = draw(3, 5, 4, 2)
    add = AiM(read_mode="add", **options)
    variables = random_variables(add, x)
    joined = {**variables, "params": join_halves(variables["params"])}
    forms = []
    for net, given in ((add, variables), (AiM(read_mode="concat", **options), joined)):
        outputs, (params, image) = outputs_and_gradients(net, given, x)
        forms.append((outputs, join_halves(params), image))
    return forms


@pytest.mark.parametrize(
    ("memory", "name"),
    [("per batch", name) for name in LAYERS]
    + [pytest.param("per example", name, marks=pytest.mark.slow) for name in LAYERS]
    + [("dense", name) for name in DENSE_LAYERS],
)
def test_add_and_concat_are_the_same_function(memory, name):
    (y, params, _), (expected, expected_params, _) = both_forms(memory)
    assert_close(y[name], expected[name])
    assert_close(params[name], expected_params[name])
    # And the memory does count: its half of the kernel has a gradient.
    axis = input_axis(name, expected_params[name]["kernel"])
    half = np.moveaxis(expected_params[name]["kernel"], axis, 0)[4 // GROUPS.get(name, 1) :]
    assert np.abs(half).max() > 1e-3


@pytest.mark.parametrize(
    "memory", ["per batch", pytest.param("per example", marks=pytest.mark.slow), "dense"]
)
def test_add_and_concat_have_the_same_gradients_elsewhere(memory):
    (_, params, image), (_, expected_params, expected_image) = both_forms(memory)
    assert_close(image, expected_image)
    for name in ("stem", "memory"):
        assert_close(params[name], expected_params[name])
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(params[name])) > 1e-3


def test_read_kernels_have_the_memorys_channels_for_every_group():
    x = draw(3, 5, 4, 2)
    for mode in ("add", "concat"):
        aim = AiM(Everything(), Memory((2, 3, 4)), read="(?!stem).*", read_mode=mode)
        params = flatten_dict(random_variables(aim, x)["params"], sep="/")
        kernel = "memory_read/kernel" if mode == "add" else "kernel"
        own = 0 if mode == "add" else 4
        for name, features in (("kernel3", 3), ("groups2", 6), ("depthwise", 8)):
            width = own // GROUPS.get(name, 1) + 2  # 24 floats on 20 positions
            assert params[f"{name}/{kernel}"].shape == (3, 3, width, features)
        assert params[f"transposed_kernel/{kernel}"].shape == (3, 3, 3, own + 2)
        assert params[f"image_general_features/{kernel}"].shape == (own + 4, 2, 3)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two Dense layers, scale; inputs may read a memory by hand."""

    features: int

    @nn.compact
    def __call__(self, x, append=lambda h, groups=1: h):
        h = nn.Conv(self.features, (3, 3), feature_group_count=self.features, name="depthwise")(
            append(x, self.features)
        )
        h = nn.LayerNorm(name="norm")(h)
        h = nn.gelu(nn.Dense(2 * self.features, name="expand")(append(h)))
        h = nn.Dense(self.features, name="project")(h)
        return x + self.param("scale", nn.initializers.ones, (self.features,)) * h


class ConvNeXt(nn.Module):
    """Two blocks; with a memory inside, the published parametrisation is written into it."""

    memory_inside: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), strides=2, name="stem")(x)
        if self.memory_inside:
            scope = self.scope.push("memory").push("conv")
            m = nn.Conv(5, (1, 1), parent=scope)(jnp.ones((1, 2, 2, 5)))
        for i in range(2):
            block = ConvNeXtBlock(4, name=f"block{i}")
            if self.memory_inside:
                x = block(x, partial(append_by_hand, m))
                scope = self.scope.push(f"block{i}", reuse=True).push("memory_update")
                m = MemoryUpdate(parent=scope)(x, m)
            else:
                x = block(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def append_by_hand(m, h, groups=1):
    if groups == 1:
        # A dense layer reads the mean of a memory with rows and columns.
        share = jnp.broadcast_to(m.mean(axis=(1, 2), keepdims=True), (*h.shape[:-1], 5))
        return jnp.concatenate([h, share], axis=-1)
    share = jnp.broadcast_to(fit(m, *h.shape[1:3]), (*h.shape[:3], 3))
    parts = [part for i in range(groups) for part in (h[..., i : i + 1], share)]
    return jnp.concatenate(parts, axis=-1)


@pytest.mark.slow
def test_convnext_equals_the_same_network_with_the_memory_written_into_it():
    aim = AiM(
        ConvNeXt(),
        Memory((2, 2, 5)),  # 20 floats: three channels on 3 x 3
        read=r"block\d/(depthwise|expand)",
        update_after=r"block\d",
    )
    x = draw(2, 6, 6, 3)
    variables = random_variables(aim, x)
    found = outputs_and_gradients(aim, variables, x)
    assert_close(found, outputs_and_gradients(ConvNeXt(memory_inside=True), variables, x))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Conv(8, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        for i in range(2):
            h = nn.LayerNorm(name=f"norm{i}a")(x)
            attention = nn.MultiHeadDotProductAttention(2, name=f"attention{i}")
            x = x + attention(h, deterministic=deterministic)
            h = nn.LayerNorm(name=f"norm{i}b")(x)
            x = x + nn.Dense(8, name=f"mlp{i}")(h)
        return nn.Dense(3, name="head")(x[:, 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:read matches 'attention./key'")
def test_vit_reads_in_query_key_and_value_and_writes_after_its_blocks():
    """By linearity what a read adds is one more bias per head, here of a memory not written yet."""
    reads = [f"attention{i}/{part}" for i in (0, 1) for part in ("query", "key", "value")]
    update = MemoryUpdate(pool="mean")
    aim = AiM(
        ViT(), Memory((6,), "dense"), reads, update_after="mlp1", read_mode="add", update=update
    )
    x = draw(2, 4, 4, 3)
    variables = random_variables(aim, x)
    latched = paths(variables) - paths(jax.eval_shape(ViT().init, KEY, x))
    places = {*reads, "mlp1", "memory/dense/bias", "memory/dense/kernel"}
    assert {path.split("/memory_")[0] for path in latched} == places

    params = flatten_dict(variables["params"], sep="/")
    for read in reads:
        kernel = params[f"{read}/memory_read/kernel"]
        bias = np.einsum("d,dhk->hk", weights_of(variables)[0], kernel)
        params[f"{read}/bias"] = params[f"{read}/bias"] + bias
    expected = ViT().apply({"params": unflatten_dict(params, sep="/")}, x)
    assert_close(aim.apply(variables, x), expected)


class Compact(nn.Module):
    """What WithSetup computes, with layers of the same names."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (3, 3), name="layers_0")(x))
        x = jnp.tanh(nn.Conv(5, (3, 3), name="layers_1")(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def test_setup_networks_can_be_latched_on_to():
    x = draw(2, 4, 4, 3)
    aim, compact = (
        AiM(net, Memory((2, 2, 4)), read=["layers_1", "head"], update_after="layers_0")
        for net in (WithSetup(), Compact())
    )
    variables = random_variables(aim, x)
    shapes = [params["kernel"].shape for params in map(variables["params"].get, aim.read)]
    assert shapes == [(3, 3, 4 + 1, 5), (5 + 4, 3)]
    assert_close(aim.apply(variables, x), compact.apply(variables, x))


class Half(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), dtype=self.dtype, name="conv1")(x))
        x = nn.Conv(4, (3, 3), dtype=self.dtype, name="conv2")(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(x.mean(axis=(1, 2)))


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_reads_are_in_the_dtype_of_the_layer(mode):
    x = draw(2, 4, 4, 3)
    options = dict(memory=Memory((2, 2, 4)), read="conv2|head", read_mode=mode)
    full, half = AiM(Half(), **options), AiM(Half(jnp.bfloat16), **options)
    variables = random_variables(full, x)
    assert {a.dtype for a in jax.tree.leaves(jax.eval_shape(half.init, KEY, x))} == {x.dtype}
    expected = full.apply(variables, x)
    for images in (x, jnp.asarray(x, jnp.bfloat16)):
        y = half.apply(variables, images)
        assert y.dtype == jnp.bfloat16
        assert_close(np.asarray(y, np.float32), expected, 0.05)


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_updates_and_carry_in_bfloat16_keep_float32_variables(mode):
    x = jnp.asarray(draw(4, 4, 4, 3), jnp.bfloat16)
    aim = AiM(
        Half(jnp.bfloat16), Memory((2, 2, 4)), "conv2|head", "conv1|conv2",
        read_mode=mode, update=MemoryUpdate(dtype=jnp.bfloat16), carry="state",
    )  # fmt: skip
    # Flax's batch norm itself mixes bfloat16 activations with float32 statistics.
    with jax.numpy_dtype_promotion("standard"):
        variables = random_variables(aim, x)
        apply = partial(aim.apply, train=True, mutable=["memory", "batch_stats", "intermediates"])
        y, state = jax.eval_shape(apply, variables, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, state))} == {jnp.dtype("float32")}


class Pooled(nn.Module):
    """Convolutions and a mean: for images of any size."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv1")(x)
        x = nn.Conv(3, (3, 3), strides=2, name="conv2")(x)
        return nn.Dense(2, name="head")(x.mean(axis=(1, 2)))


@pytest.mark.parametrize("mode", [pytest.param("concat", marks=pytest.mark.slow), "add"])
def test_a_resized_memory_is_read_at_every_image_size_by_the_same_weights(mode):
    aim = AiM(
        Pooled(), Memory((2, 3, 4), "direct"), "conv2", "conv1",
        read_mode=mode, fit="resize", update=MemoryUpdate((3,)),
    )  # fmt: skip
    variables = random_variables(aim, draw(2, 8, 8, 3))
    params = variables["params"]
    update = {name: variables[name]["conv1"]["memory_update"] for name in ("params", "batch_stats")}
    for height, width in ((8, 8), (5, 12), (2, 2)):
        x = draw(2, height, width, 3)
        h = nn.Conv(4, (3, 3)).apply(
            {"params": {n: params["conv1"][n] for n in ("kernel", "bias")}}, x
        )
        m = aim.update.apply(update, h, params["memory"]["content"][None], fitted="resize")
        h = np.concatenate([h, jax.image.resize(m, (2, height, width, 4), "linear")], axis=-1)
        layer = dict(params["conv2"])
        if mode == "add":
            halves = [layer["kernel"], layer.pop("memory_read")["kernel"]]
            layer["kernel"] = np.concatenate(halves, axis=2)
        h = nn.Conv(3, (3, 3), strides=2).apply({"params": layer}, h).mean(axis=(1, 2))
        expected = h @ params["head"]["kernel"] + params["head"]["bias"]
        assert_close(aim.apply(variables, x), expected)


def test_a_read_at_another_image_size_names_the_way_out():
    aim = AiM(Pooled(), Memory((2, 3, 4)), "conv2")
    variables = aim.init(KEY, draw(2, 8, 8, 3))
    with refused("'conv2', whose kernel does not fit an input of 2x2 .*; with fit 'resize' it has"):
        aim.apply(variables, draw(2, 2, 2, 3))
    resized = aim.clone(fit="resize", memory=Memory((2, 4), "conv"))
    with refused(
        r"fit 'resize' takes a memory with the spatial axes of the map, 2, but .* \(2, 4\)"
    ):
        resized.init(KEY, draw(2, 8, 8, 3))
