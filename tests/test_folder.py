"""Folders of images: what is found, how it is split, and what is said of wrong layouts."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aim_flax.data.folder import MORE_SUFFIXES, passed_over, read_folder, survey
from aim_flax.data.images import load
from aim_flax.data.load import open_dataset, with_classes
from aim_flax.errors import UsageError
from tests.asserts import refused
from tests.runs import load as load_config


def make(root: Path, *paths: str) -> Path:
    """Makes files with their path as content; a path that ends in "/" is a folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).write_bytes(os.fsencode(path))
    return root


def contents(records) -> list[tuple[str, int]]:
    read = [records.read(i) for i in range(len(records))]
    assert [records.label(i) for i in range(len(records))] == [label for _, label in read]
    return [(encoded.decode(), label) for encoded, label in read]


def complaint(directory: Path, val_fraction: float = 0.0, test_fraction: float = 0.2) -> str:
    with pytest.raises(UsageError) as error:
        read_folder(directory, val_fraction, test_fraction)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(f"{directory}", "DIR")


def test_splits_as_they_are_sorted_by_class_and_name(tmp_path):
    make(
        tmp_path,
        *("train/b/2.jpg", "train/b/10.JPG", "train/a/x.png", "train/a/.hidden.jpg"),
        *("train/a/notes.txt", "train/.cache/c/1.jpg", "train/a/deeper/1.jpg", "README.md"),
        *("val/a/v.jpeg", "test/b/t.WebP", "test/a/t.gif.jpg"),
    )
    dataset = read_folder(tmp_path, 0.5, 0.5)
    assert dataset.classes == ("a", "b")
    assert list(dataset.splits) == ["train", "val", "test"]
    assert contents(dataset.splits["train"]) == [
        ("train/a/x.png", 0),
        ("train/b/10.JPG", 1),
        ("train/b/2.jpg", 1),
    ]
    assert contents(dataset.splits["val"]) == [("val/a/v.jpeg", 0)]
    assert contents(dataset.splits["test"]) == [("test/a/t.gif.jpg", 0), ("test/b/t.WebP", 1)]
    assert dataset.splits["test"].name(1) == str(tmp_path / "test/b/t.WebP")


def test_an_image_comes_out_as_it_was_saved(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    make(tmp_path, "train/a/", "test/a/1.png")
    Image.fromarray(pixels).save(tmp_path / "train/a/1.png")
    encoded, label = read_folder(tmp_path, 0, 0).splits["train"].read(0)
    np.testing.assert_array_equal(load(encoded, (5, 6, 3)), pixels)
    assert label == 0


def test_validation_is_held_out_of_train_by_class(tmp_path):
    paths = [f"train/{label}/{i:03}.jpg" for label, n in (("a", 40), ("b", 10)) for i in range(n)]
    make(tmp_path, *paths, "test/a/1.jpg")
    dataset = read_folder(tmp_path, 0.2, 0.5)
    assert list(dataset.splits) == ["train", "val", "test"]
    train, val = contents(dataset.splits["train"]), contents(dataset.splits["val"])
    assert sorted(path for path, _ in train + val) == paths
    assert np.bincount([label for _, label in val]).tolist() == [8, 2]
    assert contents(read_folder(tmp_path, 0.2, 0.5).splits["val"]) == val
    assert list(read_folder(tmp_path, 0, 0).splits) == ["train", "test"]


def test_class_folders_alone_are_split_in_three(tmp_path):
    paths = [f"{label}/{i:03}.jpg" for label, n in (("a", 50), ("b", 20)) for i in range(n)]
    make(tmp_path, *paths)
    dataset = read_folder(tmp_path, 0.25, 0.2)
    splits = {name: contents(records) for name, records in dataset.splits.items()}
    counts = {n: np.bincount([label for _, label in s]).tolist() for n, s in splits.items()}
    # A fifth of all, then a quarter of what is left.
    assert counts == {"train": [30, 12], "val": [10, 4], "test": [10, 4]}
    assert list(counts) == ["train", "val", "test"]
    assert sorted(path for split in splits.values() for path, _ in split) == paths
    # The test images don't depend on how many are held out for validation.
    assert contents(read_folder(tmp_path, 0, 0.2).splits["test"]) == splits["test"]
    assert list(read_folder(tmp_path, 0, 0.2).splits) == ["train", "test"]


def test_linked_class_folders_are_followed(tmp_path):
    make(tmp_path, "elsewhere/1.jpg", "data/train/", "data/test/a/1.jpg")
    (tmp_path / "data/train/a").symlink_to(tmp_path / "elsewhere")
    assert contents(read_folder(tmp_path / "data", 0, 0).splits["train"]) == [
        ("elsewhere/1.jpg", 0)
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/a/1.jpg", "val/a/1.jpg"], "DIR has train and val but no test, expected train, "),
        (["train/a/1.jpg"], "DIR has train but no test, "),
        (["test/a/1.jpg"], "DIR has test but no train, "),
        (["val/a/1.jpg"], "DIR has val but no train and no test, "),
        (
            ["train/a/1.jpg", "test/a/1.jpg", "valid/a/1.jpg"],
            "DIR/valid stands beside train and test, expected only train, val and test there"
            " (did you mean 'val'?)",
        ),
        (
            ["Train/a/1.jpg", "Test/a/1.jpg", "b/1.jpg"],
            "DIR/Test (did you mean 'test'?) has no images but folders, such as a, ",
        ),
        ([], "DIR has no images, expected .jpg, .jpeg, .png, .webp in a folder per class"),
        (["notes.txt"], "DIR has no images, "),
        (["1.jpg", "2.jpg"], "DIR/1.jpg lies directly in DIR, as do 1 more images, "),
        (["a/1.jpg", "2.jpg"], "DIR/2.jpg lies directly in DIR, expected images in a folder per"),
        (
            ["train/a/1.jpg", "train/2.jpg", "test/a/1.jpg"],
            "DIR/train/2.jpg lies directly in DIR/train, expected images in a folder per class",
        ),
        (["train/a/1.jpg", "test/"], "DIR/test has no class folders, expected one per class"),
        (
            ["train/a/1.jpg", "train/b/", "test/a/1.jpg"],
            "DIR/train/b is empty, expected .jpg, .jpeg, .png, .webp",
        ),
        (["train/a/1.jpg", "test/a/"], "DIR/test/a is empty, "),
        (
            ["train/a/1.jpg", "train/b/x.gif", "train/b/y.gif", "test/a/1.jpg"],
            "DIR/train/b has no images but 2 other files, such as x.gif, expected .jpg, ",
        ),
        (
            ["train/apple/1.jpg", "test/apple/1.jpg", "test/appel/1.jpg"],
            "DIR/test/appel is a class that DIR/train lacks (did you mean 'apple'?)",
        ),
        (
            ["train/a/1.jpg", "val/q/1.jpg", "test/a/1.jpg"],
            "DIR/val/q is a class that DIR/train lacks",
        ),
    ],
)
def test_wrong_layouts(tmp_path, paths, message):
    assert complaint(make(tmp_path, *paths)).startswith(message)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("validation", "val"),
        ("Valid", "val"),
        ("dev", "val"),
        ("training", "train"),
        ("tst", "test"),
    ],
)
def test_other_names_of_splits_are_told(tmp_path, name, meant):
    make(tmp_path, "train/a/1.jpg", "test/a/1.jpg", f"{name}/a/1.jpg")
    assert complaint(tmp_path).endswith(f"train, val and test there (did you mean {meant!r}?)")


def test_the_folder_that_is_meant_is_named(tmp_path):
    make(tmp_path, "dataset/train/a/1.jpg", "dataset/test/a/1.jpg", "notes.txt")
    assert (
        complaint(tmp_path)
        == "DIR has no train and test, but DIR/dataset has: expected that folder"
    )


def test_a_link_in_a_circle_is_named_and_the_rest_is_found(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg")
    for link in ("train/aa", "train/b/0.jpg"):
        (tmp_path / link).symlink_to(Path(link).name)
    dataset, problems = survey(tmp_path)
    reason = "can't be read: Too many levels of symbolic links"
    assert problems == [f"{tmp_path}/{link} {reason}" for link in ("train/aa", "train/b/0.jpg")]
    assert [path for path, _ in contents(dataset.splits["train"])] == [
        "train/a/1.jpg",
        "train/b/1.jpg",
    ]


OTHERS = ("a.gif", "b.GIF", "c.heic", "d.bmp", "e.txt", "Makefile", "deeper/1.jpg", ".hidden.gif")


def with_others(root: Path) -> Path:
    """Each class has an image, and what is none."""
    make(
        root,
        *(f"{split}/{c}/{name}" for split in ("train", "test") for c in "xy" for name in OTHERS),
    )
    make(root, *(f"{split}/{c}/1.jpg" for split in ("train", "test") for c in "xy"))
    os.symlink("nowhere", root / "train/x/link")
    os.mkfifo(root / "train/x/pipe.jpg")
    return root


def test_what_is_passed_over_is_counted(tmp_path):
    dataset = read_folder(with_others(tmp_path), 0, 0)
    assert dataset.passed_over == {
        ".bmp": 4,
        ".gif": 8,
        ".heic": 4,
        ".txt": 4,
        "broken links": 1,
        "folders within classes": 4,
        "pipes, sockets and devices": 1,
        "without a suffix": 4,
    }
    assert passed_over(dataset) == (
        "4 .bmp, 8 .gif, 4 .heic, 4 .txt, 1 broken links, 4 folders within classes, 1 pipes,"
        " sockets and devices, 4 without a suffix; data.formats=all reads .bmp, .gif"
    )


def test_a_run_says_once_what_is_passed_over(tmp_path, capsys):
    changes = [f"data.dir={with_others(tmp_path)}", "data.val_fraction=0", "eval.select_on=test"]
    for _ in range(2):
        open_dataset(load_config("image_folder_resnet50:control", changes))
    line = f"{tmp_path}: passed over 4 .bmp, 8 .gif, "
    assert [text[: len(line)] for text in capsys.readouterr().err.splitlines()] == [line]
    open_dataset(load_config("image_folder_resnet50:control", [*changes, "data.formats=all"]))
    assert "passed over 4 .heic" in capsys.readouterr().err


def test_images_beside_the_splits_are_counted(tmp_path):
    make(tmp_path, "train/a/1.jpg", "test/a/1.jpg", "contact_sheet.png", "2.jpg", "README.md")
    dataset = read_folder(tmp_path, 0, 0)
    assert passed_over(dataset) == "2 images beside train and test"
    assert [len(records) for records in dataset.splits.values()] == [1, 1]


def test_classes_that_a_split_lacks_are_told_once(tmp_path, capsys):
    labels = [f"c{i}\n" for i in range(9)]
    make(tmp_path, *(f"train/{label}/1.jpg" for label in labels))
    make(tmp_path, *(f"val/{label}/1.jpg" for label in labels[:2]))
    make(tmp_path, *(f"test/{label}/1.jpg" for label in labels[1:]))
    for _ in range(2):
        read_folder(tmp_path, 0, 0)
    assert capsys.readouterr().err == (
        f"{tmp_path}: val lacks 7 of 9 classes (c2\\n, c3\\n, c4\\n, c5\\n, c6\\n and 2 more);"
        " test lacks 1 of 9 classes (c0\\n); accuracy there is of the others\n"
    )


def test_classes_too_small_to_be_held_out_are_told(tmp_path, capsys):
    make(tmp_path, *(f"many/{i}.jpg" for i in range(20)), "few/1.jpg", "few/2.jpg")
    read_folder(tmp_path, 0.1, 0.4)
    lacking = "val lacks 1 of 2 classes (few); accuracy there is of the others"
    assert capsys.readouterr().err == f"{tmp_path}: {lacking}\n"
    read_folder(tmp_path, 0, 0.4)
    assert capsys.readouterr().err == ""


def test_all_formats_are_read_when_asked(tmp_path):
    pixels = np.full((6, 5, 3), 255, np.uint8)
    pixels[:3] = 0
    (tmp_path / "train/a").mkdir(parents=True)
    for suffix in MORE_SUFFIXES:
        image = Image.fromarray(pixels)
        if suffix in (".pbm", ".pgm"):
            image = image.convert({".pbm": "1", ".pgm": "L"}[suffix])
        image.save(tmp_path / f"train/a/{suffix[1:]}{suffix}")
    make(tmp_path, "test/a/1.jpg")
    records = read_folder(tmp_path, 0, 0, "all").splits["train"]
    assert len(records) == len(MORE_SUFFIXES)
    for i in range(len(records)):
        found = load(records.read(i)[0], (6, 5, 3)).astype(int)
        assert np.abs(found - pixels).max() <= 8, records.name(i)
    assert "data.formats=all reads .avif, .bmp" in complaint(tmp_path)


@pytest.mark.parametrize("how", ["file", "link"])
def test_a_pipe_keeps_nobody_waiting(tmp_path, how):
    """Also where it took the place of an image since."""
    make(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "test/a/1.jpg")
    records = read_folder(tmp_path, 0, 0).splits["train"]
    place = tmp_path / "train/a/1.jpg"
    place.unlink()
    os.mkfifo(tmp_path / "pipe" if how == "link" else place)
    if how == "link":
        place.symlink_to(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no file"):
        records.read(0)
    assert len(read_folder(tmp_path, 0, 0).splits["train"]) == 1


def test_names_may_hold_anything(tmp_path):
    odd = "a\nb \udcff $ 猫 🐈"
    make(tmp_path, f"train/{odd}/{odd}.jpg", f"test/{odd}/1.jpg", "train/b/1.jpg")
    dataset = read_folder(tmp_path, 0, 0)
    assert dataset.classes == (odd, "b")
    assert dataset.splits["train"].read(0)[1] == 0


def test_a_single_class_is_refused_in_training(tmp_path):
    make(tmp_path, "train/a/1.jpg", "test/a/1.jpg")
    with refused("^folder has one class, 'a', expected at least two, to be told apart$"):
        with_classes(
            load_config("image_folder_resnet50:control"), read_folder(tmp_path, 0, 0).classes
        )


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("grocerie", r"grocerie does not exist \(did you mean 'grocery'\?\)$"),
        ("missing/also", "missing/also does not exist$"),
        ("file", "file is a file, expected a folder of images"),
    ],
)
def test_a_folder_that_is_not_there(tmp_path, folder, message):
    make(tmp_path, "grocery/a/1.jpg", "file")
    with refused(message):
        read_folder(tmp_path / folder, 0, 0.2)


def test_fractions_out_of_range(tmp_path):
    make(tmp_path, *(f"a/{i}.jpg" for i in range(4)))
    assert complaint(tmp_path, val_fraction=1.0).startswith("val_fraction is 1.0, expected at lea")
    assert complaint(tmp_path, val_fraction=-0.1).startswith("val_fraction is -0.1, ")
    assert complaint(tmp_path, test_fraction=20).startswith("test_fraction is 20, ")
    assert complaint(tmp_path, test_fraction=float("nan")).startswith("test_fraction is nan, ")
    assert complaint(tmp_path, test_fraction=0) == (
        "test_fraction is 0, expected more: DIR has no folder test"
    )
    assert complaint(tmp_path, test_fraction=0.01) == (
        "test_fraction is 0.01, which is less than one image of any class of DIR"
    )
    assert complaint(tmp_path, val_fraction=0.01).startswith("val_fraction is 0.01, which is less")


def test_survey_tells_every_problem_and_still_finds_the_rest(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/", "train/0.jpg", "val/a/1.jpg", "val/q/1.jpg")
    dataset, problems = survey(tmp_path)
    assert len(problems) == 4
    assert "(3 more: python -m aim_flax.cli.inspect DIR)" in complaint(tmp_path)
    assert dataset.classes == ("a", "b", "q")
    assert contents(dataset.splits["val"]) == [("val/a/1.jpg", 0), ("val/q/1.jpg", 2)]
