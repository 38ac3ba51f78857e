"""Names of files and classes may hold anything: they are printed in a line, and drawn."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from aim_flax import names
from aim_flax.evaluate import plots, report
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.files import save_figure

ODD = ["a\nb\tc", "red\udcff", "$x$", "\\$", "100 % $", "猫", "🐈", "an apple|pear", "long " * 60]


def test_what_is_printed_is_one_line_of_utf8():
    found = [names.printable(name) for name in ODD]
    assert found == [r"a\nb\tc", r"red\udcff", *ODD[2:]]
    assert names.printable("\x1b[31mred\u2028") == r"\x1b[31mred\u2028"


@pytest.mark.parametrize("most", [1, 2, 9, 10])
def test_long_names_lose_their_middle(most):
    short = names.shortened("0123456789ab", most)
    assert len(short) == most
    assert "0123456789ab".startswith(short.partition("…")[0])
    assert "0123456789ab".endswith(short.partition("…")[2])
    assert names.shortened("0123456789", 10) == "0123456789"


def test_what_no_font_has_becomes_an_escape(monkeypatch):
    monkeypatch.setattr(names, "_characters", lambda: frozenset(map(ord, "aé$")))
    assert names.drawable("aé$猫b") == r"aé\$\u732bb"


def test_drawn_names_are_the_names(tmp_path):
    """Matplotlib warns of a letter that it lacks, which is an error here, and fails on odd $."""
    for name in ODD:
        figure = Figure()
        text = figure.text(0, 0, names.drawable(name))
        save_figure(figure, tmp_path / "x.png")
        drawn, is_math = text._preprocess_math(text.get_text())
        assert not is_math
        if len(name) < 40 and name.isprintable() and name.isascii():
            assert drawn.replace("\\\\", "\\") == name


def test_plots_and_tables_take_odd_class_names(tmp_path):
    confusion = np.eye(len(ODD), dtype=int)
    evaluation = Evaluation(0.5, confusion, np.ones(len(ODD), bool))
    plots.plot_confusion(tmp_path / "confusion.png", evaluation, ODD, "title")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    lines = report.class_table(report.per_class(evaluation, ODD)).splitlines()
    assert len(lines) == len(ODD) + 1
