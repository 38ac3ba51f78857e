"""A run from its config to its summary: files, continuation, devices, failures."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.errors import DivergenceError, InterruptionError, UsageError
from aim_flax.train import loop
from aim_flax.train.experiment import Experiment
from aim_flax.train.restore import restore_run

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits_mlp.py")
SMALL = ("model.features=(16,16)", "memory.shape=(8,)", "memory.update_block.features=(4,)")
TIMINGS = ("train_seconds", "examples_per_second", "data_wait_share")


def digits(arm: str = "aim", *assignments: str) -> ConfigDict:
    """A network small enough for tests to compile quickly; steps as in the real one."""
    small = SMALL if arm != "control" else SMALL[:1]
    return configs.override(configs.load(f"{DIGITS}:{arm}"), [*small, *assignments])


def without_timings(summary: dict) -> dict:
    return {k: v for k, v in summary.items() if k not in TIMINGS}


def assert_same_end(one: Path, other: Path) -> None:
    """Two runs ended bit for bit alike, timings aside."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    assert without_timings(summaries[0]) == without_timings(summaries[1])
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    for checkpoint in ("best", "latest"):
        a, b = (restore_run(run, checkpoint).variables for run in (one, other))
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, standard_promotion, quick_compile) -> Path:
    """A run of 3 epochs that was left alone."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    loop.run(digits("aim_state", "train.epochs=3"), workdir, 1, quiet=True)
    return workdir


def test_run_leaves_its_files(finished):
    names = {file.name for file in finished.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "code_version.json",
        "metrics.csv",
        "memory_use.csv",
        "tensorboard",
        "history.png",
        "memory_use.png",
        "checkpoints",
        "summary.json",
    }
    (events,) = (finished / "tensorboard").glob("events.out.tfevents.*")
    for tag in (b"train/loss", b"val/accuracy", b"learning_rate", b"memory_use/read_head"):
        assert events.read_bytes().count(tag) == 3
    for name in ("history.png", "memory_use.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_summary_is_true(finished):
    summary = json.loads((finished / "summary.json").read_text())
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
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
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


def test_memory_use_names_reads_and_updates(finished):
    with (finished / "memory_use.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = ["read head", "read layer1/dense", "read layer2/dense", "update layer1"]
    assert {row["layer"] for row in rows} == {*layers, "update layer2"}
    assert len(rows) == 3 * 5
    assert all(float(row["share"]) > 0 and float(row["own"]) > 0 for row in rows)


def test_finished_run_is_not_trained_again(finished):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    again = loop.run(digits("aim_state", "train.epochs=3"), finished, 1, quiet=True)
    assert again == json.loads((finished / "summary.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_other_config_is_refused_and_nothing_touched(finished):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    message = r"differs in train.epochs \(3 there, 4 here\); choose another --workdir"
    with pytest.raises(UsageError, match=message):
        loop.run(digits("aim_state", "train.epochs=4"), finished, 1)
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_keys_that_a_config_lacks_are_called_missing(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    saved = tmp_path / "run" / "config.json"
    config = json.loads(saved.read_text())
    del config["memory"]["learning_rate_scale"]
    saved.write_text(json.dumps(config))
    message = r"differs in memory.learning_rate_scale \(missing there, 1.0 here\)"
    with pytest.raises(UsageError, match=message):
        loop.run(digits("aim_state", "train.epochs=3"), tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("assignments", "devices", "message"),
    [
        (["train.batch_size=63"], 2, "train.batch_size is 63, which 2 devices cannot share"),
        (["train.batch_size=4096"], 1, "batch_size is 4096, but there are 1257 training examples"),
        (["train.epochs=0"], 1, "train.epochs is 0, expected at least 1"),
        ([], 9, "9 devices were asked for; there are 8"),
        (["memory.shape=(0,)"], 1, r"a dense memory has shape \(D,\), each at least 1, not \(0,\)"),
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
    with pytest.raises(UsageError, match=message) as error:
        loop.run(digits("aim", *assignments), workdir, devices)
    assert "\n" not in str(error.value)
    assert not workdir.exists()


def test_workdir_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        loop.run(digits(), tmp_path, 1)
    with pytest.raises(UsageError, match="is a file, expected a directory"):
        loop.run(digits(), tmp_path / "thesis.tex", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def twenty_steps(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the losses, over the end of an epoch, and the carried memory after them."""
    experiment = Experiment(digits("aim_state", f"parallel={kind}", "train.epochs=2"), count)
    state = experiment.devices.replicate(experiment.initial_state())
    feed = experiment.train_batches.feed(0, 0, 20)
    seed = experiment.devices.replicate(np.uint32(0))
    losses = []
    for step, length in ((0, 19), (19, 1)):
        state, metrics = experiment.train_call(length)(state, feed.at(step), seed)
        losses.append(experiment.devices.fetch(metrics)["loss"])
    carried = experiment.devices.fetch(state).model_state["memory"]["carried"]
    return np.concatenate(losses), carried


@pytest.fixture(scope="module")
def on_one_device(standard_promotion, quick_compile) -> tuple[np.ndarray, np.ndarray]:
    return twenty_steps("pmap", 1)


@pytest.mark.parametrize(
    ("kind", "count"),
    [("pmap", 2), ("pmap", 8), ("shard_map", 1), ("shard_map", 2), ("shard_map", 8)],
)
def test_devices_and_their_mapping_make_no_difference(on_one_device, kind, count):
    expected_losses, expected_carried = on_one_device
    losses, carried = twenty_steps(kind, count)
    assert losses.shape == (20,)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(carried, expected_carried, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_calls_of_any_length_give_the_same_run(tmp_path, finished):
    """Up to how XLA fuses a loop of another length."""
    config = digits("aim_state", "train.epochs=1", "train.steps_per_call=7")
    loop.run(config, tmp_path / "run", 1, quiet=True)
    with (tmp_path / "run" / "metrics.csv").open() as ours, (finished / "metrics.csv").open() as f:
        row, reference = next(csv.DictReader(ours)), next(csv.DictReader(f))
    assert float(row["train_loss"]) == pytest.approx(float(reference["train_loss"]), rel=1e-5)


def test_epochs_visit_each_example_at_most_once_in_an_order_of_their_own():
    from aim_flax.data.order import epoch_order
    from aim_flax.keys import data_key

    orders = [
        np.asarray(epoch_order(data_key(seed), epoch, 1257))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    for order in orders:
        assert sorted(order) == list(range(1257))
    assert (orders[0] == orders[3]).all()
    assert (orders[0] != orders[1]).any()
    assert (orders[0] != orders[2]).any()


@pytest.mark.slow
def test_signal_saves_and_the_run_goes_on(tmp_path):
    """Interrupted within an epoch, and continued on two devices: the end is the same."""
    config = digits("aim_state", "train.epochs=3", "train.steps_per_call=5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run(config, whole, 1, quiet=True)

    original = loop._Run._check_finite

    def interrupt(self, losses, first_step):
        original(self, losses, first_step)
        if first_step == 25:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_check_finite", interrupt)
        with pytest.raises(InterruptionError, match="SIGTERM: saved at step 29;") as error:
            loop.run(config, parts, 1, quiet=True)
    assert error.value.signal == signal.SIGTERM
    assert restore_run(parts, "latest").step == 29
    assert not (parts / "summary.json").exists()
    loop.run(config, parts, 1, quiet=True)
    assert_same_end(whole, parts)


def test_checkpoint_of_one_device_goes_on_with_eight(tmp_path):
    config = digits("aim_state", "train.epochs=3", "parallel=shard_map")
    original = loop._Run._write_epoch

    def stop(self, events):
        original(self, events)
        if self.step == 19:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_write_epoch", stop)
        with pytest.raises(InterruptionError, match="SIGINT: saved at step 38;"):
            loop.run(config, tmp_path / "run", 1, quiet=True)
    before = restore_run(tmp_path / "run", "latest").variables
    summary = loop.run(config, tmp_path / "run", 8, quiet=True)
    assert summary["steps"] == 57
    after = restore_run(tmp_path / "run", 38).variables
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = digits("control", "optimizer.name=sgd", "optimizer.learning_rate=1e30")
    with pytest.raises(DivergenceError, match=r"loss (nan|inf) at step \d+ \(epoch \d+\); "):
        loop.run(config, tmp_path / "run", 1, quiet=True)
    assert (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "summary.json").exists()

    class Late(loop._Run):
        def _check_finite(self, losses, first_step):
            super()._check_finite([np.nan] if first_step > 19 else losses, first_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_Run", Late)
        message = r"loss nan at step 20 \(epoch 2\); the last good checkpoint is of step 19"
        with pytest.raises(DivergenceError, match=message) as error:
            loop.run(digits("control"), tmp_path / "late", 1, quiet=True)
    assert error.value.step == 20
    assert restore_run(tmp_path / "late", "best").step == 19


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
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([1e-9, 1e-9, 1e-10, 1e-11, 1e-12], rel=1e-5)


@pytest.mark.parametrize("arm", ["aim_direct", "control"])
def test_arms_train_in_bfloat16(tmp_path, arm):
    config = digits(arm, "dtype=bfloat16", "train.epochs=2", "optimizer.name=adamw")
    loop.run(config, tmp_path / "run", 2, quiet=True)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[1] < losses[0]
    variables = restore_run(tmp_path / "run").variables
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_seeds_differ_and_repeat():
    states = [Experiment(digits("aim", f"seed={seed}"), 1).initial_state() for seed in (0, 0, 1)]
    kernels = [state.params["head"]["kernel"] for state in states]
    assert (kernels[0] == kernels[1]).all()
    assert (kernels[0] != kernels[2]).any()


def start(workdir: Path) -> subprocess.Popen:
    """Starts the real train.py on the small network."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    flags = [f"--config.{a}" for a in (*SMALL, "train.epochs=12", "train.steps_per_call=5")]
    command = [sys.executable, str(ROOT / "train.py"), "--config", f"{DIGITS}:aim_state"]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *flags, "--config.train.checkpoint_minutes=0.0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_ends_bit_equal(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = start(whole)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    rng = np.random.default_rng(0)
    kills = resumed = 0
    for _ in range(12):
        if resumed >= 3:
            break
        run = start(parts)
        # Lines come once training is under way; then at a random moment, perhaps in a save.
        for line in iter(run.stdout.readline, ""):
            resumed += line.startswith("resuming")
            if line.startswith("step"):
                break
        timer = threading.Timer(rng.uniform(0, 0.6), run.kill)
        timer.start()
        run.communicate(timeout=300)
        timer.join()
        kills += run.returncode == -signal.SIGKILL
    run = start(parts)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert kills >= 3
    assert resumed >= 3
    assert_same_end(whole, parts)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_saves_and_says_so(tmp_path):
    run = start(tmp_path / "run")
    for line in iter(run.stdout.readline, ""):
        if line.startswith("step"):
            break
    time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGINT, output
    assert "train.py: SIGINT: saved at step" in output
    assert "Traceback" not in output
