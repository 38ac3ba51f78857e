"""Files: each is written whole or not at all."""

import contextlib
import csv
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim_flax.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


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


def check_writable(*places: Path | None) -> None:
    """Raises UsageError unless a file can be written at each place; None: nowhere."""
    for place in places:
        if place is None:
            continue
        folder = place.absolute().parent
        if place.is_dir():
            raise UsageError(f"{place} is a folder, expected a file to write")
        if not folder.is_dir():
            raise UsageError(f"{place} can't be written: there is no folder {folder}")
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{place} can't be written: {folder} is not writable")
    given = [place.resolve() for place in places if place is not None]
    if len(set(given)) < len(given):
        raise UsageError(f"{given[0]} is asked for twice: choose another place for one of them")


def write_bytes(path: Path, content: bytes) -> None:
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    # Names of files may have bytes that are not text; they are written as they are.
    how = dict(newline="", encoding="utf-8", errors="surrogateescape")
    with _replacing(path) as temporary, temporary.open("w", **how) as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG."""
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def save_image(image: "Image.Image", path: Path) -> None:
    """Writes an image of Pillow as PNG."""
    with _replacing(path) as temporary:
        image.save(temporary, "PNG")


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
