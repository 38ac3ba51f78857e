"""The classes of many images, and what is written of them: the work of aim-flax predict."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from aim_flax import files
from aim_flax.errors import DataError, UsageError
from aim_flax.names import printable
from aim_flax.use.predictor import Prediction, Predictor

_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Found:
    """What a network says of a file."""

    file: str
    prediction: Prediction


def predictions(
    predictor: Predictor, paths: Sequence[str], skip: bool, threads: int
) -> Iterator[tuple[Found, np.ndarray]]:
    """Yields the predictions for files, in order, and what the network was given of each, (H, W, C)
    uint8. The next files are decoded while it computes.

    Args:
      skip: leave out what is no whole image, with a line on standard error; otherwise DataError.
    """

    def read(path: str) -> np.ndarray | Exception:
        try:
            return predictor.pixels(path)
        except (DataError, UsageError) as error:
            return error

    size = min(_BATCH, len(paths))
    readable = 0
    with ThreadPoolExecutor(threads) as pool:
        parts = [paths[i : i + size] for i in range(0, len(paths), size)]
        ahead = [pool.submit(read, path) for path in parts[0]]
        for number, part in enumerate(parts):
            after = parts[number + 1] if number + 1 < len(parts) else ()
            found = [future.result() for future in ahead]
            ahead = [pool.submit(read, path) for path in after]
            pairs = []
            for path, pixels in zip(part, found, strict=True):
                if isinstance(pixels, np.ndarray):
                    pairs.append((path, pixels))
                elif skip:
                    print(printable(f"left out: {pixels}"), file=sys.stderr, flush=True)
                else:
                    for future in ahead:
                        future.cancel()
                    raise DataError(f"{pixels} (--on-error skip leaves such images out)")
            readable += len(pairs)
            if pairs:
                # Always of one size, so that one program is compiled.
                rows = [pixels for _, pixels in pairs]
                rows += [np.zeros_like(rows[0])] * (size - len(rows))
                values = predictor.probabilities(np.stack(rows))
                for (path, pixels), row in zip(pairs, values, strict=False):
                    yield Found(path, Prediction.of(predictor.classes, row)), pixels
    if not readable:
        raise DataError(f"none of {len(paths):,} images can be read")


def line(found: Found, top: int) -> str:
    """Returns a file's most probable classes on one line, whatever is in the names."""
    classes = [f"{name} {share:.2%}" for name, share in found.prediction.top(top)]
    return printable(f"{found.file}: {', '.join(classes)}")


def write_csv(place: Path, all_found: Sequence[Found], top: int) -> None:
    """Writes a row per image: file, class, probability, and the next classes with theirs.

    Names stand as they are, also those that a spreadsheet takes for formulas: programs read them.
    """
    columns, rows = ["image", "class", "probability"], []
    count = min(top, len(all_found[0].prediction.classes))
    columns += [f"{column}_{i}" for i in range(2, count + 1) for column in columns[1:3]]
    for found in all_found:
        values = [value for pair in found.prediction.top(count) for value in pair]
        rows.append(dict(zip(columns, [found.file, *values], strict=True)))
    with files.writing(place.absolute().parent):
        files.write_csv(place, columns, rows)


def write_json(place: Path, predictor: Predictor, all_found: Sequence[Found], top: int) -> None:
    """Writes the classes and, for each image, the most probable ones and all probabilities, in the
    order of the classes."""
    images: list[dict[str, Any]] = []
    for found in all_found:
        pairs = found.prediction.top(top)
        images.append(
            {
                "image": found.file,
                "class": found.prediction.label,
                "probability": found.prediction.probability,
                "top": [{"class": name, "probability": share} for name, share in pairs],
                "probabilities": [float(share) for share in found.prediction.probabilities],
            }
        )
    config = predictor.config
    run = {"name": config.name, "arm": config.arm, "seed": config.seed, "step": predictor.step}
    with files.writing(place.absolute().parent):
        files.write_json(place, {**run, "classes": predictor.classes, "images": images})
