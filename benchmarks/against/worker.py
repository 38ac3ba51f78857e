"""A side of a comparison, in a process and a Python environment of its own.

    python -m against.worker MODULE CLASS OPTIONS

CLASS(**OPTIONS) is built when it is asked for, so that its memory can be told from that of what it
imports. It has `counts()`, the parameters and running statistics; `outputs()`, numbers that are
equal for all that compute the same; `step()`, which returns when the work is done; and `facts()`.
Orders come in lines, and the answers, JSON, go out in lines: `counts`, `outputs`, `facts`, and
`step N`, the seconds of each of N steps. In between this process sleeps.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path


def main(module: str, name: str, options: str) -> None:
    # Whatever libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind = getattr(importlib.import_module(module), name)
    before, side = _resident("VmRSS"), None
    for line in sys.stdin:
        order, _, number = line.strip().partition(" ")
        side = side or kind(**json.loads(options))
        if order == "step":
            answer = [_timed(side.step) for _ in range(int(number))]
        else:
            answer = getattr(side, order)()
        if order == "outputs":
            # From here on it counts what steps need, not what compiling them did.
            _forget_peak()
        if order == "facts":
            answer.setdefault("peak_mib", _resident("VmHWM") - before)
        print(json.dumps(answer), file=answers, flush=True)


def _timed(step) -> float:
    """Returns the seconds of a step, or of that part of it that it says took so long."""
    start = time.perf_counter()
    return step() or time.perf_counter() - start


def _resident(field: str) -> float:
    """Returns the MiB of this process that are in memory (VmRSS), or were at most (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.is_file():  # Not on Linux: the most so far.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def _forget_peak() -> None:
    """Makes the most memory so far what it is now (proc_pid_clear_refs(5)), where that is known."""
    file = Path("/proc/self/clear_refs")
    if file.is_file():
        file.write_text("5")


if __name__ == "__main__":
    main(*sys.argv[1:])
