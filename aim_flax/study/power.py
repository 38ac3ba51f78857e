"""How small a difference the seeds of a study would show, and how many seeds others need."""

from collections.abc import Mapping, Sequence

from aim_flax import markdown
from aim_flax.errors import UsageError
from aim_flax.statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    POWER,
    Comparison,
    compare,
    seeds_for,
    smallest_effect,
)
from aim_flax.study.results import Row, accuracies_by_arm
from aim_flax.study.table import notes

CHANCE = f"{100 * POWER:.0f} %"
TEST = f"paired t-test, two-sided, at {1 - CONFIDENCE:.2f} before correction for several arms"


def power_table(
    rows: Sequence[Row],
    reference: str | None,
    points: Sequence[float],
    split: str = "test",
    measure: str = "accuracy",
) -> str:
    """Returns a Markdown table, a row per arm but the reference, and what is to be said of it.

    Args:
      rows, split, measure: as for `table.arm_table`.
      reference: the arm that the others are compared with; None: none was named.
      points: the differences, in percentage points, that seeds are counted for.

    Raises:
      UsageError: there is no reference, or no other arm; see `accuracies_by_arm`.
    """
    arms = accuracies_by_arm(rows, split, measure)
    if len(arms) < 2:
        raise UsageError(f"a study compares arms, but all runs are of {', '.join(arms)}")
    if reference is None:
        raise UsageError("no arm is named control: --reference ARM says what to compare with")
    compared = compare(arms, reference)
    header = ["arm", "common seeds", "standard deviation of the differences"]
    header += [f"smallest difference shown with a chance of {CHANCE}"]
    header += [f"seeds for {value:g}" for value in points]
    cells = [header]
    for arm, comparison in compared.items():
        smallest, deviation = smallest_difference(comparison), comparison.summary.deviation
        row = [f"`{arm}`", str(comparison.summary.n)]
        if smallest is None:
            row += ["unknown"] * (2 + len(points))
        else:
            row += [f"{100 * deviation:.2f}", f"{100 * smallest:.2f}"]
            row += [_seeds(value / 100 / deviation) for value in points]
        cells.append(row)
    texts = [
        f"Differences from `{reference}`, in percentage points, {TEST}. The standard deviation is"
        " itself an estimate: that of all seeds may be 2.9 times as large if there are 5 in common,"
        " 1.8 times with 10, and 1.5 times with 20 (95 % interval).",
        *filter(None, (_why_unknown(*item, reference) for item in compared.items())),
        *notes(rows),
    ]
    return "\n\n".join([markdown.table(cells), *texts])


def smallest_differences(compared: Mapping[str, Comparison]) -> str:
    """Returns a sentence with the smallest difference that the seeds of each arm would show, or ""
    if that is known of none."""
    known = {arm: smallest_difference(comparison) for arm, comparison in compared.items()}
    listed = ", ".join(f"`{arm}` {100 * x:.2f}" for arm, x in known.items() if x is not None)
    if not listed:
        return ""
    return (
        f"With these seeds a difference shows with a chance of {CHANCE} ({TEST}) if it is at least"
        f" so many points: {listed}. `ablate.py --power` tells how many seeds others need."
    )


def smallest_difference(comparison: Comparison) -> float | None:
    """Returns the smallest difference, in accuracy, that as many seeds show; None: not known."""
    summary = comparison.summary
    return smallest_effect(summary.n) * summary.deviation if summary.deviation else None


def _seeds(effect: float) -> str:
    needed = seeds_for(effect)
    return f"over {MOST_SEEDS:,}" if needed is None else f"{needed:,}"


def _why_unknown(arm: str, comparison: Comparison, reference: str) -> str:
    summary = comparison.summary
    if summary.deviation is None:
        finished = "no finished seed" if summary.n == 0 else "one finished seed"
        return (
            f"`{arm}` and `{reference}` have {finished} in common: without two there is no standard"
            " deviation."
        )
    if summary.deviation == 0:
        return (
            f"`{arm}` differs from `{reference}` by the same in each of {summary.n} common seeds:"
            " without spread nothing can be said of others."
        )
    return ""
