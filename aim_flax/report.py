"""The files that a run leaves for people: tables, plots and TensorBoard events."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from aim_flax.evaluation import Evaluation

HISTORY_COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
)
History = Sequence[dict[str, Any]]


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    os.replace(temporary, path)


def write_metrics(workdir: Path, history: History) -> None:
    """Writes metrics.csv, a row per epoch, and memory_use.csv, a row per epoch and layer."""
    write_csv(workdir / "metrics.csv", HISTORY_COLUMNS, history)
    uses = [
        {"epoch": row["epoch"], "layer": layer, **norms}
        for row in history
        for layer, norms in row["memory_use"].items()
    ]
    if uses:
        write_csv(workdir / "memory_use.csv", ("epoch", "layer", "share", "own"), uses)


class Events:
    """TensorBoard events of a run, from `step` on; what an earlier try wrote later is purged.

    A context manager; of several processes the first one writes.
    """

    def __init__(self, workdir: Path, step: int):
        self._writer = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=step + 1,
            write_to_disk=jax.process_index() == 0,
        )

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def write(self, row: dict[str, Any], data_wait_share: float | None) -> None:
        """Writes an epoch's row of the history, and the share of time spent waiting for data."""
        if data_wait_share is not None:
            self._writer.add_scalar("data_wait_share", data_wait_share, row["step"])
        for column in HISTORY_COLUMNS[2:]:
            split, _, metric = column.partition("_")
            tag = f"{split}/{metric}" if split in ("train", "val") else column
            self._writer.add_scalar(tag, row[column], row["step"])
        for layer, norms in row["memory_use"].items():
            # Of nothing there is no share, and of a NaN tensorboardX would warn at every epoch.
            if norms["own"]:
                ratio = norms["share"] / norms["own"]
                self._writer.add_scalar(f"memory_use/{layer}", ratio, row["step"])


def plot_history(path: Path, history: History, title: str) -> None:
    """Plots accuracy and loss against epoch, with the cuts of the learning rate marked."""
    epochs = [row["epoch"] for row in history]
    rates = [row["learning_rate"] for row in history]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, what in zip(axes, ("accuracy", "loss"), strict=True):
        for split in ("train", "val"):
            label = {"train": "training", "val": "validation"}[split]
            axis.plot(epochs, [row[f"{split}_{what}"] for row in history], label=label)
        for i in _cuts(rates):
            axis.axvline(epochs[i] - 0.5, color="grey", linestyle=":", linewidth=1)
            axis.annotate(
                f"{rates[i]:.0e}",
                (epochs[i] - 0.5, 1),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
            )
        axis.set(xlabel="epoch", ylabel=what)
        axis.legend()
    figure.suptitle(title)
    save_figure(figure, path)


def _cuts(rates: Sequence[float]) -> list[int]:
    """Returns the positions at which a rate is at most half the one before."""
    return [i for i in range(1, len(rates)) if 0 < rates[i] <= rates[i - 1] / 2]


def plot_memory_use(path: Path, history: History, title: str, step: int | None = None) -> None:
    """Plots the memory's share of each layer that reads it, and the change by each update.

    A bar per layer for one epoch, in the order of the history, and beside it a line in the same
    colour over all epochs. A layer whose own output is 0 has neither.

    Args:
      step: at whose end the bars stand, that of the best checkpoint; None: the last epoch's.
    """
    row = history[-1] if step is None else next(r for r in history if r["step"] == step)
    labels = {
        "read": "memory's share of the layer / layer's own output",
        "update": "change of the memory / memory before",
    }
    layers = {
        kind: [layer for layer in row["memory_use"] if layer.startswith(f"{kind} ")]
        for kind in labels
    }
    layers = {kind: of_kind for kind, of_kind in layers.items() if of_kind}
    heights = [1.2 + max(1.0, 0.2 * len(of_kind)) for of_kind in layers.values()]
    figure = Figure(figsize=(11, 0.6 + sum(heights)), layout="constrained")
    rows = figure.subplots(len(layers), 2, squeeze=False, height_ratios=heights)
    for (bars, lines), (kind, of_kind) in zip(rows, layers.items(), strict=True):
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(of_kind)))
        ratios = [_ratio(row["memory_use"][layer]) for layer in of_kind]
        names = [layer.removeprefix(f"{kind} ") for layer in of_kind]
        places = np.arange(len(of_kind))
        bars.barh(places, ratios, color=colors)
        bars.set_yticks(places, names, fontsize=8)
        for place in places[np.isnan(ratios)]:
            bars.text(0, place, " no share: own norm is 0", va="center", fontsize=8)
        bars.set(
            xlabel=f"ratio of L2 norms after epoch {row['epoch']}",
            ylim=(len(of_kind) - 0.5, -0.5),
        )
        bars.set_title(labels[kind], fontsize=10)
        bars.set_xlim(left=0)
        epochs = [r["epoch"] for r in history]
        for layer, color in zip(of_kind, colors, strict=True):
            lines.plot(epochs, [_ratio(r["memory_use"][layer]) for r in history], color=color)
        lines.axvline(row["epoch"], color="grey", linestyle=":", linewidth=1)
        lines.set(xlabel="epoch", ylabel="ratio of L2 norms")
        lines.set_ylim(bottom=0)
    figure.suptitle(title)
    save_figure(figure, path)


def _ratio(norms: dict[str, float]) -> float:
    return norms["share"] / norms["own"] if norms["own"] else np.nan


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


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


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
