"""Tells the classes of images with a run's network: aim-flax predict --workdir RUN IMAGES."""

import sys
from collections.abc import Sequence
from pathlib import Path

from aim_flax.console import CommandParser, as_command


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="aim_flax.cli.predict",
        description="Tells the classes of images with a run's network. Of the run, its directory is"
        " all that is needed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE|FOLDER|PATTERN", help="a folder: all images in it"
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|STEP")
    parser.add_argument("--top", type=int, default=5, help="classes per image; default: 5")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row per image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all probabilities")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="draw the images with their classes, as PNG"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="what is done at a damaged image; default: as the run did, data.on_error",
    )
    # Intermixed: images may stand before and after the flags.
    args = parser.parse_intermixed_args(argv)
    if args.top < 1:
        parser.error(f"--top is {args.top}, expected at least 1")

    from aim_flax import compile_cache, devices, files
    from aim_flax.names import printable
    from aim_flax.train.workdir import read_config
    from aim_flax.use import inputs, predict
    from aim_flax.use.predictor import Predictor

    asked = {"--csv": args.csv, "--json": args.json, "--sheet": args.sheet}
    files.check_outputs([(flag, place) for flag, place in asked.items() if place])
    # Before the network is restored, which takes longer.
    data = read_config(Path(args.workdir)).data
    paths = inputs.find(args.images, data.get("formats", "usual"))
    compile_cache.enable()
    devices.warn_of_wrong_results()
    predictor = Predictor.from_run(args.workdir, args.checkpoint)
    skip = (args.on_error or data.get("on_error", "stop")) == "skip"
    if args.sheet:
        # Imported here because drawing takes more imports.
        from aim_flax.use import sheet

    all_found, thumbnails = [], []
    threads = data.get("threads", 4)
    for found, pixels in predict.predictions(predictor, paths, skip, threads):
        print(predict.line(found, args.top), flush=True)
        all_found.append(found)
        if args.sheet and len(thumbnails) < sheet.MOST:
            thumbnails.append(sheet.thumbnail(pixels, predictor.preprocessing.white))
    if len(all_found) < len(paths):
        left_out = len(paths) - len(all_found)
        print(f"{len(all_found):,} images, {left_out:,} left out", file=sys.stderr)
    if args.csv:
        predict.write_csv(args.csv, all_found, args.top)
    if args.json:
        predict.write_json(args.json, predictor, all_found, args.top)
    if args.sheet:
        shown = [found.prediction for found in all_found[: len(thumbnails)]]
        sheet.write(args.sheet, sheet.draw(thumbnails, shown))
        if len(shown) < len(all_found):
            message = f"{args.sheet} has the first {len(shown)} images"
            print(printable(message), file=sys.stderr)


if __name__ == "__main__":
    main()
