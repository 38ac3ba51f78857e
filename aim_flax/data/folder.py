"""Folders of images: DIR/{train,val,test}/CLASS/*.jpg, or DIR/CLASS/*.jpg to be split here."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aim_flax.data.records import EncodedDataset, Subset, hold_out
from aim_flax.errors import UsageError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = ("train", "val", "test")
# The split that `survey` returns if there are only class folders.
UNSPLIT = "all"


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
        with open(self.name(index), "rb") as file:
            return file.read(), self.label(index)

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


def read_folder(directory: str | Path, val_fraction: float, test_fraction: float) -> EncodedDataset:
    """Finds the images of a folder by their file names; no image is read.

    Args:
      directory: holds `train`, `test` and maybe `val`, each with a folder of images per class, or
        only the class folders. Images are .jpg, .jpeg, .png and .webp, in upper or lower case,
        directly in their class folder; hidden files and other files are ignored.
      val_fraction: of each class of the training images, held out for validation if there is no
        folder `val`; 0 for no validation split.
      test_fraction: of each class, held out for the test if there are only class folders.

    Returns:
      Classes are the sorted names of train's class folders. Images are sorted by class and name.

    Raises:
      UsageError: the folder isn't there or has another layout, a class is in another split but not
        in train, a fraction is out of range or so small that it holds out nothing.
    """
    dataset, problems = survey(directory)
    if problems:
        more = f" ({len(problems) - 1} more: python -m aim_flax.cli.inspect {directory})"
        raise UsageError(problems[0] + (more if len(problems) > 1 else ""))
    return split(dataset, val_fraction, test_fraction)


def survey(directory: str | Path) -> tuple[EncodedDataset, list[str]]:
    """Finds the images of a folder, and everything that is wrong with its layout.

    Returns:
      The images of each split, or of the split "all" if there are only class folders, with the
      classes of all splits. And a line for each problem.

    Raises:
      UsageError: there is no such folder, or no image in it.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file, expected a folder of images")
    if not directory.exists():
        parent = directory.absolute().parent
        siblings = [entry.name for entry in os.scandir(parent)] if parent.is_dir() else []
        raise UsageError(f"{directory} does not exist{nearest(directory.name, siblings)}")
    problems: list[str] = []
    folders = _scan(directory, problems)[0]
    found = [name for name in SPLITS if name in folders]
    roots = {name: directory / name for name in found} or {UNSPLIT: directory}
    missing = [name for name in ("train", "test") if name not in found]
    if found and missing:
        problems.append(
            f"{directory} has {' and '.join(found)} but no {' and no '.join(missing)},"
            " expected train, test and maybe val, or only folders of classes"
        )
    problems += [
        f"{directory / name} stands beside {' and '.join(found)}, expected only train, val"
        f" and test there{nearest(name, SPLITS)}"
        for name in folders
        if found and name not in found
    ]
    trees = {name: _class_files(root, problems) for name, root in roots.items()}
    problems += [
        f"{roots[name]} has no class folders, expected one per class, with its images"
        for name, tree in trees.items()
        if found and not tree
    ]
    if not any(files for tree in trees.values() for files in tree.values()):
        expected = f"{', '.join(SUFFIXES)} in a folder per class"
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
    return EncodedDataset(tuple(classes), splits), problems


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
    return EncodedDataset(dataset.classes, ordered)


def _class_files(directory: Path, problems: list[str]) -> dict[str, list[str]]:
    """Returns the images of each class folder, sorted; adds to the problems."""
    folders, images, _ = _scan(directory, problems)
    if images:
        problems.append(
            f"{directory / images[0]} lies directly in {directory}"
            + (f", as do {len(images) - 1} more images" if len(images) > 1 else "")
            + ", expected images in a folder per class"
        )
    tree = {}
    for name in folders:
        before = len(problems)
        inner, tree[name], others = _scan(directory / name, problems)
        if tree[name] or len(problems) > before:
            continue
        holds = "is empty"
        if others:
            holds = f"has no images but {len(others)} other files, such as {others[0]}"
        elif inner:
            holds = f"has no images but folders, such as {inner[0]}"
            name += nearest(name, SPLITS)
        problems.append(f"{directory / name} {holds}, expected {', '.join(SUFFIXES)}")
    return tree


def _scan(directory: Path, problems: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Returns the names of a directory's folders, images and other files, each sorted."""
    folders, images, others = [], [], []
    try:
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            is_image = entry.name.lower().endswith(SUFFIXES)
            # The directory itself says what is a folder: no system call per file.
            kind = folders if entry.is_dir() else images if is_image else others
            kind.append(entry.name)
    except OSError as error:
        problems.append(f"{directory} can't be read: {error.strerror}")
    return folders, images, others
