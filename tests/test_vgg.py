"""VGG: exact sizes, training with and without memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax import AiM, Memory, MemoryUpdate
from aim_flax.errors import UsageError
from aim_flax.models.vgg import VGG
from tests.one_batch import photographs, train

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = dict(stage_sizes=(1, 1), widths=(8, 16), dense_sizes=(32, 32))


def shapes_of(net, height, width):
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), images)


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


# Parameters and running statistics. Sources: the published VGG16 control, run; torchvision's
# vgg16 has 138,357,544 parameters at 1000 classes, and no batch norm in front of its dense layers.
@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (VGG(120), 134_852_536),
        (VGG(1000), 138_357_544 + 4 * 25_088),
        # Four numbers for each feature of the 13 batch norms, which are 4,224 wide together.
        (VGG(120, batch_norm=True), 134_852_536 + 4 * 4_224),
        # The dense layers see 512 features, not 7·7·512.
        (VGG(120, pooling="global"), 134_852_536 - 48 * 512 * (4096 + 4)),
    ],
)
def test_counts(net, expected):
    assert count(shapes_of(net, 224, 224)) == expected


def test_submodule_names_are_the_papers():
    params = shapes_of(VGG(10, **SMALL, batch_norm=True), 8, 8)["params"]
    convolutions = {f"stage{s}_{kind}1" for s in (1, 2) for kind in ("conv", "norm")}
    assert set(params) == convolutions | {"norm", "dense1", "dense2", "head"}


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        (
            dict(pooling="globl"),
            (32, 32),
            "pooling is 'globl', expected one of flatten, global (did you mean 'global'?)",
        ),
        (
            dict(widths=(8, 16)),
            (32, 32),
            "widths are (8, 16), expected one for each of 5 stages",
        ),
        (
            dict(),
            (64, 31),
            "images of 64x31 px are too small for 5 stages of VGG, expected at least 32 px",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(options, size, message):
    with pytest.raises(UsageError) as error:
        shapes_of(VGG(10, **options), *size)
    assert str(error.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True])
def test_overfits_one_batch_of_photographs(memory):
    net = VGG(4, **SMALL, pooling="global", batch_norm=True, momentum=0.8)
    if memory:
        net = AiM(
            net,
            Memory((4, 4, 4)),
            read=r"stage\d_conv1|dense1|head",
            update_after=r"stage\d_pool",
            update=MemoryUpdate(momentum=0.8),
        )
    images, labels = photographs(8, 16, 16), jnp.arange(8) % 4
    losses, before, after = train(net, images, labels, steps=120)
    assert losses[0] > 1
    assert losses[-1] < 0.01
    logits = jax.jit(net.apply)(after, images)
    np.testing.assert_array_equal(logits.argmax(-1), labels)
    if memory:
        content = [variables["params"]["memory"]["conv"] for variables in (before, after)]
        change = jax.tree.map(lambda a, b: jnp.abs(a - b).min(), *content)
        assert all(leaf > 0 for leaf in jax.tree.leaves(change))


@pytest.mark.slow
def test_trains_on_odd_sizes_and_maps_smaller_than_the_memory():
    # 97x61 px become maps of 48x30 and 24x15.
    net = AiM(
        VGG(5, (1, 1), (4, 4), (16,)),
        Memory((25, 25, 2)),
        read=r"stage\d_conv1|dense1",
        update_after=r"stage\d_pool",
        read_mode="add",
    )
    losses, before, after = train(net, photographs(2, 97, 61), jnp.array([0, 3]), steps=2)
    assert np.isfinite(losses).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    # The last map, smaller than the memory, is written into it and read by the dense layer.
    last = [variables["params"]["stage2_pool"]["memory_update"] for variables in (before, after)]
    assert all((a != b).any() for a, b in zip(*(v["output"].values() for v in last), strict=True))


def test_updates_after_the_first_four_pools():
    net = AiM(VGG(120), Memory((7, 7, 512)), read=r"stage\d_conv1", update_after=r"stage[1-4]_pool")

    def updates(images):
        variables = net.init(jax.random.key(0), images)
        return net.apply(variables, images, mutable=["intermediates"])[1]["intermediates"]

    recorded = jax.eval_shape(updates, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    places = {name for name, record in recorded.items() if "memory_update_use" in record}
    assert places == {f"stage{stage}_pool" for stage in (1, 2, 3, 4)}
