"""The answer of docs/does_memory_help.md, as numbers: its table and its figure.

    python docs/answer.py [--figure FILE]

Prints the table, and draws the figure. Each line is the difference between two arms of a study in
results/, paired by seed.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

from matplotlib.figure import Figure

from aim_flax import files, markdown
from aim_flax.plots import in_points, set_title
from aim_flax.statistics import Comparison, compare, p_value
from aim_flax.study.power import smallest_difference
from aim_flax.study.results import accuracies_by_arm, read_recorded
from aim_flax.study.table import interval

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "answer.png"


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that are compared.

    Attributes:
      network: of what, trained how, as the page calls it.
      file: of its runs, in results/.
      place: where the study is described, a link from the page.
    """

    network: str
    file: str
    place: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A difference: what it is of, and the two arms."""

    study: Study
    difference: str
    arm: str
    reference: str

    @property
    def comparison(self) -> Comparison:
        return _compared(self.study.file, self.reference)[self.arm]


@functools.cache
def _compared(file: str, reference: str) -> dict[str, Comparison]:
    runs = read_recorded(ROOT / "results" / f"{file}.csv")
    return compare(accuracies_by_arm(runs), reference)


_SMALL = Study(
    "small ResNet, CIFAR-10",
    "small_resnet_cifar10",
    "#a-small-resnet-on-cifar-10-resolution-and-a-bias-by-position",
)
_FAST = Study(
    "small ResNet, CIFAR-10", "fast", "predictions.md#a-third-explanation-a-memory-that-learns-fast"
)
_CURVES = Study("small ResNet, CIFAR-10", "curves", "#with-more-images-and-more-epochs-less")
_STRONG = Study(
    "better ResNet, CIFAR-10",
    "strong_resnet",
    "predictions.md#a-sixth-nothing-is-left-in-a-better-network",
)
_PHOTOS = Study(
    "small ResNet, groceries", "small_resnet_grocery", "#photographs-of-groceries-the-same"
)
_TUNED = Study(
    "EfficientNet, CIFAR-10",
    "pretrained_cifar10",
    "#efficientnet-lite0-on-cifar-10-nothing-but-for-a-frozen-backbone",
)
_TUNED_PHOTOS = Study(
    "EfficientNet, groceries", "pretrained_grocery", "../README.md#your-own-photographs"
)
_SEARCHED = Study("EfficientNet, groceries", "confirm_grocery", "search.md#on-the-photographs")
_SEARCHED_AGAIN = Study("EfficientNet, CIFAR-10", "confirm_cifar10", "search.md#on-cifar-10")
_RATES = Study(
    "EfficientNet, groceries",
    "kernels",
    "predictions.md#a-fifth-low-rank-changes-make-kernels-learn-faster",
)
_FAST_FORMS = Study(
    "EfficientNet, groceries",
    "fast_forms_again",
    "predictions.md#a-ninth-the-same-with-seeds-enough-to-see-a-gain",
)
_FROZEN = Study(
    "frozen EfficientNet, CIFAR-10",
    "adapters",
    "predictions.md#a-fourth-a-memory-as-an-adapter-of-a-frozen-network",
)
_FROZEN_PHOTOS = Study(
    "frozen EfficientNet, groceries",
    "adapters_grocery",
    "predictions.md#the-same-on-photographs-and-what-kind-of-bias-it-is",
)
_APART = Study(
    "small ResNet, CIFAR-10",
    "apart",
    "predictions.md#a-seventh-one-memory-or-one-for-each-stage",
)
_DIGITS = Study("MLP, digits", "digits_mlp", "#handwritten-digits-an-mlp-no")
_DIGITS_HEAD = Study("MLP, digits", "digits_head", "#a-search-for-one-that-helps")

CLAIMS = (
    Claim(_SMALL, "twice the resolution, without memory", "control_stride1", "control"),
    Claim(_SMALL, "memory as published", "published", "control_stride1"),
    Claim(_PHOTOS, "memory as published", "published", "control_stride1"),
    Claim(_SMALL, "memory, against as many parameters", "published", "control_params"),
    Claim(_FAST, "fast bias by position, against memory", "bias_fast", "published_no_update"),
    Claim(_SMALL, "writing in it, as published", "published", "published_no_update"),
    Claim(_SMALL, "writing, all blocks read it", "aim", "aim_no_update"),
    Claim(_APART, "one memory, against one for each stage", "aim", "apart"),
    Claim(_CURVES, "memory, 1,000 images", "published_1000x10", "control_stride1_1000x10"),
    Claim(_CURVES, "memory, 20,000 images", "published_20000x10", "control_stride1_20000x10"),
    Claim(_CURVES, "memory, 49,000 images", "published_49000x10", "control_stride1_49000x10"),
    Claim(
        _CURVES,
        "as many parameters, 49,000 images",
        "control_params_49000x10",
        "control_stride1_49000x10",
    ),
    Claim(_STRONG, "unwritten memory, 45,000 images", "no_update", "control_stride1"),
    Claim(_STRONG, "memory, 45,000 images", "memory", "control_stride1"),
    Claim(_TUNED, "memory, fine-tuned", "aim", "control"),
    Claim(_TUNED_PHOTOS, "memory, fine-tuned", "aim", "control"),
    Claim(_SEARCHED, "best form of a search, fine-tuned", "attend_erase_add", "control"),
    Claim(_SEARCHED, "second best form, fine-tuned", "large", "control"),
    Claim(_SEARCHED_AGAIN, "best form of a search, fine-tuned", "attend_erase_add", "control"),
    Claim(_SEARCHED_AGAIN, "second best form, fine-tuned", "large", "control"),
    Claim(_RATES, "three times the learning rate, without memory", "fast", "control"),
    Claim(_FAST_FORMS, "best form of a search, at that rate", "attend_erase_add", "control"),
    Claim(_FROZEN, "memory", "aim", "control"),
    Claim(_FROZEN, "writing in it", "aim", "no_update"),
    Claim(_FROZEN_PHOTOS, "memory", "aim", "control"),
    Claim(_FROZEN_PHOTOS, "bias for each channel, against memory", "flat", "aim"),
    Claim(_FROZEN_PHOTOS, "low-rank change of kernels, against memory", "low_rank", "aim"),
    Claim(_DIGITS, "memory", "aim", "control"),
    Claim(_DIGITS_HEAD, "memory, only the last layer reads it", "head_only", "control"),
)


def table() -> str:
    """Returns the table, a row for each claim."""
    rows = [
        [
            "difference",
            "network and images",
            "arms",
            "seeds",
            "points (95 % interval)",
            "p",
            "would show",
        ]
    ]
    for claim in CLAIMS:
        found = claim.comparison
        rows.append(
            [
                claim.difference,
                f"[{claim.study.network}]({claim.study.place})",
                f"`{claim.arm}` − `{claim.reference}`",
                str(found.summary.n),
                interval(found.summary),
                p_value(found.p),
                f"{100 * smallest_difference(found):.1f}",
            ]
        )
    return markdown.table(rows, left=3)


def draw(path: Path) -> None:
    """Draws each difference with its interval, grouped by network."""
    figure = Figure(figsize=(9, 0.34 * len(CLAIMS) + 1.2), layout="constrained")
    axis = figure.subplots()
    means, bars = in_points(claim.comparison.summary for claim in CLAIMS)
    axis.errorbar(means, range(len(CLAIMS)), xerr=bars, fmt="o", capsize=3, color="C0")
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(
        range(len(CLAIMS)),
        [f"{claim.study.network}: {claim.difference}" for claim in CLAIMS],
    )
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.set_xlabel("percentage points")
    set_title(figure, "Differences in test accuracy, same seed: mean and 95 % interval")
    files.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=FIGURE)
    given = parser.parse_args()
    print(table())
    draw(given.figure)


if __name__ == "__main__":
    main()
