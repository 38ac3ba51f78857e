"""What is in a folder of images, and what is wrong with it: python -m aim_flax.cli.inspect DIR.

Prints the number of images of each class and split, their sizes and formats, the images that can't
be read and the duplicates, and draws some images of each class on a contact sheet. Exit status: 0
if all is well; 1 if an image can't be read or is in more than one split or class, or the folder's
layout is wrong; 2 if there is nothing to look at.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aim_flax.console import CommandParser, reporting_errors
from aim_flax.data.folder import split, survey
from aim_flax.data.inspection import contact_sheet, duplicates, examine, number, report
from aim_flax.errors import UsageError


@reporting_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="aim_flax.cli.inspect", description=__doc__.partition("\n\n")[2])
    parser.add_argument("directory", metavar="DIR", help="what data.dir is in a config")
    parser.add_argument(
        "--sheet", type=Path, default=Path("contact_sheet.png"), help="default: %(default)s"
    )
    parser.add_argument(
        "--per-class", type=int, default=6, help="images of each on the sheet; default: %(default)s"
    )
    for split_name, default in (("val", 0.1), ("test", 0.2)):
        meaning = f"as data.{split_name}_fraction; default: %(default)s"
        parser.add_argument(f"--{split_name}-fraction", type=float, default=default, help=meaning)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one per core")
    args = parser.parse_args(argv)
    if args.per_class < 1 or args.threads < 1:
        parser.error("--per-class and --threads are at least 1")
    if not args.sheet.absolute().parent.is_dir():
        raise UsageError(f"--sheet is {args.sheet}, but there is no folder {args.sheet.parent}")
    if args.sheet.is_dir():
        raise UsageError(f"--sheet is {args.sheet}, a folder, expected a file to write")
    sys.stdout.reconfigure(errors="backslashreplace")
    dataset, problems = survey(args.directory)
    if not problems:
        dataset = split(dataset, args.val_fraction, args.test_fraction)
    findings = examine(dataset, args.threads, Console(stderr=True))
    for line in report(dataset, findings):
        print(line)
    for problem in problems:
        print(f"layout: {problem}")
    unreadable = [finding for finding in findings if finding.problem]
    print(f"{number(unreadable, 'image', 'images')} can't be read")
    for finding in unreadable:
        print(f"  {finding.path} {finding.problem}")
    groups = duplicates(findings)
    across = [group for group in groups if len({finding.split for finding in group}) > 1]
    torn = [group for group in groups if len({finding.label for finding in group}) > 1]
    print(
        f"{number(groups, 'image is', 'images are')} there more than once, {len(across):,} of them"
        f" in more than one split, {len(torn):,} in more than one class"
    )
    for group in groups:
        same = "bytes" if len({finding.content for finding in group}) == 1 else "pixels"
        print(f"  same {same}: {', '.join(finding.path for finding in group)}")
    contact_sheet(dataset.classes, findings, args.per_class).save(args.sheet, "PNG")
    print(f"wrote {args.sheet}")
    if problems or unreadable or across or torn:
        sys.exit(1)


if __name__ == "__main__":
    main()
