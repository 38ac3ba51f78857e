"""Patterns of module paths, and what is taken of a matching module's output."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aim_flax.errors import UsageError

# An index or a name, or several of them, one within the other; None or () take all.
Selector = int | str | Sequence[int | str] | None
Patterns = str | Sequence[str | tuple[str, Selector]] | Mapping[str, Selector]


def compile_patterns(patterns: Patterns) -> tuple[re.Pattern, ...]:
    """Returns them compiled, without empty ones; UsageError for what is no regular expression."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    # Of pairs, the pattern.
    patterns = [pattern if isinstance(pattern, str) else pattern[0] for pattern in patterns]
    try:
        return tuple(re.compile(pattern) for pattern in patterns if pattern)
    except re.error as error:
        raise UsageError(f"{error.pattern!r} is no regular expression: {error}") from None


def selectors(patterns: Patterns) -> dict[re.Pattern, Selector]:
    """Returns each pattern, compiled, with its selector; () takes the output as it is.

    Raises:
      UsageError: what is no regular expression, or no selector.
    """
    given: dict[str, Selector] = {}
    if isinstance(patterns, Mapping):
        given = dict(patterns)
    elif not isinstance(patterns, str):
        given = dict(pair for pair in patterns if not isinstance(pair, str))
    given = {pattern: () if chosen is None else chosen for pattern, chosen in given.items()}
    for pattern, chosen in given.items():
        keys = chosen if isinstance(chosen, Sequence) else (chosen,)
        if not all(isinstance(key, int | str) for key in keys):
            raise UsageError(
                f"update_after takes {chosen!r} of the output of {pattern!r}, expected an index or"
                " a name, several of them one within the other, or None for all"
            )
    return {pattern: given.get(pattern.pattern, ()) for pattern in compile_patterns(patterns)}


def select(y: Any, selector: Selector, path: str) -> Any:
    """Returns a part of a module's output.

    Raises:
      UsageError: an output without that part.
    """
    for key in (selector,) if isinstance(selector, int | str) else selector:
        try:
            is_field = isinstance(key, str) and not isinstance(y, Mapping)
            y = getattr(y, key) if is_field else y[key]
        except (AttributeError, IndexError, KeyError, TypeError):
            raise UsageError(
                f"update_after takes {selector!r} of the output of {path!r}, but a"
                f" {type(y).__name__} there has no {key!r}"
            ) from None
    return y
