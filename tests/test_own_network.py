"""A network from elsewhere, by its name in a config: trained, evaluated, described, ablated."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from aim_flax import build_model
from aim_flax import config as configs
from aim_flax.cli import evaluate as evaluate_command
from aim_flax.models.describe import describe
from aim_flax.study.controls import count, derive
from aim_flax.train import loop
from aim_flax.train.experiment import Experiment
from aim_flax.train.restore import restore_run
from tests.arrays import KEY, paths
from tests.asserts import assert_equal, refused
from tests.runs import digits, read_json, write_own_network

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

NETWORK = """
import jax.numpy as jnp
from flax import linen as nn


class Own(nn.Module):
    num_classes: int
    width: int = 8
    normalised: bool = False

    @nn.compact
    def __call__(self, images, *, deterministic=True):
        x = nn.tanh(nn.Dense(self.width, name="first")(images.reshape(len(images), -1)))
        if self.normalised:
            x = nn.BatchNorm(use_running_average=deterministic, name="norm")(x)
        x = nn.Dropout(0.1)(x, deterministic=deterministic)
        return nn.Dense(self.num_classes, name="last")(x)


class Hidden(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, **options):
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


class Returns(nn.Module):
    num_classes: int
    what: str

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(self.num_classes, name="last")(images.reshape(len(images), -1))
        return {
            "pair": (x, x),
            "dict": {"logits": x, "features": x},
            "tokens": x[:, None],
            "fewer": x[:, 1:],
            "whole numbers": x.argmax(-1, keepdims=True) + jnp.zeros((1, 10), int),
        }[self.what]


# Takes groups of options as others do: by attribute, or unpacked.
class Grouped(nn.Module):
    num_classes: int
    sizes: object

    @nn.compact
    def __call__(self, images, train=False):
        def layer(width, depth):
            return width * depth

        x = nn.Dense(layer(**self.sizes), name="first")(images.reshape(len(images), -1))
        x = nn.Dense(self.sizes.width, name="second")(x)
        return nn.Dense(self.num_classes, name="last")(x)


class Unnumbered(nn.Module):
    outputs: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.outputs)(images.reshape(len(images), -1))


class Scanned(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(8, name="first")(images.reshape(len(images), -1))
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(self.num_classes, name="last")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="dense")(nn.relu(x)), None


not_a_module = 1
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """A working directory with a package that nobody here wrote."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "nets.py").write_text(NETWORK)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("elsewhere", "elsewhere.nets"):
        sys.modules.pop(name, None)


def own(arm="aim", name="elsewhere.nets:Own", **model):
    config = digits("aim")
    with config.unlocked():
        config.arm = arm
        config.model = {"name": name, "num_classes": 10, **model}
        config.memory.read, config.memory.update_after = "last", "first"
        if arm == "control":
            config.memory = None
    return config.lock()


def test_it_is_described_and_built_like_ours():
    text, _ = describe(own())
    assert "  first  writes memory from 8" in text
    assert "  last   reads memory into 8" in text
    images = jnp.ones((2, 8, 8, 1))
    plain, latched = (
        jax.eval_shape(build_model(config).init, KEY, images) for config in (own("control"), own())
    )
    assert paths(plain) == {"first/kernel", "first/bias", "last/kernel", "last/bias"}
    assert paths(plain) < paths(latched)


def test_train_reaches_it_in_its_own_words():
    net, images = build_model(own("control")), jnp.ones((64, 8, 8, 1))
    variables = net.init(KEY, images, train=False)
    dropped = net.apply(variables, images, train=True, rngs={"dropout": KEY})
    assert not np.allclose(dropped, net.apply(variables, images, train=False))


@pytest.mark.slow
def test_it_is_trained_restored_and_evaluated(tmp_path, capsys):
    config = configs.override(own(), ["train.epochs=1"])
    loop.run(config, tmp_path / "run", 1, quiet=True)
    evaluate_command.main(["--workdir", str(tmp_path / "run"), "--devices", "1"])
    summary = read_json(tmp_path / "run" / "summary.json")
    assert read_json(tmp_path / "run" / "eval_test.json")["accuracy"] == summary["test_accuracy"]
    restored = restore_run(tmp_path / "run")
    assert restored.config.model.name == "elsewhere.nets:Own"
    images = jnp.ones((2, 8, 8, 1))
    assert restored.model.apply(restored.variables, images).shape == (2, 10)


def test_controls_are_derived_from_it():
    config = own(width=256)
    for which, name in enumerate(("control_params", "control_compute")):
        control = derive(config, name)
        assert control.model.width > 256
        assert abs(count(control)[which] / count(config)[which] - 1) < 0.01
    assert_equal(count(derive(config, "control")), count(own("control", width=256)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pair", "Returns returns a tuple of 2, expected logits .B, 10., one for each class, as a"),
        ("dict", "Returns returns a dict with features, logits, expected logits"),
        ("tokens", "Returns makes float32 .1, 1, 10. of one image, expected logits .B, 10."),
        ("fewer", "Returns makes float32 .1, 9. of one image, expected logits .B, 10."),
        ("whole numbers", "Returns makes int32 .1, 10. of one image, expected logits"),
    ],
)
def test_what_it_returns_is_looked_at_before_training(what, message):
    for arm in ("control", "aim"):
        config = own(arm, "elsewhere.nets:Returns", what=what)
        with config.unlocked():
            if arm == "aim":
                config.memory.update_after = ""
        for look in (describe, lambda config: Experiment(config, 1)):
            with refused(message):
                look(config)


def test_groups_of_options_are_what_networks_take_them_for():
    config = own("control", "elsewhere.nets:Grouped", sizes={"width": 3, "depth": 2})
    again = ConfigDict(json.loads(configs.to_json(config)))
    for given in (config, again):
        variables = jax.eval_shape(build_model(given).init, KEY, jnp.ones((2, 8, 8, 1)))
        sizes = [variables["params"][name]["kernel"].shape[1] for name in ("first", "second")]
        assert sizes == [6, 3]
    hash(build_model(config))


@pytest.mark.slow
def test_a_run_whose_use_of_memory_cannot_be_measured_ends_as_others(tmp_path):
    """All that reads lies in an nn.scan that keeps no intermediates."""
    config = configs.override(own(name="elsewhere.nets:Scanned"), ["train.epochs=1"])
    with config.unlocked():
        config.memory.read, config.memory.update_after = "layers/dense", ""
    with pytest.warns(UserWarning, match="use of memory is not measured in read layers/dense"):
        summary = loop.run(config, tmp_path / "run", 1, quiet=True)
    assert read_json(tmp_path / "run" / "summary.json")["test_accuracy"] == summary["test_accuracy"]
    assert not (tmp_path / "run" / "memory_use.png").exists()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_network_of_the_readme_is_trained(tmp_path, monkeypatch):
    assert write_own_network(tmp_path) <= 17
    for arm in ("aim", "control"):
        config = configs.override(configs.load(f"my_config.py:{arm}"), ["train.epochs=1"])
        summary = loop.run(config, tmp_path / arm, 1, quiet=True)
        assert summary["test_accuracy"] > 0.2
    monkeypatch.delitem(sys.modules, "my_net")


MISTAKES = {
    "package": (dict(name="elsewhre.nets:Own"), "nets:Own', but: No module named 'elsewhre'"),
    "class": (
        dict(name="elsewhere.nets:Oven"),
        r"elsewhere.nets has no Linen module 'Oven' \(did you mean 'Own'\?\)",
    ),
    "no class": (dict(name="elsewhere.nets:not_a_module"), "has no Linen module 'not_a_module'"),
    "no colon": (dict(name="own"), r"model.name \(or package.module:Class\) is 'own', exp"),
    "field": (dict(widht=3), r"model.widht is no option of Own \(did you mean 'width'\?\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name):
    model, message = MISTAKES[name]
    with refused(message):
        build_model(own(**model))


def test_what_it_cannot_be_told_is_refused():
    config = own()
    with config.unlocked():
        config.dtype = "bfloat16"
    with refused("dtype is bfloat16, but elsewhere.nets:Own has no field dtype to be told so"):
        build_model(config)
    with refused("elsewhere.nets:Own has batch statistics but no field axis_name, .* on 2 devices"):
        Experiment(own(normalised=True), 2)
    with refused("Unnumbered has no field num_classes, by which it is told how many classes there"):
        build_model(own("control", "elsewhere.nets:Unnumbered"))
    with refused(r"Hidden.__call__ takes \*\*kwargs, behind which its mode argument may be"):
        images = jnp.ones((2, 8, 8, 1))
        build_model(own("control", "elsewhere.nets:Hidden")).init(KEY, images, train=False)
    with refused("Own can be widened where its config has one of model.features, .*; it has none"):
        derive(own(), "control_params")
