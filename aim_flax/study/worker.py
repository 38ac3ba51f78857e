"""A process of a study: does what it is told, and tells how far it is. See `workers.py`."""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax import allocator, compile_cache
from aim_flax import config as configs
from aim_flax.console import Part, without_noise
from aim_flax.data.in_memory import InMemory
from aim_flax.errors import (
    DataError,
    InterruptionError,
    NotFiniteError,
    StorageError,
    UsageError,
)
from aim_flax.study.work import Work, do
from aim_flax.study.workers import AT, DONE, ERROR, SAVED, SAY, SKIP, Order
from aim_flax.train import signals
from aim_flax.train.experiment import Experiment

_SECONDS_BETWEEN_WORDS = 0.2


class _Line:
    """A line to the parent; the process ends when the parent does."""

    def __init__(self, connection: Connection):
        self._connection, self._told = connection, queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, *words: Any) -> None:
        self._connection.send(words)

    def hear(self) -> Any:
        """Returns what the parent says next."""
        return self._told.get()

    def orders(self) -> Iterator[Order]:
        return iter(self._told.get, None)

    def _listen(self) -> None:
        try:
            while True:
                self._told.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(1)


class _Teller:
    """Does for a `Part` what a `Reporter` does, and leaves the printing to the parent."""

    def __init__(self, line: _Line, quiet: bool):
        self.quiet, self._line, self._last = quiet, line, -float("inf")

    def say(self, message: str) -> None:
        self._line.tell(SAY, message)

    def skip_to(self, step: int) -> None:
        self._line.tell(SKIP, step)

    def advance(self, step: int, metrics: dict[str, float], label: str = "") -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_WORDS:
            self._last = now
            self._line.tell(AT, step, metrics, label)


def main(descriptor: int) -> None:
    """Does items of work until the parent has none, or a signal ends one.

    Args:
      descriptor: of the connection to the parent.
    """
    line = _Line(Connection(descriptor))
    without_noise()
    workdir, options = line.hear()
    allocator.keep_memory()
    compile_cache.enable()
    with signals.signals() as received:
        try:
            _work(line, Path(workdir), options, received)
        except InterruptionError:
            line.tell(SAVED)
        except (UsageError, DataError, NotFiniteError, StorageError, OSError) as error:
            line.tell(ERROR, error)
        except RuntimeError as error:
            if not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            # XLA's own class cannot be sent.
            line.tell(ERROR, RuntimeError(str(error)))
    sys.stdout.flush()
    # Not the end of Python, in which threads of libraries are waited for.
    os._exit(0)


def _work(line: _Line, workdir: Path, options: dict[str, Any], received: list[int]) -> None:
    experiment, datasets = None, {}
    for order in line.orders():
        if received:
            line.tell(SAVED)
            return
        if experiment is None or experiment.config.arm != order.config["arm"]:
            experiment = None  # Its programs are freed before others are compiled.
            experiment = _experiment(order, datasets)
        item = Work(experiment, order.seeds)
        part = Part(_Teller(line, options["quiet"]), item.label, 0, len(order.seeds), received)
        do(workdir, item, part, **options)
        line.tell(DONE)


def _experiment(order: Order, datasets: dict[str, InMemory]) -> Experiment:
    """Returns an arm's experiment; those with the same images share them in memory."""
    config = configs.override(ConfigDict(order.config).lock(), [f"seed={order.seeds[0]}"])
    images = json.dumps([config.data.to_json(), config.eval.to_json()])
    experiment = Experiment(config, 1, datasets.get(images))
    if isinstance(experiment.dataset, InMemory):
        datasets[images] = experiment.dataset
    return experiment
