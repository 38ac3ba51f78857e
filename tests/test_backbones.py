"""What holds for every convolutional backbone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax.models.resnet import ResNet
from aim_flax.models.vgg import VGG
from tests.one_batch import photographs
from tests.test_vgg import SMALL

pytestmark = pytest.mark.usefixtures("quick_compile")

TWO_STAGES = {
    "resnet": partial(ResNet, 5, (1, 1), 4),
    "vgg": partial(VGG, 5, **SMALL, batch_norm=True),
}
SHALLOWEST = TWO_STAGES | {"resnet": partial(ResNet, 5, (1,), 4)}


@pytest.mark.parametrize("backbone", TWO_STAGES.values(), ids=TWO_STAGES)
def test_half_precision_gives_float32_logits(backbone):
    net = backbone(dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

    def logits(images):
        variables = net.init(jax.random.key(0), images)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
        return net.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    # Strict promotion refuses how flax's BatchNorm promotes bfloat16 with float32.
    with jax.numpy_dtype_promotion("standard"):
        assert jax.eval_shape(logits, images).dtype == jnp.float32


@pytest.mark.parametrize("backbone", SHALLOWEST.values(), ids=SHALLOWEST)
def test_batch_statistics_are_those_of_all_devices(backbone):
    net, one_device = (backbone(axis_name=axis) for axis in ("batch", None))
    images = photographs(4, 16, 16)
    variables = jax.jit(net.init)(jax.random.key(0), images)

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
