"""A study's report: what it says of recorded studies and of runs that failed, and its plots."""

import re

import numpy as np
import pytest
from scipy import stats

from aim_flax.statistics import compare
from aim_flax.study import report as study_report
from aim_flax.study import results
from aim_flax.study import table as study_table
from aim_flax.train.report import HISTORY_COLUMNS, write_metrics
from tests.asserts import refused
from tests.runs import read_csv
from tests.test_comparison import recorded
from tests.test_plots import figures  # noqa: F401

COMMAND = "python ablate.py --config configs/digits_mlp.py --arms half,eighth --seeds 20"
FILES = {"results.csv", "report.md", "report.html", "curves.png", "differences.png"}


def history(epochs, seed=0):
    rng = np.random.default_rng(seed)
    accuracies = np.sort(rng.uniform(size=epochs))
    return [
        dict.fromkeys(HISTORY_COLUMNS, 0.0)
        | {"epoch": i + 1, "val_accuracy": accuracies[i], "train_loss": 1 - accuracies[i]}
        for i in range(epochs)
    ]


def histories_of(rows, epochs=3):
    keys = [(row["arm"], int(row["seed"])) for row in rows]
    return {key: history(epochs, seed) for seed, key in enumerate(keys)}


def write(folder, rows, histories=None):
    histories = histories_of(rows) if histories is None else histories
    study_report.write(folder, rows, histories, "control", "A study", COMMAND)
    return (folder / "report.md").read_text()


def findings(text):
    return [line for line in text.splitlines() if line.startswith("- ")]


def failed(row, status):
    return dict.fromkeys(results.COLUMNS) | {
        "name": row["name"],
        "arm": row["arm"],
        "seed": row["seed"],
        "status": status,
    }


def test_null_study_is_told_from_nothing(tmp_path):
    text = write(tmp_path, recorded("null"))
    result = compare(results.accuracies_by_arm(recorded("null")), "control")["again"]
    low, high = (f"{100 * x:+.2f}" for x in (result.summary.low, result.summary.high))
    assert findings(text) == [
        f"- No difference of `again` from `control` can be told from chance (p = {result.p:.3f}"
        " after correction, 20 common seeds), which does not show that there is none: its"
        f" uncorrected 95 % interval reaches from {low} to {high}."
    ]


def test_planted_study_is_found(tmp_path):
    rows = recorded("planted")
    text = write(tmp_path, rows)
    assert text.startswith(f"# A study\n\n```bash\n{COMMAND}\n```\n\n")
    assert study_table.arm_table(rows, "control") in text
    assert len(findings(text)) == 2
    for arm, line in zip(("half", "eighth"), findings(text), strict=True):
        assert line.startswith(f"- `{arm}` is less accurate than `control`, by more than chance")
        assert line.endswith(" over 20 common seeds (p < 0.001 after correction).")
    assert "the number of arms tested, 2," in text
    assert "That was the validation split; the test split had no part in it." in text


def test_files_are_the_same_whenever_they_are_written(tmp_path):
    rows = recorded("planted")
    histories = histories_of(rows)
    write(tmp_path / "a", rows, histories)
    first = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert set(first) == FILES
    # Again into the same folder, and from runs that finished in another order.
    write(tmp_path / "a", rows, histories)
    by_seed = sorted(rows, key=lambda row: -int(row["seed"]))
    by_seed.sort(key=lambda row: ["control", "half", "eighth"].index(row["arm"]))
    write(tmp_path / "b", by_seed, dict(reversed(histories.items())))
    for folder in ("a", "b"):
        assert {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} == first


def test_results_have_a_row_per_run_that_the_table_reads(tmp_path):
    rows = recorded("planted")
    rows[25] = failed(rows[25], "diverged at step 30")
    write(tmp_path, rows)
    written = read_csv(tmp_path / "results.csv")
    assert tuple(written[0]) == results.COLUMNS
    assert [(row["arm"], row["seed"]) for row in written] == [(r["arm"], r["seed"]) for r in rows]
    assert written[25]["status"] == "diverged at step 30"
    assert written[25]["test_accuracy"] == ""
    assert study_table.arm_table(written, "control") == study_table.arm_table(rows, "control")


def test_failed_runs_are_shown_and_counted(tmp_path):
    rows = recorded("planted")
    rows[0] = failed(rows[0], "unfinished")
    rows[23] = failed(rows[23], "diverged at step 30")
    rows[24] = failed(rows[24], "diverged at step 31")
    for i in range(40, 60):
        rows[i] = failed(rows[i], "diverged at step 2")
    histories = histories_of(rows)
    histories = {key: h for key, h in histories.items() if key[0] != "eighth"}
    lines = findings(write(tmp_path, rows, histories))
    assert lines[0].startswith("- `half` is less accurate than `control`")
    assert " over 17 common seeds " in lines[0]
    assert lines[0].endswith(" Without a result: 2 of 20 runs of `half`.")
    assert lines[1:] == [
        "- `eighth` and `control` have no finished seed in common: nothing can be told."
        " Without a result: 20 of 20 runs of `eighth`.",
        "- `control` is what the others are compared with."
        " Without a result: 1 of 20 runs of `control`.",
    ]
    text = (tmp_path / "report.md").read_text()
    assert "| `half` | 18 of 20; 2 diverged |" in text
    assert "`half` seed 3 (diverged at step 30), `half` seed 4 (diverged at step 31)" in text
    assert {file.name for file in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({0: 0.5, 1: 0.625, 2: 0.75}, "`a` equals `r` in each of 3 common seeds."),
        ({0: 0.75, 1: 0.875}, "`a` differs from `r` by the same +25.00 in each of 2 common seeds:"),
        ({1: 0.5}, "`a` and `r` have one finished seed in common, with a difference of -12.50 "),
        ({7: 0.5}, "`a` and `r` have no finished seed in common: nothing can be told."),
        ({0: 0.75, 1: 0.876, 2: 1.0}, "`a` is more accurate than `r`, by more than chance"),
        ({0: 0.5, 1: 0.5, 2: 1.0}, "No difference of `a` from `r` can be told from chance (p = "),
    ],
)
def test_findings(accuracies, expected):
    reference = {0: 0.5, 1: 0.625, 2: 0.75}
    comparison = compare({"r": reference, "a": accuracies}, "r")["a"]
    assert study_report.finding("a", comparison, "r").startswith(expected)


def test_selection_on_the_test_split_is_told(tmp_path):
    rows = recorded("planted")
    for row in rows[20:40]:
        row["selected_on"] = "test"
    text = write(tmp_path, rows)
    assert "Of `half` that was the test split itself" in text
    assert "the test split had no part in it" not in text


def test_mean_curve_is_scipys():
    curves = np.random.default_rng(0).uniform(size=(5, 4))
    mean, half = study_report.mean_curve(curves)
    for epoch in range(4):
        low, high = stats.ttest_1samp(curves[:, epoch], 0).confidence_interval(0.95)
        assert mean[epoch] == pytest.approx(curves[:, epoch].mean())
        assert (mean - half)[epoch] == pytest.approx(low)
        assert (mean + half)[epoch] == pytest.approx(high)
    mean, half = study_report.mean_curve(curves[:1])
    assert (mean == curves[0]).all()
    assert half is None


def test_no_mean_is_drawn_over_the_runs_that_are_left(tmp_path, figures):  # noqa: F811
    """Runs of 3, 5 and 4 epochs, by early stopping, and one that diverged in epoch 2."""
    rows = recorded("planted")[:24]
    rows[3] = failed(rows[3], "diverged at step 30")
    curves = [[0.1, 0.2, 0.3], [0.3, 0.4, 0.5, 0.6, 0.7], [0.2, 0.3, 0.4, 0.9], [0.05]]
    histories = histories_of(rows[20:]) | {
        ("control", seed): [
            row | {"val_accuracy": accuracy, "train_loss": accuracy}
            for row, accuracy in zip(history(len(curve)), curve, strict=True)
        ]
        for seed, curve in enumerate(curves)
    }
    write(tmp_path, [*rows[:4], *rows[20:]], histories)
    axis = figures[0].axes[0]
    lines = [line.get_xydata().tolist() for line in axis.get_lines()]
    mean, *single, diverged, cross = lines[:6]
    assert mean == [[1, pytest.approx(0.2)], [2, pytest.approx(0.3)], [3, pytest.approx(0.4)]]
    assert single == [[[3, 0.3]], [[3, 0.5], [4, 0.6], [5, 0.7]], [[3, 0.4], [4, 0.9]]]
    assert diverged == cross == [[1, 0.05]]
    assert axis.collections[0].get_paths()[0].vertices[:, 0].max() == 3


def test_bands_end_where_accuracies_and_losses_do(tmp_path, figures):  # noqa: F811
    """Of two runs at 0 and 1 the interval is far wider than that."""
    rows = recorded("planted")[:2] + recorded("planted")[20:22]
    histories = {
        ("control", seed): [
            row | {"val_accuracy": value, "train_loss": value} for row in history(2)
        ]
        for seed, value in enumerate((0.0, 1.0))
    }
    write(tmp_path, rows, histories)
    accuracy, loss = figures[0].axes
    for axis, top in ((accuracy, 1.0), (loss, 0.5 + 12.706 * 0.5)):
        heights = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (0, pytest.approx(top, rel=1e-3))
        ticks = [tick for tick in axis.get_xticks() if 0.5 <= tick <= 2.5]
        assert ticks == [1, 2]


def test_measures_of_classes_are_shown_where_all_runs_have_them(tmp_path):
    rows = recorded("planted")
    assert "Balanced accuracy" not in write(tmp_path / "a", rows)
    rows = [row | {"test_balanced_accuracy": 0.5, "test_macro_f1": 0.25} for row in rows]
    text = write(tmp_path / "b", rows)
    line = next(
        line for line in text.splitlines() if line.startswith("| `half` |") and "25.00" in line
    )
    assert line.endswith(" | 50.00 ± 0.00 % (50.00 to 50.00) | 25.00 ± 0.00 % (25.00 to 25.00) |")
    measured = study_table.arm_table(rows, "control", measure="macro_f1")
    assert "| test macro F1, mean ± standard deviation (95 % interval of the mean) |" in measured
    rows[3]["test_macro_f1"] = ""
    with refused("arm control seed 3 has no test macro F1: it was trained before that was noted"):
        study_table.arm_table(rows, "control", measure="macro_f1")


def test_history_is_read_from_a_run(tmp_path):
    assert study_report.read_history(tmp_path) == []
    rows = [row | {"memory_use": {}} for row in history(3)]
    write_metrics(tmp_path, rows)
    assert study_report.read_history(tmp_path) == history(3)
    file = tmp_path / "metrics.csv"
    file.write_text(re.sub(r"\n2,", "\ntwo,", file.read_text()))
    with refused("metrics.csv is damaged"):
        study_report.read_history(tmp_path)


def test_mistakes_leave_nothing_behind(tmp_path):
    rows = recorded("null")
    for wrong, reference, message in (
        (rows, "plain", "reference arm is 'plain'"),
        (rows[:20], "control", "all runs are of control"),
        ([*rows, rows[0]], "control", "two runs are of arm control and seed 0"),
    ):
        with refused(message):
            study_report.write(tmp_path / "new", wrong, {}, reference, "A study", COMMAND)
    assert not (tmp_path / "new").exists()
