"""Each option of the base config has a condition, which its own value meets."""

import math

import pytest

from aim_flax import config as configs
from aim_flax.models.build import MODELS
from aim_flax.options import CONDITIONS, check_values
from configs import base
from tests.asserts import refused
from tests.runs import load

# Checked where they are used, with the memory's kind.
ELSEWHERE = {
    "data.mean",
    "data.deviation",
    "train.rates",
    "memory.shape",
    "memory.kernel_size",
    "memory.carry_rate",
    "memory.update_block.kernel_size",
}


def numbers(model: str) -> dict[str, type]:
    """Returns the options of a network's config that are numbers, or several."""
    config = base.start("name", "arm", model)
    kinds = {}
    for key in configs.flatten(config):
        *groups, name = key.split(".")
        group = config
        for word in groups:
            group = group[word]
        kinds[key] = group.get_type(name)
    return {key: kind for key, kind in kinds.items() if kind in (int, float, tuple)}


@pytest.mark.parametrize("model", MODELS)
def test_no_number_is_left_out(model):
    assert numbers(model).keys() - CONDITIONS.keys() <= ELSEWHERE
    values = configs.flatten(base.start("name", "arm", model))
    check_values({key: value for key, value in values.items() if key in numbers(model)})


def test_no_condition_is_of_nothing():
    keys = set().union(*(configs.flatten(base.start("n", "a", model)) for model in MODELS))
    assert keys >= CONDITIONS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_nan_and_negative_numbers_are_refused(model):
    for key, kind in numbers(model).items():
        if key in ELSEWHERE:
            continue
        for value in (math.nan, -1) if kind is float else (-1,):
            with refused(f"^{key} is "):
                check_values({key: (value,) if kind is tuple else value})


def test_only_the_keys_that_are_asked_for_are_checked():
    values = {"train.epochs": 0, "eval.batch_size": 0}
    with refused("^eval.batch_size is 0, expected at least 1$"):
        check_values(values, ["eval.batch_size"])
    check_values(values, [])


def test_a_network_from_elsewhere_has_fields_of_its_own():
    check_values({"model.name": "net:Net", "model.features": -1, "model.num_classes": 3})
    with refused("^model.num_classes is 0"):
        check_values({"model.name": "net:Net", "model.num_classes": 0})


def test_infinity_is_a_limit_that_is_never_reached():
    config = load("digits_mlp:control", ["train.checkpoint_minutes=inf"])
    assert config.train.checkpoint_minutes == math.inf


def test_values_of_another_type_are_told():
    with refused("^train.epochs is 'five', expected 1 to 1,000,000$"):
        check_values({"train.epochs": "five"})
