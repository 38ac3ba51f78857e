"""Faults of files, disks and input: each ends in one line and a status, and nothing is lost.

The table of docs/reliability.md says what is promised; a row is held by the tests that it names, or
by the table here.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from aim_flax import files
from aim_flax.train.workdir import LOCK
from tests.disks import no_space
from tests.photos import FOLDER_CONFIG, draw, encode, small, write_folder
from tests.runs import DIGITS, ROOT, SMALL, read_json
from tests.wrong_use import config_of

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

MODULES = {"eval": "evaluate", "import": "keras_import"}
# Finished, begun, and within a study.
RUNS = ("run", "begun", "study/control/0", "study/wide/0")
PAGE = (ROOT / "docs" / "reliability.md").read_text()


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row.

    Attributes:
      ways: how the place is spoiled, by name.
      ends: for each command line, the status with which it ends, and words of the one line.
    """

    ways: dict[str, Callable[[], object]]
    ends: dict[str, tuple[int, str]]


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[], None]:
    """Puts something in the place of a file or folder of each run that has it."""

    def spoil() -> None:
        for path in [Path(run, name) for run in RUNS]:
            if path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                make(path)

    return spoil


def written(name: str, text: str) -> Callable[[], None]:
    return replaced(name, lambda path: path.write_text(text))


def digit_changed(name: str) -> Callable[[], None]:
    """Changes a number in a file of each run."""

    def spoil() -> None:
        for path in [Path(run, name) for run in RUNS]:
            if path.exists():
                path.write_text(
                    re.sub(
                        r"(\d)(,?\n)", lambda m: f"{9 - int(m[1])}{m[2]}", path.read_text(), count=1
                    )
                )

    return spoil


def cut(pattern: str) -> Callable[[], None]:
    """Cuts files in half."""

    def spoil() -> None:
        for path in filter(Path.is_file, Path().glob(pattern)):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return spoil


def nothing() -> None:
    pass


def study_is(text: str) -> Callable[[], object]:
    return lambda: Path("study/study.json").write_text(text)


def study_is_other(make: Callable[[str], object]) -> Callable[[], None]:
    def spoil() -> None:
        os.unlink("study/study.json")
        make("study/study.json")

    return spoil


def strange_images() -> None:
    os.mkfifo("pipe.png")
    os.symlink("/dev/zero", "device.png")
    whole = encode(draw(0, (40, 40)))
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    gif = encode(draw(0, (40, 40)), "GIF")
    Path("cut.gif").write_bytes(gif[: len(gif) // 2])
    Path("script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


@contextmanager
def busy() -> Iterator[None]:
    with FileLock(Path("begun") / LOCK), FileLock(Path("study") / LOCK):
        yield


TRAIN = "train --config digits.py:control --devices 1"
ABLATE = "ablate --config digits.py --arms control --seeds 1 --devices 1"
PHOTOS = "train --config folder.py --config.data.dir=photos --devices 1 --workdir new"
LONG = "n" * 300
BIG = "--config digits.py:control --config.model.features=(1000000,1000000)"
TFDS = "--config.data.name=tfds:../../x"
REPORT = "ablate --report-only --workdir study"
IS_FULL = r"file larger than this process may write|File too large"

FAULTS = {
    "A run's `config.json` is no config": Fault(
        {
            "a list": written("config.json", "[1, 2]"),
            "empty": written("config.json", "{}"),
            "cut": cut("**/config.json"),
            "one digit is another": digit_changed("config.json"),
        },
        {
            f"{TRAIN} --workdir begun": (2, "config.json is (no run's config|damaged|not what)"),
            f"{TRAIN} --workdir run": (2, "config.json is (no run's config|damaged|not what)"),
            "eval --workdir run": (2, "config.json is (no run's config|damaged|not what)"),
            "predict --workdir run image.png": (2, "config.json is (no|damaged|not what)"),
            "export --workdir run --to run.zip": (2, "config.json is (no|damaged|not what)"),
            "table begun": (2, "config.json is (no run's config|damaged|not what)"),
            f"{ABLATE} --workdir study": (2, "config.json is (no run's config|damaged|not what)"),
            REPORT: (2, "config.json is (no run's config|damaged|not what)"),
        },
    ),
    "A folder or a pipe lies where a run's file belongs": Fault(
        {
            "a folder": replaced("config.json", Path.mkdir),
            "a pipe": replaced("config.json", os.mkfifo),
        },
        {
            f"{TRAIN} --workdir run": (2, "run is not empty and holds no run"),
            "eval --workdir run": (
                2,
                "config.json (can't be read: Is a dir|is a pipe or a device)",
            ),
            "predict --workdir run image.png": (2, "config.json (can't be read|is a pipe)"),
            "export --workdir run --to run.zip": (2, "config.json (can't be read|is a pipe)"),
            "table begun": (2, "config.json (can't be read: Is a directory|is a pipe)"),
        },
    ),
    "A folder or a pipe lies where a run's results belong": Fault(
        {
            f"{name}, {kind}": replaced(name, make)
            for name in ("summary.json", "metrics.csv", "dataset.json")
            for kind, make in (("a folder", Path.mkdir), ("a pipe", os.mkfifo))
        },
        {f"{TRAIN} --workdir run": (2, "is a (folder|pipe or a device), expected a file$")},
    ),
    "`checkpoints` or `tensorboard` is a file": Fault(
        {
            "checkpoints": written("checkpoints", ""),
            "tensorboard": written("tensorboard", ""),
        },
        {
            f"{TRAIN} --workdir begun": (
                2,
                "begun/(checkpoints|tensorboard) is a file, expected a folder$",
            )
        },
    ),
    "A run's `summary.json` is no summary": Fault(
        {
            "a list": written("summary.json", "[1]"),
            "cut": cut("**/summary.json"),
            "one digit is another": digit_changed("summary.json"),
        },
        {
            f"{TRAIN} --workdir run": (2, "summary.json is (no|damaged|not what)"),
            "eval --workdir run --devices 1": (2, "summary.json is (no|damaged|not what)"),
            "table run": (2, "summary.json is (no run's summary|damaged|not what)"),
            REPORT: (2, "summary.json is (no run's summary|damaged|not what)"),
        },
    ),
    "A file that a run's page shows is damaged": Fault(
        {
            "no text": written("metrics.csv", ""),
            "other text": written("eval_test.json", '{"classes": 3}'),
            "bytes": replaced("code_version.json", lambda path: path.write_bytes(b"\xff" * 999)),
        },
        {
            "eval --workdir run --devices 1": (
                2,
                r"run/(metrics.csv|eval_test.json|code_version.json) is damaged, and no page can be"
                r" made of it: .{5,150}$",
            ),
        },
    ),
    "A folder lies where a run's evaluation belongs": Fault(
        {
            "of numbers": replaced("eval_test.json", Path.mkdir),
            "of mistakes": replaced("mistakes_test.png", Path.mkdir),
            # Which training does not write.
            "of confusions": lambda: Path("run/confusion_test.png").mkdir(),
        },
        {"eval --workdir run --devices 1": (2, "is a folder, expected a file$|is a directory")},
    ),
    "A workdir has a name that is no UTF-8": Fault(
        {"as it is": nothing},
        dict.fromkeys(
            (f"{TRAIN} --workdir new\udcff", f"{ABLATE} --workdir new\udcff"),
            (
                2,
                r"new\\udcff.* has a name that is no UTF-8, and checkpoints can't be written there",
            ),
        ),
    ),
    "A study's `study.json` is no study": Fault(
        {
            "a list": study_is("[1]"),
            "empty": study_is("{}"),
            "arms are none": study_is('{"name": "digits_mlp", "arms": [1]}'),
            "cut": cut("study/study.json"),
            "a folder": study_is_other(os.mkdir),
            "a pipe": study_is_other(os.mkfifo),
        },
        {
            f"{ABLATE} --workdir study": (2, "^ablate: study"),
            REPORT: (2, "study.json is (no study|damaged)|study is not empty and holds no study"),
        },
    ),
    "No checkpoint of a run can be read": Fault(
        {"all are cut": cut("*/checkpoints/**/*")},
        {
            f"{TRAIN} --workdir begun": (2, "the checkpoint of step 19 cannot be read"),
            "eval --workdir run": (2, "the checkpoint of step 19 cannot be read"),
            "predict --workdir run image.png": (2, "the checkpoint of step 19 cannot be read"),
            "export --workdir run --to run.zip": (2, "the checkpoint of step 19 cannot be read"),
        },
    ),
    "The disk refuses what a command writes": Fault(
        {"it is full": no_space},
        {
            f"{TRAIN} --workdir new": (1, IS_FULL),
            "eval --workdir run --devices 1": (1, IS_FULL),
            "predict --workdir run image.png --json p.json": (1, IS_FULL),
            "predict --workdir run image.png --sheet p.png": (1, IS_FULL),
            "export --workdir run --to run.zip": (1, IS_FULL),
            "inspect photos --sheet s.png": (1, IS_FULL),
            f"{ABLATE} --workdir new": (1, IS_FULL),
            "table run --csv t.csv": (1, IS_FULL),
            REPORT: (1, IS_FULL),
        },
    ),
    "Another process is at work in the workdir": Fault(
        {"it has the lock": busy},
        {f"{TRAIN} --workdir begun": (2, "another process is at work in begun$")},
    ),
    "A name of 300 characters": Fault(
        {"as it is": nothing},
        dict.fromkeys(
            (
                f"{TRAIN} --workdir {LONG}",
                f"{TRAIN} --config.name={LONG}",
                f"{TRAIN} --config.data.name={LONG}",
                f"{TRAIN} --config.model.pretrained={LONG}.h5",
                f"train --config {LONG}.py",
                f"train --config digits.py:{LONG}",
                f"train --config folder.py --config.data.dir={LONG}",
                f"eval --workdir {LONG}",
                f"predict --workdir {LONG} image.png",
                f"predict --workdir run {LONG}.png",
                f"predict --workdir run image.png --csv {LONG}.csv",
                f"export --workdir {LONG}",
                f"export --workdir run --to {LONG}.zip",
                f"table {LONG}",
                f"table run --csv {LONG}",
                f"inspect {LONG}",
                f"inspect photos --sheet {LONG}.png",
                f"{ABLATE} --workdir {LONG}",
                f"ablate --report-only --workdir {LONG}",
                f"ablate --config {LONG}.py --arms control",
                f"bench --config {LONG}",
                f"import {LONG}.h5 --workdir new --config digits.py",
                f"prepare {LONG}",
            ),
            (
                2,
                "name too long|no (arm|dataset|file)|not (exist|found)|up to 100|expected|names",
            ),
        ),
    ),
    "A network larger than the machine": Fault(
        {"as it is": nothing},
        {
            f"train {BIG} --workdir new --devices 1": (
                2,
                "the training state of this network takes 12",
            ),
            f"bench {BIG} --devices 1": (2, "the training state of this network takes 12"),
            f"ablate {BIG.replace(':control', '')} --arms control --workdir new --devices 1": (
                2,
                "arm control: the training state of this network takes 12",
            ),
        },
    ),
    "A number that means nothing": Fault(
        {"as it is": nothing},
        {
            f"{command} --config.{key}={value}": (2, f"{key} is {value}.*, expected")
            for command in (
                "train --config digits.py --workdir new",
                "ablate --config digits.py --arms control --workdir new",
                "bench --config digits.py",
            )
            for key, value in (
                ("data.scale", "0"),
                ("optimizer.learning_rate", "nan"),
                ("optimizer.learning_rate", "inf"),
                ("optimizer.learning_rate", "-1"),
                ("schedule.warmup_epochs", "1"),
            )
        },
    ),
    "A dataset's name that leads elsewhere": Fault(
        {"as it is": nothing},
        dict.fromkeys(
            (
                f"train --config digits.py {TFDS} --workdir new",
                f"ablate --config digits.py --arms control {TFDS} --workdir new",
                f"bench --config digits.py {TFDS}",
                f"eval --workdir run {TFDS}",
                "prepare ../../x",
            ),
            (2, "dataset name '../../x', expected NAME"),
        ),
    ),
    "A pipe, a device, or half an image in place of an image": Fault(
        {"as it is": strange_images},
        {
            "predict --workdir run pipe.png": (2, "pipe.png is no file and no folder"),
            "predict --workdir run device.png": (2, "device.png is no file and no folder"),
            "predict --workdir run cut.png": (
                1,
                "cut.png cannot be decoded: image file is truncated",
            ),
            "predict --workdir run cut.gif": (
                1,
                "cut.gif cannot be decoded: image file is truncated",
            ),
            "predict --workdir run script.png": (1, "script.png is no image"),
        },
    ),
    "A damaged image in a folder": Fault(
        {"cut": cut("photos/train/class0/*.png")},
        {
            PHOTOS: (
                1,
                r"photos/train/class0/\d+.png cannot be decoded: .*data.on_error=skip leaves",
            )
        },
    ),
    "A pipe, a device or another file in place of weights or a config": Fault(
        {"as it is": strange_images},
        {
            "import pipe.png --workdir new --config digits.py": (2, "pipe.png is no file"),
            "import device.png --workdir new --config digits.py": (2, "device.png is no file"),
            "import image.png --workdir new --config digits.py": (2, "holds no weights that Keras"),
            "train --config folder.py --config.data.dir=photos --workdir new --devices 1"
            " --config.model.pretrained=own:pipe.png": (2, "pipe.png"),
            "train --config pipe.png": (2, "config file 'pipe.png' not found"),
            "bench --config device.png": (2, "config file 'device.png' not found"),
            "ablate --config pipe.png --arms control": (2, "config file 'pipe.png' not found"),
        },
    ),
}


def digests() -> dict[str, str]:
    """Returns the digest of each file's content; pipes and links have none, locks are left out."""
    found = {}
    for path in Path().rglob("*"):
        if "__pycache__" not in path.parts and not path.is_dir() and path.name != LOCK:
            regular = path.is_file() and not path.is_symlink()
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if regular else ""
    return found


def call(command: str) -> None:
    name, *argv = shlex.split(command)
    importlib.import_module(f"aim_flax.cli.{MODULES.get(name, name)}").main(argv)


@pytest.fixture(scope="module")
def place(tmp_path_factory, standard_promotion, quick_compile):
    """A finished run, a begun one, a study of two arms, and images."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("place")
    os.chdir(folder)
    Path("digits.py").write_text(config_of(DIGITS, (*SMALL, "train.epochs=1")))
    shown = (*small(Path("unset"))[1:], "memory.shape=(2,2,4)", "memory.update_block.features=(4,)")
    Path("folder.py").write_text(config_of(FOLDER_CONFIG, shown))
    Path("image.png").write_bytes(encode(draw(0)))
    write_folder(Path("photos"), train=12, val=6, test=6)
    call(f"{TRAIN} --workdir run")
    shutil.copytree("run", "begun")
    Path("begun/summary.json").unlink()
    arms = {}
    for arm in ("control", "wide"):
        config = read_json(Path("run/config.json")) | {"arm": arm}
        arms[arm] = {"config": config, "seeds": [0], "overrides": [], "source": None}
        shutil.copytree("run", f"study/{arm}/0")
        files.write_json(Path(f"study/{arm}/0/config.json"), config, sealed=True)
        summary = read_json(Path("run/summary.json")) | {"arm": arm}
        files.write_json(Path(f"study/{arm}/0/summary.json"), summary, sealed=True)
    Path("study/wide/0/summary.json").unlink()
    study = {"name": "digits_mlp", "config": "digits.py", "reference": "control", "commands": []}
    files.write_json(Path("study/study.json"), study | {"arms": arms}, sealed=True)
    os.chdir(before)
    return folder


@pytest.mark.parametrize(
    ("fault", "way"), [(fault, way) for fault, row in FAULTS.items() for way in row.ways]
)
def test_a_fault_is_told_in_one_line_and_costs_nothing(
    place, tmp_path, monkeypatch, capsys, fault, way
):
    shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    row = FAULTS[fault]
    spoil = row.ways[way]
    held = spoil if spoil in (busy, no_space) else None
    if not held:
        spoil()
    before = digests()
    for command, (status, words) in row.ends.items():
        name = command.split()[0]
        monkeypatch.setattr("sys.argv", [name])
        with pytest.raises(SystemExit) as end, held() if held else contextlib.nullcontext():
            call(command)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1, (command, told)
        assert told[0].startswith(f"{name}: "), told
        assert re.search(words, told[0]), (command, told)
        assert end.value.code == status, (command, told)
        assert digests() == before, command


def test_the_page_has_the_same_rows_and_names_tests_that_exist():
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    (_, *rows) = [[cell.strip() for cell in line] for line in lines]
    assert [fault for fault, _, tests in rows if "`test_faults.py`" in tests] == [*FAULTS]
    for fault, promise, tests in rows:
        named = re.findall(r"`(\w+\.py)(?:::(\w+))?`", tests)
        assert named, fault
        for file, test in named:
            text = Path(__file__).with_name(file).read_text()
            assert file == "test_faults.py" or f"\ndef {test}(" in text, tests
        # A promise of statuses is the table's.
        if fault in FAULTS:
            statuses = {status for status, _ in FAULTS[fault].ends.values()}
            first = int(re.match(r"status (\d)", promise)[1])
            assert first in statuses
            assert statuses <= {first, *map(int, re.findall(r"\b[12]\b", promise))}
