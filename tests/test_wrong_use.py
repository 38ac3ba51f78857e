"""What is used wrongly is told in one line, with an exit status, and changes nothing: a table."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.wrong_use import make_place

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

LINES = Path(__file__).with_name("wrong_use.txt").read_text().splitlines()
ROWS = [tuple(line.split(" => ", 1)) for line in LINES if not line.startswith("#")]
MODULES = {"eval": "evaluate"}


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder, and what is in it; the tests run there."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("place"))
    make_place()
    yield files()
    os.chdir(before)


def test_there_are_enough():
    assert len(ROWS) == len(set(ROWS)) >= 300


@pytest.mark.parametrize(("command", "words"), ROWS, ids=lambda text: text)
def test_wrong_use(place, capsys, command, words):
    name, *argv = shlex.split(command)
    status, words = re.fullmatch(r"(?:(\d) )?(.*)", words).groups()
    module = importlib.import_module(f"aim_flax.cli.{MODULES.get(name, name)}")
    with pytest.raises(SystemExit) as end:
        module.main(argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert words in line
    assert end.value.code == int(status or 2)
    assert files() == place
