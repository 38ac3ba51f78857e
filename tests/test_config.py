"""Loading, overriding and comparing configs."""

import json
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.errors import UsageError

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits_mlp.py")


def test_first_arm_is_the_default():
    assert configs.load(DIGITS).arm == "aim"
    assert configs.load(f"{DIGITS}:control").memory is None


def test_overrides_take_the_type_of_the_key():
    config = configs.override(
        configs.load(DIGITS),
        [
            "train.epochs=5",
            "optimizer.learning_rate=1e-2",
            "model.features=(8,8)",
            "model.features=(32,16)",
            "memory.read=head",
            "memory.zero_init=true",
            "optimizer.momentum=0.9",
            "schedule.plateau_patience=3",
        ],
    )
    assert config.train.epochs == 5
    assert config.optimizer.learning_rate == 1e-2
    assert config.model.features == (32, 16)
    assert config.memory.read == "head"
    assert config.memory.zero_init is True
    assert config.optimizer.momentum == 0.9
    assert config.schedule.plateau_patience == 3


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
    with pytest.raises(UsageError, match=message) as error:
        configs.override(config, ["train.batch_size=32", assignment])
    assert "\n" not in str(error.value)
    assert configs.differing_keys(config, configs.load(DIGITS)) == []


def test_memory_keys_of_an_arm_without_memory_do_not_exist():
    with pytest.raises(UsageError, match="'memory.read' is no config key"):
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
    with pytest.raises(UsageError, match=message):
        configs.load(name)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_json_round_trip_of_every_arm(file):
    for arm in runpy.run_path(str(file))["ARMS"]:
        config = configs.load(f"{file}:{arm}")
        assert (config.name, config.arm) == (file.stem, arm)
        again = ConfigDict(json.loads(configs.to_json(config)))
        assert configs.differing_keys(config, again) == []


def test_differing_keys_are_listed():
    one = configs.load(DIGITS)
    other = configs.override(configs.load(f"{DIGITS}:control"), ["train.epochs=3"])
    keys = configs.differing_keys(one, other)
    assert {"arm", "memory", "train.epochs", "memory.read"} <= set(keys)
    assert "train.batch_size" not in keys
