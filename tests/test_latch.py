"""A memory latched on to networks that know nothing of it, and what the latch refuses."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_flax import AiM, Memory, MemoryUpdate, fit
from aim_flax.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def random_variables(net, *args, seed=0, **kwargs):
    """Returns variables of the network's shapes, all of them random; variances are positive."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(
        fill, jax.eval_shape(partial(net.init, **kwargs), KEY, *args)
    )


def paths(variables, collection="params"):
    return {"/".join(path) for path in flatten_dict(variables[collection])}


def outputs_and_gradients(net, variables, x):
    """Returns the outputs, and the gradients of a loss in parameters and input."""

    @jax.jit
    def run(params, x):
        def loss(params, x):
            outputs = net.apply({**variables, "params": params}, x)
            return sum(jnp.sin(y).sum() for y in jax.tree.leaves(outputs)), outputs

        gradients, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return outputs, gradients

    return run(variables["params"], x)


def assert_close(found, expected, tolerance=1e-5):
    """Compares trees; the tolerance is relative to each array's largest number."""

    def compare(path, a, b):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(compare, found, expected)


@contextmanager
def refused(message):
    """Expects a UsageError of one line in which the regular expression is found."""
    with pytest.raises(UsageError) as refusal:
        yield
    # Not by `match`, which also sees the note that JAX adds to tracebacks.
    assert re.search(message, str(refusal.value)), str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- The two forms of a read are the same function ---------------------------------------------

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
DENSE: dict[str, Callable[..., nn.Module]] = {
    "dense": partial(nn.Dense, 3),
    "general_features": partial(nn.DenseGeneral, (2, 3)),
}
FORMS = ("vector", "tokens", "image")
LAYERS = [*CONVOLUTIONS, *(f"{form}_{name}" for form in FORMS for name in DENSE)]
DENSE_LAYERS = [name for name in LAYERS if name.startswith(FORMS)]


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
    x = draw((3, 5, 4, 2))
    add = AiM(read_mode="add", **options)
    variables = random_variables(add, x)
    joined = {**variables, "params": join_halves(variables["params"])}
    forms = []
    for net, given in ((add, variables), (AiM(read_mode="concat", **options), joined)):
        outputs, (params, image) = outputs_and_gradients(net, given, x)
        forms.append((outputs, params, image))
    forms[0] = (forms[0][0], join_halves(forms[0][1]), forms[0][2])
    return forms


@pytest.mark.parametrize(
    ("memory", "name"),
    [(memory, name) for memory in ("per batch", "per example") for name in LAYERS]
    + [("dense", name) for name in DENSE_LAYERS],
)
def test_add_and_concat_are_the_same_function(memory, name):
    (y, params, _), (expected, expected_params, _) = both_forms(memory)
    assert_close(y[name], expected[name])
    assert_close(params[name], expected_params[name])
    # And the memory does count: its half of the kernel has a gradient.
    axis = input_axis(name, expected_params[name]["kernel"])
    half = np.moveaxis(expected_params[name]["kernel"], axis, 0)[4 // groups(name) :]
    assert np.abs(half).max() > 1e-3


def groups(name):
    return {"groups2": 2, "depthwise": 4}.get(name, 1)


@pytest.mark.parametrize("memory", ["per batch", "per example", "dense"])
def test_add_and_concat_have_the_same_gradients_elsewhere(memory):
    (_, params, image), (_, expected_params, expected_image) = both_forms(memory)
    assert_close(image, expected_image)
    for name in ("stem", "memory"):
        assert_close(params[name], expected_params[name])
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(params[name])) > 1e-3


def test_read_kernels_have_the_memorys_channels_for_every_group():
    x = draw((3, 5, 4, 2))
    for mode in ("add", "concat"):
        aim = AiM(Everything(), Memory((2, 3, 4)), read="(?!stem).*", read_mode=mode)
        params = flatten_dict(random_variables(aim, x)["params"], sep="/")
        kernel = "memory_read/kernel" if mode == "add" else "kernel"
        own = 0 if mode == "add" else 4
        for name, features in (("kernel3", 3), ("groups2", 6), ("depthwise", 8)):
            width = own // groups(name) + 2  # 24 floats on 20 positions
            assert params[f"{name}/{kernel}"].shape == (3, 3, width, features)
        assert params[f"transposed_kernel/{kernel}"].shape == (3, 3, 3, own + 2)
        assert params[f"image_general_features/{kernel}"].shape == (own + 4, 2, 3)


# --- Networks that nobody here wrote -----------------------------------------------------------


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
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), strides=2, name="stem")(x)
        for i in range(2):
            x = ConvNeXtBlock(4, name=f"block{i}")(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class ConvNeXtWithMemoryInside(nn.Module):
    """The same network with the published parametrisation written into it by hand."""

    @nn.compact
    def __call__(self, x):
        scope = self.scope.push("memory").push("conv")
        m = nn.Conv(5, (1, 1), parent=scope)(jnp.ones((1, 2, 2, 5)))
        x = nn.Conv(4, (2, 2), strides=2, name="stem")(x)
        for i in range(2):

            def append(h, groups=1, m=m):
                if groups == 1 and h.ndim == 4:
                    # The latch gives dense layers the mean of a memory with rows and columns.
                    share = jnp.broadcast_to(m.mean(axis=(1, 2), keepdims=True), (*h.shape[:-1], 5))
                    return jnp.concatenate([h, share], axis=-1)
                share = jnp.broadcast_to(fit(m, *h.shape[1:3]), (*h.shape[:3], 3))
                parts = [part for i in range(groups) for part in (h[..., i : i + 1], share)]
                return jnp.concatenate(parts, axis=-1)

            x = ConvNeXtBlock(4, name=f"block{i}")(x, append)
            scope = self.scope.push(f"block{i}", reuse=True).push("memory_update")
            m = MemoryUpdate(parent=scope)(x, m)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def test_convnext_equals_the_same_network_with_the_memory_written_into_it():
    aim = AiM(
        ConvNeXt(),
        Memory((2, 2, 5)),  # 20 floats: three channels on 3 x 3
        read=r"block\d/(depthwise|expand)",
        update_after=r"block\d",
    )
    x = draw((2, 6, 6, 3))
    variables = random_variables(aim, x)
    found = outputs_and_gradients(aim, variables, x)
    expected = outputs_and_gradients(ConvNeXtWithMemoryInside(), variables, x)
    assert_close(found, expected)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Conv(8, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        for i in range(2):
            h = nn.LayerNorm(name=f"norm{i}a")(x)
            h = nn.MultiHeadDotProductAttention(2, name=f"attention{i}")(
                h, deterministic=deterministic
            )
            x = nn.Dropout(0.5)(x + h, deterministic=deterministic)
            h = nn.LayerNorm(name=f"norm{i}b")(x)
            x = x + nn.Dense(8, name=f"mlp{i}")(h)
        return nn.Dense(3, name="head")(x[:, 0])


@pytest.mark.filterwarnings("ignore:read matches 'attention./key'")
def test_vit_reads_in_query_key_and_value_and_writes_after_its_blocks():
    block = MemoryUpdate(pool="mean")
    aim = AiM(
        ViT(),
        Memory((6,), "dense"),
        read=r"attention\d/(query|key|value)",
        update_after=r"mlp\d",
        read_mode="add",
        update=block,
    )
    x = draw((2, 4, 4, 3))
    variables = random_variables(aim, x)
    params = variables["params"]
    reads = {f"attention{i}/{part}" for i in (0, 1) for part in ("query", "key", "value")}
    latched = paths(variables) - paths(jax.eval_shape(ViT().init, KEY, x))
    assert {path.split("/memory_")[0] for path in latched} == {
        *reads, "mlp0", "mlp1", "memory/dense/bias", "memory/dense/kernel",
    }  # fmt: skip
    assert all(
        params[f"attention{i}"][part]["memory_read"]["kernel"].shape == (6, 2, 4)
        for i in (0, 1)
        for part in ("query", "key", "value")
    )

    # By linearity a bias per head and example is what a read adds; the second block's memory is
    # what the update after the first block made of the first memory.
    apply = partial(
        aim.apply, mutable=["intermediates"], capture_intermediates=lambda m, _: m.name == "mlp0"
    )
    y, state = jax.jit(apply)(variables, x)
    h = state["intermediates"]["mlp0"]["__call__"][0]
    memory = params["memory"]["dense"]["kernel"].sum(axis=0) + params["memory"]["dense"]["bias"]
    update = {name: variables[name]["mlp0"]["memory_update"] for name in ("params", "batch_stats")}
    memories = [memory[None], jax.jit(block.apply)(update, h, memory[None])]

    def add_by_hand(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if "/".join(context.module.path) not in reads:
            return y
        block, part = context.module.path
        kernel = params[block][part]["memory_read"]["kernel"]
        return y + jnp.einsum("bd,dhk->bhk", memories[int(block[-1])], kernel)[:, None]

    with nn.intercept_methods(add_by_hand):
        expected = jax.jit(ViT().apply)({"params": params}, x)
    assert_close(y, expected)


class WithSetup(nn.Module):
    widths: tuple[int, ...] = (4, 5)

    def setup(self):
        self.layers = [nn.Conv(width, (3, 3)) for width in self.widths]
        self.head = nn.Dense(3)

    def encode(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x

    def __call__(self, x):
        return self.head(self.encode(x).mean(axis=(1, 2)))


def test_setup_networks_can_be_latched_on_to():
    x = draw((2, 4, 4, 3))
    aim = AiM(WithSetup(), Memory((2, 2, 4)), read=["layers_1", "head"], update_after="layers_0")
    variables = random_variables(aim, x)
    params = variables["params"]
    assert params["layers_1"]["kernel"].shape == (3, 3, 4 + 1, 5)
    assert params["head"]["kernel"].shape == (5 + 4, 3)
    h = nn.Conv(4, (3, 3)).apply({"params": pick(params["layers_0"])}, x)
    m = params["memory"]["conv"]["kernel"].sum(axis=(0, 1, 2)) + params["memory"]["conv"]["bias"]
    m = MemoryUpdate().apply(
        {name: variables[name]["layers_0"]["memory_update"] for name in ("params", "batch_stats")},
        h,
        np.broadcast_to(m, (1, 2, 2, 4)),
    )
    h = jnp.concatenate([jnp.tanh(h), fit(m, 4, 4)], axis=-1)
    h = jnp.tanh(nn.Conv(5, (3, 3)).apply({"params": params["layers_1"]}, h)).mean(axis=(1, 2))
    h = jnp.concatenate([h, m.mean(axis=(1, 2))], axis=-1)
    expected = nn.Dense(3).apply({"params": params["head"]}, h)
    assert_close(aim.apply(variables, x), expected)


def pick(params, *names):
    return {name: params[name] for name in names or ("kernel", "bias")}


class Detector(nn.Module):
    """Submodules come as attributes, under names that AiM's own attributes have."""

    backbone: nn.Module
    update: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="read")(self.update(self.backbone(x)).mean(axis=(1, 2)))


class Encoder(WithSetup):
    def __call__(self, x):
        return self.encode(x)


@pytest.mark.parametrize(
    ("net", "read", "update_after"),
    [
        (Detector(nn.Conv(4, (3, 3)), nn.Conv(5, (3, 3))), "update", "backbone"),
        (Detector(Encoder(), nn.Dense(4)), "backbone/layers_0", "backbone/layers_1"),
        (nn.Sequential([nn.Conv(4, (1, 1)), nn.relu, nn.Conv(4, (1, 1))]), "layers_2", "layers_0"),
    ],
    ids=["attributes", "nested attributes", "Sequential"],
)
def test_networks_made_of_attributes_keep_paths_and_initial_values(net, read, update_after):
    x = draw((2, 4, 4, 3))
    aim = AiM(net, Memory((2, 2, 4)), read=read, update_after=update_after, read_mode="add")
    own = paths(jax.eval_shape(net.init, KEY, x))
    assert {f"{read}/memory_read/kernel", f"{update_after}/memory_update/output/kernel"} <= paths(
        jax.eval_shape(aim.init, KEY, x)
    )

    @jax.jit
    def initial_values():
        trees = (flatten_dict(n.init(KEY, x)["params"], sep="/") for n in (net, aim))
        return [{path: tree[path] for path in own} for tree in trees]

    plain, latched = initial_values()
    jax.tree.map(np.testing.assert_array_equal, latched, plain)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        return layer(jnp.tanh(layer(x)))


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_a_layer_that_is_called_twice_reads_twice_and_writes_twice(mode):
    x = draw((3, 4))
    aim = AiM(Shared(), Memory((2,), "dense"), read="layer", update_after="layer", read_mode=mode)
    variables = random_variables(aim, x)
    params = variables["params"]
    kernels = {path for path in paths(variables) if path.startswith("layer") and "kernel" in path}
    read = {"layer/memory_read/kernel"} if mode == "add" else set()
    update = {f"layer/memory_update/{n}/kernel" for n in ("dense1", "dense2", "dense3", "output")}
    assert kernels == {"layer/kernel", *read, *update}

    kernel = params["layer"]["kernel"]
    if mode == "add":
        kernel = np.concatenate([kernel, params["layer"]["memory_read"]["kernel"]])
    block = {name: variables[name]["layer"]["memory_update"] for name in ("params", "batch_stats")}
    dense = params["memory"]["dense"]
    m = np.repeat((dense["kernel"].sum(axis=0) + dense["bias"])[None], 3, axis=0)
    y = jnp.concatenate([x, m], axis=-1) @ kernel + params["layer"]["bias"]
    m = MemoryUpdate().apply(block, y, m)
    second = jnp.concatenate([jnp.tanh(y), m], axis=-1) @ kernel + params["layer"]["bias"]
    assert_close(aim.apply(variables, x), second)
    # The memory written last is the one that is carried.
    state = AiM(
        Shared(), Memory((2,), "dense"), "layer", "layer",
        read_mode=mode, carry="state", carry_rate=1.0, update=MemoryUpdate(momentum=0.5),
    )  # fmt: skip
    _, after = state.apply(
        {**variables, "memory": {"carried": np.zeros(2, np.float32)}},
        x, train=True, mutable=["memory", "batch_stats", "intermediates"],
    )  # fmt: skip
    assert len(after["intermediates"]["layer"]["memory_use"]) == 2
    assert len(after["intermediates"]["layer"]["memory_update_use"]) == 2


def test_a_latched_network_can_be_part_of_another():
    class Outer(nn.Module):
        inline: bool
        body: nn.Module | None = None

        @nn.compact
        def __call__(self, x):
            body = self.body
            if self.inline:
                body = AiM(
                    WithSetup(), Memory((2, 2, 4)), "layers_1", "layers_0", "layers_1", name="body"
                )
            return nn.Dense(2, name="outer_head")(body(x) + body(x))

    x = draw((2, 4, 4, 3))
    aim = AiM(WithSetup(), Memory((2, 2, 4)), "layers_1", "layers_0", "layers_1")
    alone = random_variables(aim, x)
    inline = random_variables(Outer(inline=True), x)
    attribute = random_variables(Outer(inline=False, body=aim), x)
    assert jax.tree.structure(inline) == jax.tree.structure(attribute)
    assert jax.tree.structure(inline["params"]["body"]) == jax.tree.structure(alone["params"])
    body = {name: tree["body"] for name, tree in inline.items()}
    expected = nn.Dense(2).apply({"params": inline["params"]["outer_head"]}, 2 * aim.apply(body, x))
    for outer in (Outer(inline=True), Outer(inline=False, body=aim)):
        assert_close(outer.apply(inline, x), expected)


# --- Flax transformations inside the backbone --------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Conv(4, (3, 3), name="conv")(x))


class Stage(nn.Module):
    """Three blocks, one after the other, each with its own parameters, transformed or not."""

    transformation: str = "none"

    @nn.compact
    def __call__(self, x):
        if self.transformation == "scan":
            body = nn.scan(
                ScanBody, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return body(name="blocks")(x, None)[0]
        block = nn.remat(Block) if self.transformation == "remat" else Block
        for i in range(3):
            x = block(name=f"block{i}")(x)
        return x


class ScanBody(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Ensemble(nn.Module):
    """The same blocks side by side: their outputs are added."""

    transformation: str = "none"

    @nn.compact
    def __call__(self, x):
        if self.transformation == "vmap":
            blocks = nn.vmap(
                Block, in_axes=None, axis_size=3, variable_axes={"params": 0},
                split_rngs={"params": True},
            )  # fmt: skip
            return blocks(name="blocks")(x).sum(axis=0)
        return sum(Block(name=f"block{i}")(x) for i in range(3))


class Staged(nn.Module):
    """A layer to write after, a stage, and a layer that reads what was written after the stage."""

    stage: type[nn.Module]
    transformation: str = "none"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="stem")(x)
        x = self.stage(self.transformation, name="stage")(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def stacked(variables, inner):
    """Returns the variables of stage/block{0,1,2} stacked under one module of a transformation."""
    flat = flatten_dict(variables["params"])
    blocks = {path[2:] for path in flat if path[:2] == ("stage", "block0")}
    joint = {path: leaf for path, leaf in flat.items() if not path[1].startswith("block")}
    for path in blocks:
        joint["stage", *inner, *path] = np.stack(
            [flat["stage", f"block{i}", *path] for i in range(3)]
        )
    return {**variables, "params": unflatten_dict(joint)}


def latch_on_stages(mode, net):
    return AiM(
        net,
        Memory((2, 2, 4)),
        read=["stage/.*conv", "head"],
        update_after=["stem", "stage"],  # before the transformed modules, and around them
        read_mode=mode,
    )


@cache
def untransformed(mode, stage):
    aim = latch_on_stages(mode, Staged(stage))
    variables = random_variables(aim, STAGED_INPUT)
    return variables, outputs_and_gradients(aim, variables, STAGED_INPUT)


STAGED_INPUT = draw((2, 4, 4, 3))


@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize(
    ("stage", "transformation", "inner"),
    [(Stage, "remat", None), (Stage, "scan", ("blocks", "block")), (Ensemble, "vmap", ("blocks",))],
    ids=["remat", "scan", "vmap"],
)
def test_reads_inside_transformations(mode, stage, transformation, inner):
    variables, (outputs, (params, image)) = untransformed(mode, stage)
    if inner is not None:
        variables = stacked(variables, inner)
        params = stacked({"params": params}, inner)["params"]
    aim = latch_on_stages(mode, Staged(stage, transformation))
    shapes = jax.eval_shape(aim.init, KEY, STAGED_INPUT)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    found = outputs_and_gradients(aim, variables, STAGED_INPUT)
    assert_close(found, (outputs, (params, image)))


def test_a_backbone_that_is_itself_transformed_reads():
    x = draw((2, 4, 4, 3))
    options = dict(memory=Memory((2, 2, 4)), read="block.*/conv")
    plain, remat = AiM(Stage(), **options), AiM(nn.remat(Stage)(), **options)
    x = draw((2, 4, 4, 4))
    variables = random_variables(plain, x)
    assert_close(
        outputs_and_gradients(remat, variables, x), outputs_and_gradients(plain, variables, x)
    )


@pytest.mark.parametrize(
    ("net", "place"),
    [
        (Staged(Stage, "remat"), "stage/block0"),
        (Staged(Stage, "remat"), "stage/block1/conv"),
        (Staged(Stage, "scan"), "stage/blocks/block"),
        (Staged(Ensemble, "vmap"), "stage/blocks"),
        (nn.remat(Staged)(Stage), "stem"),
    ],
)
def test_updates_inside_transformations_are_refused(net, place):
    aim = AiM(net, Memory((2, 2, 4)), read="head", update_after=place)
    message = f"update_after matches '{place}', which runs inside a Flax transformation"
    message += ".*: .*; update after a module around the transformed one, or behind it"
    with refused(message):
        jax.eval_shape(aim.init, KEY, draw((2, 4, 4, 3)))


JitBlock = nn.jit(Block)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = JitBlock(name="block")(x)
        return nn.Conv(4, (1, 1), name="last")(x)


@pytest.mark.parametrize("read", [".*conv", "last"])
def test_backbones_with_nn_jit_are_refused_even_after_the_plain_one_was_compiled(read):
    x = draw((2, 4, 4, 4))
    Jitted().init(KEY, x)
    with refused("'block.*' runs inside nn.jit, .*: .* compile the whole step with jax.jit"):
        AiM(Jitted(), Memory((2, 2, 4)), read=read, read_mode="add").init(KEY, x)


def test_a_latched_network_can_be_jitted_vmapped_and_scanned_as_a_whole():
    x = draw((3, 2, 4, 4, 3))
    aim = AiM(WithSetup(), Memory((2, 2, 4)), "layers_1", "layers_0", "layers_1")
    variables = random_variables(aim, x[0])
    expected = jnp.stack([aim.apply(variables, images) for images in x])
    run = partial(aim.apply, variables)
    assert_close(jax.jit(jax.vmap(run))(x), expected)
    assert_close(jax.lax.map(jax.jit(run), x), expected)
    vmapped = nn.vmap(
        AiM, in_axes=0, variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
    )(WithSetup(), Memory((2, 2, 4)), "layers_1", "layers_0", "layers_1")  # fmt: skip
    assert_close(vmapped.apply(variables, x), expected)


# --- What is refused ---------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers of every kind, to point patterns at."""

    @nn.compact
    def __call__(self, x):
        tokens = nn.Embed(5, 4, name="embed")(jnp.zeros(x.shape[:1], jnp.int32))
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        line = nn.Conv(4, (3,), name="line")(x[:, 0])
        nn.Conv(4, (3, 3), name="unbatched")(x[0])
        nn.Conv(4, (3, 3), mask=jnp.ones((3, 3, 4, 4)), name="masked")(x)
        nn.ConvLocal(4, (1, 1), name="local")(x)
        nn.DenseGeneral(4, axis=(-2, -1), name="several_axes")(x)
        nn.DenseGeneral(4, batch_dims=(0,), name="batch_dims")(x)
        nn.Dense(4, name="one_example")(x[0, 0, 0])
        pair = Pair(name="pair")(x)
        nn.Dense(4, name="late")(x.reshape(-1, 4))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)) + line.mean(axis=1) + tokens + pair[0])


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.zeros(4), x


LATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "no match": (
        dict(read="conv1"),
        r"read pattern 'conv1' matches no module of Mixed \(did you mean 'conv'\?\); there are: "
        "conv, line, unbatched, masked, several_axes, batch_dims, one_example, late, head$",
    ),
    "no match of the whole path": (
        dict(read="hea"),
        r"read pattern 'hea' matches no module of Mixed \(did you mean 'head'\?\)",
    ),
    "one of several patterns": (
        dict(read=("head", "tail")),
        "read pattern 'tail' matches no module of Mixed; there are",
    ),
    "no match of update_after": (
        dict(update_after="norms"),
        r"update_after pattern 'norms' matches no module of Mixed \(did you mean 'norm'\?\); "
        "there are: embed, conv, norm, ",
    ),
    "no match of read_initial": (
        dict(read_initial="heads"),
        r"read_initial pattern 'heads' matches no module of Mixed \(did you mean 'head'\?\)",
    ),
    "read_initial not in read": (
        dict(read_initial="conv"),
        "read_initial matches 'conv', which read does not match$",
    ),
    "an embedding": (
        dict(read="embed"),
        "read matches 'embed', but a Embed cannot read a memory; these can: "
        "nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral$",
    ),
    "a norm": (dict(read="norm"), "read matches 'norm', but a BatchNorm cannot read a memory"),
    "an unshared convolution": (
        dict(read="local"),
        "read matches 'local', but a ConvLocal cannot read a memory",
    ),
    "several axes": (
        dict(read="several_axes"),
        "read matches 'several_axes', but an nn.DenseGeneral can read only over its last axis$",
    ),
    "batch_dims": (dict(read="batch_dims"), "can read only over its last axis$"),
    "a 1-D convolution": (
        dict(read="line"),
        r"read matches 'line', but only convolutions over images \(B, H, W, C\) can read$",
    ),
    "an image without batch axis": (
        dict(read="unbatched"),
        r"read matches 'unbatched', but only convolutions over images \(B, H, W, C\) can read$",
    ),
    "a masked convolution": (
        dict(read="masked"),
        "read matches 'masked', but its mask says nothing about the memory's channels$",
    ),
    "a vector without batch axis": (
        dict(read="one_example"),
        r"read matches 'one_example', but its input has no batch axis: \(4,\)$",
    ),
    "a convolution and a dense memory": (
        dict(read="conv", memory=Memory((6,), "dense")),
        r"read matches 'conv', but a convolution reads a memory of shape \(R, K, D\), not \(6,\)$",
    ),
    "update after a tuple": (
        dict(update_after="pair"),
        r"update_after matches 'pair', whose output is a tuple: a memory of shape \(2, 2, 4\) is "
        r"updated from an array \(B, H, W, C\)$",
    ),
    "update from too few axes": (
        dict(update_after="line"),
        r"update_after matches 'line', whose output has shape \(2, 4, 4\): a memory of shape "
        r"\(2, 2, 4\) is updated from an array \(B, H, W, C\)$",
    ),
    "update of a dense memory from one example": (
        dict(update_after="one_example", memory=Memory((6,), "dense")),
        r"output has shape \(4,\): a memory of shape \(6,\) is updated from an array \(B, ..., C\)",
    ),
    "read with the batch folded after an update": (
        dict(read="late", update_after="conv"),
        "the memory was written for a batch of 2, but 'late' sees 32: the backbone folds something "
        "into its batch axis after the update$",
    ),
    "update with the batch folded after an update": (
        dict(
            update_after=("conv", "late"),
            memory=Memory((6,), "dense"),
            update=MemoryUpdate(pool="mean"),
        ),
        "the memory was written for a batch of 2, but 'late' sees 32",
    ),
    "read_mode": (
        dict(read_mode="adds"),
        r"read_mode is 'adds', expected one of concat, add, scale \(did you mean 'add'\?\)$",
    ),
    "carry": (
        dict(carry="stat", update_after="conv"),
        r"carry is 'stat', expected one of weights, state \(did you mean 'state'\?\)$",
    ),
    "zero_init with concat": (
        dict(zero_init=True),
        "zero_init needs read_mode 'add' or 'scale': in 'concat' the memory has no kernel of its "
        "own$",
    ),
    "carry without update": (
        dict(carry="state"),
        "carry 'state' needs update_after: nothing writes to this memory$",
    ),
    "carry_rate of zero": (dict(carry_rate=0.0), r"carry_rate is 0.0, expected a number in"),
    "carry_rate above one": (dict(carry_rate=1.5), r"carry_rate is 1.5, expected .* \(0, 1\]$"),
    "carry_rate of NaN": (dict(carry_rate=float("nan")), "carry_rate is nan, expected a number"),
    "a bad regular expression": (
        dict(read="conv("),
        r"'conv\(' is no regular expression: missing \), unterminated subpattern at position 4$",
    ),
    "an update block's mode": (
        dict(update_after="conv", update=MemoryUpdate(mode="gate")),
        "the update block's mode is 'gate', expected one of replace, residual, gated .*'gated'",
    ),
    "a bad memory": (dict(memory=Memory((2, 2))), r"a conv memory has shape \(R, K, D\)"),
}


@pytest.mark.parametrize("name", LATCHES)
def test_refusals_say_in_one_line_what_was_wrong(name):
    options, message = LATCHES[name]
    aim = AiM(**{"backbone": Mixed(), "memory": Memory((2, 2, 4)), "read": "head", **options})
    with refused(message):
        jax.eval_shape(aim.init, KEY, draw((2, 4, 4, 3)))


def test_no_pattern_at_all_latches_nothing_on_but_the_memory():
    x = draw((2, 4, 4, 3))
    for nothing in ("", ()):
        aim = AiM(WithSetup(), Memory((2, 2, 4)), read=nothing)
        extra = paths(random_variables(aim, x)) - paths(random_variables(WithSetup(), x))
        assert extra == {"memory/conv/kernel", "memory/conv/bias"}


def test_names_of_the_memories_are_taken():
    class Own(nn.Module):
        name_: str

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Dense(3, name=self.name_)(x))

    for name in ("memory", "memory_initial"):
        aim = AiM(Own(name), Memory((4,), "dense"), read="head", read_initial="head")
        with pytest.raises(nn.module.errors.NameInUseError, match=f'submodule "{name}"'):
            aim.init(KEY, draw((2, 3)))


# --- The train flag ----------------------------------------------------------------------------


class WithTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(nn.Dropout(0.5)(x, deterministic=not train))


class WithDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        return nn.Dense(3, name="head")(nn.Dropout(0.5)(x, deterministic=deterministic))


class WithNeither(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        return nn.Dense(3, name="head")(x if mask is None else x * mask)


def latch_on_head(net):
    return AiM(net, Memory((4,), "dense"), "head", update_after="head", read_mode="add")


def test_train_reaches_a_backbone_that_has_it():
    x = draw((8, 5))
    aim = latch_on_head(WithTrain())
    variables = random_variables(aim, x)
    rngs = {"dropout": KEY}
    apply = partial(aim.apply, variables, x, mutable=["batch_stats"], rngs=rngs)
    evaluated, stats = apply()
    _, stats_evaluated = apply(train=False)
    trained, stats_trained = apply(train=True)
    before = variables["batch_stats"]
    for after in (stats, stats_evaluated):
        jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], before)
    for place in (("norm",), ("head", "memory_update", "norm1")):
        old, new = before, stats_trained["batch_stats"]
        for name in place:
            old, new = old[name], new[name]
        assert not np.allclose(old["mean"], new["mean"])
    assert not np.allclose(evaluated, trained)


def test_train_does_not_reach_a_backbone_that_lacks_it():
    x = draw((8, 5))
    aim = latch_on_head(WithNeither())
    variables = random_variables(aim, x)
    y, state = aim.apply(variables, x, train=True, mutable=["batch_stats"])
    old = variables["batch_stats"]["head"]["memory_update"]["norm1"]["mean"]
    new = state["batch_stats"]["head"]["memory_update"]["norm1"]["mean"]
    assert not np.allclose(old, new)
    assert_close(y, aim.apply(variables, x))


def test_other_arguments_are_passed_on_as_they_are():
    x = draw((8, 5))
    aim = latch_on_head(WithDeterministic())
    variables = random_variables(aim, x, deterministic=True)
    rngs = {"dropout": KEY}
    dropped, _ = aim.apply(variables, x, deterministic=False, rngs=rngs, mutable=["batch_stats"])
    assert not np.allclose(dropped, aim.apply(variables, x, deterministic=True))
    aim = latch_on_head(WithNeither())
    variables = random_variables(aim, x)
    mask = np.float32([1, 0, 1, 0, 0])
    expected = aim.apply(variables, x * mask)
    assert_close(aim.apply(variables, x, mask), expected)
    assert_close(aim.apply(variables, x, mask=mask), expected)


# --- Intermediates -----------------------------------------------------------------------------


class Measured(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Conv(4, (1, 1), name="conv1")(x)
        h = nn.Conv(4, (1, 1), name="conv2")(h)
        return nn.Dense(3, name="tokens")(h.reshape(h.shape[0], -1, 4))


def mean_norm(y):
    y = np.asarray(y, np.float64)
    return np.sqrt((y**2).reshape(len(y), -1).sum(axis=1)).mean()


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_recorded_norms_are_those_of_the_memorys_share_and_the_rest(mode):
    x = draw((3, 4, 4, 2))
    reads = ("conv1", "conv2", "tokens")
    aim = AiM(Measured(), Memory((2, 2, 4)), reads, update_after="conv1", read_mode=mode)
    variables = random_variables(aim, x)
    params = variables["params"]
    _, state = aim.apply(variables, x, mutable=["intermediates"])
    recorded = state["intermediates"]

    def layer(name, h, share):
        """Returns the layer's own output and what the memory adds to it."""
        kernel = params[name]["kernel"].reshape(-1, params[name]["kernel"].shape[-1])
        if mode == "add":
            kernel = np.concatenate(
                [kernel, params[name]["memory_read"]["kernel"].reshape(-1, kernel.shape[-1])]
            )
        own = h @ kernel[: h.shape[-1]] + params[name]["bias"]
        return own, np.broadcast_to(share @ kernel[h.shape[-1] :], own.shape)

    conv = params["memory"]["conv"]
    m = np.broadcast_to(conv["kernel"].sum(axis=(0, 1, 2)) + conv["bias"], (1, 2, 2, 4))
    own1, share1 = layer("conv1", x, fit(m, 4, 4))
    block = {name: variables[name]["conv1"]["memory_update"] for name in ("params", "batch_stats")}
    new = MemoryUpdate().apply(block, own1 + share1, m)
    own2, share2 = layer("conv2", own1 + share1, fit(new, 4, 4))
    tokens = (own2 + share2).reshape(3, -1, 4)
    own3, share3 = layer("tokens", tokens, new.mean(axis=(1, 2))[:, None])
    for name, own, share in (
        ("conv1", own1, share1),
        ("conv2", own2, share2),
        ("tokens", own3, share3),
    ):
        (use,) = recorded[name]["memory_use"]
        np.testing.assert_allclose(use["own"], mean_norm(own), rtol=1e-4)
        np.testing.assert_allclose(use["share"], mean_norm(share), rtol=1e-4)
    (use,) = recorded["conv1"]["memory_update_use"]
    np.testing.assert_allclose(use["own"], mean_norm(m), rtol=1e-4)
    np.testing.assert_allclose(use["share"], mean_norm(new - m), rtol=1e-4)


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_a_share_that_is_the_same_at_every_position_counts_in_each(mode):
    x = draw((3, 4, 4, 2))
    aim = AiM(Measured(), Memory((4,), "dense"), "tokens", read_mode=mode)
    variables = random_variables(aim, x)
    _, state = aim.apply(variables, x, mutable=["intermediates"])
    params = variables["params"]
    dense = params["memory"]["dense"]
    kernel = (params["tokens"]["memory_read"] if mode == "add" else params["tokens"])["kernel"]
    share = (dense["kernel"].sum(axis=0) + dense["bias"]) @ kernel[-4:]
    (use,) = state["intermediates"]["tokens"]["memory_use"]
    np.testing.assert_allclose(use["share"], np.sqrt(16 * (share**2).sum()), rtol=1e-4)


def test_nothing_is_recorded_unless_asked():
    x = draw((3, 4, 4, 2))
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


# --- bfloat16 ----------------------------------------------------------------------------------


class Half(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), dtype=self.dtype, name="conv1")(x))
        x = nn.Conv(4, (3, 3), dtype=self.dtype, name="conv2")(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(x.mean(axis=(1, 2)))


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_reads_are_in_the_dtype_of_the_layer(mode):
    x = draw((2, 4, 4, 3))
    options = dict(memory=Memory((2, 2, 4)), read="conv2|head", read_mode=mode)
    full, half = AiM(Half(), **options), AiM(Half(jnp.bfloat16), **options)
    variables = random_variables(full, x)
    assert {a.dtype for a in jax.tree.leaves(jax.eval_shape(half.init, KEY, x))} == {x.dtype}
    expected = full.apply(variables, x)
    for images in (x, jnp.asarray(x, jnp.bfloat16)):
        y = half.apply(variables, images)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=0.05)


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_updates_and_carry_in_bfloat16_keep_float32_variables(mode):
    x = jnp.asarray(draw((4, 4, 4, 3)), jnp.bfloat16)
    aim = AiM(
        Half(jnp.bfloat16), Memory((2, 2, 4)), "conv2|head", "conv1|conv2",
        read_mode=mode, update=MemoryUpdate(dtype=jnp.bfloat16), carry="state",
    )  # fmt: skip
    # Flax's batch norm itself mixes bfloat16 activations with float32 statistics.
    with jax.numpy_dtype_promotion("standard"):
        variables = random_variables(aim, x)
        y, state = jax.eval_shape(
            partial(aim.apply, train=True, mutable=["memory", "batch_stats", "intermediates"]),
            variables,
            x,
        )
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, state))} == {jnp.dtype("float32")}
