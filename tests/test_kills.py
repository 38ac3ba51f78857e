"""Runs that are killed again and again end bit for bit as those that never were."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.photos import write_folder
from tests.runs import DIGITS, ROOT, SMALL, assert_same_end, flags
from tests.test_study_run import assert_same_report

# CI, whose time is short, asks for fewer.
KILLS = int(os.environ.get("AIM_FLAX_KILLS", "25"))
OFTEN = ("train.checkpoint_minutes=0.0", "train.steps_per_call=5")
# Where orbax writes before a checkpoint is whole: of a run, and of a group of seeds.
UNFINISHED = ("s/checkpoints/*tmp*", "s/.groups/*/*/checkpoints/*tmp*")


class Zygote:
    """Runs commands in forks of a process that has imported everything; see zygote.py."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, module: str, argv: list[str], folder: Path) -> int:
        """Starts a command, whose output goes to `output` in its folder; returns its process id."""
        command = {"module": f"aim_flax.cli.{module}", "argv": argv, "folder": str(folder)}
        command["output"] = str(folder / "output")
        self._process.stdin.write(json.dumps(command) + "\n")
        return int(self._process.stdout.readline())

    def has_ended(self) -> bool:
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def status(self) -> int:
        """Waits for the command's end; returns its exit status, or minus the signal of it."""
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


def is_saving(folder: Path) -> bool:
    return any(True for pattern in UNFINISHED for _ in folder.glob(pattern))


def wait_for(zygote: Zygote, condition: Callable[[], bool]) -> bool:
    """Returns whether it came true before the command's end."""
    while not condition():
        if zygote.has_ended():
            return False
        time.sleep(0.0005)
    return True


@dataclasses.dataclass
class Kills:
    """How many lives ended so, left half a checkpoint, and went on from a whole one."""

    killed: int = 0
    while_saving: int = 0
    resumed: int = 0


def live(zygote: Zygote, command: tuple[str, list[str]], folder: Path, rng, kills: Kills) -> bool:
    """Starts a command and kills it; returns whether it came to its end before.

    Every second one is killed while a checkpoint is written, others at any moment after their
    training began.
    """
    output = folder / "output"
    before = output.stat().st_size if output.exists() else 0
    pid = zygote.start(*command, folder)

    def said(words: bytes) -> bool:
        return output.exists() and words in output.read_bytes()[before:]

    if wait_for(zygote, lambda: said(b"step ")):
        # One of the next calls; each is followed by a checkpoint.
        time.sleep(rng.uniform(0, 0.4))
        if kills.killed % 2:
            wait_for(zygote, lambda: not is_saving(folder))
            wait_for(zygote, lambda: is_saving(folder))
            time.sleep(rng.uniform(0, 0.03))
        if not zygote.has_ended():
            os.kill(pid, signal.SIGKILL)
    status = zygote.status()
    kills.resumed += said(b"resuming")
    if status == -signal.SIGKILL:
        kills.killed += 1
        kills.while_saving += is_saving(folder)
        return False
    assert status == 0, output.read_text()
    return True


def lone(tmp_path: Path) -> tuple[str, list[str]]:
    small = flags(*SMALL, "train.epochs=12", *OFTEN)
    return "train", ["--config", f"{DIGITS}:aim_state", *small, "--workdir", "s"]


def study(tmp_path: Path) -> tuple[str, list[str]]:
    """Three seeds as one program."""
    small = flags(*SMALL, "train.epochs=8", *OFTEN)
    arms = ["--arms", "aim_direct,control", "--seeds", "3", "--seeds-per-program", "3"]
    return "ablate", ["--config", DIGITS, *arms, *small, "--workdir", "s"]


def streamed(tmp_path: Path) -> tuple[str, list[str]]:
    photos = write_folder(tmp_path / "photos", train=120, val=12, test=12)
    data = ("data.name=folder", f"data.dir={photos}", "data.image_shape=(8,8,3)", "data.threads=2")
    sizes = ("model.num_classes=None", "train.batch_size=8", "eval.batch_size=8", "train.epochs=16")
    # What is streamed has a step per call, and most of them without a checkpoint.
    often = "train.checkpoint_minutes=0.003"
    small = flags(*SMALL, *data, *sizes, "data.scale=255.0", "data.in_memory_mb=0.0", often)
    return "train", ["--config", f"{DIGITS}:aim_state", *small, "--workdir", "s"]


def assert_same(whole: Path, parts: Path) -> None:
    if (whole / "s" / "study.json").exists():
        assert_same_report(parts / "s", whole / "s")
    runs = sorted(file.parent.relative_to(whole) for file in whole.rglob("summary.json"))
    assert runs
    for run in runs:
        assert_same_end(whole / run, parts / run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lone, study, streamed])
def test_what_is_killed_again_and_again_ends_bit_equal(tmp_path, zygote, kind):
    command, rng, kills = kind(tmp_path), np.random.default_rng(0), Kills()

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    whole = folder("whole")
    zygote.start(*command, whole)
    assert zygote.status() == 0, (whole / "output").read_text()
    rounds = [folder("round0")]
    while kills.killed < KILLS:
        if live(zygote, command, rounds[-1], rng, kills):
            rounds.append(folder(f"round{len(rounds)}"))
    zygote.start(*command, rounds[-1])
    assert zygote.status() == 0, (rounds[-1] / "output").read_text()
    for parts in rounds:
        assert_same(whole, parts)
        assert list(parts.rglob("*.tmp")) + list(parts.rglob("*orbax-checkpoint-tmp")) == []
    assert kills.while_saving >= KILLS // 2 - 2, kills
    assert kills.resumed >= KILLS // 2, kills
