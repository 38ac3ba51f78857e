"""The results of runs, read from their workdirs: a row per run."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax.errors import UsageError
from aim_flax.files import check_kind, read_mapping
from aim_flax.train.workdir import divergence

STUDY = "study.json"
COLUMNS = (
    "name",
    "arm",
    "seed",
    "status",
    "test_accuracy",
    "val_accuracy",
    "best_step",
    "epochs",
    "params",
    "selected_on",
    "test_balanced_accuracy",
    "test_macro_f1",
)
# Summaries from before lack these.
_LATER = dict.fromkeys(("test_balanced_accuracy", "test_macro_f1"))
MEASURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
}
SPLITS = {"test": "test", "val": "validation"}
FINISHED, UNFINISHED = "finished", "unfinished"
Row = Mapping[str, Any]


def read_runs(workdirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Returns a row of COLUMNS per run, by name, arm and seed, and its `workdir`; see `read_run`.

    A study's directory stands for the runs in it, and a CSV file for those whose rows it has.
    """
    folders: dict[Path, None] = {}
    rows = []
    for workdir in map(Path, workdirs):
        if workdir.suffix == ".csv":
            rows += read_recorded(workdir)
            continue
        of_study = (workdir / STUDY).is_file() and sorted(workdir.glob("*/*/config.json"))
        folders.update(dict.fromkeys([file.parent for file in of_study or []] or [workdir]))
    rows += [read_run(folder) | {"workdir": str(folder)} for folder in folders]
    return sorted(rows, key=lambda row: (row["name"], row["arm"], row["seed"]))


def read_recorded(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a CSV file with COLUMNS, as a study's results.csv, and their `workdir`.

    Raises:
      UsageError: it is no such file.
    """
    check_kind(file)
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            rows, columns = list(reader), reader.fieldnames or ()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except (UnicodeError, csv.Error) as error:
        raise UsageError(f"{file} is no table of runs: {error}") from None
    lacking = [c for c in COLUMNS if c not in columns and c not in (*_LATER, "status")]
    if lacking:
        raise UsageError(f"{file} is no table of runs: it has no column {', '.join(lacking)}")
    try:
        return [_recorded(row) | {"workdir": str(file)} for row in rows]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file} is damaged: {error}") from None


def _recorded(row: Mapping[str, str]) -> dict[str, Any]:
    """Returns a row of text with its numbers as numbers, and None for those that it lacks."""
    texts = ("name", "arm", "status", "selected_on")
    kinds = {**dict.fromkeys(COLUMNS, int), **dict.fromkeys(texts, str)}
    kinds |= {column: float for column in COLUMNS if "accuracy" in column or "f1" in column}
    # Rows recorded before there was a status are all of finished runs.
    row = {"status": FINISHED, **row}
    needed = ("name", "arm", "seed")
    return {
        column: kind(row[column]) if row.get(column) or column in needed else None
        for column, kind in kinds.items()
    }


def read_run(workdir: Path) -> dict[str, Any]:
    """Returns a run's row: from its summary or, if it has none, as `without_result` does.

    Raises:
      UsageError: `workdir` holds no run, or one of its files is damaged.
    """
    if (workdir / "summary.json").is_file():
        known = [column for column in COLUMNS if column not in (*_LATER, "status")]
        summary = read_mapping(workdir / "summary.json", known, "run's summary")
        summary = _LATER | summary | {"status": FINISHED}
        return {column: summary[column] for column in COLUMNS}
    if (workdir / STUDY).is_file():
        raise UsageError(f"{workdir} holds a study of which no run was started")
    config = read_mapping(workdir / "config.json", ("name", "arm", "seed"), "run's config")
    return without_result(ConfigDict(config), divergence(workdir))


def without_result(config: ConfigDict, diverged_at: int | None = None) -> dict[str, Any]:
    """Returns the row of a run that has not been started, is not finished, or has diverged.

    Its `status` is "unfinished" or "diverged at step N"; columns without a result are None.
    """
    status = UNFINISHED if diverged_at is None else f"diverged at step {diverged_at}"
    row = {"name": config.name, "arm": config.arm, "seed": config.seed, "status": status}
    return dict.fromkeys(COLUMNS) | row


def is_finished(row: Row) -> bool:
    # Rows recorded before there was a status are all of finished runs.
    return row.get("status", FINISHED) == FINISHED


def accuracies_by_arm(
    rows: Sequence[Row], split: str = "test", measure: str = "accuracy"
) -> dict[str, dict[int, float]]:
    """Returns {arm: {seed: accuracy}} of the finished runs; an arm without any has {}.

    Args:
      rows: see `arm_table`.
      split: of SPLITS.
      measure: of MEASURES; of "val" there is only the accuracy.

    Raises:
      UsageError: two rows are of the same arm and seed; the split is "val", and a run picked its
        best epoch on the test split; a run was trained before the measure was noted.
    """
    seen: dict[tuple[str, int], Row] = {}
    arms: dict[str, dict[int, float]] = {}
    for row in rows:
        arm, seed = row["arm"], int(row["seed"])
        if other := seen.get((arm, seed)):
            places = [r["workdir"] for r in (other, row) if "workdir" in r]
            named = f": {' and '.join(places)}" if places else ""
            raise UsageError(f"two runs are of arm {arm} and seed {seed}{named}")
        seen[arm, seed] = row
        accuracies = arms.setdefault(arm, {})
        if is_finished(row):
            if split == "val" and row["selected_on"] != split:
                raise UsageError(
                    f"arm {arm} seed {seed} picked its best epoch on {row['selected_on']}: it has"
                    " no validation accuracy"
                )
            value = row.get(f"{split}_{measure}")
            if value in (None, ""):
                raise UsageError(
                    f"arm {arm} seed {seed} has no {split} {MEASURES[measure]}: it was trained"
                    " before that was noted"
                )
            accuracies[seed] = float(value)
    return arms
