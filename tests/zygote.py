"""A process that has imported all that commands need, and forks one for each command it is told.

Python and these imports take most of the seconds of a short run, which tests that kill many runs
would pay again and again. JAX must not have started its backend before a fork, and has not: only
commands do that.

Reads lines of JSON: {"module": ..., "argv": ..., "folder": ..., "output": ...}; answers each with
the process's id and, when it has ended, with its status as os.waitpid has it.
"""

import importlib
import json
import os
import sys
import traceback

MODULES = ("aim_flax.train.loop", "aim_flax.study.run", "aim_flax.study.plan", "matplotlib.figure")
COMMANDS = ("aim_flax.cli.train", "aim_flax.cli.ablate")


def work(module: str, argv: list[str], folder: str, output: str) -> None:
    """Runs a command and ends the process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    status = 0
    try:
        sys.argv = [module.rpartition(".")[2]]
        importlib.import_module(module).main(argv)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    os._exit(status)


def serve() -> None:
    for name in (*MODULES, *COMMANDS):
        importlib.import_module(name)
    for line in sys.stdin:
        command = json.loads(line)
        if not (pid := os.fork()):
            work(**command)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    serve()
