"""TFDS datasets: real prepared files, written here without TensorFlow."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from aim_flax.data.images import load
from aim_flax.data.streamed import Streamed
from aim_flax.data.tfds_records import read_tfds
from aim_flax.errors import DataError
from tests.asserts import refused
from tests.photos import encode

CLASSES = ["cat", "dog", "owl"]
PHOTO = {
    "image": tfds.features.Image(),
    "label": tfds.features.ClassLabel(names=CLASSES),
    "file_name": tfds.features.Text(),
}


def write(folder, features, splits, name="photos", version="1.0.0"):
    """Prepares a dataset; `splits` are lists of examples."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(of) for split, of in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    Builder.name = name
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    Builder(data_dir=folder).download_and_prepare(
        file_format="array_record", download_config=config
    )
    return str(folder)


def photographs(count: int) -> list[dict]:
    """Images of different sizes with 1, 3 and 4 channels; the last is a JPEG stored sideways."""
    rng = np.random.default_rng(count)
    examples = []
    for i in range(count):
        channels = [(), (3,), (4,)][i % 3]
        pixels = rng.integers(0, 256, (6 + i, 8, *channels), np.uint8)
        examples.append(
            {"image": encode(pixels), "label": i % len(CLASSES), "file_name": f"{count}-{i}.png"}
        )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sideways = np.repeat(np.array([[0], [255]], np.uint8), 16, 1).repeat(8, 0)
    examples[-1]["image"] = encode(sideways, "JPEG", quality=100, exif=exif)
    return examples


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Returns a data folder and the examples of its dataset, by file name."""
    splits = {"train": photographs(12), "validation": photographs(3), "test": photographs(4)}
    # Masks aren't read: these are no images, so decoding one would fail.
    folder = write(
        tmp_path_factory.mktemp("photos"),
        PHOTO | {"mask": tfds.features.Image()},
        {split: [e | {"mask": b"no image"} for e in of] for split, of in splits.items()},
    )
    return folder, splits


def test_records_are_what_was_written(photos):
    folder, splits = photos
    dataset = read_tfds("photos", folder, val_fraction=0.5)
    assert dataset.classes == tuple(CLASSES)
    assert {s: len(of) for s, of in dataset.splits.items()} == dict(train=12, test=4, val=3)
    for split, tfds_split in (("train", "train"), ("val", "validation"), ("test", "test")):
        records = dataset.splits[split]
        written = {e["file_name"]: (e["image"], e["label"]) for e in splits[tfds_split]}
        read = {}
        for i in range(len(records)):
            title, _, name = records.name(i).rstrip(")").rpartition(" (")
            assert title == f"photos {tfds_split}, record {i}"
            read[name] = records.read(i)
        assert read == written
        assert all(type(label) is int for _, label in read.values())


def test_pixels_are_exact_and_upright(photos):
    folder, splits = photos
    dataset = read_tfds("photos", folder, val_fraction=0)
    records = dataset.splits["train"]
    order = {records.name(i).rpartition(" ")[2]: i for i in range(len(records))}
    rgb = splits["train"][1]
    pixels, label = Streamed(dataset, (7, 8, 3), threads=1).read_one("train", order["(12-1.png)"])
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(rgb["image"]))))
    assert label == rgb["label"]
    # Stored: black above white. Turned by 90 degrees clockwise: black on the right.
    encoded, _ = records.read(order["(12-11.png)"])
    np.testing.assert_array_equal(load(encoded, (16, 16, 1))[:, 0, 0], 255)
    np.testing.assert_array_equal(load(encoded, (16, 16, 1))[:, 15, 0], 0)


def test_threads_read_the_same_as_one(photos):
    folder, _ = photos
    records = read_tfds("photos", folder, val_fraction=0).splits["train"]
    alone = [records.read(i) for i in range(12)]
    assert [records.label(i) for i in range(12)] == [label for _, label in alone]
    fresh = read_tfds("photos", folder, val_fraction=0).splits["train"]
    order = np.random.default_rng(0).integers(12, size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fresh.read, order))
    assert together == [alone[i] for i in order]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """Returns a folder with a small dataset that has CIFAR-10's name, version and features."""
    rng = np.random.default_rng(0)
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=names),
    }

    def examples(split, count):
        return [
            {
                "id": f"{split}_{i:05}",
                "image": encode(rng.integers(0, 256, (32, 32, 3), np.uint8)),
                "label": i % 10,
            }
            for i in range(count)
        ]

    splits = {"train": examples("train", 40), "test": examples("test", 10)}
    return write(tmp_path_factory.mktemp("cifar"), features, splits, "cifar10", "3.0.2")


@pytest.mark.parametrize("name", ["cifar10", "cifar10:3.0.2", "cifar10:3.*.*"])
def test_a_dataset_of_tfds_by_name_and_version(cifar10, name):
    dataset = read_tfds(name, cifar10, val_fraction=0.25)
    assert dataset.classes[:3] == ("airplane", "automobile", "bird")
    assert {s: len(of) for s, of in dataset.splits.items()} == {"train": 30, "val": 10, "test": 10}
    names = {split: [of.name(i) for i in range(len(of))] for split, of in dataset.splits.items()}
    assert names["test"][0].startswith(f"{name} test, record 0 (test_0")
    held, kept = set(names["val"]), set(names["train"])
    assert (len(kept), len(held), kept & held) == (30, 10, set())
    again = read_tfds(name, cifar10, val_fraction=0.25).splits["val"]
    assert [again.name(i) for i in range(10)] == names["val"]


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        (dict(train=8, test=4), 0.25, dict(train=6, test=4, val=2)),
        (dict(train=8, test=4), 0, dict(train=8, test=4)),
        (dict(train=8, validation=3, test=4), 0.25, dict(train=8, test=4, val=3)),
        (dict(train=8, val=3, test=4, extra=5), 0, dict(train=8, test=4, val=3)),
        # As ImageNet: its test split has no labels, so the validation split tests.
        (dict(train=8, validation=3), 0.25, dict(train=6, test=3, val=2)),
        (dict(train=8, validation=3), 0, dict(train=8, test=3)),
        (dict(train=8), 0.25, "has the splits train, expected train and one of test, validation"),
        (dict(train=8, test=4), 0.01, "0.01 of photos's 8 training examples is none"),
    ],
)
def test_splits(tmp_path, sizes, fraction, expected):
    folder = write(tmp_path, PHOTO, {split: photographs(n) for split, n in sizes.items()})
    if isinstance(expected, str):
        with refused(expected):
            read_tfds("photos", folder, fraction)
    else:
        splits = read_tfds("photos", folder, fraction).splits
        assert {split: len(records) for split, records in splits.items()} == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifer10", "TFDS has no dataset 'cifer10' (did you mean 'cifar10'?)"),
        ("imagenette/322px", "imagenette has no config '322px' (did you mean '320px'?)"),
        ("cifar10/big", "cifar10 has no config 'big'"),
        ("cifar10:9.9.9", "Dataset cifar10 cannot be loaded at version 9.9.9, only: 3.0.2."),
        ("../cifar10", "dataset name '../cifar10', expected NAME[/CONFIG][:VERSION]"),
        ("huggingface:mnist", "dataset name 'huggingface:mnist', expected NAME[/CONFIG][:VERSION]"),
        (
            "imagenette/320px",
            "imagenette/320px is not prepared in {0}/imagenette/320px/1.0.0; to prepare it:"
            " python -m aim_flax.cli.prepare imagenette/320px --data_dir {0}",
        ),
    ],
)
def test_names_that_cannot_be_read_are_one_line(tmp_path, name, message):
    with refused(exactly=message.format(tmp_path)):
        read_tfds(name, str(tmp_path), 0.1)
    assert list(tmp_path.iterdir()) == []


def test_other_formats_and_missing_files_are_one_line(tmp_path):
    folder = write(tmp_path, PHOTO, {"train": photographs(3), "test": photographs(3)})
    prepared = tmp_path / "photos" / "1.0.0"
    command = f"python -m aim_flax.cli.prepare photos --data_dir {folder}"

    (shard,) = prepared.glob("*test*")
    shard.rename(tmp_path / "away")
    with refused(exactly=f"{shard} is missing; move {prepared} away and run: {command}"):
        read_tfds("photos", folder, 0)

    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    message = f"photos is prepared in {prepared} as tfrecord, expected array_record; move that"
    with refused(exactly=f"{message} folder away and run: {command}"):
        read_tfds("photos", folder, 0)


@pytest.mark.parametrize(
    ("features", "example", "message"),
    [
        (
            {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)},
            {"text": "a", "label": 0},
            r"photos has the features label \(ClassLabel\), text \(Text\), expected image \(Image",
        ),
        (
            PHOTO | {"image": tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8)},
            {"image": np.zeros((2, 2, 3), np.uint8), "label": 0, "file_name": ""},
            r"image \(Tensor\), label \(ClassLabel\), expected image \(Image\) and label",
        ),
        (
            PHOTO | {"label": tfds.features.Scalar(np.int64)},
            {"image": encode(np.zeros((2, 2, 3), np.uint8)), "label": 0, "file_name": ""},
            r"label \(Scalar\), expected image \(Image\) and label \(ClassLabel\)",
        ),
    ],
)
def test_datasets_of_another_kind_are_one_line(tmp_path, features, example, message):
    folder = write(tmp_path, features, {"train": [example], "test": [example]})
    with refused(message):
        read_tfds("photos", folder, 0)


def test_a_label_that_is_no_class_names_its_record(tmp_path):
    # As TFDS stores what has no label.
    unlabelled = photographs(3)[0] | {"label": -1}
    folder = write(tmp_path, PHOTO, {"train": photographs(3), "test": [unlabelled]})
    dataset = Streamed(read_tfds("photos", folder, 0), (8, 8, 3), threads=1)
    message = "photos test, record 0 (3-0.png) has the label -1, expected 0 to 2"
    with refused(exactly=message, kind=DataError):
        dataset.read_one("test", 0)


def test_a_file_cut_short_is_told_by_record(tmp_path):
    folder = write(tmp_path, PHOTO, {"train": photographs(3), "test": photographs(3)})
    (shard,) = (tmp_path / "photos" / "1.0.0").glob("*test*")
    shard.write_bytes(shard.read_bytes()[:65536])
    dataset = Streamed(read_tfds("photos", folder, 0), (8, 8, 3), threads=1)
    with refused("photos test, record 1 can't be read: ", kind=DataError):
        dataset.read_one("test", 1)


def test_reading_needs_no_tensorflow_and_is_silent(photos):
    folder, _ = photos
    program = (
        "import sys; from aim_flax.data.tfds_records import read_tfds;"
        f"records = read_tfds('photos', {folder!r}, 0.1).splits['train'];"
        "records.read(3), records.name(3);"
        "sys.exit('tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
