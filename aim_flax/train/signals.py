"""Signals to a run: those that end it after its state is saved, and one that only saves."""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from aim_flax import watch
from aim_flax.console import ENDS, SAVES
from aim_flax.errors import InterruptionError


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Yields a list to which a first SIGTERM, Ctrl-C or SIGHUP is added; a second acts as usual.

    Not one within another, or it is the third that does. SIGHUP comes when a terminal is closed.
    Where it is ignored, as under nohup, it stays so.
    """
    received: list[int] = []
    ends = [number for number in ENDS if signal.getsignal(number) != signal.SIG_IGN]
    # A parent that watches this process, see `watch.py`, ends it itself on a second one.
    with _received(received, ends, once=watch.channel() is None):
        yield received


@contextlib.contextmanager
def asked_to_save() -> Iterator[list[int]]:
    """Yields a list to which each SIGUSR1 is added."""
    received: list[int] = []
    with _received(received, SAVES, once=False):
        yield received


@contextlib.contextmanager
def _received(received: list[int], numbers: Iterable[int], once: bool) -> Iterator[None]:
    """Adds signals to a list; `once`: only the first, and then all act as before."""
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def receive(signum, frame):
        received.append(signum)
        if once:
            restore()

    try:
        for signum in numbers:
            previous[signum] = signal.signal(signum, receive)
    except ValueError:  # Not in the main thread, where signals are handled.
        restore()
    try:
        yield
    finally:
        restore()


def interruption(signum: int, step: int) -> InterruptionError:
    name = signal.Signals(signum).name
    return InterruptionError(
        f"{name}: saved at step {step}; the same command continues from there", signum
    )
