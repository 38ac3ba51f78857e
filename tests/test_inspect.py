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
        "0 images look like one in another split or class",
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
    start = next(i for i, line in enumerate(lines) if "more than once" in line)
    assert lines[-2] == "0 images look like one in another split or class"
    return lines[start:-2]


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


def photograph(seed: int) -> Image.Image:
    """Returns something with large shapes, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((120, 100), Image.Resampling.BICUBIC)


def put(image: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_copies_that_were_saved_again_are_found(clean, capsys):
    for i in range(8):
        put(photograph(i), clean / f"train/apple/p{i}.jpg", quality=90)
    with Image.open(clean / "train/apple/p0.jpg") as image:
        put(image, clean / "test/apple/as_png.png")
        put(image.resize((60, 50)), clean / "val/apple/smaller.jpg")
        # Within its split and class it is no leak.
        put(image, clean / "train/apple/again.png")
    with Image.open(clean / "train/apple/p1.jpg") as image:
        put(image, clean / "train/pear/worse.jpg", quality=30)
    with Image.open(clean / "train/apple/p2.jpg") as image:
        put(image.rotate(90, expand=True), clean / "test/pear/turned.jpg")
    status, out, _ = run(clean, capsys)
    assert status == 1
    lines = out.splitlines()
    start = lines.index("2 images look like one in another split or class")
    found = {
        frozenset(line.removeprefix("  alike: ").split(", "))
        for line in lines[start + 1 : start + 3]
    }
    of_p0 = {"DIR/val/apple/smaller.jpg", "DIR/test/apple/as_png.png"}
    (group,) = (one for one in found if of_p0 <= one)
    assert group - of_p0 <= {"DIR/train/apple/p0.jpg", "DIR/train/apple/again.png"}
    assert len(group) >= 3
    assert {"DIR/train/apple/p1.jpg", "DIR/train/pear/worse.jpg"} in found


def test_what_is_passed_over_and_odd_names_are_told(clean, capsys):
    save(clean / "train/apple/7.gif", 50)
    save(clean / "train/pear/8.bmp", 51)
    (clean / "train/a\nb|c\udcff").mkdir()
    save(clean / "train/a\nb|c\udcff/1\n.png", 52)
    save(clean / "train/a\nb|c\udcff/2\n.png", 52)
    status, out, _ = run(clean, capsys)
    assert status == 0
    assert "passed over: 1 .bmp, 1 .gif; data.formats=all reads .bmp, .gif\n" in out
    assert r"| a\nb\|c\udcff |" in out
    assert r"  same bytes: DIR/train/a\nb|c\udcff/1\n.png, " in out
    status, out, _ = run(clean, capsys, "--formats", "all")
    assert "passed over" not in out
    assert "BMP (1)" in out
    assert "GIF (1)" in out


def test_a_single_class_is_a_fault(tmp_path, capsys):
    for i in range(20):
        save(tmp_path / f"one/a/{i}.png", i)
    status, out, _ = run(tmp_path / "one", capsys)
    assert status == 1
    assert "layout: DIR has one class, expected at least two, to tell apart\n" in out


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
        save(root / f"b/{i}.png", 20 + i)
    status, out, _ = run(root, capsys, "--val-fraction", "0.25", "--test-fraction", "0.4")
    assert status == 0
    assert "| all   |    18 |   6 |   16 |" in out
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
