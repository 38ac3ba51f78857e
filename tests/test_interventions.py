"""Evaluation with an altered memory: what reads find, what stays as it is, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, fit, intervene
from aim_flax.evaluate.interventions import KINDS, layers
from aim_flax.models.mlp import MLP
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused
from tests.networks import D, Net, dense, latched_net, probe, probed, weights_of, written

pytestmark = pytest.mark.usefixtures("quick_compile")

LOOKS = ("look0", "look1", "look2")


def true_memories(variables, x):
    """Returns what each look of the contract's probe finds, by hand, with carry `state`."""
    m0 = weights_of(variables) + variables["memory"]["carried"]
    h = dense(variables, "write1", x)
    m1 = written(variables, "write1", h, m0)
    m2 = written(variables, "write2", dense(variables, "write2", h), m1)
    return {"look0": np.asarray(m0), "look1": np.asarray(m1), "look2": np.asarray(m2)}


def for_all(m, x):
    return np.broadcast_to(m, (len(x), *m.shape[1:]))


EXPECTED = {
    "keep": lambda m, variables: m,
    "zero": lambda m, variables: np.zeros_like(m),
    "mean": lambda m, variables: m.mean(axis=0, keepdims=True),
    "shuffle": lambda m, variables: m[[*range(1, len(m)), 0]],
    "reset": lambda m, variables: weights_of(variables),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_reads_find_what_the_intervention_says(kind):
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    memories = true_memories(variables, x)
    found = jax.jit(intervene(aim, kind).apply)(variables, x)
    for look in LOOKS:
        assert_close(found[look], for_all(EXPECTED[kind](memories[look], variables), x))
    if kind in ("mean", "shuffle"):
        assert len(np.unique(memories["look1"][:, 0])) == 5  # so that it matters which one it is


@pytest.mark.parametrize("kind", ["zero", "mean", "shuffle", "noise", "reset"])
def test_only_the_reads_that_match_are_altered(kind):
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    expected = aim.apply(variables, x)
    altered = intervene(aim, kind, "look1").apply(variables, x)
    assert not np.allclose(altered.pop("look1"), expected.pop("look1"), atol=1e-3)
    # The second update, for one, found the memory of the first.
    assert_equal(altered, expected)


def standardized(found, memories, x):
    """Returns the noise, given that each example's has the mean and deviation of its memory."""
    m = for_all(memories, x)
    return (found - m.mean(axis=1, keepdims=True)) / m.std(axis=1, keepdims=True)


def test_noise_has_the_mean_and_deviation_of_each_examples_memory():
    x = draw(200, 4)
    draws = []
    for seed in (0, 1):
        aim, variables = probed(x, seed=seed, carry="state")
        memories = true_memories(variables, x)
        noisy = jax.jit(intervene(aim, "noise").apply)
        found = noisy(variables, x)
        assert_equal(noisy(variables, x), found)
        draws.append({look: standardized(found[look], memories[look], x) for look in LOOKS})
    for look in LOOKS:
        # Whatever the memory, the layer's key gives the same noise ...
        np.testing.assert_allclose(draws[0][look], draws[1][look], atol=2e-3)
        noise = draws[0][look]
        assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
        assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    # ... another one for each example and each layer.
    together = np.stack([draws[0][look] for look in LOOKS])
    assert len(np.unique(together.round(4))) > 0.95 * together.size


@pytest.mark.parametrize("kind", ["mean", "shuffle", "reset"])
def test_a_memory_that_nobody_writes_is_the_same_for_all_examples(kind):
    x = draw(5, 4)
    aim = latched_net(update_after="")
    variables = random_variables(aim, x)
    assert_equal(intervene(aim, kind).apply(variables, x), aim.apply(variables, x))


@pytest.mark.parametrize("mode", ["add", "scale", "concat"])
def test_with_zeros_a_network_is_its_backbone(mode):
    x = draw(5, 4)
    aim = latched_net(read_mode=mode)
    variables = random_variables(aim, x)
    params = {
        name: {k: v for k, v in layer.items() if not k.startswith("memory_")}
        for name, layer in variables["params"].items()
        if name != "memory"
    }
    if mode == "concat":
        for name in ("dense2", "last"):
            params[name]["kernel"] = params[name]["kernel"][:-D]
    plain = {"params": params, "batch_stats": {"norm": variables["batch_stats"]["norm"]}}
    expected = Net().apply(plain, x)
    assert_close(intervene(aim, "zero").apply(variables, x), expected, 1e-6)
    assert not np.allclose(aim.apply(variables, x), expected, atol=0.05)


@pytest.mark.parametrize("mode", ["add", "scale", "concat"])
def test_without_writing_a_network_is_one_without_updates(mode):
    x = draw(5, 4)
    aim = latched_net(read_mode=mode)
    variables = random_variables(aim, x)
    silent = latched_net(read_mode=mode, update_after="")
    expected = silent.apply(variables, x)
    assert_equal(intervene(aim, "no_write").apply(variables, x), expected)
    assert not np.allclose(aim.apply(variables, x), expected, atol=0.02)


def test_some_updates_can_be_kept_from_writing():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    memories = true_memories(variables, x)
    found = intervene(aim, "no_write", "write2").apply(variables, x)
    assert_close(found["look1"], memories["look1"])
    assert_close(found["look2"], memories["look1"])
    # Without the first, the second starts from the memory at the start.
    found = intervene(aim, "no_write", "write1").apply(variables, x)
    h = dense(variables, "write2", dense(variables, "write1", x))
    assert_close(found["look1"], for_all(memories["look0"], x))
    assert_close(found["look2"], written(variables, "write2", h, memories["look0"]))


def test_reads_of_the_second_memory_are_altered_too():
    x = draw(5, 4)
    aim, variables = probed(x, read_initial="look2")
    initial = for_all(weights_of(variables, "memory_initial"), x)
    for kind, expected in {
        **dict.fromkeys(("keep", "mean", "shuffle", "reset", "no_write"), initial),
        "zero": np.zeros((5, D)),
    }.items():
        assert_close(intervene(aim, kind).apply(variables, x)["look2"], expected)
    noisy = intervene(aim, "noise").apply(variables, x)["look2"]
    assert len(np.unique(noisy)) == noisy.size


def test_interventions_add_up_in_their_order():
    x = draw(5, 4)
    aim, variables = probed(x)
    memories = true_memories({**variables, "memory": {"carried": np.zeros(D, np.float32)}}, x)
    both = intervene(intervene(aim, "zero", "look1"), "shuffle", "look2")
    found = both.apply(variables, x)
    assert_close(found["look1"], np.zeros((5, D)))
    assert_close(found["look2"], np.roll(memories["look2"], -1, axis=0))
    assert_close(
        intervene(intervene(aim, "zero"), "noise").apply(variables, x)["look2"], np.zeros((5, D))
    )
    assert_close(
        intervene(intervene(aim, "no_write", "write2"), "shuffle").apply(variables, x)["look2"],
        np.roll(memories["look1"], -1, axis=0),
    )


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="conv1")(x)
        x = nn.Conv(3, (1, 1), name="conv2")(x)
        return x, nn.Dense(3, name="dense")(x)


def test_convolutional_memories_are_altered_before_they_are_fitted():
    x = draw(3, 4, 4, 2)
    aim = AiM(Images(), Memory((2, 2, 4)), "conv2|dense", "conv1", read_mode="add")
    variables = random_variables(aim, x)
    kernels = {
        name: variables["params"][name]["memory_read"]["kernel"] for name in ("conv2", "dense")
    }
    _, seen = aim.apply(
        variables,
        x,
        mutable=["intermediates"],
        capture_intermediates=lambda m, _: m.name == "output",
    )
    (m,) = seen["intermediates"]["conv1"]["memory_update"]["output"]["__call__"]
    (own, _) = intervene(aim, "zero").apply(variables, x)
    for kind in ("mean", "shuffle"):
        altered = EXPECTED[kind](np.asarray(m), variables)
        found, last = intervene(aim, kind).apply(variables, x)
        assert_close(found, own + fit(altered, 4, 4) @ kernels["conv2"][0, 0])
        read = altered.mean(axis=(1, 2)) @ kernels["dense"]
        assert_close(last, dense(variables, "dense", found) + read[:, None, None])
    # Of the same mean and deviation over all floats of an example's memory: sixteen of them.
    found, _ = intervene(aim, "noise").apply(variables, x)
    assert found.shape == own.shape
    assert np.isfinite(found).all()


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(4, name="inner")(x)), None


class Transformed(nn.Module):
    """A layer to write after, twice the same block in a row, and a head."""

    transformation: str = "none"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="stem")(x)
        if self.transformation == "scan":
            body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = body(name="blocks")(x, None)
        else:
            body = nn.remat(Body) if self.transformation == "remat" else Body
            for i in range(2):
                x, _ = body(name=f"block{i}")(x)
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize("kind", ["shuffle", "noise"])
def test_reads_inside_transformations_are_altered(kind):
    x = draw(5, 4)

    def latched(transformation):
        net = Transformed(transformation)
        return AiM(net, Memory((D,), "dense"), ".*inner|head", "stem", read_mode="add")

    variables = random_variables(latched("none"), x)
    params = variables["params"]
    scanned = {name: params[name] for name in ("memory", "stem", "head")}
    scanned["blocks"] = jax.tree.map(lambda *p: np.stack(p), params["block0"], params["block1"])
    expected = intervene(latched("none"), kind).apply(variables, x)
    assert not np.allclose(expected, latched("none").apply(variables, x), atol=0.01)
    found = jax.jit(intervene(latched("remat"), kind).apply)(variables, x)
    assert_close(found, expected)
    # One layer within a scan is one to the pattern and for the noise's key, whatever its turn.
    noisy = jax.jit(intervene(latched("scan"), kind).apply)({**variables, "params": scanned}, x)
    if kind == "shuffle":
        assert_close(noisy, expected)
    else:
        assert not np.allclose(noisy, expected, atol=1e-3)


def test_layers_are_listed_in_the_order_of_their_calls():
    x = jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32)
    for mode in ("add", "concat"):
        aim = AiM(
            MLP(3, features=(4,) * 11), Memory((D,), "dense"), r"layer\d+/dense|head",
            update_after=r"layer(2|10)", read_mode=mode,
        )  # fmt: skip
        reads, updates = layers(aim, x)
        assert reads == [*(f"layer{i}/dense" for i in range(1, 12)), "head"]
        assert updates == ["layer2", "layer10"]
    # What was latched on is not listed, though such a pattern matches its paths, too.
    reads, updates = layers(probe(read=".*", read_initial="look2"), draw(5, 4))
    assert reads == ["look0", "write1", "look1", "write2", "look2"]
    assert updates == ["write1", "write2"]


@pytest.mark.parametrize("kind", KINDS)
def test_variables_are_those_of_the_network_itself(kind):
    x = draw(5, 4)
    aim = probe(carry="state")
    expected, found = jax.jit(lambda: [net.init(KEY, x) for net in (aim, intervene(aim, kind))])()
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        (Net(), ("zero",), "the network, Net, has no memory to alter$"),
        (
            probe(),
            ("zeros",),
            r"is 'zeros', expected one of keep, .*no_write \(did you mean 'zero'",
        ),
        (probe(), ("zero", "look("), r"'look\(' is no regular expression: "),
        (probe(), ("zero", ""), "at is empty, expected a regular expression that matches module"),
    ],
)
def test_intervene_refuses_in_one_line(net, arguments, message):
    with refused(message):
        intervene(net, *arguments)


@pytest.mark.parametrize(
    ("kind", "at", "message"),
    [
        (
            "zero",
            "look7",
            r"at pattern 'look7' matches no read of Probe \(did you mean 'look2'\?\); there are: "
            "look0, look1, look2$",
        ),
        ("zero", "write1", "at pattern 'write1' matches no read of Probe"),
        ("no_write", "look1", "'look1' matches no update of Probe; there are: write1, write2$"),
        ("keep", ".*", "interventions are for evaluation: call the network with train=False$"),
        ("no_write", ".*", "interventions are for evaluation: call the network with train=False$"),
    ],
)
def test_refusals_say_in_one_line_what_was_wrong(kind, at, message):
    aim, variables = probed(draw(5, 4))
    for altered in (intervene(aim, kind, at), intervene(intervene(aim, "mean"), kind, at)):
        with refused(message):
            altered.apply(variables, draw(5, 4), train=at == ".*", mutable=["batch_stats"])


def test_networks_without_updates_have_none_to_silence():
    aim, variables = probed(draw(5, 4), update_after="")
    with refused(r"at pattern '.\*' matches no update of Probe; there are: none$"):
        intervene(aim, "no_write").apply(variables, draw(5, 4))
