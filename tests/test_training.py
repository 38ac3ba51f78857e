"""A run from its config to its summary: files, continuation, devices, failures."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from aim_flax import config as configs
from aim_flax.cli import evaluate as evaluate_command
from aim_flax.data.digits import load_digits
from aim_flax.data.scaling import Scaling
from aim_flax.devices import Devices
from aim_flax.errors import DivergenceError
from aim_flax.train import loop
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import Experiment
from aim_flax.train.restore import restore_run
from tests.asserts import assert_equal, refused
from tests.processes import (
    after_calls,
    interrupted,
    lines_until,
    not_finite,
    start,
)
from tests.runs import (
    DIGITS,
    ROOT,
    SMALL,
    assert_same_end,
    digits,
    first_steps,
    flags,
    from_before,
    history,
    read_csv,
    read_json,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, standard_promotion, quick_compile):
    """A run of 3 epochs that was left alone."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    loop.run(digits("aim_state", "train.epochs=3"), workdir, 1, quiet=True)
    return workdir


def test_run_leaves_its_files(finished):
    names = {file.name for file in finished.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "dataset.json",
        "code_version.json",
        "metrics.csv",
        "memory_use.csv",
        "tensorboard",
        "history.png",
        "memory_use.png",
        "eval_test.json",
        "mistakes_test.png",
        "progress.json",
        "report.html",
        "checkpoints",
        "summary.json",
    }
    (events,) = (finished / "tensorboard").glob("events.out.tfevents.*")
    for tag in (b"train/loss", b"val/accuracy", b"learning_rate", b"memory_use/read_head"):
        assert events.read_bytes().count(tag) == 3
    for name in ("history.png", "memory_use.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_from_a_checkout_names_its_commit(finished):
    version = importlib.metadata.version("aim_flax")
    if (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        version += "+" + subprocess.run(git, capture_output=True, text=True).stdout.strip()
    saved = read_json(finished / "code_version.json")["aim_flax"]
    assert saved.removesuffix(".changed") == version
    assert read_json(finished / "summary.json")["versions"]["aim_flax"] == saved


def test_summary_is_true(finished):
    summary = read_json(finished / "summary.json")
    expected = {
        "name": "digits_mlp",
        "arm": "aim_state",
        "seed": 0,
        "steps": 57,
        "epochs": 3,
        "memory_floats": 8,
        "test_examples": 360,
        "selected_on": "val",
        # Backbone, reads, updates and memory: Dense layers as the config gives them.
        "params": (64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10)
        + 8 * (16 + 16 + 10)
        + 2 * ((16 + 8) * 4 + 4 + 2 * 4 + 4 * 8 + 8)
        + (8 * 8 + 8),
        "batch_stats": 2 * 2 * 4,
    }
    assert {k: summary[k] for k in expected} == expected
    rows = read_csv(finished / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [19, 38, 57]
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert summary["best_step"] == int(best["step"])
    assert summary["val_accuracy"] == float(best["val_accuracy"])
    low, accuracy, high = (
        summary[k] for k in ("test_accuracy_low", "test_accuracy", "test_accuracy_high")
    )
    assert 0.1 < low < accuracy < high < 1
    assert summary["train_seconds"] > 0
    assert summary["examples_per_second"] > 0


def test_progress_and_test_results_are_told(finished):
    progress = read_json(finished / "progress.json")
    hours = progress.pop("hours")
    summary = read_json(finished / "summary.json")
    assert 0 < hours == pytest.approx(summary["train_seconds"] / 3600, abs=0.002)
    assert progress == dict(epoch=3, epochs=3, step=57, steps=57, share=1.0, hours_left=0.0)
    result = read_json(finished / "eval_test.json")
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "loss"):
        assert result[key] == summary[f"test_{key}"]
    assert result["step"] == summary["best_step"]
    wrong = 360 - np.trace(result["confusion"])
    assert len(result["mistakes"]) == min(wrong, 24)


def test_memory_use_names_reads_and_updates(finished):
    rows = read_csv(finished / "memory_use.csv")
    layers = ["read head", "read layer1/dense", "read layer2/dense", "update layer1"]
    assert {row["layer"] for row in rows} == {*layers, "update layer2"}
    assert len(rows) == 3 * 5
    assert all(float(row["share"]) > 0 and float(row["own"]) > 0 for row in rows)


def test_finished_run_is_not_trained_again(finished):
    before = snapshot(finished)
    again = loop.run(digits("aim_state", "train.epochs=3"), finished, 1, quiet=True)
    assert again == read_json(finished / "summary.json")
    assert snapshot(finished) == before


def test_other_config_is_refused_and_nothing_touched(finished):
    before = snapshot(finished)
    message = r"differs in train.batch_size \(64 there, 32 here\); choose another --workdir"
    with refused(message):
        loop.run(digits("aim_state", "train.epochs=3", "train.batch_size=32"), finished, 1)
    assert snapshot(finished) == before


@pytest.mark.slow
def test_a_run_from_before_some_keys_were_there_goes_on(finished, tmp_path, capsys):
    """It ends as without the break, can be evaluated, and is refused with other values of them."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    saved = from_before(restore_run(run).config)
    assert saved["data"].keys() == {"name", "image_shape", "scale"}
    assert "kernel_size" not in saved["memory"]
    assert saved["augment"] is None
    (run / "config.json").write_text(json.dumps(saved))
    shutil.rmtree(run / "checkpoints" / str(restore_run(run, "latest").step))
    (run / "summary.json").unlink()
    changes = ("augment.shift=1", "optimizer.b1=0.5")
    message = r"differs in augment.shift \(missing there, 1 here\), optimizer.b1 \(missing there,"
    with refused(message):
        loop.run(digits("aim_state", "train.epochs=3", *changes), run, 1)
    loop.run(digits("aim_state", "train.epochs=3"), run, 1, quiet=True)
    assert_same_end(run, finished)
    assert read_json(run / "config.json") == saved
    evaluate_command.main(["--workdir", str(run), "--devices", "1"])
    accuracy = read_json(run / "summary.json")["test_accuracy"]
    assert f"accuracy {accuracy:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("assignments", "devices", "message"),
    [
        (["train.batch_size=63"], 2, "train.batch_size is 63, which 2 devices cannot share"),
        (["train.batch_size=4096"], 1, "batch_size is 4096, but there are 1257 training examples"),
        (["train.epochs=0"], 1, "train.epochs is 0, expected 1 to 1,000,000"),
        ([], 9, "9 devices were asked for; there are 8"),
        (
            ["memory.shape=(0,)"],
            1,
            r"a dense memory has shape \(D,\) or \(S, D\), each at least 1, not \(0,\)",
        ),
        (["memory.read=layer9"], 1, "read pattern 'layer9' matches no module of MLP"),
        (["model.num_classes=11"], 1, "num_classes is 11, but digits has 10 classes"),
        (["data.image_shape=(9,9,1)"], 1, "image_shape is .* but digits has images of"),
        (["data.name=digit"], 1, "data.name is 'digit', .*did you mean 'digits'"),
        (["parallel=pmapp"], 1, "parallel is 'pmapp', .*did you mean 'pmap'"),
        (["dtype=float16"], 1, "dtype is 'float16', expected one of float32, bfloat16"),
        (["model.activation=rellu"], 1, "activation is 'rellu', .*did you mean 'relu'"),
        (["eval.select_on=train"], 1, "eval.select_on is 'train', expected one of val, test"),
    ],
)
def test_impossible_config_is_refused_before_anything_is_written(
    tmp_path, assignments, devices, message
):
    workdir = tmp_path / "run"
    with refused(message):
        loop.run(digits("aim", *assignments), workdir, devices)
    assert not workdir.exists()


def test_workdir_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with refused("is not empty and holds no run"):
        loop.run(digits(), tmp_path, 1)
    with refused("is a file, expected a directory"):
        loop.run(digits(), tmp_path / "thesis.tex", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def on_one_device(standard_promotion, quick_compile):
    return twenty_steps("pmap", 1)


def twenty_steps(kind: str, count: int):
    """Returns the losses, over the end of an epoch, and the carried memory after them."""
    config = digits("aim_state", f"parallel={kind}", "train.epochs=2")
    losses, _, state = first_steps(config, count, 20)
    return losses, state.model_state["memory"]["carried"]


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("pmap", 2),
        ("shard_map", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("pmap", 8), ("shard_map", 2), ("shard_map", 8))
        ),
    ],
)
def test_devices_and_their_mapping_make_no_difference(on_one_device, kind, count):
    expected_losses, expected_carried = on_one_device
    losses, carried = twenty_steps(kind, count)
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(carried, expected_carried, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_calls_of_any_length_give_the_same_run(tmp_path, finished):
    """Up to how XLA fuses a loop of another length."""
    config = digits("aim_state", "train.epochs=1", "train.steps_per_call=7")
    loop.run(config, tmp_path / "run", 1, quiet=True)
    losses = [history(run)["train_loss"][0] for run in (tmp_path / "run", finished)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_epochs_visit_each_example_at_most_once_in_an_order_of_their_own():
    batches = load_digits().train_batches(Devices("pmap", 1), 64, Scaling(16.0), None)
    orders = [
        np.asarray(batches.order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    for order in orders:
        assert sorted(order) == list(range(1257))
    assert (orders[0] == orders[3]).all()
    assert (orders[0] != orders[1]).any()
    assert (orders[0] != orders[2]).any()


@pytest.mark.slow
def test_signal_saves_and_the_run_goes_on(tmp_path):
    """Interrupted within an epoch, and continued, now with a checkpoint after each call: the end is
    the same."""
    config = digits("aim_state", "train.epochs=3", "train.steps_per_call=5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run(config, whole, 1, quiet=True)
    with interrupted(24, "SIGTERM: saved at step 29;"):
        loop.run(config, parts, 1, quiet=True)
    assert restore_run(parts, "latest").step == 29
    assert not (parts / "summary.json").exists()
    loop.run(configs.override(config, ["train.checkpoint_minutes=0.0"]), parts, 1, quiet=True)
    assert_same_end(whole, parts)


def test_a_run_is_told_to_save_and_goes_on(tmp_path, capsys):
    config = digits("control", "train.epochs=1", "train.steps_per_call=5")
    workdir = tmp_path / "run"
    saved = []

    def tell(experiment, step, metrics):
        saved.append(Checkpoints(workdir / "checkpoints", read_only=True).steps)
        if step in (5, 10):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    with after_calls(tell):
        loop.run(config, workdir, 1)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert saved == [[], [], [10], [10, 15]]
    told = [line for line in capsys.readouterr().out.splitlines() if "SIGUSR1" in line]
    assert told == ["SIGUSR1: saved at step 10", "SIGUSR1: saved at step 15"]


@pytest.mark.slow
def test_checkpoint_of_one_device_goes_on_with_eight(tmp_path):
    config = digits("aim_state", "train.epochs=3", "parallel=shard_map")
    with interrupted(19, "SIGINT: saved at step 38;", signal.SIGINT):
        loop.run(config, tmp_path / "run", 1, quiet=True)
    before = restore_run(tmp_path / "run", "latest").variables
    summary = loop.run(config, tmp_path / "run", 8, quiet=True)
    assert summary["steps"] == 57
    assert_equal(restore_run(tmp_path / "run", 38).variables, before)


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = digits("control", "optimizer.name=sgd", "optimizer.learning_rate=1e30")
    with pytest.raises(DivergenceError, match=r"loss (nan|inf) at step \d+ \(epoch \d+\); "):
        loop.run(config, tmp_path / "run", 1, quiet=True)
    assert (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "summary.json").exists()

    message = r"loss nan at step 20 \(epoch 2\); the last good checkpoint is of step 19"
    with not_finite(step=20), pytest.raises(DivergenceError, match=message) as error:
        loop.run(digits("control"), tmp_path / "late", 1, quiet=True)
    assert error.value.step == 20
    assert restore_run(tmp_path / "late", "best").step == 19
    # The best network alone can't be trained further: the run starts anew, and loses nothing.
    assert loop.run(digits("control"), tmp_path / "late", 1, quiet=True)["steps"] == 40 * 19
    assert (tmp_path / "late" / "checkpoints" / "set-aside-19").is_dir()


def test_selection_on_the_test_split_is_said(tmp_path):
    config = digits("control", "eval.select_on=test", "train.epochs=2")
    summary = loop.run(config, tmp_path / "run", 1, quiet=True)
    assert summary["selected_on"] == "test"
    # Selected and tested on the same images.
    assert summary["val_accuracy"] == summary["test_accuracy"]


def test_plateau_cuts_and_early_stopping_end_a_run(tmp_path):
    config = digits(
        "control",
        "optimizer.learning_rate=1e-9",
        "schedule.plateau_patience=1",
        "schedule.plateau_min_delta=0.5",
        "train.stop_patience=4",
        "train.stop_min_delta=0.5",
    )
    summary = loop.run(config, tmp_path / "run", 1, quiet=True)
    assert summary["epochs"] == 5
    assert summary["best_step"] == 19
    rates = history(tmp_path / "run")["learning_rate"]
    assert rates.tolist() == pytest.approx([1e-9, 1e-9, 1e-10, 1e-11, 1e-12], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["aim_direct", "control"])
def test_arms_train_in_bfloat16(tmp_path, arm):
    config = digits(arm, "dtype=bfloat16", "train.epochs=2", "optimizer.name=adamw")
    loop.run(config, tmp_path / "run", 2, quiet=True)
    losses = history(tmp_path / "run")["train_loss"]
    assert losses[1] < losses[0]
    variables = restore_run(tmp_path / "run").variables
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


@pytest.mark.slow
def test_seeds_differ_and_repeat():
    states = [Experiment(digits("aim", f"seed={seed}"), 1).initial_state() for seed in (0, 0, 1)]
    kernels = [state.params["head"]["kernel"] for state in states]
    assert (kernels[0] == kernels[1]).all()
    assert (kernels[0] != kernels[2]).any()


COMMAND = ("train.py", "--config", f"{DIGITS}:aim_state")
SLOWLY = flags(*SMALL, "train.epochs=12", "train.steps_per_call=5", "train.checkpoint_minutes=0.0")


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_saves_and_says_so(tmp_path):
    run = start(*COMMAND, *SLOWLY, "--workdir", tmp_path / "run")
    lines_until(run, "step")
    time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGINT, output
    assert "train.py: SIGINT: saved at step" in output
    assert "Traceback" not in output
