"""The report of a study: its runs, what they say about each arm, and plots.

The same runs always give the same files.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from aim_flax import files, markdown
from aim_flax.errors import UsageError, check_choice
from aim_flax.plots import in_points, marker, plain, set_epochs, set_title, short
from aim_flax.statistics import CONFIDENCE, Comparison, compare, p_value
from aim_flax.study.page import Part, write_page
from aim_flax.study.power import smallest_differences
from aim_flax.study.results import COLUMNS, Row, accuracies_by_arm, is_finished
from aim_flax.study.table import arm_cells, interval, measure_cells, notes
from aim_flax.train import report

ALPHA = 1 - CONFIDENCE
CURVES = {"val_accuracy": "validation accuracy", "train_loss": "training loss"}
LIMITS = {"val_accuracy": (0.0, 1.0), "train_loss": (0.0, np.inf)}


def write(
    folder: Path,
    rows: Sequence[Row],
    histories: Mapping[tuple[str, int], Sequence[Mapping[str, float]]],
    reference: str,
    title: str,
    command: str,
) -> None:
    """Writes results.csv, report.md, report.html and the plots of both into a folder.

    Args:
      folder: created if it does not exist.
      rows: a row of `aim_flax.study.results.COLUMNS` per run of the study, started or not.
      histories: {(arm, seed): rows of metrics.csv}, of the runs that have finished an epoch.
      reference: the arm that the others are compared with.
      title: of the report.
      command: the command lines that made the study.

    Raises:
      UsageError: no run is of the reference arm, none of another, or two of the same arm and seed.
    """
    arms = accuracies_by_arm(rows)
    check_choice("the reference arm", reference, arms)
    if len(arms) < 2:
        raise UsageError(f"a study compares arms, but all runs are of {reference}")
    compared = compare(arms, reference)
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: ([*arms].index(row["arm"]), int(row["seed"])))
    # Rows recorded before lack the later columns.
    recorded = [dict.fromkeys(COLUMNS) | row for row in rows]
    files.write_csv(folder / "results.csv", COLUMNS, recorded)
    colors = _colors(arms)
    _plot_curves(folder / "curves.png", rows, histories, colors, title)
    _plot_differences(folder / "differences.png", compared, colors, reference, title)
    parts = _parts(rows, compared, reference, command)
    files.write_text(folder / "report.md", _markdown(title, parts))
    write_page(folder, title, parts, rows)


def read_history(workdir: Path) -> list[dict[str, float]]:
    """Returns the rows of a run's metrics.csv as numbers; [] if it has finished no epoch.

    Raises:
      UsageError: the file is damaged.
    """
    file = workdir / "metrics.csv"
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        return [{column: float(row[column]) for column in report.HISTORY_COLUMNS} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is damaged: {error!r}") from None


def _parts(
    rows: Sequence[Row],
    compared: Mapping[str, Comparison],
    reference: str,
    command: str,
) -> list[Part]:
    """Returns the report, in order; see `page.Part`."""
    findings = [
        f"{finding(arm, comparison, reference)}{_losses(rows, arm)}"
        for arm, comparison in compared.items()
    ]
    if losses := _losses(rows, reference):
        findings.append(f"`{reference}` is what the others are compared with.{losses}")
    parts: list[Part] = [("code", command), ("table", arm_cells(rows, reference))]
    parts += [("text", note) for note in notes(rows)]
    parts += [
        ("text", "What can be told from chance:"),
        ("items", findings),
        (
            "text",
            "Differences are in percentage points of test accuracy, between runs of the same seed."
            " p is that of the paired t-test, two-sided; Holm's method corrects it for the number"
            f" of arms tested, {sum(c.p is not None for c in compared.values())}, and below"
            f" {ALPHA:.2f} it counts as more than chance. Intervals are not corrected. d_z is the"
            " mean difference over the standard deviation of the differences. Seeds vary the"
            " initial values, the order of examples and what else is drawn in training, not the"
            " split of the data.",
        ),
    ]
    if smallest := smallest_differences(compared):
        parts.append(("text", smallest))
    parts.append(("text", _selection(rows)))
    if measures := measure_cells(rows):
        parts += [
            (
                "text",
                "Balanced accuracy and macro F1 are means over the classes, each of which counts"
                " the same, however many images it has:",
            ),
            ("table", measures),
        ]
    parts += [
        ("figure", ("curves.png", "Accuracy and loss by epoch")),
        (
            "text",
            "Lines are means over finished runs, bands their 95 % intervals (cut off where an"
            " accuracy or a loss ends), as far as all finished runs of the arm went. Later epochs"
            " of those that went on, and runs without a result (ending in a cross), are thin dotted"
            " lines of their own: a mean of the runs that are left would be one of other runs.",
        ),
        ("figure", ("differences.png", "Differences by seed")),
    ]
    return parts


def _markdown(title: str, parts: Sequence[Part]) -> str:
    render = {
        "text": str,
        "items": lambda lines: "\n".join(f"- {line}" for line in lines),
        "code": lambda lines: f"```bash\n{lines}\n```",
        "table": markdown.table,
        "figure": lambda content: f"![{content[1]}]({content[0]})",
    }
    texts = [f"# {title}", *(render[kind](content) for kind, content in parts)]
    return "\n\n".join(texts) + "\n"


def finding(arm: str, comparison: Comparison, reference: str) -> str:
    """Returns a sentence that says whether the difference can be told from chance."""
    differences, p = comparison.summary, comparison.p_holm
    if not differences.n:
        return f"`{arm}` and `{reference}` have no finished seed in common: nothing can be told."
    seeds = f"{differences.n} common seeds"
    if differences.n == 1:
        return (
            f"`{arm}` and `{reference}` have one finished seed in common, with a difference of"
            f" {interval(differences)}: nothing can be told from chance."
        )
    if p is None:
        return (
            f"`{arm}` differs from `{reference}` by the same {100 * differences.mean:+z.2f} in each"
            f" of {seeds}: without spread the t-test cannot say how likely chance does that."
        )
    if differences.deviation == 0:
        return f"`{arm}` equals `{reference}` in each of {seeds}."
    if p >= ALPHA:
        low, high = (f"{100 * value:+z.2f}" for value in (differences.low, differences.high))
        return (
            f"No difference of `{arm}` from `{reference}` can be told from chance (p = {p_value(p)}"
            f" after correction, {seeds}), which does not show that there is none: its uncorrected"
            f" 95 % interval reaches from {low} to {high}."
        )
    word = "more" if differences.mean > 0 else "less"
    than = p_value(p) if p < 0.001 else f"= {p_value(p)}"
    return (
        f"`{arm}` is {word} accurate than `{reference}`, by more than chance explains:"
        f" {interval(differences)} over {seeds} (p {than} after correction)."
    )


def _losses(rows: Sequence[Row], arm: str) -> str:
    """Returns a sentence if an arm's numbers leave out some of its runs, or ""."""
    of_arm = [row for row in rows if row["arm"] == arm]
    lost = sum(not is_finished(row) for row in of_arm)
    return f" Without a result: {lost} of {len(of_arm)} runs of `{arm}`." if lost else ""


def _selection(rows: Sequence[Row]) -> str:
    """Returns how the tested epochs were chosen."""
    finished = [row for row in rows if is_finished(row)]
    on_test = dict.fromkeys(f"`{r['arm']}`" for r in finished if r["selected_on"] == "test")
    text = (
        "Each finished run was tested once, in the epoch of its best accuracy on the selection"
        " split (among equal ones, that of the lowest loss; with early stopping, the epoch from"
        " which its patience counts)."
    )
    if not on_test:
        return f"{text} That was the validation split; the test split had no part in it."
    return (
        f"{text} Of {', '.join(on_test)} that was the test split itself, so their accuracies are"
        " better than on new images; of all others the validation split."
    )


def _plot_curves(
    path: Path,
    rows: Sequence[Row],
    histories: Mapping[tuple[str, int], Sequence[Mapping[str, float]]],
    colors: Mapping[str, Any],
    title: str,
) -> None:
    # Beside the panels: with many arms it would hide them.
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    longest = max(map(len, histories.values()), default=1)
    alpha = min(0.2, 0.8 / len(colors))  # Bands that lie over each other stay light.
    for axis, (column, label) in zip(axes, CURVES.items(), strict=True):
        for arm, color in colors.items():
            of_arm = [row for row in rows if row["arm"] == arm]
            finished, others = [], []
            for row in of_arm:
                if history := histories.get((arm, int(row["seed"]))):
                    curve = [epoch[column] for epoch in history]
                    (finished if is_finished(row) else others).append(curve)
            name = f"{plain(arm)} ({len(finished)} of {len(of_arm)} runs)"
            _plot_arm(axis, finished, others, color, name, LIMITS[column], alpha)
        axis.set_ylabel(label)
        set_epochs(axis, 1, longest)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    set_title(figure, title)
    files.save_figure(figure, path)


def _plot_arm(
    axis: Axes,
    finished: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    color: Any,
    name: str,
    limits: tuple[float, float],
    alpha: float,
) -> None:
    """Plots an arm's mean curve and its band, within the limits that the numbers have, and the rest
    of each run by itself."""
    common = min(map(len, finished), default=0)
    epochs = np.arange(1, common + 1)
    mean, half = mean_curve([curve[:common] for curve in finished])
    axis.plot(epochs, mean, color=color, label=name, marker=marker(common))
    if half is not None:
        low, high = (np.clip(edge, *limits) for edge in (mean - half, mean + half))
        axis.fill_between(epochs, low, high, color=color, alpha=alpha, linewidth=0)
        if common == 1:  # A band of one epoch has no width.
            axis.vlines(epochs, low, high, color=color)
    thin = dict(color=color, linewidth=0.8, linestyle=":")
    for curve in finished:
        # From the last common epoch, so that the lines start where the mean ends.
        axis.plot(range(common, len(curve) + 1), curve[common - 1 :], **thin)
    for curve in others:
        axis.plot(range(1, len(curve) + 1), curve, **thin)
        axis.plot([len(curve)], curve[-1:], "x", color=color)


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the mean of curves (runs, epochs) and half of its 95 % interval (Student's t).

    Both are (epochs,) float64; fewer than two curves have no interval.
    """
    values = np.asarray(curves, np.float64)
    if not values.size:
        return np.zeros(0), None
    n = len(values)
    if n < 2:
        return values.mean(axis=0), None
    error = values.std(axis=0, ddof=1) / np.sqrt(n)
    return values.mean(axis=0), t.ppf((1 + CONFIDENCE) / 2, n - 1) * error


def _plot_differences(
    path: Path,
    compared: Mapping[str, Comparison],
    colors: Mapping[str, Any],
    reference: str,
    title: str,
) -> None:
    figure = Figure(figsize=(8, 1.5 + 0.6 * max(len(compared), 1)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="grey", linewidth=1)
    for place, (arm, comparison) in enumerate(compared.items()):
        summary, color = comparison.summary, colors[arm]
        points = 100 * np.array(list(comparison.differences.values()))
        if not len(points):
            axis.text(0, place, " no common seed", va="center", fontsize=8)
        # Spread by seed, because on few test images many differences are equal.
        spread = place + np.linspace(-0.25, 0.25, len(points)) if len(points) > 1 else [place]
        axis.plot(points, spread[: len(points)], "o", color=color, alpha=0.5, markersize=4)
        if summary.low is not None:
            mean, bars = in_points([summary])
            axis.errorbar(mean, [place], xerr=bars, fmt="D", color="black", capsize=4)
    axis.set_yticks(range(len(compared)), short(list(compared)))
    axis.set_ylim(len(compared) - 0.5, -0.5)
    against = plain(reference)
    axis.set_xlabel(f"test accuracy − that of {against}, same seed (percentage points)")
    set_title(figure, f"{title}: seeds (dots), mean and 95 % interval (black)")
    files.save_figure(figure, path)


def _colors(arms: Iterable[str]) -> dict[str, Any]:
    names = list(arms)
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(i % palette.N) for i, name in enumerate(names)}
