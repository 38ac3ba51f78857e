"""ResNet: sizes of maps and stages, the published network's numbers, 1x1 convolutions."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from aim_flax.layers import pointwise
from aim_flax.layers.pointwise import pointwise_product
from aim_flax.models.keras_weights import split_reads, variables_from_keras
from aim_flax.models.resnet import ResNet
from tests.arrays import KEY, count, draw, shapes_of
from tests.asserts import assert_close
from tests.one_batch import loss_and_grads, photographs
from tests.published import (
    GOLDEN,
    images_and_labels,
    keras_names,
    keras_weights,
    published,
    shapes,
)

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_count_of_each_part_of_the_memory():
    shapes = flatten_dict(shapes_of(published(120, (7, 7, 1024), "add"), 224))

    def part(name):
        return count({path: leaf for path, leaf in shapes.items() if name in path})

    reads, updates = part("memory_read"), part("memory_update")
    memories = part("memory"), part("memory_initial")
    assert (reads, updates, memories) == (388_352, 393_216, (1_049_600, 1_049_600))
    assert reads + updates + sum(memories) == 2_880_768 == 26_714_360 - 23_833_592


@pytest.mark.parametrize(("stem_stride", "sizes"), [(1, (112, 56, 28, 14)), (2, (56, 28, 14, 7))])
def test_block_outputs_can_be_captured_and_have_the_published_sizes(stem_stride, sizes):
    def blocks(images):
        def is_block(module, method):
            return method == "__call__" and module.path and module.path[-1].endswith("_block1")

        net = ResNet(10, stem_stride=stem_stride)
        variables = net.init(KEY, images)
        return net.apply(variables, images, capture_intermediates=is_block)[1]["intermediates"]

    outputs = jax.eval_shape(blocks, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
    for stage, size in enumerate(sizes, start=1):
        (output,) = outputs[f"stage{stage}_block1"]["__call__"]
        assert output.shape == (2, size, size, 128 * 2**stage)


def test_cifar_stem_keeps_the_size():
    net = ResNet(10, stage_sizes=(1,), width=8, stem="cifar")
    shapes = shapes_of(net, 32)["params"]
    assert shapes["stem"]["conv"]["kernel"].shape == (3, 3, 3, 8)

    def stem(images):
        variables = net.init(KEY, images)
        outputs = net.apply(variables, images, capture_intermediates=True)[1]["intermediates"]
        return outputs["stem"]["__call__"][0]

    images = jax.ShapeDtypeStruct((1, 32, 31, 3), jnp.float32)
    assert jax.eval_shape(stem, images).shape == (1, 32, 31, 8)


def test_width_of_each_stage():
    number, one_each = (ResNet(10, (1, 2), width) for width in (8, (8, 16)))
    shapes = [jax.tree.map(lambda leaf: leaf.shape, shapes_of(n, 32)) for n in (number, one_each)]
    assert shapes[0] == shapes[1]
    params = shapes_of(ResNet(10, (1, 2), (5, 7)), 32)["params"]
    assert params["stem"]["conv"]["kernel"].shape == (7, 7, 3, 5)
    assert params["stage1_block1"]["conv3"]["kernel"].shape == (1, 1, 5, 20)
    assert params["stage2_block1"]["conv1"]["kernel"].shape == (1, 1, 20, 7)
    assert params["stage2_block2"]["conv3"]["kernel"].shape == (1, 1, 7, 28)
    assert params["head"]["kernel"].shape == (28, 10)


def relative(ours, golden):
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden)
    return np.linalg.norm(ours - golden) / np.linalg.norm(golden)


def golden_run(read_mode, dtype):
    """Network, variables and images of the published numbers, in `dtype`."""
    net = published(GOLDEN["classes"], tuple(GOLDEN["memory_shape"]), read_mode, dtype)
    variables = variables_from_keras(keras_weights(), shapes())
    if read_mode == "add":
        variables = split_reads(variables, shapes_of(net.backbone, 112)["params"])
    images, labels = images_and_labels()
    variables, images = jax.tree.map(lambda a: jnp.asarray(a, dtype), (variables, images))
    return net, variables, images, labels


@pytest.mark.parametrize(
    ("read_mode", "dtype", "tolerance"),
    [
        pytest.param("concat", "float64", 1e-6, marks=pytest.mark.slow),
        pytest.param("add", "float64", 1e-6, marks=pytest.mark.slow),
        ("concat", "float32", 1e-4),
    ],
)
def test_published_evaluation_logits(read_mode, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        net, variables, images, _ = golden_run(read_mode, jnp.dtype(dtype))
        logits = jax.jit(net.apply)(variables, images)
    assert logits.dtype == dtype
    # Relative to all of them together: there are logits of 840 beside one of 9.
    assert relative(logits, GOLDEN["eval_logits"]) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("read_mode", ["concat", "add"])
def test_published_training_step(read_mode):
    # Strict promotion refuses how flax's BatchNorm promotes float64 with float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        net, variables, images, labels = golden_run(read_mode, jnp.float64)
        loss, (logits, batch_stats), grads = jax.jit(partial(loss_and_grads, net))(
            variables, images, labels
        )
    assert relative(logits, GOLDEN["train_logits"]) < 1e-6
    assert relative(loss, GOLDEN["train_loss"]) < 1e-6

    ours = {"params": grads, "batch_stats": batch_stats}
    names = flatten_dict(keras_names())
    flat = {path: np.asarray(array).ravel() for path, array in flatten_dict(ours).items()}
    norms = {}
    for path, name in names.items():
        halves = [flat.pop(path)]
        memory_half = (*path[:-1], "memory_read", path[-1])
        if memory_half in flat:
            halves.append(flat.pop(memory_half))
        norms[name] = np.linalg.norm(np.concatenate(halves))
    assert not flat
    golden = GOLDEN["grad_norms"] | GOLDEN["batch_stats_norms_after"]
    assert set(norms) == set(golden)
    # Batch norm takes out the bias of every convolution but the memory's: zero but for rounding.
    cancelled = {
        name
        for name in norms
        if name.endswith("/bias") and name.startswith(("conv", "res", "mem_conv"))
    }
    assert len(cancelled) == 62
    errors = {name: abs(norms[name] / golden[name] - 1) for name in set(norms) - cancelled}
    assert {name: error for name, error in errors.items() if not error < 1e-6} == {}
    assert max(norms[name] for name in cancelled) < 1e-11


def convolve(conv_general_dilated, shape, **options):
    """A convolution, and the gradients with respect to kernel and images, of random numbers."""
    net = nn.Conv(6, use_bias=False, conv_general_dilated=conv_general_dilated, **options)
    x = jnp.asarray(draw(*shape))
    kernel = jax.eval_shape(net.init, KEY, x)["params"]["kernel"]
    kernel = jnp.asarray(draw(*kernel.shape, seed=1))
    y = jax.eval_shape(net.apply, {"params": {"kernel": kernel}}, x)
    cotangent = jnp.asarray(draw(*y.shape, seed=2))

    @jax.jit
    def run(kernel, x):
        y, pullback = jax.vjp(lambda k, x: net.apply({"params": {"kernel": k}}, x), kernel, x)
        return y, pullback(cotangent)

    return run(kernel, x)


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=(1, 1)),
        dict(kernel_size=(1, 1), strides=2),
        dict(kernel_size=(1, 1), strides=(3, 2), padding="VALID"),
        dict(kernel_size=(1, 1), strides=2, padding=0),
        dict(kernel_size=(1, 1), strides=2, padding=1),
        dict(kernel_size=(1, 1), strides=2, padding=[(0, 2), (1, 0)]),
        dict(kernel_size=(1, 1), strides=2, padding="CIRCULAR"),
        dict(kernel_size=(1, 1), strides=2, feature_group_count=2),
        dict(kernel_size=(1, 1), strides=2, kernel_dilation=2),
        dict(kernel_size=(1, 1), padding=0, input_dilation=2),
        dict(kernel_size=(3, 3), strides=2),
        dict(kernel_size=(1, 3), kernel_dilation=2),
    ],
)
def test_pointwise_product_equals_the_convolution(options):
    shape = (2, 7, 10, 4)
    ours = convolve(pointwise_product, shape, **options)
    theirs = convolve(None, shape, **options)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    assert_close(ours, theirs)


def test_pointwise_product_is_a_product_only_where_it_may_be(monkeypatch):
    def is_product(shape, **options):
        products = []
        monkeypatch.setattr(pointwise, "_pointwise", lambda *given: products.append(given))
        with contextlib.suppress(AttributeError, TypeError):
            convolve(pointwise_product, shape, **options)
        return bool(products)

    shape = (1, 5, 5, 4)
    assert is_product(shape, kernel_size=(1, 1), strides=2)
    assert not is_product(shape, kernel_size=(1, 1), padding=1)
    assert not is_product(shape, kernel_size=(1, 1), feature_group_count=2)
    assert not is_product(shape, kernel_size=(1, 1), padding=0, input_dilation=2)
    assert not is_product(shape, kernel_size=(3, 3))
    assert not is_product((1, 5, 4), kernel_size=(1,))


def test_pointwise_product_follows_other_dimension_numbers():
    x, kernel = jnp.asarray(draw(2, 3, 5, 5)), jnp.asarray(draw(4, 3, 1, 1, seed=1))
    ours = pointwise_product(x, kernel, (1, 1), "VALID")
    assert_close(ours, jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID"))


def test_resnet_with_einsum_equals_resnet_with_convolutions():
    images = photographs(2, 33, 40)
    nets = [ResNet(3, (1, 1), 8, pointwise=pointwise) for pointwise in ("einsum", "conv")]
    variables = jax.jit(nets[0].init)(KEY, images)
    programs = [jax.jit(net.apply).trace(variables, images) for net in nets]
    # Two 1x1 convolutions and a shortcut in each block; the head is a product in both.
    assert [str(program.jaxpr).count("dot_general") for program in programs] == [2 * 3 + 1, 1]
    logits = [program.lower().compile()(variables, images) for program in programs]
    np.testing.assert_allclose(*logits, rtol=1e-5)
