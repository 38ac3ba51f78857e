"""What an evaluation leaves for people: a table of classes and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.files import save_figure


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

    A ratio without any example in its denominator is None.
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
