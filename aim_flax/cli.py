"""The command lines of train.py and eval.py: flags in, one clear line out on wrong use.

Exit status: 0 done; 1 the run failed (a loss that is not finite, a damaged image); 2 wrong use,
nothing touched; 128 + n ended by signal n, with the state saved.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from aim_flax import config as configs
from aim_flax.console import fail
from aim_flax.errors import DataError, DivergenceError, InterruptionError, UsageError


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def train(argv: Sequence[str] | None = None) -> None:
    """Trains the network of a config; the command line of train.py."""
    parser = CommandParser(
        prog="train.py",
        description="Trains the network of a config, or goes on where its workdir was left.",
        epilog="Any key of the config is a flag: --config.train.epochs=5",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARM]")
    parser.add_argument("--workdir", help="default: runs/<config>-<arm>-<seed>")
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes that share the work, as jax.distributed finds them",
    )
    parser.add_argument("--describe", action="store_true", help="print the network's size and stop")
    args, assignments = parse_with_overrides(parser, argv)

    def work() -> None:
        config = configs.override(configs.load(args.config), assignments)
        # Imported once the flags are known to be right: orbax and others take seconds.
        from aim_flax import backend, training, workdir
        from aim_flax.data.load import open_dataset, with_classes
        from aim_flax.describe import describe

        if args.describe:
            if config.model.num_classes is None:
                config = with_classes(config, open_dataset(config).classes)
            print(describe(config))
            return
        if args.distributed:
            jax.distributed.initialize()
        if warning := backend.warning():
            print(warning, file=sys.stderr)
        training.run(
            config,
            args.workdir or workdir.default_workdir(config),
            args.devices,
            quiet=jax.process_index() > 0,
        )

    run_reporting_errors(work)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Evaluates a checkpoint of a run; the command line of eval.py."""
    parser = CommandParser(
        prog="eval.py",
        description="Evaluates a checkpoint of a run, with the network of its saved config.",
        epilog="Where the data lies may be given anew: --config.data.dir=DIR, and any other key of"
        " the groups data and eval",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|STEP")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    args, assignments = parse_with_overrides(parser, argv)
    for assignment in assignments:
        if assignment.partition(".")[0] not in ("data", "eval"):
            parser.error(f"--config.{assignment}: of a run, only data and eval can be changed")

    def work() -> None:
        from aim_flax import backend, restoring

        if warning := backend.warning():
            print(warning, file=sys.stderr)
        restoring.evaluate_run(args.workdir, args.checkpoint, args.split, args.devices, assignments)

    run_reporting_errors(work)


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the "key=value" of each --config.key=value (or --config.key value)."""
    args, rest = parser.parse_known_args(argv)
    assignments: list[str] = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word!r}")
        assignment = word.removeprefix("--config.")
        if "=" not in assignment:
            assignment += "=" + next(words, "")
        assignments.append(assignment)
    return args, assignments


def run_reporting_errors(work: Callable[[], None]) -> None:
    """Calls a command's work; what a user did wrong becomes one line and an exit status."""
    # Orbax and absl report each step of each checkpoint; what a user needs, this project says.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        work()
    except UsageError as error:
        fail(str(error))
        sys.exit(2)
    except (DataError, DivergenceError) as error:
        fail(str(error))
        sys.exit(1)
    except InterruptionError as error:
        fail(str(error))
        sys.exit(128 + error.signal)
