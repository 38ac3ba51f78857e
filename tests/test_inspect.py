"""The inspection of a folder finds what a careful person would."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from aim_flax.cli import inspect
from aim_flax.data import images, inspection
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


def test_images_too_large_to_be_decoded_whole_are_compared_halved(clean, capsys, monkeypatch):
    """With a limit that makes small ones too large; a baseline JPEG costs 6 bytes a pixel."""
    large = photograph(0).resize((240, 200))
    differs = np.array(large)
    differs[90:98, 90:98] = 255 - differs[90:98, 90:98]
    one, other = clean / "train/apple/large.jpg", clean / "test/apple/large.jpg"
    put(large, one, quality=95)
    put(large, other, quality=95, optimize=True)
    put(Image.fromarray(differs), clean / "train/apple/differs.jpg", quality=95)
    monkeypatch.setattr(images, "MOST_BYTES", 5 * 240 * 200)
    status, out, err = run(clean, capsys)
    assert (status, err) == (1, "")
    assert "\n0 images can't be read\n1 image is there more than once, 1 of them in more" in out
    paths = "DIR/train/apple/large.jpg, DIR/test/apple/large.jpg"
    assert f"\n  same pixels at 1/2 of height and width: {paths}\n" in out
    assert out.splitlines()[-1].startswith("wrote ")
    # Where they fit, they are not halved.
    monkeypatch.setattr(images, "MOST_BYTES", 7 * 240 * 200)
    assert f"\n  same pixels: {paths}\n" in run(clean, capsys)[1]


def test_larger_images_are_told_apart_as_well_as_each_can_be(tmp_path, monkeypatch):
    """Two of three fit whole: they are other images there, and alike where the third is."""
    paths = [tmp_path / f"train/a/{name}.jpg" for name in ("one", "other", "scans")]
    flat = np.full((256, 256, 3), 128, np.uint8)
    rough = flat.copy()
    rough[100:108:2, 100:108:2], rough[101:108:2, 100:108:2] = 120, 136
    for path, pixels in zip(paths, (flat, rough, flat), strict=True):
        progressive = path == paths[2]
        put(Image.fromarray(pixels), path, quality=100, subsampling=0, progressive=progressive)
    (tmp_path / "test").mkdir()
    monkeypatch.setattr(images, "MOST_BYTES", int(6.1 * 256**2))
    findings = inspection.examine(survey(tmp_path)[0], 1, Console(stderr=True))
    assert [finding.halvings for finding in findings] == [0, 0, 3]
    lost = inspection.Lost()
    (group,) = inspection.duplicates(findings, lost)
    assert [finding.path for finding in group] == [str(path) for path in paths]
    paths[2].unlink()
    assert inspection.duplicates(findings, lost) == []
    assert lost == {str(paths[2]): "can't be read: No such file or directory"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (Path.unlink, "can't be read: No such file or directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "can't be read: it is no file"),
    ],
    ids=["gone", "damaged", "a pipe"],
)
def test_images_that_change_meanwhile_are_named(clean, capsys, monkeypatch, change, why):
    save(clean / "test/pear/copy.png", 10, 30, 40, compress_level=1)
    put(photograph(3), clean / "train/apple/photo.jpg")
    put(photograph(3).resize((60, 50)), clean / "test/pear/photo.jpg")
    changing = ("train/pear/0.png", "train/apple/photo.jpg", "train/apple/1.jpg")

    def examine(*arguments):
        findings = inspection.examine(*arguments)
        for path in changing:
            change(clean / path)
        return findings

    monkeypatch.setattr(inspect, "examine", examine)
    status, out, err = run(clean, capsys)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    start = lines.index("3 images can't be compared or drawn any more")
    assert sorted(lines[start + 1 : -1]) == sorted(f"  DIR/{path} {why}" for path in changing)
    assert "0 images are there more than once" in out
    assert lines[-1].startswith("wrote ")


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


def test_no_name_breaks_a_line(clean, capsys):
    (clean / "train/apple/notes.a\nb\x1b[31m").touch()
    sheet = clean.parent / "a\nsheet\x1b[2J.png"
    status, out, _ = run(clean, capsys, "--sheet", str(sheet))
    assert status == 0
    assert "\x1b" not in out
    assert "passed over: 1 .a\\nb\\x1b[31m\n" in out
    assert out.endswith("a\\nsheet\\x1b[2J.png\n")
    assert sheet.exists()


def test_the_sheet_is_written_whole_or_not_at_all(clean, capsys, monkeypatch):
    sheet = clean.parent / "sheet.png"
    sheet.write_bytes(b"an earlier one")

    def half(image, file, kind):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    status, _, err = run(clean, capsys)
    assert (status, err.count("\n")) == (1, 1)
    assert f"disk full while {clean.parent} was written to" in err
    assert sheet.read_bytes() == b"an earlier one"
    assert sorted(clean.parent.iterdir()) == sorted([clean, sheet])


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
    lost = inspection.Lost()
    sheet = np.asarray(inspection.contact_sheet(dataset.classes, findings, 3, lost))
    assert not lost
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
