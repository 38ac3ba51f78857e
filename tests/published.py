"""The published AiM-ResNet50 for tests, and numbers from its run in Keras.

data/published_small.json holds what the published code computes in float64, in Keras 3, with a
7x7x32 memory, 112 px and 10 classes: `eval_logits` with running statistics; `train_logits`,
`train_loss` (mean cross-entropy), the L2 norms `grad_norms` and `batch_stats_norms_after` with
those of the batch. Its weights and inputs are drawn by rule, here.
"""

import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aim_flax import AiM, Memory
from aim_flax.models.keras_weights import variables_from_keras
from aim_flax.models.resnet import ResNet

GOLDEN = json.loads(Path(__file__).with_name("data").joinpath("published_small.json").read_text())
ROLES = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")


def published(num_classes, memory_shape, read_mode="concat", dtype=jnp.float32):
    return AiM(
        ResNet(num_classes, stem_stride=1),
        Memory(memory_shape, kind="conv", param_dtype=dtype),
        read=r"stage\d_block\d+/conv1",
        read_initial=r"stage\d_block([2-9]|1\d)/conv1",
        update_after=r"stage[123]_block1",
        read_mode=read_mode,
    )


@functools.cache
def shapes():
    """The variables' shapes of the published network with the golden file's sizes."""
    size = GOLDEN["image_size"]
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(published(10, (7, 7, 32)).init, jax.random.key(0), images)


@functools.cache
def keras_weights():
    weights = {}
    for layer, role, shape in GOLDEN["weights"]:
        rng = np.random.default_rng([zlib.crc32(layer.encode()), ROLES.index(role)])
        n = rng.standard_normal(shape)
        if role == "kernel":
            array = n * np.sqrt(2 / np.prod(shape[:-1]))
        elif role == "bias":
            array = 0.02 * n
        elif role == "gamma":
            array = 1 + 0.1 * n
        elif role == "moving_variance":
            array = 1 + 0.1 * np.abs(n)
        else:
            array = 0.1 * n
        weights.setdefault(layer, {})[role] = array.astype(np.float32)
    return weights


def images_and_labels():
    seed, batch, size = GOLDEN["input_seed"], GOLDEN["batch"], GOLDEN["image_size"]
    images = np.random.default_rng(seed).uniform(0, 1, (batch, size, size, 3))
    labels = np.random.default_rng(seed + 1).integers(0, GOLDEN["classes"], batch)
    return images.astype(np.float32), labels


def keras_names():
    """The tree of our variables with "layer/role" of the Keras weight at each leaf."""
    names = {}
    for layer, role, shape in GOLDEN["weights"]:
        names.setdefault(layer, {})[role] = np.broadcast_to(np.array(f"{layer}/{role}"), shape)
    return jax.tree.map(lambda array: str(array.flat[0]), variables_from_keras(names, shapes()))
