"""Plots of a run.

Imported when something is drawn: matplotlib takes half a second to import.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from aim_flax.files import save_figure
from aim_flax.plots import marker, set_epochs, set_title, short
from aim_flax.train.report import History


def plot_history(
    path: Path,
    history: History,
    title: str,
    cuts: Sequence[int] = (),
    best_step: int | None = None,
) -> None:
    """Plots accuracy and loss by epoch and, where it changes, the learning rate.

    Args:
      cuts: the epochs after which plateaus cut the learning rate; each is a dotted line.
      best_step: the last step of the epoch that was chosen, which is marked; None: none is.
    """
    epochs = [row["epoch"] for row in history]
    rates = [row["learning_rate"] for row in history]
    best = [row for row in history if row["step"] == best_step]
    panels = ["accuracy", "loss"] + ["learning rate"] * (len(set(rates)) > 1)
    figure = Figure(figsize=(1 + 5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, what in zip(axes, panels, strict=True):
        if what == "learning rate":
            style = "steps-mid" if cuts else "default"
            color = "tab:green"
            axis.plot(epochs, rates, marker=marker(len(epochs)), drawstyle=style, color=color)
            # A cosine's end is next to 0; cuts are by factors.
            axis.set_yscale("log" if cuts else "linear")
        else:
            for split, label in (("train", "training"), ("val", "validation")):
                values = [row[f"{split}_{what}"] for row in history]
                axis.plot(epochs, values, marker=marker(len(epochs)), label=label)
            for row in best:
                place = [row["epoch"]], [row[f"val_{what}"]]
                axis.plot(*place, "o", color="black", fillstyle="none", label="chosen epoch")
            axis.legend()
        for epoch in cuts:
            axis.axvline(epoch + 0.5, color="grey", linestyle=":", linewidth=1)
        axis.set_ylabel(f"{what} (at the end of an epoch)" if what == "learning rate" else what)
        set_epochs(axis, epochs[0], epochs[-1])
    set_title(figure, title)
    save_figure(figure, path)


def plot_memory_use(path: Path, history: History, title: str, step: int | None = None) -> None:
    """Plots the memory's share of each layer that reads it, and the change by each update.

    A bar per layer for one epoch, in the order of the history, and a line in the same colour over
    all epochs. The axes are logarithmic, because layers differ by factors, and bars start at 1,
    where both are equal. A layer whose own output is 0 has neither, nor has one without a share.

    Args:
      step: the last step of the bars' epoch, for example the best checkpoint's; None: the last.
    """
    row = history[-1] if step is None else next(r for r in history if r["step"] == step)
    titles = {
        "read": "What the memory adds to a layer, in multiples of the layer's own output",
        "update": "How much an update changes the memory, in multiples of what it held",
    }
    layers = {
        kind: [layer for layer in row["memory_use"] if layer.startswith(f"{kind} ")]
        for kind in titles
    }
    layers = {kind: of_kind for kind, of_kind in layers.items() if of_kind}
    heights = [1.2 + max(1.0, 0.2 * len(of_kind)) for of_kind in layers.values()]
    figure = Figure(figsize=(11, 0.6 + sum(heights)), layout="constrained")
    rows = figure.subfigures(len(layers), 1, squeeze=False, height_ratios=heights)[:, 0]
    epochs = [r["epoch"] for r in history]
    for part, (kind, of_kind) in zip(rows, layers.items(), strict=True):
        bars, lines = part.subplots(1, 2)
        part.suptitle(titles[kind], fontsize=10)
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(of_kind)))
        curves = [[_ratio(r["memory_use"][layer]) for r in history] for layer in of_kind]
        for place, (layer, color, curve) in enumerate(zip(of_kind, colors, curves, strict=True)):
            _draw_bar(bars, place, row["memory_use"][layer], color)
            drawn = np.where(np.array(curve) > 0, curve, np.nan)
            lines.plot(epochs, drawn, color=color, marker=marker(len(epochs)))
        names = short([layer.removeprefix(f"{kind} ") for layer in of_kind], 40)
        bars.set_yticks(range(len(of_kind)), names, fontsize=8)
        bars.set(xlabel=f"multiple, of L2 norms, after epoch {row['epoch']}", xscale="log")
        bars.set_ylim(len(of_kind) - 0.5, -0.5)
        bars.axvline(1, color="black", linewidth=0.8)
        lines.axvline(row["epoch"], color="grey", linestyle=":", linewidth=1)
        lines.set(ylabel="multiple", yscale="log")
        set_epochs(lines, epochs[0], epochs[-1])
        positive = [ratio for curve in curves for ratio in curve if ratio > 0]
        low, high = min([0.5, *positive]), max([2.0, *positive])
        # Room for the numbers beside the bars.
        bars.set_xlim(low / (high / low) ** 0.2, high * (high / low) ** 0.2)
        lines.set_ylim(low / 1.2, high * 1.2)
        for axis in (bars.xaxis, lines.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(NullLocator())
    set_title(figure, title)
    save_figure(figure, path)


def _draw_bar(axis: Axes, place: int, norms: dict[str, float], color: Any) -> None:
    """Draws a layer's ratio as a bar from 1, with its number, or says why there is none."""
    ratio = _ratio(norms)
    text = dict(va="center", fontsize=8)
    if not ratio > 0:
        why = "no multiple: its own norm is 0" if np.isnan(ratio) else "0"
        text |= dict(transform=axis.get_yaxis_transform(), bbox=dict(fc="white", ec="none", pad=1))
        axis.text(0.02, place, why, **text)
        return
    axis.barh(place, ratio - 1, left=1, color=color)
    side = dict(ha="left", xytext=(3, 0)) if ratio >= 1 else dict(ha="right", xytext=(-3, 0))
    axis.annotate(f"{ratio:.2g}", (ratio, place), textcoords="offset points", **side, **text)


def _ratio(norms: dict[str, float]) -> float:
    return norms["share"] / norms["own"] if norms["own"] else np.nan
