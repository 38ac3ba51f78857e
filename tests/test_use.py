"""A run's network in use: the classes of images, as evaluation sees them."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from aim_flax import Predictor
from aim_flax.cli import predict as predict_command
from aim_flax.data.digits import load_digits
from aim_flax.data.images import load
from aim_flax.errors import DataError
from aim_flax.train import evaluate_run
from aim_flax.use import inputs, predict
from tests.asserts import fails, refused
from tests.photos import draw, encode, mlp, write_folder
from tests.runs import ROOT, digits, read_csv, read_json, write_run

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Larger than what the network takes, of other proportions, and none like the other."""
    folder = write_folder(tmp_path_factory.mktemp("photographs"), train=9, val=3, test=36)
    rng = np.random.default_rng(0)
    for file in sorted(folder.glob("test/*/*")):
        blocks = rng.integers(0, 2, (3, 5, 3)).astype(np.uint8) * 255
        file.write_bytes(encode(blocks.repeat(4, axis=0).repeat(4, axis=1)))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, photographs, standard_promotion, quick_compile):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    scaling = ("data.mean=(0.5,0.4,0.3)", "data.deviation=(0.9,1.2,1.1)")
    config = mlp(photographs, "data.fit=crop", "data.centre=0.8", *scaling, arm="aim")
    write_run(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.from_run(run)


def test_predictions_are_those_of_the_evaluation(run, photographs, predictor):
    evaluation = evaluate_run.evaluate_run(run, device_count=1)
    confusion = np.zeros((3, 3), int)
    for i, name in enumerate(predictor.classes):
        for file in (photographs / "test" / name).iterdir():
            prediction = predictor(file)
            confusion[i, predictor.classes.index(prediction.label)] += 1
            pixels = load(file.read_bytes(), (8, 8, 3), fit="crop", centre=0.8)
            x = ((pixels / 255 - (0.5, 0.4, 0.3)) / (0.9, 1.2, 1.1)).astype(np.float32)
            logits = predictor.model.apply(predictor.variables, x[None])
            expected = np.asarray(jax.nn.softmax(logits))[0]
            np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)
            assert prediction.probability == prediction.probabilities.max()
    np.testing.assert_array_equal(confusion, evaluation.confusion)
    assert (confusion.sum(axis=0) > 0).sum() > 1  # not the same for all


def test_the_directory_of_the_run_is_all_that_is_needed(run, photographs, predictor, tmp_path):
    away = shutil.copytree(run, tmp_path / "away")
    config = read_json(away / "config.json")
    config["data"]["dir"] = "nowhere"
    (away / "config.json").write_text(json.dumps(config))
    file = next((photographs / "test" / "class1").iterdir())
    there, here = predictor(file), Predictor.from_run(away)(file)
    np.testing.assert_array_equal(here.probabilities, there.probabilities)
    assert here.top() == there.top()
    assert here.classes == ("class0", "class1", "class2")

    (away / "dataset.json").unlink()
    with refused(
        "no dataset.json, .* nowhere does not exist.*; the command that trained it writes"
    ):
        Predictor.from_run(away)
    config["data"]["dir"] = str(photographs)
    (away / "config.json").write_text(json.dumps(config))
    assert Predictor.from_run(away).classes == ("class0", "class1", "class2")


def test_an_image_is_the_same_as_file_bytes_and_pixels(photographs, predictor):
    file = next((photographs / "test" / "class2").iterdir())
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    expected = predictor.pixels(file)
    assert (expected.shape, expected.dtype) == ((8, 8, 3), np.uint8)
    for same in (str(file), file.read_bytes(), image, np.asarray(image), image.convert("RGBA")):
        np.testing.assert_array_equal(predictor.pixels(same), expected)
    grey = np.full((9, 8), 7, np.uint8)
    for same in (grey, grey[..., None], image.convert("CMYK").resize((8, 8))):
        assert predictor.pixels(same).shape == (8, 8, 3)
    for wrong in (grey.astype(float), grey[None, ..., None, None], np.zeros((0, 3), np.uint8)):
        with refused("the image is .*, expected uint8 .height, width."):
            predictor.pixels(wrong)
    with refused("an image is a file, bytes, a Pillow image or an array, not 3"):
        predictor.pixels(3)
    with refused("nothing.png can't be read: No such file"):
        predictor("nothing.png")
    with refused("pixels are float32 .2, 8, 8, 3., expected uint8 .images, 8, 8, 3."):
        predictor.probabilities(np.zeros((2, 8, 8, 3), np.float32))


def test_top_is_in_order_and_ties_go_to_the_first_class():
    shares = np.array([0.1, 0.3, 0.2, 0.3, 0.1], np.float32)
    prediction = predict.Prediction.of(tuple("abcde"), shares)
    assert prediction.label == "b"
    assert [name for name, _ in prediction.top(4)] == ["b", "d", "c", "a"]
    assert prediction.top(9)[0] == ("b", pytest.approx(0.3))


def test_what_is_said_of_an_image_does_not_depend_on_those_beside_it(photographs, predictor):
    """Batches of 32, the last one filled up."""
    files = [str(file) for file in sorted(photographs.glob("test/*/*"))]
    found = list(predict.predictions(predictor, files, skip=False, threads=2))
    assert [one.file for one, _ in found] == files
    assert len(files) == 36
    for one, pixels in found[::5]:
        alone = predictor(one.file)
        np.testing.assert_array_equal(pixels, predictor.pixels(one.file))
        np.testing.assert_allclose(one.prediction.probabilities, alone.probabilities, atol=1e-6)


def test_digits_are_images_with_white_strokes(tmp_path, monkeypatch, capsys):
    """With the code of README and docs."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/digits_mlp-aim-0")
    write_run(digits(), run)
    predictor = Predictor.from_run(run)
    assert predictor.classes == tuple("0123456789")
    test = load_digits().splits["test"]
    for scan in test.images[:20]:
        # Of 256 values the dataset has 17.
        encoded = encode((scan * (255 / 16)).round().astype(np.uint8))
        np.testing.assert_array_equal(predictor.pixels(encoded), scan)
        np.testing.assert_array_equal(predictor.pixels(scan), scan)
    Path("scan.png").write_bytes(encoded)
    for page in ("README.md", "docs/use.md"):
        text = (ROOT / page).read_text()
        (code,) = re.findall(
            r"```python\n(from aim_flax import Predictor\n.*?)```", text, re.DOTALL
        )
        exec(compile(code, page, "exec"), {})
        assert capsys.readouterr().out == f"{predictor(scan).top()}\n"


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["b/2.jpg", "b/1.PNG", "b/.hidden.jpg", "b/.git/x.jpg", "b/notes.txt", "b/deep/3.webp"]
    for name in [*names, "a.tif", "[x].jpg"]:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("")
    os.mkfifo("b/pipe.jpg")
    assert inputs.find(["b"]) == ["b/1.PNG", "b/2.jpg", "b/deep/3.webp"]
    assert inputs.find(["a.tif", "b/2.jpg", "b"])[:3] == ["a.tif", "b/2.jpg", "b/1.PNG"]
    assert inputs.find(["b/*.jpg"]) == ["b/2.jpg"]
    assert inputs.find(["**/*.webp", "[x].jpg"]) == ["b/deep/3.webp", "[x].jpg"]
    Path("empty").mkdir()
    for place, message in {
        "a.tiff": "a.tiff does not exist .did you mean 'a.tif'",
        "no/such": "no/such does not exist$",
        "*.bmp": "no file matches '\\*.bmp'",
        "empty": "empty has no images, expected .jpg",
        "b/pipe.jpg": "b/pipe.jpg is no file and no folder",
    }.items():
        with refused(message):
            inputs.find(["b", place])


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path, monkeypatch, capsys):
    """As training and inspect do: two links to a folder are two folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("elsewhere/1.jpg", "elsewhere/deep/2.jpg", "photos/a/3.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")
    for link in ("photos/b", "photos/c"):
        Path(link).symlink_to("../elsewhere")
    linked = [f"photos/{name}/{file}" for name in "bc" for file in ("1.jpg", "deep/2.jpg")]
    assert inputs.find(["photos"]) == ["photos/a/3.jpg", *linked]
    assert capsys.readouterr().err == ""
    # To the folder itself, and by way of another one.
    Path("photos/a/again").symlink_to(".")
    Path("elsewhere/back").symlink_to("../photos")
    assert inputs.find(["photos"]) == ["photos/a/3.jpg", *linked]
    assert capsys.readouterr().err == "photos: passed over 3 links in a circle\n"
    # Two such links have more paths than can be walked.
    for pattern in ("photos/**/*.jpg", "photos/**/*", "p*s/**"):
        assert inputs.find([pattern]) == sorted(["photos/a/3.jpg", *linked])
        assert capsys.readouterr().err == f"{pattern}: passed over 3 links in a circle\n"
    assert inputs.find(["photos/a/again/*.jpg"]) == ["photos/a/again/3.jpg"]
    Path("photos/self").symlink_to("self")
    with refused("photos/self can't be read: Too many levels of symbolic links"):
        inputs.find(["photos"])


def test_what_folders_hold_besides_images_of_the_run_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for name in ("1.tif", "2.TIF", "3.gif", "notes.txt", ".hidden"):
        (tmp_path / "scans" / name).write_text("")
    counted = "passed over 1 .gif, 2 .tif, 1 .txt; patterns, such as '*.gif', take .gif, .tif"
    expected = "scans has no images, expected .jpg, .jpeg, .png, .webp"
    with refused(exactly=f"{expected}; {counted}"):
        inputs.find(["scans"])
    images = ["scans/1.tif", "scans/2.TIF", "scans/3.gif"]
    assert inputs.find(["scans"], "all") == images
    assert capsys.readouterr().err == "scans: passed over 1 .txt\n"
    assert inputs.find(["scans/*.tif"]) == images[:1]
    assert capsys.readouterr().err == ""
    Path("scans/4.jpg").symlink_to("nowhere")  # It is told when it is read, as in training.
    assert inputs.find(["scans"]) == ["scans/4.jpg"]
    assert capsys.readouterr().err == f"scans: {counted}\n"
    with refused("data.formats is 'al', .*did you mean 'all'"):
        inputs.find(["scans"], "al")


def test_predict_takes_the_formats_of_the_run(capsys, run, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "1.tif").write_bytes(encode(draw(1), "TIFF"))
    away = shutil.copytree(run, tmp_path / "away")
    config = read_json(away / "config.json")
    config["data"]["formats"] = "all"
    (away / "config.json").write_text(json.dumps(config))
    (line,) = lines_of(capsys, scans, "--workdir", away)
    assert line.startswith(f"{scans}/1.tif: class")
    line = fails(capsys, predict_command.main, str(scans), "--workdir", str(run))
    assert "has no images" in line


def test_a_line_says_so_where_the_run_does_not_name_its_classes(
    capsys, run, photographs, predictor, tmp_path
):
    away = shutil.copytree(run, tmp_path / "away")
    Predictor.from_run(away)
    assert capsys.readouterr().err == ""
    (away / "dataset.json").unlink()
    assert Predictor.from_run(away).classes == predictor.classes
    assert capsys.readouterr().err == (
        f"{away} has no dataset.json: its classes are named as in {photographs}, as that is now\n"
    )


def test_names_are_printed_on_one_line_and_written_as_they_are(
    capsys, photographs, predictor, tmp_path
):
    file, name = "line\nbreak.jpg", "=1+1\x1b[31m\n"
    prediction = predict.Prediction.of((name,), np.ones(1, np.float32))
    found = predict.Found(file, prediction)
    assert predict.line(found, 1) == r"line\nbreak.jpg: =1+1\x1b[31m\n 100.00%"
    predict.write_csv(tmp_path / "found.csv", [found], 1)
    with (tmp_path / "found.csv").open(newline="") as opened:
        assert list(csv.reader(opened))[1] == [file, name, "1.0"]

    damaged = tmp_path / file
    damaged.write_bytes(b"")
    whole = str(next((photographs / "test" / "class0").iterdir()))
    list(predict.predictions(predictor, [str(damaged), whole], skip=True, threads=1))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out: {tmp_path}/line\\nbreak.jpg ")


def lines_of(capsys, *argv) -> list[str]:
    predict_command.main(list(map(str, argv)))
    return capsys.readouterr().out.splitlines()


def test_predict_on_the_command_line(capsys, run, photographs, predictor, tmp_path):
    folder = photographs / "test" / "class1"
    places = [tmp_path / name for name in ("found.csv", "found.json", "sheet.png")]
    flags = [word for place in places for word in (f"--{place.suffix[1:]}", place)]
    flags[4] = "--sheet"
    lines = lines_of(capsys, folder, "--workdir", run, "--top", "2", *flags)
    files = sorted(map(str, folder.iterdir()))
    expected = [predictor(file) for file in files]
    shown = [", ".join(f"{name} {share:.2%}" for name, share in one.top(2)) for one in expected]
    assert lines == [f"{file}: {text}" for file, text in zip(files, shown, strict=True)]

    rows = read_csv(places[0])
    assert list(rows[0]) == ["image", "class", "probability", "class_2", "probability_2"]
    written = read_json(places[1])
    assert (written["name"], written["step"]) == ("digits_mlp", predictor.step)
    assert written["classes"] == ["class0", "class1", "class2"]
    for row, entry, file, one in zip(rows, written["images"], files, expected, strict=True):
        assert (row["image"], row["class"]) == (entry["image"], entry["class"]) == (file, one.label)
        assert float(row["probability"]) == entry["probability"]
        assert row["class_2"] == entry["top"][1]["class"] == one.top()[1][0]
        np.testing.assert_allclose(entry["probabilities"], one.probabilities, atol=1e-6)
    with Image.open(places[2]) as sheet:
        pixels = np.asarray(sheet)
    # Twelve images in rows of four, each on white.
    assert sheet.size == (4 * 120 + 8, 3 * 148 + 8)
    for i, file in enumerate(files):
        y, x = 8 + i // 4 * 148, 8 + i % 4 * 120
        seen = pixels[y : y + 112, x : x + 112][7::14, 7::14]
        np.testing.assert_array_equal(seen, predictor.pixels(file))
        assert (pixels[y + 112 : y + 140, x : x + 112] < 128).any()  # the text


def test_a_damaged_image_is_named_and_left_out_where_asked(
    capsys, run, photographs, predictor, tmp_path
):
    folder = Path(shutil.copytree(photographs / "test" / "class0", tmp_path / "images"))
    damaged = folder / "0003.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    out = tmp_path / "found.csv"
    out.write_text("kept")
    command = [str(folder), "--workdir", str(run), "--csv", str(out)]
    with pytest.raises(SystemExit) as end:
        predict_command.main(command)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{damaged} cannot be decoded: " in line
    assert line.endswith("(--on-error skip leaves such images out)")
    assert out.read_text() == "kept"
    predict_command.main([*command, "--on-error", "skip"])
    told, last = capsys.readouterr().err.splitlines()
    assert told.startswith(f"left out: {damaged} cannot be decoded")
    assert last == "11 images, 1 left out"
    assert len(read_csv(out)) == 11
    with pytest.raises(DataError, match="none of 1 images can be read"):
        list(predict.predictions(predictor, [str(damaged)], skip=True, threads=1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top", "0"], "--top is 0, expected at least 1"),
        (["--csv", "nowhere/x.csv"], "--csv is nowhere/x.csv, but there is no folder nowhere"),
        (["--json", "."], "--json is ., a folder, expected a file to write"),
        (["--csv", "x", "--json", "./x"], "--json is x, where another file is asked for"),
        (["--checkpoint", "7"], "no checkpoint of step 7"),
        (["--on-error", "skipp"], "invalid choice: 'skipp'"),
        (["nowhere.jpg"], "nowhere.jpg does not exist"),
    ],
)
def test_wrong_use_of_predict_is_one_line(
    capsys, run, photographs, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    line = fails(
        capsys, predict_command.main, str(photographs / "test"), "--workdir", str(run), *flags
    )
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_shows_long_and_odd_names(tmp_path):
    from aim_flax.use import sheet

    names = ("a" * 300, "line\nbreak", os.fsdecode(b"\xff"))
    for name in names:
        prediction = predict.Prediction.of((name,), np.ones(1, np.float32))
        drawn = sheet.draw([sheet.thumbnail(draw(1, (40, 20)))], [prediction])
        assert drawn.size == (128, 156)
        beside = np.asarray(drawn)[:, 121:]
        assert (beside == 255).all()  # nothing beyond its place
        sheet.write(tmp_path / "sheet.png", drawn)
