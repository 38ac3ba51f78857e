"""What is in a folder of images, and what is wrong with it: python -m aim_flax.cli.inspect DIR.

Prints the number of images of each class and split, their sizes and formats, what is passed over,
the images that can't be read, the duplicates, and the copies that were saved again, and draws some
images of each class on a contact sheet. Exit status: 0 if all is well; 1 if an image can't be read,
or it or a copy of it is in more than one split or class, or the folder's layout is wrong; 2 if
there is nothing to look at.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aim_flax.console import CommandParser, as_command
from aim_flax.data.folder import FORMATS, passed_over, split, survey
from aim_flax.data.inspection import (
    Finding,
    Lost,
    alike,
    contact_sheet,
    duplicates,
    examine,
    halved,
    number,
    report,
)
from aim_flax.errors import UsageError
from aim_flax.files import check_output, save_image, writing
from aim_flax.names import printable

_MOST_PER_CLASS, _MOST_THREADS = 100, 1024


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="aim_flax.cli.inspect", description=__doc__.partition("\n\n")[2])
    parser.add_argument("directory", metavar="DIR", help="what data.dir is in a config")
    parser.add_argument(
        "--sheet", type=Path, default=Path("contact_sheet.png"), help="default: %(default)s"
    )
    parser.add_argument(
        "--per-class", type=int, default=6, help="images of each on the sheet; default: %(default)s"
    )
    parser.add_argument(
        "--formats", choices=FORMATS, default="usual", help="as data.formats; default: %(default)s"
    )
    for split_name, default in (("val", 0.1), ("test", 0.2)):
        meaning = f"as data.{split_name}_fraction; default: %(default)s"
        parser.add_argument(f"--{split_name}-fraction", type=float, default=default, help=meaning)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one per core")
    args = parser.parse_args(argv)
    if args.per_class < 1 or args.threads < 1:
        parser.error("--per-class and --threads are at least 1")
    if args.per_class > _MOST_PER_CLASS or args.threads > _MOST_THREADS:
        raise UsageError(
            f"--per-class is at most {_MOST_PER_CLASS:,} and --threads at most {_MOST_THREADS:,}"
        )
    check_output("--sheet", args.sheet)
    dataset, problems = survey(args.directory, args.formats)
    if len(dataset.classes) == 1:
        problems.append(f"{args.directory} has one class, expected at least two, to tell apart")
    if not problems:
        dataset = split(dataset, args.val_fraction, args.test_fraction)
    findings = examine(dataset, args.threads, Console(stderr=True))
    for line in report(dataset, findings):
        print(line)
    for problem in problems:
        print(f"layout: {printable(problem)}")
    if dataset.passed_over:
        print(f"passed over: {printable(passed_over(dataset))}")
    unreadable = [finding for finding in findings if finding.problem]
    print(f"{number(unreadable, 'image', 'images')} can't be read")
    for finding in unreadable:
        print(f"  {printable(finding.path)} {printable(finding.problem)}")
    lost = Lost()
    groups = duplicates(findings, lost)
    across = [group for group in groups if len({finding.split for finding in group}) > 1]
    torn = [group for group in groups if len({finding.label for finding in group}) > 1]
    print(
        f"{number(groups, 'image is', 'images are')} there more than once, {len(across):,} of them"
        f" in more than one split, {len(torn):,} in more than one class"
    )
    for group in groups:
        print(f"  same {_same(group)}: {_paths(group)}")
    copies = alike(findings, groups, lost)
    print(f"{number(copies, 'image looks', 'images look')} like one in another split or class")
    for group in copies:
        print(f"  alike: {_paths(group)}")
    sheet = contact_sheet(dataset.classes, findings, args.per_class, lost)
    if lost:
        print(f"{number(lost, 'image', 'images')} can't be compared or drawn any more")
        for path, why in lost.items():
            print(f"  {printable(path)} {printable(why)}")
    with writing(args.sheet.absolute().parent):
        save_image(sheet, args.sheet)
    print(f"wrote {printable(args.sheet)}")
    if problems or unreadable or across or torn or copies or lost:
        sys.exit(1)


def _same(group: Sequence[Finding]) -> str:
    """Returns what is the same in a group of duplicates."""
    if len({finding.content for finding in group}) == 1:
        return "bytes"
    times = halved(group)
    return f"pixels at 1/{2**times} of height and width" if times else "pixels"


def _paths(group: Sequence[Finding]) -> str:
    return printable(", ".join(finding.path for finding in group))


if __name__ == "__main__":
    main()
