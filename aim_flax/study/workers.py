"""Processes that do a study's work beside each other, each on cores of its own.

Small networks keep one core busy, and several hardly more: XLA shares each operation between the
cores, and waits for all of them at its end. So on a CPU a study takes its runs one per core. Each
process is told one item of work after the other, of the arm whose program it has compiled as long
as there are any, and reports how far it is.
"""

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from aim_flax.console import Reporter
from aim_flax.data.in_memory import InMemory
from aim_flax.errors import InterruptionError, StorageError, UsageError
from aim_flax.models.describe import intermediate_bytes
from aim_flax.study.work import Work, fits_together
from aim_flax.train import signals
from aim_flax.train.experiment import Experiment
from aim_flax.train.step import size_in_bytes

# Below so many images, all epochs and runs together, a process takes longer to start than it saves.
_LEAST_IMAGES = 20_000
# Of the machine's memory, for the arrays of all training steps.
_SHARE_OF_MEMORY = 0.5
_SECONDS_BETWEEN_LOOKS = 0.2
# Where there are none, their threads would get in each other's way.
_HAS_CORES = hasattr(os, "sched_setaffinity")
# The first word of what a process tells: a line to print; how far it is, by what it did itself or
# not; that its item is done, or saved because of a signal; an exception.
SAY, AT, SKIP, DONE, SAVED, ERROR = "say", "at", "skip", "done", "saved", "error"


@dataclasses.dataclass(frozen=True)
class Order:
    """An item of work as a process is told it.

    Attributes:
      config: the arm's, as a dictionary: patterns that follow from sizes cannot be sent.
      seeds: of the runs; several are trained as one program.
    """

    config: dict[str, Any]
    seeds: list[int]


@dataclasses.dataclass
class Worker:
    """A process, and what it is at.

    Attributes:
      process: the process.
      line: to it and back.
      item: its work; None: none.
      step: how far it is in that, summed over its runs.
      arm: the last one that it worked on.
      is_told: whether it was told to save its state and end.
    """

    process: subprocess.Popen
    line: Connection
    item: Work | None = None
    step: int = 0
    arm: str | None = None
    is_told: bool = False

    def begin(self, item: Work) -> None:
        self.item, self.arm = item, item.experiment.config.arm
        self.line.send(Order(item.experiment.config.to_dict(), item.seeds))

    def stop(self) -> None:
        # Once: a second signal would end it at once.
        if not self.is_told:
            self.is_told = True
            self.process.send_signal(signal.SIGTERM)


def check_workers(count: int, device_count: int | None) -> None:
    """Raises UsageError where a study cannot have so many processes, each with one CPU device."""
    if count < 1:
        raise UsageError(f"workers: {count}, expected at least 1, or auto")
    if count == 1:
        return
    if jax.default_backend() != "cpu":
        raise UsageError(
            f"workers: {count}, but they are for CPUs, and this is a {jax.default_backend()}: start"
            " the same command once on each, and they share the work"
        )
    devices = jax.device_count() if device_count is None else device_count
    if devices > 1:
        raise UsageError(
            f"workers: {count}, each of one device, but there are {devices}: --devices 1 takes one"
        )
    if not _HAS_CORES:
        raise UsageError(f"workers: {count}, but this system gives processes no cores of their own")


def how_many(work: Sequence[Work], device_count: int | None) -> int:
    """Returns how many processes do the work soonest: one for each core, or 1.

    1 where there is another device than one CPU, little work, or work that gains nothing; and no
    more than have room in half of the machine's memory.
    """
    try:
        check_workers(2, device_count)
    except UsageError:
        return 1
    arms = {item.experiment.config.arm: item.experiment for item in work}
    if any(fits_together(experiment) for experiment in arms.values()):
        return 1
    images = sum(item.steps * item.experiment.config.train.batch_size for item in work)
    if images < _LEAST_IMAGES:
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = int(_SHARE_OF_MEMORY * memory / max(map(_bytes_of_step, arms.values())))
    return max(1, min(len(os.sched_getaffinity(0)), len(work), room))


def _bytes_of_step(experiment: Experiment) -> int:
    """Returns about how many bytes a training step holds, at most: its images, the state and its
    gradients, and everything that the forward pass computes with its gradient."""
    config = experiment.config
    images = (config.train.batch_size, *config.data.image_shape)
    trace = jax.make_jaxpr(lambda key, x: experiment.model.init(key, x, train=False))
    jaxpr = trace(jax.random.key(0), jax.ShapeDtypeStruct(images, jnp.float32))
    pixels = 0
    if isinstance(experiment.dataset, InMemory):
        pixels = sum(experiment.dataset.sizes.values()) * math.prod(config.data.image_shape)
    state = size_in_bytes(experiment.abstract_state)
    return 2 * intermediate_bytes(jaxpr.jaxpr) + 2 * state + 2 * pixels


def train(
    workdir: Path,
    work: list[Work],
    count: int,
    reporter: Reporter,
    received: list[int],
    options: dict[str, Any],
) -> None:
    """Does the work with `count` processes, and takes each item off the list when it is begun.

    Args:
      received: signals received so far; one ends the work, with its state saved.
      options: of `work.do`.

    Raises:
      InterruptionError, StorageError, and what a process raised, after all have ended.
    """
    done = 0
    with _started(workdir, count, options) as workers, signals.asked_to_save() as asked:
        while True:
            for worker in workers:
                if received:
                    worker.stop()
                elif worker.item is None and work:
                    worker.begin(_next(work, worker.arm, [w.arm for w in workers if w.item]))
            while asked:
                for worker in workers:
                    worker.process.send_signal(asked[-1])
                asked.clear()
            busy = {worker.line: worker for worker in workers if worker.item}
            if not busy:
                break
            for line in wait(list(busy), _SECONDS_BETWEEN_LOOKS):
                worker = busy[line]
                try:
                    kind, *told = line.recv()
                except EOFError:
                    if not worker.is_told:
                        raise _lost(worker) from None
                    kind = SAVED  # It had not begun yet.
                if kind == ERROR:
                    raise told[0]
                if kind == SAY:
                    reporter.say(*told)
                elif kind in (DONE, SAVED):
                    done += worker.item.steps
                    worker.item, worker.step = None, 0
                else:
                    worker.step, *shown = told
                    at = done + sum(worker.step for worker in workers)
                    if kind == SKIP:
                        reporter.skip_to(at)
                    else:
                        reporter.advance(at, *shown)
    if received:
        name = signal.Signals(received[0]).name
        message = f"{name}: all that was begun is saved; the same command continues from there"
        raise InterruptionError(message, received[0])


def _next(work: list[Work], arm: str | None, others: Collection[str]) -> Work:
    """Takes an item off the list for a process: of the arm that it has compiled, or else of one
    that no other is at, if there is such a one."""

    def rank(item: Work) -> tuple[bool, bool]:
        name = item.experiment.config.arm
        return name != arm, name in others

    item = min(work, key=rank)
    work.remove(item)
    return item


def _lost(worker: Worker) -> StorageError:
    status = worker.process.wait()
    how = f"status {status}" if status >= 0 else signal.Signals(-status).name
    memory = "; if that was for memory, --workers 1 needs less" if status == -signal.SIGKILL else ""
    return StorageError(
        f"a process that trained {worker.item.label} ended ({how}){memory}; the same command"
        " continues from its last checkpoint"
    )


@contextlib.contextmanager
def _started(workdir: Path, count: int, options: dict[str, Any]) -> Iterator[list[Worker]]:
    """Yields processes, and ends them: those that still work save their state first."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::count] or cores for i in range(count)]
    workers: list[Worker] = []
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    try:
        for share in shares:
            own, other = Pipe()
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from aim_flax.study import worker; worker.main({other.fileno()})",
                ],
                env=environment,
                pass_fds=[other.fileno()],
                # Ctrl-C is for this process, which passes it on.
                process_group=0,
            )
            other.close()
            # At once: how many threads libraries start depends on it.
            os.sched_setaffinity(process.pid, share)
            own.send((workdir, options))
            workers.append(Worker(process, own))
        yield workers
    finally:
        for worker in workers:
            if worker.item is not None and worker.process.poll() is None:
                worker.stop()
            with contextlib.suppress(OSError):
                worker.line.send(None)
        for worker in workers:
            # What it still has to say would keep it from ending.
            with contextlib.suppress(EOFError, OSError):
                while True:
                    worker.line.recv()
            worker.process.wait()
            worker.line.close()
