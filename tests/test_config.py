"""Loading, overriding and comparing configs."""

import json

import pytest
from ml_collections import ConfigDict

from aim_flax import config as configs
from tests.asserts import refused
from tests.runs import DIGITS, ROOT, arms, load


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
        ("train.epochs=many", "train.epochs=many: invalid literal for int"),
        ("train.epochs=2.5", "train.epochs=2.5: invalid literal for int"),
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
        (str(ROOT / "pyproject.toml"), "is no Python file"),
    ],
)
def test_wrong_config_names_are_told(name, message):
    with refused(message):
        configs.load(name)


@pytest.mark.parametrize("arm", arms())
def test_json_round_trip_of_every_arm(arm):
    config = load(arm)
    assert f"{config.name}:{config.arm}" == arm
    again = ConfigDict(json.loads(configs.to_json(config)))
    assert configs.differing_keys(config, again) == []


def test_differing_keys_are_listed():
    one = configs.load(DIGITS)
    other = configs.override(configs.load(f"{DIGITS}:control"), ["train.epochs=3"])
    keys = configs.differing_keys(one, other)
    assert {"arm", "memory", "train.epochs", "memory.read"} <= set(keys)
    assert "train.batch_size" not in keys
