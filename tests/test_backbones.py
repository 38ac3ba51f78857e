"""Convolutional backbones: exact sizes, names, refusals, training with and without a memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax import AiM, Memory, MemoryUpdate
from aim_flax.models.resnet import ResNet
from aim_flax.models.vgg import VGG
from tests.arrays import KEY, count, shapes_of
from tests.asserts import refused
from tests.one_batch import photographs, train

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL_VGG = dict(stage_sizes=(1, 1), widths=(8, 16), dense_sizes=(32, 32))
TWO_STAGES = {
    "resnet": partial(ResNet, 5, (1, 1), 4),
    "vgg": partial(VGG, 5, **SMALL_VGG, batch_norm=True),
}
SHALLOWEST = TWO_STAGES | {"resnet": partial(ResNet, 5, (1,), 4)}


# Parameters and running statistics. Sources: torchvision, whose resnet50 has no biases in its
# convolutions and whose vgg16 has no batch norm in front of its dense layers, at 1000 classes; the
# published VGG16 control, run. Those of the published ResNets are in test_describe.py.
@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (ResNet(1000, conv_bias=False), 25_557_032 + 53_120),
        (VGG(1000), 138_357_544 + 4 * 25_088),
        # Four numbers for each feature of the 13 batch norms, which are 4,224 wide together.
        (VGG(120, batch_norm=True), 134_852_536 + 4 * 4_224),
        # The dense layers see 512 features, not 7·7·512.
        (VGG(120, pooling="global"), 134_852_536 - 48 * 512 * (4096 + 4)),
    ],
)
def test_counts(net, expected):
    assert count(shapes_of(net, 224)) == expected


def test_submodule_names_are_the_papers():
    params = shapes_of(ResNet(10, stage_sizes=(1, 2)), 32)["params"]
    block = {"conv1", "norm1", "conv2", "norm2", "conv3", "norm3"}
    assert {name: set(children) for name, children in params.items()} == {
        "stem": {"conv", "norm"},
        "stage1_block1": block | {"shortcut", "shortcut_norm"},
        "stage2_block1": block | {"shortcut", "shortcut_norm"},
        "stage2_block2": block,
        "head": {"kernel", "bias"},
    }
    params = shapes_of(VGG(10, **SMALL_VGG, batch_norm=True), 8)["params"]
    convolutions = {f"stage{s}_{kind}1" for s in (1, 2) for kind in ("conv", "norm")}
    assert set(params) == convolutions | {"norm", "dense1", "dense2", "head"}


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            ResNet(10, width=(8, 16)),
            "width is (8, 16), expected a number or one for each of 4 stages",
        ),
        (
            ResNet(10, stem="imagenett"),
            "stem is 'imagenett', expected one of imagenet, cifar (did you mean 'imagenet'?)",
        ),
        (ResNet(10, pointwise="dot"), "pointwise is 'dot', expected one of einsum, conv"),
        (
            VGG(10, pooling="globl"),
            "pooling is 'globl', expected one of flatten, global, grid (did you mean 'global'?)",
        ),
        (VGG(10, widths=(8, 16)), "widths are (8, 16), expected one for each of 5 stages"),
        (VGG(10), "images of 64x31 px are too small for 5 stages of VGG, expected at least 32 px"),
    ],
)
def test_mistakes_are_refused_in_one_line(net, message):
    with refused(exactly=message):
        shapes_of(net, 64, 31)


@pytest.mark.parametrize("backbone", TWO_STAGES.values(), ids=TWO_STAGES)
def test_half_precision_gives_float32_logits(backbone):
    net = backbone(dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

    def logits(images):
        variables = net.init(KEY, images)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
        return net.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    # Strict promotion refuses how flax's BatchNorm promotes bfloat16 with float32.
    with jax.numpy_dtype_promotion("standard"):
        assert jax.eval_shape(logits, images).dtype == jnp.float32


@pytest.mark.parametrize("backbone", SHALLOWEST.values(), ids=SHALLOWEST)
def test_batch_statistics_are_those_of_all_devices(backbone):
    net, one_device = (backbone(axis_name=axis) for axis in ("batch", None))
    images = photographs(4, 16, 16)
    variables = jax.jit(net.init)(KEY, images)

    @partial(jax.jit, static_argnums=0)
    def apply(net, images):
        return net.apply(variables, images, train=True, mutable=["batch_stats"])

    def halves(images):
        return jax.vmap(partial(apply, net), axis_name="batch")(images)

    logits, updated = halves(images.reshape(2, 2, 16, 16, 3))
    expected, expected_updated = apply(one_device, images)
    np.testing.assert_allclose(logits.reshape(4, -1), expected, rtol=1e-4, atol=1e-4)
    updated = jax.tree.map(lambda leaf: leaf[1], updated)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), updated, expected_updated)


RESNET = ResNet(4, stage_sizes=(1, 2), width=8, stem="cifar", momentum=0.8)
VGG_GLOBAL = VGG(4, **SMALL_VGG, pooling="global", batch_norm=True, momentum=0.8)
OF_RESNET = dict(read=r"stage\d_block\d/conv1", update_after="stage1_block1")
OF_VGG = dict(read=r"stage\d_conv1|dense1|head", update_after=r"stage\d_pool")
UPDATE = MemoryUpdate(momentum=0.8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "steps"),
    [
        (RESNET, 80),
        (AiM(RESNET, Memory((7, 7, 4)), **OF_RESNET, update=UPDATE), 80),
        (VGG_GLOBAL, 120),
        (AiM(VGG_GLOBAL, Memory((4, 4, 4)), **OF_VGG, update=UPDATE), 120),
    ],
    ids=["resnet", "resnet with memory", "vgg", "vgg with memory"],
)
def test_overfits_one_batch_of_photographs(net, steps):
    images, labels = photographs(8, 16, 16), jnp.arange(8) % 4
    losses, before, after = train(net, images, labels, steps)
    assert losses[0] > 1
    assert losses[-1] < 0.01
    logits = jax.jit(net.apply)(after, images)
    np.testing.assert_array_equal(logits.argmax(-1), labels)
    content = [variables["params"].get("memory", {}) for variables in (before, after)]
    change = jax.tree.map(lambda a, b: jnp.abs(a - b).min(), *content)
    assert len(jax.tree.leaves(change)) == (2 if isinstance(net, AiM) else 0)
    assert all(leaf > 0 for leaf in jax.tree.leaves(change))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "last"),
    [
        # 97x61 px become maps of 25x16 and 13x8.
        (
            AiM(
                ResNet(5, stage_sizes=(1, 1), width=4),
                Memory((15, 15, 2)),
                read=r"stage\d_block\d/conv1|head",
                update_after=r"stage\d_block1",
            ),
            "stage2_block1",
        ),
        # They become maps of 48x30 and 24x15.
        (
            AiM(
                VGG(5, (1, 1), (4, 4), (16,)),
                Memory((25, 25, 2)),
                read=r"stage\d_conv1|dense1",
                update_after=r"stage\d_pool",
                read_mode="add",
            ),
            "stage2_pool",
        ),
    ],
    ids=["resnet", "vgg"],
)
def test_trains_on_odd_sizes_and_maps_smaller_than_the_memory(net, last):
    losses, before, after = train(net, photographs(2, 97, 61), jnp.array([0, 3]), steps=2)
    assert np.isfinite(losses).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    # The last map, smaller than the memory, is written into it and read by the layer behind.
    blocks = [variables["params"][last]["memory_update"] for variables in (before, after)]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), *(b["output"] for b in blocks))
    assert moved == {"kernel": True, "bias": True}


def test_updates_after_the_first_four_pools():
    net = AiM(VGG(120), Memory((7, 7, 512)), read=r"stage\d_conv1", update_after=r"stage[1-4]_pool")

    def updates(images):
        variables = net.init(KEY, images)
        return net.apply(variables, images, mutable=["intermediates"])[1]["intermediates"]

    recorded = jax.eval_shape(updates, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    places = {name for name, record in recorded.items() if "memory_update_use" in record}
    assert places == {f"stage{stage}_pool" for stage in (1, 2, 3, 4)}
