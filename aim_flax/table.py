"""A table of finished runs: python -m aim_flax.table runs/digits_mlp-*.

Prints, for each arm, the mean and standard deviation of the test accuracy over seeds;
with --csv FILE also writes a row per run.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aim_flax.cli import CommandParser, run_reporting_errors
from aim_flax.errors import UsageError
from aim_flax.report import write_csv
from aim_flax.workdir import read_json

COLUMNS = ("name", "arm", "seed", "test_accuracy", "val_accuracy", "best_step", "params")


def arm_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table, a row per arm in the order of first appearance.

    Args:
      rows: runs, with at least `arm`, `test_accuracy` (0 to 1) and `params`.
    """
    lines = ["| arm | runs | parameters | test accuracy, mean ± standard deviation |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == arm]
        percent = [100 * float(row["test_accuracy"]) for row in runs]
        spread = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
        sizes = " or ".join(f"{n:,}" for n in sorted({int(row["params"]) for row in runs}))
        mean = statistics.mean(percent)
        lines.append(f"| `{arm}` | {len(runs)} | {sizes} | {mean:.2f}{spread} % |")
    return "\n".join(lines)


def read_runs(workdirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Returns the summaries of finished runs, by arm and seed.

    Raises:
      UsageError: one of them is no run's workdir, or its run is not finished.
    """
    rows = []
    for workdir in map(Path, workdirs):
        if (workdir / "config.json").is_file() and not (workdir / "summary.json").is_file():
            raise UsageError(f"{workdir}: the run is not finished")
        summary = read_json(workdir / "summary.json")
        rows.append({column: summary[column] for column in COLUMNS})
    return sorted(rows, key=lambda row: (row["name"], row["arm"], row["seed"]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="aim_flax.table", description=__doc__.partition(":")[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--csv", type=Path, help="also write a row per run to this file")
    args = parser.parse_args(argv)

    def work() -> None:
        rows = read_runs(args.workdirs)
        if args.csv:
            write_csv(args.csv, COLUMNS, rows)
        print(arm_table(rows))

    run_reporting_errors(work)


if __name__ == "__main__":
    main()
