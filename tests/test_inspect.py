"""The inspection of a folder finds what a careful person would."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from aim_flax.cli import inspect
from aim_flax.data import inspection
from aim_flax.data.folder import survey


def noise(seed: int, height: int = 20, width: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, seed: int, height: int = 20, width: int = 24, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, height, width).save(path, **options)


@pytest.fixture
def clean(tmp_path):
    """Two classes; the validation split lacks one."""
    root = tmp_path / "photos"
    for i in range(6):
        save(root / f"train/apple/{i}.jpg", i)
    for i in range(2):
        save(root / f"train/pear/{i}.png", 10 + i, 30, 40)
    save(root / "val/apple/0.webp", 20)
    save(root / "test/apple/0.jpg", 30)
    save(root / "test/pear/0.JPG", 31)
    return root


def run(directory: Path, capsys, *flags: str) -> tuple[int, str, str]:
    """Returns the exit status, standard output with DIR for the directory, standard error."""
    status = 0
    try:
        inspect.main([str(directory), "--sheet", str(directory.parent / "sheet.png"), *flags])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out.replace(str(directory), "DIR"), captured.err


def test_clean_folder(clean, capsys):
    status, out, err = run(clean, capsys)
    assert (status, err) == (0, "")
    assert out.splitlines()[:-1] == [
        "| class | train | val | test |",
        "| ----- | ----: | --: | ---: |",
        "| apple |     6 |   1 |    1 |",
        "| pear  |     2 |   0 |    1 |",
        "| all   |     8 |   1 |    2 |",
        "val lacks 1 class: pear",
        "train: 2 (pear) to 6 (apple) images per class, median 4, 3.0 times as many; the largest"
        " class has 75.0% of the images",
        "val: 1 of each class",
        "test: 1 of each class",
        "height: 20 to 30 pixels, median 20",
        "width: 24 to 40 pixels, median 24",
        "sizes, height x width: 20 x 24 (9), 30 x 40 (2)",
        "formats: JPEG (8), PNG (2), WEBP (1)",
        "0 images can't be read",
        "0 images are there more than once, 0 of them in more than one split, 0 in more than one"
        " class",
    ]


def test_every_unreadable_image_is_told(clean, capsys):
    whole = (clean / "train/apple/1.jpg").read_bytes()
    (clean / "train/apple/1.jpg").write_bytes(whole[:-100])
    (clean / "train/pear/1.png").write_bytes(b"")
    (clean / "test/apple/0.jpg").write_bytes(b"<html>")
    os.symlink("nowhere", clean / "val/apple/link.jpg")
    status, out, _ = run(clean, capsys)
    assert status == 1
    lines = out.splitlines()
    start = lines.index("4 images can't be read")
    assert lines[start + 1].startswith("  DIR/train/apple/1.jpg cannot be decoded: ")
    assert lines[start + 2 : start + 5] == [
        "  DIR/train/pear/1.png is empty",
        "  DIR/val/apple/link.jpg can't be read: No such file or directory",
        "  DIR/test/apple/0.jpg is no image of a known format",
    ]
    # They are counted with their class all the same.
    assert "| all   |     8 |   2 |    2 |" in lines


def duplicate_lines(out: str) -> list[str]:
    lines = out.splitlines()
    return lines[next(i for i, line in enumerate(lines) if "more than once" in line) : -1]


@pytest.mark.parametrize(
    ("copies", "status", "told", "listed"),
    [
        # Within a split it is told, but no fault.
        (["train/apple"], 0, "0 of them in more than one split, 0 in", ["train/apple/copy.jpg"]),
        (
            ["test/apple", "val/apple"],
            1,
            "1 of them in more than one split, 0 in",
            ["val/apple/copy.jpg", "test/apple/copy.jpg"],
        ),
        (["train/pear"], 1, "0 of them in more than one split, 1 in", ["train/pear/copy.jpg"]),
    ],
)
def test_duplicates_are_faults_across_splits_and_classes(
    clean, capsys, copies, status, told, listed
):
    copied = (clean / "train/apple/0.jpg").read_bytes()
    for folder in copies:
        (clean / folder / "copy.jpg").write_bytes(copied)
    found, out, _ = run(clean, capsys)
    assert found == status
    same = ", ".join(f"DIR/{path}" for path in ("train/apple/0.jpg", *listed))
    assert duplicate_lines(out) == [
        f"1 image is there more than once, {told} more than one class",
        f"  same bytes: {same}",
    ]


def test_the_same_pixels_in_another_file_are_duplicates(clean, capsys):
    save(clean / "test/pear/copy.png", 10, 30, 40, compress_level=1)
    # Equal when small, but not pixel for pixel, is no duplicate.
    flat = np.full((64, 64, 3), 90, np.uint8)
    for name, value in (("x", 90), ("y", 91)):
        flat[0, 0] = value
        Image.fromarray(flat).save(clean / f"train/pear/{name}.png")
    status, out, _ = run(clean, capsys)
    assert status == 1
    assert duplicate_lines(out)[1:] == [
        "  same pixels: DIR/train/pear/0.png, DIR/test/pear/copy.png"
    ]


def test_problems_of_layout_do_not_stop_it(clean, capsys):
    save(clean / "test/peer/0.png", 40)
    (clean / "train/plum").mkdir()
    (clean / "val/apple/0.webp").write_bytes(b"")
    status, out, _ = run(clean, capsys)
    assert status == 1
    assert [line for line in out.splitlines() if line.startswith("layout: ")] == [
        "layout: DIR/train/plum is empty, expected .jpg, .jpeg, .png, .webp",
        "layout: DIR/test/peer is a class that DIR/train lacks (did you mean 'pear'?)",
    ]
    assert "1 image can't be read\n  DIR/val/apple/0.webp is empty\n" in out
    assert "train lacks 2 classes: peer, plum" in out


def test_fractions_make_the_splits_that_are_not_there(clean, capsys, tmp_path):
    root = tmp_path / "unsplit"
    for i in range(20):
        save(root / f"a/{i}.png", i)
    status, out, _ = run(root, capsys, "--val-fraction", "0.25", "--test-fraction", "0.4")
    assert status == 0
    assert "| all   |     9 |   3 |    8 |" in out
    status, _, err = run(root, capsys, "--test-fraction", "0")
    assert status == 2
    assert "test_fraction is 0, expected more" in err


def test_wrong_use_is_one_line(clean, capsys, tmp_path):
    for directory, flags, message in (
        (tmp_path / "photo", (), "photo does not exist (did you mean 'photos'?)"),
        (clean, ("--sheet", str(tmp_path / "none/sheet.png")), "but there is no folder"),
        (clean, ("--sheet", str(tmp_path)), "a folder, expected a file to write"),
        (clean, ("--threads", "0"), "--per-class and --threads are at least 1"),
    ):
        status, out, err = run(directory, capsys, *flags)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_contact_sheet_shows_images_of_each_class_below_its_name(tmp_path):
    root = tmp_path / "colors"
    colors = {"blue": (20, 30, 220), "green": (20, 200, 40), "red\udcff": (230, 20, 10)}
    for label, color in colors.items():
        for split, n in (("train", 2 if label == "blue" else 9), ("test", 1)):
            (root / split / label).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (30 + i, 50), color).save(root / split / label / f"{i}.png")
    dataset, _ = survey(root)
    findings = inspection.examine(dataset, 2, Console(stderr=True))
    sheet = np.asarray(inspection.contact_sheet(dataset.classes, findings, 3))
    for label, color in colors.items():
        area = (sheet == color).all(-1).sum() / 64**2
        # All that a class has, up to three.
        assert area == (2 if label == "blue" else 3)
    # The names: dark letters on white.
    assert (sheet.max(-1) < 100).sum() > 50


def test_progress_is_shown_on_a_terminal_only(clean):
    dataset, _ = survey(clean)
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=80)
        findings = inspection.examine(dataset, 2, console)
        assert ("reading images" in file.getvalue()) == terminal
        assert [finding.split for finding in findings] == ["train"] * 8 + ["val"] + ["test"] * 2
