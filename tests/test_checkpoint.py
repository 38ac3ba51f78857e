"""Checkpoints: what is kept, and what happens to damaged ones."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from aim_flax.errors import UsageError
from aim_flax.train import loop, restore
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.step import TrainState, variables_of
from tests.asserts import assert_equal, refused
from tests.runs import assert_same_end, digits

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


def state(value: float) -> TrainState:
    params = {"kernel": np.full((300, 70), value, np.float32), "none": ()}
    return TrainState(np.asarray(3), params, {}, (), np.ones(()))


def progress(step: int, best_step: int | None) -> dict:
    return {"best_step": best_step, "history": [{"x": 0.1 + step}]}


def save(directory, best_steps) -> Checkpoints:
    """Checkpoints of steps 1, 2, ...; a step's network has its number in its parameters."""
    checkpoints = Checkpoints(directory)
    for step, best in enumerate(best_steps, start=1):
        own = None if best in (None, step) else variables_of(state(best))
        checkpoints.save(step, progress(step, best), state(step), own)
    checkpoints.wait()
    return checkpoints


def value_of(variables) -> float:
    (value,) = np.unique(variables["params"]["kernel"])
    return value


def test_latest_two_are_kept_and_the_best_in_each(tmp_path):
    checkpoints = save(tmp_path, [1, 2, 2, 2, 2])
    assert checkpoints.steps == [4, 5]
    found, messages = checkpoints.latest(state(0))
    assert (found.step, found.progress, messages) == (5, progress(5, 2), [])
    assert value_of(variables_of(found.state)) == 5
    for which, step in (("best", 2), ("latest", 5), (4, 4), ("2", 2)):
        variables, found_step = checkpoints.variables(which, state(0))
        assert value_of(variables) == found_step == step
    with refused("no checkpoint of step 3 in .*; there: 2, 4, 5$"):
        checkpoints.variables(3, state(0))
    checkpoints.close()


def test_a_best_network_with_its_own_checkpoint_is_found(tmp_path):
    """As runs were saved before a checkpoint held its best network."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, progress(step, 1), state(step))
    checkpoints.wait()
    assert value_of(checkpoints.latest(state(0))[0].best) == 1
    assert value_of(checkpoints.variables("best", state(0))[0]) == 1
    checkpoints.close()


def test_a_best_network_alone_is_no_state_to_go_on_from(tmp_path):
    checkpoints = save(tmp_path, [1])
    checkpoints.save(2, progress(3, 2), best=variables_of(state(2)))
    checkpoints.wait()
    assert checkpoints.latest(state(0))[0].step == 1
    assert value_of(checkpoints.variables("best", state(0))[0]) == 2
    checkpoints.set_aside_after(1)
    assert (checkpoints.steps, (tmp_path / "set-aside-2").is_dir()) == ([1], True)
    checkpoints.close()


def test_what_was_set_aside_is_kept_when_more_is(tmp_path):
    for number in (1, 2, 3):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(2, progress(2, None), state(number))
        checkpoints.wait()
        checkpoints.set_aside_after(1)
        assert checkpoints.steps == []
        checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {
        "set-aside-2",
        "set-aside-2-2",
        "set-aside-2-3",
    }


def test_empty_directory_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest(state(0)) == (None, [])
    with refused("no best checkpoint in .* yet: nothing was saved"):
        checkpoints.variables("best", state(0))
    checkpoints.save(1, progress(1, None), state(1))
    checkpoints.wait()
    with refused("no best checkpoint in .* yet: no epoch was finished"):
        checkpoints.variables("best", state(0))
    checkpoints.close()


# Tensorstore's background tasks may fail on the damaged file after restoring has.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_file_cut_short_is_noticed_or_makes_no_difference(tmp_path, capfd):
    save(tmp_path / "good", [1, 1]).close()
    fallen_back = 0
    for original in filter(Path.is_file, (tmp_path / "good" / "2").rglob("*")):
        file = original.relative_to(tmp_path / "good")
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        content = original.read_bytes()
        (tmp_path / "bad" / file).write_bytes(content[: len(content) // 2])
        checkpoints = Checkpoints(tmp_path / "bad")
        found, messages = checkpoints.latest(state(0))
        checkpoints.close()
        if messages:
            fallen_back += 1
            assert messages[0].startswith("the checkpoint of step 2 cannot be read: ")
        value = 1 if messages else 2
        assert value_of(variables_of(found.state)) == value
        assert value_of(found.best) == 1
        assert found.progress == progress(value, 1)
    assert fallen_back >= 3
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bit_that_changes_is_noticed_or_makes_no_difference(tmp_path):
    """1,000 one-bit flips in all files of a checkpoint."""
    rng, noticed = np.random.default_rng(0), []
    saved = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state(0))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, progress(2, 1), saved, variables_of(state(1)))
    checkpoints.wait()
    expected = checkpoints.restore(2, saved)
    checkpoints.close()
    files = sorted(filter(Path.is_file, (tmp_path / "2").rglob("*")))
    sizes = np.array([file.stat().st_size for file in files])
    for i in range(1000):
        # Half of them by size, and half in each file alike, for a few have most bytes.
        file = rng.choice(files, p=sizes / sizes.sum() if i % 2 else None)
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        try:
            checkpoints = Checkpoints(tmp_path, read_only=True)
            found = checkpoints.restore(2, state(0))
        except UsageError as error:
            noticed.append(str(error))
        else:
            assert found.is_checked
            assert_equal((found.state, found.best), (saved, expected.best))
            assert found.progress == expected.progress
        finally:
            checkpoints.close()
            file.write_bytes(content)
    assert len(noticed) > 500
    told = re.compile("the checkpoint of step 2 (cannot be read: |is damaged: )")
    assert all(told.match(message) for message in noticed)


def test_a_number_that_was_not_saved_is_named(tmp_path):
    """Orbax takes any that can be read, here those of another run."""
    save(tmp_path / "run", [1, 1]).close()
    save(tmp_path / "other", [1, 1, 1]).close()
    shutil.rmtree(tmp_path / "run" / "2" / "state")
    shutil.copytree(tmp_path / "other" / "3" / "state", tmp_path / "run" / "2" / "state")
    checkpoints = Checkpoints(tmp_path / "run", read_only=True)
    with refused(r"the checkpoint of step 2 is damaged: its state.params\['kernel'\] is not what"):
        checkpoints.restore(2, state(0))
    shutil.rmtree(tmp_path / "run" / "2" / "best")
    with refused("the checkpoint of step 2 is damaged: the list of its digests is not what"):
        checkpoints.restore(2, state(0))
    found, messages = checkpoints.latest(state(0))
    assert (found.step, found.note, len(messages)) == (1, None, 1)
    checkpoints.close()


def test_a_checkpoint_from_before_digests_is_taken_with_a_note(tmp_path, capsys):
    save(tmp_path, [1]).close()
    shutil.rmtree(tmp_path / "1" / "digests")
    checkpoints = Checkpoints(tmp_path, read_only=True)
    variables, step = checkpoints.variables("latest", state(0))
    assert value_of(variables) == step == 1
    assert capsys.readouterr().out.startswith("the checkpoint of step 1 has no digests, ")
    checkpoints.close()


@pytest.mark.slow
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, capsys):
    config = digits("aim_state", "train.epochs=3", "train.checkpoint_minutes=0.0")
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    loop.run(config, whole, 1, quiet=True)
    shutil.copytree(whole, damaged)
    (damaged / "summary.json").unlink()
    latest = damaged / "checkpoints" / "57"
    for file in filter(Path.is_file, latest.rglob("*")):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert restore.restore_run(damaged, "latest").step == 38
    loop.run(config, damaged, 1, quiet=True)
    output = capsys.readouterr().out
    assert "the checkpoint of step 57 cannot be read" in output
    assert "going back to step 38" in output
    assert_same_end(whole, damaged)
    assert (damaged / "checkpoints" / "set-aside-57").is_dir()


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    save(tmp_path, [1, 2]).close()
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        file.write_bytes(b"")
    names = sorted(p.name for p in tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path)
    with refused("step 2 cannot be read.*step 1 cannot be read"):
        checkpoints.latest(state(0))
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.rglob("*")) == names
