"""The numbers that pages have in their sentences: each is of a comparison in results/."""

import functools
import re

import pytest

from aim_flax.errors import UsageError
from aim_flax.statistics import Comparison, compare
from aim_flax.study.power import smallest_difference
from aim_flax.study.results import accuracies_by_arm, read_recorded
from tests.runs import ROOT

NUMBER = r"[+-]?\d+\.\d"
# "gains 9.7 points (9.1 to 10.4, p = 0.003)", or "(+0.4, -0.8 to 1.6)".
INTERVAL = re.compile(
    rf"\((?:({NUMBER})(?: points)?, )?({NUMBER}) to ({NUMBER})(?:, p ([=<]) (\d\.\d+))?(?=[,;)])"
)
# "With ten seeds a gain of 0.9 (`apart`) to 1.1 points (`aim`) shows with a chance of 80 %."
CHANCE = re.compile(r"[^.](?:[^.]|\.(?=\d))*? chance of 80 %")
SHOWN = re.compile(r"(\d\.\d)(?: points)? \(`(\w+)`\)")


@functools.cache
def comparisons() -> list[tuple[str, Comparison]]:
    """Returns the name of an arm and how it differs from another, for all two of every study."""
    found = []
    for file in sorted((ROOT / "results").glob("*.csv")):
        try:
            arms = accuracies_by_arm(read_recorded(file))
        except UsageError:
            continue  # Of a benchmark.
        found += [pair for reference in arms for pair in compare(arms, reference).items()]
    return [(arm, comparison) for arm, comparison in found if comparison.summary.low is not None]


def sentences(page: str) -> str:
    """Returns a page without its tables and commands, in one line."""
    lines = (ROOT / page).read_text().splitlines()
    text = " ".join(line for line in lines if not line.startswith(("|", "python")))
    return " ".join(text.split())


def rounds_to(value: float, printed: str) -> bool:
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-decimals + 1e-9


def is_of(comparison: Comparison, mean: str, low: str, high: str, sign: str, p: str) -> bool:
    """Returns whether these are the numbers of a comparison, or of the same turned round."""
    summary = comparison.summary
    values = [100 * value for value in (summary.mean, summary.low, summary.high)]
    turned = [-values[0], -values[2], -values[1]]
    if p and not (comparison.p < float(p) if sign == "<" else rounds_to(comparison.p, p)):
        return False
    return any(all(map(rounds_to, each, (mean, low, high))) for each in (values, turned))


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("docs/does_memory_help.md", 35),
        ("docs/search.md", 12),
        ("docs/predictions.md", 18),
    ],
)
def test_intervals_are_those_of_the_committed_results(page, least):
    text = sentences(page)
    found = list(INTERVAL.finditer(text))
    for interval in found:
        mean, *others = interval.groups(default="")
        before = text[max(0, interval.start() - 120) : interval.start()]
        mean = mean or re.findall(NUMBER, before)[-1]
        assert any(is_of(comparison, mean, *others) for _, comparison in comparisons()), (
            f"{before}{interval[0]})"
        )
    assert len(found) >= least


@pytest.mark.parametrize(("page", "least"), [("docs/search.md", 4), ("docs/predictions.md", 16)])
def test_what_seeds_show_is_what_power_says(page, least):
    found = [shown for said in CHANCE.findall(sentences(page)) for shown in SHOWN.findall(said)]
    for points, name in found:
        smallest = [smallest_difference(each) for arm, each in comparisons() if arm == name]
        assert any(rounds_to(100 * value, points) for value in smallest if value), (points, name)
    assert len(found) >= least
