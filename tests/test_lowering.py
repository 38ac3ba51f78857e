"""The training step of every arm lowers for GPUs and TPUs, which none of these tests has."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from ml_collections import ConfigDict

from aim_flax.layers.batch_norm import BatchNorm
from aim_flax.layers.depthwise import depthwise_taps
from aim_flax.train.topologies import planned
from tests.runs import arms, load
from tests.test_arms import SMALLER

pytestmark = pytest.mark.usefixtures("standard_promotion")

PLATFORMS = ("cuda", "tpu")
# An MLP's, and a ResNet's that carries its memory. Tracing a step takes seconds even of small ones,
# and there are 35 arms: the others are slow tests. Sizes change no operation.
QUICK = [
    *[arm for arm in arms() if arm.startswith("digits_mlp:")],
    "stanford_dogs_resnet50:aim_state",
]
# The fewest stages and layers with which every pattern still finds its place.
FEWER = {"resnet": "(2,1,1)", "vgg": "(1,1,1,1,1)"}


def small(arm: str) -> ConfigDict:
    changes = SMALLER[arm.partition(":")[0]]
    config = load(arm, changes)
    if sizes := FEWER.get(config.model.name):
        changes = [*changes, f"model.stage_sizes={sizes}"]
    if config.memory is not None:
        changes = [*changes, "memory.update_block.features=(4,)"]
    return load(arm, changes)


def check(config: ConfigDict) -> None:
    """The step of two devices has a program of each platform, whose state is as it went in.

    JAX raises where it has an operation that a platform lacks, or that is only for this one.
    """
    experiment = planned(config, jax.devices()[:2])
    step = export.export(experiment.train_call(1), platforms=PLATFORMS)(*experiment.step_shapes())
    assert (step.platforms, step.nr_devices) == (PLATFORMS, 2)
    state = [leaf.shape for leaf in jax.tree.leaves(experiment.abstract_state)]
    loss_and_accuracy = [(1,), (1,)]
    assert [out.shape for out in step.out_avals] == state + loss_and_accuracy


@pytest.mark.parametrize("arm", QUICK)
def test_step_lowers(arm):
    check(small(arm))


@pytest.mark.slow
@pytest.mark.parametrize("arm", [arm for arm in arms() if arm not in QUICK])
def test_step_of_the_others_lowers(arm):
    check(small(arm))


@pytest.mark.slow
def test_step_lowers_at_full_size():
    check(load("stanford_dogs_resnet50:published", ["model.num_classes=120"]))


def test_platforms_have_their_own_operations():
    """Sums of taps and of one image after the other are for XLA on CPU alone."""
    x, kernel = jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 1, 8))
    norm = BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)

    given = dict(feature_group_count=8, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(x, kernel):
        y = depthwise_taps(x, kernel, (1, 1), "SAME", **given)
        return norm.apply(variables, y, mutable=["batch_stats"])[0].sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel)
    text = {
        name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", *PLATFORMS)
    }
    assert "stablehlo.while" in text["cpu"]
    assert "stablehlo.convolution" not in text["cpu"]
    for name in PLATFORMS:
        assert "stablehlo.while" not in text[name]
        assert "feature_group_count = 8" in text[name]
