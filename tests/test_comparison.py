"""Statistics over seeds: against scipy, by hand, and on recorded studies with a known answer.

data/null_study.csv and data/planted_study.csv are real runs: the digits MLP without memory,
configs/digits_mlp.py:control, 10 epochs. In the null study `again` is `control` once more, with
other seeds (`trained_with_seed`): there is nothing to find. In the planted study the hidden layers
of `control` have 64 features, those of `half` 32 and those of `eighth` 8. The two studies of a
pretrained network are those of docs/search.md, in results/checks_strong.csv.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from aim_flax.statistics import Comparison, Summary, compare, holm, summarize
from aim_flax.study.results import accuracies_by_arm
from tests.asserts import refused
from tests.runs import ROOT, read_csv

DATA = Path(__file__).parent / "data"


def recorded(study):
    return read_csv(DATA / f"{study}_study.csv")


def test_summary_is_scipys():
    values = np.random.default_rng(0).uniform(0.4, 0.9, 7).tolist()
    summary = summarize(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (summary.n, summary.mean) == (7, pytest.approx(np.mean(values), abs=1e-15))
    assert (summary.low, summary.high) == pytest.approx(tuple(expected), abs=1e-14)
    assert summary.deviation == pytest.approx(np.std(values, ddof=1), abs=1e-15)


def test_summary_of_few_or_equal_values():
    assert summarize([]) == Summary(0, None, None, None, None)
    assert summarize([0.75]) == Summary(1, 0.75, None, None, None)
    assert summarize([0.75] * 3) == Summary(3, 0.75, 0.75, 0.75, 0.0)


def test_comparison_by_hand():
    """Differences of 1, 2 and 3 points: t = 2·sqrt(3), with 2 degrees of freedom, where
    p = 1 - t / sqrt(t² + 2) and the 95 % interval is 4.302653 standard errors to each side."""
    reference = {0: 0.5, 1: 0.5, 2: 0.5}
    result = compare({"a": {0: 0.51, 1: 0.52, 2: 0.53}, "r": reference}, "r")["a"]
    t = 2 * math.sqrt(3)
    assert result.differences == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03})
    assert result.p == pytest.approx(1 - t / math.sqrt(t**2 + 2), abs=1e-12)
    assert result.p_holm == result.p
    half = 4.302653 * 0.01 / math.sqrt(3)
    summary = result.summary
    assert (summary.low, summary.high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-8)
    assert result.effect_size == pytest.approx(2)


def test_comparison_is_scipys_on_recorded_runs():
    arms = accuracies_by_arm(recorded("planted"))
    results = compare(arms, "control")
    assert list(results) == ["half", "eighth"]
    for arm, result in results.items():
        a, b = (
            [accuracies[seed] for seed in range(20)] for accuracies in (arms[arm], arms["control"])
        )
        test = stats.ttest_rel(a, b)
        interval = test.confidence_interval(0.95)
        assert result.p == pytest.approx(test.pvalue, rel=1e-9)
        assert (result.summary.low, result.summary.high) == pytest.approx(tuple(interval), rel=1e-9)
        # The t statistic of paired differences is d_z times the root of their number.
        assert result.effect_size == pytest.approx(test.statistic / math.sqrt(20), rel=1e-9)
    assert results["half"].p_holm == pytest.approx(results["half"].p, rel=1e-12)
    assert results["eighth"].p_holm == pytest.approx(2 * results["eighth"].p, rel=1e-12)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        # 4·0.005, 3·0.01, 2·0.03, and 1·0.04, which may not fall below the one before it.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.6, 0.5, 0.01], [1.0, 1.0, 0.03]),
        # Twice 0.7 would be no probability.
        ([0.7, 0.9], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.3], [0.3]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, expected):
    assert holm(p_values) == pytest.approx(expected, abs=1e-15)


def test_identical_arms_do_not_differ():
    accuracies = {0: 0.9, 1: 0.8, 2: 0.85}
    result = compare({"r": accuracies, "same": dict(accuracies)}, "r")["same"]
    zeros = Summary(3, 0.0, 0.0, 0.0, 0.0)
    assert result == Comparison(dict.fromkeys(range(3), 0.0), zeros, 1.0, 1.0, None)


def test_equal_differences_leave_no_test():
    """Two seeds that gain one image of 360 each would have p = 0 by the formula."""
    reference = {0: 351 / 360, 1: 347 / 360}
    for seeds in (reference, reference | {2: 17 / 360, 3: 3 / 360}):
        better = {seed: accuracy + 1 / 360 for seed, accuracy in seeds.items()}
        result = compare({"r": seeds, "a": better}, "r")["a"]
        expected = Summary(len(seeds), pytest.approx(1 / 360), None, None, 0.0)
        assert result.summary == expected
        assert (result.p, result.p_holm, result.effect_size) == (None, None, None)


def test_only_common_seeds_are_compared():
    arms = {
        "r": {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.1},
        "a": {4: 0.0, 2: 0.75, 0: 0.6, 1: 0.6},
        "one": {3: 0.25, 9: 0.9},
        "none": {7: 0.5},
        "empty": {},
    }
    results = compare(arms, "r")
    assert results["a"].differences == pytest.approx({0: 0.1, 1: 0.0, 2: 0.05})
    assert list(results["a"].differences) == [0, 1, 2]
    test = stats.ttest_rel([0.6, 0.6, 0.75], [0.5, 0.6, 0.7])
    # The arms that could not be tested do not count as comparisons.
    assert results["a"].p_holm == results["a"].p == pytest.approx(test.pvalue)
    one = results["one"]
    assert one.summary == Summary(1, pytest.approx(0.15), None, None, None)
    assert (one.p, one.p_holm, one.effect_size) == (None, None, None)
    for arm in ("none", "empty"):
        assert results[arm] == Comparison({}, Summary(0, None, None, None, None), None, None, None)


def test_unknown_reference_is_told():
    with refused("reference arm is 'contrl', .*did you mean 'control'"):
        compare({"control": {0: 0.5}}, "contrl")


def test_null_study_finds_nothing():
    result = compare(accuracies_by_arm(recorded("null")), "control")["again"]
    assert result.summary.n == 20
    assert result.p > 0.05
    assert result.summary.low < 0 < result.summary.high


@pytest.mark.parametrize("seeds", [range(20), range(10), range(10, 20)])
def test_planted_study_is_found(seeds):
    arms = accuracies_by_arm(recorded("planted"))
    arms = {arm: {seed: accuracies[seed] for seed in seeds} for arm, accuracies in arms.items()}
    for result in compare(arms, "control").values():
        assert result.summary.n == len(seeds)
        assert result.p_holm < 0.001
        assert result.summary.high < 0


def test_in_a_pretrained_network_nothing_is_not_found_and_something_is():
    """The rule of docs/search.md, which stood before the runs."""
    found = compare(accuracies_by_arm(read_csv(ROOT / "results" / "checks_strong.csv")), "control")
    assert [comparison.summary.n for comparison in found.values()] == [10, 10]
    assert found["again"].p > 0.05
    assert found["fewer"].p < 0.01
    assert found["fewer"].summary.high < 0


def test_false_findings_are_as_rare_as_stated():
    """Identical arms have differences of either sign alike, so each flip of signs of the null
    study's is another null study: 5 % of them may be found to differ, and, of four arms at once
    and corrected, at least one in 5 % of the studies at most."""
    null = compare(accuracies_by_arm(recorded("null")), "control")["again"].differences
    rng = np.random.default_rng(0)
    arms, studies = 4, 400
    single, any_corrected = 0, 0
    for _ in range(studies):
        study = {
            str(arm): {seed: d * sign for (seed, d), sign in zip(null.items(), signs, strict=True)}
            for arm, signs in enumerate(rng.choice([-1, 1], (arms, len(null))))
        }
        results = compare(study | {"r": dict.fromkeys(null, 0.0)}, "r").values()
        single += sum(result.p < 0.05 for result in results)
        any_corrected += any(result.p_holm < 0.05 for result in results)
    for found, tries, rate in ((single, arms * studies, 0.05), (any_corrected, studies, 0.05)):
        assert stats.binomtest(found, tries, rate).pvalue > 0.01
    # Without correction one of four would be found far more often.
    assert single > 2 * any_corrected


def test_seeds_are_paired_whatever_their_order():
    arms = accuracies_by_arm(recorded("planted"))
    expected = compare(arms, "control")
    for rotate in (1, 7):
        turned = {
            arm: dict(itertools.islice(itertools.cycle(a.items()), i * rotate, i * rotate + len(a)))
            for i, (arm, a) in enumerate(arms.items())
        }
        assert compare(turned, "control") == expected
