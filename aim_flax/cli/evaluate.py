"""The command line of eval.py: evaluates a checkpoint of a run."""

from collections.abc import Sequence

from aim_flax.console import CommandParser, as_command, folder, parse_with_overrides

# Those of aim_flax.evaluate.interventions, which takes seconds to import.
_KINDS = ("keep", "zero", "mean", "shuffle", "noise", "reset", "no_write")


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="eval.py",
        description="Evaluates a checkpoint of a run, with the network of its saved config.",
        epilog="Keys of the config's groups data and eval can be changed, for example"
        " --config.data.dir=DIR",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=folder, required=True, help="of the run")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|STEP")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    kinds = (*_KINDS, "all")
    parser.add_argument(
        "--memory",
        default="keep",
        choices=kinds,
        metavar="|".join(kinds),
        help="what layers read instead of the memory, or no_write: updates leave it as it is; all:"
        " a table of what each of them changes",
    )
    parser.add_argument("--at", metavar="PATTERN", help="the layers to alter; default: all")
    parser.add_argument(
        "--per-layer", action="store_true", help="with --memory all: alter each layer alone, too"
    )
    parser.add_argument(
        "--memory-pictures",
        action="store_true",
        help="draw what is in the memory: its learned content, what single images write, and how"
        " far that differs between classes",
    )
    args, assignments = parse_with_overrides(parser, argv)
    if args.at is not None and args.memory == "keep":
        parser.error("--at says where the memory is altered: give --memory, other than keep")
    if args.memory_pictures and (args.memory != "keep" or args.per_layer):
        parser.error("--memory-pictures draws the memory as it is: leave out --memory")
    if args.per_layer and args.memory != "all":
        parser.error("--per-layer goes with --memory all")
    for assignment in assignments:
        if assignment.partition(".")[0] not in ("data", "eval"):
            parser.error(f"--config.{assignment}: of a run, only data and eval can be changed")

    from aim_flax import allocator, compile_cache, devices
    from aim_flax.train.evaluate_run import evaluate_interventions, evaluate_run, picture_memory

    allocator.keep_memory()
    compile_cache.enable()
    devices.warn_of_wrong_results()
    at = ".*" if args.at is None else args.at
    common = (args.workdir, args.checkpoint, args.split, args.devices, assignments)
    if args.memory_pictures:
        picture_memory(*common)
    elif args.memory == "all":
        evaluate_interventions(*common, at, args.per_layer)
    else:
        evaluate_run(*common, args.memory, at)
