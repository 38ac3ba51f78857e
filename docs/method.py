"""Draws docs/method.svg, the picture of the method at the top of README.

python docs/method.py
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import patches
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline

FILE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 830, 486  # CSS pixels: the width of a page on GitHub

# A colour has one meaning: a light one for areas, a strong one for lines and words.
INK, PAPER, FRAME = "#1f2733", "#ffffff", "#d3dae3"
NETWORK, NETWORK_LIGHT = "#56637a", "#f2f4f7"
MEMORY, MEMORY_LIGHT = "#1f6fb5", "#eaf3fb"  # the memory, and reading it
WRITING, WRITING_LIGHT = "#c2560c", "#fdeee0"
CARRY, CARRY_LIGHT = "#7a3fa8", "#f6f0fa"

LAYERS = (206, 413, 620)  # the centres of the layers, and of the memory below each
UPDATES = (309.5, 516.5)
LOSS, NEXT = 752, 122
NETWORK_Y, BETWEEN_Y, MEMORY_Y, STATE_Y, WEIGHTS_Y = 90, 167, 266, 412, 454
LAYER_HALF, PAGE_HALF = 26, 36
BEHIND = 5  # how far the next page of a pile sticks out


class Picture:
    """A drawing in CSS pixels, from the top left corner."""

    def __init__(self, width: int, height: int):
        self.figure = Figure(figsize=(width / 96, height / 96), facecolor="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def box(self, x, y, width, height, face, edge="none", radius=8, line=1.3, order=2):
        """A box with round corners, from its centre."""
        self.axes.add_patch(
            patches.FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle=f"round,pad=0,rounding_size={radius}",
                facecolor=face,
                edgecolor=edge,
                linewidth=0.75 * line,
                zorder=order,
            )
        )

    def text(
        self, x, y, text, color=INK, size=12.5, weight="normal", align="center", level="center"
    ):
        self.axes.text(
            x,
            y,
            text,
            color=color,
            fontsize=0.75 * size,
            fontweight=weight,
            ha=align,
            va=level,
            linespacing=1.3,
            zorder=6,
        )

    def words(self, x, y, bold, plain, color):
        """Bold words from x on, and plain ones on the same line."""
        self.text(x, y, bold, color, weight="bold", align="left", level="baseline")
        first = self.axes.texts[-1]
        self.axes.annotate(
            plain,
            (1, y),
            (6, 0),
            xycoords=(first, "data"),
            textcoords="offset points",
            color=color,
            fontsize=first.get_fontsize(),
            zorder=6,
        )

    def line(self, points, color, dashed=False, head=True, radius=10):
        """A line with round corners; with a head, its tip is at the last point."""
        points = [np.array(point, float) for point in points]
        if head:
            tip, way = points[-1], unit(points[-1] - points[-2])
            across = 4.5 * np.array([-way[1], way[0]])
            points[-1] = tip - 8 * way
            wings = [tip, points[-1] + across, points[-1] - across]
            self.axes.add_patch(patches.Polygon(wings, color=color, linewidth=0, zorder=5))
        vertices, codes = [points[0]], [Outline.MOVETO]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            start = corner + radius * unit(before - corner)
            end = corner + radius * unit(after - corner)
            vertices += [start, corner, end]
            codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
        outline = Outline([*vertices, points[-1]], [*codes, Outline.LINETO])
        self.axes.add_patch(
            patches.PathPatch(
                outline,
                facecolor="none",
                edgecolor=color,
                linewidth=0.75 * 1.8,
                linestyle=(0, (4, 2.2)) if dashed else "solid",
                capstyle="butt",
                zorder=4,
            )
        )

    def dot(self, x, y, color):
        self.axes.add_patch(patches.Circle((x, y), 3.6, color=color, linewidth=0, zorder=5))

    def page(self, x, y, seed, copies=1):
        """A page of the notebook, squares of its floats on it; behind it, pages of other images."""
        for back in reversed(range(copies)):
            self.box(
                x + BEHIND * back,
                y - BEHIND * back,
                2 * PAGE_HALF,
                2 * PAGE_HALF,
                PAPER,
                MEMORY,
                radius=5,
            )
        cells, size = 5, 11
        floats = np.random.default_rng(seed).uniform(size=(cells, cells))
        shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["#dcebf8", MEMORY])
        for (row, column), value in np.ndenumerate(floats):
            left, top = x + (column - cells / 2) * size, y + (row - cells / 2) * size
            self.axes.add_patch(
                patches.Rectangle(
                    (left + 0.75, top + 0.75),
                    size - 1.5,
                    size - 1.5,
                    color=shades(value),
                    linewidth=0,
                    zorder=4,
                )
            )


def unit(vector):
    return vector / np.hypot(*vector)


def draw() -> Figure:
    picture = Picture(WIDTH, HEIGHT)
    picture.box(WIDTH / 2, HEIGHT / 2, WIDTH - 2, HEIGHT - 2, PAPER, FRAME, radius=12, order=0)
    for top, bottom, face in (
        (14, 138, NETWORK_LIGHT),
        (196, 354, MEMORY_LIGHT),
        (368, HEIGHT - 14, CARRY_LIGHT),
    ):
        picture.box(WIDTH / 2, (top + bottom) / 2, WIDTH - 28, bottom - top, face, order=1)
    picture.words(30, 38, "The network", "plain Flax, knows nothing of the memory", NETWORK)
    picture.text(30, 216, "The memory", MEMORY, weight="bold", align="left")
    picture.text(30, 234, "a tensor of floats", MEMORY, align="left")
    picture.text(30, 420, "To the\nnext batch", CARRY, weight="bold", align="left")

    # The network, from left to right.
    for back in (2, 1, 0):
        picture.box(60 + BEHIND * back, NETWORK_Y - BEHIND * back, 60, 48, PAPER, NETWORK, radius=4)
    picture.text(60, NETWORK_Y, "images")
    for number, x in enumerate(LAYERS, start=1):
        picture.box(x, NETWORK_Y, 100, 2 * LAYER_HALF, PAPER, NETWORK)
        picture.text(x, NETWORK_Y, f"layer {number}")
    picture.box(LOSS, NETWORK_Y, 92, 2 * LAYER_HALF, PAPER, NETWORK)
    picture.text(LOSS, NETWORK_Y, "prediction\nand loss")
    ends = [100, *(x + side for x in LAYERS for side in (-50, 50)), LOSS - 46]
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        picture.line([(start, NETWORK_Y), (end, NETWORK_Y)], NETWORK)

    # The memory as each layer finds it, and what rewrites it in between.
    captions = (
        "learned, the same\nfor all images",
        "rewritten,\none for each image",
        "rewritten\nagain",
    )
    for x, copies, caption in zip(LAYERS, (1, 3, 3), captions, strict=True):
        picture.page(x, MEMORY_Y, seed=x, copies=copies)
        picture.text(x, 341, caption, MEMORY, size=11.5, level="baseline")
        top = MEMORY_Y - PAGE_HALF - BEHIND * (copies - 1)
        picture.line([(x, top), (x, NETWORK_Y + LAYER_HALF)], MEMORY)
        picture.text(x - 9, BETWEEN_Y, "read", MEMORY, weight="bold", align="right")
    for x, before, after in zip(
        UPDATES, (LAYERS[0], LAYERS[1] + 2 * BEHIND), LAYERS[1:], strict=True
    ):
        picture.box(x, MEMORY_Y, 76, 48, WRITING_LIGHT, WRITING)
        picture.text(x, MEMORY_Y, "update\nblock")
        picture.dot(x, NETWORK_Y, WRITING)
        picture.line([(x, NETWORK_Y), (x, MEMORY_Y - 24)], WRITING)
        picture.text(x + 9, BETWEEN_Y, "write", WRITING, weight="bold", align="left")
        picture.line([(before + PAGE_HALF, MEMORY_Y), (x - 38, MEMORY_Y)], MEMORY)
        picture.line([(x + 38, MEMORY_Y), (after - PAGE_HALF, MEMORY_Y)], WRITING)

    # What the next batch finds.
    end = (LAYERS[0] - PAGE_HALF, MEMORY_Y)
    down = [(LOSS, NETWORK_Y + LAYER_HALF), (LOSS, WEIGHTS_Y), (NEXT, WEIGHTS_Y)]
    picture.line([*down, (NEXT, MEMORY_Y), end], CARRY)
    start = LAYERS[-1] + PAGE_HALF + 2 * BEHIND
    down = [(start, MEMORY_Y), (start + 30, MEMORY_Y), (start + 30, STATE_Y), (NEXT, STATE_Y)]
    picture.line(down, CARRY, dashed=True, head=False)
    picture.dot(NEXT, STATE_Y, CARRY)
    x = LAYERS[0] - PAGE_HALF
    plain = "backpropagation changes the learned memory"
    picture.words(x, WEIGHTS_Y - 10, 'carry="weights"', plain, CARRY)
    plain = "adds a running mean of what was written"
    picture.words(x, STATE_Y - 10, 'carry="state"', plain, CARRY)
    return picture.figure


def main(file: Path = FILE) -> None:
    style = {"svg.fonttype": "path", "svg.hashsalt": "aim_flax", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        draw().savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
