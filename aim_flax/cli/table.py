"""A table of runs: python -m aim_flax.cli.table runs/digits_mlp-*.

Prints, for each arm, the mean and standard deviation of the test accuracy over its finished runs;
with --reference ARM also its difference from that arm, paired by seed. With --on val it uses the
accuracies that picked each run's best epoch, to choose an arm without looking at the test split;
with --measure balanced_accuracy or macro_f1 scores in which every class counts the same. With
--power it also prints how small a difference the runs would show, and how many seeds others need.
With --csv FILE it also writes a row per run; such a file, or a study's results.csv, can be given in
place of a workdir. A study's folder stands for the runs in it. Runs that diverged or are not
finished are counted and named.
"""

from collections.abc import Sequence
from pathlib import Path

from aim_flax.console import CommandParser, add_power, as_command
from aim_flax.files import check_output, write_csv
from aim_flax.study.power import power_table
from aim_flax.study.results import COLUMNS, MEASURES, SPLITS, read_runs
from aim_flax.study.table import arm_table


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="aim_flax.cli.table", description=__doc__.partition(":")[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--reference", metavar="ARM", help="compare the other arms with this one")
    parser.add_argument(
        "--on", choices=SPLITS, default="test", help="the split of the accuracies; default: test"
    )
    parser.add_argument(
        "--measure",
        choices=MEASURES,
        default="accuracy",
        help="of the test split; the others count every class equally; default: accuracy",
    )
    parser.add_argument("--csv", type=Path, help="also write a row per run to this file")
    add_power(parser)
    args = parser.parse_args(argv)
    if args.power and args.reference is None:
        parser.error("--power compares arms: give --reference ARM")
    if args.on != "test" and args.measure != "accuracy":
        parser.error(f"--on {args.on} has accuracies only: leave out --measure {args.measure}")
    if args.csv:
        check_output("--csv", args.csv)
    rows = read_runs(args.workdirs)
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)
    print(arm_table(rows, args.reference, args.on, args.measure))
    if args.power:
        print("\n" + power_table(rows, args.reference, args.power, args.on, args.measure))


if __name__ == "__main__":
    main()
