"""The one exception for wrong use, so that scripts can tell it from a bug."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of the caller's, told in one line; scripts print it and exit with status 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the valid name closest to `name`, or ""."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(what: str, value: str, valid: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of `valid`."""
    valid = list(valid)
    if value not in valid:
        raise UsageError(
            f"{what} is {value!r}, expected one of {', '.join(valid)}{nearest(str(value), valid)}"
        )
