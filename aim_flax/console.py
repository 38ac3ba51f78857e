"""What a run says while it goes: a progress bar on a terminal, plain lines elsewhere."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from aim_flax.errors import DataError, DivergenceError, InterruptionError, UsageError


class Reporter:
    """Reports on a run of `total` steps; with `quiet`, only what `say` is told.

    Off a terminal there are at least `seconds` between two lines.
    """

    def __init__(self, total: int, start: int, quiet: bool = False, seconds: float = 0.5):
        self._total, self._seconds = total, seconds
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._progress = None
        self.quiet = quiet
        self._last_line = -float("inf")
        self._start, self._started = start, None
        if self._console.is_terminal and not quiet:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total, completed=start)

    def __enter__(self) -> "Reporter":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._progress:
            self._console.print(message, markup=False)
        else:
            print(message, flush=True)

    def skip(self, steps: int) -> None:
        """Notes steps that an earlier try has done: they tell nothing of the time left."""
        self._start += steps

    def advance(self, step: int, metrics: dict[str, float], label: str = "") -> None:
        """Shows the state after a step, if it's time for a line."""
        shown = [f"{name} {value:.4f}" for name, value in metrics.items()]
        description = " ".join([label, *shown] if label else shown)
        if self._progress:
            self._progress.update(self._task, completed=step, description=description)
            return
        now = time.monotonic()
        if self._started is None:
            # Not at the start: the first call's time is mostly compilation.
            self._start, self._started = step, now
        due = now - self._last_line >= self._seconds or step == self._total
        if self.quiet or not due:
            return
        self._last_line = now
        done = step - self._start
        left = ""
        if done:
            seconds = (now - self._started) / done * (self._total - step)
            left = f", {seconds:.0f} s left"
        print(f"step {step}/{self._total}: {description}{left}", flush=True)


class Part:
    """A part of a longer work: what `training` reports to, where it trains one of many runs."""

    def __init__(self, reporter: Reporter, label: str, before: int, runs: int, received: list[int]):
        """`before` steps were done before it; each step of its is one of `runs` runs. A signal on
        `received` ends the whole work."""
        self.received = received
        self._reporter, self._label, self._before, self._runs = reporter, label, before, runs

    def begin(self, step: int) -> None:
        """Notes that an earlier try has come as far as `step`."""
        self._reporter.skip(step * self._runs)

    def say(self, message: str) -> None:
        """Prints a line, unless the reporter is quiet."""
        if not self._reporter.quiet:
            self._reporter.say(message)

    def advance(self, step: int, metrics: dict[str, float]) -> None:
        self._reporter.advance(self._before + step * self._runs, metrics, self._label)


def fail(message: str) -> None:
    """Prints one line on standard error, after the program's name."""
    print(f"{sys.argv[0].rpartition('/')[2]}: {message}", file=sys.stderr)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the "key=value" of each --config.key=value (or --config.key value)."""
    args, rest = parser.parse_known_args(argv)
    assignments: list[str] = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word!r}")
        assignment = word.removeprefix("--config.")
        if "=" not in assignment:
            assignment += "=" + next(words, "")
        assignments.append(assignment)
    return args, assignments


def run_reporting_errors(work: Callable[[], None]) -> None:
    """Calls a command's work; what a user did wrong becomes one line and an exit status."""
    # Orbax and absl report each step of each checkpoint; what a user needs, this project says.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        work()
    except UsageError as error:
        fail(str(error))
        sys.exit(2)
    except (DataError, DivergenceError) as error:
        fail(str(error))
        sys.exit(1)
    except InterruptionError as error:
        fail(str(error))
        sys.exit(128 + error.signal)
    except RuntimeError as error:
        # How XLA says it, on all platforms.
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        fail(
            f"{str(error).splitlines()[0]}; what needs less memory: a smaller train.batch_size or"
            " eval.batch_size, data.in_memory_mb=0, dtype=bfloat16, ablate.py's"
            " --seeds-per-program 1"
        )
        sys.exit(1)
