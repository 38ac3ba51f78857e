"""What is in a folder of images, and what is wrong with it."""

import collections
import dataclasses
import hashlib
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import imagehash
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from aim_flax import markdown
from aim_flax.data.folder import read_file
from aim_flax.data.images import ImageError, halvings, header, load
from aim_flax.data.records import EncodedDataset, Records
from aim_flax.names import printable

_BATCH = 64  # images per task of a thread: a task per image would take more memory than its result
_SMALL = (32, 32, 3)
_THUMBNAIL, _LINE = 64, 14  # pixels
_MOST_FREQUENT = 5
# Copies of one picture: at most so many of 64 bits of their perceptual hashes differ, and so much,
# of 255, their pixels at a small size, on average.
_BITS, _LEVELS = 8, 12.0
_NEAREST = 3  # of the images with such hashes, those whose pixels are compared
_ROWS = 256  # of the table of distances, at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What one image is.

    Attributes:
      path: the name of its folder is its class.
      problem: why it can't be read, or "".
      format: "JPEG", "PNG", ... by its content.
      size: height and width in pixels.
      halvings: how often it must be halved to be decoded whole, see `images.halvings`.
      content: a hash of its bytes.
      look: a hash of its pixels at a small size.
      perceptual: another one, of 64 bits, most of which small changes leave as they are.
    """

    split: str
    path: str
    problem: str = ""
    format: str = ""
    size: tuple[int, int] = (0, 0)
    halvings: int = 0
    content: bytes = b""
    look: bytes = b""
    perceptual: int = 0

    @property
    def label(self) -> str:
        return os.path.basename(os.path.dirname(self.path))


def examine(dataset: EncodedDataset, threads: int, console: Console) -> list[Finding]:
    """Reads and decodes every image, in order; shows its progress on a terminal."""
    batches = [
        (name, records, range(start, min(start + _BATCH, len(records))))
        for name, records in dataset.splits.items()
        for start in range(0, len(records), _BATCH)
    ]

    def work(name: str, records: Records, indices: range) -> list[Finding]:
        return [_examine_one(name, records, i) for i in indices]

    pool = ThreadPoolExecutor(threads)
    try:
        results = track(
            pool.map(work, *zip(*batches, strict=True)),
            description="reading images",
            total=len(batches),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        return [finding for batch in results for finding in batch]
    finally:
        # Ctrl-C ends it at once.
        pool.shutdown(cancel_futures=True)


def _examine_one(name: str, records: Records, index: int) -> Finding:
    path = records.name(index)
    try:
        encoded, _ = records.read(index)
        kind, height, width = header(encoded)
        small = load(encoded, _SMALL)
        times = halvings(encoded)
    except (OSError, ImageError) as error:
        return Finding(name, path, _reason(error))
    bits = imagehash.phash(Image.fromarray(small)).hash
    perceptual = int.from_bytes(np.packbits(bits).tobytes())
    hashes = (_hash(encoded), _hash(small), perceptual)
    return Finding(name, path, "", kind, (height, width), times, *hashes)


def _reason(error: OSError | ImageError) -> str:
    if isinstance(error, OSError):
        return f"can't be read: {error.strerror or error}"
    return str(error)


class Lost(dict[str, str]):
    """Images that could not be read once more, after they were examined: {path: why}."""

    def load(
        self, path: str, shape: tuple[int, int, int], fit: str = "stretch"
    ) -> np.ndarray | None:
        """Returns an image as `images.load` does; None, and keeps why, if it is gone or damaged."""
        try:
            return load(read_file(path), shape, fit=fit)
        except (OSError, ImageError) as error:
            self[path] = _reason(error)
            return None


def duplicates(findings: Iterable[Finding], lost: Lost) -> list[list[Finding]]:
    """Returns groups of images of the same bytes, or of the same pixels in another file.

    Where one is too large to be decoded whole, pixels are compared halved as often as `halved`
    says of the group.

    Args:
      findings: of all images.
      lost: gets those that can't be compared.
    """
    readable = [finding for finding in findings if not finding.problem]
    found = []
    for alike in _groups(readable, lambda finding: (finding.look, finding.size)):
        same_bytes = len({finding.content for finding in alike}) == 1
        # Small copies may be equal where the images are not.
        found += [alike] if same_bytes else _same_pixels(alike, lost)
    return found


def _same_pixels(findings: Sequence[Finding], lost: Lost) -> list[list[Finding]]:
    """Returns the groups of the same pixels among images of one size."""
    times = halved(findings)
    height, width = (side // 2**times for side in findings[0].size)
    hashes = {}
    for finding in findings:
        pixels = lost.load(finding.path, (height, width, 3))
        if pixels is not None:
            hashes[finding.path] = _hash(pixels)
    there = [finding for finding in findings if finding.path in hashes]
    found = []
    for group in _groups(there, lambda finding: hashes[finding.path]):
        # Without those that had to be halved, the others can be told apart at a larger size.
        found += [group] if halved(group) == times else _same_pixels(group, lost)
    return found


def halved(group: Iterable[Finding]) -> int:
    """Returns how often duplicates were halved before their pixels were compared."""
    return max(finding.halvings for finding in group)


def alike(
    findings: Iterable[Finding], known: Iterable[Sequence[Finding]], lost: Lost
) -> list[list[Finding]]:
    """Returns groups of images of other splits or classes that show the same picture: copies that
    were saved again, in another format or size.

    Args:
      findings: of all images.
      known: groups that are not to be found again, see `duplicates`.
      lost: gets those that can't be compared.
    """
    readable = [finding for finding in findings if not finding.problem]
    if not readable:
        return []
    group_of = {finding.path: i for i, group in enumerate(known) for finding in group}
    hashes = np.array([finding.perceptual for finding in readable], np.uint64)
    place = {key: i for i, key in enumerate({(f.split, f.label) for f in readable})}
    places = np.array([place[f.split, f.label] for f in readable])

    @lru_cache(maxsize=4096)
    def small(path: str) -> np.ndarray | None:
        pixels = lost.load(path, _SMALL)
        return None if pixels is None else pixels.astype(np.int16)

    groups: dict[int, list[int]] = {}
    for start in range(0, len(readable), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = np.bitwise_count(hashes[rows, None] ^ hashes[None, : start + _ROWS])
        near = (distances <= _BITS) & (places[rows, None] != places[None, : start + _ROWS])
        for row in np.flatnonzero(near.any(1)):
            i = start + int(row)
            earlier = np.flatnonzero(near[row, :i])
            for j in earlier[np.argsort(distances[row, earlier], kind="stable")][:_NEAREST]:
                one, other = readable[i], readable[j]
                same = group_of.get(one.path, i) == group_of.get(other.path, -1)
                pixels, others = small(one.path), small(other.path)
                if same or pixels is None or others is None:
                    continue
                if np.abs(pixels - others).mean() <= _LEVELS:
                    group = groups.setdefault(int(j), [int(j)])
                    group.append(i)
                    groups[i] = group
                    break
    distinct = {id(group): group for group in groups.values()}
    return [[readable[i] for i in group] for group in distinct.values()]


def _groups(findings: Iterable[Finding], key: Callable[[Finding], Any]) -> list[list[Finding]]:
    """Returns the findings that share a key with another one."""
    groups = collections.defaultdict(list)
    for finding in findings:
        groups[key(finding)].append(finding)
    return [group for group in groups.values() if len(group) > 1]


def _hash(data: bytes | np.ndarray) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def report(dataset: EncodedDataset, findings: Sequence[Finding]) -> Iterator[str]:
    """Yields the lines that say what was found, except duplicates and problems of layout."""
    counts = {name: collections.Counter() for name in dataset.splits}
    for finding in findings:
        counts[finding.split][finding.label] += 1
    rows = [["class", *counts]]
    for label in dataset.classes:
        rows.append([_cell(label), *(f"{count[label]:,}" for count in counts.values())])
    rows.append(["all", *(f"{count.total():,}" for count in counts.values())])
    yield markdown.table(rows, padded=True)
    for name, count in counts.items():
        missing = [label for label in dataset.classes if not count[label]]
        if missing:
            listed = printable(", ".join(missing))
            yield f"{name} lacks {number(missing, 'class', 'classes')}: {listed}"
    for name, count in counts.items():
        if not count:
            continue
        (largest, most), (smallest, fewest) = count.most_common()[0], count.most_common()[-1]
        if most == fewest:
            yield f"{name}: {most:,} of each class"
            continue
        yield (
            f"{name}: {fewest:,} ({printable(smallest)}) to {most:,} ({printable(largest)}) images"
            " per class, median"
            f" {statistics.median(count.values()):,.0f}, {most / fewest:.1f} times as many;"
            f" the largest class has {most / count.total():.1%} of the images"
        )
    readable = [finding for finding in findings if not finding.problem]
    if readable:
        for i, what in enumerate(("height", "width")):
            values = [finding.size[i] for finding in readable]
            yield (
                f"{what}: {min(values):,} to {max(values):,} pixels, median"
                f" {statistics.median(values):,.0f}"
            )
        sizes = collections.Counter(finding.size for finding in readable)
        common = [f"{h} x {w} ({n:,})" for (h, w), n in sizes.most_common(_MOST_FREQUENT)]
        yield f"sizes, height x width: {', '.join(common)}" + (
            f", {len(sizes) - len(common):,} others" if len(sizes) > len(common) else ""
        )
        formats = collections.Counter(finding.format for finding in readable)
        yield f"formats: {', '.join(f'{kind} ({n:,})' for kind, n in formats.most_common())}"


def _cell(name: str) -> str:
    """Returns a name as it can stand in a table."""
    return printable(name).replace("|", "\\|")


def contact_sheet(
    classes: Sequence[str], findings: Iterable[Finding], per_class: int, lost: Lost
) -> Image.Image:
    """Returns some images of each class, spread over it, below the class's name.

    They are training images, or those of the first split if there are none. The place of one that
    can't be read stays white, and `lost` gets it.
    """
    members = collections.defaultdict(list)
    first = None
    for finding in findings:
        first = first or finding.split
        if finding.split == first and not finding.problem:
            members[finding.label].append(finding.path)
    width, height = per_class * _THUMBNAIL + _LINE, _THUMBNAIL + 2 * _LINE
    columns = max(1, round(math.sqrt(len(classes) * height / width)))
    rows = math.ceil(len(classes) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    # Pillow's own font has fewer letters.
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(fonts / "DejaVuSans.ttf", _LINE - 3)
    for i, label in enumerate(classes):
        x, y = i // rows * width, i % rows * height
        name = printable(label)
        while draw.textlength(name, font) > width - _LINE:
            name = name[:-2] + "…"
        draw.text((x, y), name, "black", font)
        paths = members[label]
        chosen = dict.fromkeys(int(n * len(paths) / per_class) for n in range(per_class))
        for column, n in enumerate(chosen if paths else ()):
            pixels = lost.load(paths[n], (_THUMBNAIL, _THUMBNAIL, 3), fit="crop")
            if pixels is not None:
                sheet.paste(Image.fromarray(pixels), (x + column * _THUMBNAIL, y + _LINE))
    return sheet


def number(things: Sequence[object], one: str, many: str) -> str:
    return f"{len(things):,} {one if len(things) == 1 else many}"
