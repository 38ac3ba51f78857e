"""Files that are written whole or not at all."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aim_flax.errors import UsageError


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    os.replace(temporary, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      UsageError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} not found: {path.parent} is no run's workdir") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None
