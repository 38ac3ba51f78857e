"""The gain of a memory against how long a small ResNet is trained, and on how many images.

    python docs/curves.py [--csv FILE] [--figure FILE]

Prints the tables of docs/does_memory_help.md and draws its figure. Arms of the study are named
NAME_IMAGESxEPOCHS; each is compared with a control of the same images, epochs and seed.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aim_flax import files, markdown
from aim_flax.plots import in_points, set_title
from aim_flax.statistics import Comparison, compare, summarize
from aim_flax.study.power import smallest_difference
from aim_flax.study.results import accuracies_by_arm, read_recorded
from aim_flax.study.table import interval

ROOT = Path(__file__).parents[1]
CSV, FIGURE = ROOT / "results" / "curves.csv", ROOT / "docs" / "curves.png"
# The plain network, and the wider one that has as many parameters as that with a memory.
PLAIN, WIDER = "control_stride1", "control_params"
# Of the training that most studies of the page have.
EPOCHS = 10
_ARM = re.compile(r"(?P<name>\w+)_(?P<images>\d+)x(?P<epochs>\d+)")

# So many images and epochs.
Training = tuple[int, int]
# By training, arm and seed.
Accuracies = Mapping[Training, Mapping[str, Mapping[int, float]]]
# By arm and training.
Gains = Mapping[str, Mapping[Training, Comparison]]


def read(file: Path) -> Accuracies:
    """Returns the test accuracies of each arm by seed, for each training, from the least."""
    found: dict[Training, dict[str, Mapping[int, float]]] = {}
    for arm, accuracies in accuracies_by_arm(read_recorded(file)).items():
        named = _ARM.fullmatch(arm)
        training = int(named["images"]), int(named["epochs"])
        found.setdefault(training, {})[named["name"]] = accuracies
    return dict(sorted(found.items()))


def gains(accuracies: Accuracies, reference: str) -> Gains:
    """Returns the gain over a control, of each arm but the plain network."""
    found: dict[str, dict[Training, Comparison]] = {}
    for training, arms in accuracies.items():
        for arm, comparison in compare(arms, reference).items():
            if arm != PLAIN:
                found.setdefault(arm, {})[training] = comparison
    return found


def table(accuracies: Accuracies, reference: str) -> str:
    """Returns the table: a row for each training, with a column for each arm's gain."""
    found = gains(accuracies, reference)
    lines = [["images", "epochs", "seeds", f"`{reference}`, %", *(f"`{arm}`" for arm in found)]]
    for training, arms in accuracies.items():
        control = summarize(list(arms[reference].values()))
        cells = [interval(of_arm[training].summary) for of_arm in found.values()]
        counts = [f"{training[0]:,}", str(training[1]), str(control.n)]
        lines.append([*counts, f"{100 * control.mean:.1f}", *cells])
    return markdown.table(lines, left=0)


def shows(accuracies: Accuracies, reference: str) -> str:
    """Returns a sentence with the gains that the seeds show, for arms and trainings."""
    of_arms = gains(accuracies, reference).values()
    least = [smallest_difference(found) for of_arm in of_arms for found in of_arm.values()]
    known = [100 * gain for gain in least if gain is not None]
    return (
        f"With a chance of 80 % gains over `{reference}` of {min(known):.1f} to"
        f" {max(known):.1f} points show, by arm and training."
    )


def draw(accuracies: Accuracies, path: Path) -> None:
    """Draws the gains against epochs, and against images, each with its 95 % interval.

    Above over the plain network, below over the wider one. Against epochs for each number of images
    that was trained for several.
    """
    columns = epochs_by_images(accuracies)
    figure = Figure(figsize=(4.5 * (len(columns) + 1), 7), layout="constrained")
    panels = figure.subplots(2, len(columns) + 1, sharey=True, sharex="col", squeeze=False)
    colours = {arm: f"C{number}" for number, arm in enumerate(gains(accuracies, PLAIN))}
    for row, reference in zip(panels, (PLAIN, WIDER), strict=True):
        *epochs, images = row
        for arm, of_arm in gains(accuracies, reference).items():
            # Side by side, or intervals would hide each other.
            shift = 1.04 ** (list(colours).index(arm) - (len(colours) - 1) / 2)
            style = {"label": arm, "color": colours[arm], "marker": "o", "capsize": 3}
            lines = [{e: of_arm[n, e] for e in trained} for n, trained in columns.items()]
            lines.append({n: found for (n, e), found in of_arm.items() if e == EPOCHS})
            for axis, line in zip(row, lines, strict=True):
                means, bars = in_points(found.summary for found in line.values())
                axis.errorbar([x * shift for x in line], means, yerr=bars, **style)
        row[0].set_ylabel(f"test accuracy − that of {reference},\nsame seed (percentage points)")
    for axis, (n, trained) in zip(epochs, columns.items(), strict=True):
        _set_up(axis, f"epochs, of {n:,} images", trained)
    _set_up(images, f"training images, {EPOCHS} epochs", [n for n, e in accuracies if e == EPOCHS])
    for axis in panels.flat:
        axis.axhline(0, color="grey", linewidth=1)
    named = panels[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=len(colours))
    set_title(figure, "Gain of a small ResNet on CIFAR-10: mean and 95 % interval")
    files.save_figure(figure, path)


def epochs_by_images(accuracies: Accuracies) -> dict[int, list[int]]:
    """Returns the numbers of epochs for each number of images that was trained for several."""
    found: dict[int, list[int]] = {}
    for images, epochs in accuracies:
        found.setdefault(images, []).append(epochs)
    return {images: epochs for images, epochs in found.items() if len(epochs) > 1}


def _set_up(axis: Axes, label: str, ticks: Sequence[int]) -> None:
    """Makes the horizontal axis of a column, which its panels share, logarithmic."""
    axis.set_xlabel(label)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axis.minorticks_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    given = parser.parse_args()
    accuracies = read(given.csv)
    for reference in (PLAIN, WIDER):
        print(table(accuracies, reference), shows(accuracies, reference), sep="\n\n", end="\n\n")
    draw(accuracies, given.figure)


if __name__ == "__main__":
    main()
