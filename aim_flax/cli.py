"""The command lines of train.py, eval.py and ablate.py: flags in, one clear line out on wrong use.

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
    from aim_flax.interventions import KINDS

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
    kinds = (*KINDS, "all")
    parser.add_argument(
        "--memory",
        default="keep",
        choices=kinds,
        metavar="|".join(kinds),
        help="what layers read instead of the memory, or that it is not written (no_write); all:"
        " a table of what each changes",
    )
    parser.add_argument("--at", metavar="PATTERN", help="the layers to alter; default: all")
    parser.add_argument(
        "--per-layer", action="store_true", help="with --memory all: alter each layer alone, too"
    )
    args, assignments = parse_with_overrides(parser, argv)
    if args.at is not None and args.memory == "keep":
        parser.error("--at says where the memory is altered: give --memory, other than keep")
    if args.per_layer and args.memory != "all":
        parser.error("--per-layer goes with --memory all")
    for assignment in assignments:
        if assignment.partition(".")[0] not in ("data", "eval"):
            parser.error(f"--config.{assignment}: of a run, only data and eval can be changed")

    def work() -> None:
        from aim_flax import backend, restoring

        if warning := backend.warning():
            print(warning, file=sys.stderr)
        at = ".*" if args.at is None else args.at
        common = (args.workdir, args.checkpoint, args.split, args.devices, assignments)
        if args.memory == "all":
            restoring.evaluate_interventions(*common, at, args.per_layer)
        else:
            restoring.evaluate_run(*common, args.memory, at)

    run_reporting_errors(work)


def ablate(argv: Sequence[str] | None = None) -> None:
    """Trains all arms of a study with all seeds and reports on them; the command of ablate.py."""
    parser = CommandParser(
        prog="ablate.py",
        description="Trains every arm with every seed, or goes on where the study was left, and"
        " compares the arms. Started more than once, on one GPU each, say, it shares the work.",
        epilog="Any key of the config is a flag, for all arms: --config.train.epochs=5",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument(
        "--arms",
        default="",
        metavar="A,B",
        help="of the config file, or a control that is derived: control_params, control_compute,"
        " memory_frozen, memory_noise, memory_zero, memory_half, memory_double",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'NAME[=ARM]:KEY=VALUE KEY=VALUE'",
        help="a further arm: the file's first one, or ARM, with keys of its config set",
    )
    parser.add_argument("--derive-from", metavar="ARM", help="default: the first with a memory")
    parser.add_argument(
        "--seeds", default="10", metavar="N|A-B|A,B", help="N: 0 to N - 1; default: 10"
    )
    parser.add_argument(
        "--reference", metavar="ARM", help="compare the others with it; default: control"
    )
    parser.add_argument("--workdir", help="default: runs/ablation-<config>")
    parser.add_argument(
        "--seeds-per-program",
        type=_seeds_per_program,
        metavar="N|auto",
        help="train so many seeds of an arm at once; default: auto, all where that is quicker",
    )
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report of --workdir anew"
    )
    args, assignments = parse_with_overrides(parser, argv)
    if args.report_only and not args.workdir:
        parser.error("--report-only needs the --workdir of a study")
    if not args.report_only and not args.config:
        parser.error("the following arguments are required: --config")

    def work() -> None:
        from aim_flax import ablation, backend

        if args.report_only:
            ablation.write_report(args.workdir, args.reference)
            return
        if warning := backend.warning():
            print(warning, file=sys.stderr)
        ablation.run(
            args.config,
            args.workdir,
            [name.strip() for name in args.arms.split(",")] if args.arms else [],
            args.seeds,
            args.arm,
            assignments,
            args.derive_from,
            args.reference,
            args.seeds_per_program,
            args.devices,
        )

    run_reporting_errors(work)


def _seeds_per_program(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least 1, or auto")
    return int(text)


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
    except RuntimeError as error:
        # How XLA says it, on all platforms.
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        fail(
            f"{str(error).splitlines()[0]}; what needs less memory: a smaller train.batch_size or"
            " eval.batch_size, data.in_memory_mb=0, dtype=bfloat16, ablate.py's"
            " --seeds-per-program 1"
        )
        sys.exit(1)
