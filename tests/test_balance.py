"""Uneven classes: weights of the loss, balanced orders, and scores that count classes equally."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight

from aim_flax import config as configs
from aim_flax.data.balance import BalancedOrder, class_weights
from aim_flax.data.digits import load_digits
from aim_flax.data.in_memory import InMemory, Split
from aim_flax.data.load import load_dataset
from aim_flax.devices import Devices
from aim_flax.errors import DataError
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.train.experiment import Experiment
from aim_flax.train.step import create_state, train_step
from tests.asserts import assert_close, assert_equal, refused
from tests.photos import encode, folder, write_folder
from tests.runs import digits, first_steps

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

# Of the classes 0, 1 and 3; class 2 has no images.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [50, 3, 8]))


def test_weights_are_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=LABELS)
    weights = class_weights(LABELS, 4)
    np.testing.assert_allclose(weights[[0, 1, 3]], expected, rtol=1e-6)
    assert weights[2] == 0
    assert weights[LABELS].mean() == pytest.approx(1)


@pytest.mark.parametrize("sizes", [(50, 3, 8), (7, 7, 7), (1, 100), (20, 1, 1, 1), (5,)])
def test_balanced_orders_have_all_classes_equally_often(sizes):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = jax.jit(BalancedOrder(labels))
    chosen = np.asarray(order(jax.random.key(0)))
    assert (chosen.shape, chosen.dtype) == (labels.shape, np.int32)
    turns = np.bincount(labels[chosen], minlength=len(sizes))
    assert turns.max() - turns.min() <= 1
    times = np.bincount(chosen, minlength=len(labels))
    for label in range(len(sizes)):
        # Nobody comes again before all others of the class have come.
        of_class = times[labels == label]
        assert of_class.max() - of_class.min() <= 1
    if len(labels) > 5:
        assert (chosen != order(jax.random.key(1))).any()
        assert np.diff(labels[chosen]).any()


def test_every_image_of_a_large_class_has_its_turn_in_some_epoch():
    order = jax.jit(BalancedOrder(LABELS))
    seen = {int(i) for seed in range(20) for i in order(jax.random.key(seed))}
    assert seen == set(range(len(LABELS)))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(4)(images.reshape(len(images), -1))


def test_weighted_step_is_that_of_the_weighted_loss():
    images, labels = (
        np.random.default_rng(0).normal(size=(6, 2, 2, 1)),
        np.array([0, 1, 1, 3, 0, 0]),
    )
    images = jnp.asarray(images, jnp.float32)
    weights = class_weights(LABELS, 4)
    optimizer = optax.sgd(1.0)
    state = jax.jit(lambda: create_state(Linear(), optimizer, 0, (2, 2, 1)))()

    def loss(params):
        logits = nn.log_softmax(Linear().apply({"params": params}, images))
        return (
            -sum(weights[label] * row[label] for row, label in zip(logits, labels, strict=True)) / 6
        )

    value, gradients = jax.jit(jax.value_and_grad(loss))(state.params)
    step = jax.jit(lambda s: train_step(Linear(), optimizer, s, images, labels, 0, None, weights))
    after, metrics = step(state)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert_close(after.params, jax.tree.map(jnp.subtract, state.params, gradients))


@pytest.fixture(scope="module")
def uneven():
    """Digits, most of them zeros and ones."""
    whole = load_digits()
    train = whole.splits["train"]
    rng = np.random.default_rng(0)
    keep = (train.labels < 2) | (rng.uniform(size=len(train)) < 0.1)
    part = Split(train.images[keep], train.labels[keep])
    return InMemory(whole.classes, {**whole.splits, "train": part})


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_devices_and_seeds_together_make_no_difference(uneven, monkeypatch, balance):
    monkeypatch.setattr("aim_flax.train.experiment.open_dataset", lambda config: uneven)
    config = digits("control", f"train.balance={balance}", "train.batch_size=16")
    losses = {n: first_steps(config, n, 3)[0] for n in (1, 8)}
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-5)
    even = first_steps(digits("control", "train.batch_size=16"), 1, 3)[0]
    assert abs(np.array(losses[1]) - even).max() > 1e-3
    # Of two seeds in one program, each has the losses that it has alone.
    experiment = Experiment(config, 1)
    runs = [experiment.with_seed(seed) for seed in (5, 0)]
    states = jax.tree.map(lambda *x: np.stack(x), *(run.initial_state() for run in runs))
    seeds = np.array([5, 0], np.uint32)
    data = experiment.train_batches.feed(seeds, 0, 3).at(0)
    replicate = experiment.devices.replicate
    _, metrics = experiment.train_call(3, True)(replicate(states), data, replicate(seeds))
    np.testing.assert_allclose(experiment.devices.fetch(metrics)["loss"][1], losses[1], rtol=1e-4)


def test_streamed_images_are_sampled_and_weighed_as_those_in_memory(tmp_path):
    config = folder(write_folder(tmp_path, train=24), "train.balance=sampling")
    for i in range(9):
        image = np.full((8, 8, 3), 20 * i, np.uint8)
        (tmp_path / "train" / "class1" / f"more{i}.png").write_bytes(encode(image))
    by_host = load_dataset(configs.override(config, ["data.in_memory_mb=0.0"]))
    in_memory = load_dataset(config)
    assert_equal(by_host.labels("train"), in_memory.labels("train"))
    batches = [
        data.train_batches(Devices("pmap", 1), 8, 255.0, None, True)
        for data in (by_host, in_memory)
    ]
    orders = [np.asarray(of.order(3, 1)) for of in batches]
    assert_equal(*orders)
    assert np.ptp(np.bincount(in_memory.labels("train")[orders[0]])) <= 1
    for data in (by_host, in_memory):
        name = data.name("train", 8)
        assert name.endswith("class1/0001.png")
        assert data.image("train", 8).shape == (8, 8, 3)
        assert_equal(data.image("train", 8), in_memory.splits["train"].images[8])


def test_labels_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    config = folder(write_folder(tmp_path, train=9), "data.in_memory_mb=0.0")
    dataset = load_dataset(config)
    monkeypatch.setattr("aim_flax.data.folder.FolderRecords.label", lambda self, index: 7)
    with pytest.raises(DataError, match=r"0000.png has the label 7, expected 0 to 2"):
        dataset.labels("train")


def test_unknown_balance_is_refused():
    with refused("train.balance is 'weight', expected one of .*did you mean 'weights'"):
        Experiment(digits("control", "train.balance=weight"), 1)


@pytest.mark.parametrize(
    ("true", "predicted"),
    [
        ([0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 2]),
        # A class that is never predicted, one that only is predicted, and one that is neither.
        ([0, 0, 1, 1, 2], [0, 3, 0, 0, 2]),
        ([1, 1], [1, 1]),
    ],
)
def test_scores_are_scikit_learns(true, predicted, recwarn):
    confusion = np.zeros((5, 5), int)
    np.add.at(confusion, (true, predicted), 1)
    evaluation = Evaluation(0.0, confusion, np.equal(true, predicted))
    balanced = balanced_accuracy_score(true, predicted)
    assert evaluation.balanced_accuracy == pytest.approx(balanced)
    expected = f1_score(true, predicted, average="macro", zero_division=0)
    assert evaluation.macro_f1 == pytest.approx(expected)
    recwarn.clear()
