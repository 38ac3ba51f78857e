"""The commands: flags in, an exit status out."""

import signal
import sys

from aim_flax.console import end_on_signals, end_process

_previous = sys.excepthook


def _tell(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Prints the traceback of an error that nobody handled; of Ctrl-C, one line."""
    if issubclass(kind, KeyboardInterrupt):
        end_process(signal.SIGINT)
    _previous(kind, error, trace)


sys.excepthook = _tell
# So Python calls itself while it looks for the module of `python -m`: what that imports takes
# seconds, and its main has not begun.
if sys.argv[:1] == ["-m"]:
    end_on_signals()
