"""The contract of docs/latch.md: one test per numbered statement, and its code blocks."""

import re
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_flax import AiM, Memory, MemoryUpdate, fit
from aim_flax.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_compile")

DOC = Path(__file__).parent.parent / "docs" / "latch.md"
OTHER_FILES = (
    "test_latch.py",
    "test_memory_variants.py",
    "test_interventions.py",
    "test_schedules.py",
)
KEY = jax.random.key(0)
D = 3  # floats of the memory in most tests


# --- The page itself ---------------------------------------------------------------------------


def statements():
    """Returns the numbered statements of the page as (number, text)."""
    prose = re.sub(r"```.*?```", "\n", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^(\d+)\. (.*?)(?=\n\s*\n|\n\d+\. |\Z)", prose, re.DOTALL | re.MULTILINE)
    return [(int(number), text) for number, text in found]


def test_every_statement_names_a_test_that_exists():
    numbers = [number for number, _ in statements()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 30
    files = {name: (DOC.parent.parent / "tests" / name).read_text(encoding="utf-8")
             for name in (*OTHER_FILES, "test_latch_contract.py")}  # fmt: skip
    named = set()
    for number, text in statements():
        (file, test) = re.search(r"\(`(?:(\w+\.py)::)?(test_\w+)`\)\s*\Z", text).groups()
        assert f"def {test}(" in files[file or "test_latch_contract.py"], number
        named.add(test)
    own = set(re.findall(r"^def (test_\w+)", files["test_latch_contract.py"], re.MULTILINE))
    about_the_page = {"test_every_statement_names_a_test_that_exists", "test_code_blocks_run"}
    assert own - named == about_the_page


def test_code_blocks_run():
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), namespace)
    assert set(jax.tree.leaves(namespace["labels"])) == {"latched on", "backbone"}


# --- Helpers -----------------------------------------------------------------------------------


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def random_variables(net, *args, seed=0, **kwargs):
    """Returns variables of the network's shapes, all of them random; variances are positive."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.5, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(partial(net.init, **kwargs), KEY, *args)
    return jax.tree_util.tree_map_with_path(fill, shapes)


class Probe(nn.Module):
    """Returns {look: the memory as it stands there}, given variables that went through `lenses`."""

    @nn.compact
    def __call__(self, x):
        look = {"look0": nn.Dense(D, name="look0")(x)}
        h = nn.Dense(4, name="write1")(x)
        look["look1"] = nn.Dense(D, name="look1")(x)
        h = nn.Dense(4, name="write2")(h)
        look["look2"] = nn.Dense(D, name="look2")(x)
        return look


def probe(**options):
    given = dict(read="look.*", update_after="write.*", read_mode="add")
    return AiM(Probe(), Memory((D,), "dense"), **{**given, **options})


def lenses(variables):
    """Makes every `look` return the memory it reads: kernels are zero, read kernels identity."""
    params = {
        name: {
            "kernel": np.zeros_like(layer["kernel"]),
            "bias": np.zeros_like(layer["bias"]),
            "memory_read": {"kernel": np.eye(D, dtype=np.float32)},
        }
        if name.startswith("look")
        else layer
        for name, layer in variables["params"].items()
    }
    return {**variables, "params": params}


def probed(x, **options):
    aim = probe(**options)
    return aim, lenses(random_variables(aim, x))


def weights_of(variables, name="memory"):
    layer = variables["params"][name]["dense"]
    return (layer["kernel"].sum(axis=0) + layer["bias"])[None]


def dense(variables, name, x):
    layer = variables["params"][name]
    return x @ layer["kernel"] + layer["bias"]


def written(variables, place, y, m, train=False):
    """Returns what the update block of a place makes of an output and a memory."""
    block = {name: variables[name][place]["memory_update"] for name in ("params", "batch_stats")}
    new = MemoryUpdate().apply(block, y, m, train=train, mutable=["batch_stats"])
    return new[0]


def assert_close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance), found, expected)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class Net(nn.Module):
    """Dense layers with batch norm and dropout, one of them given from outside."""

    last: nn.Module = nn.Dense(2)
    axis_name: str | None = None
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense1")(x)
        x = nn.BatchNorm(not train, axis_name=self.axis_name, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        x = nn.relu(nn.Dense(4, name="dense2")(x))
        return self.last(x)


def latched_net(net=None, **options):
    given = dict(read="dense2|last", update_after="dense1", read_mode="add")
    return AiM(net or Net(), Memory((D,), "dense"), **{**given, **options})


# --- At the start ------------------------------------------------------------------------------


def test_memory_is_one_per_batch_until_it_is_written():
    x = draw(5, 4)
    aim, variables = probed(x)
    looks = aim.apply(variables, x)
    assert_close(looks["look0"], np.repeat(weights_of(variables), 5, axis=0))
    # The memory's half of the first read has batch size 1 in the traced program.
    program = str(jax.make_jaxpr(aim.apply)(variables, x))
    assert f"f32[1,{D}] = dot_general" in program


@pytest.mark.parametrize("mode", ["add", "scale"])
def test_add_keeps_the_backbones_variables(mode):
    x = draw(5, 4)

    @jax.jit
    def initial():
        plain, latched = (net.init(KEY, x) for net in (Net(), latched_net(read_mode=mode)))
        latched = {name: flatten_dict(latched[name]) for name in plain}
        plain = {name: flatten_dict(tree) for name, tree in plain.items()}
        return plain, {name: {p: latched[name][p] for p in plain[name]} for name in plain}

    plain, latched = initial()
    assert set(plain) == {"params", "batch_stats"}
    assert ("last", "kernel") in plain["params"]
    assert_equal(latched, plain)


def test_concat_widens_the_kernels_of_reading_layers_and_nothing_else():
    x = draw(5, 4)
    wider = latched_net(read_mode="concat")
    plain, latched = (
        flatten_dict(jax.eval_shape(net.init, KEY, x)["params"], sep="/") for net in (Net(), wider)
    )
    shapes = {path: leaf.shape for path, leaf in plain.items()}
    shapes |= {"dense2/kernel": (4 + D, 4), "last/kernel": (4 + D, 2)}
    assert {path: latched[path].shape for path in plain} == shapes
    initial = jax.jit(lambda: [net.init(KEY, x)["params"]["dense1"] for net in (Net(), wider)])
    plain_dense1, latched_dense1 = initial()
    assert_equal({name: latched_dense1[name] for name in plain_dense1}, plain_dense1)
    # The layer's own input channels come first: a layer that does not read has just those.
    variables = random_variables(wider, x)
    kernel = variables["params"]["last"]["kernel"]
    kernel[4:] = 0
    narrow = jax.tree.map(np.copy, variables)
    narrow["params"]["last"]["kernel"] = kernel[:4]
    assert_close(
        wider.apply(variables, x), latched_net(read="dense2", read_mode="concat").apply(narrow, x)
    )


@pytest.mark.parametrize("mode", ["add", "scale"])
def test_zero_init_starts_out_as_the_plain_network(mode):
    # As users compile it: with all optimisations.
    jax.config.update("jax_disable_most_optimizations", False)
    x = draw(5, 4)
    aim = latched_net(read_mode=mode, zero_init=True)
    own = random_variables(Net(), x)
    variables = random_variables(aim, x)

    @jax.jit
    def initial_reads():
        params = aim.init(KEY, x)["params"]
        return {name: params[name]["memory_read"] for name in ("dense2", "last")}

    initial = initial_reads()
    assert not any(leaf.any() for leaf in jax.tree.leaves(initial))
    joint = {
        name: unflatten_dict({**flatten_dict(variables[name]), **flatten_dict(own[name])})
        for name in variables
    }
    for name, read in initial.items():
        joint["params"][name]["memory_read"] = read

    @partial(jax.jit, static_argnums=0)
    def run(net, variables):
        def loss(params):
            given = {**variables, "params": params}
            evaluated = net.apply(given, x)
            trained, state = net.apply(
                given, x, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
            )
            return jnp.sin(trained).sum(), (evaluated, trained, flatten_dict(state["batch_stats"]))

        gradients, found = jax.grad(loss, has_aux=True)(variables["params"])
        return *found, flatten_dict(gradients)

    *outputs, stats, gradients = run(Net(), own)
    *found, found_stats, found_gradients = run(aim, joint)
    assert_equal(found, outputs)
    assert_equal({path: found_stats[path] for path in stats}, stats)
    assert_close({path: found_gradients[path] for path in gradients}, gradients, 1e-6)


def test_the_two_memories_start_out_different():
    aim = probe(read_initial="look2")

    @jax.jit
    def initial():
        params = aim.init(KEY, draw(5, 4))["params"]
        return [params[name]["dense"]["kernel"] for name in ("memory", "memory_initial")]

    first, second = initial()
    assert first.shape == second.shape
    assert not np.isclose(first, second).any()


def test_init_writes_nothing():
    aim = probe(carry="state")

    @jax.jit
    def initial():
        variables = aim.init(KEY, draw(5, 4), train=True)
        return {name: variables[name] for name in ("batch_stats", "memory")}

    variables = initial()
    assert_equal(variables["memory"], {"carried": np.zeros(D, np.float32)})
    for path, leaf in flatten_dict(variables["batch_stats"]).items():
        assert_equal(leaf, np.full_like(leaf, {"mean": 0, "var": 1}[path[-1]]))


# --- Within a pass -----------------------------------------------------------------------------


def test_reads_see_the_memory_as_it_stands():
    x = draw(5, 4)
    aim, variables = probed(x)
    h1 = dense(variables, "write1", x)
    m1 = written(variables, "write1", h1, weights_of(variables))
    m2 = written(variables, "write2", dense(variables, "write2", h1), m1)
    looks = aim.apply(variables, x)
    assert_close(looks["look1"], m1)
    assert_close(looks["look2"], m2)


def test_a_module_reads_before_it_writes():
    x = draw(5, 4)
    aim, variables = probed(x, read=["look.*", "write1"])
    m0 = weights_of(variables)
    read = variables["params"]["write1"]["memory_read"]["kernel"]
    h1 = dense(variables, "write1", x) + m0 @ read
    assert_close(aim.apply(variables, x)["look1"], written(variables, "write1", h1, m0))


def test_read_initial_never_sees_an_update():
    x = draw(5, 4)
    aim, variables = probed(x, read_initial="look2")
    looks = aim.apply(variables, x)
    initial = np.repeat(weights_of(variables, "memory_initial"), 5, axis=0)
    assert_close(looks["look2"], initial)
    assert not np.allclose(looks["look1"], initial, atol=0.01)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer, other = nn.Dense(4, name="layer"), nn.Dense(4, name="other")
        return other(layer(layer(x)))


def test_places_share_nothing_and_calls_share_everything():
    x = draw(5, 4)
    aim = AiM(Twice(), Memory((D,), "dense"), ".*", ".*", read_mode="add")
    variables = random_variables(aim, x)
    params = variables["params"]
    assert set(params) == {"memory", "layer", "other"}
    for name in ("layer", "other"):
        assert set(params[name]) == {"kernel", "bias", "memory_read", "memory_update"}
    h, m = x, weights_of(variables)
    for name in ("layer", "layer", "other"):
        h = dense(variables, name, h) + m @ params[name]["memory_read"]["kernel"]
        m = written(variables, name, h, m)
    assert_close(aim.apply(variables, x), h)


def test_memory_is_one_per_example_once_it_is_written():
    x = draw(5, 4)
    aim, variables = probed(x)
    train = jax.jit(partial(aim.apply, train=True, mutable=["batch_stats"]))
    evaluate = jax.jit(aim.apply)
    memories = evaluate(variables, x)["look2"]
    assert memories.shape == (5, D)
    assert len(np.unique(memories[:, 0])) == 5
    changed = x.copy()
    changed[1] = 7
    others = np.array([0, 2, 3, 4])
    assert_equal(evaluate(variables, changed)["look2"][others], memories[others])
    trained, changed_trained = (train(variables, images)[0]["look2"] for images in (x, changed))
    assert not np.isclose(trained[others], changed_trained[others], atol=1e-4).all()


def test_batch_norm_removes_what_all_examples_have_in_common():
    x = draw(5, 4)
    aim, variables = probed(x)
    other = jax.tree.map(np.copy, variables)
    other["params"]["memory"]["dense"]["bias"] += 3
    train = jax.jit(partial(aim.apply, train=True, mutable=["batch_stats"]))
    looks, changed = (train(given, x)[0] for given in (variables, other))
    assert not np.allclose(looks["look0"], changed["look0"], atol=1)
    assert_close(changed["look1"], looks["look1"], 1e-4)

    def loss(memory):
        given = {**variables, "params": {**variables["params"], "memory": memory}}
        return jnp.square(train(given, x)[0]["look1"]).sum()

    gradients = jax.grad(loss)(variables["params"]["memory"])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) < 1e-5
    # The running statistics of an evaluation do not follow, so there it counts.
    looks, changed = (aim.apply(given, x) for given in (variables, other))
    assert not np.allclose(looks["look1"], changed["look1"], atol=1e-3)
    # Nor is it removed from a map, where the positions see different floats.
    maps, m = draw(3, 4, 4, 2), draw(1, 2, 2, 3)
    update = MemoryUpdate()
    block = random_variables(update, maps, m)
    new, shifted = (
        update.apply(block, maps, memory, train=True, mutable=["batch_stats"])[0]
        for memory in (m, m + 3)
    )
    assert not np.allclose(new, shifted, atol=1e-3)


# --- From batch to batch -----------------------------------------------------------------------


def test_carry_weights_leaves_nothing_behind():
    x = draw(5, 4)
    aim, variables = probed(x)
    y, state = aim.apply(variables, x, train=True, mutable=True)
    assert {*state} - {"intermediates"} == {"params", "batch_stats"}
    assert_equal(state["params"], variables["params"])
    again, _ = aim.apply(
        {**variables, "batch_stats": state["batch_stats"]}, x, train=True, mutable=True
    )
    assert_equal(again, y)  # training passes use the statistics of their own batch


def test_carry_state_follows_its_formula():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state", carry_rate=0.25)
    train = jax.jit(partial(aim.apply, train=True, mutable=["memory", "batch_stats"]))
    weights = weights_of(variables)
    for _ in range(3):
        carried = variables["memory"]["carried"]
        looks, state = train(variables, x)
        assert_close(looks["look0"], np.repeat(weights + carried, 5, axis=0))
        # The last look comes after the last update.
        moved = 0.75 * carried + 0.25 * (looks["look2"].mean(axis=0) - weights[0])
        assert_close(state["memory"], {"carried": moved})
        assert not np.allclose(moved, carried, atol=0.01)
        variables = {**variables, **state}


def test_no_gradient_flows_through_the_carry():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")

    @jax.jit
    def gradients(params):
        def outputs(params):
            looks, state = aim.apply(
                {**variables, "params": params}, x, train=True, mutable=["memory", "batch_stats"]
            )
            loss = sum(jnp.square(look).sum() for look in looks.values())
            return loss, jnp.square(state["memory"]["carried"]).sum()

        pick = (lambda p, i=i: outputs(p)[i] for i in (0, 1))
        return [jax.grad(output)(params) for output in pick]

    of_outputs, of_carried = gradients(variables["params"])
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_carried))
    # While the loss of this pass does reach the memory's weights.
    assert np.abs(of_outputs["memory"]["dense"]["kernel"]).max() > 1e-4


def training(aim, optimizer):
    @jax.jit
    def step(variables, slots, x, key):
        def loss(params):
            y, state = aim.apply(
                {**variables, "params": params}, x,
                train=True, mutable=["memory", "batch_stats"], rngs={"dropout": key},
            )  # fmt: skip
            return jnp.square(y - 1).mean(), state

        gradients, state = jax.grad(loss, has_aux=True)(variables["params"])
        updates, slots = optimizer.update(gradients, slots)
        params = optax.apply_updates(variables["params"], updates)
        return {**state, "params": params}, slots

    return step


def test_training_continues_bit_for_bit_from_saved_variables():
    batches, keys = draw(4, 5, 4), jax.random.split(KEY, 4)

    def start():
        aim, optimizer = latched_net(carry="state"), optax.sgd(1e-2, momentum=0.9)
        variables = random_variables(aim, batches[0])
        return training(aim, optimizer), (variables, optimizer.init(variables["params"]))

    step, state = start()
    for i in range(4):
        state = step(*state, batches[i], keys[i])
        if i == 1:
            saved = flax.serialization.to_bytes(state)
    # As in a new process: new objects, and nothing of the old ones but the bytes.
    step, template = start()
    restored = flax.serialization.from_bytes(template, saved)
    for i in (2, 3):
        restored = step(*restored, batches[i], keys[i])
    assert_equal(restored, state)
    assert state[0]["memory"]["carried"].any()


def test_training_passes_say_what_they_write():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    for mutable in (False, ["batch_stats"], ["memory"]):
        with pytest.raises(flax.errors.ModifyScopeVariableError):
            aim.apply(variables, x, train=True, mutable=mutable)
    _, state = aim.apply(variables, x, train=True, mutable=["batch_stats", "memory"])
    assert set(state) == {"batch_stats", "memory"}


# --- Evaluation --------------------------------------------------------------------------------


def test_evaluation_sees_the_carried_memory_and_writes_nothing():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    start = weights_of(variables) + variables["memory"]["carried"]
    looks, state = aim.apply(variables, x, mutable=["batch_stats", "memory"])
    assert_close(looks["look0"], np.repeat(start, 5, axis=0))
    # `written` uses the running statistics.
    assert_close(looks["look1"], written(variables, "write1", dense(variables, "write1", x), start))
    assert_equal(state, {name: variables[name] for name in ("batch_stats", "memory")})
    assert_equal(aim.apply(variables, x), looks)
    assert_equal(aim.apply(variables, x), looks)


def test_examples_do_not_see_each_other_in_evaluation():
    x = draw(6, 4)
    aim = latched_net(carry="state")
    variables = random_variables(aim, x)
    evaluate = jax.jit(aim.apply)
    y = evaluate(variables, x)
    for filling in (0, 1e6, np.inf, np.nan):
        padded = x.copy()
        padded[4:] = filling
        assert_equal(evaluate(variables, padded)[:4], y[:4])


# --- Several devices ---------------------------------------------------------------------------


def one_step(aim, variables, x, axis_name=None):
    def loss(params):
        y, state = aim.apply(
            {**variables, "params": params}, x, train=True, mutable=["memory", "batch_stats"]
        )
        return jnp.square(y - 1).mean(), state

    gradients, state = jax.grad(loss, has_aux=True)(variables["params"])
    if axis_name is not None:
        gradients = jax.lax.pmean(gradients, axis_name)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
    return {**state, "params": params}


def on_devices(n, axis_name):
    """Returns a latched network's variables before and after one step on n devices."""
    x = draw(8, 4)
    aim = latched_net(
        Net(axis_name=axis_name, dropout=0.0),
        carry="state",
        update=MemoryUpdate(axis_name=axis_name),
    )
    variables = random_variables(latched_net(Net(), carry="state"), x)
    if n == 1:
        return variables, jax.jit(partial(one_step, aim))(variables, x)
    step = jax.pmap(
        lambda variables, x: one_step(aim, variables, x, "batch"),
        axis_name="batch", in_axes=(None, 0), devices=jax.devices()[:n],
    )  # fmt: skip
    return variables, step(variables, x.reshape(n, 8 // n, 4))


def test_a_step_on_several_devices_is_the_step_on_the_whole_batch():
    before, expected = on_devices(1, None)
    _, after = on_devices(4, "batch")
    for path, leaf in flatten_dict(after).items():
        old, new = flatten_dict(before)[path], flatten_dict(expected)[path]
        for device in np.asarray(leaf):
            np.testing.assert_allclose(device, new, atol=1e-5, err_msg=str(path))
        if path[0] != "params":
            assert not np.allclose(old, new, atol=1e-4), path


def test_nothing_is_averaged_without_an_axis_name():
    _, after = on_devices(2, None)
    stats = after["batch_stats"]["dense1"]["memory_update"]["norm1"]["mean"]
    for leaf in (after["memory"]["carried"], stats):
        first, second = np.asarray(leaf)
        assert not np.allclose(first, second, atol=1e-4)


# --- Saving, loading, freezing, resetting ------------------------------------------------------


def test_variables_are_plain_trees():
    x = draw(5, 4)
    for carry, collections in (("weights", set()), ("state", {"memory"})):
        aim = latched_net(carry=carry)
        variables = random_variables(aim, x)
        assert set(variables) == {"params", "batch_stats"} | collections
        flat = {"/".join(path): leaf for path, leaf in flatten_dict(variables).items()}
        assert all(isinstance(leaf, np.ndarray) for leaf in flat.values())
        rebuilt = unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flat.items()})
        assert_equal(aim.apply(rebuilt, x), aim.apply(variables, x))
        restored = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
        assert_equal(restored, variables)


def test_weights_trained_without_memory_load():
    x = draw(5, 4)
    trained = random_variables(Net(), x, seed=1)
    aim = latched_net()
    variables = random_variables(aim, x)
    joint = {}
    for name, tree in variables.items():
        own, latched = flatten_dict(trained[name]), flatten_dict(tree)
        assert {path: leaf.shape for path, leaf in own.items()}.items() <= {
            path: leaf.shape for path, leaf in latched.items()
        }.items()
        for path in latched:
            if path[-2] == "memory_read":
                latched[path] = np.zeros_like(latched[path])
        joint[name] = unflatten_dict({**latched, **own})
    assert_equal(jax.jit(aim.apply)(joint, x), jax.jit(Net().apply)(trained, x))


LATCHED_ON = {"memory", "memory_initial", "memory_read", "memory_update"}


@pytest.mark.parametrize("frozen", ["latched on", "backbone"])
def test_parts_can_be_frozen_by_name(frozen):
    x = draw(5, 4)
    aim = latched_net(update_after="dense2")
    variables = random_variables(aim, x)

    def part(path, _):
        return "latched on" if LATCHED_ON & {key.key for key in path} else "backbone"

    labels = jax.tree_util.tree_map_with_path(part, variables["params"])
    own = set(flatten_dict(jax.eval_shape(Net().init, KEY, x)["params"]))
    assert {path for path, label in flatten_dict(labels).items() if label == "backbone"} == own
    rules = {name: optax.sgd(0.1) for name in ("latched on", "backbone")}
    rules[frozen] = optax.set_to_zero()
    optimizer = optax.multi_transform(rules, labels)
    step = training(aim, optimizer)
    after, _ = step(variables, optimizer.init(variables["params"]), x, KEY)
    changed = {
        path
        for path, leaf in flatten_dict(after["params"]).items()
        if not np.array_equal(leaf, flatten_dict(variables["params"])[path])
    }
    labelled = {path for path, label in flatten_dict(labels).items() if label != frozen}
    assert changed <= labelled
    # Of biases in front of a batch norm only rounding may move.
    assert {path for path in labelled if path[-1] == "kernel"} <= changed


def test_a_memory_can_be_reset():
    x = draw(5, 4)
    aim, variables = probed(x, carry="state")
    assert variables["memory"]["carried"].any()
    forgot = {**variables, "memory": jax.tree.map(np.zeros_like, variables["memory"])}
    assert_close(aim.apply(forgot, x)["look0"], np.repeat(weights_of(variables), 5, axis=0))
    fresh = random_variables(aim, x, seed=5)["params"]["memory"]
    learned = {**variables, "params": {**variables["params"], "memory": fresh}}
    expected = weights_of(learned) + variables["memory"]["carried"]
    assert_close(aim.apply(learned, x)["look0"], np.repeat(expected, 5, axis=0))


# --- What a read is ----------------------------------------------------------------------------


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        grouped = nn.Conv(4, (1, 1), feature_group_count=2, use_bias=False, name="grouped")(x)
        dense = nn.Dense(3, use_bias=False, name="dense")(x)
        return {"grouped": grouped, "dense": dense}


def test_every_group_reads_the_whole_memory():
    x = draw(2, 3, 3, 2)
    aim = AiM(Images(), Memory((2, 3, 4)), read="grouped")
    variables = random_variables(aim, x)
    kernel = variables["params"]["grouped"]["kernel"][0, 0]  # [own channel, memory], features
    assert kernel.shape == (1 + 3, 4)  # 24 floats on 9 positions: three channels
    m = np.asarray(fit(Memory((2, 3, 4)).apply({"params": variables["params"]["memory"]}), 3, 3))
    expected = m @ kernel[1:]
    for feature in range(4):
        own = x[..., feature // 2] * kernel[0, feature]
        y = own + expected[..., feature]
        assert_close(aim.apply(variables, x)["grouped"][..., feature], y)


def test_dense_layers_read_the_mean_over_rows_and_columns():
    x = draw(2, 3, 3, 2)
    for memory in (Memory((4,), "dense"), Memory((2, 3, 4), "direct")):
        aim = AiM(Images(), memory, read="dense")
        variables = random_variables(aim, x)
        kernel = variables["params"]["dense"]["kernel"]
        m = np.asarray(memory.apply({"params": variables["params"]["memory"]}))
        m = m if m.ndim == 2 else m.mean(axis=(1, 2))
        assert_close(aim.apply(variables, x)["dense"], x @ kernel[:2] + m[0] @ kernel[2:])


# --- Flax transformations ----------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="inner")(x)


class Stage(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.block(name="block")(x)


class Stages(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = Stage(self.block, name="stage")(x)
        x = nn.LayerNorm(name="behind")(x)
        return nn.Dense(3, name="head")(x)


def test_updates_work_around_transformations_and_not_inside():
    x = draw(5, 4)

    def latched(block, place):
        return AiM(Stages(block), Memory((D,), "dense"), "head", place, read_mode="add")

    for place in ("stage", "behind"):
        variables = random_variables(latched(Block, place), x)
        expected = latched(Block, place).apply(variables, x)
        assert_close(latched(nn.remat(Block), place).apply(variables, x), expected)
    for place in ("stage/block", "stage/block/inner"):
        jax.eval_shape(latched(Block, place).init, KEY, x)
        with pytest.raises(UsageError, match="inside a Flax transformation"):
            jax.eval_shape(latched(nn.remat(Block), place).init, KEY, x)


# --- What is refused ---------------------------------------------------------------------------


def test_patterns_that_match_nothing_list_the_paths():
    with pytest.raises(UsageError) as refusal:
        jax.eval_shape(probe(read=["look.*", "write"]).init, KEY, draw(5, 4))
    message = str(refusal.value)
    assert "read pattern 'write' matches no module of Probe (did you mean 'write" in message
    assert message.endswith("there are: look0, write1, look1, write2, look2")
