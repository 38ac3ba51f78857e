"""The gain of a memory against how long a small ResNet is trained, and on how many images.

    python docs/curves.py [--csv FILE] [--figure FILE]

Prints the tables of docs/does_memory_help.md and draws its figure. Arms of the study are named
NAME_IMAGESxEPOCHS; each is compared with a control of the same images, epochs and seed.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aim_flax import files, markdown
from aim_flax.plots import set_title
from aim_flax.statistics import Summary, compare, summarize
from aim_flax.study.results import accuracies_by_arm, read_recorded
from aim_flax.study.table import interval

ROOT = Path(__file__).parents[1]
CSV, FIGURE = ROOT / "results" / "curves.csv", ROOT / "docs" / "curves.png"
# The plain network, and the wider one that has as many parameters as that with a memory.
PLAIN, WIDER = "control_stride1", "control_params"
# The training that most studies of the page have.
IMAGES, EPOCHS = 5000, 10
_ARM = re.compile(r"(?P<name>\w+)_(?P<images>\d+)x(?P<epochs>\d+)")

# So many images and epochs.
Training = tuple[int, int]
Accuracies = Mapping[int, float]


def read(file: Path) -> dict[Training, dict[str, Accuracies]]:
    """Returns the test accuracies of each arm by seed, for each training, from the least."""
    found: dict[Training, dict[str, Accuracies]] = {}
    for arm, accuracies in accuracies_by_arm(read_recorded(file)).items():
        named = _ARM.fullmatch(arm)
        training = int(named["images"]), int(named["epochs"])
        found.setdefault(training, {})[named["name"]] = accuracies
    return dict(sorted(found.items()))


def gains(
    accuracies: Mapping[Training, Mapping[str, Accuracies]], reference: str
) -> dict[str, dict[Training, Summary]]:
    """Returns the gain over a control, of each arm but the plain network."""
    found: dict[str, dict[Training, Summary]] = {}
    for training, arms in accuracies.items():
        for arm, comparison in compare(arms, reference).items():
            if arm != PLAIN:
                found.setdefault(arm, {})[training] = comparison.summary
    return found


def table(accuracies: Mapping[Training, Mapping[str, Accuracies]], reference: str) -> str:
    """Returns the table: a row for each training, with a column for each arm's gain."""
    found = gains(accuracies, reference)
    lines = [["images", "epochs", "seeds", f"`{reference}`, %", *(f"`{arm}`" for arm in found)]]
    for training, arms in accuracies.items():
        control = summarize(list(arms[reference].values()))
        cells = [interval(of_arm[training]) for of_arm in found.values()]
        counts = [f"{training[0]:,}", str(training[1]), str(control.n)]
        lines.append([*counts, f"{100 * control.mean:.1f}", *cells])
    return markdown.table(lines, left=0)


def draw(accuracies: Mapping[Training, Mapping[str, Accuracies]], path: Path) -> None:
    """Draws the gains against epochs, and against images, each with its 95 % interval.

    Above over the plain network, below over the wider one.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    arms = list(gains(accuracies, PLAIN))
    for (epochs, images), reference in zip(
        figure.subplots(2, 2, sharey=True, sharex="col"), (PLAIN, WIDER), strict=True
    ):
        for arm, of_arm in gains(accuracies, reference).items():
            number = arms.index(arm)
            # Side by side, or intervals would hide each other.
            shift = 1.04 ** (number - (len(arms) - 1) / 2)
            for axis, fixed, place in ((epochs, IMAGES, 0), (images, EPOCHS, 1)):
                line = {t[1 - place]: gain for t, gain in of_arm.items() if t[place] == fixed}
                _plot(axis, line, shift, arm, f"C{number}")
        epochs.set_ylabel(f"test accuracy − that of {reference},\nsame seed (percentage points)")
    epochs.set_xlabel(f"epochs, of {IMAGES:,} images")
    images.set_xlabel(f"training images, {EPOCHS} epochs")
    figure.axes[0].legend()
    set_title(figure, "Gain of a small ResNet on CIFAR-10: mean and 95 % interval")
    files.save_figure(figure, path)


def _plot(axis: Axes, line: Mapping[int, Summary], shift: float, label: str, colour: str) -> None:
    ends = [[100 * (s.mean - s.low), 100 * (s.high - s.mean)] for s in line.values()]
    axis.errorbar(
        [x * shift for x in line],
        [100 * s.mean for s in line.values()],
        yerr=list(zip(*ends, strict=True)),
        marker="o",
        capsize=3,
        label=label,
        color=colour,
    )
    axis.axhline(0, color="grey", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks(list(line), [f"{x:,}" for x in line], minor=False)
    axis.minorticks_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    given = parser.parse_args()
    accuracies = read(given.csv)
    print(*(table(accuracies, reference) for reference in (PLAIN, WIDER)), sep="\n\n")
    draw(accuracies, given.figure)


if __name__ == "__main__":
    main()
