"""SIGTERM and Ctrl-C, which end a run after its state is saved."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from aim_flax.errors import InterruptionError


@contextlib.contextmanager
def signals(received: list[int] | None = None) -> Iterator[list[int]]:
    """Yields a list to which a first SIGTERM or Ctrl-C is added; a second one acts as usual.

    Args:
      received: the list; None: a new one.
    """
    received = [] if received is None else received
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def receive(signum, frame):
        received.append(signum)
        restore()

    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            previous[signum] = signal.signal(signum, receive)
    except ValueError:  # Not in the main thread, where signals are handled.
        restore()
    try:
        yield received
    finally:
        restore()


def interruption(signum: int, step: int) -> InterruptionError:
    name = signal.Signals(signum).name
    return InterruptionError(
        f"{name}: saved at step {step}; the same command continues from there", signum
    )
