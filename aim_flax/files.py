"""Files: each is written whole or not at all."""

import contextlib
import csv
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aim_flax.errors import UsageError


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a file to write, which becomes `path` at the end."""
    # Named for this write alone: another process may be writing the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the errors of writing into a folder into a UsageError of one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{folder} is not writable: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    with _replacing(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


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
