"""Every command in README and docs is one that the programs take, up to where they would train."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from aim_flax.cli import main
from aim_flax.study import plan
from aim_flax.train.experiment import Experiment
from aim_flax.train.workdir import default_workdir
from tests.photos import write_folder
from tests.runs import write_own_network

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROOT = Path(__file__).parents[1]
# Those of docs/scaling.md are for clusters: tests/test_scaling_page.py.
PAGES = [
    ROOT / "README.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs/scaling.md"}),
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PLACES = {"NAME": "cifar10", "FILE": "configs/digits_mlp.py", "[:ARM]": ":aim", "=5000": "=6"}
PLACES[" results/"] = f" {ROOT}/results/"
# What a program says that has understood its flags, but has nothing to work on.
MISSING = re.compile(
    r"^[^:]*: (\S+?)(?:/config\.json)? not found: |needs TensorFlow|there is no file"
)


class Started(Exception):  # noqa: N818
    """The work that a command asks for would begin here; its argument says with what."""


def commands(page: Path) -> list[str]:
    """Returns the commands of a page's bash blocks, and those within its text, in order."""
    text = page.read_text().replace("\\\n", "")
    lines = []
    for block, inline in re.findall(
        r"```bash\n(.*?)```|`((?:python|aim-flax) [^`]+)`", text, re.DOTALL
    ):
        lines += block.splitlines() or [inline.replace("\n", " ")]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Returns a function of a command that fails unless the programs take it. An evaluated run
    must be one that an earlier command makes."""
    photographs = write_folder(tmp_path / "photographs", train=6, val=3, test=3)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_own_network(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def start(self, config, *args, **kwargs):
        raise Started(config)

    monkeypatch.setattr(Experiment, "__init__", start)
    download = "tensorflow_datasets.core.DatasetBuilder.download_and_prepare"
    monkeypatch.setattr(download, lambda builder, **options: start(builder, None))
    # Widening a network until it has as many parameters takes long.
    monkeypatch.setattr(plan, "derive", lambda config, name: config)
    made = set()

    def run(argv):
        """Returns the config that would be trained, or what there isn't to work on."""
        module = argv[0] == "-m"
        monkeypatch.setattr(sys, "argv", argv[module:])
        try:
            if argv[0] == "aim-flax":
                main.main()
            elif module:
                monkeypatch.delitem(sys.modules, argv[1], raising=False)
                runpy.run_module(argv[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        except Started as started:
            return started.args[0]
        except SystemExit as end:
            error = capsys.readouterr().err
            missing = MISSING.search(error)
            assert end.code == 0 or missing, error  # noqa: PT017
            return missing and missing[1]
        assert capsys.readouterr().out, "it does nothing"

    def check(command):
        for placeholder, value in PLACES.items():
            command = command.replace(placeholder, value)
        program, *argv = shlex.split(re.sub(r"\bDIR\b", str(photographs), command))
        if program == "pip":
            named = re.search(r"\.\[(.*?)\]", command)
            assert named is None or set(named[1].split(",")) <= EXTRAS.keys()
            assert command.endswith(" -c constraints.txt")
            return
        if program == "aim-flax":
            argv = [program, *argv]
        else:
            assert program == "python"
        workdir = argv[argv.index("--workdir") + 1] if "--workdir" in argv else None
        if argv[:2] == ["-m", "pytest"]:
            files = [word for word in argv if word.startswith("tests")]
            assert all((ROOT / file).is_file() for file in files)
            marks = re.findall(r"\w+", argv[-1]) if argv[-2] == "-m" else []
            assert {"not", "slow"}.issuperset(marks)
            runs_nothing = ["--noconftest", "-n", "0", "--markers"]
            pytest_ = [sys.executable, *argv, *runs_nothing]
            subprocess.run(pytest_, cwd=ROOT, check=True, capture_output=True)
        elif argv[0].startswith("benchmarks/"):
            assert (ROOT / argv[0]).is_file()
        elif argv[0].endswith(".zip"):
            assert argv[0] in made
        else:
            result = run([word for word in argv if word != "--describe"])
            script = f"{argv[1]}.py" if program == "aim-flax" else argv[0]
            arms = [word for flag, word in pairwise(argv) if flag in ("--arms", "--arm")]
            if script == "ablate.py" and not arms:  # Of a study that is there.
                assert result == f"{workdir}/study.json"
                assert any(run.startswith(f"{workdir}/") for run in made)
            elif script in ("eval.py", "predict.py", "export.py"):
                assert result == workdir
                assert workdir in made
                made.update(place for flag, place in pairwise(argv) if flag == "--to")
            elif script == "ablate.py":
                names = [re.split("[=:]", arm)[0] for word in arms for arm in word.split(",")]
                made.update(f"{workdir}/{name}/0" for name in names)
            elif script == "train.py":
                made.add(workdir or str(default_workdir(result)))

    return check


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(check, page):
    assert commands(page) or page.name == "latch.md"
    for command in commands(page):
        check(command)


ABLATE = "python ablate.py --config configs/digits_mlp.py --arms control,aim --workdir runs/x"


@pytest.mark.parametrize(
    "command",
    [
        "python ablat.py --config configs/digits_mlp.py --arms control,aim",
        "python train.py --config configs/digits_mpl.py",
        "python train.py --config configs/digits_mlp.py:aims",
        "python train.py --config configs/digits_mlp.py --config.train.epoch=5",
        ABLATE.replace("control,", "contol,"),
        f"{ABLATE} --sedes 10",
        f"{ABLATE} --reference aim_state",
        f"{ABLATE} --arm slow=aim:memory.shap=(8,)",
        "python eval.py --workdir runs/x/aim/0",  # which nobody makes
        "python ablate.py --power --workdir runs/x",  # nor this
        "aim-flax predict --workdir runs/x/aim/0 DIR",
        "aim-flax export --worksdir runs/x/aim/0",
        "aim-flax trian --config digits_mlp",
        "aim-flax train --config digit_mlp",
        "python network.zip photo.png",
        f"{ABLATE} && python eval.py --workdir runs/x/aim/0 --memory al",
        "python -m aim_flax.cli.prepare cifar11",
        "python -m aim_flax.cli.table runs/x/*/* --one val",
        "python -m pytest tests/test_nothing.py",
        "python -m pytest --mark slow",
    ],
)
def test_wrong_commands_are_found(check, command):
    *before, last = command.split(" && ")
    for part in before:
        check(part)
    with pytest.raises((AssertionError, FileNotFoundError, subprocess.CalledProcessError)):
        check(last)
