"""Every arm of every config takes a training step, on maps smaller than its memory too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_flax import build_model
from aim_flax.train.experiment import Experiment
from aim_flax.train.optimizer import build_optimizer
from aim_flax.train.step import create_state, train_step
from tests.runs import arms, digits, load

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

# Depth and width only: the patterns, the kinds of memory and all else stay as they are.
SMALLER = {
    "digits_mlp": ["model.features=(16,16)"],
    "small_resnet": ["model.stage_sizes=(2,2,1,1)", "model.width=4", "model.num_classes=5"],
    "stanford_dogs_resnet50": ["model.stage_sizes=(2,1,1,1)", "model.width=4"],
    "cifar10_resnet": ["model.stage_sizes=(2,1,1,1)", "model.width=4"],
    "cifar10_vgg16": ["model.widths=(4,4,8,8,8)", "model.dense_sizes=(16,16)"],
    "image_folder_resnet50": [
        "model.stage_sizes=(2,1,1,1)",
        "model.width=4",
        "model.num_classes=5",
    ],
    "image_folder_efficientnet": [
        "model.pretrained=None",
        "model.stage_sizes=(1,1,1,1,1,1,1)",
        "model.widths=(4,4,4,4,4,4,4)",
        "model.stem_width=4",
        "model.top_width=8",
        "model.num_classes=5",
    ],
    "stanford_dogs_vgg16": ["model.widths=(4,4,8,8,8)", "model.dense_sizes=(16,16)"],
}
MEMORY = {"digits_mlp": "(8,)"}


@pytest.mark.slow
@pytest.mark.parametrize("arm", arms())
def test_step_on_odd_images(arm):
    """Photographs of 97x61 pixels: the last maps have fewer pixels than the memory has rows."""
    name = arm.partition(":")[0]
    changes = SMALLER[name] + ["data.image_shape=(97,61,3)"]
    if load(arm).memory is not None:
        changes.append(f"memory.shape={MEMORY.get(name, '(7,7,12)')}")
    config = load(arm, changes)
    model = build_model(config)
    optimizer = build_optimizer(config, lambda step: 1e-3)
    create = jax.jit(lambda: create_state(model, optimizer, 0, (97, 61, 3)))
    state = create()
    images = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (4, 97, 61, 3)), jnp.float32)
    labels = jnp.arange(4)

    step = jax.jit(lambda state: train_step(model, optimizer, state, images, labels, 0))
    after, metrics = step(state)
    assert np.isfinite(metrics["loss"])
    assert int(after.step) == 1
    for leaf in jax.tree.leaves(after):
        assert np.isfinite(leaf).all()
    assert set(after.model_state) == set(state.model_state)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert moved["head"]["kernel"]
    if config.memory is not None and config.memory.carry == "state":
        assert np.abs(after.model_state["memory"]["carried"]).max() > 0


def first_losses(count: int, *changes: str) -> np.ndarray:
    experiment = Experiment(digits("control", *changes), count)
    state = experiment.devices.replicate(experiment.initial_state())
    seed = experiment.devices.replicate(np.uint32(0))
    data = experiment.train_batches.feed(0, 0, 5).at(0)
    _, metrics = experiment.train_call(5)(state, data, seed)
    return experiment.devices.fetch(metrics)["loss"]


@pytest.mark.slow
def test_augmentation_is_the_same_on_any_number_of_devices():
    changes = ("augment.rotation=0.1", "augment.translation=0.1", "augment.contrast=0.5")
    augmented = first_losses(1, *changes)
    assert np.abs(augmented - first_losses(1)).min() > 1e-4
    np.testing.assert_allclose(first_losses(8, *changes), augmented, rtol=1e-5)


def test_augmentation_that_does_nothing_is_not_computed():
    """A step is the same program, random draws included, as in a config without augmentation."""

    def program(config) -> str:
        experiment = Experiment(config, 1)
        data = experiment.train_batches.feed(0, 0, 1).at(0)
        state, seed = map(experiment.devices.replicate, (experiment.initial_state(), np.uint32(0)))
        return str(jax.make_jaxpr(experiment.train_call(1))(state, data, seed))

    without = digits("control")
    with without.unlocked():
        without.augment = None
    assert program(digits("control")) == program(without)
    assert program(digits("control", "augment.shift=1")) != program(without)
