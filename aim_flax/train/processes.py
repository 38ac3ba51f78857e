"""One of several processes that share a run: how it joins them, and how it leaves them."""

import contextlib
import hashlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from aim_flax import watch
from aim_flax.config import to_json
from aim_flax.console import fail, reporting_errors
from aim_flax.errors import BusyError, InterruptionError, UsageError

# A process that gives no sign of life for so long is lost, in seconds, and JAX ends the others.
SILENCE = 15
# How long a process with an error stays, so that others with the same can tell theirs.
_STAYS = 3
_HOST_NAME = 64


@contextlib.contextmanager
def joined(
    config: ConfigDict,
    workdir: Path,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    wait: int = 300,
) -> Iterator[None]:
    """Joins this process with the others of its run, and leaves them in the end.

    An error that this process alone has ends it without waiting for the others: they notice that it
    is gone.

    Args:
      config: the run's; all must have the same.
      workdir: the run's folder.
      coordinator: host and port of process 0; None, also for `count` and `index`: as
        `jax.distributed.initialize` finds them.
      count: how many processes there are.
      index: which of them this is.
      wait: for how many seconds processes wait for one another to come up.

    Raises:
      UsageError: there is nothing that says where the other processes are, or one of them has
        another config.
    """
    channel = watch.channel()
    if channel:
        channel.tell(workdir=str(workdir), wait=wait, silence=SILENCE)
    _initialize(coordinator, count, index, wait)
    if channel is None:
        _meet(config)
        yield
        return
    try:
        with reporting_errors():
            channel.tell(index=jax.process_index(), count=jax.process_count())
            channel.tell(hosts=_meet(config))
            try:
                yield
            except BusyError as error:
                # As of a host that is gone, whose locks a file system keeps for a minute or two.
                fail(str(error))
                _leave(channel, watch.LOST)
    except SystemExit as end:
        if isinstance(end.__context__, InterruptionError):
            raise  # All have saved the state, and end together.
        _leave(channel, end.code)
    except Exception:
        # Where another process has died, this is often the first sign of it. Then JAX ends this one
        # when it knows who it was.
        error = traceback.format_exc()
        channel.tell(error=error)
        time.sleep(SILENCE + 5)
        print(error, end="", file=sys.stderr)
        _leave(channel, 1)


def _initialize(coordinator: str | None, count: int | None, index: int | None, wait: int) -> None:
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=wait,
            heartbeat_timeout_seconds=SILENCE,
        )
    except (RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        if message == "coordinator_address should be defined.":
            message = "there is no SLURM, Open MPI, Kubernetes or TPU pod that says where the other"
            message += " processes are: give --coordinator, --processes and --process-id"
        raise UsageError(f"--distributed: {message}") from error


def _meet(config: ConfigDict) -> list[str]:
    """Returns the name of each process's host, after a look at whether all have the same config."""
    digest = hashlib.blake2b(to_json(config).encode(), digest_size=16).digest()
    name = socket.gethostname().encode()[:_HOST_NAME].ljust(_HOST_NAME, b"\0")
    sent = np.frombuffer(digest + name, np.uint8)
    all_sent = multihost_utils.process_allgather(sent).reshape(-1, len(sent))
    digests, names = all_sent[:, : len(digest)], all_sent[:, len(digest) :]
    others = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(others):
        raise UsageError(
            f"process {others[0]} was started with another config than process 0: start the same"
            " command as all processes"
        )
    return [bytes(name).rstrip(b"\0").decode(errors="replace") for name in names]


def _leave(channel: watch.Channel, status: int) -> NoReturn:
    """Ends this process without waiting for the others, as the usual end would."""
    channel.tell(status=status)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    time.sleep(_STAYS)
    os._exit(status)
