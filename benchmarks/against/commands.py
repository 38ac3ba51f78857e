"""Sides that are whole commands, from the start of Python to its end: the digits MLP."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EPOCHS = 40
# The share of test images that either may have right: seeds and libraries differ by less.
LEAST_ACCURACY = 0.9


class Command:
    """A command that trains the digits MLP into a new folder each time.

    Args:
      packages: whose versions are told.
    """

    packages: tuple[str, ...] = ()

    def __init__(self):
        self._result: dict[str, Any] = {}

    def words(self, folder: str) -> list[str]:
        raise NotImplementedError

    def result(self, folder: str, output: str) -> dict[str, Any]:
        """Returns `params`, `steps` and `test_accuracy` of what was run."""
        raise NotImplementedError

    def environment(self, folder: str) -> dict[str, str]:
        return {}

    def counts(self) -> list[int]:
        self.step()
        return [self._result["params"], 0]

    def outputs(self) -> dict[str, list[float]]:
        if self._result["test_accuracy"] < LEAST_ACCURACY:
            raise RuntimeError(f"it has learned nothing: {self._result}")
        return {"steps": [self._result["steps"]]}

    def step(self) -> float:
        """Returns the seconds that the command took, without making and reading its folder."""
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, **self.environment(folder)}
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *self.words(folder)],
                **dict(cwd=ROOT, env=environment, capture_output=True, text=True),
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise RuntimeError(f"{self.words(folder)} failed:\n{done.stderr}")
            self._result = self.result(folder, done.stdout)
        return seconds

    def facts(self) -> dict[str, Any]:
        return {
            # Of the whole process: its Python and libraries included.
            "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10,
            "versions": ", ".join(f"{name} {version(name)}" for name in self.packages),
        }


class Ours(Command):
    """Args: first: whether it has to compile everything, as on a machine that never ran it."""

    packages = ("aim_flax", "jax")

    def __init__(self, first: bool):
        super().__init__()
        self._first = first
        self._cache = tempfile.TemporaryDirectory()

    def environment(self, folder: str) -> dict[str, str]:
        # A cache of its own, so that what the user has compiled before makes no difference.
        return {"XDG_CACHE_HOME": folder if self._first else self._cache.name}

    def words(self, folder: str) -> list[str]:
        train = ["train.py", "--config", "configs/digits_mlp.py:control"]
        return [*train, f"--config.train.epochs={EPOCHS}", "--workdir", f"{folder}/run"]

    def result(self, folder: str, output: str) -> dict[str, Any]:
        return json.loads(Path(folder, "run", "summary.json").read_text())


class Keras(Command):
    packages = ("keras", "jax")

    def words(self, folder: str) -> list[str]:
        return [str(Path(__file__).with_name("digits_keras.py")), folder]

    def environment(self, folder: str) -> dict[str, str]:
        return {"KERAS_BACKEND": "jax"}

    def result(self, folder: str, output: str) -> dict[str, Any]:
        return json.loads(output.splitlines()[-1])
