"""Plots show the numbers they are given: what is drawn is read back from the saved figures."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from aim_flax.evaluate.effects import Effect, Effects
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.plots import plot_confusion
from aim_flax.evaluate.report import write_effects
from aim_flax.plots import in_points, short
from aim_flax.statistics import Summary, compare
from aim_flax.study import report as study_report
from aim_flax.study.results import accuracies_by_arm
from aim_flax.train.plots import plot_history
from tests.test_comparison import recorded


@pytest.fixture
def figures(monkeypatch):
    """Returns the figures that are saved, in their order."""
    saved, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def curves(axis):
    """Returns {label: points} of an axis's lines that have a label."""
    lines = axis.get_lines()
    return {x.get_label(): x.get_xydata().tolist() for x in lines if x.get_label()[0] != "_"}


def history_of(rates):
    """Returns the rows of a run of so many epochs, with random numbers."""
    columns = ("train_accuracy", "val_accuracy", "train_loss", "val_loss")
    values = np.random.default_rng(0).uniform(size=(len(rates), 4)).tolist()
    return [
        {"epoch": i, "step": 7 * i, "learning_rate": rate, **dict(zip(columns, row, strict=True))}
        for i, (rate, row) in enumerate(zip(rates, values, strict=True), start=1)
    ]


def whole_epochs(axis):
    """Checks that the horizontal axis is named, and marked by whole epochs only."""
    assert axis.get_xlabel() == "epoch"
    ticks = axis.get_xticks()
    assert len(ticks)
    assert all(tick == int(tick) for tick in ticks)


def test_history_draws_every_epoch_and_cut(tmp_path, figures):
    history = history_of((1e-3, 1e-3, 1e-4, 0.9e-4))
    plot_history(tmp_path / "history.png", history, "a $run$", cuts=[2], best_step=21)
    (figure,) = figures
    assert figure.get_suptitle() == r"a \$run\$"
    assert len(figure.axes) == 3
    for axis, what in zip(figure.axes, ("accuracy", "loss"), strict=False):
        assert axis.get_ylabel() == what
        expected = {
            label: [[row["epoch"], row[f"{split}_{what}"]] for row in history]
            for label, split in (("training", "train"), ("validation", "val"))
        }
        expected["chosen epoch"] = [[3, history[2][f"val_{what}"]]]
        assert curves(axis) == expected
        assert [text.get_text() for text in axis.get_legend().texts] == list(expected)
    (rates,) = [x for x in figure.axes[2].get_lines() if len(x.get_xdata()) > 2]
    assert rates.get_xydata().tolist() == [[row["epoch"], row["learning_rate"]] for row in history]
    assert figure.axes[2].get_yscale() == "log"
    for axis in figure.axes:
        whole_epochs(axis)
        (cut,) = [x for x in axis.get_lines() if x.get_linestyle() == ":"]
        assert list(cut.get_xdata()) == [2.5, 2.5]


def test_a_smooth_schedule_is_a_line_and_has_no_marks(tmp_path, figures):
    rates = (1e-3 * (1 + np.cos(np.linspace(0.1, np.pi, 60))) / 2).tolist()
    plot_history(tmp_path / "history.png", history_of(rates), "a run")
    (figure,) = figures
    assert [len(axis.get_lines()) for axis in figure.axes] == [2, 2, 1]
    assert figure.axes[2].get_lines()[0].get_ydata().tolist() == rates
    assert figure.axes[2].get_yscale() == "linear"
    assert not any(axis.texts for axis in figure.axes)


def test_a_run_of_one_epoch_is_points_and_a_constant_rate_is_not_shown(tmp_path, figures):
    plot_history(tmp_path / "history.png", history_of([1e-3]), "a run")
    (figure,) = figures
    assert len(figure.axes) == 2
    for axis in figure.axes:
        assert {line.get_marker() for line in axis.get_lines()} == {"."}
        whole_epochs(axis)


def test_what_cannot_be_altered_looks_unlike_what_changes_nothing(tmp_path, figures):
    single = [
        Effect("zero", "a", 0.5, 1.0, -0.25, 25, 0, 0.001, 0.003),
        Effect("zero", "b", 0.75, 1.0, 0.0, 3, 3, 1.0, 1.0),
        Effect("mean", "b", 0.79, 1.0, 0.04, 1, 5, 0.2, 0.4),
        Effect("no_write", "a", 0.74, 1.0, -0.01, 1, 0, 1.0, 1.0),
    ]
    keep = Effect("keep", None, 0.75, 1.0, 0.0, 0, 0, None)
    write_effects(tmp_path / "effects", Effects(None, [keep, *single], []), {}, "a run")
    drawn = {}
    for axis in figures[0].axes:
        bars = [patch for patch in axis.patches if patch.get_facecolor()[:3] != (0.9, 0.9, 0.9)]
        grey = [patch for patch in axis.patches if patch not in bars]
        rows = [patch.get_y() + patch.get_height() / 2 for patch in grey]
        drawn[axis.get_title()] = (
            {round(b.get_y() + b.get_height() / 2): round(b.get_width(), 6) for b in bars},
            {round(row) for row in rows},
            {text.xy[1]: text.get_text() for text in axis.texts},
        )
    # The rows are a, b and the update a.
    assert drawn == {
        "zero": ({0: -25.0, 1: 0.0}, {2}, {0: "-25.0", 1: "0"}),
        "mean": ({1: 4.0}, {0, 2}, {1: "+4.0"}),
        "no_write": ({2: -1.0}, {0, 1}, {2: "-1.0"}),
    }
    low, high = figures[0].axes[0].get_xlim()
    assert low < -25
    assert high > 4


def test_intervals_are_lengths_to_each_side_in_points():
    means, bars = in_points([Summary(3, 0.5, 0.25, 0.625, 0.1), Summary(2, -0.25, -0.5, 0.25, 0.1)])
    assert means == [50, -25]
    assert bars == [[25, 25], [12.5, 50]]


def test_long_names_are_cut_and_stay_different():
    names = ["x" * 40 + end for end in ("1", "2")]
    assert short([*names, "short"]) == ["x" * 14 + "…" + "x" * 12 + end for end in "12"] + ["short"]
    # The middle tells these apart.
    names = ["a" * 30 + middle + "b" * 30 for middle in "12"]
    assert len(set(short(names))) == 2
    assert short(["$a_1$"]) == [r"\$a_1\$"]


@pytest.mark.parametrize(("count", "length"), [(2, 60), (12, 60), (3, 1)])
def test_long_names_and_titles_leave_room_for_the_matrix(tmp_path, figures, count, length):
    evaluation = Evaluation(0.5, np.eye(count, dtype=int), np.ones(count, bool))
    classes = [f"{i}".zfill(length) for i in range(count)]
    title = "image_folder_resnet50:aim, seed 0, test split, with altered memory (zero everywhere)"
    plot_confusion(tmp_path / "confusion.png", evaluation, classes, title)
    (figure,) = figures
    figure.draw_without_rendering()  # Saving it had another resolution.
    axis = figure.axes[0]
    inches = axis.get_window_extent().width / figure.dpi
    assert inches > max(2, 0.25 * count)
    # Everything is within the picture.
    whole = figure.bbox
    for text in (*axis.get_xticklabels(), *axis.get_yticklabels(), figure._suptitle):
        extent = text.get_window_extent()
        assert whole.x0 <= extent.x0
        assert extent.x1 <= whole.x1
        assert whole.y0 <= extent.y0
        assert extent.y1 <= whole.y1


def test_confusion_matrix_has_shares_as_colours_and_counts_as_text(tmp_path, figures):
    counts = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    evaluation = Evaluation(0.5, counts, np.ones(12, bool))
    plot_confusion(tmp_path / "confusion.png", evaluation, ("a", "b", "c"), "a split")
    axis = figures[0].axes[0]
    (image,) = axis.get_images()
    np.testing.assert_allclose(image.get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]])
    assert image.get_clim() == (0, 1)
    # Columns are what was predicted.
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "6",
        (1, 0): "2",
        (0, 2): "1",
        (2, 2): "3",
    }
    for labels, name in ((axis.get_xticklabels(), "predicted"), (axis.get_yticklabels(), "true")):
        assert [label.get_text() for label in labels] == ["a", "b", "c"], name
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")


def test_differences_have_a_dot_per_seed_and_an_interval_per_arm(tmp_path, figures):
    rows = recorded("planted")
    study_report.write(tmp_path, rows, {}, "control", "a study", "python ablate.py")
    axis = figures[1].axes[0]
    compared = compare(accuracies_by_arm(rows), "control")
    assert [label.get_text() for label in axis.get_yticklabels()] == list(compared)
    dots = [x for x in axis.get_lines() if x.get_marker() == "o"]
    for place, (comparison, dot) in enumerate(zip(compared.values(), dots, strict=True)):
        points = 100 * np.array(list(comparison.differences.values()))
        np.testing.assert_allclose(dot.get_xdata(), points)
        np.testing.assert_allclose(dot.get_ydata(), place + np.linspace(-0.25, 0.25, 20))
        mean, _, (bar,) = axis.containers[place]
        summary = comparison.summary
        assert mean.get_xydata().tolist() == [[pytest.approx(100 * summary.mean), place]]
        ends = [[100 * summary.low, place], [100 * summary.high, place]]
        np.testing.assert_allclose(bar.get_segments()[0], ends)
    assert axis.get_lines()[0].get_xdata() == [0, 0]  # the reference
