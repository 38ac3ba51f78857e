"""Checkpoints: what is kept, and what happens to damaged ones."""

import shutil

import numpy as np
import pytest

from aim_flax.errors import UsageError
from aim_flax.train import loop, restore
from aim_flax.train.checkpoint import Checkpoints
from tests.test_training import assert_same_end, digits

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


def state(value: float) -> dict:
    return {"kernel": np.full((300, 70), value, np.float32), "step": np.asarray(3), "none": ()}


def save(directory, best_steps) -> Checkpoints:
    checkpoints = Checkpoints(directory)
    for step, best in enumerate(best_steps, start=1):
        checkpoints.save(step, state(step), {"best_step": best, "history": [{"x": 0.1 + step}]})
    checkpoints.wait()
    return checkpoints


def test_latest_two_and_best_are_kept(tmp_path):
    checkpoints = save(tmp_path, [1, 2, 2, 2, 2])
    assert checkpoints.steps == [2, 4, 5]
    assert checkpoints.best_step() == 2
    restored, progress, messages = checkpoints.restore_latest(state(0))
    np.testing.assert_array_equal(restored["kernel"], state(5)["kernel"])
    assert progress == {"best_step": 2, "history": [{"x": 5.1}]}
    assert messages == []
    checkpoints.close()


def test_reopened_directory_still_keeps_the_best(tmp_path):
    save(tmp_path, [1, 1, 1]).close()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore_latest(state(0))
    checkpoints.save(4, state(4), {"best_step": 1, "history": []})
    checkpoints.wait()
    assert checkpoints.steps == [1, 3, 4]
    checkpoints.close()


def test_empty_directory_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(state(0)) is None
    with pytest.raises(UsageError, match="no best checkpoint in .* no epoch was finished"):
        checkpoints.best_step()
    checkpoints.close()


# Tensorstore's background tasks may fail on the damaged file after restoring has.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_file_cut_short_is_noticed_or_makes_no_difference(tmp_path, capfd):
    save(tmp_path / "good", [1, 2]).close()
    files = [p.relative_to(tmp_path / "good") for p in (tmp_path / "good" / "2").rglob("*")]
    fallen_back = 0
    for file in files:
        original = tmp_path / "good" / file
        if not original.is_file():
            continue
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        content = original.read_bytes()
        (tmp_path / "bad" / file).write_bytes(content[: len(content) // 2])
        checkpoints = Checkpoints(tmp_path / "bad")
        restored, progress, messages = checkpoints.restore_latest(state(0))
        checkpoints.close()
        if messages:
            fallen_back += 1
            assert messages[0].startswith("the checkpoint of step 2 cannot be read: ")
        value = 1 if messages else 2
        np.testing.assert_array_equal(restored["kernel"], state(value)["kernel"])
        assert progress["history"] == [{"x": 0.1 + value}]
    assert fallen_back >= 3
    assert "Traceback" not in capfd.readouterr().err


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, capsys):
    config = digits("aim_state", "train.epochs=3")
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    loop.run(config, whole, 1, quiet=True)
    shutil.copytree(whole, damaged)
    (damaged / "summary.json").unlink()
    latest = damaged / "checkpoints" / "57"
    for file in latest.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert restore.restore_run(damaged, "latest").step == 38
    loop.run(config, damaged, 1, quiet=True)
    output = capsys.readouterr().out
    assert "the checkpoint of step 57 cannot be read" in output
    assert "going back to step 38" in output
    assert_same_end(whole, damaged)
    assert (damaged / "checkpoints" / "damaged-57").is_dir()


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    save(tmp_path, [1, 2]).close()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    names = sorted(p.name for p in tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UsageError, match="step 2 cannot be read.*step 1 cannot be read"):
        checkpoints.restore_latest(state(0))
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.rglob("*")) == names
