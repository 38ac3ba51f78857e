"""Controls derived from a config: what they change, and how close their sizes come."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.config import differing_keys
from aim_flax.models.build import build_model
from aim_flax.models.describe import describe, multiply_adds
from aim_flax.study.controls import CONTROLS, count, derive
from tests.asserts import refused
from tests.runs import load

RESNET = [
    "model.stage_sizes=(1,2)",
    "model.width=6",
    "data.image_shape=(32,32,3)",
    "memory.shape=(4,4,8)",
]
VGG = [
    "model.stage_sizes=(1,1,1,1,1)",
    "model.widths=(4,4,8,8,8)",
    "model.dense_sizes=(16,16)",
    "data.image_shape=(32,32,3)",
    "memory.shape=(4,4,8)",
]
# The memory's network, small, of each backbone.
SMALL = {
    "mlp": ("digits_mlp:aim", []),
    "tiny mlp": ("digits_mlp:aim_direct", ["model.features=(3,9,2)", "memory.shape=(8,)"]),
    "resnet": ("stanford_dogs_resnet50:published", RESNET),
    "vgg": ("stanford_dogs_vgg16:aim", VGG),
}


def widths(config):
    fields = ("features", "widths", "dense_sizes", "width")
    return [n for field in fields for n in config.model.get(field, ())]


def test_control_is_the_config_without_memory():
    for arm in ("aim", "aim_state", "aim_direct"):
        control = derive(load(f"digits_mlp:{arm}"), "control")
        assert differing_keys(control, load("digits_mlp:control")) == []
    # The stem's stride stays as with memory, so that resolution is the same.
    control = derive(load("stanford_dogs_resnet50:aim"), "control")
    assert differing_keys(control, load("stanford_dogs_resnet50:control_stride1")) == ["arm"]


@pytest.mark.parametrize("name", SMALL)
def test_count_is_that_of_describe(name):
    for config in (load(*SMALL[name]), derive(load(*SMALL[name]), "control")):
        text = describe(config)[0].replace(",", "")
        params, multiply_adds = count(config)
        assert int(re.search(r"^total +(\d+)", text, re.MULTILINE)[1]) == params
        alone = int(re.search(r"forward pass: (\d+)", text)[1])
        if config.memory is None:
            assert alone == multiply_adds
        else:  # What is the same for all examples is computed once for a batch.
            assert alone >= multiply_adds
        batch_size = config.train.batch_size
        assert multiply_adds == round(forward_pass(config, batch_size) / batch_size)


def forward_pass(config, batch_size):
    """Returns the multiply-adds of a batch's forward pass, with nothing of `count`."""
    images = jax.ShapeDtypeStruct((batch_size, *config.data.image_shape), jnp.float32)
    net = build_model(config)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    return multiply_adds(jax.make_jaxpr(net.apply)(variables, images).jaxpr)


@pytest.mark.parametrize(
    "name",
    [
        "digits_mlp:aim_no_update",
        pytest.param("cifar10_vgg16:aim_no_update", marks=pytest.mark.slow),
    ],
)
def test_a_control_computes_as_much_in_a_training_batch(name):
    """Reads that are the same for all examples are computed once, whatever the batch size is."""
    config = load(name)
    derived = derive(config, "control_compute")
    goal, found = (forward_pass(c, config.train.batch_size) for c in (config, derived))
    assert abs(found - goal) <= 0.01 * goal
    goal, found = (forward_pass(c, 1) for c in (config, derived))
    assert found < 0.98 * goal  # an image alone pays for all of them


@pytest.mark.parametrize(("control", "which"), [("control_params", 0), ("control_compute", 1)])
@pytest.mark.parametrize("name", SMALL)
def test_plain_network_of_the_same_size(name, control, which):
    config = load(*SMALL[name])
    derived = derive(config, control)
    assert derived.memory is None
    goal, plain = count(config)[which], count(derive(config, "control"))[which]
    assert abs(count(derived)[which] - goal) <= 0.01 * goal < goal - plain
    changed = {key for key in differing_keys(config, derived) if not key.startswith("memory")}
    assert changed <= {"arm", "model.features", "model.width", "model.widths", "model.dense_sizes"}
    assert all(n > 0 for n in widths(derived))


def test_widths_grow_in_proportion():
    derived = derive(load("digits_mlp:aim", ["model.features=(30,10)"]), "control_compute")
    first, second = derived.model.features
    assert 2.5 < first / second < 3.5


def test_size_that_no_width_has_is_refused():
    """One hidden layer of n features on 64 pixels has 75·n + 10 parameters."""
    config = load("digits_mlp:aim", ["model.features=(5,)", "memory.shape=(8,)"])
    message = "no widths of mlp have the 2,009 trainable parameters of digits_mlp:aim within 1%;"
    with refused(exactly=f"{message} nearest: 2,035 with (27,)"):
        derive(config, "control_params")
    assert count(config)[0] == 2009
    assert 75 * 27 + 10 == 2035


@pytest.mark.parametrize(
    ("control", "key", "value"),
    [
        ("memory_frozen", "learning_rate_scale", 0.0),
        ("memory_noise", "kind", "noise"),
        ("memory_zero", "kind", "zero"),
        ("memory_half", "shape", (32,)),
        ("memory_double", "shape", (128,)),
    ],
)
def test_memory_controls_change_one_key(control, key, value):
    config = load("digits_mlp:aim")
    derived = derive(config, control)
    assert derived.memory[key] == value
    assert differing_keys(config, derived) == ["arm", f"memory.{key}"]


def test_memories_that_are_not_learned_have_no_parameters():
    """A dense memory of 64 floats has 64·64 + 64 parameters, of which frozen ones count as well."""
    config = load("digits_mlp:aim")
    params, _ = count(config)
    assert count(derive(config, "memory_frozen"))[0] == params
    for control in ("memory_noise", "memory_zero"):
        assert count(derive(config, control))[0] == params - 64 * 65


def test_floats_are_halved_and_doubled_by_channels():
    config = load("stanford_dogs_resnet50:aim")
    assert derive(config, "memory_half").memory.shape == (7, 7, 512)
    assert derive(config, "memory_double").memory.shape == (7, 7, 2048)
    assert math.prod(derive(config, "memory_double").memory.shape) == 2 * 50_176
    odd = load("digits_mlp:aim", ["memory.shape=(7,)"])
    with refused(r"memory.shape is \(7,\): 7 channels cannot be halved"):
        derive(odd, "memory_half")
    with odd.unlocked(), odd.memory.ignore_type():
        odd.memory.shape = 8
    assert derive(odd, "memory_half").memory.shape == (4,)


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_can_be_saved_and_leaves_its_config_alone(control):
    config = load(*SMALL["vgg"])
    before = config.to_json()
    derived = derive(config, control)
    assert config.to_json() == before
    assert derived.arm == control
    assert derived.is_locked
    saved = ConfigDict(json.loads(configs.to_json(derived)))
    assert count(saved) == count(derived)
    of_saved = derive(ConfigDict(json.loads(configs.to_json(config))), control)
    assert differing_keys(of_saved, derived) == []


def test_resnets_widths_can_be_saved():
    derived = derive(load(*SMALL["resnet"]), "control_params")
    assert len(derived.model.width) == 2
    assert count(ConfigDict(json.loads(configs.to_json(derived)))) == count(derived)


def test_mistakes_are_told():
    with refused("the control is 'control_param', .*did you mean"):
        derive(load("digits_mlp:aim"), "control_param")
    with refused("digits_mlp:control has no memory to derive"):
        derive(load("digits_mlp:control"), "memory_half")
    linear = load("digits_mlp:aim_no_update", ["model.features=()", "memory.read=head"])
    with refused("digits_mlp:aim_no_update has no hidden layer"):
        derive(linear, "control_params")
