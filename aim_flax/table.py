"""A table of finished runs: python -m aim_flax.table runs/digits_mlp-*.

Prints, for each arm, the mean and standard deviation of the test accuracy over seeds; with
--reference ARM also its difference from that arm, paired by seed; with --csv FILE also writes a
row per run.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from aim_flax.cli import CommandParser, run_reporting_errors
from aim_flax.errors import UsageError, check_choice
from aim_flax.report import write_csv
from aim_flax.workdir import read_json

COLUMNS = ("name", "arm", "seed", "test_accuracy", "val_accuracy", "best_step", "params")


def arm_table(rows: Sequence[dict[str, Any]], reference: str | None = None) -> str:
    """Returns a Markdown table, a row per arm in the order of first appearance.

    Args:
      rows: runs, with at least `arm`, `seed`, `test_accuracy` (0 to 1) and `params`.
      reference: an arm that the others are compared with: mean difference over common seeds with
        its 95 % interval (Student's t), and the p-value of the paired t-test, corrected for the
        number of comparisons by Holm's method.

    Raises:
      UsageError: there is no such arm, or an arm has fewer than two seeds in common with it.
    """
    arms: dict[str, dict[int, float]] = {}
    sizes: dict[str, set[int]] = {}
    for row in rows:
        accuracy = 100 * float(row["test_accuracy"])
        arms.setdefault(row["arm"], {})[int(row["seed"])] = accuracy
        sizes.setdefault(row["arm"], set()).add(int(row["params"]))
    header = "| arm | runs | parameters | test accuracy, mean ± standard deviation |"
    line = "| --- | ---: | ---: | ---: |"
    compared = {} if reference is None else _compare(arms, reference)
    if compared:
        header += f" difference from `{reference}` (95 % interval) | p, Holm |"
        line += " ---: | ---: |"
    lines = [header, line]
    for arm, accuracies in arms.items():
        values = list(accuracies.values())
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        params = " or ".join(f"{n:,}" for n in sorted(sizes[arm]))
        cells = [f"`{arm}`", str(len(values)), params, f"{statistics.mean(values):.2f}{spread} %"]
        if compared:
            cells += compared.get(arm, ["", ""])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compare(arms: dict[str, dict[int, float]], reference: str) -> dict[str, list[str]]:
    """Returns, for each other arm, the cells of its comparison."""
    check_choice("--reference", reference, arms)
    tests = {}
    for arm, accuracies in arms.items():
        if arm == reference:
            continue
        seeds = sorted(accuracies.keys() & arms[reference].keys())
        if len(seeds) < 2:
            raise UsageError(f"{arm} and {reference} have fewer than two seeds in common")
        pairs = [[arm_[seed] for seed in seeds] for arm_ in (accuracies, arms[reference])]
        tests[arm] = (statistics.mean(pairs[0]) - statistics.mean(pairs[1]), ttest_rel(*pairs))
    cells, corrected = {}, 0.0
    ordered = sorted(tests, key=lambda arm: tests[arm][1].pvalue)
    for i, arm in enumerate(ordered):
        difference, test = tests[arm]
        low, high = test.confidence_interval(0.95)
        corrected = max(corrected, min(1.0, (len(ordered) - i) * test.pvalue))
        cells[arm] = [f"{difference:+.2f} ({low:+.2f} to {high:+.2f})", f"{corrected:.2f}"]
    return cells


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
    parser.add_argument("--reference", metavar="ARM", help="compare the other arms with this one")
    parser.add_argument("--csv", type=Path, help="also write a row per run to this file")
    args = parser.parse_args(argv)

    def work() -> None:
        rows = read_runs(args.workdirs)
        if args.csv:
            write_csv(args.csv, COLUMNS, rows)
        print(arm_table(rows, args.reference))

    run_reporting_errors(work)


if __name__ == "__main__":
    main()
