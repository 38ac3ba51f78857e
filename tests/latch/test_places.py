"""Places: what patterns match, parts of outputs, several memories, methods, captured memories."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate, intervene
from aim_flax.evaluate.interventions import layers
from aim_flax.latch import Place
from tests.arrays import KEY, draw, paths, random_variables
from tests.asserts import assert_close, assert_equal, refused
from tests.latch.zoo import VAE

X = draw(6, 5)
D = 4


def latched(net, read, update_after="", called="memory", **options):
    given = dict(read_mode="add", update=MemoryUpdate((3,)), called=called)
    return AiM(net, Memory((D,), "direct"), read, update_after, **{**given, **options})


# --- Patterns ------------------------------------------------------------------------------------


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="block_norm")(nn.Dense(4, name="block_dense")(x))
        x = nn.DenseGeneral(4, axis=(-2, -1), name="block_general")(x[..., None])
        return nn.Dense(2, name="head")(x)


def test_a_pattern_reads_what_can_read_among_what_it_matches():
    every = latched(Mixed(), "block_.*")
    assert layers(every, X) == (["block_dense"], [])
    named = latched(Mixed(), "block_dense")
    variables = random_variables(every, X)
    assert_equal(every.apply(variables, X), named.apply(variables, X))
    assert layers(latched(Mixed(), ".*"), X) == (["block_dense", "head"], [])


def test_each_pattern_must_match_something_that_can_read():
    with refused("read matches 'block_norm', but LayerNorm cannot read a memory; these can"):
        latched(Mixed(), ["head", "block_norm"]).init(KEY, X)
    with refused("read matches 'block_general', but an nn.DenseGeneral can read only over its la"):
        latched(Mixed(), "block_general").init(KEY, X)
    with refused("read_initial pattern 'block_norm' matches no module of Mixed .*: block_dense, "):
        latched(Mixed(), ".*", read_initial="block_norm").init(KEY, X)
    aim = latched(Mixed(), ".*")
    with refused(
        "at pattern 'block_norm' matches no read of Mixed.*; there are: block_dense, head"
    ):
        intervene(aim, "zero", "block_norm").apply(random_variables(aim, X), X)
    with refused("read_initial matches 'head', which read does not match"):
        latched(Mixed(), "block_.*", read_initial="head").init(KEY, X)


class Several(nn.Module):
    """Returns an array and others beside it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)
        return x, {"deep": (2 * x, x.sum())}


class Tuples(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = Several(name="block")(x)
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize(("selector", "factor"), [(0, 1), ((1, "deep", 0), 2)])
def test_an_update_takes_the_part_of_an_output_that_it_is_told(selector, factor):
    aim = latched(Tuples(), "head", {"block": selector})
    variables = random_variables(aim, X)
    params = variables["params"]
    h = X @ params["block"]["dense"]["kernel"] + params["block"]["dense"]["bias"]
    block = {n: variables[n]["block"]["memory_update"] for n in ("params", "batch_stats")}
    m = aim.update.apply(block, factor * h, params["memory"]["content"][None])
    head = params["head"]
    expected = h @ head["kernel"] + head["bias"] + m @ head["memory_read"]["kernel"]
    assert_close(aim.apply(variables, X), expected)
    # In pairs, as a config needs it for patterns with a dot.
    pairs = latched(Tuples(), "head", (("bl.ck", selector), "nothing|block/dense"))
    with_both = random_variables(pairs, X)
    assert set(pairs.places(X)) > set(aim.places(X))
    assert "memory_update" in with_both["params"]["block"]


def test_an_update_may_take_all_of_an_output():
    both = [latched(Mixed(), "head", given) for given in ("block_norm", {"block_norm": None})]
    variables = random_variables(both[0], X)
    assert_equal(*(aim.apply(variables, X) for aim in both))


@pytest.mark.parametrize("selector", [1.5, slice(0, 2), (0, None)])
def test_what_is_no_part_is_refused(selector):
    with refused(
        "update_after takes .* of the output of 'block', expected an index or a name, sev"
    ):
        latched(Tuples(), "head", {"block": selector}).init(KEY, X)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            (),
            r"update_after matches 'block', whose output is a tuple: .* update_after={'block': 0}",
        ),
        (1, "update_after matches 'block', whose output is a dict: say which part of it"),
        (2, "update_after takes 2 of the output of 'block', but a tuple there has no 2"),
        ((1, "dep"), "takes .* of the output of 'block', but a dict there has no 'dep'"),
        ("mean", "update_after takes 'mean' of the output of 'block', but a tuple there has no"),
    ],
)
def test_parts_that_are_not_there_are_refused(selector, message):
    with refused(message):
        latched(Tuples(), "head", {"block": selector}).init(KEY, X)


def test_places_say_what_is_read_and_written_where():
    aim = latched(Mixed(), ".*", "block_norm", read_initial="head")
    assert aim.places(X) == [
        Place("read", "block_dense", "memory", (6, 5)),
        Place("update", "block_norm", "memory", (6, 4)),
        Place("read", "head", "memory_initial", (6, 4)),
    ]


# --- Several memories ----------------------------------------------------------------------------


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        for i in range(3):
            x = nn.tanh(nn.Dense(4, name=f"layer{i}")(x))
        return x


def two(**options):
    inner = latched(Chain(), "layer[12]", "layer0", "notes", carry="state", **options)
    return AiM(inner, Memory((3,), "direct"), "layer2", "layer1", read_mode="add",
               update=MemoryUpdate((3,)), carry="state")  # fmt: skip


def test_two_memories_are_read_and_written_beside_each_other():
    aim = two()
    variables = random_variables(aim, X)
    params = variables["params"]
    assert set(params) == {"memory", "notes", "layer0", "layer1", "layer2"}
    assert set(params["layer1"]) == {"kernel", "bias", "notes_read", "memory_update"}
    assert set(params["layer2"]) == {"kernel", "bias", "notes_read", "memory_read"}
    assert set(variables["memory"]) == {"carried", "notes_carried"}

    def update(path, name, y, m):
        block = {n: variables[n][path][f"{name}_update"] for n in ("params", "batch_stats")}
        return MemoryUpdate((3,)).apply(block, y, m)

    def layer(name, x, **memories):
        y = x @ params[name]["kernel"] + params[name]["bias"]
        return y + sum(m @ params[name][f"{n}_read"]["kernel"] for n, m in memories.items())

    notes = (params["notes"]["content"] + variables["memory"]["notes_carried"])[None]
    memory = (params["memory"]["content"] + variables["memory"]["carried"])[None]
    h = layer("layer0", X)
    notes = update("layer0", "notes", h, notes)
    h = layer("layer1", np.tanh(h), notes=notes)
    memory = update("layer1", "memory", h, memory)
    h = np.tanh(layer("layer2", np.tanh(h), notes=notes, memory=memory))
    assert_close(aim.apply(variables, X), h)


def test_both_memories_train_are_carried_and_are_recorded():
    aim = two()
    variables = random_variables(aim, X)
    collections = ["memory", "batch_stats", "intermediates"]
    _, state = aim.apply(variables, X, train=True, mutable=collections)
    for name in ("carried", "notes_carried"):
        assert np.abs(state["memory"][name] - variables["memory"][name]).max() > 1e-4
    assert {"notes_use", "memory_use"} <= set(state["intermediates"]["layer2"])
    told, _ = aim.apply(variables, X, deterministic=False, mutable=collections)
    assert_equal(told, aim.apply(variables, X, train=True, mutable=collections)[0])


def test_each_memory_has_interventions_of_its_own():
    aim = two()
    variables = random_variables(aim, X)
    assert layers(aim, X) == (["layer2"], ["layer1"])
    assert layers(aim.backbone, X) == (["layer1", "layer2"], ["layer0"])
    assert [place.memory for place in aim.places(X)].count("notes") == 3
    for name, path in (("notes", "layer1"), ("memory", "layer2")):
        without = intervene(aim, "zero", path, memory=name).apply(variables, X)
        removed = jax.tree.map(np.copy, variables)
        removed["params"][path][f"{name}_read"]["kernel"][:] = 0
        assert_close(without, aim.apply(removed, X))
    with refused(r"the memory is 'note', expected one of memory, notes \(did you mean 'notes'\?\)"):
        intervene(aim, "zero", memory="note")


class Taken(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="layer1")(nn.Dense(4, name="memory")(x))


def test_a_name_that_the_network_has_is_refused_or_chosen_otherwise():
    inner = latched(Taken(), "layer1", called="notes")
    with refused("the backbone has a module 'memory', as is the memory: name the memory otherwise"):
        latched(inner, "layer1").init(KEY, X)
    other = latched(inner, "layer1", called="memo").init(KEY, X)
    assert set(other["params"]) == {"memo", "notes", "memory", "layer1"}


def test_two_memories_of_one_name_are_refused():
    with refused("two memories are called 'memory': give each AiM a name of its own, such as"):
        latched(latched(Chain(), "layer1"), "layer2").init(KEY, X)


# --- Other methods -------------------------------------------------------------------------------


def test_methods_of_the_backbone_are_called_with_the_memory():
    aim = latched(VAE(), "decoder", "encoder")
    variables = random_variables(aim, X)
    z = aim.apply(variables, X, method="encode")
    assert_close(z, VAE().apply(variables, X, method="encode"))
    for method in ("decode", VAE.decode):
        y = aim.apply(variables, z, method=method)
        decoder, image = variables["params"]["decoder"], variables["params"]["image"]
        m = variables["params"]["memory"]["content"]  # no one has written in this pass
        h = z @ decoder["kernel"] + decoder["bias"] + m @ decoder["memory_read"]["kernel"]
        assert_close(y, np.maximum(h, 0) @ image["kernel"] + image["bias"])
    assert paths(jax.eval_shape(lambda k: aim.init(k, X), KEY)) == paths(variables)


class Outer(nn.Module):
    def setup(self):
        self.vae = latched(VAE(), "decoder", "encoder")

    def __call__(self, x):
        return self.vae.call("encode", x)


def test_methods_are_called_within_a_larger_network():
    net = Outer()
    whole = random_variables(latched(VAE(), "decoder", "encoder"), X)
    inside = jax.tree.map(lambda leaf: leaf, {k: {"vae": v} for k, v in whole.items()})
    assert_close(net.apply(inside, X), VAE().apply(whole, X, method="encode"))


def test_methods_that_are_not_there_are_refused():
    aim = latched(VAE(), "decoder", "encoder")
    variables = random_variables(aim, X)
    with refused(r"VAE has no method 'encod' \(did you mean 'encode'\?\)"):
        aim.apply(variables, X, method="encod")
    with refused("read pattern 'decoder' matches no module of VAE"):
        aim.init(KEY, X, method="encode")


# --- The memory itself ---------------------------------------------------------------------------


def test_captured_memories_are_what_is_read_and_written():
    aim = latched(Chain(), "layer[012]", "layer[01]", read_initial="layer0", capture=True)
    variables = random_variables(aim, X)
    _, state = aim.apply(variables, X, mutable=["intermediates"])
    seen, params = state["intermediates"], variables["params"]
    start, initial = (params[n]["content"][None] for n in ("memory", "memory_initial"))
    assert_equal(seen["memory_at_start"], (start,))
    assert_equal(seen["layer0"]["memory_as_read"], (initial,))
    h = X @ params["layer0"]["kernel"] + params["layer0"]["bias"]
    h = h + initial @ params["layer0"]["memory_read"]["kernel"]
    block = {n: variables[n]["layer0"]["memory_update"] for n in ("params", "batch_stats")}
    (written,) = seen["layer0"]["memory_as_written"]
    assert_close(written, MemoryUpdate((3,)).apply(block, h, start))
    assert_equal(seen["layer1"]["memory_as_read"], (written,))
    assert_equal(seen["layer2"]["memory_as_read"], seen["layer1"]["memory_as_written"])
    plain = aim.clone(capture=False)
    assert_equal(plain.apply(variables, X), aim.apply(variables, X))
    _, state = plain.apply(variables, X, mutable=["intermediates"])
    assert not {p for p in paths(state, "intermediates") if "as_" in p or "at_" in p}
