"""Learning rates, plateaus and early stopping."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from aim_flax.train.optimizer import (
    best_epoch,
    build_optimizer,
    build_schedule,
    plateau_cuts,
    select_epoch,
    should_stop,
)
from tests.asserts import assert_equal, refused
from tests.runs import read_csv

pytestmark = pytest.mark.usefixtures("standard_promotion")

DATA = Path(__file__).parent / "data"


def published(network: str) -> list[dict[str, float]]:
    """Per-epoch figures that the author's own run printed."""
    rows = read_csv(DATA / f"published_history_{network}.csv")
    return [{k: float(v) for k, v in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("network", "cuts", "stops"),
    [("aim_resnet50", [11, 43], None), ("resnet50_control", [27, 36, 39], 40)],
)
def test_published_accuracies_give_published_schedule(network, cuts, stops):
    history = published(network)
    accuracies = [row["val_accuracy"] for row in history]
    assert plateau_cuts(accuracies, patience=3, min_delta=1e-4) == cuts
    ends = [
        epoch
        for epoch in range(1, len(accuracies) + 1)
        if should_stop(accuracies[:epoch], patience=7, min_delta=1e-3)
    ]
    assert ends == ([] if stops is None else [stops])
    rates = [1e-3 * 0.1 ** sum(cut < row["epoch"] for cut in cuts) for row in history]
    np.testing.assert_allclose(rates, [row["learning_rate"] for row in history], rtol=1e-9)


def test_plateau_waits_anew_after_each_cut_and_needs_more_than_min_delta():
    assert plateau_cuts([0.5] * 8, patience=3) == [4, 7]
    assert plateau_cuts([0.5, 0.5 + 1e-4, 0.5, 0.5], patience=3, min_delta=1e-3) == [4]
    assert plateau_cuts([0.1, 0.2, 0.3, 0.4], patience=1) == []
    assert plateau_cuts([], patience=3) == []


def test_best_epoch_is_the_first_of_equals():
    assert best_epoch([0.1, 0.7, 0.7, 0.6]) == 2
    assert best_epoch([0.1, 0.7, 0.7005], min_delta=1e-3) == 2


def test_selection_takes_the_lowest_loss_of_equal_accuracies():
    assert select_epoch([0.5, 0.7, 0.7, 0.7], [1.0, 0.9, 0.5, 0.6]) == 3
    assert select_epoch([0.5, 0.8, 0.7], [0.1, 0.9, 0.2]) == 2
    assert select_epoch([0.7, 0.7], [0.5, 0.5]) == 1


def config(**changes) -> ConfigDict:
    values: dict = {
        "memory": {"kind": "dense"},
        "optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": None, "weight_decay": None},
        "schedule": {"name": "constant", "warmup_epochs": 0.0},
        "train": {"epochs": 10, "batch_size": 64},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values[group][name] = value
    return ConfigDict(values)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 0.0, 5: 0.25, 10: 0.5, 49: 0.5}),
        ("cosine", {0: 0.0, 10: 0.5, 30: 0.25, 50: 0.0}),
    ],
)
def test_schedules_warm_up_and_cosine_goes_to_zero_at_the_end(name, expected):
    warm = config(schedule__name=name, schedule__warmup_epochs=2.0)
    schedule = build_schedule(warm, steps_per_epoch=5)
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Four times the rate of a batch of 16, and up to it over 5 epochs of 4 steps.
        ({"reference_batch": 16}, {0: 0.5, 10: 1.25, 19: 1.925, 20: 2.0, 39: 2.0}),
        ({"reference_batch": 16, "name": "cosine"}, {0: 0.5, 20: 2.0, 30: 1.0, 40: 0.0}),
        # A warm-up that is set takes the place of that one.
        ({"reference_batch": 16, "warmup_epochs": 2.0}, {0: 0.0, 4: 1.0, 8: 2.0, 39: 2.0}),
        ({"reference_batch": 64}, {0: 0.5, 39: 0.5}),
        ({"reference_batch": 128}, {0: 0.25, 39: 0.25}),
        ({"reference_batch": 128, "warmup_epochs": 2.0}, {0: 0.0, 4: 0.125, 8: 0.25}),
    ],
)
def test_the_rate_grows_with_the_batch(changes, expected):
    scaled = config(**{f"schedule__{name}": value for name, value in changes.items()})
    schedule = build_schedule(scaled, steps_per_epoch=4)
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule__reference_batch": 16, "train__epochs": 5},
            "train.epochs is 5, expected more than 5, over which schedule.reference_batch warms up",
        ),
        ({"schedule__name": "cosin"}, "schedule.name is 'cosin', .*did you mean 'cosine'"),
        ({"schedule__warmup_epochs": 10.0}, "warmup_epochs is 10.0, expected .* less"),
        ({"optimizer__name": "adamm"}, "optimizer.name is 'adamm', .*did you mean 'adam"),
        (
            {"optimizer__name": "adam", "optimizer__momentum": 0.9},
            "optimizer.momentum is set, but adam takes no momentum",
        ),
        ({"memory__learning_rate_scale": -0.5}, "scale is -0.5, expected a number of at least 0"),
        ({"memory__learning_rate_scale": float("nan")}, "scale is nan, expected a number"),
        ({"memory__learning_rate_scale": "0.5"}, "scale is '0.5', expected a number"),
        ({"memory__learning_rate_scale": None}, "scale is None, expected a number"),
    ],
)
def test_wrong_options_are_named(changes, message):
    wrong = config(**changes)
    with refused(message):
        build_optimizer(wrong, build_schedule(wrong, steps_per_epoch=5))


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"optimizer__momentum": 0.9}, optax.sgd(0.5, momentum=0.9)),
        ({"optimizer__name": "adam"}, optax.adam(0.5)),
        (
            {"optimizer__name": "adamw", "optimizer__weight_decay": 0.1},
            optax.adamw(0.5, weight_decay=0.1),
        ),
    ],
)
def test_optimizers_are_optax_with_these_options(changes, reference):
    built = build_optimizer(config(**changes), optax.constant_schedule(0.5))
    params = {"w": jnp.array([1.0, -2.0])}
    ours, theirs = built.init(params), reference.init(params)
    for gradient in ([0.1, 0.2], [0.3, -0.4]):
        gradients = {"w": jnp.array(gradient)}
        update, ours = built.update(gradients, ours, params)
        expected, theirs = reference.update(gradients, theirs, params)
        np.testing.assert_allclose(update["w"], expected["w"], rtol=1e-6)


def steps(optimizer, params):
    """Returns the parameters after three steps."""
    state = optimizer.init(params)
    for step in range(3):
        gradients = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


LATCHED = {
    "memory": {"dense": {"kernel": np.float32([[1.0, -2.0]])}},
    "memory_initial": {"dense": {"kernel": np.float32([[0.5, 3.0]])}},
    "layer": {
        "kernel": np.float32([[2.0, -1.0]]),
        "memory_read": {"kernel": np.float32([[-0.3]])},
        "memory_update": {"dense1": {"kernel": np.float32([[1.2]])}},
    },
}


@pytest.mark.parametrize("scale", [0.0, 0.25, 3.0])
@pytest.mark.parametrize(
    "optimizer",
    [{"optimizer__name": "adamw", "optimizer__weight_decay": 0.1}, {"optimizer__momentum": 0.9}],
    ids=["adamw", "sgd"],
)
def test_learning_rate_scale_is_that_of_the_memories_alone(optimizer, scale):
    build = [
        build_optimizer(config(**optimizer, **changes), optax.constant_schedule(0.5))
        for changes in ({}, {"memory__learning_rate_scale": scale})
    ]
    plain, scaled = (steps(transformation, LATCHED) for transformation in build)
    assert_equal(scaled["layer"], plain["layer"])
    for name in ("memory", "memory_initial"):
        before, after, usual = (tree[name]["dense"]["kernel"] for tree in (LATCHED, scaled, plain))
        assert not np.array_equal(before, usual)
        if scale == 0:
            np.testing.assert_array_equal(after, before)
            continue
        # The first step is that of the usual optimiser, times the scale, weight decay included.
        first = [
            b.update(jax.tree.map(jnp.cos, LATCHED), b.init(LATCHED), LATCHED)[0] for b in build
        ]
        usual, after = (tree[name]["dense"]["kernel"] for tree in first)
        np.testing.assert_allclose(after, scale * usual, rtol=1e-6)


def test_learning_rate_scale_is_that_of_each_parts_memory():
    parts = {"stage1": LATCHED["memory"], "stage2": LATCHED["memory_initial"]}
    params = {**LATCHED, "memory": parts, "memory_initial": parts}
    frozen = build_optimizer(config(memory__learning_rate_scale=0.0), optax.constant_schedule(0.5))
    found = steps(frozen, params)
    assert_equal(found["memory"], parts)
    assert_equal(found["memory_initial"], parts)
    assert not np.array_equal(found["layer"]["kernel"], params["layer"]["kernel"])


def test_a_learning_rate_scale_of_one_leaves_the_optimizer_as_it_is():
    changes = {"optimizer__name": "adamw", "optimizer__weight_decay": 0.1}
    configs = [config(**changes), config(**changes, memory__learning_rate_scale=1.0)]
    without = config(**changes)
    without.memory = None
    states = [
        build_optimizer(c, optax.constant_schedule(0.5)).init(LATCHED) for c in (*configs, without)
    ]
    reference = optax.adamw(optax.constant_schedule(0.5), weight_decay=0.1)
    expected = jax.tree.structure(reference.init(LATCHED))
    assert [jax.tree.structure(state) for state in states] == [expected] * 3
