"""Sides of a comparison take turns: one works while all others sleep."""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_FOLDER = Path(__file__).parents[1]


class SideError(RuntimeError):
    """A side failed, or computes something else than what it is compared with."""


class Spread(NamedTuple):
    """The median of several measurements, the lowest and the highest."""

    median: float
    low: float
    high: float


class Worker:
    """A side in a process of its own, see worker.py.

    Args:
      name: of the side, for messages.
      python: the interpreter of its environment.
      module, kind, options: see worker.py.
      environment: variables that this process gets besides those of the caller.
    """

    def __init__(
        self,
        name: str,
        python: Path | str,
        module: str,
        kind: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), "-m", "against.worker", module, kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
            cwd=_FOLDER,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, order: str) -> Any:
        """Returns the answer to an order.

        Raises:
          SideError: the process has ended, with the last of what it wrote.
        """
        try:
            print(order, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        status = self._process.wait()
        self._errors.seek(0)
        last = "".join(self._errors.readlines()[-20:])
        raise SideError(f"{self.name} ended with status {status} when asked to {order}:\n{last}")

    def take_turn(self, steps: int, untimed: int) -> float:
        """Returns the mean seconds of a number of steps, after others that are not timed."""
        return statistics.mean(self.ask(f"step {untimed + steps}")[untimed:])


def take_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns what each side measured in each round.

    Every other round goes backwards, so that a machine that becomes slower meets all sides alike.
    """
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            measured[name].append(sides[name]())
    return measured


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(measured: Sequence[float], against: Sequence[float]) -> Spread:
    """Returns the spread of the ratios of each round."""
    return spread([a / b for a, b in zip(measured, against, strict=True)])


def check_equal(
    name: str, found: Mapping[str, Sequence[float]], other: str, expected: Mapping, most: Mapping
) -> None:
    """Checks that two sides compute the same.

    Args:
      found, expected: lists of numbers by what they are.
      most: how far each of these lists may differ, as a share of the expected list's largest
        number.

    Raises:
      SideError: they don't, with the difference.
    """
    for key, share in most.items():
        if len(found[key]) != len(expected[key]):
            raise SideError(f"{name} has {len(found[key])} {key}, and {other} {len(expected[key])}")
        largest = max(map(abs, expected[key]))
        apart = [abs(a - b) for a, b in zip(found[key], expected[key], strict=True)]
        if not all(a <= share * largest for a in apart):  # Nor if one of them is no number.
            raise SideError(
                f"{name} computes something else than {other}: {key} differ by"
                f" {max(apart) / largest:.1e} of the largest, at most {share:.0e} was expected"
            )
