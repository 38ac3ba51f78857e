"""Tables and plots of evaluations: by class, and by intervention."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from aim_flax import markdown
from aim_flax.evaluate.effects import Effect, Effects
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.files import save_figure, write_csv, write_json
from aim_flax.statistics import CONFIDENCE, p_value

ALPHA = 1 - CONFIDENCE


def plot_confusion(path: Path, evaluation: Evaluation, classes: Sequence[str], title: str) -> None:
    """Plots the share of each true class that was predicted as each class."""
    counts = evaluation.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(max(4, 0.35 * len(classes) + 2), 24)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the true class")
    if len(classes) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[i, j] > 0.5 else "black"
                axis.text(j, i, count, ha="center", va="center", color=color, fontsize=8)
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=90, fontsize=min(9, 400 / len(classes)))
    axis.set_yticks(ticks, classes, fontsize=min(9, 400 / len(classes)))
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
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


def class_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `per_class` as lines of text."""
    width = max(len("class"), *(len(row["class"]) for row in rows))
    columns = ("examples", "recall", "precision", "f1")
    lines = [f"{'class':{width}}" + "".join(f"  {column:>9}" for column in columns)]
    for row in rows:
        ratios = ["-" if row[c] is None else f"{row[c]:.4f}" for c in columns[1:]]
        cells = [str(row["examples"]), *ratios]
        lines.append(f"{row['class']:{width}}" + "".join(f"  {cell:>9}" for cell in cells))
    return "\n".join(lines)


def effects_table(effects: Effects) -> str:
    """Returns a Markdown table, a row per effect, and the notes below it."""
    header = ["memory", "altered at", "accuracy", "loss", "difference from `keep`, points"]
    header += ["worse", "better", "p", "p, Holm"]
    rows = [header]
    for effect in effects.rows:
        altered = "" if effect.kind == "keep" else f"`{effect.layer}`" if effect.layer else "all"
        cells = [f"`{effect.kind}`", altered, f"{effect.accuracy:.2%}", f"{effect.loss:.4f}"]
        if effect.p is None:
            cells += [""] * 5
        else:
            cells += [f"{100 * effect.difference:+z.2f}", str(effect.worse), str(effect.better)]
            cells += [p_value(effect.p), p_value(effect.p_holm)]
        rows.append(cells)
    return "\n\n".join([markdown.table(rows, left=2), *effects.notes])


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

    A panel per intervention; bars are pale where the corrected p-value is not below 0.05.
    """
    kinds = list(dict.fromkeys(effect.kind for effect in single))
    reads_first = sorted(single, key=lambda effect: effect.kind == "no_write")
    names = list(dict.fromkeys(map(_layer_name, reads_first)))
    figure = Figure(figsize=(2.2 * len(kinds) + 2.5, 0.22 * len(names) + 2), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        for effect in single:
            if effect.kind == kind:
                place = names.index(_layer_name(effect))
                color = "tab:red" if effect.difference < 0 else "tab:green"
                alpha = 1.0 if effect.p_holm < ALPHA else 0.35
                axis.barh(place, 100 * effect.difference, color=color, alpha=alpha)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=kind, ylim=(len(names) - 0.5, -0.5))
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    figure.supxlabel(f"difference in accuracy from keep, points (pale: p, Holm >= {ALPHA:.2f})")
    figure.suptitle(title)
    save_figure(figure, path)


def _layer_name(effect: Effect) -> str:
    return f"{effect.layer} (update)" if effect.kind == "no_write" else effect.layer
