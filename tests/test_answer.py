"""docs/answer.py: the table and the figure that the page and README begin with."""

import runpy

import numpy as np
from scipy.stats import ttest_rel

from tests.asserts import assert_drawn_alike
from tests.runs import ROOT, read_csv

SCRIPT = runpy.run_path(str(ROOT / "docs" / "answer.py"))
PAGE = (ROOT / "docs" / "does_memory_help.md").read_text()


def test_table_is_that_of_the_page_and_comes_first():
    top, *_ = PAGE.split("\n## The studies\n")
    assert SCRIPT["table"]() in top
    assert "(answer.png)" in top


def test_differences_are_paired_by_seed():
    """Against the recorded accuracies themselves, for each row."""
    rows = SCRIPT["table"]().splitlines()[2:]
    assert len(rows) == len(SCRIPT["CLAIMS"])
    for row, claim in zip(rows, SCRIPT["CLAIMS"], strict=True):
        runs = read_csv(ROOT / "results" / f"{claim.study.file}.csv")
        arms = [
            {int(run["seed"]): float(run["test_accuracy"]) for run in runs if run["arm"] == arm}
            for arm in (claim.arm, claim.reference)
        ]
        assert arms[0].keys() == arms[1].keys()
        pairs = [[arm[seed] for seed in arms[0]] for arm in arms]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert int(cells[3]) == len(arms[0])
        mean = 100 * np.subtract(*pairs).mean()
        assert cells[4].startswith(f"{mean:+z.2f} (")
        p = ttest_rel(*pairs).pvalue
        assert cells[5] == ("< 0.001" if p < 0.001 else f"{p:.3f}")


def test_studies_are_described_where_the_table_says():
    for claim in SCRIPT["CLAIMS"]:
        name, _, anchor = claim.study.place.partition("#")
        text = (ROOT / "docs" / name).read_text() if name else PAGE
        assert anchor or name
        assert f"results/{claim.study.file}.csv" in text


def test_figure_has_a_line_for_each_difference(tmp_path):
    SCRIPT["draw"](tmp_path / "x.png")
    assert_drawn_alike(tmp_path / "x.png", ROOT / "docs" / "answer.png")
