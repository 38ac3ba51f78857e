"""docs/curves.py: gains by how much a network was trained, and the page's tables of them."""

import runpy

import numpy as np
import pytest

from aim_flax.files import write_csv
from aim_flax.statistics import smallest_effect
from aim_flax.study.results import COLUMNS
from tests.asserts import assert_drawn_alike
from tests.runs import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs" / "curves.py"))
PLAIN, WIDER = SCRIPT["PLAIN"], SCRIPT["WIDER"]
PAGE = (ROOT / "docs" / "does_memory_help.md").read_text()


@pytest.fixture
def accuracies(tmp_path):
    """Of three seeds: `memory` gains a point per epoch, and `control_params` a fixed 4."""
    rows = []
    for images, epochs in ((5000, 30), (5000, 10), (1000, 10)):
        for arm, gain in ((PLAIN, 0), (WIDER, 4), ("memory", epochs)):
            for seed in range(3):
                # The plain network's seeds differ, and the memory's gain by a point from its mean.
                points = seed + images / 100 + gain + (arm == "memory") * (seed - 1)
                row = {"name": "x", "arm": f"{arm}_{images}x{epochs}", "seed": seed}
                row |= {"status": "finished", "params": 9, "test_accuracy": points / 100}
                rows.append(dict.fromkeys(COLUMNS) | row)
    write_csv(tmp_path / "x.csv", COLUMNS, rows)
    return SCRIPT["read"](tmp_path / "x.csv")


@pytest.mark.parametrize(("reference", "less"), [(PLAIN, 0), (WIDER, 4)])
def test_gains_are_over_the_control_of_the_same_training(accuracies, reference, less):
    gains = SCRIPT["gains"](accuracies, reference)
    assert set(gains) == {WIDER, "memory"} - {reference}
    found = {t: round(100 * gain.summary.mean, 9) for t, gain in gains["memory"].items()}
    assert found == {(1000, 10): 10 - less, (5000, 10): 10 - less, (5000, 30): 30 - less}
    assert list(found) == sorted(found)
    # Of -1, 0 and 1 around the mean: t(0.975, 2) / sqrt(3).
    high = gains["memory"][5000, 30].summary.high
    np.testing.assert_allclose(high, (30 - less + 4.30265 / 3**0.5) / 100, rtol=1e-6)


def test_table_has_a_row_for_each_training(accuracies):
    head, _, *rows = SCRIPT["table"](accuracies, WIDER).splitlines()
    assert head == "| images | epochs | seeds | `control_params`, % | `memory` |"
    assert rows == [
        "| 1,000 | 10 | 3 | 15.0 | +6.00 (+3.52 to +8.48) |",
        "| 5,000 | 10 | 3 | 55.0 | +6.00 (+3.52 to +8.48) |",
        "| 5,000 | 30 | 3 | 55.0 | +26.00 (+23.52 to +28.48) |",
    ]


def test_page_has_the_tables_of_the_recorded_runs():
    recorded = SCRIPT["read"](SCRIPT["CSV"])
    for reference in (PLAIN, WIDER):
        assert SCRIPT["table"](recorded, reference) in PAGE
        assert SCRIPT["shows"](recorded, reference) in PAGE


def test_figure_is_that_of_the_recorded_runs(tmp_path):
    SCRIPT["draw"](SCRIPT["read"](SCRIPT["CSV"]), tmp_path / "x.png")
    assert_drawn_alike(tmp_path / "x.png", SCRIPT["FIGURE"])


def test_epochs_are_drawn_for_images_that_were_trained_for_several(accuracies):
    assert SCRIPT["epochs_by_images"](accuracies) == {5000: [10, 30]}


def test_what_shows_is_by_the_seeds(accuracies):
    """The memory's differences have a deviation of one point, those of `control_params` none."""
    sentence = SCRIPT["shows"](accuracies, PLAIN)
    assert f"of {smallest_effect(3):.1f} to {smallest_effect(3):.1f} points show" in sentence
