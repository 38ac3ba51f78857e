"""Tables and plots of evaluations: by class, and by intervention."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aim_flax import markdown
from aim_flax.data.dataset import Dataset
from aim_flax.evaluate.effects import Effect, Effects
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.mistakes import mistakes
from aim_flax.files import save_figure, write_bytes, write_csv, write_json
from aim_flax.names import printable
from aim_flax.plots import class_matrix, set_title, short
from aim_flax.statistics import CONFIDENCE, p_value

ALPHA = 1 - CONFIDENCE


def plot_confusion(path: Path, evaluation: Evaluation, classes: Sequence[str], title: str) -> None:
    """Plots the share of each true class that was predicted as each class."""
    counts = evaluation.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = class_matrix(classes)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the true class")
    if len(classes) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[i, j] > 0.5 else "black"
                axis.text(j, i, count, ha="center", va="center", color=color, fontsize=8)
    axis.set(xlabel="predicted class", ylabel="true class")
    set_title(figure, title)
    save_figure(figure, path)


def per_class(evaluation: Evaluation, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns, for each class, its number of examples, recall, precision and F1 score.

    A ratio whose denominator is 0 is None.
    """
    rows = []
    correct = np.diag(evaluation.confusion)
    of_class, as_class = evaluation.confusion.sum(axis=1), evaluation.confusion.sum(axis=0)
    for i, name in enumerate(classes):
        total = of_class[i] + as_class[i]
        rows.append(
            {
                "class": name,
                "examples": int(of_class[i]),
                "recall": float(correct[i] / of_class[i]) if of_class[i] else None,
                "precision": float(correct[i] / as_class[i]) if as_class[i] else None,
                "f1": float(2 * correct[i] / total) if total else None,
            }
        )
    return rows


def class_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the rows of `per_class` as cells of a table, the header first."""
    columns = ("recall", "precision", "f1")
    cells = [["class", "examples", *columns]]
    for row in rows:
        ratios = ["-" if row[c] is None else f"{row[c]:.4f}" for c in columns]
        cells.append([row["class"], str(row["examples"]), *ratios])
    return cells


def class_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `per_class` as lines of text."""
    cells = class_cells(rows)
    cells = [[printable(name), *others] for name, *others in cells]
    width = max(len(name) for name, *_ in cells)
    return "\n".join(
        f"{name:{width}}" + "".join(f"  {cell:>9}" for cell in others) for name, *others in cells
    )


def write_evaluation(
    folder: Path,
    name: str,
    evaluation: Evaluation,
    dataset: Dataset,
    white: float,
    context: dict[str, Any],
) -> None:
    """Writes eval_`name`.json and, if images were predicted wrongly, mistakes_`name`.png.

    Args:
      white: the value of a white pixel.
      context: of the evaluation, `split` among it, which comes first in the JSON file.
    """
    low, high = evaluation.accuracy_interval()
    wrong, sheet = mistakes(evaluation, dataset, context["split"], white)
    result = {
        **context,
        "examples": evaluation.count,
        "skipped": evaluation.skipped,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": evaluation.balanced_accuracy,
        "macro_f1": evaluation.macro_f1,
        "classes": per_class(evaluation, dataset.classes),
        "confusion": evaluation.confusion.tolist(),
        "mistakes": wrong,
    }
    # The picture first: the rows of the JSON file are those of its images.
    if sheet is not None:
        write_bytes(folder / f"mistakes_{name}.png", sheet)
    else:
        (folder / f"mistakes_{name}.png").unlink(missing_ok=True)
    write_json(folder / f"eval_{name}.json", result)


def effects_cells(effects: Sequence[Effect]) -> list[list[str]]:
    """Returns a row of cells per effect, the header first."""
    header = ["memory", "altered at", "accuracy", "loss", "difference from `keep`, points"]
    header += ["worse", "better", "p", "p, Holm"]
    rows = [header]
    for effect in effects:
        altered = "" if effect.kind == "keep" else f"`{effect.layer}`" if effect.layer else "all"
        cells = [f"`{effect.kind}`", altered, f"{effect.accuracy:.2%}", f"{effect.loss:.4f}"]
        if effect.p is None:
            cells += [""] * 5
        else:
            cells += [f"{100 * effect.difference:+z.2f}", str(effect.worse), str(effect.better)]
            cells += [p_value(effect.p), p_value(effect.p_holm)]
        rows.append(cells)
    return rows


def effects_table(effects: Effects) -> str:
    """Returns a Markdown table, a row per effect, and the notes below it."""
    return "\n\n".join([markdown.table(effects_cells(effects.rows), left=2), *effects.notes])


def write_effects(file: Path, effects: Effects, context: dict[str, Any], title: str) -> None:
    """Writes `file`.json and .csv, and .png if layers were altered one by one.

    Args:
      context: keys of the evaluation, which come first in the JSON file.
      title: of the plot.
    """
    rows = [dataclasses.asdict(row) for row in effects.rows]
    write_json(file.with_suffix(".json"), {**context, "notes": effects.notes, "effects": rows})
    write_csv(file.with_suffix(".csv"), [field.name for field in dataclasses.fields(Effect)], rows)
    single = [row for row in effects.rows if row.layer]
    if single:
        _plot_effects(file.with_suffix(".png"), single, title)


def _plot_effects(path: Path, single: Sequence[Effect], title: str) -> None:
    """Plots the difference in accuracy that each intervention at a single layer makes.

    A panel per intervention; bars are pale where the corrected p-value is not below 0.05, and a row
    is grey where the intervention has nothing to alter. Each bar's number stands on the other side
    of 0, also where it is 0.
    """
    kinds = list(dict.fromkeys(effect.kind for effect in single))
    reads_first = sorted(single, key=lambda effect: effect.kind == "no_write")
    names = list(dict.fromkeys(map(_layer_name, reads_first)))
    figure = Figure(figsize=(2.2 * len(kinds) + 2.5, 0.22 * len(names) + 2), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        measured = {_layer_name(e): e for e in single if e.kind == kind}
        for place, name in enumerate(names):
            if name in measured:
                _draw_effect(axis, place, measured[name])
            else:
                axis.axhspan(place - 0.5, place + 0.5, color="0.9", zorder=0)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=kind, ylim=(len(names) - 0.5, -0.5))
        axis.tick_params(axis="x", labelsize=8)
    points = [100 * effect.difference for effect in single]
    low, high = min(0.0, *points), max(0.0, *points)
    # Room for the numbers on the other side of 0.
    room = 0.3 * max(high - low, 1.0)
    axes[0].set_xlim(min(1.05 * low, -room), max(1.05 * high, room))
    axes[0].set_yticks(range(len(names)), short(names, 40), fontsize=8)
    figure.supxlabel(
        "difference in accuracy from keep, percentage points"
        f" (pale: p ≥ {ALPHA:.2f} after Holm's correction; grey: nothing to alter there)",
        fontsize=9,
    )
    set_title(figure, title)
    save_figure(figure, path)


def _draw_effect(axis: Axes, place: int, effect: Effect) -> None:
    points = 100 * effect.difference
    color = "tab:red" if points < 0 else "tab:blue"
    axis.barh(place, points, color=color, alpha=1.0 if effect.p_holm < ALPHA else 0.35)
    side = dict(ha="right", xytext=(-3, 0)) if points > 0 else dict(ha="left", xytext=(3, 0))
    at = dict(textcoords="offset points", va="center", fontsize=7)
    axis.annotate(f"{points:+.1f}" if points else "0", (0, place), **side, **at)


def _layer_name(effect: Effect) -> str:
    return f"{effect.layer} (update)" if effect.kind == "no_write" else effect.layer
