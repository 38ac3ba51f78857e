"""How runs are stopped, in this process and in others: by signals, kills, and losses of NaN."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from ml_collections import ConfigDict

from aim_flax.errors import InterruptionError
from aim_flax.train.experiment import Experiment
from tests.runs import ROOT, flags

# Compiled as by `quick_compile`, and called as by conftest.py.
QUICK = {
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}
# For processes of CPUs, which talk with each other by gloo.
GLOO = {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", **QUICK}

_started: list[subprocess.Popen] = []

# (the run's experiment, steps taken before the call, {metric: (seeds, steps of the call)})
Hook = Callable[[Experiment, int, dict[str, np.ndarray]], None]


@contextmanager
def after_calls(hook: Hook) -> Iterator[None]:
    """Calls the hook after each call of training steps; it may change the metrics in place."""
    original = Experiment.train_call

    def train_call(self, length, together=False):
        call = original(self, length, together)

        def hooked(state, data, seed):
            step = int(np.ravel(self.devices.fetch(state.step))[0])
            state, metrics = call(state, data, seed)
            seen = {k: np.atleast_2d(v) for k, v in self.devices.fetch(metrics).items()}
            hook(self, step, seen)
            seen = seen if together else {name: values[0] for name, values in seen.items()}
            return state, self.devices.replicate(seen)

        return hooked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "train_call", train_call)
        yield


@contextmanager
def interrupted(
    step: int,
    message: str,
    signum: int = signal.SIGTERM,
    run: Callable[[ConfigDict], bool] = lambda config: True,
) -> Iterator[None]:
    """Sends a signal during the call that starts at this step, once, in a run of such a config.

    Expects an InterruptionError that says so.
    """
    sent = []

    def interrupt(experiment: Experiment, start: int, metrics: dict[str, np.ndarray]) -> None:
        if start == step and run(experiment.config) and not sent:
            sent.append(True)
            os.kill(os.getpid(), signum)

    with after_calls(interrupt), pytest.raises(InterruptionError, match=message) as error:
        yield
    assert error.value.signal == signum


@contextmanager
def not_finite(step: int, seed: int = 0) -> Iterator[None]:
    """Makes the training loss of a step NaN, for one seed of those from 0."""

    def spoil(experiment: Experiment, start: int, metrics: dict[str, np.ndarray]) -> None:
        together, length = metrics["loss"].shape
        seeds = [experiment.config.seed] if together == 1 else list(range(together))
        if seed in seeds and start < step <= start + length:
            metrics["loss"][seeds.index(seed), step - 1 - start] = np.nan

    with after_calls(spoil):
        yield


def start(
    script: str | Path, *arguments: str | Path, folder: Path | None = None, **environment: str
) -> subprocess.Popen:
    """Starts train.py or another script on one device, in a folder (None: this process's)."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _started.append(process)
    return process


def end_all() -> None:
    """Ends what `start` has started and a test that failed has left."""
    while _started:
        with _started.pop() as process:
            process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_one(
    index: int,
    count: int,
    port: int,
    config: str,
    workdir: Path,
    *assignments: str,
    more: tuple = (),
    script: str | Path = "train.py",
) -> subprocess.Popen:
    """Starts one of several processes, of one device each, that meet at a port of this host.

    Args:
      more: flags.
      script: what is started, with the flags of train.py.
    """
    command = (script, "--config", config, *flags(*assignments), "--workdir", workdir, *more)
    where = ("--coordinator", f"localhost:{port}", "--processes", count, "--process-id", index)
    return start(*command, "--distributed", *map(str, where), **GLOO)


def start_several(
    count: int,
    config: str,
    workdir: Path,
    *assignments: str,
    scripts: Mapping[int, str | Path] = MappingProxyType({}),
) -> list[subprocess.Popen]:
    """Starts all of several processes.

    Args:
      scripts: what is started as which of them, where that is not train.py.
    """
    port = free_port()
    return [
        start_one(
            *(index, count, port, config, workdir, *assignments),
            script=scripts.get(index, "train.py"),
        )
        for index in range(count)
    ]


def children(process: subprocess.Popen) -> list[int]:
    """Returns the numbers of the processes that a process's main thread has started."""
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in file.read_text().split()]


def lines_until(process: subprocess.Popen, first: str) -> list[str]:
    """Reads lines of its output up to one that starts so, or to its end."""
    lines = []
    for line in iter(process.stdout.readline, ""):
        lines.append(line)
        if line.startswith(first):
            break
    return lines


def until_saved(workdir: Path, seconds: float = 300.0) -> int:
    """Waits until a run has a whole checkpoint, and returns the step of its first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        names = [folder.name for folder in workdir.glob("checkpoints/*")]
        if steps := [int(name) for name in names if name.isdecimal()]:
            return min(steps)
        time.sleep(0.02)
    raise TimeoutError(f"no checkpoint in {workdir}")


def finish(*processes: subprocess.Popen) -> list[str]:
    """Waits for processes, all of which succeed, and returns their outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs
