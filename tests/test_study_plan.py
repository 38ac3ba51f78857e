"""Planning a study: its arms, what they are made from, and its seeds."""

import pytest

from aim_flax.study.plan import format_ranges, parse_seeds, plan
from tests.asserts import refused
from tests.runs import DIGITS


def test_an_arm_of_the_file_wins_over_a_derived_one():
    arms = plan(DIGITS, ["control", "memory_zero"]).arms
    assert arms["control"].origin["source"] is None
    assert arms["memory_zero"].origin["source"] == "aim"
    assert arms["memory_zero"].config.memory.kind == "zero"
    arms = plan(DIGITS, ["control", "aim_state", "memory_zero"]).arms
    assert arms["memory_zero"].config.memory.carry == "state"


def test_controls_of_a_custom_arm():
    custom = ["bigger=big:memory.shape=(256, );model.dropout=0.5", "big:memory.shape=(128,)"]
    arms = plan(DIGITS, ["memory_double"], custom=custom, derive_from="big").arms
    assert arms["memory_double"].config.memory.shape == (256,)
    assert arms["memory_double"].origin["source"] == "big"
    assert arms["big"].origin["source"] == "aim"
    bigger = arms["bigger"].config
    assert (bigger.arm, bigger.memory.shape, bigger.model.dropout) == ("bigger", (256,), 0.5)
    with refused("the arm frozen is derived from itself"):
        plan(DIGITS, custom=["frozen=memory_frozen:seed_=1"], derive_from="frozen")


def test_overrides_reach_every_arm_that_has_the_key():
    overrides = ["train.epochs=3", "memory.shape=(8,)"]
    arms = plan(DIGITS, ["control", "aim", "memory_zero"], overrides=overrides).arms
    assert [arm.config.train.epochs for arm in arms.values()] == [3, 3, 3]
    assert arms["control"].config.memory is None
    assert arms["memory_zero"].config.memory.shape == (8,)


@pytest.mark.parametrize(
    ("text", "expected", "ranges"),
    [
        ("3", [0, 1, 2], "0-2"),
        ("100-102", [100, 101, 102], "100-102"),
        ("5,0-1", [0, 1, 5], "0-1,5"),
        ("7-7", [7], "7"),
        (2, [0, 1], "0-1"),
    ],
)
def test_seeds(text, expected, ranges):
    assert parse_seeds(text) == expected
    assert format_ranges(expected) == ranges
