"""Makes files of a run's network for other programs: aim-flax export --workdir RUN."""

from collections.abc import Sequence
from pathlib import Path

from aim_flax.console import CommandParser, as_command
from aim_flax.errors import UsageError

_KINDS = (".zip", ".safetensors")


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="aim_flax.cli.export",
        description="Makes files of a run's network for other programs: .zip, the network with"
        " classes and preprocessing, which runs with jax alone on CPU, CUDA and TPU;"
        " .safetensors, its parameters.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|STEP")
    parser.add_argument(
        "--to",
        action="append",
        type=Path,
        metavar="FILE.zip|FILE.safetensors",
        help="may be given twice; default: both, network.* in the workdir",
    )
    args = parser.parse_args(argv)
    places = args.to or [Path(args.workdir) / f"network{kind}" for kind in _KINDS]
    for place in places:
        if place.suffix not in _KINDS:
            raise UsageError(f"--to is {place}, expected a name that ends in {' or '.join(_KINDS)}")

    from aim_flax import compile_cache, devices, files
    from aim_flax.names import printable
    from aim_flax.use import export
    from aim_flax.use.predictor import Predictor

    if args.to:
        files.check_outputs([("--to", place) for place in places])
    compile_cache.enable()
    devices.warn_of_wrong_results()
    predictor = Predictor.from_run(args.workdir, args.checkpoint)
    for place in places:
        write = export.write_network if place.suffix == ".zip" else export.write_parameters
        write(place, predictor)
        megabytes = place.stat().st_size / 1e6
        print(printable(f"{place}: {megabytes:,.1f} MB, step {predictor.step}"))


if __name__ == "__main__":
    main()
