"""A command that runs as a child of itself, so that something is left to tell how it ended.

JAX aborts a process in C++ when another one of its run is lost, and prints a stack; Python has no
say in it. So the command that is started becomes a parent, which imports no JAX: it starts the same
command as its child, passes signals and what the child says on, and makes one line and an exit
status of an end by that abort. (PyTorch's torchrun watches its workers in the same way.)
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from aim_flax.console import ENDS, SAVES, end_process, fail

# os.EX_TEMPFAIL, which not all systems have: whoever started the command may do so again.
LOST = 75
_CHANNEL = "AIM_FLAX_CHANNEL"
# The first line of what JAX's coordination service says before it ends the process.
_SERVICE = re.compile(rb"[EF]\d{4} [\d:.]+ +\d+ (coordination_service\w*|client)\.(cc|h):\d+\]")
_FATAL = "Terminating process because the JAX distributed service detected fatal errors"
_NAMED = re.compile(
    r"tasks are unhealthy \(stopped sending heartbeats\):\s+((?:\d+\s+)+)"
    r"|Task (\d+) heartbeat timeout"
)


class Channel:
    """A child's line to its parent; the child ends when the parent does."""

    def __init__(self, descriptor: int):
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)
        self._heard = threading.Semaphore(0)
        threading.Thread(target=self._end_with_parent, daemon=True).start()

    def tell(self, **words: Any) -> None:
        """Tells the parent what it should know when this process ends, see `Told`.

        Returns when the parent knows it, as what it does with a signal depends on it.
        """
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(words).encode() + b"\n")
            self._heard.acquire(timeout=5)

    def _end_with_parent(self) -> None:
        # The parent sends a byte for each line that it has read, and nothing when it has ended.
        with contextlib.suppress(OSError):
            while self._socket.recv(1):
                self._heard.release()
        os._exit(LOST)


@dataclasses.dataclass
class Told:
    """What a child has told its parent.

    Attributes:
      workdir: the run's folder.
      wait: how many seconds it waits for all processes to come up.
      silence: after how many seconds without a sign of life a process is lost.
      index: which of the processes it is; None until all have come up.
      count: how many there are.
      hosts: the name of each process's host, where it is known.
      status: the exit status of an error of its own, which it has told in a line.
      error: the traceback of an exception that may come of another process's end.
    """

    workdir: str = ""
    wait: int = 0
    silence: int = 0
    index: int | None = None
    count: int = 0
    hosts: Sequence[str] = ()
    status: int | None = None
    error: str = ""


_channel: Channel | None = None


def channel() -> Channel | None:
    """Returns this process's line to the parent that watches it; None if there is none."""
    return _channel


def watched(argv: Sequence[str] | None) -> None:
    """Returns in a child only: the command as it was started becomes its parent.

    A main that is called from elsewhere, as from a notebook, goes on as it is.

    Args:
      argv: the command's flags; None: those of the command line.
    """
    global _channel
    if descriptor := os.environ.pop(_CHANNEL, None):
        _channel = Channel(int(descriptor))
        return
    flags = sys.argv[1:] if argv is None else list(argv)
    if sys.orig_argv[len(sys.orig_argv) - len(flags) :] == flags:
        _Parent().run()


class _Parent:
    def __init__(self):
        self._told, self._passed, self._held = Told(), [], b""

    def run(self) -> NoReturn:
        """Starts the child, and ends as it does."""
        here, there = socket.socketpair()
        # A child that is starting would end by it.
        for signum in SAVES:
            signal.signal(signum, signal.SIG_IGN)
        self._child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env=os.environ | {_CHANNEL: str(there.fileno())},
            pass_fds=[there.fileno()],
            stderr=subprocess.PIPE,
            # Ctrl-C comes to all of a terminal's processes, and the child gets it from here.
            start_new_session=True,
        )
        there.close()
        for signum in (*ENDS, *SAVES):
            # What is ignored, as under nohup, is ignored by the child as well.
            if signum in SAVES or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._pass_on)
        readers = [
            threading.Thread(target=self._listen, args=[here], daemon=True),
            threading.Thread(target=self._read, args=[self._child.stderr], daemon=True),
        ]
        for reader in readers:
            reader.start()
        status = self._child.wait()
        for reader in readers:
            # They end with the child, but for what it has started and left.
            reader.join(timeout=5)
        self._end(status)

    def _pass_on(self, signum: int, frame: object) -> None:
        if signum in ENDS:
            # A second one ends it at once; so does the first, while there is nothing to save.
            if self._told.index is None or self._passed:
                self._child.kill()
                end_process(signum)
            self._passed.append(signum)
        self._child.send_signal(signum)

    def _listen(self, channel: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in channel.makefile("rb"):
                self._told = dataclasses.replace(self._told, **json.loads(line))
                channel.sendall(b"\n")

    def _read(self, lines: IO[bytes]) -> None:
        """Passes on what the child says on standard error, up to what the service says."""
        for line in lines:
            if self._held or _SERVICE.match(line):
                self._held += line
            else:
                _write(line)

    def _end(self, status: int) -> NoReturn:
        told, held = self._told, self._held.decode(errors="replace")
        if told.status is None and status == -signal.SIGABRT and _FATAL in held:
            fail(f"{lost(held, told)}{self._log(held)}")
            sys.exit(LOST)
        _write(self._held)
        if told.status is not None:
            status = told.status
        elif -status in self._passed:
            end_process(-status)
        elif status < 0:
            name = signal.Signals(-status).name
            why = ", as the system does when memory is short" if name == "SIGKILL" else ""
            fail(f"{_place(told.index, told)} was ended by {name}{why}{_kept(told)}")
            status = 128 - status
        sys.exit(status)

    def _log(self, held: str) -> str:
        """Keeps what the line leaves out, and returns where."""
        file = Path(self._told.workdir) / f"lost_{self._told.index or 0}.log"
        if self._told.index is None or not file.parent.is_dir():
            return ""
        with contextlib.suppress(OSError):
            with file.open("a") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{self._told.error}{held}\n")
            return f" ({file.name} has JAX's words)"
        return ""


def lost(text: str, told: Told) -> str:
    """Returns the line for what JAX's coordination service said when it ended a process."""
    if told.index is None:
        return (
            f"not all processes came up within {told.wait} s; start all of them, with a longer"
            " --start-timeout where that takes longer"
        )
    named = {int(n) for found in _NAMED.findall(text) for n in " ".join(found).split()}
    what = f"died, or gave no sign of life for {told.silence} s"
    if named == {told.index}:
        line = f"{_place(told.index, told)}, this one, gave no sign of life for {told.silence} s"
        line += ", and the others ended"
    elif named := sorted(named - {told.index}):
        line = f"{', '.join(_place(n, told) for n in named)} {what}"
    else:
        # The processes meet at the first one: if it is lost, nothing more is known.
        line = f"{_place(0, told)} {what}, or ended because of another, which its own line names"
    return line + _kept(told)


def _kept(told: Told) -> str:
    if told.index is None:
        return ""
    steps = [folder.name for folder in Path(told.workdir).glob("checkpoints/*/")]
    # The names of those that orbax has not finished have more in them.
    last = max((int(step) for step in steps if step.isdecimal()), default=None)
    where = "begins again, as nothing is saved" if last is None else f"goes on at step {last}"
    return f"; the same command, started again as all processes, {where}"


def _place(index: int | None, told: Told) -> str:
    if index is None:
        return "a process that waited for the others"
    host = f" (on {told.hosts[index]})" if told.hosts else ""
    return f"process {index} of {told.count}{host}"


def _write(text: bytes) -> None:
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(2, text) :]
