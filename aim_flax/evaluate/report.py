"""Tables of evaluations: by class, and by intervention."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aim_flax import markdown
from aim_flax.data.dataset import Dataset
from aim_flax.evaluate.effects import Effect, Effects
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.mistakes import mistakes
from aim_flax.files import write_bytes, write_csv, write_json
from aim_flax.names import printable
from aim_flax.statistics import p_value


def per_class(evaluation: Evaluation, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns, for each class, its number of examples, recall, precision and F1 score.

    A ratio whose denominator is 0 is None.
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


def class_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the rows of `per_class` as cells of a table, the header first."""
    columns = ("recall", "precision", "f1")
    cells = [["class", "examples", *columns]]
    for row in rows:
        ratios = ["-" if row[c] is None else f"{row[c]:.4f}" for c in columns]
        cells.append([row["class"], str(row["examples"]), *ratios])
    return cells


def class_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `per_class` as lines of text."""
    cells = class_cells(rows)
    cells = [[printable(name), *others] for name, *others in cells]
    width = max(len(name) for name, *_ in cells)
    return "\n".join(
        f"{name:{width}}" + "".join(f"  {cell:>9}" for cell in others) for name, *others in cells
    )


def write_evaluation(
    folder: Path,
    name: str,
    evaluation: Evaluation,
    dataset: Dataset,
    white: float,
    context: dict[str, Any],
) -> None:
    """Writes eval_`name`.json and, if images were predicted wrongly, mistakes_`name`.png.

    Args:
      white: the value of a white pixel.
      context: of the evaluation, `split` among it, which comes first in the JSON file.
    """
    low, high = evaluation.accuracy_interval()
    wrong, sheet = mistakes(evaluation, dataset, context["split"], white)
    result = {
        **context,
        "examples": evaluation.count,
        "skipped": evaluation.skipped,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": evaluation.balanced_accuracy,
        "macro_f1": evaluation.macro_f1,
        "classes": per_class(evaluation, dataset.classes),
        "confusion": evaluation.confusion.tolist(),
        "mistakes": wrong,
    }
    # The picture first: the rows of the JSON file are those of its images.
    if sheet is not None:
        write_bytes(folder / f"mistakes_{name}.png", sheet)
    else:
        (folder / f"mistakes_{name}.png").unlink(missing_ok=True)
    write_json(folder / f"eval_{name}.json", result)


def effects_cells(effects: Sequence[Effect]) -> list[list[str]]:
    """Returns a row of cells per effect, the header first."""
    header = ["memory", "altered at", "accuracy", "loss", "difference from `keep`, points"]
    header += ["worse", "better", "p", "p, Holm"]
    rows = [header]
    for effect in effects:
        altered = "" if effect.kind == "keep" else f"`{effect.layer}`" if effect.layer else "all"
        cells = [f"`{effect.kind}`", altered, f"{effect.accuracy:.2%}", f"{effect.loss:.4f}"]
        if effect.p is None:
            cells += [""] * 5
        else:
            cells += [f"{100 * effect.difference:+z.2f}", str(effect.worse), str(effect.better)]
            cells += [p_value(effect.p), p_value(effect.p_holm)]
        rows.append(cells)
    return rows


def effects_table(effects: Effects) -> str:
    """Returns a Markdown table, a row per effect, and the notes below it."""
    return "\n\n".join([markdown.table(effects_cells(effects.rows), left=2), *effects.notes])


def write_effects(file: Path, effects: Effects, context: dict[str, Any], title: str) -> None:
    """Writes `file`.json and .csv, and .png if layers were altered one by one.

    Args:
      context: keys of the evaluation, which come first in the JSON file.
      title: of the plot.
    """
    rows = [dataclasses.asdict(row) for row in effects.rows]
    write_json(file.with_suffix(".json"), {**context, "notes": effects.notes, "effects": rows})
    write_csv(file.with_suffix(".csv"), [field.name for field in dataclasses.fields(Effect)], rows)
    single = [row for row in effects.rows if row.layer]
    if single:
        from aim_flax.evaluate.plots import plot_effects

        plot_effects(file.with_suffix(".png"), single, title)
