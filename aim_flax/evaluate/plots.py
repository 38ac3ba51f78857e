"""Plots of evaluations: the confusion of classes, and interventions layer by layer.

Imported when something is drawn: matplotlib takes half a second to import.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aim_flax.evaluate.effects import Effect
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.files import save_figure
from aim_flax.plots import class_matrix, set_title, short
from aim_flax.statistics import CONFIDENCE

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


def plot_effects(path: Path, single: Sequence[Effect], title: str) -> None:
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
