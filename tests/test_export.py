"""A network in a file: it runs without aim_flax and Flax, and computes the same."""

import json
import os
import re
import runpy
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from aim_flax import Predictor
from aim_flax.cli import export as export_command
from aim_flax.models.build import build_model
from aim_flax.use import export
from tests.arrays import random_variables
from tests.asserts import fails, refused
from tests.photos import mlp, write_folder
from tests.runs import ROOT, load, write_own_network, write_run

# Not compiled quickly: the other process isn't told to.
pytestmark = pytest.mark.usefixtures("standard_promotion")

# In front of a program: what the file may not need.
BLOCKED = """\
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("aim_flax", "flax", "ml_collections", "orbax", "safetensors"):
            raise ImportError(f"{name} is not there")


sys.meta_path.insert(0, Blocked())
"""


def alone(program: str, folder: Path, *argv: str) -> subprocess.CompletedProcess:
    """Runs a program in another process, on one device, without this package."""
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + program, *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, standard_promotion):
    folder = tmp_path_factory.mktemp("exported")
    photographs = write_folder(folder / "photographs", train=24, val=6, test=9, size=(12, 20))
    scaling = ("data.mean=(0.5,0.4,0.3)", "data.deviation=(0.9,1.2,1.1)")
    config = mlp(photographs, "data.fit=crop", "data.centre=0.8", *scaling, arm="aim")
    write_run(config, folder / "run")
    return folder / "run", sorted(photographs.glob("test/*/*"))


@pytest.mark.slow
def test_the_file_runs_alone_and_is_equal_bit_for_bit(run, tmp_path, capsys):
    """With the code of the docs."""
    workdir, files = run
    export_command.main(["--workdir", str(workdir), "--to", str(tmp_path / "network.zip")])
    assert re.fullmatch(r"\S+network.zip: 0.\d MB, step \d+\n", capsys.readouterr().out)
    page = (ROOT / "docs" / "use.md").read_text()
    (code,) = re.findall(r"```python\n(import sys\n.*?)```", page, re.DOTALL)
    (tmp_path / "photo.png").write_bytes(files[0].read_bytes())
    more = """
import numpy as np
for size in (1, 2, 5):
    np.save(f"found{size}.npy", network(np.load("pixels.npy")[:size]))
np.save("read.npy", network.pixels("photo.png"))
print([name for name in sys.modules if name.partition(".")[0] in ("aim_flax", "flax")])
for wrong in (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3))):
    try:
        network(wrong)
    except ValueError as error:
        print(error)
"""
    predictor = Predictor.from_run(workdir)
    pixels = np.stack([predictor.pixels(file) for file in files])
    np.save(tmp_path / "pixels.npy", pixels)
    done = alone(code + more, tmp_path)
    assert done.returncode == 0, done.stderr
    first, modules, *refusals = done.stdout.splitlines()
    prediction = predictor(files[0])
    assert first == str((prediction.label, prediction.probability))
    assert modules == "[]"
    assert refusals == [
        "pixels are uint8 (8, 8, 3), expected uint8 (images, 8, 8, 3)",
        "pixels are float64 (1, 8, 8, 3), expected uint8 (images, 8, 8, 3)",
    ]
    for size in (1, 2, 5):
        expected = predictor.probabilities(pixels[:size])
        np.testing.assert_array_equal(np.load(tmp_path / f"found{size}.npy"), expected)
    assert expected.max() > 2 * expected.min()
    np.testing.assert_array_equal(np.load(tmp_path / "read.npy"), pixels[0])


@pytest.mark.slow
def test_the_file_is_a_program(run, tmp_path):
    workdir, files = run
    predictor = Predictor.from_run(workdir)
    export.write_network(tmp_path / "network.zip", predictor)
    program = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"
    done = alone(program, tmp_path, "network.zip", *map(str, files[:2]))
    found = [predictor(file) for file in files[:2]]
    assert done.stdout.splitlines() == [
        f"{file}: {one.label} {one.probability:.2%}"
        for file, one in zip(files[:2], found, strict=True)
    ], done.stderr
    done = alone(program, tmp_path, "network.zip", "nothing.png")
    assert done.returncode == 1
    assert done.stderr == "nothing.png: [Errno 2] No such file or directory: 'nothing.png'\n"


def test_the_program_prints_names_on_one_line(capsys, monkeypatch):
    class Network:
        def __init__(self, file):
            pass

        def predict(self, file):
            if "whole" not in file:
                raise ValueError("it is\nno image")
            return "\x1b[31mred\r", 0.5

    monkeypatch.setitem(sys.modules, "aim_network", types.SimpleNamespace(Network=Network))
    monkeypatch.setattr(sys, "argv", ["network.zip", "whole\n.jpg", "half\n.jpg"])
    program = Path(export.__file__).with_name("exported_main.py")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out == "whole\\n.jpg: \\x1b[31mred\\r 50.00%\n"
    assert end.value.code == r"half\n.jpg: it is\nno image"


def test_what_is_in_the_files(run, tmp_path):
    workdir, _ = run
    predictor = Predictor.from_run(workdir)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        export.write_network(tmp_path / name / "network.zip", predictor)
    export.write_parameters(tmp_path / "one.safetensors", predictor)
    with zipfile.ZipFile(tmp_path / "one" / "network.zip") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "two" / "network.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == contents
    saved = json.loads(contents["aim_network/network.json"])
    assert saved["classes"] == ["class0", "class1", "class2"]
    assert saved["decoding"] == {"shape": [8, 8, 3], "fit": "crop", "centre": 0.8}
    exported = jax.export.deserialize(bytearray(contents["aim_network/network.jax"]))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals[-1].shape) == "(b, 8, 8, 3)"
    parameters = (tmp_path / "one.safetensors").read_bytes()
    assert contents["aim_network/parameters.safetensors"] == parameters

    expected = flatten_dict(predictor.variables, sep="/")
    assert {name.partition("/")[0] for name in expected} == {"params", "batch_stats"}
    with safe_open(tmp_path / "one.safetensors", "numpy") as opened:
        assert set(opened.keys()) == expected.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(opened.get_tensor(name), leaf)
        assert json.loads(opened.metadata()["about"]) == saved


def test_a_file_may_have_any_name(run, tmp_path):
    place = tmp_path / os.fsdecode(b"\xff\n.zip")
    export.write_network(place, Predictor.from_run(run[0]))
    with zipfile.ZipFile(place) as archive:
        assert r"python \udcff\n.zip IMAGE" in archive.read("README.txt").decode()


def test_export_goes_into_the_workdir_by_itself(run, capsys, tmp_path):
    workdir, _ = run
    export_command.main(["--workdir", str(workdir)])
    places = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert places == [str(workdir / "network.zip"), str(workdir / "network.safetensors")]
    for flag, message in {
        "network.onnx": "--to is network.onnx, expected a name that ends in .zip or .safetensors",
        f"{tmp_path}/no/network.zip": "network.zip, but there is no folder",
    }.items():
        line = fails(capsys, export_command.main, "--workdir", str(workdir), "--to", flag)
        assert message in line
    assert "not found" in fails(capsys, export_command.main, "--workdir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def assert_equal_when_exported(config) -> None:
    """Exports a network with random weights, and compares it with itself."""
    shape = config.data.image_shape
    model = build_model(config)
    variables = random_variables(model, np.zeros((1, *shape), np.float32))
    variables.pop("intermediates", None)
    classes = [str(i) for i in range(config.model.num_classes)]
    predictor = Predictor(config, model, variables, classes)
    exported = jax.export.deserialize(bytearray(export.function(predictor)))
    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    found = jax.jit(exported.call)(export.parameters(variables), pixels)
    expected = predictor.probabilities(pixels)
    assert expected.max() > 2 * expected.min()
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_a_network_from_elsewhere_is_exported(tmp_path, monkeypatch):
    """One that takes its batch size from `len`, which another number of images would not have."""
    monkeypatch.chdir(tmp_path)
    write_own_network(tmp_path)
    from aim_flax import config as configs

    config = configs.load("my_config.py:aim")
    with config.unlocked():
        config.model.num_classes = 10
    assert_equal_when_exported(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "assignments"),
    [
        ("digits_mlp:aim_state", ()),
        ("small_resnet:published", ("data.image_shape=(32,32,3)", "model.width=8")),
        ("small_resnet:aim", ("data.image_shape=(32,32,3)", "memory.read_mode=attend")),
        ("small_resnet:control", ("dtype=bfloat16", "model.width=8")),
        ("cifar10_vgg16:aim", ("model.widths=(4,4,8,8,8)", "model.dense_sizes=(16,16)")),
    ],
)
def test_every_kind_of_network_is_exported(name, assignments):
    config = load(name, ["model.num_classes=10", *assignments])
    assert_equal_when_exported(config)


def test_a_network_that_cannot_be_exported_is_told(run, monkeypatch):
    predictor = Predictor.from_run(run[0])

    def only_here(model, preprocessing):
        return lambda variables, pixels: jax.pure_callback(
            lambda x: np.zeros((len(x), 3)), jax.ShapeDtypeStruct((2, 3), np.float32), pixels
        )

    monkeypatch.setattr(export, "probabilities", only_here)
    with refused("^the network can't be exported: "):
        export.function(predictor)
