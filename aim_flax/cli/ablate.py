"""The command line of ablate.py: trains all arms of a study with all seeds, and reports on them."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from aim_flax.console import (
    CommandParser,
    add_power,
    as_command,
    command_line,
    folder,
    parse_with_overrides,
)


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="ablate.py",
        description="Trains every arm with every seed, or continues the study where it stopped, and"
        " compares the arms. Several of these commands, one on each GPU, share the work.",
        epilog="Any key of the config is a flag, for all arms: --config.train.epochs=5",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument(
        "--arms",
        default="",
        metavar="A,B",
        help="arms of the config file, or derived controls: control_params, control_compute,"
        " coords, position_bias, squeeze_excite, low_rank, memory_frozen, memory_noise,"
        " memory_zero, memory_half, memory_double",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'NAME[=ARM]:KEY=VALUE KEY=VALUE'",
        help="another arm: the file's first one, or ARM, with other values in its config",
    )
    parser.add_argument("--derive-from", metavar="ARM", help="default: the first with a memory")
    parser.add_argument(
        "--seeds", default="10", metavar="N|A-B|A,B", help="N: 0 to N - 1; default: 10"
    )
    parser.add_argument(
        "--reference", metavar="ARM", help="the arm to compare the others with; default: control"
    )
    parser.add_argument(
        "--workdir",
        type=folder,
        help="default: runs/ablation-<config>, for images in a folder with its name",
    )
    parser.add_argument(
        "--seeds-per-program",
        type=_at_least_one,
        metavar="N|auto",
        help="train this many seeds of an arm at once; default: auto, all if that is quicker",
    )
    parser.add_argument(
        "--workers",
        type=_at_least_one,
        metavar="N|auto",
        help="processes that train runs beside each other, each on its share of the cores; default:"
        " auto, one per core where that is quicker",
    )
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    parser.add_argument(
        "--other-images",
        action="store_true",
        help="go on, although the images of the classes are others than so far",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report of --workdir again"
    )
    add_power(parser)
    argv = sys.argv[1:] if argv is None else argv
    args, assignments = parse_with_overrides(parser, argv)
    if args.report_only and not args.workdir:
        parser.error("--report-only needs the --workdir of a study")
    if args.power and not args.workdir:
        parser.error("--power needs the --workdir of a study")
    if args.power and (args.config or args.report_only):
        other = "--config" if args.config else "--report-only"
        parser.error(f"--power only prints, and trains nothing: leave out {other}")
    if not (args.report_only or args.power or args.config):
        parser.error("the following arguments are required: --config")

    from aim_flax import allocator, compile_cache, devices
    from aim_flax.study.plan import plan
    from aim_flax.study.run import default_workdir, power, run, write_report

    if args.power:
        print(power(args.workdir, args.reference, args.power))
        return
    if args.report_only:
        write_report(args.workdir, args.reference, command=command_line("ablate.py", argv))
        return
    allocator.keep_memory()
    compile_cache.enable()
    devices.warn_of_wrong_results()
    arms = [name.strip() for name in args.arms.split(",")] if args.arms else []
    study = plan(
        args.config, arms, args.seeds, args.arm, assignments, args.derive_from, args.reference
    )
    workdir = args.workdir or default_workdir(study)
    # The report has the command: with its workdir it can be given anywhere.
    more = [] if args.workdir else ["--workdir", str(workdir)]
    study = dataclasses.replace(study, commands=[command_line("ablate.py", [*argv, *more])])
    options = dict(other_images=args.other_images, workers=args.workers)
    run(study, workdir, args.seeds_per_program, args.devices, **options)


def _at_least_one(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least 1, or auto")
    return int(text)
