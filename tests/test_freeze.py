"""Parts of a network that are not trained, or at a rate of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from aim_flax import AiM, Memory
from aim_flax.train.experiment import Experiment
from aim_flax.train.freeze import freezing, frozen_norms, rescaling
from aim_flax.train.loop import run
from aim_flax.train.restore import restore_run
from aim_flax.train.step import create_state, train_step
from tests.arrays import draw
from tests.asserts import assert_equal, refused
from tests.runs import digits, first_steps

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

HEAD, MEMORY, BACKBONE = r"(?!head/).*", r"(?!.*memory).*", r"(?!head/)(?!.*memory).*"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense")(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(not train, momentum=0.5, name="norm")(x))
        return nn.Dense(3, name="head")(x)


NET = AiM(Net(), Memory((2,), "dense"), read="dense|head", update_after="norm", read_mode="add")
IMAGES, LABELS = jnp.asarray(draw(6, 2, 2, 1)), jnp.arange(6) % 3


def step(optimizer, freeze=""):
    """Returns the state before and after a step."""
    before = jax.jit(lambda: create_state(NET, optimizer, 0, IMAGES.shape[1:]))()
    train = jax.jit(lambda s: train_step(NET, optimizer, s, IMAGES, LABELS, 0, freeze=freeze))
    return before, train(before)[0]


def moved(before, after) -> set[str]:
    """Returns the paths of what is not the same any more."""
    old, new = (flatten_dict(tree, sep="/") for tree in (before, after))
    return {path for path in old if (old[path] != new[path]).any()}


@pytest.mark.parametrize(
    ("pattern", "trained", "statistics"),
    [
        (HEAD, lambda path: path.startswith("head/"), set()),
        (MEMORY, lambda path: "memory" in path, {"memory"}),
        (BACKBONE, lambda path: path.startswith("head/") or "memory" in path, {"memory"}),
        ("dense/.*", lambda path: not path.startswith("dense/"), {"memory", "own"}),
        ("norm/scale", lambda path: path != "norm/scale", {"memory", "own"}),
    ],
)
def test_what_is_frozen_keeps_its_values_and_all_else_learns(pattern, trained, statistics):
    before, after = step(freezing(optax.adamw(0.1, weight_decay=0.1), pattern), pattern)
    paths = flatten_dict(before.params, sep="/")
    if pattern == HEAD:  # What is latched on to the head is below its path.
        assert moved(before.params, after.params) >= {"head/kernel", "head/bias"}
    expected = {path for path in paths if trained(path)}
    assert moved(before.params, after.params) == expected
    found = moved(*(state.model_state["batch_stats"] for state in (before, after)))
    assert {"memory" if "memory" in path else "own" for path in found} == statistics
    held = {leaf.size for leaf in jax.tree.leaves(after.opt_state)}
    assert sum(held) < sum(leaf.size for leaf in jax.tree.leaves(after.params)) * 2


@pytest.mark.slow
def test_reads_that_start_at_zero_are_not_all_frozen():
    """The memory could do nothing: a study of it would find that it makes no difference."""
    pattern = "(?!head/(kernel|bias)).*"
    told = (
        f"train.freeze {pattern!r} matches all that reads the memory, such as"
        " dense/memory_read/kernel, which starts at zero: so the memory could do nothing; leave out"
        " .*/memory_read/.*"
    )
    with refused(exactly=told):
        step(freezing(optax.sgd(0.1), pattern, reads_from_zero=True), pattern)
    # One of them is not, or none starts at zero.
    for allowed, zero in ((HEAD, True), (BACKBONE, True), (pattern, False)):
        step(freezing(optax.sgd(0.1), allowed, reads_from_zero=zero), allowed)


def test_frozen_batch_norms_are_those_of_evaluation():
    for norm in (nn.BatchNorm(False), nn.BatchNorm()):
        x, own = jnp.asarray(draw(5, 4)), {"params": {}, "batch_stats": {}}

        class Around(nn.Module):
            norm: nn.Module

            @nn.compact
            def __call__(self, x):
                given = (
                    {}
                    if self.norm.use_running_average is not None
                    else {"use_running_average": False}
                )
                return self.norm(x, **given)

        net = Around(norm)
        own = net.init(jax.random.key(0), x)
        own["batch_stats"]["norm"]["mean"] += 2.0
        with frozen_norms("norm/.*"):
            y, state = net.apply(own, x, mutable=["batch_stats"])
        np.testing.assert_allclose(y, (x - 2) / np.sqrt(1 + 1e-5), rtol=1e-5)
        assert_equal(state["batch_stats"], own["batch_stats"])
        y, state = net.apply(own, x, mutable=["batch_stats"])
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)


@pytest.mark.slow
def test_parts_have_rates_of_their_own():
    plain = step(optax.sgd(0.1))
    rates = ("head/kernel=10", "head/.*=0.5", "(?!dense).*=1")
    scaled = step(optax.chain(optax.sgd(0.1), rescaling(rates)))
    changes = [
        jax.tree.map(lambda a, b: b - a, before.params, after.params)
        for before, after in (plain, scaled)
    ]
    usual, found = (flatten_dict(change, sep="/") for change in changes)
    for path, change in usual.items():
        factor = {"head/kernel": 10, "head/bias": 0.5}.get(
            path, 0.5 if path.startswith("head") else 1
        )
        np.testing.assert_allclose(found[path], factor * change, rtol=1e-4, atol=1e-7, err_msg=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.freeze=layer1", "'layer1' matches no parameter of the network, such as .*layer1"),
        ("train.freeze=.*", "'.\\*' matches all parameters of the network, such as"),
        ("train.freeze=(", r"train.freeze: '\(' is no regular expression"),
        ("train.rates=('head=2',)", "'head' matches no parameter of the network, such as"),
        ("train.rates=('head',)", "has 'head', expected 'PATTERN=FACTOR'"),
        ("train.rates=('head/.*=0',)", "with a factor above 0; train.freeze is for"),
        ("train.rates=('head/.*=nan',)", "expected 'PATTERN=FACTOR'"),
        ("train.rates=('(=1',)", "is no regular expression"),
    ],
)
def test_wrong_patterns_are_refused(change, message):
    with refused(message):
        Experiment(digits("control", change), 1)


@pytest.mark.slow
def test_a_run_with_frozen_parts_goes_on_and_ends(tmp_path):
    """Its optimiser's state, with gaps for what is frozen, is saved and restored."""
    changes = ("train.freeze=layer1/.*", "train.rates=('head/.*=2',)", "train.epochs=1")
    config = digits("aim", *changes)
    run(config, tmp_path / "run", 1, quiet=True)
    before = Experiment(config, 1).initial_state()
    after = restore_run(tmp_path / "run", "latest")
    kept = {path for path in flatten_dict(before.params, sep="/") if path.startswith("layer1/")}
    assert kept
    assert not kept & moved(before.params, after.variables["params"])
    assert moved(before.params, after.variables["params"])


def test_two_devices_train_what_one_does():
    config = digits("control", "train.freeze=layer1/.*")
    (one, *_), (two, *_) = (first_steps(config, count, 3) for count in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)
