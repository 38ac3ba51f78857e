"""train.epochs may be raised: the run ends as one that had that number from the start."""

import shutil

import pytest

from aim_flax.train import loop
from tests.asserts import refused
from tests.processes import interrupted
from tests.runs import assert_same_end, digits, read_json, snapshot

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

# Cuts after some epochs, and a warm-up: neither depends on the number of epochs.
CHANGES = ("schedule.plateau_patience=1", "schedule.plateau_min_delta=0.2")
CHANGES += ("schedule.warmup_epochs=1.5", "train.steps_per_call=10")


def config(epochs, *changes):
    return digits("aim_state", *CHANGES, f"train.epochs={epochs}", *changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, standard_promotion, quick_compile):
    """A run of 4 epochs from the start."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.run(config(4), workdir, 1, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def short(tmp_path_factory, standard_promotion, quick_compile):
    """A finished run of 2 epochs."""
    workdir = tmp_path_factory.mktemp("runs") / "short"
    loop.run(config(2), workdir, 1, quiet=True)
    return workdir


@pytest.mark.slow
def test_finished_run_goes_on(whole, short, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    loop.run(config(4), run, 1)
    assert f"{run}: 2 epochs become 4\nresuming {run} at step 38 of 76\n" in capsys.readouterr().out
    assert_same_end(run, whole)
    assert read_json(run / "config.json") == read_json(whole / "config.json")
    assert read_json(run / "summary_2_epochs.json") == read_json(short / "summary.json")
    finished = snapshot(run)
    loop.run(config(4), run, 1, quiet=True)
    assert snapshot(run) == finished
    with refused(r"holds a run of 4 epochs, which can be raised but not lowered to 2; choose"):
        loop.run(config(2), run, 1)
    assert snapshot(run) == finished


@pytest.mark.slow
def test_unfinished_run_goes_on(whole, tmp_path):
    run = tmp_path / "run"
    with interrupted(19, "saved at step 29"):
        loop.run(config(2), run, 1, quiet=True)
    # It stops again with the new number, which from then on is the run's.
    with interrupted(38, "saved at step 48"):
        loop.run(config(4), run, 1, quiet=True)
    assert read_json(run / "config.json")["train"]["epochs"] == 4
    loop.run(config(4), run, 1, quiet=True)
    assert_same_end(run, whole)


@pytest.mark.slow
def test_what_cannot_be_raised_is_refused_and_nothing_touched(short, tmp_path):
    cosine, study = tmp_path / "cosine", tmp_path / "study" / "aim_state" / "0"
    loop.run(config(1, "schedule.name=cosine", "schedule.warmup_epochs=0.0"), cosine, 1, True)
    shutil.copytree(short, study)
    (study.parents[1] / "study.json").write_text("{}")
    before = snapshot(tmp_path)
    with refused(
        r"holds a run of 1 epochs, and its cosine schedule was made for them: for 2, train a run of"
        r" its own in another --workdir$"
    ):
        loop.run(config(2, "schedule.name=cosine", "schedule.warmup_epochs=0.0"), cosine, 1)
    with refused(r"is a run of a study, whose runs all have 2 epochs: for 4, start the study in"):
        loop.run(config(4), study, 1)
    with refused(r"differs in train.batch_size \(64 there, 32 here\), train.epochs \(2 there, 4"):
        loop.run(config(4, "train.batch_size=32"), short, 1)
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_run_that_stopped_early_has_nothing_to_add(tmp_path):
    early = ("train.stop_patience=1", "train.stop_min_delta=0.9")
    summary = loop.run(config(6, *early), tmp_path / "run", 1, quiet=True)
    assert summary["epochs"] == 2
    again = loop.run(config(8, *early), tmp_path / "run", 1, quiet=True)
    assert {**again, "train_seconds": 0} == {**summary, "train_seconds": 0}
