"""The command line of train.py: trains the network of a config."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from aim_flax import watch
from aim_flax.console import CommandParser, as_command, folder, parse_with_overrides


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="train.py",
        description="Trains the network of a config, or continues the run in its workdir.",
        epilog="Any key of the config is a flag: --config.train.epochs=5",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARM]")
    parser.add_argument(
        "--workdir",
        type=folder,
        help="default: runs/<config>-<arm>-<seed>, for images in a folder with its name",
    )
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes that share the work, as jax.distributed finds them",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 is reached, if nothing says where the processes are",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process-id", type=int, metavar="I", help="which this one is, from 0")
    parser.add_argument(
        "--start-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long processes wait for one another to come up; default: 300",
    )
    parser.add_argument(
        "--other-images",
        action="store_true",
        help="train on, although the images of the classes are others than so far",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--describe", action="store_true", help="print the network's size and stop"
    )
    instead.add_argument(
        "--compile-for",
        metavar="TOPOLOGY,...",
        help="print what a training step costs on chips that need not be here, such as v5e:4x8 or"
        " h100:8, or on those that are (here), and stop",
    )
    parser.add_argument(
        "--images-per-chip",
        type=int,
        metavar="N",
        help="with --compile-for: a batch of N for each chip, instead of train.batch_size for all",
    )
    args, assignments = parse_with_overrides(parser, argv)
    _check_processes(parser, args)
    if args.images_per_chip is not None and args.compile_for is None:
        parser.error("--images-per-chip goes with --compile-for")
    if args.compile_for is not None and (args.devices is not None or args.distributed):
        parser.error("--compile-for says which devices: leave --devices and --distributed out")
    if args.distributed and not args.describe:
        watch.watched(argv)

    # Imported once the flags are checked: JAX, orbax and others take seconds.
    from aim_flax import config as configs

    config = configs.override(configs.load(args.config), assignments)

    if args.describe:
        from aim_flax.train.describe import describe_training

        print(describe_training(config, args.devices))
        return
    if args.compile_for is not None:
        from aim_flax.train.compile_for import compile_for

        compile_for(config, args.compile_for, args.images_per_chip)
        return
    import jax

    from aim_flax import allocator, compile_cache, devices
    from aim_flax.train import loop, processes, workdir

    allocator.keep_memory()
    place = Path(args.workdir or workdir.default_workdir(config))
    several = contextlib.nullcontext()
    if args.distributed:
        where = (args.coordinator, args.processes, args.process_id)
        several = processes.joined(config, place, *where, args.start_timeout)
    with several:
        compile_cache.enable()
        devices.warn_of_wrong_results()
        quiet = jax.process_index() > 0
        loop.run(config, place, args.devices, quiet, args.other_images)


def _check_processes(parser: CommandParser, args: argparse.Namespace) -> None:
    where = [args.coordinator, args.processes, args.process_id]
    if any(flag is not None for flag in where):
        if not args.distributed:
            parser.error("--coordinator, --processes and --process-id need --distributed")
        if None in where:
            parser.error("--coordinator, --processes and --process-id are given together")
        host, _, port = args.coordinator.rpartition(":")
        if not (host and port.isdecimal()):
            parser.error(f"--coordinator is {args.coordinator!r}, expected HOST:PORT")
        if args.processes < 1:
            parser.error(f"--processes is {args.processes}, expected at least 1")
        if not 0 <= args.process_id < args.processes:
            parser.error(
                f"--process-id is {args.process_id}, expected 0 to {args.processes - 1}, one less"
                " than --processes"
            )
    if args.start_timeout < 1:
        parser.error(f"--start-timeout is {args.start_timeout}, expected seconds, at least 1")
