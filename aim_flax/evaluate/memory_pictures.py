"""What is in a trained notebook, for people to look at.

Three pictures: what was learned, what single images write beside it, and how far what is written
differs between classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from aim_flax.data.dataset import EvalBatches
from aim_flax.devices import AXIS, Devices
from aim_flax.files import save_figure, write_json
from aim_flax.latch import AiM
from aim_flax.plots import class_matrix, plain, set_title, short

MOST_IMAGES = 512
MOST_CHANNELS, CHANNELS_IN_A_LINE = 16, 8
SHOWN_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Notebooks:
    """The memory of some images.

    Attributes:
      learned: {name: content at the start of a pass}, each (..., D), the same for all images.
      images: (N, H, W, C) float32.
      labels: (N,) int.
      written: {name: what that memory held after its last update}, each (N, ..., D); empty without
        updates.
    """

    learned: dict[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    written: dict[str, np.ndarray]

    def contents(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what was written, (N, ..., D), and what was there at the start, (..., D); the
        channels of several memories follow each other."""
        start = [self.learned[name] for name in self.written]
        return np.concatenate([*self.written.values()], axis=-1), np.concatenate(start, axis=-1)


def collect(
    model: AiM, devices: Devices, batches: EvalBatches, variables: Any, seed: int
) -> Notebooks:
    """Returns the memory of the first images of a split, at most MOST_IMAGES.

    Args:
      model: a latched network.
      variables: replicated.
      seed: of the run, see `EvalBatches.on_device`.
    """
    capturing = model.clone(capture=True)

    def on_device(variables, data, seed):
        images, labels, counted, _ = batches.on_device(data, seed)
        last: dict[str, str] = {}  # where each memory is last updated

        def watch(place: Any) -> None:
            if place.what == "update":
                last[place.memory] = place.path

        watching = capturing.clone(watch=watch)
        _, seen = watching.apply(variables, images, train=False, mutable=["intermediates"])
        flat = flatten_dict(seen["intermediates"], sep="/")
        # Each a memory or, with `AiM.per`, a dict of those of the parts.
        at_start = {
            name.removesuffix("_at_start"): values[0]
            for name, values in flat.items()
            if name.endswith("_at_start")
        }
        learned = {name: m[0] for name, m in flatten_dict(at_start, sep="/").items()}
        written = {
            memory: flat[f"{path}/{model.called}_as_written"][-1] for memory, path in last.items()
        }
        of_images = {"images": images, "labels": labels, "counted": counted, "written": written}
        return learned, jax.lax.all_gather(of_images, AXIS, tiled=True)

    run = devices.map(on_device, sharded=(1,) if batches.sharded else ())
    seed = devices.replicate(np.uint32(seed))
    parts: list[dict[str, Any]] = []
    for data in batches:
        learned, part = devices.fetch(run(variables, data, seed))
        counted = part.pop("counted")
        parts.append(jax.tree.map(lambda array, counted=counted: array[counted], part))
        if sum(len(part["labels"]) for part in parts) >= MOST_IMAGES:
            break
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:MOST_IMAGES], *parts)
    return Notebooks(learned, **whole)


def write(
    folder: Path,
    name: str,
    notebooks: Notebooks,
    classes: Sequence[str],
    context: dict[str, Any],
    title: str,
) -> list[str]:
    """Writes the pictures, and the numbers of the third as JSON; returns the names of the files.

    Args:
      name: of the images, which is in the names of the files.
      context: of the evaluation, `split` among it, which comes first in the JSON file.
      title: of the plots.
    """
    names = ["memory_learned.png"]
    plot_learned(folder / names[0], notebooks.learned, title)
    if not notebooks.written:
        return names
    names += [f"memory_written_{name}.png", f"memory_classes_{name}.png"]
    plot_written(folder / names[1], notebooks, classes, title)
    written, _ = notebooks.contents()
    distances = class_distances(written, notebooks.labels, len(classes))
    plot_classes(folder / names[2], distances, classes, title)
    numbers = [[None if np.isnan(d) else float(d) for d in row] for row in distances]
    images = len(notebooks.labels)
    result = {**context, "images": images, "classes": list(classes), "distances": numbers}
    names.append(f"memory_classes_{name}.json")
    write_json(folder / names[3], result)
    return names


def class_distances(written: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns how far classes' mean memories are from each other, (classes, classes).

    In units of what images of one class differ by: the root mean square distance of an image's
    memory from its class's mean. 0: no difference. NaN where a class has no image.

    Args:
      written: (N, ...), the memory of each image.
      labels: (N,) int.
    """
    flat = written.reshape(len(written), -1).astype(np.float64)
    means = np.full((classes, flat.shape[1]), np.nan)
    for label in np.unique(labels):
        means[label] = flat[labels == label].mean(axis=0)
    within = np.sqrt(((flat - means[labels]) ** 2).sum(axis=1).mean())
    between = np.sqrt(((means[:, None] - means[None]) ** 2).sum(axis=-1))
    return between / within if within > 0 else between


def as_map(content: np.ndarray) -> np.ndarray:
    """Returns a memory (..., D) as maps, (rows, columns, number of maps).

    Of images' memories (R, K, D) a map for each channel; otherwise one map: of a vector, folded to
    lines of nearly equal number and length, and of slots (S, D), or any others, a row for each.
    """
    if content.ndim == 3:
        return content
    if content.ndim == 1:
        rows = next(n for n in range(math.isqrt(len(content)), 0, -1) if len(content) % n == 0)
        content = content.reshape(rows, -1)
    return content.reshape(-1, content.shape[-1])[..., None]


def plot_learned(path: Path, learned: dict[str, np.ndarray], title: str) -> None:
    """Plots the learned content of each memory: the channels that differ most between positions."""
    rows = []
    for name, content in learned.items():
        maps = as_map(content)
        order = np.argsort(-maps.std(axis=(0, 1)), kind="stable")[:MOST_CHANNELS]
        label = f"{name}: what was learned"
        if maps.shape[-1] > 1 and np.allclose(maps, maps[:1, :1]):  # A vector says all.
            maps, order = as_map(maps[0, 0]), np.array([0])
            label += ", the same at every position"
        elif len(order) < maps.shape[-1]:
            label += f", the {len(order)} of {maps.shape[-1]} channels that differ most"
        rows.append((label, maps, order))
    lines = [math.ceil(len(order) / CHANNELS_IN_A_LINE) for _, _, order in rows]
    heights = [0.8 + 1.6 * n for n in lines]
    columns = min(max(len(order) for _, _, order in rows), CHANNELS_IN_A_LINE)
    size = (max(1.2 * columns + 1, 4.5), sum(heights) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (label, maps, order), height in zip(parts, rows, lines, strict=True):
        most = float(np.abs(maps).max()) or 1.0
        axes = part.subplots(height, min(len(order), CHANNELS_IN_A_LINE), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, channel in zip(axes.flat, order, strict=False):
            drawn = axis.imshow(maps[..., channel], cmap="RdBu_r", vmin=-most, vmax=most)
            axis.set_title(f"channel {channel}" if len(order) > 1 else "", fontsize=7)
        part.colorbar(drawn, ax=list(axes.flat))
        part.suptitle(plain(label), fontsize=10)
    set_title(figure, title)
    save_figure(figure, path)


def plot_written(path: Path, notebooks: Notebooks, classes: Sequence[str], title: str) -> None:
    """Plots images; below each how it changed the memory, and what that has of its own.

    The change from the learned memory, and the difference from what images write on average; over
    channels the root of the mean square: where the image wrote much.
    """
    (written, start), names = notebooks.contents(), short(classes, 20)
    shown = first_of_classes(notebooks.labels, SHOWN_IMAGES)
    rows = {
        "what it changes in\nthe learned memory": written[shown] - start,
        "beyond what images\nchange on average": written[shown] - written.mean(axis=0),
    }
    figure = Figure(figsize=(1.6 * len(shown) + 3, 6), layout="constrained")
    columns = dict(ncols=1 + len(shown), width_ratios=[0.9] + [1] * len(shown))
    axes = figure.subplots(1 + len(rows), squeeze=False, **columns)
    for axis in axes.ravel():
        axis.set_axis_off()
    for axis, what in zip(axes[:, 0], ("the image", *rows), strict=True):
        axis.text(1, 0.5, what, ha="right", va="center", fontsize=8)
    axes = axes[:, 1:]
    for axis, i in zip(axes[0], shown, strict=True):
        axis.imshow(_visible(notebooks.images[i]), cmap="gray")
        axis.set_title(names[notebooks.labels[i]], fontsize=8)
    for line, contents in zip(axes[1:], rows.values(), strict=True):
        maps = [as_map(content) for content in contents]
        signed = maps[0].shape[-1] == 1
        maps = [m[..., 0] if signed else np.sqrt((m**2).mean(axis=-1)) for m in maps]
        most = float(np.abs(maps).max()) or 1.0
        low, colors = (-most, "RdBu_r") if signed else (0, "viridis")
        for axis, drawn in zip(line, maps, strict=True):
            image = axis.imshow(drawn, cmap=colors, vmin=low, vmax=most)
        label = "floats" if signed else "root mean square\nover channels"
        figure.colorbar(image, ax=list(line), label=label)
    set_title(figure, title)
    save_figure(figure, path)


def plot_classes(path: Path, distances: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Plots the matrix of `class_distances`."""
    figure, axis = class_matrix(classes)
    image = axis.imshow(distances, vmin=0, cmap="viridis")
    figure.colorbar(image, label="distance of the classes' mean memories / spread within a class")
    set_title(figure, title)
    save_figure(figure, path)


def first_of_classes(labels: np.ndarray, count: int) -> list[int]:
    """Returns the first image of each class, then the second of each, and so on, `count` in all."""
    order = np.argsort(labels, kind="stable")
    nth = np.empty(len(labels), int)
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    nth[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return sorted(range(len(labels)), key=lambda i: (nth[i], labels[i]))[:count]


def _visible(image: np.ndarray) -> np.ndarray:
    """Returns an image scaled to 0 and 1, of one or three channels."""
    low, high = image.min(), image.max()
    image = (image - low) / (high - low if high > low else 1)
    return image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
