"""A run's page, report.html: what its workdir shows, in one file that needs nothing else.

It is made from the files of the workdir alone, so the same files always give the same page.
"""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aim_flax import files, html
from aim_flax.errors import UsageError
from aim_flax.evaluate.effects import Effect
from aim_flax.evaluate.mistakes import caption, tiles
from aim_flax.evaluate.report import class_cells, effects_cells
from aim_flax.files import read_json

# With more, the matrix would be wider than a page, and a list says more.
MOST_CLASSES = 20
_MOST_CONFUSIONS = 20
_MOST_OF_AN_ERROR = 120


def write_page(workdir: Path) -> None:
    """Writes report.html of a run, finished or not.

    Raises:
      UsageError: a file that it is made of is damaged.
    """
    files.write_text(workdir / "report.html", page(workdir))


def page(workdir: Path) -> str:
    """Returns what `write_page` writes."""
    with _reading(workdir / "config.json") as file:
        config = read_json(file)
        title = f"{config['name']}:{config['arm']}, seed {config['seed']}"
    parts = [*_result(workdir), *_figure(workdir, "history.png", "Accuracy and loss")]
    if (workdir / "metrics.csv").is_file():
        with _reading(workdir / "metrics.csv") as file, file.open(newline="") as lines:
            parts.append(html.details("Numbers by epoch", html.table(list(csv.reader(lines)), 0)))
    for split in ("test", "val", "train"):
        if (workdir / f"eval_{split}.json").is_file():
            with _reading(workdir / f"eval_{split}.json") as file:
                parts += _evaluation(workdir, split, read_json(file))
    parts += _memory(workdir)
    parts.append(html.heading("How it was made"))
    for name in ("config.json", "code_version.json"):
        if (workdir / name).is_file():
            with _reading(workdir / name) as file:
                parts.append(html.details(name, html.code(file.read_text())))
    return html.page(title, parts)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Yields a file of the run, and makes one line of what is wrong with it."""
    try:
        yield file
    except UsageError:
        raise
    except (AttributeError, LookupError, OSError, TypeError, ValueError, csv.Error) as error:
        what = f"{type(error).__name__}: {error}"[:_MOST_OF_AN_ERROR]
        raise UsageError(f"{file} is damaged, and no page can be made of it: {what}") from None


def _result(workdir: Path) -> list[str]:
    """Returns the numbers of the summary, or that there is none yet."""
    if not (workdir / "summary.json").is_file():
        return [html.paragraph("This run is not finished.")]
    with _reading(workdir / "summary.json") as file:
        return _numbers(files.read_mapping(file, (), "run's summary"))


def _numbers(summary: dict[str, Any]) -> list[str]:
    low, high = (f"{summary[f'test_accuracy_{end}']:.2%}" for end in ("low", "high"))
    on_test = summary["selected_on"] == "test"
    chosen = "test accuracy" if on_test else "validation accuracy"
    examples = f"{summary['test_examples']:,} images; 95 % interval {low} to {high}"
    cards = [("Test accuracy", f"{summary['test_accuracy']:.2%}", examples)]
    for key, name, note in (
        ("test_balanced_accuracy", "Balanced accuracy", "mean over the classes"),
        ("test_macro_f1", "Macro F1", "mean over the classes"),
    ):
        if key in summary:
            cards.append((name, f"{summary[key]:.2%}", note))
    epoch = summary["best_step"] * summary["epochs"] // summary["steps"]
    minutes = summary["train_seconds"] / 60
    cards += [
        ("Chosen epoch", f"{epoch} of {summary['epochs']}", f"by its {chosen}"),
        (f"{chosen.capitalize()} there", f"{summary['val_accuracy']:.2%}", ""),
        ("Parameters", f"{summary['params']:,}", f"and {summary['batch_stats']:,} statistics"),
        ("Training", f"{minutes:.1f} minutes", summary["device"]),
    ]
    parts = [html.numbers(cards)]
    if on_test:
        parts.append(
            html.paragraph(
                "The epoch was chosen on the test split itself, so the test accuracy is better than"
                " on new images."
            )
        )
    if summary["skipped_images"]:
        count = summary["skipped_images"]
        parts.append(html.paragraph(f"{count:,} images could not be read and were left out."))
    return parts


def _evaluation(workdir: Path, split: str, result: dict[str, Any]) -> list[str]:
    """Returns what the network gets wrong on a split."""
    names = [row["class"] for row in result["classes"]]
    confusion = np.array(result["confusion"])
    parts = [
        html.heading(f"What it gets right and wrong: {split} split"),
        html.paragraph(
            f"Accuracy {result['accuracy']:.2%} on {result['examples']:,} images, loss"
            f" {result['loss']:.4f}, after step {result['step']:,}."
        ),
    ]
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    if len(names) <= MOST_CLASSES:
        parts += [
            html.paragraph("Images by true class (rows) and predicted class (columns):"),
            html.matrix(names, shares.tolist(), confusion.tolist()),
        ]
    else:
        parts += _confusions(names, confusion, shares)
    classes = html.table(class_cells(result["classes"]))
    parts.append(html.details("Every class", classes))
    rows, sheet = result.get("mistakes", []), workdir / f"mistakes_{split}.png"
    if rows and sheet.is_file():
        try:
            images = zip(tiles(sheet.read_bytes(), len(rows)), map(caption, rows), strict=True)
        except (OSError, ValueError):  # Pillow's own is an OSError.
            return [*parts, html.paragraph(f"{sheet.name}, the images, is damaged.")]
        parts += [html.paragraph("Predicted wrongly, the surest first:"), html.gallery(images)]
    return parts


def _confusions(names: list[str], confusion: np.ndarray, shares: np.ndarray) -> list[str]:
    """Returns the pairs of classes that are confused most often."""
    wrong = confusion * (1 - np.eye(len(names), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    pairs = [divmod(int(i), len(names)) for i in order]
    rows = [
        [
            names[true],
            names[predicted],
            str(wrong[true, predicted]),
            f"{shares[true, predicted]:.0%}",
        ]
        for true, predicted in pairs
        if wrong[true, predicted]
    ]
    if not rows:
        return []
    header = ["true class", "predicted as", "images", "of that class"]
    return [html.paragraph("What is confused most often:"), html.table([header, *rows], 2)]


def _memory(workdir: Path) -> list[str]:
    """Returns what is known of the memory: its use, its content, and what is lost without it."""
    parts = _figure(workdir, "memory_use.png", "How much of each layer comes from the memory")
    parts += _figure(workdir, "memory_learned.png", "What was learned")
    for split in ("test", "val", "train"):
        of_split = f"({split} split)"
        for name, words in (
            (f"memory_written_{split}.png", f"What single images write {of_split}"),
            (f"memory_classes_{split}.png", f"How far classes are apart in the memory {of_split}"),
        ):
            parts += _figure(workdir, name, words)
        file = workdir / f"interventions_{split}.json"
        if file.is_file():
            with _reading(file):
                found = read_json(file)
                effects = [Effect(**row) for row in found["effects"]]
                at = found["at"]
                where = "" if at == ".*" else f", reads and updates that match {at!r}"
                parts += [
                    html.paragraph(
                        f"What is lost when the memory is altered {of_split}, after step"
                        f" {found['step']:,}{where}:"
                    ),
                    html.table(effects_cells(effects), 2),
                    *map(html.paragraph, found["notes"]),
                    *_figure(workdir, f"interventions_{split}.png", "Layer by layer"),
                ]
    return [html.heading("The memory"), *parts] if parts else []


def _figure(workdir: Path, name: str, words: str) -> list[str]:
    file = workdir / name
    return [html.figure(file.read_bytes(), words)] if file.is_file() else []
