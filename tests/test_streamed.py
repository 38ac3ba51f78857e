"""Images that stream through the host: the same batches however they are loaded."""

import contextlib
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from aim_flax import config as configs
from aim_flax.data import dataset
from aim_flax.data.digits import load_digits
from aim_flax.data.load import decode_if_small, load_dataset, open_dataset
from aim_flax.data.records import EncodedDataset
from aim_flax.data.scaling import Scaling
from aim_flax.data.streamed import Streamed
from aim_flax.devices import Devices
from aim_flax.errors import DataError
from aim_flax.train import loop
from aim_flax.train.evaluate_run import evaluate_run
from aim_flax.train.workdir import held
from tests.asserts import assert_close, assert_equal, refused
from tests.photos import Photos, folder, write_folder
from tests.processes import after_calls, interrupted
from tests.runs import assert_same_end, history, read_json

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

SHAPE = (8, 8, 3)
AUGMENT = {"crop": 0.5, "rotation": 0.1, "translation": 0.1, "flip_horizontal": True}
KINDS = ("pmap", "shard_map")


def streamed(splits=None, threads: int = 2, on_error: str = "stop", classes: int = 3) -> Streamed:
    splits = splits or {"train": Photos(21), "test": Photos(13, seed=100)}
    names = tuple("abcdef"[:classes])
    return Streamed(EncodedDataset(names, splits), SHAPE, threads, on_error=on_error)


def train_batches(dataset, seed, start, stop, count=1, kind="pmap", augmentation=None, size=8):
    """The training batches as the devices see them, in the order of their rows."""
    devices = Devices(kind, count)
    batches = dataset.train_batches(devices, size, Scaling(255.0), augmentation)

    def on_device(data, seed, step):
        images, labels = batches.on_device(data, seed, step)(step)
        return jax.lax.all_gather((images, labels), "batch", tiled=True)

    call = devices.map(on_device, sharded=(0,) if batches.sharded else ())
    feed = batches.feed(seed, start, stop)
    found = []
    for step in range(start, stop):
        data = feed.at(step)
        keys = devices.replicate((np.uint32(seed), np.int32(step)))
        found.append(devices.fetch(call(data, *keys)))
    feed.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 8])
def test_batches_are_those_of_the_same_images_in_memory(tmp_path, kind, count):
    config = folder(write_folder(tmp_path))
    in_memory = load_dataset(config)
    by_host = load_dataset(configs.override(config, ["data.in_memory_mb=0.0"]))
    assert not in_memory.train_batches(Devices(kind, count), 8, Scaling(255.0), None).sharded
    assert by_host.train_batches(Devices(kind, count), 8, Scaling(255.0), None).sharded
    assert_equal(*(train_batches(data, 3, 5, 9, count, kind) for data in (in_memory, by_host)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_depend_on_seed_and_step_alone(threads):
    """The middle of an epoch, its end and the next one; two whole batches in an epoch of 21."""
    reference = train_batches(streamed(), 7, 0, 6, augmentation=AUGMENT)
    assert_equal(
        train_batches(streamed(threads=threads), 7, 3, 6, augmentation=AUGMENT), reference[3:]
    )
    others = [train_batches(streamed(), seed, 0, 2, augmentation=AUGMENT) for seed in (7, 8)]
    assert (others[0][0][0] != others[1][0][0]).any()
    assert (reference[0][0] != reference[1][0]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 8])
def test_devices_share_the_same_batches(kind, count):
    with_contrast = AUGMENT | {"contrast": 0.3}
    reference = train_batches(streamed(), 1, 1, 3, augmentation=with_contrast)
    shared = train_batches(streamed(), 1, 1, 3, count, kind, with_contrast)
    assert_close(shared, reference, 1e-6)
    assert_equal([labels for _, labels in shared], [labels for _, labels in reference])


def test_epoch_visits_each_image_at_most_once():
    batches = train_batches(streamed({"train": Photos(24), "test": Photos(3)}), 0, 3, 6)
    images = np.concatenate([images for images, _ in batches])
    assert len(np.unique(images.reshape(24, -1), axis=0)) == 24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (5, 8), (64, 2)])
def test_evaluation_counts_each_image_once(kind, batch_size, count):
    devices = Devices(kind, count)
    batches = streamed().eval_batches(devices, "test", batch_size, Scaling(1.0))

    def on_device(data):
        return jax.lax.all_gather(batches.on_device(data, 0), "batch", tiled=True)

    call = devices.map(on_device, sharded=(0,))
    found = [devices.fetch(call(data)) for data in batches]
    images, labels, counted, left_out = (
        np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    assert counted.sum() == batches.examples == 13
    assert not left_out.any()
    photos = Photos(13, seed=100)
    np.testing.assert_array_equal(labels[counted], photos.labels)
    dataset = Streamed(EncodedDataset(("a", "b", "c"), {"test": photos}), SHAPE, threads=1)
    expected = np.stack([dataset.read_one("test", i)[0] for i in range(13)])
    np.testing.assert_array_equal(images[counted], expected)


DAMAGE = {
    "truncated": lambda encoded: encoded[:-60],
    "garbage": lambda encoded: b"no image at all" * 20,
    "empty": lambda encoded: b"",
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("threads", [1, 4])
def test_damaged_image_stops_and_is_named(kind, threads):
    photos = Photos(21)
    photos.encoded[9] = DAMAGE[kind](photos.encoded[9])
    dataset = streamed({"train": photos, "test": photos}, threads)
    with refused(r"^photo 9 .*data.on_error=skip leaves", kind=DataError):
        train_batches(dataset, 0, 0, 4)
    with refused(r"^photo 9 ", kind=DataError):
        list(dataset.eval_batches(Devices("pmap", 1), "test", 8, Scaling(1.0)))


def test_damaged_image_is_replaced_in_training_and_left_out_of_evaluation(capsys):
    photos = Photos(120)
    photos.encoded[9] = b""
    dataset = streamed({"train": photos, "test": photos}, on_error="skip")
    batches = train_batches(dataset, 0, 0, 15)
    images = np.concatenate([images for images, _ in batches]).reshape(120, -1)
    distinct, counts = np.unique(images, axis=0, return_counts=True)
    assert len(distinct) == 119
    assert sorted(counts)[-2:] == [1, 2]
    evaluation = dataset.eval_batches(Devices("pmap", 1), "test", 50, Scaling(1.0))
    status = [(b["counted"], b["left_out"]) for b in evaluation]
    counted, left_out = (
        np.concatenate([np.ravel(x) for x in s]) for s in zip(*status, strict=True)
    )
    assert counted.sum() == 119
    assert left_out.sum() == 1
    assert left_out[9]
    assert dataset.skipped == {"train": {9}, "test": {9}}
    assert capsys.readouterr().err == "left out: photo 9 is empty\n" * 2


def test_more_than_one_in_a_hundred_stops():
    photos = Photos(120)
    photos.encoded[9] = photos.encoded[77] = b""
    dataset = streamed({"train": photos, "test": photos}, on_error="skip")
    message = (
        r"^2 of 120 images of the split 'train' can't be read, more than 1%; the last one: photo"
    )
    with refused(message, kind=DataError):
        train_batches(dataset, 0, 0, 15)


def test_label_out_of_range_is_named():
    with refused("photo [258].* has the label 2, expected 0 to 1", kind=DataError):
        train_batches(streamed(classes=2), 0, 0, 2)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photographs"))


@pytest.mark.slow
def test_streamed_run_learns_as_the_one_in_memory(tmp_path, photographs):
    config = folder(photographs, "augment.crop=0", "augment.flip_horizontal=false")
    summaries = {}
    for name, megabytes in (("memory", "100.0"), ("streamed", "0.0")):
        limited = configs.override(config, [f"data.in_memory_mb={megabytes}"])
        summaries[name] = loop.run(limited, tmp_path / name, 1, quiet=True)
    losses = [history(tmp_path / name)["train_loss"] for name in summaries]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for summary in summaries.values():
        assert summary["test_examples"] == 21
        assert summary["skipped_images"] == 0
        assert 0 <= summary["data_wait_share"] <= 1


@pytest.mark.slow
def test_interrupted_streamed_run_goes_on_bit_equal(tmp_path, photographs):
    """In mid-epoch, and with another number of threads."""
    config = folder(photographs, "data.in_memory_mb=0.0", "data.threads=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run(config, whole, 1, quiet=True)
    with interrupted(9, "saved at step 10"):
        loop.run(config, parts, 1, quiet=True)
    loop.run(configs.override(config, ["data.threads=3"]), parts, 1, quiet=True)
    assert_same_end(whole, parts)


def streaming(directory: Path, *assignments: str):
    return folder(directory, "data.in_memory_mb=0.0", *assignments)


@contextmanager
def damaged(file: Path):
    """Damages an image, and repairs it at the end."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    yield
    file.write_bytes(whole)


def trained_at(config, step: int) -> Path:
    """Returns the first image that a step of the first epoch takes."""
    dataset = open_dataset(config)
    batches = dataset.train_batches(Devices("pmap", 1), config.train.batch_size, 255.0, None)
    first = np.asarray(batches.order(config.seed, 0))[step * config.train.batch_size]
    return Path(dataset._splits["train"].name(int(first)))


@pytest.mark.slow
@pytest.mark.parametrize("compared", [False, True])
def test_run_stops_at_a_damaged_validation_image_and_loses_nothing(tmp_path, compared):
    """The epoch is trained, and evaluated once its images can be read; the end is the same."""
    config = streaming(write_folder(tmp_path / "photographs"))
    said = "val/class1/0004.png cannot be decoded: .*; saved at step 7, the same command continues"
    with damaged(tmp_path / "photographs/val/class1/0004.png"):
        for _ in range(2):
            with refused(said, kind=DataError):
                loop.run(config, tmp_path / "run", 1, quiet=True)
    steps = []
    with after_calls(lambda experiment, step, metrics: steps.append(step)):
        loop.run(config, tmp_path / "run", 1, quiet=True)
    assert steps == list(range(7, 14))
    assert len(history(tmp_path / "run")["epoch"]) == 2
    if compared:
        loop.run(config, tmp_path / "undamaged", 1, quiet=True)
        assert_same_end(tmp_path / "run", tmp_path / "undamaged")


@pytest.mark.slow
def test_a_damaged_training_image_stops_each_start_and_may_then_be_left_out(tmp_path, capsys):
    config = streaming(write_folder(tmp_path / "photographs"), "train.checkpoint_minutes=0")
    file, run = trained_at(config, 5), tmp_path / "run"
    with damaged(file):
        for _ in range(2):
            # Two batches are on their way to the devices.
            with refused(r" cannot be decoded: .*; saved at step 3, the same", kind=DataError):
                loop.run(config, run, 1, quiet=True)
        skipping = configs.override(config, ["data.on_error=skip"])
        summary = loop.run(skipping, run, 1, quiet=True)
        assert (summary["epochs"], summary["skipped_images"]) == (2, 1)
        change = {"after_step": 3, "key": "data.on_error", "from": "stop", "to": "skip"}
        assert read_json(run / "config_changes.json") == [change]
        saved = read_json(run / "config.json")
        assert saved["data"]["on_error"] == "skip"
        # In every other way it is still the run that it was.
        with refused("another config, which differs in train.batch_size "):
            loop.run(configs.override(skipping, ["train.batch_size=4"]), run, 1, quiet=True)
    assert f"left out: {file} cannot be decoded" in capsys.readouterr().err


@pytest.mark.slow
def test_a_start_that_fails_leaves_the_workdir_to_another(tmp_path, capsys):
    config = streaming(write_folder(tmp_path / "photographs"), "train.epochs=1")
    other = configs.override(config, ["train.batch_size=12"])
    with damaged(trained_at(config, 0)), refused(r"0 leaves such|skip leaves", kind=DataError):
        loop.run(config, tmp_path / "run", 1, quiet=True)
    assert not list(tmp_path.glob("run/checkpoints/*/"))
    with held(tmp_path / "run"), refused("another process is at work in"):
        loop.run(other, tmp_path / "run", 1, quiet=True)
    assert read_json(tmp_path / "run/config.json")["train"]["batch_size"] == 8
    summary = loop.run(other, tmp_path / "run", 1, quiet=True)
    assert summary["steps"] == 5
    assert read_json(tmp_path / "run/config.json")["train"]["batch_size"] == 12
    assert "a start with another config saved nothing" in capsys.readouterr().out
    with refused(r"another config, which differs in train.batch_size \(12 there, 8 here\)"):
        loop.run(config, tmp_path / "run", 1, quiet=True)


@pytest.mark.parametrize(
    ("count", "damage", "message"),
    [(43, 1, None), (43, 2, "2 of 43 images of .* more than 1%"), (1, 1, "no image of the split")],
)
def test_one_image_of_few_may_be_left_out(count, damage, message):
    photos = Photos(count)
    photos.encoded[:damage] = [b""] * damage
    config = folder(Path("unused"), "data.in_memory_mb=1")
    for evaluate in (
        lambda data: list(data.eval_batches(Devices("pmap", 1), "test", 8, 1.0)),
        lambda data: decode_if_small(data, config),
    ):
        data = streamed({"train": Photos(8), "test": photos}, on_error="skip")
        with refused(message, kind=DataError) if message else contextlib.nullcontext():
            evaluate(data)


def test_images_left_out_by_an_earlier_process_are_counted(capsys):
    """A run that goes on knows their numbers, and not what was wrong with them."""
    photos = Photos(120)
    photos.encoded[9] = photos.encoded[77] = b""
    dataset = streamed({"train": photos, "test": photos}, on_error="skip")
    dataset.skipped["train"].add(99)
    message = "more than 1%; the last one: photo (9|77) is empty"
    with refused(message, kind=DataError):
        train_batches(dataset, 0, 0, 15)


@pytest.mark.parametrize("megabytes", ["0.0", pytest.param("100.0", marks=pytest.mark.slow)])
def test_skipped_images_are_in_the_summary(tmp_path, megabytes, capsys):
    directory = write_folder(tmp_path / "photographs", train=102, test=120)
    (directory / "test" / "class0" / "0000.png").write_bytes(b"")
    (directory / "train" / "class1" / "0001.png").write_bytes(b"garbage")
    config = folder(
        directory, f"data.in_memory_mb={megabytes}", "data.on_error=skip", "train.epochs=1"
    )
    summary = loop.run(config, tmp_path / "run", 1, quiet=True)
    assert summary["skipped_images"] == 2
    assert summary["test_examples"] == 119
    evaluation = evaluate_run(tmp_path / "run", device_count=1)
    assert evaluation.count == 119
    assert capsys.readouterr().err.count("test/class0/0000.png is empty") == 2


@pytest.mark.slow
def test_dataset_moved_elsewhere_is_found_by_a_flag(tmp_path, photographs):
    config = folder(photographs, "train.epochs=1")
    loop.run(config, tmp_path / "run", 1, quiet=True)
    moved = write_folder(tmp_path / "moved")
    evaluation = evaluate_run(tmp_path / "run", "best", "test", 1, [f"data.dir={moved}"])
    assert evaluation.count == 21
    again = configs.override(config, [f"data.dir={moved}"])
    assert loop.run(again, tmp_path / "run", 1, quiet=True)["test_examples"] == 21


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["data.train_images=61"], "data.train_images is 61, expected 1 to 60, or None for all"),
        (["data.name=folders"], r"data.name is 'folders', .*did you mean 'folder'"),
        (["data.dir="], "data.dir is empty, expected a folder"),
        (["data.fit=croop"], "data.fit is 'croop', .*did you mean 'crop'"),
        (["data.on_error=go"], "data.on_error is 'go', expected one of stop, skip"),
        (["data.threads=0"], "data.threads is 0, expected 1 to 1,024"),
        (["data.image_shape=(8,8,4)"], "expected height, width, and 3 channels or 1"),
        (["model.num_classes=7"], "num_classes is 7, but folder has 3 classes"),
    ],
)
def test_wrong_data_options_are_one_line(photographs, assignments, message, tmp_path):
    with refused(message):
        loop.run(folder(photographs, *assignments), tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


def test_subset_of_the_training_images_is_the_same_for_each_seed(photographs):
    whole = load_dataset(folder(photographs)).splits
    subsets = [
        load_dataset(folder(photographs, "data.train_images=20", f"seed={seed}")).splits
        for seed in (0, 1)
    ]
    assert [len(subsets[0][name]) for name in ("train", "val", "test")] == [20, 12, 21]
    np.testing.assert_array_equal(subsets[0]["train"].images, subsets[1]["train"].images)
    available = {image.tobytes() for image in whole["train"].images}
    chosen = {image.tobytes() for image in subsets[0]["train"].images}
    assert len(chosen) == 20
    assert chosen < available


def test_evaluation_batches_mix_the_classes(photographs):
    """In batches of one class, as folders go by class, another image's memory would tell it."""
    first, again = (
        load_dataset(folder(photographs, f"seed={seed}")).splits["test"] for seed in (0, 1)
    )
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.images, again.images)
    assert np.bincount(first.labels).tolist() == [7, 7, 7]
    assert sorted(set(first.labels[:7])) == [0, 1, 2]


def test_images_are_decoded_up_to_the_limit(photographs):
    """93 images of 192 bytes: 17,856 bytes."""
    for megabytes, kind in ((17_856 / 2**20, "InMemory"), (17_855 / 2**20, "Streamed")):
        config = folder(photographs, f"data.in_memory_mb={megabytes}")
        assert type(decode_if_small(open_dataset(config), config)).__name__ == kind


def test_datasets_and_their_batches_satisfy_the_protocols():
    devices = Devices("pmap", 1)
    for data in (load_digits(), streamed()):
        train = data.train_batches(devices, 4, Scaling(16.0), None)
        evaluation = data.eval_batches(devices, "test", 4, Scaling(16.0))
        with closing(train.feed(0, 0, 1)) as feed:
            assert isinstance(feed, dataset.Feed)
        assert isinstance(data, dataset.Dataset)
        assert isinstance(train, dataset.TrainBatches)
        assert isinstance(evaluation, dataset.EvalBatches)
