"""Loading, overriding and comparing configs."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from aim_flax import AiM, Instead, Memory, MemoryUpdate
from aim_flax import config as configs
from aim_flax.data.augment import OPTIONS
from aim_flax.data.load import open_dataset
from aim_flax.models.build import MODELS, OF_CALLERS, build_model
from configs import base
from tests.asserts import refused
from tests.runs import DIGITS, ROOT, arms, from_before, load


def test_first_arm_is_the_default():
    assert configs.load(DIGITS).arm == "aim"
    assert configs.load(f"{DIGITS}:control").memory is None


def test_overrides_take_the_type_of_the_key():
    expected = {
        "train.epochs=5": 5,
        "optimizer.learning_rate=1e-2": 1e-2,
        "model.features=(32,16)": (32, 16),
        "memory.read=head": "head",
        "memory.zero_init=true": True,
        "optimizer.momentum=0.9": 0.9,
        "schedule.plateau_patience=3": 3,
        "model.num_classes=None": None,
    }
    config = configs.override(configs.load(DIGITS), ["model.features=(8,8)", *expected])
    for assignment, value in expected.items():
        group, _, key = assignment.partition("=")[0].partition(".")
        assert config[group][key] == value
        assert type(config[group][key]) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epoch=5", "'train.epoch' is no config key .did you mean 'train.epochs'"),
        ("train=5", "'train' is a group of keys"),
        ("train.epochs", "'train.epochs' has no value"),
        ("train.epochs=many", "^train.epochs=many: expected a whole number$"),
        ("train.epochs=2.5", "train.epochs=2.5: expected a whole number"),
        ("train.epochs=None", "train.epochs=None: expected a whole number"),
    ],
)
def test_wrong_overrides_are_named_and_change_nothing(assignment, message):
    config = configs.load(DIGITS)
    with refused(message):
        configs.override(config, ["train.batch_size=32", assignment])
    assert configs.differing_keys(config, configs.load(DIGITS)) == []


def test_memory_keys_of_an_arm_without_memory_do_not_exist():
    with refused("'memory.read' is no config key"):
        configs.override(configs.load(f"{DIGITS}:control"), ["memory.read=head"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{DIGITS}:amin", "has no arm 'amin' .did you mean 'aim'.*; its arms: aim, control, "),
        (DIGITS.replace("mlp.py", "mpl.py"), "not found .did you mean '.*digits_mlp.py'"),
        ("nowhere/at_all.py", "config file 'nowhere/at_all.py' not found"),
        (str(ROOT / "train.py"), "is no config: it must define ARMS and get_config"),
        (str(ROOT / "configs" / "base.py"), "is no config: it must define ARMS and get_config"),
        (str(ROOT / "pyproject.toml"), "is no Python file"),
    ],
)
def test_wrong_config_names_are_told(name, message):
    with refused(message):
        configs.load(name)


@pytest.mark.parametrize("arm", arms())
def test_every_arm_has_every_key_and_survives_json(arm):
    """Any key is a flag: each takes the value that it has."""
    config = load(arm)
    assert f"{config.name}:{config.arm}" == arm
    started = base.start(config.name, config.arm, config.model.name)
    if config.memory is None:
        started.memory = None
    values = configs.flatten(config)
    assert values.keys() == configs.flatten(started).keys()
    flags = [f"{key}={value}" for key, value in values.items() if key != "memory"]
    assert configs.flatten(configs.override(config, flags)) == values
    again = ConfigDict(json.loads(configs.to_json(config)))
    assert configs.differing_keys(config, again) == []


@pytest.mark.parametrize("model", MODELS)
def test_base_has_every_option_with_its_default(model):
    """Those of the network, the memory and its updates; augmentation does nothing."""
    config = base.start("name", "arm", model)
    set_here = {"num_classes", "shape", "read", "read_initial", "update_after", "at"}
    no_options = {"parent", "name", "dtype", "param_dtype", "axis_name", "kernel_init"}
    no_options |= {"backbone", "memory", "update"}
    for group, classes in (
        (config.model, [MODELS[model]]),
        (config.memory, [Memory, AiM]),
        (config.memory.update_block, [MemoryUpdate]),
        (config.instead, [Instead]),
    ):
        fields = {field.name: field.default for c in classes for field in dataclasses.fields(c)}
        if {AiM, Instead} & set(classes):
            fields = {name: value for name, value in fields.items() if name not in OF_CALLERS}
        keys = set(group) - {"name", "pretrained", "update_block", "learning_rate_scale"}
        assert keys == fields.keys() - no_options
        for key in keys - set_here:
            default = None if fields[key] is dataclasses.MISSING else fields[key]
            assert group[key] == default, key
    assert set(config.augment) == set(OPTIONS)
    assert not any(config.augment.values())


def test_base_has_the_values_of_before():
    """All but those that have changed since: none so far."""
    started = [base.start("name", "arm", model) for model in ("vgg", "resnet")]
    values = {}
    for config in started:
        values |= configs.flatten(json.loads(configs.to_json(config)))
    assert {key: values[key] for key in configs.LEFT_OUT} == configs.LEFT_OUT


@pytest.mark.parametrize("arm", arms())
def test_a_key_that_is_missing_has_its_value_of_before(arm):
    config = load(arm)
    saved = ConfigDict(from_before(config))
    assert len(configs.flatten(saved)) < len(configs.flatten(config)) - 8
    assert configs.differing_keys(saved, config) == []
    changes = {"augment.rotation": "0.5", "optimizer.b1": "0.5", "train.epochs": "77"}
    if config.memory is not None:
        changes["memory.update_block.mode"] = "gated"
    changed = configs.override(config, [f"{key}={value}" for key, value in changes.items()])
    assert set(configs.differing_keys(saved, changed)) == changes.keys()
    assert set(configs.differing_keys(ConfigDict(from_before(changed)), config)) == changes.keys()


SIZES = ((1,), (1, 1, 1, 1), (2, 1, 1, 1), (3, 4, 6, 3), (3, 4, 23, 3), (1,) * 11)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("arm", [arm for arm in arms() if load(arm).model.name == "resnet"])
def test_patterns_follow_the_sizes_of_a_resnet(arm, sizes):
    """All blocks read, and all but the first of each stage read the second memory, if any does."""
    memory = load(arm, [f"model.stage_sizes={sizes}"]).memory
    if memory is None:
        return
    blocks = [(s, b) for s, size in enumerate(sizes, 1) for b in range(1, size + 1)]
    paths = {f"stage{s}_block{b}/conv1": b for s, b in blocks}
    assert all(re.fullmatch(memory.read, path) for path in paths)
    later = {path for path, b in paths.items() if b > 1}
    wired_as_published = load(arm).memory.read_initial != ""
    found = {path for path in paths if re.fullmatch(memory.read_initial, path)}
    assert found == (later if wired_as_published else set())
    # A pattern that matches nothing is refused.
    assert bool(memory.read_initial) == bool(found)


@pytest.mark.parametrize(
    ("arm", "sizes"),
    [
        ("image_folder_resnet50:aim", ["model.stage_sizes=(1,1,1,1)", "model.num_classes=3"]),
        ("digits_mlp:aim", ["model.features=()"]),
        ("cifar10_vgg16:aim", ["model.stage_sizes=(11,)", "model.widths=(4,)"]),
    ],
)
def test_a_latched_network_of_unusual_sizes_can_be_built(arm, sizes):
    smaller = ["model.width=4"] if "resnet" in arm else []
    config = load(arm, [*sizes, *smaller])
    image = jax.ShapeDtypeStruct((1, *config.data.image_shape), "float32")
    reads = [place.path for place in build_model(config).places(image) if place.what == "read"]
    assert len(reads) == {"image": 4, "digit": 1, "cifar": 14}[arm[:5]]


def test_a_pattern_of_ones_own_stays_as_it_is():
    changes = ["memory.read_initial=head", "model.stage_sizes=(1,1,1,1)"]
    assert load("image_folder_resnet50:aim", changes).memory.read_initial == "head"
    assert load("image_folder_resnet50:aim", changes[::-1]).memory.read_initial == "head"
    config = configs.override(
        load("image_folder_resnet50:aim", changes[1:]), ["model.stage_sizes=(2,2)"]
    )
    assert config.memory.read_initial == r"stage\d_block[2-9]/conv1"


OWN_BASE = """
import configs.base
start = lambda name, *rest: configs.base.start("%s", *rest)
"""
EXPERIMENT = """
from . import base
ARMS = ("a", "b")
get_config = lambda arm: base.start("mine", arm, "mlp")
"""


def test_a_config_imports_the_base_beside_it_or_else_that_of_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y", "none"):
        Path(folder).mkdir()
        Path(folder, "my.config.py").write_text(EXPERIMENT)
        if folder != "none":
            Path(folder, "base.py").write_text(OWN_BASE % folder)
    for folder in ("x", "y", "x"):
        assert configs.load(f"{folder}/my.config.py").name == folder
        mine = configs.load("none/my.config.py:b")
        assert configs.flatten(mine) == configs.flatten(base.start("mine", "b", "mlp"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("dir=photos", "data.dir is 'photos', but digits have no use for it: leave it ''"),
        ("fit=crop", "data.fit is 'crop', but digits have no use for it: leave it 'stretch'"),
        ("val_fraction=0.2", "data.val_fraction is 0.2, but digits have no use .*: leave it 0.1"),
        ("test_fraction=0.1", "data.test_fraction is 0.1, but digits have no use"),
        ("train_images=100", "data.train_images is 100, but digits have no use .*: leave it None"),
        ("in_memory_mb=0", "data.in_memory_mb is 0.0, but digits have no use"),
        ("threads=2", "data.threads is 2, but digits have no use for it: leave it 4"),
        ("on_error=skip", "data.on_error is 'skip', but digits have no use"),
    ],
)
def test_what_digits_have_no_use_for_is_refused(assignment, message):
    with refused(message):
        open_dataset(load("digits_mlp:aim", [f"data.{assignment}"]))


@pytest.mark.parametrize(
    ("arm", "assignments", "key"),
    [
        ("digits_mlp:aim", ["memory.kernel_size=3"], "memory.kernel_size"),
        (
            "digits_mlp:aim",
            ["memory.update_block.kernel_size=5"],
            "memory.update_block.kernel_size",
        ),
        ("digits_mlp:aim", ["memory.kernel_size=3", "memory.kind=noise"], "memory.kernel_size"),
        ("stanford_dogs_vgg16:aim", ["memory.kernel_size=3"], "memory.kernel_size"),
    ],
)
def test_the_size_of_a_kernel_that_is_not_there_is_refused(arm, assignments, key):
    with refused(rf"^{key} is \d, but .* (has|have) no "):
        build_model(load(arm, assignments))


def test_a_control_of_a_memory_with_a_kernel_keeps_its_size():
    of_conv = load("stanford_dogs_resnet50:aim_kernel7", ["memory.kind=zero"])
    assert build_model(of_conv).memory.kernel_size == 7


@pytest.mark.parametrize(
    ("key", "value"), [("memory.learning_rate_scale", 0.0), ("memory.update_block.mode", "gated")]
)
def test_keys_that_some_configs_lacked_work_in_every_config(key, value):
    for arm in ("stanford_dogs_resnet50:aim", "stanford_dogs_vgg16:aim", "digits_mlp:aim"):
        config = load(arm, [f"{key}={value}"])
        assert configs.flatten(config)[key] == value
        assert configs.differing_keys(config, load(arm)) == [key]


def test_none_is_for_keys_that_can_be_none_only():
    """A pattern that follows from sizes is a text, though it is kept as a reference, too."""
    with refused("^model.stage_sizes is .None,., expected a number for each stage"):
        load("image_folder_resnet50:aim", ["model.stage_sizes=None"])
    assert load("image_folder_resnet50:aim", ["memory.read=None"]).memory.read == "None"


def test_a_saved_config_takes_tuples_for_its_lists():
    saved = ConfigDict(json.loads(configs.to_json(load("digits_mlp:aim")))).lock()
    changed = configs.override(saved, ["data.image_shape=(9,9,3)", "eval.batch_size=7"])
    assert changed.data.image_shape == (9, 9, 3)
    assert saved.data.image_shape == [8, 8, 1]
    assert configs.differing_keys(saved, changed) == ["data.image_shape", "eval.batch_size"]


def test_differing_keys_are_listed():
    one = configs.load(DIGITS)
    other = configs.override(configs.load(f"{DIGITS}:control"), ["train.epochs=3"])
    keys = configs.differing_keys(one, other)
    assert {"arm", "train.epochs", "memory.read"} <= set(keys)
    assert "train.batch_size" not in keys
