"""A study whose runs several processes train beside each other."""

import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import pytest

from aim_flax.cli import ablate as ablate_command
from aim_flax.study import run as studies
from aim_flax.study import workers
from aim_flax.study.plan import plan
from aim_flax.study.work import Work
from aim_flax.train.experiment import Experiment
from tests.asserts import fails, refused
from tests.photos import write_folder
from tests.processes import children, finish, lines_until, start
from tests.runs import DIGITS, ROOT, SMALL, assert_same_end, digits, flags, read_csv, read_json

pytestmark = pytest.mark.usefixtures("standard_promotion")

ONE_CORE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
COMMAND = ("ablate.py", "--config", DIGITS, *flags(*SMALL), "--arms", "control,aim_direct")
COMMAND += ("--seeds", "2", "--seeds-per-program", "1")


def works(*arms: str) -> list[Work]:
    """Items of work of arms that are known by name only."""

    class Named:
        def __init__(self, arm: str):
            self.config = digits(arm)

    named = {arm: Named(arm) for arm in dict.fromkeys(arms)}
    return [Work(named[arm], [i]) for i, arm in enumerate(arms)]


def test_a_process_stays_with_its_arm_and_then_takes_one_that_no_other_is_at():
    left = works("control", "control", "aim", "control", "aim", "aim_state")

    def take(arm: str | None, *others: str) -> str:
        return workers._next(left, arm, others).label

    assert take(None) == "control seed 0"
    assert take(None, "control") == "aim seed 2"
    assert take("control", "aim") == "control seed 1"
    assert take("aim", "control") == "aim seed 4"
    assert take("aim", "control") == "aim_state seed 5"
    assert take("aim", "control") == "control seed 3"
    assert left == []


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, 8, 3, 3, (32, 32))
    return folder


def small_resnet(photos: Path, *assignments: str) -> list[Work]:
    changes = ("model.stage_sizes=(1,)", "model.width=4", "train.batch_size=4", *assignments)
    config = str(ROOT / "configs" / "small_resnet.py")
    overrides = [f"data.dir={photos}", "memory.update_after=", *changes]
    study = plan(config, ["published", "control_stride1"], "3", overrides=overrides)
    arms = [Experiment(arm.config, 1) for arm in study.arms.values()]
    return [Work(experiment, [seed]) for experiment in arms for seed in range(3)]


def test_one_process_for_each_core_where_that_saves_time(photos, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    much, little = small_resnet(photos, "train.epochs=2000"), small_resnet(photos, "train.epochs=3")
    assert workers.how_many(much, None) == 4
    assert workers.how_many(much[:2], 1) == 2
    assert workers.how_many(little, None) == 1
    assert workers.how_many([], None) == 1
    # Its seeds are trained as one program.
    assert workers.how_many([Work(Experiment(digits("control"), 1), [0])] * 1000, None) == 1
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert workers.how_many(much, None) == 1
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    step = workers._bytes_of_step(much[0].experiment)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 5 * step, "SC_PAGE_SIZE": 1}.get)
    assert workers.how_many(much, None) == 2


def test_a_step_holds_at_least_its_activations_twice(photos):
    """Of a network without hidden layers: images as floats, and logits."""
    one, two = (
        Experiment(digits("control", "model.features=()", f"train.batch_size={size}"), 1)
        for size in (32, 64)
    )
    grown = workers._bytes_of_step(two) - workers._bytes_of_step(one)
    assert grown >= 2 * 4 * 32 * 10
    assert workers._bytes_of_step(one) >= 2 * 1797 * 64


def test_workers_are_a_number(capsys):
    argv = ("--config", DIGITS, "--arms", "aim", "--workers", "0")
    assert "expected a number of at least 1, or auto" in fails(capsys, ablate_command.main, *argv)


def test_what_workers_cannot_be_is_told(tmp_path, monkeypatch):
    def run(count: int, devices: int | None = None) -> None:
        studies.run(plan(DIGITS, ["aim"], "1"), tmp_path / "s", device_count=devices, workers=count)

    with refused("^workers: 0, expected at least 1, or auto$"):
        run(0)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with refused("^workers: 2, each of one device, but there are 8: --devices 1 takes one$"):
        run(2)
    with refused("^workers: 2, each of one device, but there are 4: --devices 1 takes one$"):
        run(2, 4)
    with monkeypatch.context() as patch, refused("no cores of their own$"):
        patch.setattr(workers, "_HAS_CORES", False)
        run(2, 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with refused("^workers: 2, but they are for CPUs, and this is a gpu: start the same command"):
        run(2, 1)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    """On as many cores each, to the bit; the two are told to stop, and go on."""
    cores = sorted(os.sched_getaffinity(0))
    one, two = tmp_path / "one", tmp_path / "two"
    command = (*COMMAND, "--config.train.epochs=8", "--workers")
    alone = start(*command, "1", "--workdir", one, **ONE_CORE)
    os.sched_setaffinity(alone.pid, cores[:1])
    finish(alone)

    def start_two() -> subprocess.Popen:
        process = start(*command, "2", "--workdir", two, **ONE_CORE)
        os.sched_setaffinity(process.pid, cores[:2])
        return process

    process = start_two()
    assert lines_until(process, "step ")[0] == "2 processes, each on cores of its own\n"
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert rest.endswith(
        "ablate.py: SIGTERM: all that was begun is saved; the same command continues from there\n"
    )
    assert not (two / "results.csv").exists()
    (output,) = finish(start_two())
    assert (output + rest).count(": test accuracy ") == 4
    assert read_json(two / "progress.json")["share"] == 1
    assert [row["status"] for row in read_csv(two / "results.csv")] == ["finished"] * 4
    for run in ("control/0", "control/1", "aim_direct/0", "aim_direct/1"):
        assert_same_end(one / run, two / run)


@pytest.mark.slow
def test_processes_end_with_the_command_and_it_with_them(tmp_path):
    command = (*COMMAND, "--config.train.epochs=3000", "--workers", "2", "--workdir", tmp_path)
    process = start(*command, **ONE_CORE)
    lines_until(process, "step ")
    others = children(process)
    assert len(others) == 2
    os.kill(others[0], signal.SIGKILL)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 1, rest
    assert "ablate.py: a process that trained " in rest
    assert " ended (SIGKILL); if that was for memory, --workers 1 needs less; the same" in rest
    assert not is_alive(others[1])

    process = start(*command, **ONE_CORE)
    lines_until(process, "step ")
    others = children(process)
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(map(is_alive, others)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, others))


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    # Of a process whose parent has ended nobody may have asked how it ended.
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
