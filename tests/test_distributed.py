"""Several processes, as on several hosts: found as SLURM's would be, talking through gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from aim_flax.train import loop
from aim_flax.train.restore import restore_run
from tests.photos import write_folder
from tests.test_streamed import CONFIG, folder, losses, small
from tests.test_training import DIGITS, ROOT, SMALL, digits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion", "quick_compile")]

FLAGS = ("train.epochs=8", "train.steps_per_call=5")


def free_job() -> str:
    """A SLURM job number whose port, as JAX derives it, is free."""
    for job in range(4096):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 61440 + job)):
                return str(job)
    raise RuntimeError("no free port")


def start(config: str, workdir: Path, flags: Sequence[str]) -> list[subprocess.Popen]:
    job = free_job()
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "train.py", "--config", config]
            + [f"--config.{a}" for a in flags]
            + ["--workdir", workdir, "--distributed"],
            env=os.environ
            | {
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
                "SLURM_JOB_ID": job,
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_two_processes_train_as_one_and_stop_together(tmp_path, kind):
    flags = (*FLAGS, f"parallel={kind}")
    command = (f"{DIGITS}:aim_state", tmp_path / "two", (*SMALL, *flags))
    first, second = start(*command)
    for line in iter(first.stdout.readline, ""):
        if line.startswith("step"):
            break
    second.send_signal(signal.SIGTERM)  # One process alone is told to stop.
    output = first.communicate(timeout=300)[0]
    second.communicate(timeout=300)
    assert "saved at step" in output, output
    assert first.returncode == second.returncode == 128 + signal.SIGTERM

    processes = start(*command)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resuming" in outputs[0]
    assert "step" not in outputs[1]
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["steps"] == 152

    loop.run(digits("aim_state", *flags), tmp_path / "one", 4, quiet=True)
    one, two = (losses(tmp_path / run) for run in ("one", "two"))
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-5)
    assert restore_run(tmp_path / "two", "latest").step == 152


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_each_process_reads_its_share_of_what_streams(tmp_path, kind):
    """A damaged image is read, and reported, by one of them alone."""
    photographs = write_folder(tmp_path / "photographs", train=120)
    (photographs / "train" / "class1" / "0001.png").write_bytes(b"garbage")
    flags = ("data.in_memory_mb=0.0", "data.on_error=skip", "train.epochs=1", f"parallel={kind}")
    values = (*small(photographs), *flags)
    processes = start(f"{CONFIG}:control", tmp_path / "two", values)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(output.count("left out:") for output in outputs) == [0, 1]

    summary = loop.run(folder(photographs, *flags), tmp_path / "one", 4, quiet=True)
    assert summary["skipped_images"] == 1
    both = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert both["skipped_images"] == 1
    assert both["test_examples"] == 21
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
