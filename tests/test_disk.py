"""A disk that is full or gone while a run trains: one line, and nothing lost."""

import contextlib
import errno
import gc
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from aim_flax.cli import ablate as ablate_command
from aim_flax.cli import train as train_command
from aim_flax.console import without_noise
from aim_flax.errors import StorageError
from aim_flax.train import loop
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import Experiment
from aim_flax.train.report import Events
from tests.asserts import fails, refused
from tests.disks import no_space, small_disk
from tests.processes import after_calls
from tests.runs import DIGITS, SMALL, assert_same_end, digits, flags, history, scalars

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

# A checkpoint after each epoch, of 19 steps.
OFTEN = ("train.epochs=4", "train.checkpoint_minutes=0.0")
FULL = "file larger than this process may write"


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """As in commands."""
    end = without_noise()
    yield
    gc.collect()
    end()


@pytest.fixture(scope="module")
def experiment(standard_promotion, quick_compile):
    return Experiment(digits("control", *OFTEN), 1)


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.train(experiment, workdir, quiet=True)
    return workdir


@pytest.fixture
def unsaved(experiment):
    """The same, without a checkpoint before the end, which could be under way."""
    other = experiment.with_seed(0)
    with other.config.unlocked():
        other.config.train.checkpoint_minutes = 10.0
    return other


def leftovers(folder: Path) -> list[str]:
    # A folder that is renamed meanwhile is no error to os.walk.
    found = [(place, name) for place, *names in os.walk(folder) for name in sum(names, [])]
    return [os.path.join(place, name) for place, name in found if "tmp" in name]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def steps(workdir: Path) -> list[int]:
    return Checkpoints(workdir / "checkpoints", read_only=True).steps


@contextlib.contextmanager
def full(after: int, before: float = math.inf) -> Iterator[None]:
    """The disk is full from after one step to before another is taken.

    What is being written at these moments comes to its end first.
    """
    saved: list[Checkpoints] = []
    save = Checkpoints.save

    def noted(checkpoints: Checkpoints, *args, **kwargs) -> None:
        saved.append(checkpoints)
        save(checkpoints, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        there = contextlib.ExitStack()
        stack.enter_context(there)

        def hook(experiment, start, metrics):
            step = start + metrics["loss"].shape[1]
            if step in (after, before):
                # Orbax's manager waits no longer once a file is refused, but its thread goes on.
                while saved and not (saved[-1].is_written and "async_save" not in threads()):
                    time.sleep(0.01)
            if step == after:
                there.enter_context(no_space())
            elif step == before:
                there.close()

        stack.enter_context(after_calls(hook))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(Checkpoints, "save", noted)
        yield


def test_checkpoints_that_fail_are_tried_again_while_training_goes_on(
    experiment, whole, tmp_path, capsys
):
    run = tmp_path / "run"
    with full(38, 76):
        loop.train(experiment, run, quiet=False)
    told = [line for line in capsys.readouterr().out.splitlines() if "checkpoint" in line]
    assert told == [
        f"{FULL}: the checkpoint of step {step} could not be written, that of step 19 is whole;"
        " training goes on, and the next one is tried"
        for step in (38, 57)
    ]
    assert steps(run) == [19, 76]
    assert leftovers(run) == []
    assert_same_end(whole, run)
    assert list(scalars(run, "val/accuracy")) == [19, 38, 57, 76]


def test_a_checkpoint_that_takes_too_long_is_tried_again(
    experiment, whole, tmp_path, capsys, monkeypatch
):
    """As where the process, or a laptop, was stopped while it was written."""
    original, run = ocp.CheckpointManager.wait_until_finished, tmp_path / "run"
    late = iter([TimeoutError("ChainedFuture completed 2/6 futures but timed out after 600.00 s")])

    def wait(manager) -> None:
        original(manager)
        if (written := run / "checkpoints" / "19").is_dir():
            for error in late:
                shutil.rmtree(written)
                raise error

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
    loop.train(experiment, run, quiet=False)
    told = [line for line in capsys.readouterr().out.splitlines() if "checkpoint" in line]
    assert len(told) == 1
    assert told[0].startswith(
        "disk too slow, or this process was stopped meanwhile: the checkpoint of step 19 could not"
        " be written"
    )
    assert told[0].endswith("training goes on, and the next one is tried")
    assert steps(run)[-1] == 76
    assert leftovers(run) == []
    assert_same_end(whole, run)


def test_a_checkpoint_that_comes_whole_after_all_is_one(
    experiment, whole, tmp_path, capsys, monkeypatch
):
    """Orbax may tell that one file was refused while its threads still write the others, which
    succeed if the disk has room again within that moment."""
    original, run = ocp.CheckpointManager.wait_until_finished, tmp_path / "run"
    early = iter([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])

    def wait(manager) -> None:
        if manager.is_saving_in_progress():
            for error in early:
                raise error
        original(manager)

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
    loop.train(experiment, run, quiet=False)
    assert next(early, None) is None
    assert "could not be written" not in capsys.readouterr().out
    assert steps(run)[-1] == 76
    assert leftovers(run) == []
    assert_same_end(whole, run)


def test_one_of_a_step_that_cannot_be_set_aside_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    best = {"params": {"kernel": np.zeros(3, np.float32)}}
    checkpoints.save(1, {"best_step": 1}, best=best)
    checkpoints.wait()

    def rename(path, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, refused("disk full: the .* step 1 ", kind=StorageError):
        patch.setattr(Path, "rename", rename)
        checkpoints.save(1, {"best_step": 1}, best=best)
    assert checkpoints.steps == [1]
    checkpoints.close()


def test_a_run_that_cannot_write_its_results_ends_and_goes_on_later(experiment, whole, tmp_path):
    run = tmp_path / "run"
    message = f"^{FULL} at step 76; the checkpoint of step 38 is whole; raise the limit and start"
    with refused(message, kind=StorageError), full(57):
        loop.train(experiment, run, quiet=True)
    assert steps(run) == [19, 38]
    assert leftovers(run) == []
    assert not (run / "summary.json").exists()
    assert history(run)["epoch"].tolist() == [1, 2]
    loop.train(experiment, run, quiet=True)
    assert_same_end(whole, run)


def test_results_alone_that_cannot_be_written_cost_no_step(
    experiment, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    original = loop.write_results

    def write(*args):
        with no_space():
            original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_results", write)
        with refused(f"^{FULL} at step 76; the checkpoint of step 76 is whole", kind=StorageError):
            loop.train(experiment, run, quiet=True)
    assert leftovers(run) == []
    trained = []
    with after_calls(lambda *call: trained.append(call)):
        loop.train(experiment, run, quiet=True)
    assert trained == []
    assert_same_end(whole, run)


def test_a_signal_on_a_full_disk_says_what_is_saved(experiment, tmp_path):
    run = tmp_path / "run"

    def stop(experiment, start, metrics):
        if start == 19:
            os.kill(os.getpid(), signal.SIGTERM)

    message = f"^{FULL} at step 38; the checkpoint of step 19 is whole"
    with refused(message, kind=StorageError), after_calls(stop), full(38):
        loop.train(experiment, run, quiet=True)
    assert steps(run) == [19]


@pytest.mark.slow
def test_a_study_stops_in_one_line_and_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablate.py"])
    study, undisturbed = tmp_path / "study", tmp_path / "undisturbed"
    argv = ["--config", DIGITS, "--arms", "control", "--seeds", "2", "--devices", "1"]
    argv += flags(*SMALL[:1], *OFTEN)

    def ablate(folder):
        ablate_command.main([*argv, "--workdir", str(folder)])

    with pytest.raises(SystemExit) as end, full(57):
        ablate(study)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ablate.py: {FULL} at step 76; the checkpoint of step 38 is whole;")
    assert leftovers(study) == []
    ablate(study)
    assert "resuming 2 seeds of control at step 38" in capsys.readouterr().out
    ablate(undisturbed)
    for seed in ("0", "1"):
        assert_same_end(study / "control" / seed, undisturbed / "control" / seed)


def test_a_workdir_that_is_deleted_ends_the_run_and_stays_deleted(unsaved, tmp_path):
    run = tmp_path / "run"

    def delete(experiment, start, metrics):
        if start == 38:
            shutil.rmtree(run)

    message = f"^{run} was deleted, moved or emptied while the run was at step 57; it ends here"
    with after_calls(delete), refused(message, kind=StorageError):
        loop.train(unsaved, run, quiet=True)
    assert not run.exists()


def test_a_workdir_that_is_deleted_while_a_checkpoint_is_written_holds_no_run(experiment, tmp_path):
    run = tmp_path / "run"

    def delete(experiment, start, metrics):
        if start == 38:
            run.rename(tmp_path / "deleted")

    with after_calls(delete), refused("was deleted, moved or emptied", kind=StorageError):
        loop.train(experiment, run, quiet=True)
    assert not (run / "config.json").exists()
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("way", ["moved", "emptied", "replaced"])
def test_a_workdir_that_is_another_is_left_alone(unsaved, tmp_path, way):
    run = tmp_path / "run"

    def change(experiment, start, metrics):
        if start != 38:
            return
        if way == "emptied":
            for path in run.iterdir():
                if not path.name.startswith("."):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            run.rename(tmp_path / "elsewhere")
        if way == "replaced":
            shutil.copytree(tmp_path / "elsewhere", run)

    with after_calls(change), refused("was deleted, moved or emptied", kind=StorageError):
        loop.train(unsaved, run, quiet=True)
    assert run.exists() == (way != "moved")
    assert not (run / "summary.json").exists()
    if way != "emptied":
        # What was moved goes on.
        shutil.rmtree(run, ignore_errors=True)
        (tmp_path / "elsewhere").rename(run)
        assert loop.train(unsaved, run, quiet=True)["steps"] == 76


def test_a_study_that_is_deleted_ends_and_stays_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablate.py"])
    study = tmp_path / "study"
    argv = ["--config", DIGITS, "--arms", "control", "--seeds", "2", "--devices", "1"]
    argv += [*flags(*SMALL[:1], OFTEN[0]), "--workdir", str(study)]

    def delete(experiment, start, metrics):
        if start == 38:
            shutil.rmtree(study)

    with after_calls(delete), pytest.raises(SystemExit) as end:
        ablate_command.main(argv)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    folders = ", ".join(str(study / "control" / seed) for seed in ("0", "1"))
    assert line.startswith(f"ablate.py: {folders} was deleted, moved or emptied")
    assert not study.exists()


def test_a_small_disk_is_warned_of_and_a_full_one_told(tmp_path, monkeypatch, capsys):
    """With a disk that is truly full, where one can be mounted."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["--config", f"{DIGITS}:control", "--devices", "1", "--workdir", str(disk / "run")]
    argv += flags("model.features=(128,128)", *OFTEN)
    with small_disk(disk, 1000) as mounted:
        if not mounted:
            pytest.skip("no disk can be mounted here")
        with pytest.raises(SystemExit) as end:
            train_command.main(argv)
        assert end.value.code == 1
        output = capsys.readouterr()
        assert "fewer than three fit, of which two are kept" in output.out
        assert "disk full: the checkpoint of step" in output.out
        (line,) = output.err.splitlines()
        assert line.startswith("train.py: disk full at step 76; the checkpoint of step ")
        assert line.endswith(" is whole; free space and start the same command again")
        assert leftovers(disk) == []
        shutil.copytree(disk / "run", tmp_path / "run")
    train_command.main([*argv[:5], str(tmp_path / "run"), *argv[6:]])
    assert "resuming" in capsys.readouterr().out


def test_events_that_cannot_be_written_are_written_later(tmp_path):
    row = {"step": 19, "memory_use": {}, "learning_rate": 0.1} | dict.fromkeys(
        ("train_loss", "train_accuracy", "val_loss", "val_accuracy"), 0.5
    )
    events = Events(tmp_path, 0)
    events.write(row | {"step": 1}, None)
    with no_space(1000):
        for step in range(2, 30):
            events.write(row | {"step": step}, None)
    events.write(row | {"step": 30}, None)
    assert scalars(tmp_path, "train/loss") == dict.fromkeys(range(1, 31), 0.5)


def test_a_disk_that_is_full_at_the_start_leaves_nothing_half(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    argv = ["--config", f"{DIGITS}:control", "--devices", "1", "--workdir", str(tmp_path / "run")]
    with no_space():
        line = fails(capsys, train_command.main, *argv, status=1)
    assert line.startswith(f"train.py: {FULL} while {tmp_path / 'run'} was written to; ")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
