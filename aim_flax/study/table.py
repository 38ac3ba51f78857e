"""A table of runs by arm."""

from collections.abc import Sequence

from aim_flax import markdown
from aim_flax.errors import check_choice
from aim_flax.statistics import Comparison, Summary, compare, p_value, summarize
from aim_flax.study.results import (
    MEASURES,
    SPLITS,
    UNFINISHED,
    Row,
    accuracies_by_arm,
    is_finished,
)


def arm_table(
    rows: Sequence[Row],
    reference: str | None = None,
    split: str = "test",
    measure: str = "accuracy",
) -> str:
    """Returns a Markdown table, a row per arm in the order of first appearance.

    Below it are the runs without a result: all numbers are of finished runs.

    Args:
      rows: runs, with at least `arm`, `seed`, `status` (of a finished run it may be left out),
        the split's accuracy (0 to 1) and `params`.
      reference: an arm that the others are compared with, see `aim_flax.statistics.Comparison`.
      split: "test", or "val": the accuracy by which each run's best epoch was picked.
      measure: of the test split, one of `results.MEASURES`.

    Raises:
      UsageError: there is no such arm; see `accuracies_by_arm`.
    """
    cells = arm_cells(rows, reference, split, measure)
    return "\n\n".join([markdown.table(cells), *notes(rows)])


def arm_cells(
    rows: Sequence[Row],
    reference: str | None = None,
    split: str = "test",
    measure: str = "accuracy",
) -> list[list[str]]:
    """Returns the rows of `arm_table` as cells, the header first."""
    arms = accuracies_by_arm(rows, split, measure)
    compared: dict[str, Comparison] = {}
    header = ["arm", "runs", "parameters", f"{SPLITS[split]} {MEASURES[measure]}, mean ± standard"]
    header[-1] += " deviation (95 % interval of the mean)"
    if reference is not None:
        check_choice("--reference", reference, arms)
        compared = compare(arms, reference)
        header += ["common seeds", f"difference from `{reference}` (95 % interval)"]
        header += ["p", "p, Holm", "d_z"]
    lines = [header]
    for arm, accuracies in arms.items():
        of_arm = [row for row in rows if row["arm"] == arm]
        mean = _mean(summarize(list(accuracies.values())))
        cells = [f"`{arm}`", _runs(of_arm), _sizes(of_arm), mean]
        if reference is not None:
            cells += _cells(compared[arm]) if arm in compared else [""] * 5
        lines.append(cells)
    return lines


def measure_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Returns a row of cells per arm with all measures, the header first; [] if a run lacks one."""
    finished = [row for row in rows if is_finished(row)]
    if not all(
        row.get(f"test_{measure}") not in (None, "") for row in finished for measure in MEASURES
    ):
        return []
    by_arm = {measure: accuracies_by_arm(rows, measure=measure) for measure in MEASURES}
    lines = [["arm", *(f"test {name}" for name in MEASURES.values())]]
    for arm in by_arm["accuracy"]:
        means = [_mean(summarize(list(arms[arm].values()))) for arms in by_arm.values()]
        lines.append([f"`{arm}`", *means])
    return lines


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


def notes(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence on the runs without a result, if there are any."""
    left_out = [row for row in rows if not is_finished(row)]
    if not left_out:
        return []
    named = ", ".join(f"`{row['arm']}` seed {row['seed']} ({row['status']})" for row in left_out)
    return [
        "All numbers are of finished runs; an arm that loses its bad runs looks better than it is."
        f" Without a result: {named}."
    ]
