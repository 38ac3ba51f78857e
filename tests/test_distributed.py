"""Several processes, as on several hosts: found as SLURM's would be, talking through gloo."""

import signal
import socket
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from aim_flax import config as configs
from aim_flax.train import loop
from aim_flax.train.restore import restore_run
from tests.photos import FOLDER_CONFIG, folder, small, write_folder
from tests.processes import (
    GLOO,
    end_all,
    finish,
    interrupted,
    lines_until,
    start,
    start_several,
    until_saved,
)
from tests.runs import DIGITS, SMALL, digits, flags, history, read_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion", "quick_compile")]


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    end_all()


def free_job() -> str:
    """A SLURM job number whose port, as JAX derives it, is free."""
    # In random order, because another test at the same moment would find the same one free.
    for job in np.random.default_rng().permutation(4096):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 61440 + int(job))):
                return str(job)
    raise RuntimeError("no free port")


def start_two(config: str, workdir: Path, *assignments: str) -> list[subprocess.Popen]:
    environment = GLOO | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "SLURM_JOB_ID": free_job(),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    command = ("train.py", "--config", config, *flags(*assignments), "--workdir", workdir)
    return [
        start(*command, "--distributed", **environment, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in ("0", "1")
    ]


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_two_processes_train_as_one_and_stop_together(tmp_path, kind):
    options = ("train.epochs=8", "train.steps_per_call=5", f"parallel={kind}")
    command = (f"{DIGITS}:aim_state", tmp_path / "two", *SMALL, *options)
    first, second = start_two(*command)
    lines_until(first, "step")
    second.send_signal(signal.SIGTERM)  # One process alone is told to stop.
    output = first.communicate(timeout=300)[0]
    second.communicate(timeout=300)
    assert "saved at step" in output, output
    assert first.returncode == second.returncode == 128 + signal.SIGTERM

    outputs = finish(*start_two(*command))
    assert "resuming" in outputs[0]
    assert "step" not in outputs[1]
    assert read_json(tmp_path / "two" / "summary.json")["steps"] == 152

    loop.run(digits("aim_state", *options), tmp_path / "one", 4, quiet=True)
    one, two = (history(tmp_path / run)["train_loss"] for run in ("one", "two"))
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-5)
    assert restore_run(tmp_path / "two", "latest").step == 152


def test_two_processes_go_back_from_a_damaged_checkpoint(tmp_path):
    options = ("train.epochs=4", "train.checkpoint_minutes=0.0")
    run = tmp_path / "run"
    with interrupted(38, "saved at step 57"):
        loop.run(digits("aim_state", *options), run, 2, quiet=True)
    (run / "checkpoints" / "57" / "state" / "_METADATA").write_text("{")
    outputs = finish(*start_several(2, f"{DIGITS}:aim_state", run, *SMALL, *options))
    for output in outputs:
        assert "the checkpoint of step 57 cannot be read" in output
        assert "going back to step 38" in output
    assert read_json(run / "summary.json")["steps"] == 76
    assert (run / "checkpoints" / "set-aside-57").is_dir()


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_each_process_reads_its_share_of_what_streams(tmp_path, kind):
    """A damaged image is read, and reported, by one of them alone."""
    photographs = write_folder(tmp_path / "photographs", train=120)
    (photographs / "train" / "class1" / "0001.png").write_bytes(b"garbage")
    options = ("data.in_memory_mb=0.0", "data.on_error=skip", "train.epochs=1", f"parallel={kind}")
    config = f"{FOLDER_CONFIG}:control"
    outputs = finish(*start_two(config, tmp_path / "two", *small(photographs, *options)))
    assert sorted(output.count("left out:") for output in outputs) == [0, 1]

    summary = loop.run(folder(photographs, *options), tmp_path / "one", 4, quiet=True)
    both = read_json(tmp_path / "two" / "summary.json")
    assert summary["skipped_images"] == both["skipped_images"] == 1
    assert both["test_examples"] == 21
    one, two = (history(tmp_path / run)["train_loss"] for run in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


# 30 steps each: 2 epochs of 15. Gradients of biases before a batch norm are rounding alone, and
# Adam divides by them: with its usual eps these biases, and so evaluation, differ by 1e-4 on any
# two numbers of devices.
THIRTY = (
    "train.epochs=2",
    "optimizer.eps=0.001",
    "train.steps_per_call=1",
    "train.checkpoint_minutes=0.0",
    "train.accumulate=2",
    "train.ema_decay=0.9",
)
RESNET = ("memory.shape=(2,2,16)", "memory.update_block.features=(4,)", "model.stage_sizes=(1,1)")


@pytest.mark.parametrize(("network", "kind"), [("mlp", "pmap"), ("resnet", "shard_map")])
def test_thirty_steps_are_the_same_on_other_processes(tmp_path, network, kind):
    """Two are killed, one goes on and is stopped, and four come to the end."""
    if network == "mlp":
        name, options = f"{DIGITS}:aim", (*SMALL, "train.batch_size=80")
    else:
        photographs = write_folder(tmp_path / "photographs", train=120)
        name, options = f"{FOLDER_CONFIG}:aim", small(photographs, *RESNET)
    options = (*options, *THIRTY, f"parallel={kind}")
    config = configs.override(configs.load(name), options)
    loop.run(config, tmp_path / "one", 1, quiet=True)

    run = (name, tmp_path / "many", *options)
    two = start_several(2, *run)
    step = until_saved(tmp_path / "many")
    for process in two:
        process.kill()
        process.communicate()
    with interrupted(step + 10, "saved at step"):
        loop.run(config, tmp_path / "many", 1, quiet=True)
    outputs = finish(*start_several(4, *run))
    assert f"resuming {tmp_path / 'many'} at step {step + 11} of 30" in outputs[0]

    one, many = tmp_path / "one", tmp_path / "many"
    for column in ("train_loss", "val_loss"):
        np.testing.assert_allclose(history(many)[column], history(one)[column], rtol=1e-4)
    assert read_json(many / "summary.json")["steps"] == 30
    weights = [restore_run(folder, "latest").variables["params"] for folder in (one, many)]
    for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
