"""Batches computed in parts, and moving averages: by hand, and on devices of any number."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors.numpy import load as load_arrays

from aim_flax.cli import export as export_command
from aim_flax.data.scaling import scaling
from aim_flax.evaluate.evaluation import build_evaluate
from aim_flax.models.build import trained
from aim_flax.train import loop
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.evaluate_run import evaluate_run
from aim_flax.train.experiment import Experiment
from aim_flax.train.restore import restore_run
from aim_flax.train.step import (
    create_state,
    moved_average,
    train_step,
    trained_variables,
    variables_of,
)
from aim_flax.use.predictor import Predictor
from tests.arrays import draw
from tests.asserts import assert_close, assert_equal
from tests.processes import QUICK, interrupted
from tests.runs import ROOT, digits, first_steps, history, load

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

IMAGES, LABELS = draw(12, 2, 2, 1), np.arange(12) % 3
OPTIMIZER = optax.adam(0.1)


class Net(nn.Module):
    """Notes what it is called with: the sum of its images, and a number drawn from each key."""

    norm: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        noted = self.variable("noted", "calls", lambda: jnp.zeros((4, 3)))
        if train:
            draws = [jax.random.uniform(self.make_rng(name)) for name in ("dropout", "memory")]
            row = jnp.stack([images.sum(), *draws])
            noted.value = jnp.concatenate([noted.value[1:], row[None]])
        x = nn.Dense(5)(images.reshape(len(images), -1))
        if self.norm:
            x = nn.BatchNorm(not train, momentum=0.5, name="norm")(x)
        return nn.Dense(3)(nn.tanh(x))


class Norm(nn.Module):
    """As small, and without keys, whose making has loops of its own."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.BatchNorm(not train)(nn.Dense(3)(images.reshape(len(images), -1)))


def steps(net, count=1, **options):
    """Returns the states before, between and after steps, and the metrics of the last."""
    averaged = "ema_decay" in options
    states = [create_state(net, OPTIMIZER, 3, (2, 2, 1), averaged)]
    call = jax.jit(lambda s: train_step(net, OPTIMIZER, s, IMAGES, LABELS, 3, **options))
    for _ in range(count):
        state, metrics = call(states[-1])
        states.append(state)
    return states, metrics


@pytest.mark.parametrize(
    ("parts", "unroll"), [(3, True), pytest.param(12, False, marks=pytest.mark.slow)]
)
def test_parts_make_the_step_of_the_whole_batch(parts, unroll):
    weights = [1.0, 2.0, 0.5]
    (*_, whole), expected = steps(Net(), class_weights=weights)
    (*_, found), metrics = steps(Net(), class_weights=weights, accumulate=parts, unroll=unroll)
    for one, other in ((found.params, whole.params), (metrics, expected)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)
    assert_close(found.opt_state, whole.opt_state, 1e-6)
    assert int(found.step) == 1


def test_each_part_has_every_so_manieth_example_and_its_own_dropout():
    (_, whole), _ = steps(Net())
    (_, state), _ = steps(Net(), accumulate=3)
    calls = state.model_state["noted"]["calls"]
    np.testing.assert_allclose(
        calls[1:, 0], [IMAGES[part::3].sum() for part in range(3)], rtol=1e-5
    )
    dropout, memory = calls[1:, 1].tolist(), calls[1:, 2].tolist()
    assert len(set(dropout)) == 3
    assert set(memory) == {float(whole.model_state["noted"]["calls"][-1, 2])}


@pytest.mark.slow
def test_batch_norms_see_a_part_at_a_time():
    net = Net(norm=True)
    (before, state), _ = steps(net, accumulate=3)
    variables, mutable = trained_variables(before), list(before.model_state)
    rngs = dict.fromkeys(("dropout", "memory"), jax.random.key(0))
    for part in range(3):
        _, changed = net.apply(variables, IMAGES[part::3], train=True, mutable=mutable, rngs=rngs)
        variables = {**variables, **changed}
    assert_close(state.model_state["batch_stats"], variables["batch_stats"], 1e-6)
    (_, whole), _ = steps(net)
    kernel = [s.params["Dense_0"]["kernel"] for s in (state, whole)]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3


def collectives(program: str) -> int:
    return len(re.findall(r"\bpsum", program))


def test_gradients_are_averaged_over_the_devices_once():
    state = create_state(Net(), OPTIMIZER, 3, (2, 2, 1))

    def program(**options):
        step = lambda s: train_step(Net(), OPTIMIZER, s, IMAGES, LABELS, 3, "devices", **options)  # noqa: E731
        return str(jax.make_jaxpr(step, axis_env=[("devices", 2)])(state))

    assert 0 < collectives(program()) == collectives(program(accumulate=4))
    assert "scan" not in program()


@pytest.mark.parametrize("unroll", [True, False])
def test_a_program_has_its_parts_in_a_loop_or_one_after_the_other(unroll):
    net = Norm()
    state = create_state(net, OPTIMIZER, 3, (2, 2, 1))
    step = lambda s: train_step(net, OPTIMIZER, s, IMAGES, LABELS, 3, accumulate=4, unroll=unroll)  # noqa: E731
    compiled = jax.jit(step).lower(state).compile()
    assert (" while(" in compiled.as_text()) == (not unroll)


def test_the_average_is_what_the_formula_says():
    states, _ = steps(Net(norm=True), 4, ema_decay=0.3)
    expected = trained_variables(states[0])
    assert_equal(variables_of(states[0]), expected)
    for number, state in enumerate(states[1:], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new, expected, trained_variables(state)
        )
        assert_close(variables_of(state), expected, 1e-6)
    # (1 + 3) / (10 + 3) is more than 0.3.
    assert decay == 0.3
    plain, _ = steps(Net(norm=True), 4)
    assert_equal(trained_variables(states[-1]), trained_variables(plain[-1]))
    assert_equal(variables_of(plain[-1]), trained_variables(plain[-1]))


def test_an_average_leaves_alone_what_does_not_change_and_what_is_no_float():
    variables = {"a": jnp.float32(0.1) * jnp.arange(999), "n": jnp.arange(3)}
    average = variables
    for step in range(1, 50):
        average = moved_average(average, variables, 0.9, jnp.int32(step))
    assert_equal(average, variables)
    after = moved_average(average, {**variables, "n": jnp.arange(3) + 1}, 0.9, jnp.int32(9))
    assert after["n"].tolist() == [1, 2, 3]


# By plain gradients: Adam makes steps of any rounding where a gradient is zero.
SGD = ("name=sgd", "weight_decay=None", "learning_rate=0.02", "momentum=0.9")
AVERAGED = ("train.ema_decay=0.9", "train.accumulate=2", *(f"optimizer.{x}" for x in SGD))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, standard_promotion, quick_compile):
    """A run of three epochs; its config freezes a part."""
    config = digits("aim_state", *AVERAGED, "train.epochs=3", "train.freeze=layer1/dense/.*")
    loop.run(config, workdir := tmp_path_factory.mktemp("averaged") / "run", 1, quiet=True)
    return config, workdir


@pytest.mark.slow
def test_the_average_is_what_is_evaluated_kept_and_used(averaged):
    config, workdir = averaged
    experiment = Experiment(config, 1)
    best = restore_run(workdir, "best")
    for which in ("best", "latest"):
        restored = restore_run(workdir, which)
        devices = experiment.devices
        evaluate = build_evaluate(experiment.model, devices, experiment.eval_batches("val"), 10)
        found = evaluate(devices.replicate(restored.variables), config.seed)
        row = list(history(workdir)["step"]).index(restored.step)
        assert found.accuracy == pytest.approx(history(workdir)["val_accuracy"][row])
        assert found.loss == pytest.approx(history(workdir)["val_loss"][row], rel=1e-5)
    # Not the network that is trained: 57 steps on, by hand.
    _, before, state = first_steps(config, 1, 57)
    latest = restore_run(workdir, "latest").variables
    assert_close(latest, variables_of(state), 1e-4)
    assert np.abs(latest["params"]["head"]["kernel"] - state.params["head"]["kernel"]).max() > 1e-3
    kept = flatten_dict(before.params, sep="/")
    frozen = [path for path in kept if path.startswith("layer1/dense/")]
    assert frozen
    for path in frozen:
        np.testing.assert_array_equal(flatten_dict(latest["params"], sep="/")[path], kept[path])
    test = evaluate_run(workdir)
    assert test.accuracy == loop.run(config, workdir, 1, quiet=True)["test_accuracy"]
    predictor = Predictor.from_run(workdir)
    assert_equal(predictor.variables, best.variables)


def test_the_average_is_what_is_exported(averaged, tmp_path):
    config, workdir = averaged
    flags = ["--workdir", str(workdir), "--checkpoint", "latest"]
    export_command.main([*flags, "--to", str(tmp_path / "network.zip")])
    with zipfile.ZipFile(tmp_path / "network.zip") as archive:
        exported = jax.export.deserialize(bytearray(archive.read("aim_network/network.jax")))
        arrays = load_arrays(archive.read("aim_network/parameters.safetensors"))
    experiment = Experiment(config, 1)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    with contextlib.closing(checkpoints):
        state = checkpoints.restore(57, experiment.abstract_state).state
    pixels = np.random.default_rng(0).integers(0, 17, (9, 8, 8, 1)).astype(np.uint8)
    found = jax.jit(exported.call)(arrays, pixels)

    def expected(variables):
        images = scaling(config.data)(pixels)
        return nn.softmax(trained(experiment.model).apply(variables, images, train=False))

    np.testing.assert_allclose(found, expected(state.average), rtol=1e-5)
    assert np.abs(found - expected(trained_variables(state))).max() > 1e-3


@pytest.mark.slow
def test_an_average_goes_on_on_other_devices(averaged, tmp_path):
    config, whole = averaged
    with interrupted(19, "SIGTERM: saved at step 38;"):
        loop.run(config, tmp_path / "run", 1, quiet=True)
    loop.run(config, tmp_path / "run", 8, quiet=True)
    assert_close(
        restore_run(tmp_path / "run", "latest").variables,
        restore_run(whole, "latest").variables,
        1e-4,
    )
    np.testing.assert_allclose(
        history(tmp_path / "run")["train_loss"], history(whole)["train_loss"], rtol=1e-4
    )


NETWORKS = {
    "mlp": lambda *changes: digits("aim_state", *changes),
    "resnet": lambda *changes: load(
        "cifar10_resnet:aim",
        [
            *("data.name=digits", "data.image_shape=(8,8,1)", "data.scale=16", "data.mean=()"),
            *("data.deviation=()", "model.stage_sizes=(1,1)", "model.width=8"),
            *("memory.shape=(2,2,4)", "memory.update_block.features=(4,)"),
            *changes,
        ],
    ),
}
ADAM = ("name=adam", "weight_decay=None", "momentum=None", "nesterov=None")
# Gradients of biases before a batch norm are rounding alone, and Adam divides by them.
GENTLE = (*ADAM, "learning_rate=0.0003", "eps=0.01")
USUAL = (*ADAM, "learning_rate=0.001", "eps=None")


def thirty_steps(network, kind, count, optimizer):
    changes = (*AVERAGED, *(f"optimizer.{x}" for x in optimizer), f"parallel={kind}")
    config = NETWORKS[network](*changes, "train.batch_size=64", "train.epochs=2")
    losses, _, state = first_steps(config, count, 30)
    return losses, state


@functools.cache
def on_one_device(network, optimizer):
    return thirty_steps(network, "pmap", 1, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("pmap", 2), ("shard_map", 8)])
@pytest.mark.parametrize("network", ["mlp", "resnet"])
def test_devices_make_no_difference(network, kind, count):
    optimizer = SGD if network == "mlp" else GENTLE
    expected_losses, expected = on_one_device(network, optimizer)
    losses, state = thirty_steps(network, kind, count, optimizer)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert_close(state.average, expected.average, 1e-4)


# Prints the largest differences from one device, of losses and of the state; in what follows,
# float32 means float64.
_PRECISE = """
import sys
import jax
import jax.numpy as jnp
jnp.float32 = jnp.float64
import numpy as np
from tests.test_larger_runs import USUAL, thirty_steps

def largest(found, expected):
    difference = lambda a, b: float(np.abs(a - b).max() / max(1, np.abs(b).max()))
    return max(jax.tree.leaves(jax.tree.map(difference, found, expected)))

(network,) = sys.argv[1:]
expected_losses, expected = thirty_steps(network, "pmap", 1, USUAL)
assert expected_losses[-1] < expected_losses[0]
kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(expected)}
assert kinds == {"float64", "int32"}, kinds
for kind, count in (("pmap", 2), ("shard_map", 8)):
    losses, state = thirty_steps(network, kind, count, USUAL)
    print(largest(losses, expected_losses), largest(state, expected))
"""


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_what_differs_between_devices_is_rounding(network):
    """With numbers of 64 bits it is as much smaller as these are finer, at the usual rate and eps.

    In a process of its own, because dtypes are chosen where modules are defined.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PRECISE, network],
        cwd=ROOT,
        env=os.environ | {"JAX_ENABLE_X64": "true"} | QUICK,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    of_two, of_eight = done.stdout.splitlines()
    for line in (of_two, of_eight):
        of_losses, of_state = map(float, line.split())
        assert of_losses < 1e-12
        assert of_state < 1e-9


@pytest.mark.slow
def test_seeds_in_one_program_are_those_alone():
    changes = ("train.remat=layer1", "train.epochs=1", "parallel=shard_map")
    one = Experiment(digits("aim_state", *AVERAGED, *changes), 2)
    runs, devices = [one.with_seed(seed) for seed in (0, 3)], one.devices
    states = [run.initial_state() for run in runs]
    seeds = np.array([0, 3], np.uint32)
    data = one.train_batches.feed(seeds, 0, 5).at(0)
    stacked = devices.replicate(jax.tree.map(lambda *leaves: np.stack(leaves), *states))
    together, metrics = one.train_call(5, together=True)(stacked, data, devices.replicate(seeds))
    together, metrics = devices.fetch((together, metrics))
    for i, run in enumerate(runs):
        losses, _, state = first_steps(run.config, 2, 5)
        np.testing.assert_allclose(metrics["loss"][i], losses, rtol=1e-5)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together.average), state.average, 1e-5)
