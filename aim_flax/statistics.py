"""Whether arms differ: statistics over the accuracies of their seeds.

Runs of the same seed see the same examples in the same order, so arms are compared by the
differences of their common seeds. What few or equal numbers cannot show is None, never a guess.
"""

import bisect
import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from aim_flax.errors import check_choice

CONFIDENCE = 0.95
# The chance with which a test is to show a difference that is there (J. Cohen, Statistical Power
# Analysis for the Behavioral Sciences, 1988).
POWER = 0.8
MOST_SEEDS = 1_000_000  # to ask for
# Accuracies are counts of images over their number: two that differ, differ by more than this.
_EQUAL = 1e-9


@dataclasses.dataclass(frozen=True)
class Summary:
    """Numbers of one sample.

    Attributes:
      n: how many.
      mean: of them; None if there are none.
      low, high: the mean's 95 % interval (Student's t); None for fewer than two.
      deviation: the standard deviation (n - 1 in its denominator); None for fewer than two.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    deviation: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm's paired differences from the reference arm, in accuracy (0 to 1).

    Attributes:
      differences: {seed: arm - reference} of the common seeds, in order.
      summary: of the differences. Where all of them are equal but not 0 there is no interval: it
        would have no width, however few the seeds.
      p: of the paired t-test, two-sided; 1 where every difference is 0; None for fewer than two
        common seeds, and where all differences are equal but not 0, which leaves the test no
        spread to judge them by.
      p_holm: p corrected for the number of arms that were tested, see `holm`.
      effect_size: Cohen's d_z, the mean difference over the standard deviation of the differences
        (D. Lakens, "Calculating and reporting effect sizes", Frontiers in Psychology 4:863, 2013);
        None where that deviation is 0 or unknown.
    """

    differences: Mapping[int, float]
    summary: Summary
    p: float | None
    p_holm: float | None
    effect_size: float | None


def summarize(values: Sequence[float]) -> Summary:
    """Returns the mean of `values`, its interval and their standard deviation."""
    n = len(values)
    mean = statistics.fmean(values) if n else None
    if n < 2:
        return Summary(n, mean, None, None, None)
    if max(values) - min(values) < _EQUAL:
        return Summary(n, mean, mean, mean, 0.0)
    deviation = statistics.stdev(values)
    # Imported here, as below, because it takes half a second.
    from scipy.stats import t

    low, high = t.interval(CONFIDENCE, n - 1, loc=mean, scale=deviation / n**0.5)
    return Summary(n, mean, float(low), float(high), deviation)


def compare(arms: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Comparison]:
    """Returns the comparison of each other arm with the reference, in their order.

    Args:
      arms: {arm: {seed: accuracy}}; seeds that only one of two arms has are left out.

    Raises:
      UsageError: there is no arm `reference`.
    """
    check_choice("the reference arm", reference, arms)
    compared = {
        arm: _compare(accuracies, arms[reference])
        for arm, accuracies in arms.items()
        if arm != reference
    }
    tested = {arm: comparison.p for arm, comparison in compared.items() if comparison.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        arm: dataclasses.replace(comparison, p_holm=corrected.get(arm))
        for arm, comparison in compared.items()
    }


def _compare(accuracies: Mapping[int, float], reference: Mapping[int, float]) -> Comparison:
    """Returns the comparison of two arms, not corrected for others."""
    seeds = sorted(accuracies.keys() & reference.keys())
    differences = {seed: accuracies[seed] - reference[seed] for seed in seeds}
    summary = summarize(list(differences.values()))
    p = effect_size = None
    if summary.deviation:
        from scipy.stats import ttest_rel

        pairs = [[arm[seed] for seed in seeds] for arm in (accuracies, reference)]
        p, effect_size = float(ttest_rel(*pairs).pvalue), summary.mean / summary.deviation
    elif summary.deviation == 0 and abs(summary.mean) < _EQUAL:
        p = 1.0
    elif summary.deviation == 0:
        summary = dataclasses.replace(summary, low=None, high=None)
    return Comparison(differences, summary, p, None, effect_size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number, in the order given.

    With them, rejecting each that is below a level rejects any true hypothesis with at most that
    probability (S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian
    Journal of Statistics 6, 1979): the smallest of m is multiplied by m, the next by m - 1, ...;
    none falls below one before it or rises above 1.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def smallest_effect(n: int) -> float:
    """Returns the smallest d_z (mean difference over the standard deviation of differences) that
    the two-sided paired t-test of `n` pairs shows with a chance of POWER.

    The test's statistic then has the noncentral t distribution with n - 1 degrees of freedom. What
    would be shown with the wrong sign, less than one in a million, is left out.

    Args:
      n: at least 2.
    """
    from scipy.special import nctdtrinc, stdtrit

    critical = stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    return float(nctdtrinc(n - 1, 1 - POWER, critical)) / n**0.5


def seeds_for(effect: float) -> int | None:
    """Returns how many pairs show a d_z of `effect`, above 0, with a chance of POWER; None: more
    than MOST_SEEDS."""
    numbers = range(2, MOST_SEEDS + 1)
    place = bisect.bisect_left(numbers, -effect, key=lambda n: -smallest_effect(n))
    return numbers[place] if place < len(numbers) else None


def p_value(p: float | None) -> str:
    if p is None:
        return "no test"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
