"""Weights of the published Keras network: names, shapes, files, mistakes."""

import math
import sys
from functools import partial
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from aim_flax.cli.keras_import import main
from aim_flax.models.keras_files import read_keras_hdf5
from aim_flax.models.keras_weights import split_reads, variables_from_keras
from aim_flax.models.resnet import ResNet
from aim_flax.train.restore import restore_run
from tests.arrays import shapes_of
from tests.asserts import assert_equal, fails, refused
from tests.published import GOLDEN, published, shapes
from tests.published import keras_weights as drawn_weights


def keras_weights(classes=10, depth=32, channels=(1, 2, 8, 32)):
    """Zeros in the published network's shapes, for a memory of this many channels in each stage."""
    weights = {}
    for layer, role, shape in GOLDEN["weights"]:
        shape = list(shape)
        if layer == "fc1000":
            shape[-1] = classes
        elif layer.startswith(("mem_init", "mem_global", "Memory")):
            shape[-1] = depth
            if role == "kernel" and not layer.startswith("Memory"):
                shape[-2] = depth
        elif role == "kernel" and layer.endswith(("branch2a", "a_branch_a")):
            stage = next(int(letter) for letter in layer if letter.isdigit()) - 2
            # The first block reads at the size at which the stage before it puts out.
            if layer.startswith(f"res{stage + 2}a"):
                stage = max(stage - 1, 0)
            shape[-2] += channels[stage] - (1, 2, 8, 32)[stage]
        weights.setdefault(layer, {})[role] = np.broadcast_to(np.float32(0), shape)
    return weights


@pytest.mark.parametrize(
    ("classes", "memory_shape", "size"),
    [(10, (7, 7, 32), 112), (120, (7, 7, 1024), 224), (7, (3, 5, 40), 160)],
)
def test_variables_are_those_of_the_latched_network(classes, memory_shape, size):
    expected = shapes_of(published(classes, memory_shape), size)
    total, areas = math.prod(memory_shape), [(size // 2 ** (1 + s)) ** 2 for s in range(4)]
    channels = [max(1, -(-total // area)) for area in areas]
    variables = variables_from_keras(keras_weights(classes, memory_shape[-1], channels), expected)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)


def test_dtypes_and_numbers_are_kept():
    weights = keras_weights()
    weights["bn3a_branch2b"]["moving_variance"] = np.arange(128, dtype=np.float16)
    variables = variables_from_keras(weights, shapes())
    var = variables["batch_stats"]["stage2_block1"]["norm2"]["var"]
    assert var.dtype == np.float16
    np.testing.assert_array_equal(var, np.arange(128))


def without(layer, role):
    def change(weights):
        del weights[layer][role]

    return change


def with_shape(layer, role, *shape):
    def change(weights):
        weights.setdefault(layer, {})[role] = np.zeros(shape, np.float32)

    return change


def renamed(old, new):
    def change(weights):
        weights[new] = weights.pop(old)

    return change


def without_memory(weights):
    for layer in [layer for layer in weights if layer.startswith(("mem", "Memory"))]:
        del weights[layer]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("res3b_branch2a", "kernel"),
            "the Keras weights lack res3b_branch2a/kernel, of shape (1, 1, 514, 128)",
        ),
        (without("fc1000", "bias"), "the Keras weights lack fc1000/bias, of shape (10,)"),
        (
            renamed("mem_global", "mem_globl"),
            "the Keras weights lack mem_global/kernel, of shape (1, 1, 32, 32)"
            " (did you mean 'mem_globl/kernel'?)",
        ),
        (without_memory, "the Keras weights lack mem_init/kernel, of shape (1, 1, 32, 32)"),
        (dict.clear, "the Keras weights lack conv1/kernel, of shape (7, 7, 3, 64)"),
        (
            with_shape("conv2", "kernel", 1),
            "the Keras weights have conv2/kernel, which is none of the published network's"
            " (did you mean 'conv1/kernel'?)",
        ),
        (
            with_shape("fc1000", "bias", 11),
            "the Keras weight fc1000/bias has shape (11,), expected (10,)",
        ),
        (
            with_shape("res5b_branch2a", "kernel", 1, 1, 2048, 512),
            "the Keras weight res5b_branch2a/kernel has shape (1, 1, 2048, 512),"
            " expected (1, 1, 2080, 512)",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    weights = keras_weights()
    change(weights)
    with refused(exactly=message):
        variables_from_keras(weights, shapes())


@pytest.mark.parametrize(
    ("layer", "role", "shape", "expected"),
    [
        ("bn_conv1", "gamma", (1, 64), (64,)),
        ("res4c_branch2a", "kernel", (1, 1, 1031, 256), (1, 1, 1032, 256)),
        ("res2a_branch2a", "kernel", (1, 1, 68, 64), (1, 1, 65, 64)),
        ("Memory3a_branch", "kernel", (1, 1, 32, 33), (1, 1, 32, 32)),
        ("fc1000", "kernel", (2048,), (2048, 10)),
    ],
)
def test_wrong_shapes_are_named(layer, role, shape, expected):
    weights = keras_weights()
    with_shape(layer, role, *shape)(weights)
    message = f"the Keras weight {layer}/{role} has shape {shape}, expected {expected}"
    with refused(exactly=message):
        variables_from_keras(weights, shapes())


@pytest.mark.parametrize(
    ("net", "variable"),
    [
        (published(10, (7, 7, 32), "add"), "params/stage1_block1/conv1/memory_read/kernel"),
        (ResNet(10, stem_stride=1), "batch_stats/stage1_block1/memory_update/norm1/mean"),
    ],
)
def test_another_network_than_the_published_one_is_refused(net, variable):
    message = f"the network is not the published one: only one of them has the variable {variable}"
    with refused(exactly=message):
        variables_from_keras(keras_weights(), shapes_of(net, 112))


def test_split_reads_gives_the_variables_of_the_add_form():
    plain = shapes_of(ResNet(10, stem_stride=1), 112)["params"]
    ours = split_reads(variables_from_keras(keras_weights(), shapes()), plain)
    expected = shapes_of(published(10, (7, 7, 32), "add"), 112)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)


def test_split_reads_cuts_kernels_between_features_and_memory():
    kernel = np.arange(2 * 5 * 3).reshape(1, 2, 5, 3)
    variables = {
        "params": {"conv": {"kernel": kernel, "bias": np.zeros(3)}, "memory": {"content": 1}},
        "batch_stats": {"norm": 2},
    }
    plain = {"conv": {"kernel": np.zeros((1, 2, 4, 3)), "bias": np.zeros(3)}}
    split = flatten_dict(split_reads(variables, plain), sep="/")
    np.testing.assert_array_equal(split["params/conv/kernel"], kernel[:, :, :4])
    np.testing.assert_array_equal(split["params/conv/memory_read/kernel"], kernel[:, :, 4:])
    assert split["params/memory/content"] == 1
    assert split["batch_stats/norm"] == 2
    assert len(split) == 5


def test_split_reads_refuses_another_networks_parameters():
    plain = {"conv": {"kernel": np.zeros((3, 3, 4, 8))}}
    with refused(exactly="the latched network lacks the backbone's parameter conv/kernel"):
        split_reads({"params": {"conv": {}}}, plain)
    for shape in ((3, 3, 6, 9), (3, 3, 3, 8), (4, 8)):
        message = f"the parameter conv/kernel has shape {shape}, which is not (3, 3, 4, 8) with a"
        with refused(exactly=f"{message} memory's channels appended"):
            split_reads({"params": {"conv": {"kernel": np.zeros(shape)}}}, plain)


WEIGHTS = {
    "conv1": {"kernel": np.arange(12.0).reshape(1, 1, 3, 4), "bias": np.arange(4.0)},
    "bn_conv1": {"gamma": np.ones(4), "moving_variance": np.full(4, 2.0)},
}


def write_hdf5(path, group=None, suffix=":0", weights=None):
    """Writes WEIGHTS or others, and a layer without any, as Keras does."""
    weights = WEIGHTS if weights is None else weights
    with h5py.File(path, "w") as file:
        target = file if group is None else file.create_group(group)
        target.attrs["layer_names"] = [b"input_1", *(layer.encode() for layer in weights)]
        target.attrs["backend"] = b"tensorflow"
        target.create_group("input_1").attrs["weight_names"] = np.array([], "S1")
        for layer, arrays in weights.items():
            names = [f"{layer}/{role}{suffix}" for role in arrays]
            target.create_group(layer).attrs["weight_names"] = [name.encode() for name in names]
            for name, array in zip(names, arrays.values(), strict=True):
                target[layer].create_dataset(name, data=array.astype(np.float32))
        if group is not None:
            file.create_group("optimizer_weights")


@pytest.mark.parametrize(("group", "suffix"), [(None, ":0"), ("model_weights", ":0"), (None, "")])
def test_hdf5_files_of_keras_are_read(tmp_path, group, suffix):
    path = tmp_path / "weights.h5"
    write_hdf5(path, group, suffix)
    weights = read_keras_hdf5(path)
    expected = jax.tree.map(np.float32, WEIGHTS)
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), weights, expected)


def truncated(path):
    write_hdf5(path)
    path.write_bytes(path.read_bytes()[:-100])


def no_hdf5(path):
    path.write_text("weights")


def keras_3(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", data=np.zeros(3))


def no_dataset(path):
    write_hdf5(path)
    with h5py.File(path, "a") as file:
        del file["conv1/conv1/bias:0"]


def group_for_array(path):
    no_dataset(path)
    with h5py.File(path, "a") as file:
        file.create_group("conv1/conv1/bias:0")


KERNEL = "conv1/conv1/kernel:0"


def replaced(path, put):
    """Writes weights, and something else in place of a kernel, into another file beside it."""
    write_hdf5(path.with_name("other.h5"))
    write_hdf5(path)
    path.with_name("secret").write_bytes(bytes(range(48)))
    with h5py.File(path, "a") as file:
        del file[KERNEL]
        put(file, path.parent)


def linked(path):
    def put(file, folder):
        file[KERNEL] = h5py.ExternalLink(folder / "other.h5", KERNEL)

    replaced(path, put)


def linked_layer(path):
    def put(file, folder):
        del file["conv1"]
        file["conv1"] = h5py.ExternalLink(folder / "other.h5", "conv1")

    replaced(path, put)


def linked_whole(path):
    with h5py.File(path, "w") as file:
        write_hdf5(path.with_name("other.h5"))
        file["model_weights"] = h5py.ExternalLink(path.with_name("other.h5"), "/")


def soft_link(path):
    def put(file, folder):
        file["conv1/elsewhere"] = np.zeros((1, 1, 3, 4), np.float32)
        file[KERNEL] = h5py.SoftLink("/conv1/elsewhere")

    replaced(path, put)


def stored_elsewhere(path):
    def put(file, folder):
        place = [(str(folder / "secret"), 0, 48)]
        file.create_dataset(KERNEL, (1, 1, 3, 4), np.float32, external=place)

    replaced(path, put)


def virtual(path):
    def put(file, folder):
        layout = h5py.VirtualLayout((1, 1, 3, 4), np.float32)
        layout[:] = h5py.VirtualSource(folder / "other.h5", KERNEL, (1, 1, 3, 4))
        file.create_virtual_dataset(KERNEL, layout)

    replaced(path, put)


def declared_only(path):
    def put(file, folder):
        file.create_dataset(KERNEL, (10**6, 10**6), np.float32, chunks=(64, 64), fillvalue=1)

    replaced(path, put)


def compressed_to_nothing(path):
    def put(file, folder):
        file.create_dataset(KERNEL, (10**6, 10**6), np.float32, chunks=True, compression="gzip")

    replaced(path, put)


def text(path):
    def put(file, folder):
        file[KERNEL] = ["not", "numbers"]

    replaced(path, put)


ELSEWHERE = [linked, linked_layer, linked_whole, soft_link, stored_elsewhere, virtual]
TOO_LARGE = [declared_only, compressed_to_nothing, text]


@pytest.mark.parametrize("write", [*ELSEWHERE, *TOO_LARGE])
def test_nothing_outside_the_file_is_read_and_no_more_than_it_holds(tmp_path, write):
    path = tmp_path / "weights.h5"
    write(path)
    expected = r"is a link$|in another file$|but holds \d+ bytes$|is no array of numbers$"
    with refused(f"^{path} holds no weights .*({expected})"):
        read_keras_hdf5(path)


def test_compressed_weights_are_read(tmp_path):
    def put(file, folder):
        kernel = WEIGHTS["conv1"]["kernel"].astype(np.float32)
        file.create_dataset(KERNEL, data=kernel, compression="gzip")

    replaced(tmp_path / "weights.h5", put)
    found = read_keras_hdf5(tmp_path / "weights.h5")["conv1"]["kernel"]
    np.testing.assert_array_equal(found, WEIGHTS["conv1"]["kernel"])


@pytest.mark.parametrize("write", [truncated, no_hdf5, keras_3, no_dataset, group_for_array])
def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, write):
    path = tmp_path / "weights.h5"
    write(path)
    with refused(f"^{path} holds no weights that Keras 2 wrote by"):
        read_keras_hdf5(path)


def test_absent_files_and_packages_are_named(tmp_path, monkeypatch):
    with refused(r"^there is no file .*/absent\.h5$"):
        read_keras_hdf5(tmp_path / "absent.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with refused("install the extra `keras`"):
        read_keras_hdf5(tmp_path / "weights.h5")


PUBLISHED = str(Path(__file__).parents[1] / "configs" / "stanford_dogs_resnet50.py")
SMALL = ["--config", f"{PUBLISHED}:published", "--config.data.image_shape=(112,112,3)"]


@pytest.fixture
def published_hdf5(tmp_path):
    path = tmp_path / "weights.h5"
    write_hdf5(path, weights=drawn_weights())
    return str(path)


@pytest.mark.slow
def test_imported_weights_are_a_run_that_can_be_restored(tmp_path, capsys, published_hdf5):
    workdir = tmp_path / "run"
    command = [published_hdf5, "--workdir", str(workdir), *SMALL]
    main(command)
    assert "10 classes" in capsys.readouterr().out
    restored = restore_run(workdir, "best")
    assert restored.step == 0
    assert restored.config.model.num_classes == 10
    assert restored.config.memory.shape == [7, 7, 32]
    assert_equal(restored.variables, variables_from_keras(drawn_weights(), shapes()))
    assert "holds a run already" in fails(capsys, main, *command)


def test_weights_of_another_image_size_are_told(tmp_path, capsys, published_hdf5):
    line = fails(capsys, main, published_hdf5, "--workdir", str(tmp_path / "run"), *SMALL[:2])
    assert "res3b_branch2a/kernel has shape (1, 1, 514, 128), expected (1, 1, 513, 128)" in line
    assert "set --config.data.image_shape or --config.memory.shape" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [without("fc1000", "bias"), without_memory])
def test_weights_that_do_not_show_their_sizes_are_told(tmp_path, capsys, change):
    weights = {layer: dict(roles) for layer, roles in drawn_weights().items()}
    change(weights)
    write_hdf5(tmp_path / "weights.h5", weights=weights)
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "weights.h5"), "--workdir", str(tmp_path / "run"), *SMALL])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the Keras weights lack " in line
