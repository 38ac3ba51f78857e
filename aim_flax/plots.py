"""What all plots share: names as they are, titles that fit, and whole epochs."""

import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aim_flax.names import drawable
from aim_flax.statistics import Summary

# Up to so many epochs each is a point on its line. A run of one epoch is a point alone.
_POINTS = 30
LONGEST_NAME = 28


def plain(text: str) -> str:
    """Returns a text as matplotlib can draw it, see `drawable`, whole."""
    return drawable(text, 1000)


def short(names: Sequence[str], longest: int = LONGEST_NAME) -> list[str]:
    """Returns names without the middle of those that are long, for `plain` axes.

    Different names stay different: all may be longer if that takes it.
    """
    half = (longest - 1) // 2
    cut = [n if len(n) <= longest else f"{n[: longest - 1 - half]}…{n[-half:]}" for n in names]
    if len(set(cut)) < len(set(names)):
        return short(names, 2 * longest)
    return list(map(plain, cut))


def set_title(figure: Figure, title: str) -> None:
    """Puts a title above a figure, in as many lines as its width takes."""
    width = int(11 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.wrap(plain(title), width, break_on_hyphens=False)))


def in_points(summaries: Iterable[Summary]) -> tuple[list[float], list[list[float]]]:
    """Returns means, and how far their intervals reach below and above them, as `errorbar` takes
    them, in percentage points."""
    given = list(summaries)
    means = [100 * summary.mean for summary in given]
    below = [100 * (summary.mean - summary.low) for summary in given]
    above = [100 * (summary.high - summary.mean) for summary in given]
    return means, [below, above]


def class_matrix(names: Sequence[str]) -> tuple[Figure, Axes]:
    """Returns a figure, and an axis in it for a matrix whose rows and columns are classes."""
    inches = min(max(3.0, 0.35 * len(names)), 24.0)
    size = min(9.0, 0.7 * 72 * inches / len(names))
    texts, ticks = short(names), range(len(names))
    # Room for the names, about 0.6 of their height wide, beside the matrix and below it.
    whole = inches + 1 + max(map(len, texts)) * 0.6 * size / 72
    figure = Figure(figsize=(whole + 1, whole), layout="constrained")
    axis = figure.subplots()
    axis.set_xticks(ticks, texts, rotation=90, fontsize=size)
    axis.set_yticks(ticks, texts, fontsize=size)
    return figure, axis


def set_epochs(axis: Axes, first: int, last: int) -> None:
    """Makes the epochs from first to last the horizontal axis: whole numbers."""
    axis.set_xlabel("epoch")
    axis.set_xlim(first - 0.5, last + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def marker(epochs: int) -> str:
    """Returns how the points of a line over so many epochs are marked."""
    return "." if epochs <= _POINTS else ""
