"""What a command tells: how far it is, on a terminal, in lines and in a file; and how it ends."""

import argparse
import atexit
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aim_flax.errors import (
    DataError,
    DivergenceError,
    InterruptionError,
    NotFiniteError,
    StorageError,
    UsageError,
)
from aim_flax.files import write_json
from aim_flax.names import printable

COMMAND = "aim-flax"
_SECONDS_BETWEEN_FILES = 10.0
# What the system refuses because of how the machine is, not of what the code does.
_OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
)


class Pace:
    """How far work of `total` steps is, and how long the rest takes if it goes on like that.

    Attributes:
      step: where the work is.
    """

    def __init__(self, total: int, start: int):
        self.step, self._total = start, total
        # What this process has done since `_started`.
        self._done, self._began, self._started = 0, time.monotonic(), None

    def skip_to(self, step: int) -> None:
        """Goes to a step that this process did not work for, so it tells nothing of its speed."""
        self.step = step

    def advance(self, step: int) -> None:
        """Goes to a step that was just done."""
        if self._started is None:
            # Not before the first call, whose time is mostly compilation.
            self._started = time.monotonic()
        else:
            self._done += step - self.step
        self.step = step

    @property
    def seconds_left(self) -> float | None:
        """None before there is anything to judge by."""
        if not self._done:
            return None
        return (time.monotonic() - self._started) / self._done * (self._total - self.step)

    @property
    def seconds(self) -> float:
        """Since this process began."""
        return time.monotonic() - self._began


class ProgressFile:
    """A JSON file that says how far work is, for people and programs that watch it.

    It has `step`, `steps`, `share` (0 to 1), `hours` so far and `hours_left`, None before that can
    be judged. It is written at most every ten seconds, and when it is told to. The work does not
    need it: where it can't be written, what it said before stays.
    """

    def __init__(self, path: Path):
        self._path, self._written = path, -float("inf")

    def write(
        self, pace: Pace, steps: int, now: bool = False, seconds: float | None = None, **more: Any
    ) -> None:
        """Writes it, if it is time to.

        Args:
          now: write it in any case.
          seconds: what `hours` says; None: those of this process.
          **more: what else to say, which comes first.
        """
        if not now and time.monotonic() - self._written < _SECONDS_BETWEEN_FILES:
            return
        self._written = time.monotonic()
        seconds = pace.seconds if seconds is None else seconds
        left = 0.0 if pace.step >= steps else pace.seconds_left
        where = {"step": pace.step, "steps": steps, "share": round(pace.step / steps, 4)}
        hours = {"hours": round(seconds / 3600, 4)}
        hours["hours_left"] = None if left is None else round(left / 3600, 4)
        with contextlib.suppress(OSError):
            write_json(self._path, more | where | hours)


class Reporter:
    """Reports on work of `total` steps; with `quiet`, prints only what `say` is told.

    Where the output is not a terminal, lines come at least `seconds` apart. A `file` says the same,
    quiet or not.
    """

    def __init__(
        self,
        total: int,
        start: int,
        quiet: bool = False,
        seconds: float = 0.5,
        file: Path | None = None,
    ):
        # Imported here, so that a command is quick to say what is wrong with its flags.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._total, self._seconds = total, seconds
        self._file = None if file is None else ProgressFile(file)
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._progress = None
        self.quiet = quiet
        self._last_line = -float("inf")
        self._pace = Pace(total, start)
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

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._progress:
            self._console.print(message, markup=False)
        else:
            print(message, flush=True)

    def skip_to(self, step: int) -> None:
        """Goes to a step that this process did not work for, so it tells nothing of its speed."""
        self._pace.skip_to(step)

    def advance(self, step: int, metrics: dict[str, float], label: str = "") -> None:
        """Goes to a step that was just done, and shows it if it is time for a line."""
        shown = [f"{name} {value:.4f}" for name, value in metrics.items()]
        description = " ".join([label, *shown] if label else shown)
        self._pace.advance(step)
        if self._file:
            self._file.write(self._pace, self._total, step == self._total, at=label)
        if self._progress:
            self._progress.update(self._task, completed=step, description=description)
            return
        now = time.monotonic()
        due = now - self._last_line >= self._seconds or step == self._total
        if self.quiet or not due:
            return
        self._last_line = now
        seconds = self._pace.seconds_left
        left = "" if seconds is None else f", {seconds:.0f} s left"
        print(f"step {step}/{self._total}: {description}{left}", flush=True)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of longer work: one run of many, or several that are trained as one program.

    Attributes:
      reporter: reports on the whole work, whose steps are those of all runs.
      label: the part's name.
      start: the step of the whole work at which the part begins.
      runs: how many runs the part trains; a step of the part is a step of each.
      received: the signals received so far, of which one ends the whole work; None: of a part that
        is all the work, which handles them itself.
    """

    reporter: Reporter
    label: str
    start: int
    runs: int
    received: list[int] | None

    def begin(self, step: int) -> None:
        """Goes to a step of the part that this process did not work for."""
        self.reporter.skip_to(self.start + step * self.runs)

    def say(self, message: str) -> None:
        """Prints a line, unless the reporter is quiet."""
        if not self.reporter.quiet:
            self.reporter.say(message)

    def advance(self, step: int, metrics: dict[str, float]) -> None:
        """Goes to a step of the part that was just done."""
        self.reporter.advance(self.start + step * self.runs, metrics, self.label)


def fail(message: str) -> None:
    """Prints one line on standard error, after the program's name."""
    print(f"{_program()}: {printable(message)}", file=sys.stderr)


def _program() -> str:
    return os.path.basename(sys.argv[0])


def called(script: str) -> str:
    """Returns how a script was started: as `aim-flax COMMAND`, or by its own name."""
    return sys.argv[0] if sys.argv[0].startswith(f"{COMMAND} ") else script


def command_line(script: str, argv: Sequence[str]) -> str:
    """Returns the command line that started a script with these arguments."""
    name = called(script)
    return shlex.join([*(["python", script] if name == script else name.split()), *argv])


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line.

    Its `prog` is that of the script; `aim-flax COMMAND` takes its place where that was called.
    """

    def __init__(self, prog: str, **options: Any):
        super().__init__(called(prog), **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; --help lists the flags\n")


def folder(text: str) -> str:
    """Returns the value of a flag that names a folder; an unset variable of a shell is none."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a folder")
    return text


def differences(text: str) -> list[float]:
    """Returns the value of a flag that names differences of accuracy, in percentage points."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < points <= 100 for points in found):
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected points of accuracy, each above 0 and at most 100, such as 1,0.5"
        )
    return found


def add_power(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --power, a list of `differences`; without a value a usual one."""
    parser.add_argument(
        "--power",
        nargs="?",
        type=differences,
        const="2,1,0.5,0.25",
        metavar="POINTS",
        help="print how small a difference the finished runs would show with a chance of 80 %%, and"
        " how many seeds differences of POINTS need; default: 2,1,0.5,0.25",
    )


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


def without_noise() -> Callable[[], None]:
    """Keeps off the terminal what libraries' threads say of errors that they raise as well.

    Orbax logs every step of every checkpoint, and of a write that failed the tracebacks of all its
    threads; asyncio and tensorstore tell what became of the rest.

    Returns:
      A function that ends it.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def end() -> None:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = tell
    return end


def as_command(stopped: str = "") -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Makes a program's main of a function of its flags, which reports errors.

    Given no flags it is the program itself, and ends on signals, see `end_on_signals`.

    Args:
      stopped: what the line about the signal says besides.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> None:
            if argv is None:
                end_on_signals(stopped)
                # To the end of the process: threads may outlive the command.
                without_noise()
            try:
                with reporting_errors():
                    main(argv)
            except SystemExit as end:
                if argv is None and isinstance(end.__context__, StorageError):
                    # Orbax's threads may wait without end for what could not be written.
                    leave(end.code)
                raise

        return run

    return decorate


class _End:
    """A handler of signals that ends the process."""

    def __init__(self, stopped: str):
        self._stopped = stopped

    def __call__(self, signum: int, frame: object) -> None:
        end_process(signum, self._stopped)


# With their usual handlers; not all systems have SIGHUP.
ENDS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
ENDS |= {signal.SIGHUP: signal.SIG_DFL} if hasattr(signal, "SIGHUP") else {}
# What asks a run to save its state; not all systems have it.
SAVES = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []


def _nothing_to_save(signum: int, frame: object) -> None:
    os.write(2, f"{_program()}: {signal.Signals(signum).name}: no state to save yet\n".encode())


def _end_as_told() -> None:
    """Ignores signals from here on: a command that has told how it ended, ends so."""
    for signum in (*ENDS, *SAVES):
        # Python puts the system's handlers in place of its own while it goes down, and with them a
        # signal would end the process without a word.
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_IGN)


def end_on_signals(stopped: str = "") -> None:
    """Makes Ctrl-C, SIGTERM and SIGHUP end the process at once, with one line, and `stopped` in it.

    SIGUSR1, which asks a run to save its state, does nothing else.

    From now on until Python goes down, and wherever nothing else handles them. Without an
    exception: raised while a C++ module is imported it aborts the process, and in a callback it is
    lost. And without the end of Python, which waits for threads, or crashes where they go on.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    # What was registered first is called last.
    atexit.unregister(_end_as_told)
    atexit.register(_end_as_told)
    for signum in SAVES:
        if signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, _nothing_to_save)
    for signum, handler in ENDS.items():
        there = signal.getsignal(signum)
        if there == handler or isinstance(there, _End):
            signal.signal(signum, _End(stopped))


def end_process(signum: int, stopped: str = "") -> NoReturn:
    """Prints a line and ends the process as a signal does."""
    with contextlib.suppress(OSError):
        # Not by print, which the signal may have interrupted; a progress bar hides the cursor.
        # Python has no standard output where it was closed.
        show_cursor = "\x1b[?25h\n" if sys.stdout and sys.stdout.isatty() else ""
        what = f"stopped by {signal.Signals(signum).name}{stopped and f'; {stopped}'}"
        os.write(2, f"{show_cursor}{_program()}: {what}\n".encode())
    leave(128 + signum)


def leave(status: int) -> NoReturn:
    """Ends the process at once, without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Makes one line and an exit status of what a user did wrong; for a block or a command."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(without_noise())
            yield
    except UsageError as error:
        fail(str(error))
        sys.exit(2)
    except (DataError, DivergenceError, NotFiniteError, StorageError) as error:
        fail(str(error))
        sys.exit(1)
    except InterruptionError as error:
        fail(str(error))
        sys.exit(128 + error.signal)
    except BrokenPipeError:
        # Who read the output has left. Python would complain once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(2 if error.errno == errno.ENAMETOOLONG else 1)
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        if line.startswith("Unable to initialize backend"):
            fail(line)
            sys.exit(2)
        # XLA's message starts like this on all platforms.
        if not line.startswith("RESOURCE_EXHAUSTED"):
            raise
        fail(
            f"{line}; what needs less memory: a smaller train.batch_size or"
            " eval.batch_size, data.in_memory_mb=0, dtype=bfloat16, ablate.py's"
            " --seeds-per-program 1"
        )
        sys.exit(1)
