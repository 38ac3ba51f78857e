"""The command aim-flax: aim-flax train --config digits_mlp is python train.py of a checkout."""

import importlib
import sys
from collections.abc import Sequence

from aim_flax import __version__
from aim_flax.console import COMMAND, as_command
from aim_flax.errors import UsageError, nearest

# The modules are imported when they are called for: each takes seconds.
COMMANDS = {
    "train": ("train", "trains the network of a config"),
    "eval": ("evaluate", "evaluates a checkpoint of a run"),
    "ablate": ("ablate", "trains arms with several seeds, and compares them"),
    "predict": ("predict", "tells the classes of images with a run's network"),
    "export": ("export", "makes one file of a run's network, which runs without this package"),
    "inspect": ("inspect", "tells what is in a folder of images, and what is wrong with it"),
    "prepare": ("prepare", "downloads and prepares a TFDS dataset"),
    "bench": ("bench", "tells how fast data comes, alone and in training"),
    "table": ("table", "makes a table of runs"),
    "import": ("keras_import", "makes a run from the weights of the published Keras network"),
}


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    sys.argv[0] = COMMAND
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"aim_flax {__version__}")
    elif name not in COMMANDS:
        raise UsageError(
            f"there is no command {name!r}{nearest(name, COMMANDS)}; there are:"
            f" {', '.join(COMMANDS)}"
        )
    else:
        # What errors begin with, and what --help calls it.
        sys.argv[0] = f"{COMMAND} {name}"
        importlib.import_module(f"aim_flax.cli.{COMMANDS[name][0]}").main(argv[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    usage = [f"usage: {COMMAND} COMMAND ...", "", *lines, ""]
    return "\n".join([*usage, f"{COMMAND} COMMAND --help lists the flags of a command."])


if __name__ == "__main__":
    main()
