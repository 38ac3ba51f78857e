"""The command line of train.py: trains the network of a config."""

from collections.abc import Sequence

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
        "--other-images",
        action="store_true",
        help="train on, although the images of the classes are others than so far",
    )
    parser.add_argument("--describe", action="store_true", help="print the network's size and stop")
    args, assignments = parse_with_overrides(parser, argv)

    # Imported once the flags are checked: JAX, orbax and others take seconds.
    from aim_flax import config as configs

    config = configs.override(configs.load(args.config), assignments)

    import jax

    from aim_flax import devices
    from aim_flax.data.load import open_dataset, with_classes
    from aim_flax.models.describe import describe
    from aim_flax.train import loop, workdir

    if args.describe:
        if config.model.num_classes is None:
            config = with_classes(config, open_dataset(config).classes)
        print(describe(config))
        return
    if args.distributed:
        jax.distributed.initialize()
    devices.warn_of_wrong_results()
    place = args.workdir or workdir.default_workdir(config)
    quiet = jax.process_index() > 0
    loop.run(config, place, args.devices, quiet, args.other_images)
