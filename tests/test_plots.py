"""Plots show the numbers they are given: what is drawn is read back from the saved figures."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.report import plot_confusion
from aim_flax.statistics import compare
from aim_flax.study import report as study_report
from aim_flax.study.results import accuracies_by_arm
from aim_flax.train.report import plot_history
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


def test_history_draws_every_epoch_and_cut(tmp_path, figures):
    columns = ("train_accuracy", "val_accuracy", "train_loss", "val_loss")
    values = np.random.default_rng(0).uniform(size=(4, 4)).tolist()
    rates = (1e-3, 1e-3, 1e-4, 0.9e-4)
    history = [
        {"epoch": epoch, "learning_rate": rate, **dict(zip(columns, row, strict=True))}
        for epoch, rate, row in zip(range(1, 5), rates, values, strict=True)
    ]
    plot_history(tmp_path / "history.png", history, "a run")
    (figure,) = figures
    assert figure.get_suptitle() == "a run"
    for axis, what in zip(figure.axes, ("accuracy", "loss"), strict=True):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", what)
        assert curves(axis) == {
            label: [[row["epoch"], row[f"{split}_{what}"]] for row in history]
            for label, split in (("training", "train"), ("validation", "val"))
        }
        assert [text.get_text() for text in axis.get_legend().texts] == ["training", "validation"]
        (cut,) = [x for x in axis.get_lines() if x.get_label()[0] == "_"]
        assert list(cut.get_xdata()) == [2.5, 2.5]
        assert [text.get_text() for text in axis.texts] == ["1e-04"]


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
