"""Images that are shifted around: in training and in evaluation, the same however they are read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from aim_flax.data.augment import augment, roll_in_evaluation
from aim_flax.data.in_memory import InMemory
from aim_flax.data.load import decode_if_small, load_dataset
from aim_flax.data.records import EncodedDataset
from aim_flax.data.scaling import Scaling
from aim_flax.data.streamed import Streamed
from aim_flax.devices import Devices
from aim_flax.evaluate.memory_use import memory_use
from aim_flax.train.evaluate_run import evaluate_run
from aim_flax.train.experiment import Experiment
from aim_flax.train.restore import restore_run
from aim_flax.use.predictor import Predictor
from tests.arrays import KEY
from tests.asserts import assert_close, assert_equal
from tests.photos import Photos
from tests.runs import digits, write_run
from tests.test_streamed import train_batches

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

ROLL = {"roll": True}
SHAPE = (6, 5, 3)
ROLLED = jax.jit(roll_in_evaluation)


def rolled_by(rolled: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """Returns the one offset by which an image was rolled."""
    height, width = image.shape[:2]
    (found,) = (
        (down, right)
        for down in range(height)
        for right in range(width)
        if (np.roll(image, (down, right), axis=(0, 1)) == rolled).all()
    )
    return found


def offsets(rolled: np.ndarray, images: np.ndarray) -> list[tuple[int, int]]:
    return [rolled_by(*pair) for pair in zip(rolled, images, strict=True)]


def test_every_offset_comes_equally_often():
    image = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(SHAPE)
    images = np.broadcast_to(image, (3000, *SHAPE))
    for rolled in (
        ROLLED(images, 3, jnp.arange(3000)),
        jax.jit(partial(augment, options=ROLL))(images, KEY, 0),
    ):
        # The place of the first pixel tells all of it.
        places = np.asarray(rolled)[..., 0].reshape(3000, -1).argmin(axis=1)
        expected = np.roll(image, np.unravel_index(places[7], (6, 5)), axis=(0, 1))
        np.testing.assert_array_equal(rolled[7], expected)
        counts = np.bincount(places, minlength=30)
        assert chisquare(counts).pvalue > 0.01
        # Rows and columns are drawn apart from each other, and from one image to the next.
        assert chisquare(np.bincount(places[1:] * 30 + places[:-1], minlength=900)).pvalue > 0.01


def test_an_image_is_rolled_after_its_other_changes():
    """What is filled at an edge moves on with it."""
    images = np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype(np.uint8)
    options = {"shift": 2, "flip_horizontal": True, "contrast": 0.3}
    changed, rolled = (
        np.asarray(jax.jit(partial(augment, options=options | more))(images, KEY, 5))
        for more in ({"roll": False}, ROLL)
    )
    assert len(set(offsets(rolled, changed))) > 4


@pytest.fixture(scope="module")
def datasets() -> tuple[Streamed, InMemory]:
    """The same images streamed and decoded, of which one in the middle can't be read."""
    photos = Photos(13, SHAPE[:2], seed=100)
    photos.encoded[4] = b""
    encoded = EncodedDataset(tuple("abc"), {"train": Photos(21, SHAPE[:2]), "test": photos})
    streamed, other = (Streamed(encoded, SHAPE, 2, on_error="skip") for _ in range(2))
    return streamed, decode_if_small(other, digits("control", "data.in_memory_mb=1"))


def seen(dataset, seed, batch_size=8, count=1, kind="pmap", roll=True) -> np.ndarray:
    """Returns what a network gets to see of a test split."""
    devices = Devices(kind, count)
    batches = dataset.eval_batches(devices, "test", batch_size, Scaling(1.0), roll)

    def on_device(data, seed):
        images, _, counted, _ = batches.on_device(data, seed)
        return jax.lax.all_gather((images, counted), "batch", tiled=True)

    call = devices.map(on_device, sharded=(0,) if batches.sharded else ())
    seed = devices.replicate(np.uint32(seed))
    found = [devices.fetch(call(data, seed)) for data in batches]
    return np.concatenate([images[counted] for images, counted in found])


@pytest.mark.slow
def test_evaluation_rolls_each_image_alike_every_time(datasets):
    streamed, in_memory = datasets
    images, reference = in_memory.splits["test"].images, seen(in_memory, 3)
    found = offsets(reference, images)
    assert len(set(found)) > 6
    for dataset, *how in (
        (in_memory, 5, 8, "shard_map"),
        (in_memory, 64, 2),
        (streamed, 1),
        (streamed, 64, 2, "shard_map"),
    ):
        assert_equal(seen(dataset, 3, *how), reference)
    others = offsets(seen(in_memory, 4), images)
    assert sum(a == b for a, b in zip(found, others, strict=True)) < 4
    assert_equal(seen(in_memory, 3, roll=False), images.astype(np.float32))


@pytest.mark.slow
def test_training_rolls_by_seed_and_step_in_memory_and_streamed(datasets):
    streamed, in_memory = datasets
    how = dict(augmentation=ROLL)
    plain, rolled = (train_batches(in_memory, 7, 1, 4, augmentation=a) for a in (None, ROLL))
    found = [
        offset
        for (images, _), (before, _) in zip(rolled, plain, strict=True)
        for offset in offsets(images, before)
    ]
    assert len(found) == 24
    assert len(set(found)) > 12
    assert_equal(train_batches(in_memory, 7, 3, 4, 8, "shard_map", **how), rolled[2:])
    assert_equal(train_batches(streamed, 7, 1, 4, 2, **how), rolled)


@pytest.fixture(scope="module")
def run(tmp_path_factory, standard_promotion, quick_compile):
    config = digits("aim", "augment.roll=true", "seed=5")
    workdir = tmp_path_factory.mktemp("rolled") / "run"
    write_run(config, workdir)
    return config, workdir, restore_run(workdir)


@pytest.mark.slow
def test_eval_rolls_by_the_runs_seed_and_prediction_does_not(run):
    """Training's own evaluation is compared with that of eval.py in test_study_run.py."""
    config, workdir, restored = run
    found = evaluate_run(workdir, device_count=2, overrides=["eval.batch_size=97"])
    dataset = load_dataset(config)
    test = dataset.splits["test"].images
    score = jax.jit(partial(restored.model.apply, restored.variables))
    rolled = ROLLED(test, 5, jnp.arange(360))
    predicted = [np.argmax(score(x / np.float32(16)), -1) for x in (rolled, test)]
    assert_equal(found.predicted, predicted[0])
    # Photographs of one's own are taken as they are.
    predictor = Predictor.from_run(workdir)
    own = [predictor(image).label for image in test[:20]]
    assert own == [dataset.classes[i] for i in predicted[1][:20]]
    assert (predicted[0][:20] != predicted[1][:20]).any()


@pytest.mark.slow
def test_seeds_evaluated_together_have_offsets_of_their_own(run):
    """So has what is measured of the memory's use."""
    config, _, restored = run
    experiment, variables = Experiment(config, 1), restored.variables
    devices, seeds = experiment.devices, np.array([4, 5], np.uint32)
    both = devices.replicate(jax.tree.map(lambda leaf: np.stack([leaf, leaf]), variables))
    evaluations = experiment.evaluate("val", together=True)(both, seeds)
    assert (evaluations[0].predicted != evaluations[1].predicted).any()
    uses = experiment.memory_probe(together=True)(both, seeds)
    images = experiment.dataset.splits["val"].images
    score, use = (jax.jit(partial(of, restored.model)) for of in (_logits, memory_use))
    for i, seed in enumerate(seeds):
        rolled = ROLLED(images, seed, jnp.arange(len(images))) / np.float32(16)
        assert_equal(evaluations[i].predicted, np.argmax(score(variables, rolled), -1))
        found = jax.tree.map(lambda norms, i=i: norms[i], uses)
        assert_close(dict(found), dict(use(variables, rolled)), 1e-4)


def _logits(model, variables, images):
    return model.apply(variables, images)
