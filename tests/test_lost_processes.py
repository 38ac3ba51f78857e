"""One of several processes dies, hangs or fails: the others end within 30 s, and say who it was."""

import os
import signal
import subprocess
import time

import pytest

from aim_flax.train import loop
from aim_flax.watch import LOST
from tests.photos import FOLDER_CONFIG, small, write_folder
from tests.processes import (
    children,
    end_all,
    finish,
    free_port,
    interrupted,
    lines_until,
    start,
    start_one,
    start_several,
    until_saved,
)
from tests.runs import DIGITS, SMALL, assert_same_end, digits, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion", "quick_compile")]

NO_SIGN = "died, or gave no sign of life for 15 s"


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    end_all()


def told(process: subprocess.Popen, seconds: float = 30.0) -> list[str]:
    """Returns the lines that a process said in the end, which comes within so many seconds."""
    output = process.communicate(timeout=seconds)[0]
    return [line for line in output.splitlines() if line.startswith("train.py: ")]


@pytest.mark.parametrize(
    ("minutes", "epochs", "length"), [(0.0, 6, 5), (60.0, 12, 1)], ids=["saving", "computing"]
)
def test_a_run_that_lost_a_process_goes_on_bit_for_bit(tmp_path, minutes, epochs, length):
    """First a process without its parent, as by lack of memory, then process 0 with its parent, as
    when a host is gone; while checkpoints are written, one after the other, and between them."""
    options = (f"train.epochs={epochs}", f"train.steps_per_call={length}")
    options = (*options, f"train.checkpoint_minutes={minutes}")
    run = (2, f"{DIGITS}:aim_state", tmp_path / "two", *SMALL, *options)

    first, second = start_several(*run)
    lines_until(first, "step")
    if minutes:
        first.send_signal(signal.SIGUSR1)
    until_saved(tmp_path / "two")
    (child,) = children(second)
    os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    (line,) = told(first)
    assert time.monotonic() - began < 30
    assert f"process 1 of 2 (on {os.uname().nodename}) {NO_SIGN}; the same command" in line
    assert "goes on at step" in line
    (line,) = told(second)
    assert "process 1 of 2" in line
    assert "was ended by SIGKILL" in line
    assert (first.returncode, second.returncode) == (LOST, 128 + signal.SIGKILL)
    log = (tmp_path / "two" / "lost_0.log").read_text()
    assert "the JAX distributed service detected fatal errors" in log

    first, second = start_several(*run)
    assert any(line.startswith("resuming") for line in lines_until(first, "step"))
    (child,) = children(first)
    first.kill()
    os.kill(child, signal.SIGKILL)
    (line,) = told(second)
    assert f"process 0 of 2 (on {os.uname().nodename}) {NO_SIGN}" in line
    assert second.returncode == LOST
    first.communicate()

    outputs = finish(*start_several(*run))
    assert "resuming" in outputs[0]
    loop.run(digits("aim_state", *options), tmp_path / "one", 2, quiet=True)
    assert_same_end(tmp_path / "two", tmp_path / "one")


# train.py of a process that dies when it restores a checkpoint.
_DIES = """
import os
import signal
from aim_flax.cli.train import main
from aim_flax.train.checkpoint import Checkpoints

restore = Checkpoints.restore

def die(self, *arguments):
    if {has_read}:
        restore(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.restore = die
main()
"""


@pytest.mark.parametrize(("index", "has_read"), [(1, False), (1, True), (0, False)])
def test_a_process_that_dies_while_all_restore_is_lost(tmp_path, index, has_read):
    """Before the first step; nothing is lost."""
    options = ("train.epochs=3",)
    config, run = digits("aim_state", *options), tmp_path / "run"
    with interrupted(19, "saved at step 38"):
        loop.run(config, run, 2, quiet=True)
    before = snapshot(run / "checkpoints")
    dies = tmp_path / "train.py"
    dies.write_text(_DIES.format(has_read=has_read))
    command = (2, f"{DIGITS}:aim_state", run, *SMALL, *options)
    processes = start_several(*command, scripts={index: dies})
    processes[index].wait(timeout=300)
    (line,) = told(processes[1 - index])
    assert f"process {index} of 2 (on {os.uname().nodename}) {NO_SIGN}" in line
    assert line.endswith(f"goes on at step 38 (lost_{1 - index}.log has JAX's words)")
    assert processes[1 - index].returncode == LOST
    assert processes[index].returncode == 128 + signal.SIGKILL
    assert snapshot(run / "checkpoints") == before


def test_a_process_that_hangs_is_lost(tmp_path):
    """Once it goes on, it ends too."""
    first, second = start_several(2, DIGITS, tmp_path, *SMALL, "train.epochs=10000")
    lines_until(first, "step")
    (child,) = children(second)
    os.kill(child, signal.SIGSTOP)
    (line,) = told(first)
    assert f"process 1 of 2 (on {os.uname().nodename}) {NO_SIGN}" in line
    os.kill(child, signal.SIGCONT)
    (line,) = told(second)
    assert first.returncode == second.returncode == LOST


def test_an_error_that_one_process_has_ends_all(tmp_path):
    """It says what is wrong, and the others that it is gone."""
    photographs = write_folder(tmp_path / "photographs", train=120)
    (photographs / "train" / "class1" / "0001.png").write_bytes(b"garbage")
    options = small(photographs, "data.in_memory_mb=0.0", "train.epochs=100")
    run = (2, f"{FOLDER_CONFIG}:control", tmp_path / "run", *options)
    processes = start_several(*run)
    lines = {}
    for process in processes:
        (line,) = told(process, 120)
        lines[process.returncode] = line
    assert set(lines) == {1, LOST}
    assert "0001.png" in lines[1]
    assert "died, or gave no sign" in lines[LOST]


def test_processes_with_different_configs_do_not_train(tmp_path):
    port, run = free_port(), (DIGITS, tmp_path / "run", *SMALL)
    processes = [start_one(index, 2, port, *run, f"seed={index}") for index in (0, 1)]
    for process in processes:
        (line,) = told(process, 60)
        assert "process 1 was started with another config than process 0" in line
        assert process.returncode == 2
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_come_up_are_not_waited_for(tmp_path):
    port, run = free_port(), (DIGITS, tmp_path / "run", *SMALL)
    process = start_one(1, 2, port, *run, more=("--start-timeout", "4"))
    (line,) = told(process, 60)
    assert line.startswith("train.py: not all processes came up within 4 s")
    assert process.returncode == LOST
    assert not (tmp_path / "run").exists()


def test_processes_must_be_told_where_the_others_are(tmp_path):
    process = start("train.py", "--config", DIGITS, "--distributed", folder=tmp_path)
    (line,) = told(process, 60)
    assert line.startswith(
        "train.py: --distributed: there is no SLURM, Open MPI, Kubernetes or TPU"
    )
    assert process.returncode == 2
    assert not list(tmp_path.iterdir())
