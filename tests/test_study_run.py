"""Running a study: its runs against single ones, continuation, divergence, wrong use."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax import files
from aim_flax.cli import ablate as ablate_command
from aim_flax.cli import evaluate as evaluate_command
from aim_flax.errors import BusyError, InterruptionError
from aim_flax.study import results
from aim_flax.study import run as studies
from aim_flax.study.plan import NOT_RECORDED, plan
from aim_flax.study.work import fits_together
from aim_flax.train import loop
from aim_flax.train.evaluate_run import evaluate_run
from aim_flax.train.experiment import Experiment
from aim_flax.train.restore import restore_run
from aim_flax.train.workdir import LOCK, held
from tests.asserts import fails, refused
from tests.processes import (
    after_calls,
    finish,
    interrupted,
    not_finite,
    start,
)
from tests.runs import (
    DIGITS,
    SMALL,
    digits,
    flags,
    from_before,
    history,
    read_csv,
    read_json,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

REPORT = ("report.md", "report.html", "results.csv", "curves.png", "differences.png", "study.json")


def study(
    workdir,
    *arms,
    overrides=("train.epochs=2",),
    seeds="2",
    seeds_per_program=None,
    quiet=True,
    **options,
):
    """Runs a study of small networks on one device."""
    asked = plan(DIGITS, arms, seeds, overrides=[*SMALL, *overrides], **options)
    return studies.run(asked, workdir, seeds_per_program, 1, quiet)


def names(workdir: Path) -> set[str]:
    return {file.name for file in workdir.iterdir()} - {LOCK}


def assert_same_report(one: Path, other: Path) -> None:
    for name in REPORT:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert names(one) == names(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, standard_promotion, quick_compile) -> Path:
    """A study that was left alone."""
    workdir = tmp_path_factory.mktemp("studies") / "whole"
    study(workdir, "aim_state", "control", overrides=("train.epochs=3", "model.dropout=0.3"))
    return workdir


SMALL_FLAGS = flags(*SMALL)
PLATEAUS = ("schedule.plateau_patience=1", "schedule.plateau_min_delta=0.2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "devices", "overrides"),
    [
        ("aim_state", 2, ("schedule.name=cosine", "eval.batch_size=100")),
        ("control", 1, ("parallel=shard_map", "train.steps_per_call=10", *PLATEAUS)),
    ],
)
def test_seeds_trained_together_are_those_trained_alone(tmp_path, arm, devices, overrides):
    """With dropout and augmentation; a carried memory and calls that part the epochs."""
    overrides = [*SMALL, "train.epochs=3", "model.dropout=0.2", "augment.shift=1", *overrides]
    overrides.append("augment.roll=true")  # In evaluation, too.
    workdir = tmp_path / "s"
    asked = plan(DIGITS, [arm], "4-5", overrides=overrides)
    studies.run(asked, workdir, device_count=devices, quiet=True)
    together, other, alone = workdir / arm / "5", workdir / arm / "4", tmp_path / "alone"
    config = configs.load(f"{DIGITS}:{arm}")
    own = [a for a in overrides if config.memory is not None or not a.startswith("memory.")]
    loop.run(configs.override(config, [*own, "seed=5"]), alone, devices, quiet=True)
    assert names(together) == names(alone)
    a, b = history(together), history(alone)
    assert a.keys() == b.keys()
    np.testing.assert_allclose(a["train_loss"][0], b["train_loss"][0], rtol=1e-4)
    assert history(other)["train_loss"][0] != pytest.approx(b["train_loss"][0], rel=1e-3)
    np.testing.assert_allclose(a["learning_rate"], b["learning_rate"], rtol=1e-6)
    for column in ("train_loss", "val_loss"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-3)
    np.testing.assert_allclose(a["val_accuracy"], b["val_accuracy"], atol=1.5 / 180)
    for file in ("config.json", "code_version.json"):
        assert (together / file).read_bytes() == (alone / file).read_bytes()
    one, single = (read_json(run / "summary.json") for run in (together, alone))
    assert one.keys() == single.keys()
    for key in ("seed", "best_step", "steps", "params", "batch_stats", "test_examples"):
        assert one[key] == single[key], key
    assert one["test_loss"] == pytest.approx(single["test_loss"], rel=1e-3)
    for run, summary in ((together, one), (alone, single)):
        again = evaluate_run(run, device_count=1)
        assert again.loss == pytest.approx(summary["test_loss"], rel=1e-4)
        assert again.accuracy == summary["test_accuracy"]
    for checkpoint in ("best", "latest"):
        steps = [restore_run(run, checkpoint).step for run in (together, alone)]
        assert steps[0] == steps[1]


def test_study_leaves_runs_that_tables_and_scripts_read(whole, capsys):
    assert names(whole) == {"aim_state", "control", "progress.json", *REPORT}
    progress = read_json(whole / "progress.json")
    assert (progress["step"], progress["steps"], progress["share"]) == (228, 228, 1.0)
    rows = results.read_runs(sorted(whole.glob("*/*")))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for arm in ("aim_state", "control") for seed in range(2)
    ]
    assert {row["status"] for row in rows} == {"finished"}
    # The study's folder stands for its runs, and none is counted twice.
    assert results.read_runs([whole]) == results.read_runs([whole, whole / "control/0"]) == rows
    written = read_csv(whole / "results.csv")
    assert [float(row["test_accuracy"]) for row in written] == [r["test_accuracy"] for r in rows]
    run = whole / "aim_state" / "1"
    evaluate_command.main(["--workdir", str(run), "--devices", "1"])
    summary = read_json(run / "summary.json")
    assert f"accuracy {summary['test_accuracy']:.2%}" in capsys.readouterr().out
    (run / "confusion_test.png").unlink()


def test_report_can_be_written_again(whole, capsys):
    assert f"```bash\n{NOT_RECORDED}\n```" in (whole / "report.md").read_text()
    before = {name: (whole / name).read_bytes() for name in REPORT}
    ablate_command.main(["--report-only", "--workdir", str(whole)])
    assert {name: (whole / name).read_bytes() for name in REPORT} == before
    assert "| `control` | 2 |" in capsys.readouterr().out


def test_a_report_waits_for_the_one_that_another_process_writes(whole, monkeypatch):
    """It may have been read before the last run ended, so it has to be written first."""
    before = {name: (whole / name).read_bytes() for name in REPORT}
    monkeypatch.setattr(studies, "SECONDS_TO_WAIT", 0.0)
    with held(whole), refused("^another process is at work in ", kind=BusyError):
        studies.write_report(whole, quiet=True)
    assert {name: (whole / name).read_bytes() for name in REPORT} == before
    studies.write_report(whole, quiet=True)


def test_two_processes_can_write_the_same_file(tmp_path):
    """The one that ends last is what is left, whole, and nothing of the other."""
    path = tmp_path / "plot.png"

    class Figure:
        def findobj(self, match):
            return []

        def savefig(self, file, **options):
            file.write_text("last")
            files.write_text(path, "first")

    files.save_figure(Figure(), path)
    assert path.read_text() == "last"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "plot.png"
    path.write_text("before")

    class Figure:
        def findobj(self, match):
            return []

        def savefig(self, file, **options):
            file.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.save_figure(Figure(), path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.slow
def test_interrupted_group_goes_on_and_gives_the_same_report(tmp_path, monkeypatch, whole):
    """In the second arm's second epoch; then arms trained to their end are left alone."""
    arguments = ("aim_state", "control")
    options = dict(overrides=("train.epochs=3", "model.dropout=0.3"))
    parts = tmp_path / "parts"

    message = "SIGTERM: saved at step 38; the same command"
    with interrupted(19, message, run=lambda config: config.arm == "control"):
        study(parts, *arguments, **options)
    assert names(parts) == {".groups", "aim_state", "control", "study.json", "progress.json"}
    studies.write_report(parts, quiet=True)
    assert "| `control` | 0 of 2; 2 unfinished |" in (parts / "report.md").read_text()
    before = snapshot(parts / "aim_state")
    calls = []
    with after_calls(
        lambda run, step, metrics: calls.append((run.config.arm, step, *metrics["loss"].shape))
    ):
        study(parts, *arguments, **options)
    assert calls == [("control", 38, 2, 19)]
    assert snapshot(parts / "aim_state") == before
    assert_same_report(parts, whole)
    for arm in arguments:
        for seed in "01":
            metrics = [s / arm / seed / "metrics.csv" for s in (parts, whole)]
            assert metrics[0].read_bytes() == metrics[1].read_bytes()


COMMAND = ("ablate.py", "--config", DIGITS, *SMALL_FLAGS, "--config.train.epochs=12")


@pytest.mark.slow
@pytest.mark.parametrize("per_program", [None, 1])
def test_runs_that_another_process_trains_are_left_to_it(tmp_path, capsys, per_program):
    """What was left out is trained by the same command, once nobody holds it."""
    workdir = tmp_path / "s"
    options = dict(seeds_per_program=per_program, quiet=False, overrides=("train.epochs=1",))
    study(workdir, "control", seeds="0-0", **options)
    held_by_other = workdir / "control" / "2"
    held_by_other.mkdir()
    with held(held_by_other):
        with refused(f"^another process is at work in {held_by_other}$", kind=BusyError):
            loop.run(digits("control", "train.epochs=1", "seed=2"), held_by_other, 1, True)
        assert [file.name for file in held_by_other.iterdir()] == [".lock"]
        rows = study(workdir, "control", "aim_direct", seeds="0-2", **options)
    missing = {(row["arm"], row["seed"]) for row in rows if row["status"] == "unfinished"}
    assert missing == {("control", seed) for seed in ((2,) if per_program else (1, 2))}
    assert f" left out: another process is at work in {held_by_other}" in capsys.readouterr().out
    finished = snapshot(workdir / "aim_direct")
    rows = study(workdir, "control", "aim_direct", seeds="0-2", **options)
    assert [row["status"] for row in rows] == ["finished"] * 6
    assert snapshot(workdir / "aim_direct") == finished


@pytest.mark.slow
def test_several_processes_share_a_study(tmp_path):
    """The same command, started three times at once: all runs are trained, each of them once."""
    command = (*COMMAND, "--arms", "control,aim_direct", "--seeds", "4")
    command += ("--seeds-per-program", "1", "--workdir", tmp_path / "s")
    outputs = finish(*(start(*command) for _ in range(3)))
    lines = [line for output in outputs for line in output.splitlines()]
    trained = [line.split(":")[1] for line in lines if ": test accuracy " in line]
    assert len(trained) == len(set(trained)) == 8
    assert sum("left out: another process" in output for output in outputs) >= 1
    rows = read_csv(tmp_path / "s" / "results.csv")
    assert [row["status"] for row in rows] == ["finished"] * 8


@pytest.mark.parametrize("per_program", [None, 1])
def test_signal_while_results_are_written_ends_the_study(tmp_path, monkeypatch, per_program):
    """Of the first arm, whose runs are finished all the same."""
    original = loop.write_results

    def interrupt(workdir, *arguments):
        original(workdir, *arguments)
        if workdir.name == "0":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "write_results", interrupt)
    options = dict(seeds_per_program=per_program, overrides=("train.epochs=1",))
    with refused(r"^SIGINT: control seeds? 0\S* done; the same", kind=InterruptionError):
        study(tmp_path / "s", "control", "aim_no_update", seeds="2", **options)
    assert "summary.json" in names(tmp_path / "s" / "control" / "0")
    assert not (tmp_path / "s" / "aim_no_update").exists()


def test_killed_while_results_are_written_trains_nothing_again(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    study(whole, "control")
    original = loop.run_summary

    class Killed(BaseException):
        pass

    def kill(run, *args):
        if run.config.seed == 1:
            raise Killed
        return original(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_summary", kill)
        with pytest.raises(Killed):
            study(parts, "control")
    before = snapshot(parts / "control" / "0")
    monkeypatch.setattr(Experiment, "steps_on_device", None)
    study(parts, "control")
    assert snapshot(parts / "control" / "0") == before
    for seed in "01":
        a, b = (history(s / "control" / seed) for s in (whole, parts))
        assert a["val_loss"].tolist() == b["val_loss"].tolist()


@pytest.mark.slow
def test_one_by_one_is_the_single_run_and_goes_on(tmp_path):
    overrides = ("train.epochs=2", "train.steps_per_call=10")
    options = dict(overrides=overrides, seeds_per_program=1)

    with interrupted(19, "SIGTERM: saved at step 29", run=lambda config: config.seed == 1):
        study(tmp_path / "s", "control", **options)
    # A run that was begun alone ends alone, also when seeds are trained together now.
    study(tmp_path / "s", "control", **(options | {"seeds_per_program": None}))
    for seed in range(2):
        alone = tmp_path / f"alone{seed}"
        loop.run(digits("control", *overrides, f"seed={seed}"), alone, 1, quiet=True)
        metrics = [w / "metrics.csv" for w in (alone, tmp_path / "s" / "control" / str(seed))]
        assert metrics[0].read_bytes() == metrics[1].read_bytes()


@pytest.mark.parametrize("per_program", [None, 1])
def test_a_seed_that_diverges_is_marked_and_the_others_go_on(tmp_path, per_program):
    """The loss of seed 1 is not finite at step 25, in the second epoch."""
    reference = study(tmp_path / "reference", "control", seeds_per_program=per_program)
    with not_finite(step=25, seed=1):
        rows = study(tmp_path / "s", "control", seeds_per_program=per_program)
    assert [row["status"] for row in rows] == ["finished", "diverged at step 25"]
    assert rows[0] == reference[0]
    run = tmp_path / "s" / "control" / "1"
    assert history(run)["epoch"].tolist() == [1]
    assert restore_run(run).step == 19
    assert not (run / "summary.json").exists()
    before = snapshot(tmp_path / "s" / "control")
    assert study(tmp_path / "s", "control", seeds_per_program=per_program) == rows
    assert snapshot(tmp_path / "s" / "control") == before


def test_real_divergence_of_all_seeds_ends_the_group(tmp_path):
    overrides = ("train.epochs=3", "optimizer.name=sgd", "optimizer.learning_rate=1e30")
    rows = study(tmp_path / "s", "control", overrides=overrides, seeds="2")
    assert all(row["status"].startswith("diverged at step ") for row in rows)
    assert names(tmp_path / "s" / "control" / "0") >= {"diverged.json", "config.json"}


@pytest.mark.slow
def test_arms_and_seeds_are_added(tmp_path):
    workdir = tmp_path / "s"
    study(workdir, "control", seeds="2", overrides=("train.epochs=1",))
    before = snapshot(workdir / "control")
    custom = ["small=aim_no_update:memory.shape=(4, ) memory.carry_rate=0.5;model.dropout=0.1"]
    study(
        workdir,
        "control_params",
        custom=custom,
        seeds="1-1",
        overrides=("train.epochs=1",),
        derive_from="aim_direct",
    )
    assert snapshot(workdir / "control") == before
    arms = read_json(workdir / "study.json")["arms"]
    expected = {"control": [0, 1], "control_params": [1], "small": [1]}
    assert {arm: plan["seeds"] for arm, plan in arms.items()} == expected
    small = read_json(workdir / "small" / "1" / "config.json")
    assert (small["arm"], small["seed"]) == ("small", 1)
    assert small["memory"]["shape"] == [4]
    assert small["memory"]["update_after"] == ""
    assert (small["memory"]["carry_rate"], small["model"]["dropout"]) == (0.5, 0.1)
    wide = read_json(workdir / "control_params" / "1" / "config.json")
    assert wide["memory"] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "aim,contol"], "has no arm 'contol' (did you mean 'control'?); its arms: aim,"),
        (["--arms", "control_parms"], "(did you mean 'control_params'?)"),
        (["--arms", ""], "arms are '', expected names"),
        (["--arms", "aim,,control"], "arms are 'aim,,control', expected names"),
        (["--arms", "aim,aim"], "the arm aim is named twice"),
        (["--arms", "aim", "--seeds", "x"], "seeds are 'x', expected a number, a range"),
        (["--arms", "aim", "--seeds", "5-3"], "seeds are '5-3', which names no seed"),
        (["--arms", "aim", "--seeds", "0"], "seeds are '0', which names no seed"),
        (["--arms", "aim", "--seeds", "1,0-2"], "which names 1 twice"),
        (["--arms", "aim", "--seeds", "1000000000"], "expected at most 10,000 of them"),
        (["--arms", "aim", "--seeds", "0-9999,10000"], "expected at most 10,000 of them"),
        (["--arms", "aim", "--seeds", "9999999999-9999999999"], "expected 0 to 2**32 - 1"),
        (["--arms", "aim,aim_state", "--reference", "control"], "the reference arm is 'control'"),
        (["--arms", "aim", "--config.seed=3"], "'seed=3': a study sets this key by itself"),
        (["--arms", "control", "--config.memory.shpe=(8,)"], "did you mean 'memory.shape'?"),
        (["--arms", "aim,control", "--config.memory.shpe=(8,)"], "did you mean 'memory.shape'?"),
        (["--arms", "control,aim", "--config.memory.shape=(0,)"], "arm aim: a dense memory has"),
        (["--arms", "aim", "--arm", "x:memory.read=layr"], "arm x: read pattern 'layr' matches"),
        (["--arms", "aim", "--arm", "x"], "the arm 'x' cannot be read, expected 'NAME:KEY=VALUE"),
        (["--arms", "aim", "--arm", "x=ami:a=1"], "has no arm 'ami' (did you mean 'aim'?)"),
        (["--arms", "aim", "--arm", "x:seed=1"], "'seed=1': a study sets this key by itself"),
        (["--arms", "aim", "--arm", "control:train.epochs=1"], "the arm control is there already"),
        (["--arms", "aim", "--arm", "x:train.epoch=1"], "arm x: 'train.epoch' is no config key"),
        (["--arms", "memory_zero", "--derive-from", "control"], "has no memory to derive"),
        (["--arms", "memory_zero", "--derive-from", "ami"], "has no arm 'ami' (did you mean"),
        (["--arms", "aim", "--seeds-per-program", "0"], "expected a number of at least 1, or auto"),
        (
            ["--arms", "aim", "--seeds-per-program", "2", "--config.train.stop_patience=3"],
            "arm aim: train.stop_patience is set",
        ),
        (["--arms", "aim", "--workdir", "file"], "file is a file, expected a directory"),
        (["--arms", "aim", "--workdir", "other"], "other is not empty and holds no study"),
    ],
)
def test_wrong_use_is_one_line_and_touches_nothing(capsys, tmp_path, monkeypatch, argv, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert message in fails(capsys, ablate_command.main, "--config", DIGITS, *argv)
    assert snapshot(tmp_path) == before


def test_config_is_a_file_and_required(capsys, tmp_path):
    line = fails(capsys, ablate_command.main, "--config", f"{DIGITS}:aim", "--arms", "aim")
    assert "expected a file; its arms are named by --arms" in line
    assert "are required: --config" in fails(capsys, ablate_command.main, "--arms", "aim")
    assert "holds no study" in fails(
        capsys, ablate_command.main, "--report-only", "--workdir", str(tmp_path)
    )


@pytest.mark.slow
def test_study_from_before_some_keys_were_there_goes_on(whole, tmp_path):
    """A run that it lacks is trained; it is refused with other values of those keys."""
    shutil.copytree(whole, tmp_path / "s")
    saved = read_json(whole / "study.json")
    for arm in saved["arms"].values():
        arm["config"] = from_before(ConfigDict(arm["config"]))
    (tmp_path / "s" / "study.json").write_text(json.dumps(saved))
    shutil.rmtree(tmp_path / "s" / "aim_state" / "1")
    same = ("train.epochs=3", "model.dropout=0.3")
    rows = study(tmp_path / "s", "aim_state", "control", overrides=same)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert read_json(tmp_path / "s" / "study.json")["arms"] == saved["arms"]
    message = r"another arm control, which differs in augment.shift \(missing there, 1 here\)"
    with refused(message):
        study(tmp_path / "s", "control", overrides=(*same, "augment.shift=1"))


def test_study_of_another_config_is_refused_and_nothing_touched(whole):
    before = snapshot(whole)
    same = ("train.epochs=3", "model.dropout=0.3")
    refusals = [
        (("control",), ("train.epochs=4", same[1]), r"differs in train.epochs \(3 there, 4 here\)"),
        (("aim",), same[:1], "model.dropout is set to 0.3 there, not set for the arm aim"),
        (("aim_state",), (*same, "memory.carry_rate=0.7"), "memory.carry_rate"),
    ]
    for arms, overrides, message in refusals:
        with refused(message):
            study(whole, *arms, overrides=overrides)
        assert snapshot(whole) == before
    # An arm whose workdir holds another run.
    file = whole / "control" / "1" / "config.json"
    saved = file.read_bytes()
    files.write_json(file, files.read_json(file) | {"seed": 7}, sealed=True)
    with refused(r"differs in seed \(7 there, 1 here\)"):
        study(whole, "control", overrides=same)
    file.write_bytes(saved)


def test_convolutions_on_cpu_run_one_by_one():
    assert fits_together(Experiment(digits("aim"), 1))
    assert not fits_together(Experiment(digits("aim", "train.stop_patience=3"), 1))
    config = digits("control")
    with config.unlocked():
        config.model = {"name": "resnet", "num_classes": 10, "stage_sizes": (1,), "width": 4}
        config.model.stem = "cifar"
    assert not fits_together(Experiment(config.lock(), 1))
