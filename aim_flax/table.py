"""A table of runs: python -m aim_flax.table runs/digits_mlp-*.

Prints, for each arm, the mean and standard deviation of the test accuracy over its finished runs;
with --reference ARM also its difference from that arm, paired by seed; with --on val it does so for
the accuracies that picked each run's best epoch, to choose an arm without a look at the test split;
with --csv FILE also writes a row per run. Runs that diverged or are not finished are counted and
named.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax.cli import CommandParser, run_reporting_errors
from aim_flax.comparison import Comparison, Summary, compare, summarize
from aim_flax.errors import UsageError, check_choice
from aim_flax.report import write_csv, write_json
from aim_flax.workdir import read_json

COLUMNS = (
    "name",
    "arm",
    "seed",
    "status",
    "test_accuracy",
    "val_accuracy",
    "best_step",
    "epochs",
    "params",
    "selected_on",
)
SPLITS = {"test": "test", "val": "validation"}
FINISHED, UNFINISHED = "finished", "unfinished"

Row = Mapping[str, Any]


def read_runs(workdirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Returns a row of COLUMNS per run, by name, arm and seed; see `read_run`."""
    rows = [read_run(Path(workdir)) for workdir in workdirs]
    return sorted(rows, key=lambda row: (row["name"], row["arm"], row["seed"]))


def read_run(workdir: Path) -> dict[str, Any]:
    """Returns a run's row: from its summary, or, where it has none, what `without_result` returns.

    Raises:
      UsageError: it is no run's workdir, or a file of it is damaged.
    """
    if (workdir / "summary.json").is_file():
        summary = read_json(workdir / "summary.json") | {"status": FINISHED}
        missing = [column for column in COLUMNS if column not in summary]
        if missing:
            raise UsageError(f"{workdir / 'summary.json'} has no {', '.join(missing)}")
        return {column: summary[column] for column in COLUMNS}
    config = read_json(workdir / "config.json")
    for key in ("name", "arm", "seed"):
        if key not in config:
            raise UsageError(f"{workdir / 'config.json'} is no run's config: it has no {key}")
    return without_result(ConfigDict(config), _divergence(workdir))


def without_result(config: ConfigDict, diverged_at: int | None = None) -> dict[str, Any]:
    """Returns the row of a run that has not been started, is not finished, or has diverged.

    Its `status` is "unfinished" or "diverged at step N"; what there is no result of is None.
    """
    status = UNFINISHED if diverged_at is None else f"diverged at step {diverged_at}"
    row = {"name": config.name, "arm": config.arm, "seed": config.seed, "status": status}
    return dict.fromkeys(COLUMNS) | row


def mark_diverged(workdir: Path, step: int) -> None:
    """Notes beside a run that its loss was not finite at `step`, so that its row says so."""
    write_json(workdir / "diverged.json", {"step": step})


def _divergence(workdir: Path) -> int | None:
    file = workdir / "diverged.json"
    return int(read_json(file)["step"]) if file.is_file() else None


def is_finished(row: Row) -> bool:
    # A row without a status has a result; only such were recorded before rows had one.
    return row.get("status", FINISHED) == FINISHED


def accuracies_by_arm(rows: Sequence[Row], split: str = "test") -> dict[str, dict[int, float]]:
    """Returns {arm: {seed: accuracy}} of the finished runs; each arm of a row is there.

    Args:
      rows: see `arm_table`.
      split: of SPLITS, whose accuracy.

    Raises:
      UsageError: two rows are of the same arm and seed; the split is "val", and a run picked its
        best epoch on the test split.
    """
    seen: set[tuple[str, int]] = set()
    arms: dict[str, dict[int, float]] = {}
    for row in rows:
        arm, seed = row["arm"], int(row["seed"])
        if (arm, seed) in seen:
            raise UsageError(f"two runs are of arm {arm} and seed {seed}")
        seen.add((arm, seed))
        accuracies = arms.setdefault(arm, {})
        if is_finished(row):
            if split == "val" and row["selected_on"] != split:
                raise UsageError(
                    f"arm {arm} seed {seed} picked its best epoch on {row['selected_on']}: it has"
                    " no validation accuracy"
                )
            accuracies[seed] = float(row[f"{split}_accuracy"])
    return arms


def arm_table(rows: Sequence[Row], reference: str | None = None, split: str = "test") -> str:
    """Returns a Markdown table, a row per arm in the order of first appearance.

    Below it stands which runs have no result: all numbers are of finished ones.

    Args:
      rows: runs, with at least `arm`, `seed`, `status` (of a finished run it may be left out),
        the split's accuracy (0 to 1) and `params`.
      reference: an arm that the others are compared with, see `aim_flax.comparison.Comparison`.
      split: "test", or "val": the accuracy by which each run's best epoch was picked.

    Raises:
      UsageError: there is no such arm; see `accuracies_by_arm`.
    """
    arms = accuracies_by_arm(rows, split)
    compared: dict[str, Comparison] = {}
    header = ["arm", "runs", "parameters", f"{SPLITS[split]} accuracy, mean ± standard deviation"]
    header[-1] += " (95 % interval of the mean)"
    if reference is not None:
        check_choice("--reference", reference, arms)
        compared = compare(arms, reference)
        header += ["common seeds", f"difference from `{reference}` (95 % interval)"]
        header += ["p", "p, Holm", "d_z"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for arm, accuracies in arms.items():
        of_arm = [row for row in rows if row["arm"] == arm]
        mean = _mean(summarize(list(accuracies.values())))
        cells = [f"`{arm}`", _runs(of_arm), _sizes(of_arm), mean]
        if reference is not None:
            cells += _cells(compared[arm]) if arm in compared else [""] * 5
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, *_notes(rows)])


def _runs(rows: Sequence[Row]) -> str:
    """Returns "10", or "7 of 10; 2 diverged, 1 unfinished"."""
    finished = sum(is_finished(row) for row in rows)
    if finished == len(rows):
        return str(finished)
    unfinished = sum(row.get("status") == UNFINISHED for row in rows)
    kinds = {"diverged": len(rows) - finished - unfinished, "unfinished": unfinished}
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f"{finished} of {len(rows)}; {told}"


def _sizes(rows: Sequence[Row]) -> str:
    return " or ".join(f"{n:,}" for n in sorted({int(r["params"]) for r in rows if is_finished(r)}))


def _mean(summary: Summary) -> str:
    if summary.mean is None:
        return ""
    if summary.deviation is None:
        return f"{100 * summary.mean:.2f} %"
    mean, deviation, low, high = (
        f"{100 * value:.2f}"
        for value in (summary.mean, summary.deviation, summary.low, summary.high)
    )
    return f"{mean} ± {deviation} % ({low} to {high})"


def _cells(comparison: Comparison) -> list[str]:
    effect = comparison.effect_size
    return [
        str(comparison.summary.n),
        interval(comparison.summary),
        p_value(comparison.p),
        p_value(comparison.p_holm),
        "none" if effect is None else f"{effect:+z.2f}",
    ]


def interval(differences: Summary) -> str:
    """Returns a mean difference in percentage points, with its interval where there is one."""
    if differences.mean is None:
        return "none"
    mean = f"{100 * differences.mean:+z.2f}"
    if differences.low is None:
        return f"{mean} (no interval)"
    return f"{mean} ({100 * differences.low:+z.2f} to {100 * differences.high:+z.2f})"


def p_value(p: float | None) -> str:
    if p is None:
        return "no test"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _notes(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence on the runs without a result, if there are any."""
    left_out = [row for row in rows if not is_finished(row)]
    if not left_out:
        return []
    named = ", ".join(f"`{row['arm']}` seed {row['seed']} ({row['status']})" for row in left_out)
    return [
        "All numbers are of finished runs; an arm that loses its bad runs looks better than it is."
        f" Without a result: {named}."
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="aim_flax.table", description=__doc__.partition(":")[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--reference", metavar="ARM", help="compare the other arms with this one")
    parser.add_argument(
        "--on", choices=SPLITS, default="test", help="the split whose accuracy; default: test"
    )
    parser.add_argument("--csv", type=Path, help="also write a row per run to this file")
    args = parser.parse_args(argv)

    def work() -> None:
        rows = read_runs(args.workdirs)
        if args.csv:
            write_csv(args.csv, COLUMNS, rows)
        print(arm_table(rows, args.reference, args.on))

    run_reporting_errors(work)


if __name__ == "__main__":
    main()
