"""What is latched on in a memory's place: coordinates, a bias per position, gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from aim_flax import AiM, Instead, Memory
from aim_flax import config as configs
from aim_flax.instead import KINDS, coordinates
from aim_flax.models.build import build_model
from aim_flax.models.describe import describe
from aim_flax.study.controls import count, derive
from aim_flax.train.evaluate_run import evaluate_run
from aim_flax.train.experiment import Experiment
from aim_flax.train.remat import recomputing
from aim_flax.train.restore import restore_run
from tests.arrays import KEY, draw, paths, random_variables
from tests.arrays import count as size_of
from tests.asserts import assert_close, assert_equal, refused
from tests.runs import digits, first_steps, load, write_run

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


class One(nn.Module):
    """A layer of a class, with its options."""

    layer: type[nn.Module]
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        return self.layer(6, **dict(self.options), name="layer")(x)


class Maps(nn.Module):
    """Two convolutions, batch norm, a layer of vectors; its mode is `deterministic`."""

    num_classes: int = 3
    width: int = 4

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = nn.Conv(self.width, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(deterministic, name="norm")(x))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2, name="conv2")(x))
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


def one(layer, kind, hidden=(), **options):
    return Instead(One(layer, tuple(options.items())), kind, "layer", hidden)


# --- What each computes ------------------------------------------------------------------------


def coordinates_by_hand(*size):
    """Position i of n is -1 + 2·i / (n - 1), of one position 0; a channel for each axis."""
    grid = np.zeros((*size, len(size)), np.float32)
    for at in np.ndindex(*size):
        grid[at] = [-1 + 2 * i / (n - 1) if n > 1 else 0 for i, n in zip(at, size, strict=True)]
    return grid


def test_coordinates_rise_from_minus_1_to_1_along_each_axis():
    rows, columns = np.moveaxis(np.asarray(coordinates(3, 5))[0], -1, 0)
    np.testing.assert_array_equal(rows, np.repeat([[-1.0], [0.0], [1.0]], 5, axis=1))
    np.testing.assert_array_equal(columns, np.tile([-1.0, -0.5, 0.0, 0.5, 1.0], (3, 1)))
    for size in ((4,), (1, 6), (2, 3, 4)):
        np.testing.assert_allclose(coordinates(*size)[0], coordinates_by_hand(*size), atol=1e-6)


LAYERS = {
    "line": ((7,), nn.Conv, dict(kernel_size=(3,))),
    "map": ((5, 6), nn.Conv, dict(kernel_size=(3, 3))),
    "strides": ((5, 6), nn.Conv, dict(kernel_size=(3, 2), strides=(2, 1), padding="VALID")),
    "around": ((5, 6), nn.Conv, dict(kernel_size=(3, 3), padding="CIRCULAR")),
    "groups": ((5, 6), nn.Conv, dict(kernel_size=(3, 3), feature_group_count=2)),
    "volume": ((3, 4, 2), nn.Conv, dict(kernel_size=(2, 3, 1))),
    "transposed": ((4, 5), nn.ConvTranspose, dict(kernel_size=(3, 3), strides=(2, 2))),
    "turned": ((4, 5), nn.ConvTranspose, dict(kernel_size=(3, 3), transpose_kernel=True)),
    "dense": ((5, 6), nn.Dense, {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_coords_are_channels_beside_the_input(name):
    """A hand-written CoordConv: one layer, with one kernel, of both in one array."""
    size, layer, options = LAYERS[name]
    x = draw(2, *size, 4)
    net = one(layer, "coords", **options)
    variables = random_variables(net, x)
    own = variables["params"]["layer"]
    groups = options.get("feature_group_count", 1)
    coords = np.broadcast_to(coordinates_by_hand(*size), (2, *size, len(size)))
    parts = [part for group in np.split(x, groups, -1) for part in (group, coords)]
    axis = -1 if "transpose_kernel" in options else -2
    kernel = np.concatenate([own["kernel"], own["coords"]["kernel"]], axis=axis)
    expected = layer(6, **options).apply(
        {"params": {"kernel": kernel, "bias": own["bias"]}}, np.concatenate(parts, axis=-1)
    )
    assert_close(jax.jit(net.apply)(variables, x), expected)


@pytest.mark.parametrize("layer", [nn.Conv, nn.DenseGeneral])
def test_kernels_of_coords_start_as_channels_of_the_wider_layer(layer):
    """Of variance 1 / (fan-in of all inputs), not of two: lecun_normal."""
    options = (
        dict(kernel_size=(3, 3))
        if layer is nn.Conv
        else dict(kernel_init=jax.nn.initializers.lecun_normal())
    )
    x = jnp.zeros((1, 4, 4, 62))
    net = Instead(Wide(layer, tuple(options.items())), "coords", "layer")
    kernel = jax.jit(net.init)(KEY, x)
    kernel = kernel["params"]["layer"]["coords"]["kernel"]
    window = 9 if layer is nn.Conv else 1
    assert kernel.size == window * 2 * 512
    assert kernel.std() == pytest.approx((window * 64) ** -0.5, rel=0.1)


class Wide(One):
    @nn.compact
    def __call__(self, x):
        return self.layer(512, **dict(self.options), name="layer")(x)


def test_a_bias_per_position_is_added_and_its_gradient_is_that_of_the_output():
    x = draw(3, 5, 6, 4)
    net = one(nn.Conv, "position_bias", kernel_size=(3, 3), strides=2)
    plain = net.backbone
    variables, alone = (jax.jit(network.init)(KEY, x) for network in (net, plain))
    bias = variables["params"]["layer"].pop("position_bias")["bias"]
    assert_equal(variables, alone)
    assert bias.shape == (3, 3, 6)
    assert not bias.any()

    def outputs(bias):
        layer = {**alone["params"]["layer"], "position_bias": {"bias": bias}}
        return net.apply({"params": {"layer": layer}}, x)

    y = plain.apply(alone, x)
    assert_equal(outputs(bias), y)
    some = draw(3, 3, 6, seed=1)
    assert_close(outputs(some), y + some)
    gradient = jax.grad(lambda bias: jnp.sin(outputs(bias)).sum())(some)
    assert_close(gradient, np.cos(y + some).sum(axis=0))


def gated_by_hand(y, gates, axes):
    """y·sigmoid(relu(z·W1)·W2), z the mean over the axes."""
    z = y.mean(axis=axes, keepdims=True)
    hidden = np.maximum(z @ gates["squeeze"]["kernel"], 0)
    return y / (1 + np.exp(-(hidden @ gates["excite"]["kernel"])))


@pytest.mark.parametrize("size", [(), (5,), (5, 6)])
def test_gates_see_the_mean_over_positions(size):
    x = draw(3, *size, 4)
    layer = (nn.Dense, {}) if not size else (nn.Conv, dict(kernel_size=(3,) * len(size)))
    net = one(layer[0], "squeeze_excite", (5,), **layer[1])
    variables = random_variables(net, x)
    gates = variables["params"]["layer"]["squeeze_excite"]
    assert size_of(gates) == 2 * 6 * 5
    y = np.asarray(jax.jit(net.backbone.apply)(variables, x))
    assert_close(
        jax.jit(net.apply)(variables, x), gated_by_hand(y, gates, tuple(range(1, y.ndim - 1)))
    )


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "groups"])
def test_a_change_of_low_rank_is_one_of_the_kernel(name):
    size, kind, options = LAYERS[name]
    x = draw(3, *size, 4)
    net = one(kind, "low_rank", (2,), **options)
    variables = random_variables(net, x)
    layer = dict(variables["params"]["layer"])
    change = layer.pop("low_rank")
    assert change["up"]["kernel"].shape == (2, 6)
    down = change["down"]["kernel"]
    # A turned kernel has the outputs before the inputs.
    product = "...ri,ro->...oi" if options.get("transpose_kernel") else "...ir,ro->...io"
    layer["kernel"] = layer["kernel"] + np.einsum(product, down, change["up"]["kernel"])
    expected = jax.jit(net.backbone.apply)({"params": {"layer": layer}}, x)
    assert_close(jax.jit(net.apply)(variables, x), expected)


def test_a_change_of_low_rank_has_no_groups_and_starts_at_nothing():
    x = draw(2, 4, 4, 6)
    net = one(nn.Conv, "low_rank", (2,), kernel_size=(3, 3), feature_group_count=3)
    variables = jax.jit(net.init)(KEY, x)
    down = variables["params"]["layer"]["low_rank"]["down"]["kernel"]
    assert down.shape == (3, 3, 6, 2)
    assert jnp.abs(down).max() > 0
    assert_equal(jax.jit(net.apply)(variables, x), jax.jit(net.backbone.apply)(variables, x))
    changes = jax.jit(jax.grad(lambda params: net.apply({"params": params}, x).sum()))
    found = changes(variables["params"])["layer"]["low_rank"]
    assert jnp.abs(found["up"]["kernel"]).max() > 0


def test_hidden_sizes_are_in_the_order_of_the_calls_or_a_16th():
    x = draw(2, 8, 8, 3)
    for hidden, sizes in (((3, 5, 7), (3, 5, 7)), ((6,), (6, 6, 6)), ((), (2, 4, 1))):
        net = Instead(Maps(width=32), "squeeze_excite", "conv.|head", hidden)
        params = jax.eval_shape(net.init, KEY, x)["params"]
        names = ("conv1", "conv2", "head")
        assert sizes == tuple(
            params[name]["squeeze_excite"]["squeeze"]["kernel"].shape[1] for name in names
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_keeps_its_variables_and_mode(kind):
    x = draw(2, 6, 6, 3)
    net = Instead(Maps(), kind, "conv.")
    plain, variables = (jax.jit(network.init)(KEY, x) for network in (Maps(), net))
    for path, array in flatten_dict(plain).items():
        assert_equal(flatten_dict(variables)[path], array)
    latched_on = paths(variables) - paths(plain)
    assert {tuple(path.split("/")[:2]) for path in latched_on} == {
        ("conv1", kind),
        ("conv2", kind),
    }
    # In training it normalises by the batch, whatever the network calls that.
    train = functools.partial(net.apply, train=True, mutable=["batch_stats"])
    _, state = jax.jit(train)(variables, x)
    assert np.abs(state["batch_stats"]["norm"]["mean"]).max() > 0
    assert net.places(x) == [("conv1", (2, 6, 6, 3), 4), ("conv2", (2, 6, 6, 4), 8)]


def test_a_subclass_is_seen_where_the_layer_itself_is_called():
    class Activated(nn.Conv):
        def __call__(self, x):
            return jnp.tanh(super().__call__(x))

    x = draw(2, 4, 4, 3)
    net = one(Activated, "position_bias", kernel_size=(1, 1))
    variables = random_variables(net, x)
    own = variables["params"]["layer"]
    y = x @ own["kernel"][0, 0] + own["bias"] + own["position_bias"]["bias"]
    assert_close(jax.jit(net.apply)(variables, x), np.tanh(y))


@pytest.mark.parametrize("kind", KINDS)
def test_computes_in_the_layers_dtype(kind):
    x = draw(2, 5, 6, 4)
    net, half = (one(nn.Conv, kind, kernel_size=(3, 3), dtype=d) for d in (None, jnp.bfloat16))
    variables = random_variables(net, x)
    shapes = jax.eval_shape(half.init, KEY, x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    y = jax.jit(half.apply)(variables, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(np.float32), jax.jit(net.apply)(variables, x), 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_inside_flax_transformations(kind):
    """Layers in a remat, whose parameters keep their paths."""

    class Recomputed(nn.Module):
        transformed: bool

        @nn.compact
        def __call__(self, x):
            conv = nn.remat(nn.Conv) if self.transformed else nn.Conv
            return conv(4, (3, 3), name="conv")(x)

    x = draw(2, 4, 4, 4)
    net = Instead(Recomputed(False), kind, "conv")
    variables = random_variables(net, x)
    again = net.clone(backbone=Recomputed(True))
    assert_close(jax.jit(again.apply)(variables, x), jax.jit(net.apply)(variables, x))


def test_what_is_computed_again_is_the_same():
    kind = "squeeze_excite"
    x = draw(4, 6, 6, 3)
    net = Instead(Maps(), kind, "conv.")
    variables = random_variables(net, x)

    def gradients(pattern):
        def loss(params):
            with recomputing(pattern):
                y, state = net.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
            return jnp.square(y).mean(), state

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    expected = gradients("")
    assert np.abs(jax.tree.leaves(expected[0]["conv2"][kind])[0]).max() > 0
    assert_close(gradients("conv2|norm"), expected, 1e-6)


def test_beside_a_memory():
    """Each keeps to its own layers and names."""
    x = draw(2, 8, 8, 3)
    inner = Instead(Maps(), "coords", "conv1")
    net = AiM(inner, Memory((2, 2, 4), "direct"), "conv.", read_mode="add")
    params = jax.eval_shape(net.init, KEY, x)["params"]
    assert params["conv1"].keys() == {"kernel", "bias", "coords", "memory_read"}
    assert params["conv2"].keys() == {"kernel", "bias", "memory_read"}


class Coder(nn.Module):
    """A layer in each of two methods; the call is both of them."""

    def setup(self):
        self.first, self.second = nn.Dense(4), nn.Dense(6)

    def encode(self, x, train=False):
        return jnp.tanh(self.first(x)) * (1 + train)

    def decode(self, x):
        return self.second(x)

    def __call__(self, x, train=False):
        return self.decode(self.encode(x, train))


@pytest.mark.parametrize("kind", ["squeeze_excite", "low_rank"])
def test_methods_of_the_backbone_have_what_is_latched_on(kind):
    """Of sizes that differ from layer to layer, whichever method is called first."""
    net, x = Instead(Coder(), kind, "first|second", hidden=(1, 2)), draw(3, 5)
    variables = random_variables(net, x)
    z = net.apply(variables, x, method="encode", train=True)
    assert_equal(z, 2 * net.apply(variables, x, method=Coder.encode))
    whole = net.apply(variables, x)
    assert_close(net.apply(variables, z / 2, method="decode"), whole)
    assert np.abs(whole - Coder().apply(variables, x)).max() > 0.01
    with refused(r"Coder has no method 'encod' \(did you mean 'encode'\?\)"):
        net.apply(variables, x, method="encod")
    with refused("at pattern 'second' matches no layer of Coder"):
        Instead(Coder(), kind, "second").init(KEY, x, method="encode")


class Either(nn.Module):
    """Two arguments that may be its mode."""

    @nn.compact
    def __call__(self, x, train=False, deterministic=True):
        return nn.Dense(3, name="head")(nn.Dense(4, name="body")(x)) * (1 + train)


def test_methods_and_modes_are_those_of_the_network_within_both():
    memory = Memory((3,), "direct")
    both = AiM(Instead(Coder(), "low_rank", "first", (2,)), memory, "first", read_mode="add")
    x = draw(3, 5)
    variables = random_variables(both, x)
    z = both.apply(variables, x, method="encode", train=True)
    assert_equal(z, 2 * both.apply(variables, x, method="encode"))
    assert_close(both.apply(variables, z / 2, method="decode"), both.apply(variables, x))
    for outer, inner in ((None, "train"), ("train", None)):
        either = Instead(Either(), "low_rank", "body", mode=inner)
        aim = AiM(either, memory, "head", read_mode="add", mode=outer)
        variables = random_variables(aim, x)
        y = aim.apply(variables, x, train=True)
        assert_close(y, 2 * aim.apply(variables, x))


# --- As controls -------------------------------------------------------------------------------


@pytest.mark.slow
def test_controls_of_the_small_resnet_have_these_sizes():
    """Its memory is read by conv1, of 16, 32, 64 and 128 channels on maps of 16, 8, 4 and 2 pixels;
    there are two in each stage."""
    config = load("small_resnet:published", ["model.num_classes=10"])
    goal, alone = 1_189_866, 888_170  # as in test_describe.py
    hidden = (55, 55, 111, 111, 222, 222, 443, 443)
    gates = 2 * 2 * (16 * 55 + 32 * 111 + 64 * 222 + 128 * 443)
    ranks = derive(config, "low_rank").instead.hidden
    # From 16 channels, and then from those of the block before; a rank's rows and columns.
    each = (16 + 16, 64 + 16, 64 + 32, 128 + 32, 128 + 64, 256 + 64, 256 + 128, 512 + 128)
    changes = sum(rank * size for rank, size in zip(ranks, each, strict=True))
    for size in (gates, changes):
        assert abs(alone + size - goal) < 0.01 * goal
    sizes = {
        "coords": 2 * 2 * (16 + 32 + 64 + 128),
        "position_bias": 2 * (16 * 16 * 16 + 8 * 8 * 32 + 4 * 4 * 64 + 2 * 2 * 128),
        "squeeze_excite": gates,
        "low_rank": changes,
    }
    chosen = {"squeeze_excite": hidden, "low_rank": ranks}
    assert sizes.keys() == set(KINDS)
    for kind, size in sizes.items():
        control = derive(config, kind)
        assert count(control)[0] == alone + size
        assert control.instead.at == config.memory.read
        assert control.instead.hidden == chosen.get(kind, ())
        keys = configs.differing_keys(config, control)
        assert {key for key in keys if not key.startswith(("memory.", "instead."))} == {
            "arm",
            *({"memory"} & set(keys)),
        }


def test_controls_of_a_network_from_elsewhere_leave_vectors_alone():
    config = own(**{"memory.shape": (4, 4, 2), "memory.read": "conv2|head"})
    assert derive(config, "coords").instead.at == "conv2"
    gates = derive(config, "squeeze_excite")
    assert gates.instead.at == "conv2|head"
    assert len(gates.instead.hidden) == 2
    changed = derive(config, "low_rank")
    for control in (gates, changed):
        assert abs(count(control)[0] - count(config)[0]) < 0.01 * count(config)[0]
    text, _ = describe(derive(config, "position_bias"))
    assert "position_bias conv2           128" in text
    assert text.endswith("order of the calls:\n  conv2  position_bias at 8x8x4")


def own(**values):
    """Returns the config of `Maps` on digits, with a memory."""
    config = load("digits_mlp:aim_direct")
    name = f"{__name__}:Maps"
    with config.unlocked():
        config.model = dict(name=name, num_classes=10, width=4)
        config.memory.update(kind="direct", update_after="", read="conv.", shape=(4, 4, 4))
    with config.memory.ignore_type():
        config.update_from_flattened_dict(values)
    return config.lock()


def test_sizes_that_gates_cannot_have_are_refused():
    """A memory of 2 floats that one layer of 10 outputs reads: gates have multiples of 20."""
    small = ["model.features=()", "memory.shape=(1,)", "memory.read=head"]
    config = load("digits_mlp:aim_no_update", [*small, "memory.kind=direct"])
    message = "no hidden sizes have the 661 trainable parameters of digits_mlp:aim_no_update within"
    with refused(exactly=f"{message} 1%; nearest: 670 with (1,)"):
        derive(config, "squeeze_excite")


# --- In a run ----------------------------------------------------------------------------------

PIXELS = np.ones((1, 8, 8, 1), np.float32)
GATES = ("instead.kind=squeeze_excite", r"instead.at=layer\d/dense|head", "instead.hidden=(4,)")


@pytest.mark.slow
def test_gates_alone_are_trained_the_same_on_one_device_and_two():
    """With pmap and shard_map; what is frozen is the backbone."""
    frozen = (*GATES, "train.freeze=(?!.*squeeze_excite).*")
    losses, before, after = first_steps(digits("control", *frozen), 2, 2)
    of_one, _, also = first_steps(digits("control", *frozen, "parallel=shard_map"), 1, 2)
    assert_close(np.array(losses), np.array(of_one))
    assert_close(after.params, also.params)
    for path, array in flatten_dict(after.params).items():
        changed = np.abs(array - flatten_dict(before.params)[path]).max() > 0
        assert changed == ("squeeze_excite" in path), path


@pytest.mark.parametrize("kind", KINDS)
def test_several_seeds_at_once_are_each_as_one_alone(kind):
    x = draw(2, 4, 4, 3)
    net = one(nn.Conv, kind, kernel_size=(3, 3))
    seeds = [random_variables(net, x, seed=seed) for seed in (0, 1)]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    outputs = jax.jit(jax.vmap(net.apply, in_axes=(0, None)))(together, x)
    for output, variables in zip(outputs, seeds, strict=True):
        assert_close(output, jax.jit(net.apply)(variables, x), 1e-6)


def test_a_run_is_restored_and_evaluated(tmp_path):
    config = digits("control", *GATES)
    write_run(config, tmp_path / "run")
    restored = restore_run(tmp_path / "run")
    images = draw(5, 8, 8, 1)
    assert isinstance(restored.model, Instead)
    expected = build_model(config).apply(restored.variables, images)
    assert_equal(restored.model.apply(restored.variables, images), expected)
    assert evaluate_run(tmp_path / "run", split="test").count == 360
    with refused("the network, Instead, has no memory to alter"):
        evaluate_run(tmp_path / "run", memory="zero")


def test_weights_of_the_plain_network_are_a_start(tmp_path):
    """And what is latched on starts as it does without them."""
    weights = random_variables(build_model(digits("control", "model.num_classes=10")), PIXELS)
    save_file(flatten_dict(weights, sep="/"), tmp_path / "weights.safetensors")
    start = f"model.pretrained=own:{tmp_path}/weights.safetensors"
    params = Experiment(digits("control", *GATES, start), 1).initial_state().params
    random = Experiment(digits("control", *GATES), 1).initial_state().params
    for name in ("head", "layer1"):
        found, given, drawn = (tree[name] for tree in (params, weights["params"], random))
        if name == "layer1":
            found, given, drawn = (tree["dense"] for tree in (found, given, drawn))
        assert_equal(found.pop("squeeze_excite"), drawn["squeeze_excite"])
        assert_equal(found, given)


def test_a_bias_per_position_can_start_at_random():
    net = Instead(Wide(nn.Conv, (("kernel_size", (3, 3)),)), "position_bias", "layer", stddev=0.5)
    variables, again = (jax.jit(net.init)(key, draw(2, 8, 8, 4)) for key in (KEY, KEY))
    bias = variables["params"]["layer"]["position_bias"]["bias"]
    assert bias.shape == (8, 8, 512)
    assert bias.mean() == pytest.approx(0, abs=0.01)
    assert bias.std() == pytest.approx(0.5, rel=0.01)
    assert_equal(variables, again)


def test_gates_can_start_at_one():
    """Where the network starts as its backbone; from there they are twice the usual ones."""
    x = draw(3, 5, 4, 4)
    usual = one(nn.Conv, "squeeze_excite", (5,), kernel_size=(3, 3))
    net = usual.clone(zero_init=True)
    variables = net.init(KEY, x)
    assert_equal(net.apply(variables, x), net.backbone.apply(variables, x))
    changes = jax.grad(lambda params: (net.apply({"params": params}, x) ** 2).sum())
    gates = changes(variables["params"])["layer"]["squeeze_excite"]
    assert jnp.abs(gates["excite"]["kernel"]).max() > 0
    learned = random_variables(net, x)
    assert_close(net.apply(learned, x), 2 * usual.apply(learned, x))


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="coord"), "kind is 'coord', expected one of .* .did you mean 'coords'"),
        (dict(at=""), "coords needs at, a pattern of the layers"),
        (
            dict(at="conv3"),
            r"at pattern 'conv3' matches no layer of Maps .*there are: conv1, conv2",
        ),
        (dict(at="norm"), "at matches 'norm', but BatchNorm is no layer that coords can be"),
        (
            dict(at="head"),
            r"at matches 'head', a layer of vectors, \(2, 8\): they have no positions",
        ),
        (dict(at="head", kind="position_bias"), "no positions, which position_bias is of"),
        (dict(hidden=(3,)), "hidden is of squeeze_excite and low_rank, but kind is 'coords'"),
        (dict(stddev=1.0), "stddev is of position_bias, but kind is 'coords': leave it 0"),
        (dict(zero_init=True), "zero_init is of squeeze_excite, but kind is 'coords': leave it F"),
        (dict(kind="position_bias", stddev=-1.0), "stddev is -1.0, expected a number of at"),
        (dict(kind="squeeze_excite", hidden=(0,)), r"hidden is \(0,\), expected sizes"),
        (
            dict(kind="squeeze_excite", hidden=(1, 2, 3)),
            "hidden has 3 sizes, expected one, or one for each of the 2 layers",
        ),
        (dict(backbone=3), "the backbone, int, is no Linen module"),
        (
            dict(backbone=AiM(Maps(), Memory((2, 2, 4)), "conv.")),
            r"the backbone of an Instead is an AiM: .* as in AiM\(Instead\(network, ...\), ...\)",
        ),
    ],
)
def test_mistakes_are_told(options, message):
    given = dict(backbone=Maps(), kind="coords", at="conv.") | options
    with refused(message):
        jax.eval_shape(Instead(**given).init, KEY, jnp.zeros((2, 8, 8, 3)))


def test_a_bias_per_position_fits_one_size():
    net = Instead(Maps(), "position_bias", "conv1")
    variables = jax.eval_shape(net.init, KEY, jnp.zeros((1, 8, 8, 3)))
    with refused("at matches 'conv1', whose output has 8x6 positions, which is not the size"):
        jax.eval_shape(net.apply, variables, jnp.zeros((1, 8, 6, 3)))


def test_a_compiled_part_is_refused_even_after_the_plain_one_was_compiled():
    class Compiled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(nn.Conv)(4, (1, 1), name="conv")(x)

    x = jnp.zeros((1, 4, 4, 3))
    jax.eval_shape(Compiled().init, KEY, x)
    with refused("'conv' runs inside nn.jit"):
        jax.eval_shape(Instead(Compiled(), "coords", "conv").init, KEY, x)


def test_a_name_that_is_taken_is_refused():
    class Named(nn.Conv):
        @nn.compact
        def __call__(self, x):
            coords = self.param("coords", nn.initializers.zeros, (6,))
            return super().__call__(x) + coords

    with refused("'layer' has a submodule or parameter called 'coords'"):
        net = one(Named, "coords", kernel_size=(1, 1))
        jax.eval_shape(net.init, KEY, jnp.zeros((1, 4, 4, 3)))


def test_configs_that_do_not_go_together():
    with refused("instead.kind is 'coords', which takes a memory's place, but the config has a"):
        build_model(digits("aim", "instead.kind=coords", "instead.at=head"))
    with refused("instead.at is 'head', but instead.kind is None"):
        build_model(digits("control", "instead.at=head"))
    with refused("digits_mlp:aim reads its memory in layers of vectors only"):
        derive(digits("aim"), "coords")
