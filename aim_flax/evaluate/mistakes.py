"""The images that a network gets wrong, those it is most sure of first, for people to look at."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from aim_flax.data.dataset import Dataset
from aim_flax.errors import DataError
from aim_flax.evaluate.evaluation import Evaluation

MOST = 24
_SIDE, _COLUMNS = 96, 6


def mistakes(
    evaluation: Evaluation, dataset: Dataset, split: str, white: float
) -> tuple[list[dict[str, Any]], bytes | None]:
    """Returns what is known of at most MOST images, and a sheet of them.

    Args:
      split: the one that was evaluated.
      white: the value of a white pixel.

    Returns:
      A row for each, with `image` (its name), `class`, `predicted` and the `probability` that the
      network gave that; and a PNG of them as `tiles` reads it, or None if there are none or they
      can't be read any more.
    """
    if evaluation.predicted is None:
        return [], None
    wrong = np.flatnonzero((evaluation.predicted >= 0) & ~evaluation.is_correct)
    wrong = wrong[np.argsort(-evaluation.probability[wrong], kind="stable")][:MOST]
    rows = [
        {
            "image": dataset.name(split, int(i)),
            "class": dataset.classes[evaluation.labels[i]],
            "predicted": dataset.classes[evaluation.predicted[i]],
            "probability": float(evaluation.probability[i]),
        }
        for i in wrong
    ]
    try:
        images = [dataset.image(split, int(i)) for i in wrong]
    except DataError:
        return rows, None
    return rows, _sheet(images, white) if images else None


def caption(row: dict[str, Any]) -> str:
    """Returns what stands below an image; of a path, the name of the file."""
    name = row["image"].rpartition("/")[2]
    return f"{row['predicted']} ({row['probability']:.0%}), but it is {row['class']}: {name}"


def tiles(sheet: bytes, count: int) -> list[bytes]:
    """Returns the first images of a sheet, each as PNG."""
    with Image.open(io.BytesIO(sheet)) as whole:
        lines = -(-count // _COLUMNS)
        width, height = whole.width // _COLUMNS, whole.height // lines
        found = []
        for i in range(count):
            y, x = divmod(i, _COLUMNS)
            box = (x * width, y * height, (x + 1) * width, (y + 1) * height)
            found.append(_png(whole.crop(box)))
        return found


def _sheet(images: Sequence[np.ndarray], white: float) -> bytes:
    """Returns images (H, W, C) uint8 of one shape in lines of _COLUMNS."""
    height, width, _ = images[0].shape
    factor = _SIDE / max(height, width)
    # What is small is shown pixel by pixel.
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    mode = "L" if images[0].shape[2] == 1 else "RGB"
    lines = -(-len(images) // _COLUMNS)
    sheet = Image.new(mode, (_COLUMNS * size[0], lines * size[1]))
    for i, image in enumerate(images):
        pixels = np.clip(image.astype(np.float32) * (255 / white), 0, 255).astype(np.uint8)
        y, x = divmod(i, _COLUMNS)
        tile = Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels)
        sheet.paste(tile.resize(size, how), (x * size[0], y * size[1]))
    return _png(sheet)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
