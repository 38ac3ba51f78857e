"""Folders of images: DIR/{train,val,test}/CLASS/*.jpg, or DIR/CLASS/*.jpg to be split here."""

import collections
import dataclasses
import functools
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aim_flax.data.records import EncodedDataset, Subset, hold_out
from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.names import printable, shortened

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Pillow reads these as well; of several pictures in a file, the first.
MORE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".pbm", ".pcx"),
    *(".pgm", ".pnm", ".ppm", ".qoi", ".sgi", ".tga", ".tif", ".tiff"),
)
FORMATS = {"usual": SUFFIXES, "all": (*SUFFIXES, *MORE_SUFFIXES)}
SPLITS = ("train", "val", "test")
# What others call them.
_OTHER_NAMES = {
    **dict.fromkeys(("training", "train_set", "trainset"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "eval", "validate"), "val"),
    **dict.fromkeys(("testing", "test_set", "testset"), "test"),
}
# The split that `survey` returns if there are only class folders.
UNSPLIT = "all"
_MOST_NAMED, _LONGEST = 5, 40  # classes that a split lacks, and characters of each


@dataclasses.dataclass(frozen=True, eq=False)
class FolderRecords:
    """The images of a split.

    Attributes:
      directory: the split's.
      labels: (N,) int32.
      files: N paths within the directory.
    """

    directory: Path
    labels: np.ndarray
    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:
        """As in `Records`; raises OSError as `read_file` does."""
        return read_file(self.name(index)), self.label(index)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns the path."""
        return os.path.join(self.directory, self.files[index])

    def mark(self, index: int) -> bytes:
        """Returns class folder, file name and size; wherever the folder of the dataset is."""
        try:
            size = os.stat(self.name(index)).st_size
        except OSError:
            size = -1  # Reading it will tell.
        return os.fsencode(f"{self.files[index]}\0{size}")


def read_file(path: str) -> bytes:
    """Returns the content of a file; raises OSError for what can't be read or is no file."""
    with open(path, "rb", opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no file")
        return file.read()


def _open(path: str, flags: int) -> int:
    # A pipe that nobody writes to would keep the reader waiting.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_folder(
    directory: str | Path, val_fraction: float, test_fraction: float, formats: str = "usual"
) -> EncodedDataset:
    """Finds the images of a folder by their file names; no image is read.

    A line on standard error says once which classes a split lacks.

    Args:
      directory: holds `train`, `test` and maybe `val`, each with a folder of images per class, or
        only the class folders. Images lie directly in their class folder; hidden files are ignored,
        and what else is passed over there is counted, as are images beside `train`.
      val_fraction: of each class of the training images, held out for validation if there is no
        folder `val`; 0 for no validation split.
      test_fraction: of each class, held out for the test if there are only class folders.
      formats: of FORMATS; "usual": .jpg, .jpeg, .png and .webp, in upper or lower case; "all": what
        Pillow reads.

    Returns:
      Classes are the sorted names of train's class folders. Images are sorted by class and name.

    Raises:
      UsageError: the folder isn't there or has another layout, a class is in another split but not
        in train, a fraction is out of range or so small that it holds out nothing.
    """
    dataset, problems = survey(directory, formats)
    if problems:
        more = f" ({len(problems) - 1} more: python -m aim_flax.cli.inspect {directory})"
        raise UsageError(problems[0] + (more if len(problems) > 1 else ""))
    dataset = split(dataset, val_fraction, test_fraction)
    if lacking := _lacking(dataset):
        _say_once(f"{directory}: {lacking}; accuracy there is of the others")
    return dataset


def survey(directory: str | Path, formats: str = "usual") -> tuple[EncodedDataset, list[str]]:
    """Finds the images of a folder, and everything that is wrong with its layout.

    Args:
      directory, formats: as for `read_folder`.

    Returns:
      The images of each split, or of the split "all" if there are only class folders, with the
      classes of all splits. And a line for each problem.

    Raises:
      UsageError: there is no such folder, or no image in it.
    """
    check_choice("data.formats", formats, FORMATS)
    suffixes = FORMATS[formats]
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file, expected a folder of images")
    if not directory.exists():
        parent = directory.absolute().parent
        siblings = [entry.name for entry in os.scandir(parent)] if parent.is_dir() else []
        raise UsageError(f"{directory} does not exist{nearest(directory.name, siblings)}")
    problems: list[str] = []
    top = scan(directory, problems, suffixes)
    folders = top.folders
    found = [name for name in SPLITS if name in folders]
    roots = {name: directory / name for name in found} or {UNSPLIT: directory}
    for name in folders:
        if not found and {"train", "test"} <= {*scan(directory / name, [], ()).folders}:
            raise UsageError(
                f"{directory} has no train and test, but {directory / name} has: expected that"
                " folder"
            )
    missing = [name for name in ("train", "test") if name not in found]
    if found and missing:
        problems.append(
            f"{directory} has {' and '.join(found)} but no {' and no '.join(missing)},"
            " expected train, test and maybe val, or only folders of classes"
        )
    problems += [
        f"{directory / name} stands beside {' and '.join(found)}, expected only train, val"
        f" and test there{_meant(name)}"
        for name in folders
        if found and name not in found
    ]
    passed_over: collections.Counter[str] = collections.Counter()
    if found and top.images:
        # No mistake: a picture of all of them, or the contact sheet of `inspect`.
        passed_over[f"images beside {' and '.join(found)}"] = len(top.images)
    trees = {
        name: _class_files(root, problems, suffixes, passed_over) for name, root in roots.items()
    }
    problems += [
        f"{roots[name]} has no class folders, expected one per class, with its images"
        for name, tree in trees.items()
        if found and not tree
    ]
    if not any(files for tree in trees.values() for files in tree.values()):
        expected = f"{', '.join(suffixes)} in a folder per class"
        raise UsageError([*problems, f"{directory} has no images, expected {expected}"][0])
    problems += [
        f"{roots[name] / label} is a class that {roots['train']} lacks"
        f"{nearest(label, trees['train'])}"
        for name, tree in trees.items()
        for label in tree
        if "train" in trees and label not in trees["train"]
    ]
    classes = sorted(set().union(*trees.values()))
    index = {label: i for i, label in enumerate(classes)}
    splits = {}
    for name, tree in trees.items():
        found = [(index[label], f"{label}/{file}") for label in tree for file in tree[label]]
        labels = np.array([label for label, _ in found], np.int32)
        splits[name] = FolderRecords(roots[name], labels, [file for _, file in found])
    return EncodedDataset(tuple(classes), splits, dict(sorted(passed_over.items()))), problems


def split(dataset: EncodedDataset, val_fraction: float, test_fraction: float) -> EncodedDataset:
    """Holds out the splits that a folder without problems lacks, see `read_folder`."""
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise UsageError(f"{name} is {fraction}, expected at least 0 and less than 1")
    splits = dict(dataset.splits)
    whole = splits.pop(UNSPLIT) if UNSPLIT in splits else splits["train"]
    rest = np.arange(len(whole))

    def take(name: str, fraction: float) -> None:
        nonlocal rest
        kept, held = hold_out(whole.labels[rest], fraction)
        if not len(held):
            raise UsageError(
                f"{name}_fraction is {fraction}, which is less than one image of any class of"
                f" {whole.directory}"
            )
        splits[name], rest = Subset(whole, rest[held]), rest[kept]

    if "test" not in splits:
        if test_fraction == 0:
            raise UsageError(
                f"test_fraction is 0, expected more: {whole.directory} has no folder test"
            )
        take("test", test_fraction)
    if "val" not in splits and val_fraction:
        take("val", val_fraction)
    splits["train"] = Subset(whole, rest)
    ordered = {name: splits[name] for name in SPLITS if name in splits}
    return dataclasses.replace(dataset, splits=ordered)


def _lacking(dataset: EncodedDataset) -> str:
    """Returns "val lacks 2 of 9 classes (a, b); test lacks 1 of 9 classes (a)", or ""."""
    texts = []
    for name, records in dataset.splits.items():
        there = {*np.unique(_labels(records)).tolist()}
        lacks = [label for i, label in enumerate(dataset.classes) if i not in there]
        if lacks:
            listed = ", ".join(shortened(label, _LONGEST) for label in lacks[:_MOST_NAMED])
            more = f" and {len(lacks) - _MOST_NAMED:,} more" if len(lacks) > _MOST_NAMED else ""
            of = f"{len(lacks):,} of {len(dataset.classes):,} classes"
            texts.append(f"{name} lacks {of} ({listed}{more})")
    return "; ".join(texts)


def _labels(records: FolderRecords | Subset) -> np.ndarray:
    if isinstance(records, Subset):
        return records.records.labels[records.indices]
    return records.labels


@functools.cache
def _say_once(text: str) -> None:
    """Says something of a folder, which a study opens again and again."""
    print(printable(text), file=sys.stderr, flush=True)


def passed_over(dataset: EncodedDataset) -> str:
    """Returns a text like "3 .gif, 1 .txt; data.formats=all reads .gif"."""
    kinds = dataset.passed_over
    found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    more = [kind for kind in kinds if kind in MORE_SUFFIXES]
    return found + (f"; data.formats=all reads {', '.join(more)}" if more else "")


def _class_files(
    directory: Path,
    problems: list[str],
    suffixes: Sequence[str],
    passed_over: collections.Counter[str],
) -> dict[str, list[str]]:
    """Returns the images of each class folder, sorted; adds to the problems, and to the numbers of
    what is passed over there."""
    found = scan(directory, problems, suffixes)
    if found.images:
        problems.append(
            f"{directory / found.images[0]} lies directly in {directory}"
            + (f", as do {len(found.images) - 1} more images" if len(found.images) > 1 else "")
            + ", expected images in a folder per class"
        )
    tree = {}
    for name in found.folders:
        before = len(problems)
        inner = scan(directory / name, problems, suffixes)
        tree[name] = inner.images
        kinds = collections.Counter(inner.others.values())
        passed_over.update(kinds)
        passed_over.update({"folders within classes": len(inner.folders)} if inner.folders else {})
        if tree[name] or len(problems) > before:
            continue
        holds = "is empty"
        if inner.others:
            first = next(iter(inner.others))
            holds = f"has no images but {len(inner.others)} other files, such as {first}"
        elif inner.folders:
            holds = f"has no images but folders, such as {inner.folders[0]}"
            name += _meant(name)
        more = kinds.keys() & set(MORE_SUFFIXES) - set(suffixes)
        hint = f"; data.formats=all reads {', '.join(sorted(more))}" if more else ""
        problems.append(f"{directory / name} {holds}, expected {', '.join(suffixes)}{hint}")
    return tree


def _meant(name: str) -> str:
    """Returns " (did you mean 'val'?)" for what is nearly a split's name, or ""."""
    return nearest(_OTHER_NAMES.get(name.lower(), name), SPLITS)


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies in a directory, sorted: the names of its folders and images, and {name: kind} of
    what else does. Hidden things are left out."""

    folders: list[str]
    images: list[str]
    others: dict[str, str]


def scan(directory: Path, problems: list[str], suffixes: Sequence[str]) -> Found:
    """Returns what is in a folder, in the order of its names; links are followed.

    Args:
      directory: the folder.
      problems: gets a line for what can't be read.
      suffixes: of images.
    """
    found = Found([], [], {})
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{directory} can't be read: {error.strerror}")
        return found
    for entry in entries:
        name, suffix = entry.name, os.path.splitext(entry.name)[1].lower()
        if name.startswith("."):
            continue
        try:
            # The directory itself says what is what: no system call per file.
            if entry.is_dir():
                found.folders.append(name)
            elif entry.is_file():
                if suffix in suffixes:
                    found.images.append(name)
                else:
                    found.others[name] = suffix or "without a suffix"
            elif os.path.exists(entry.path):
                found.others[name] = "pipes, sockets and devices"
            elif suffix in suffixes:
                found.images.append(name)  # A broken link, told when it is read.
            else:
                found.others[name] = "broken links"
        except OSError as error:  # Links in a circle.
            problems.append(f"{entry.path} can't be read: {error.strerror}")
    return found
