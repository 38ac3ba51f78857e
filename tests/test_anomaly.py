"""The first number of a training step that is not finite has a name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory
from aim_flax.errors import DivergenceError
from aim_flax.train import loop
from aim_flax.train.anomaly import anomaly_names, find_probes
from aim_flax.train.experiment import Experiment
from aim_flax.train.step import create_state, train_step, variables_of
from tests.runs import digits, read_json
from tests.test_study_run import study

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

IMAGES = np.random.default_rng(0).normal(size=(4, 2, 2, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 2], np.int32)


class Part(nn.Module):
    """A layer that goes wrong as `fault` says."""

    fault: str = ""

    @nn.compact
    def __call__(self, x, _=None):
        w = self.param("w", nn.initializers.zeros, ())
        x = nn.Dense(4, name="dense")(x)
        if self.fault == "value":
            x = x / w
        if self.fault == "parameter":  # The derivative of the root is infinite at 0.
            x = x + jnp.sqrt(w)
        if self.fault == "gradient":
            x = x + jnp.sqrt(x * 0)
        return (x, None) if self.fault == "in scan" else x


class Chain(nn.Module):
    """Three parts, of which the second has the fault, and code between them."""

    fault: str = ""
    within: str = ""

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1)
        x = Part(name="one")(x)
        if self.fault == "between":
            x = x.at[0, 0].set(jnp.nan)
        kind = Part
        if self.within == "remat":
            kind = nn.remat(Part)
        elif self.within == "vmap":
            kind = nn.vmap(Part, variable_axes={"params": None}, split_rngs={"params": False})
        x = kind(self.fault, name="two")(x)
        if self.fault == "gradient between":
            x = x + jnp.sqrt(x * 0)
        return nn.Dense(3, name="head")(x)


def first(network, rate=0.1, images=IMAGES):
    """Returns the name of a step's first anomaly, or None; also of two seeds at once."""
    optimizer = optax.sgd(rate)
    state = jax.jit(lambda: create_state(network, optimizer, 0, images.shape[1:]))()
    mutable = list(state.model_state)

    def run(variables, images):
        return network.apply(variables, images, train=True, mutable=mutable)

    places = find_probes(run, variables_of(state), images)

    def step(state, seed):
        return train_step(network, optimizer, state, images, LABELS, seed, places=places)

    _, metrics = jax.jit(step)(state, 0)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    _, together = jax.jit(jax.vmap(step))(both, jnp.arange(2))
    found = int(metrics["anomaly"])
    assert together["anomaly"].tolist() == [found] * 2
    return None if found < 0 else anomaly_names(places, state.params)[found]


@pytest.mark.parametrize(
    "within",
    ["", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("remat", "vmap"))],
)
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("", None),
        ("value", "the output of two"),
        ("between", "the input of two"),
        ("gradient", "the gradient of the output of two/dense"),
        ("gradient between", "the gradient of the output of two"),
        ("parameter", "the gradient of the parameter two/w"),
    ],
)
def test_the_place_is_named(fault, name, within):
    assert first(Chain(fault, within)) == name


def test_a_scan_over_layers_is_looked_into():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = images.reshape(len(images), -1)
            layers = nn.scan(
                Part, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return nn.Dense(3)(layers("in scan", name="layers")(x, None)[0] / 0)

    assert first(Scanned()) == "the input of Dense_0"


@pytest.mark.slow
def test_a_memory_has_a_place():
    network = AiM(
        Chain("between"),
        Memory((4,), "dense"),
        read=".*/dense|head",
        read_mode="add",
        update_after="one",
    )
    assert first(network) == "the input of two"
    written = AiM(Chain(), Memory((4,), "dense"), read=".*/dense|head", update_after="one")
    broken = IMAGES.copy()
    assert first(written, images=broken) is None
    broken[0, 0, 0, 0] = np.inf
    assert first(written, images=broken) == "the input of the network"


def test_what_comes_after_the_layers_is_looked_at():
    assert first(Chain(), rate=np.inf) == "the parameter head/bias after the change"

    class Wide(nn.Module):
        """Its logits are finite, and their differences are not."""

        @nn.compact
        def __call__(self, images, train=False):
            return Chain(name="chain")(images) + jnp.array([3e38, -3e38, 0])

    assert first(Wide()) == "the loss"


LARGER = ("train.accumulate=2", "train.remat=layer1", "train.ema_decay=0.9")


@pytest.mark.slow
def test_results_are_the_same():
    """Up to the rounding of programs that XLA fuses otherwise; in parts, and computed again."""
    plain, looked_at = (
        Experiment(digits("aim", *LARGER, f"train.detect_anomaly={flag}"), 1)
        for flag in (False, True)
    )
    after = []
    for run in (plain, looked_at):
        feed = run.train_batches.feed(0, 0, 3)
        states = run.devices.replicate(run.initial_state())
        seed = run.devices.replicate(np.uint32(0))
        for step in range(3):
            states, metrics = run.train_call(1)(states, feed.at(step), seed)
        feed.close()
        after.append(run.devices.fetch(states))
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert run.devices.fetch(metrics)["anomaly"].tolist() == [-1]


DIVERGES = ("optimizer.name=sgd", "optimizer.learning_rate=1e30", "train.epochs=2")


@pytest.mark.slow
def test_a_run_that_diverges_says_where(tmp_path):
    with pytest.raises(DivergenceError, match="detect_anomaly=True tells in which layer"):
        loop.run(digits("aim", *DIVERGES), tmp_path / "run", 1, quiet=True)
    # The same run, with the flag.
    config = digits("aim", *DIVERGES, "train.detect_anomaly=True")
    with pytest.raises(DivergenceError) as error:
        loop.run(config, tmp_path / "run", 8, quiet=True)
    assert "; the first that is not finite is the output of " in str(error.value), error.value
    assert "detect_anomaly" not in str(error.value)
    assert not read_json(tmp_path / "run" / "config.json")["train"]["detect_anomaly"]


@pytest.mark.slow
def test_seeds_together_say_where(tmp_path, capsys):
    rows = study(
        tmp_path,
        "aim",
        overrides=(*DIVERGES, *LARGER, "train.detect_anomaly=True"),
        seeds="2",
        quiet=False,
    )
    steps = [row["status"].removeprefix("diverged at step ") for row in rows]
    lines = capsys.readouterr().out
    for seed, step in enumerate(steps):
        what = f"digits_mlp:aim seed {seed}: diverged at step {step}; the first that is not finite"
        assert what in lines
