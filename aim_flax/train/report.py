"""Tables, plots and TensorBoard events of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from aim_flax.files import save_figure, write_csv

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
    """TensorBoard events of a run from `step` on; later events of an earlier process are purged.

    A context manager; of several processes, the first one writes.
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
            # If its own output is 0 there is no ratio, and tensorboardX would warn of each NaN.
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

    A bar per layer for one epoch, in the order of the history, and a line in the same colour over
    all epochs. A layer whose own output is 0 has neither.

    Args:
      step: the last step of the bars' epoch, for example the best checkpoint's; None: the last.
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
