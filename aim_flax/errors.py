"""The exceptions that scripts tell in one line; any other is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of the caller's, told in one line; scripts print it and exit with status 2."""


class BusyError(UsageError):
    """Another process is writing to the same place."""


class DivergenceError(RuntimeError):
    """The loss became NaN or infinite.

    Attributes:
      step: the first step, from 1, of such a loss.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class NotFiniteError(RuntimeError):
    """The loss on a whole split is NaN or infinite, so that the accuracy says nothing."""


class StorageError(RuntimeError):
    """Something can't be written: the disk is full, read-only or broken, or the folder is gone.

    What was written before is whole.
    """


class DataError(RuntimeError):
    """A record of a dataset that can't be used; the message names it."""


class InterruptionError(RuntimeError):
    """A signal asked a run to end, and it has saved its state.

    Attributes:
      signal: the signal's number.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signal = signum


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the valid name closest to `name`, or ""."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(what: str, value: str, valid: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of `valid`."""
    valid = list(valid)
    if value not in valid:
        raise UsageError(
            f"{what} is {value!r}, expected one of {', '.join(valid)}{nearest(str(value), valid)}"
        )
