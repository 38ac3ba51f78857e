"""The package as people install it: one command, and configs that are found by their names."""

import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import version

import pytest

import aim_flax
from aim_flax import config as configs
from aim_flax.cli import main as command
from aim_flax.console import command_line
from tests.asserts import fails, refused
from tests.runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    """The command says in sys.argv what it was called as."""
    monkeypatch.setattr(sys, "argv", ["aim-flax"])


def test_every_room_is_installed_and_configs_within_the_package():
    setup = PROJECT["tool"]["setuptools"]
    rooms = {file.parent for file in (ROOT / "aim_flax").rglob("*.py")}
    expected = {".".join(room.relative_to(ROOT).parts) for room in rooms} | {"aim_flax.configs"}
    assert set(setup["packages"]) == expected
    assert setup["package-dir"] == {"aim_flax.configs": "configs"}


def test_version_is_that_of_the_project():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "aim_flax.__version__"
    assert f"version: {aim_flax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert version("aim_flax") == aim_flax.__version__


def test_the_command_is_there_and_every_part_explains_itself(capsys):
    module, _, function = PROJECT["project"]["scripts"]["aim-flax"].partition(":")
    assert getattr(import_module(module), function) is command.main
    runs = {"train", "eval", "ablate", "predict", "export", "table", "import"}
    assert {*runs, "inspect", "prepare"} <= command.COMMANDS.keys()
    command.main([])
    listed = capsys.readouterr().out
    for name in command.COMMANDS:
        assert f"\n  {name} " in listed
        with pytest.raises(SystemExit) as end:
            command.main([name, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: aim-flax {name} [-h] ")
    command.main(["--version"])
    assert capsys.readouterr().out == f"aim_flax {aim_flax.__version__}\n"


def test_mistakes_are_told_under_the_name_of_the_command(capsys):
    line = fails(capsys, command.main, "trian")
    assert line.startswith("aim-flax: there is no command 'trian' (did you mean 'train'?); there")
    line = fails(capsys, command.main, "train", "--confg", "x")
    assert line.startswith("aim-flax train: ")
    line = fails(capsys, command.main, "eval", "--workdir", "nowhere")
    assert line.startswith("aim-flax eval: nowhere/config.json not found")


def test_reports_have_the_command_that_was_called(monkeypatch):
    argv = ["--arm", "a:b=1 c=2"]
    assert command_line("ablate.py", argv) == "python ablate.py --arm 'a:b=1 c=2'"
    monkeypatch.setattr(sys, "argv", ["aim-flax ablate"])
    assert command_line("ablate.py", argv) == "aim-flax ablate --arm 'a:b=1 c=2'"


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {f"{name}.py" for name in configs.names()} | {"base.py"} == {
        file.name for file in (ROOT / "configs").glob("*.py")
    }
    for name in configs.names():
        assert configs.arms(name) == configs.arms(str(ROOT / "configs" / f"{name}.py"))
    by_name = configs.load("digits_mlp:control")
    assert by_name == configs.load(f"{ROOT / 'configs' / 'digits_mlp.py'}:control")
    with refused("config file 'digit_mlp' not found .did you mean 'digits_mlp'"):
        configs.load("digit_mlp")
    with refused("'configs/digits_mlp.py' not found .did you mean 'digits_mlp'"):
        configs.load("configs/digits_mlp.py")
    with refused("config file 'base' not found"):
        configs.load("base")
    # A file of one's own is named by its path, and comes first.
    text = (ROOT / "configs" / "digits_mlp.py").read_text()
    (tmp_path / "digits_mlp.py").write_text(text.replace('"digits_mlp", arm', '"mine", arm'))
    assert configs.load("digits_mlp.py").name == "mine"
    assert configs.load("digits_mlp").name == "digits_mlp"


@pytest.mark.slow
def test_a_wheel_has_all_of_it(tmp_path):
    """Built without a network, where the build backend is there."""
    needed = int(PROJECT["build-system"]["requires"][0].partition(">=")[2])
    try:
        found = int(version("setuptools").partition(".")[0])
    except ModuleNotFoundError:
        found = 0
    if found < needed:
        pytest.skip(f"setuptools {found} is older than the {needed} that pyproject.toml asks for")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", tmp_path, ROOT], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "aim_flax").rglob("*.py")}
    files = {f"aim_flax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | files
    assert "aim_flax/data/digits_order.npy" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"aim_flax"}
