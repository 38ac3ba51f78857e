"""Every example is counted exactly once, and eval.py finds what training found."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, report, restoring, training
from aim_flax import config as configs
from aim_flax.data.digits import load_digits
from aim_flax.data.in_memory import EvalBatches, Split
from aim_flax.errors import UsageError
from aim_flax.evaluation import Evaluation, build_evaluate, memory_use
from aim_flax.parallel import Devices
from tests.test_training import digits

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


class Mean(nn.Module):
    """Logits that say whether the mean pixel is above a half; no parameters."""

    @nn.compact
    def __call__(self, images, train=False):
        mean = images.mean(axis=(1, 2, 3))
        return jnp.stack([0.5 - mean, mean - 0.5, jnp.full_like(mean, -9.0)], axis=-1)


def split(count: int) -> Split:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 2, 2, 1)).astype(np.uint8)
    return Split(images, rng.integers(0, 3, count).astype(np.int32))


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
@pytest.mark.parametrize(("count", "batch_size", "devices"), [(37, 8, 1), (37, 10, 8), (5, 64, 8)])
def test_padding_is_not_counted(kind, count, batch_size, devices):
    examples, devices = split(count), Devices(kind, devices)
    batches = EvalBatches(examples, devices, batch_size, 255.0)
    evaluate = build_evaluate(Mean(), devices, batches, 3)
    evaluation = evaluate(devices.replicate({}))

    means = (examples.images.astype(np.float32) / 255).mean(axis=(1, 2, 3))
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (examples.labels, (means > 0.5).astype(int)), 1)
    np.testing.assert_array_equal(evaluation.confusion, confusion)
    logits = np.stack([0.5 - means, means - 0.5, np.full_like(means, -9)], axis=-1)
    log_sum = np.log(np.exp(logits).sum(-1))
    losses = log_sum - logits[np.arange(count), examples.labels]
    assert evaluation.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert evaluation.count == count


def test_accuracy_interval_is_wilsons():
    evaluation = Evaluation(0.0, np.array([[8, 2], [0, 0]]))
    z, p, n = 1.959964, 0.8, 10
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert evaluation.accuracy_interval() == pytest.approx(expected, rel=1e-5)


def test_per_class_ratios():
    evaluation = Evaluation(0.0, np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    rows = report.per_class(evaluation, ("a", "b", "c"))
    assert rows[0] == {"class": "a", "examples": 4, "recall": 0.75, "precision": 0.6, "f1": 6 / 9}
    assert rows[2] == {"class": "c", "examples": 0, "recall": None, "precision": None, "f1": None}
    lines = report.class_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["c", "0", "-", "-", "-"]


def test_digits_splits_are_stratified_disjoint_and_fixed():
    dataset = load_digits()
    assert {name: len(s) for name, s in dataset.splits.items()} == {
        "train": 1257,
        "val": 180,
        "test": 360,
    }
    assert dataset.classes == tuple("0123456789")
    scans = np.concatenate([s.images.reshape(len(s), -1) for s in dataset.splits.values()])
    from sklearn.datasets import load_digits as reference

    expected = reference().data.astype(np.uint8)
    np.testing.assert_array_equal(np.sort(scans.view("V64"), 0), np.sort(expected.view("V64"), 0))
    for name, share in (("val", 18), ("test", 36)):
        assert abs(np.bincount(dataset.splits[name].labels) - share).max() <= 1
    # Fixed for good: another split would make results incomparable.
    assert dataset.splits["test"].labels[:12].tolist() == TEST_LABELS
    assert int(dataset.splits["test"].images.astype(np.int64).sum()) == TEST_SUM


TEST_LABELS = [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
TEST_SUM = 112350


def test_memory_use_is_the_share_of_the_output():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3, name="head")(nn.Dense(4, name="hidden")(x))

    memory = Memory((2,), kind="direct")
    model = AiM(Net(), memory, read="head", update_after="hidden", read_mode="add")
    x = jnp.ones((5, 6))
    variables = model.init(jax.random.key(0), x)
    use = memory_use(model, variables, x)
    assert set(use) == {"read head", "update hidden"}
    plain = Net().apply({"params": variables["params"]}, x)
    share = model.apply(variables, x) - plain
    assert float(use["read head"]["share"]) == pytest.approx(
        float(jnp.linalg.norm(share, axis=-1).mean()), rel=1e-5
    )
    assert float(use["read head"]["own"]) == pytest.approx(
        float(jnp.linalg.norm(plain, axis=-1).mean()), rel=1e-5
    )
    assert memory_use(Net(), {"params": variables["params"]}, x) == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory, standard_promotion, quick_compile):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    summary = training.run(digits("aim", "train.epochs=3"), workdir, 1, quiet=True)
    return workdir, summary


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_of_the_best_checkpoint_equals_the_summary(run, devices, capsys):
    workdir, summary = run
    evaluation = restoring.evaluate_run(workdir, "best", "test", devices)
    assert evaluation.accuracy == summary["test_accuracy"]
    assert evaluation.loss == pytest.approx(summary["test_loss"], rel=1e-5)
    written = json.loads((workdir / "eval_test.json").read_text())
    assert written["accuracy"] == summary["test_accuracy"]
    assert written["step"] == summary["best_step"]
    assert written["examples"] == np.sum(written["confusion"]) == 360
    assert [row["class"] for row in written["classes"]] == list("0123456789")
    assert (workdir / "confusion_test.png").read_bytes().startswith(b"\x89PNG")
    assert f"accuracy {summary['test_accuracy']:.2%}" in capsys.readouterr().out


def test_restored_network_is_a_plain_linen_module(run):
    workdir, summary = run
    restored = restoring.restore_run(workdir)
    test = load_digits().splits["test"]
    logits = restored.model.apply(restored.variables, test.images / np.float32(16), train=False)
    accuracy = (np.argmax(logits, -1) == test.labels).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("7", r"no checkpoint of step 7 in .*; there: (19, )?38, 57"),
        ("newest", "checkpoint is 'newest', expected best, latest or a step"),
    ],
)
def test_missing_checkpoints_are_told(run, checkpoint, message):
    with pytest.raises(UsageError, match=message):
        restoring.restore_run(run[0], checkpoint)


def test_directory_that_is_no_run_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"config.json not found: .* is no run's workdir"):
        restoring.restore_run(tmp_path)
    (tmp_path / "config.json").write_text(configs.to_json(digits()))
    with pytest.raises(UsageError, match="there are no checkpoints in"):
        restoring.restore_run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
