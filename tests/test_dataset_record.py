"""A run knows its data: its classes, and which images it was trained on."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from aim_flax import config as configs
from aim_flax.cli import evaluate as evaluate_command
from aim_flax.data.fingerprint import Change, Fingerprint, changes
from aim_flax.data.load import load_dataset, open_dataset
from aim_flax.study import record
from aim_flax.study import run as studies
from aim_flax.study.plan import plan
from aim_flax.train import dataset_record, loop
from aim_flax.train.workdir import default_workdir
from tests.asserts import fails, refused
from tests.photos import DIGITS, draw, encode, mlp, write_folder
from tests.runs import digits, load, read_json, snapshot

NAME = Path(sys.argv[0]).name  # how errors begin

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photographs"), train=24, val=6, test=9)


@pytest.fixture(scope="module")
def run(tmp_path_factory, photographs, standard_promotion, quick_compile):
    """A run of one epoch on the photographs."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.run(mlp(photographs), workdir, 1, quiet=True)
    return workdir


@pytest.fixture
def copies(tmp_path, photographs, run):
    """Copies of the photographs and of the run, to be changed."""
    copy = Path(shutil.copytree(photographs, tmp_path / "copy"))
    return copy, Path(shutil.copytree(run, tmp_path / "run"))


def train_on(
    directory: Path, workdir: Path, quiet: bool = True, other_images: bool = False, epochs: int = 1
):
    config = mlp(directory, f"train.epochs={epochs}")
    return loop.run(config, workdir, 1, quiet, other_images)


def test_the_record_has_classes_counts_and_a_mark_of_each_image(run, photographs):
    content = read_json(run / "dataset.json")
    assert content["classes"] == ["class0", "class1", "class2"]
    counts = {name: split["images"] for name, split in content["splits"].items()}
    assert counts == {"train": 24, "val": 6, "test": 9}
    assert (content["epoch_steps"], content["earlier"]) == (3, [])
    recorded, found = dataset_record.read(run), open_dataset(mlp(photographs)).fingerprint
    assert recorded.classes == found.classes
    assert recorded.marks.keys() == found.marks.keys()
    for name, marks in recorded.marks.items():
        assert marks.dtype == np.uint32
        assert len(set(marks.tolist())) == counts[name]
        np.testing.assert_array_equal(marks, found.marks[name])


def test_marks_are_names_and_sizes_wherever_the_folder_is_and_no_image_is_read(copies, run):
    copy, _ = copies
    before = dataset_record.read(run)
    file = next(iter(sorted(copy.glob("train/class0/*"))))
    size = file.stat().st_size
    file.write_bytes(b"\0" * size)  # no image any more
    assert changes(before, open_dataset(mlp(copy)).fingerprint) == {}
    file.write_bytes(b"\0" * (size + 1))
    found = changes(before, open_dataset(mlp(copy)).fingerprint)
    assert found == {"train": Change(1, 1, 24)}
    file.rename(file.with_name("another.png"))
    next(iter(sorted(copy.glob("test/class1/*")))).unlink()
    found = changes(before, open_dataset(mlp(copy)).fingerprint)
    assert found == {"train": Change(1, 1, 24), "test": Change(0, 1, 8)}


def test_changes_do_not_depend_on_the_order_and_count_what_is_twice():
    there = Fingerprint((), {"train": np.array([5, 1, 1, 7], np.uint32)})
    assert changes(there, Fingerprint((), {"train": np.array([7, 1, 5, 1], np.uint32)})) == {}
    here = Fingerprint((), {"train": np.array([1, 5, 5, 8], np.uint32), "val": np.arange(2)})
    assert changes(there, here) == {"train": Change(2, 2, 4), "val": Change(2, 0, 2)}
    assert changes(here, there)["val"] == Change(0, 2, 0)


def test_in_memory_and_streamed_have_the_same_fingerprint(photographs):
    for assignments in ((), ("data.train_images=10", "data.val_fraction=0.2")):
        fingerprints = [
            load_dataset(mlp(photographs, *assignments, f"data.in_memory_mb={size}")).fingerprint
            for size in (0.0, 64.0)
        ]
        assert changes(*fingerprints) == {}
    digits_found = [load_dataset(digits()).fingerprint for _ in range(2)]
    assert changes(*digits_found) == {}
    assert digits_found[0].classes == tuple("0123456789")


@pytest.mark.parametrize("more", [0, 8])
def test_other_classes_are_refused_with_both_lists(capsys, copies, more):
    """As many classes as before, which a config can't tell, and more of them."""
    copy, workdir = copies
    for split in ("train", "val", "test"):
        (copy / split / "class1").rename(copy / split / "pear")
    for i in range(more):
        for split in ("train", "val", "test"):
            (copy / split / f"z{i}").mkdir()
            (copy / split / f"z{i}/0.png").write_bytes(encode(draw(i)))
    before = snapshot(workdir)
    here, only = "class0, class2, pear", "pear"
    if more:
        here, only = f"{here}, z0, z1, z2 and 5 more", "pear, z0, z1, z2, z3, z4 and 3 more"
    message = (
        f"{workdir} knows other classes than {copy} has: there 3 (class0, class1, class2), here"
        f" {3 + more} ({here}); only here: {only}; only there: class1"
    )
    with refused(exactly=f"{message}; choose another --workdir"):
        train_on(copy, workdir, other_images=True)
    argv = ["--workdir", str(workdir), f"--config.data.dir={copy}", "--devices", "1"]
    assert fails(capsys, evaluate_command.main, *argv) == f"{NAME}: {message}"
    assert snapshot(workdir) == before


def test_the_same_classes_in_another_order_are_other_classes():
    with refused("here 2 \\(b, a\\); the same ones in another order$"):
        dataset_record.check_classes(Path("w"), ["a", "b"], digits(), ["b", "a"])
    with refused(r"there 1 \('a\\n\\udcff'\), here"):
        dataset_record.check_classes(Path("w"), ["a\n\udcff"], digits(), ["b"])


def test_a_repaired_image_is_told_and_others_need_the_flag(capsys, copies):
    copy, workdir = copies
    first, second, *_ = sorted(copy.glob("train/class0/*"))
    first.write_bytes(encode(draw(99, (9, 9))))
    before = read_json(workdir / "dataset.json")
    train_on(copy, workdir, quiet=False)
    note = f"{workdir} was trained on other images of these classes: train has 1 new of 24 and"
    told, finished = capsys.readouterr().out.splitlines()
    assert told == f"{note} lacks 1"
    assert finished == f"{workdir} holds this run, finished"
    assert read_json(workdir / "dataset.json") == before  # what it was trained on
    train_on(copy, workdir, quiet=False, epochs=2)
    assert capsys.readouterr().out.splitlines()[0] == told
    record = read_json(workdir / "dataset.json")
    del before["earlier"]
    assert record["earlier"] == [before]
    assert record["splits"]["train"] != before["splits"]["train"]

    second.write_bytes(encode(draw(98, (9, 9))))
    third = copy / "val/class0/new.png"
    third.write_bytes(encode(draw(97)))
    saved = snapshot(workdir)
    changed = "train has 1 new of 24 and lacks 1; val has 1 new of 7 and lacks 0"
    for _ in range(2):
        with refused(f"these classes: {changed}; --other-images trains on with those"):
            train_on(copy, workdir, epochs=3)
    assert snapshot(workdir) == saved
    train_on(copy, workdir, other_images=True, epochs=3)
    assert len(read_json(workdir / "dataset.json")["earlier"]) == 2
    after = snapshot(workdir)
    train_on(copy, workdir, epochs=3)  # they are the run's own now
    assert snapshot(workdir) == after


def test_a_run_counts_in_its_epochs(copies):
    """With more images an epoch has more batches; schedule and history know only one number."""
    copy, workdir = copies
    for i in range(8):
        (copy / f"train/class0/new{i}.png").write_bytes(encode(draw(i)))
    before = snapshot(workdir)
    for _ in range(2):
        with refused(r"epochs of 3 batches, which would be 4 with .* \(train has 8 new of 32 and"):
            train_on(copy, workdir, other_images=True)
    assert snapshot(workdir) == before


def test_evaluation_on_other_images_needs_no_flag_and_says_so(capsys, copies):
    copy, workdir = copies
    argv = ["--workdir", str(workdir), f"--config.data.dir={copy}", "--devices", "1"]
    (copy / "train/class0/new.png").write_bytes(encode(draw(1)))
    evaluate_command.main(argv)
    assert "not the images" not in capsys.readouterr().out  # the test images are the same
    assert read_json(workdir / "eval_test.json")["other_images"] is None
    own = snapshot(workdir)
    (copy / "test/class0/new.png").write_bytes(encode(draw(1)))
    evaluate_command.main(argv)
    told = (
        f"not the images of the run: test has 1 new of 10 and lacks 0; {workdir} keeps its own"
        " results, these go to files named test_other_images"
    )
    assert told in capsys.readouterr().out.splitlines()
    written = read_json(workdir / "eval_test_other_images.json")
    assert written["other_images"] == {"new": 1, "gone": 0}
    assert written["examples"] == 10
    # What the run's own page shows is still of its own images.
    kept = snapshot(workdir)
    assert all(kept[file] == own[file] for file in own if "_test" in file.name)
    assert read_json(workdir / "eval_test.json")["examples"] == 9


def test_images_that_the_run_has_seen_are_not_evaluated_as_others(capsys, tmp_path):
    """In a folder without splits a file that sorts first moves all others into other splits."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    for label in range(3):
        (whole / f"class{label}").mkdir(parents=True)
        for i in range(20):
            (whole / f"class{label}/image{i:02}.png").write_bytes(encode(draw(label)))
    train_on(whole, workdir)
    argv = ["--workdir", str(workdir), "--devices", "1"]
    evaluate_command.main(argv)
    before = snapshot(workdir)
    shares = ["--config.data.test_fraction=0.6", "--config.data.val_fraction=0.3"]
    message = r"\d+ of the \d+ images of the test split are ones that .*run was trained on: where a"
    capsys.readouterr()
    assert re.search(message, fails(capsys, evaluate_command.main, *argv, *shares))
    for label in range(3):
        (whole / f"class{label}/Another.png").write_bytes(encode(draw(label)))
    for split in ("test", "val"):
        line = fails(capsys, evaluate_command.main, *argv, "--split", split)
        assert re.search(message.replace("test", split), line)
    assert snapshot(workdir) == before
    evaluate_command.main([*argv, "--split", "train"])


def test_a_test_of_images_that_selected_is_told_from_one_of_new_images():
    there = Fingerprint(("a",), {"train": np.array([1, 2]), "val": np.array([3]), "test": [4]})
    here = Fingerprint(("a",), {"train": np.array([1, 2]), "val": [], "test": np.array([3, 4, 5])})
    with refused("1 of the 3 images of the test split are ones that run chose its best epoch by"):
        dataset_record.check_unseen(Path("run"), there, here, "test")
    here = Fingerprint(("a",), {"train": np.array([1]), "val": [3], "test": np.array([4, 5])})
    dataset_record.check_unseen(Path("run"), there, here, "test")
    dataset_record.check_unseen(Path("run"), there, here, "train")


def test_a_run_from_before_goes_on_and_gets_its_record(capsys, copies, photographs, run):
    copy, workdir = copies
    (workdir / "dataset.json").unlink()
    argv = ["--workdir", str(workdir), "--devices", "1"]
    evaluate_command.main([*argv, f"--config.data.dir={copy}"])
    assert not (workdir / "dataset.json").exists()  # the run may have had others
    evaluate_command.main(argv)
    recorded = read_json(run / "dataset.json")
    assert read_json(workdir / "dataset.json") == recorded | {"epoch_steps": None}
    (workdir / "dataset.json").unlink()
    train_on(photographs, workdir)
    assert read_json(workdir / "dataset.json") == recorded
    (workdir / "dataset.json").unlink()
    for split in ("train", "val", "test"):
        (copy / split / "more").mkdir()
        (copy / split / "more/0.png").write_bytes(encode(draw(1)))
    capsys.readouterr()
    assert "num_classes is 3, but folder has 4" in fails(
        capsys, evaluate_command.main, *argv, f"--config.data.dir={copy}"
    )


def test_a_damaged_record_is_told(copies):
    copy, workdir = copies
    (workdir / "dataset.json").write_text("[]")
    with refused("dataset.json is no record of images, but a list"):
        train_on(copy, workdir)


def planned(directory: Path, *names: str, seeds: str = "2"):
    overrides = ["data.name=folder", f"data.dir={directory}", "data.image_shape=(8,8,3)"]
    overrides += ["data.scale=255.0", "model.num_classes=None", "model.features=(16,)"]
    overrides += ["train.batch_size=8", "eval.batch_size=8", "train.epochs=1"]
    overrides += ["memory.shape=(8,)", "memory.update_after="]
    return plan(DIGITS, names, seeds, (), overrides)


@pytest.mark.slow
def test_a_study_knows_its_data(copies, photographs, tmp_path):
    """Its runs, and an arm that is added to them."""
    copy, _ = copies
    workdir = tmp_path / "study"
    studies.run(planned(photographs, "control"), workdir, device_count=1, quiet=True)
    for seed in "01":
        assert read_json(workdir / "control" / seed / "dataset.json")["classes"][0] == "class0"
    (copy / "test/class2/new.png").write_bytes(encode(draw(1)))
    before = snapshot(workdir)
    for arm in ("control", "aim_direct"):
        with refused(r"study/control/0 was trained on other images .*: test has 1 new of 10"):
            studies.run(planned(copy, arm), workdir, device_count=1, quiet=True)
    (copy / "train/other").mkdir()
    (copy / "train/other/0.png").write_bytes(encode(draw(1)))
    for arm in ("control", "aim_direct"):
        with refused(r"study/control/0 knows other classes .* only here: other; only there: none"):
            studies.run(planned(copy, arm), workdir, device_count=1, quiet=True)
    assert snapshot(workdir) == before
    shutil.rmtree(copy / "train/other")
    more = planned(copy, "control", seeds="3")
    studies.run(more, workdir, device_count=1, quiet=True, other_images=True)
    records = [dataset_record.read(workdir / "control" / seed) for seed in "012"]
    assert [len(found.marks["test"]) for found in records] == [9, 9, 10]


def test_default_workdirs_tell_folders_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_workdir(load("digits_mlp:aim")) == Path("runs/digits_mlp-aim-0")
    assert default_workdir(load("cifar10_resnet:aim")) == Path("runs/cifar10_resnet-aim-0")
    names = [default_workdir(mlp(place, "seed=3")) for place in ("a/my photos", "b/my photos")]
    assert len(set(names)) == 2
    for name in names:
        assert re.fullmatch(r"runs/digits_mlp-my_photos-[0-9a-f]{4}-control-3", str(name))
    assert default_workdir(mlp(tmp_path / "a/../a/my photos", "seed=3")) == names[0]
    assert default_workdir(mlp("")) == Path("runs/digits_mlp-control-0")

    # A run from before goes on where it is, one of another folder doesn't.
    before = Path("runs/digits_mlp-control-3")
    before.mkdir(parents=True)
    (before / "config.json").write_text(configs.to_json(mlp("a/my photos", "seed=3")))
    assert default_workdir(mlp("a/my photos", "seed=3")) == before
    assert default_workdir(mlp("b/my photos", "seed=3")) == names[1]

    study = planned(tmp_path / "a/my photos", "control")
    named = studies.default_workdir(study)
    assert re.fullmatch(r"runs/ablation-digits_mlp-my_photos-[0-9a-f]{4}", str(named))
    record.add(Path("runs/ablation-digits_mlp"), study)
    assert studies.default_workdir(study) == Path("runs/ablation-digits_mlp")
    other = planned(tmp_path / "b/my photos", "control")
    assert studies.default_workdir(other) not in (named, Path("runs/ablation-digits_mlp"))
