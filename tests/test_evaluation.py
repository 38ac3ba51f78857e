"""Every example is counted exactly once, and eval.py finds what training found."""

import gc
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from flax import linen as nn
from matplotlib.figure import Figure
from scipy.stats import binomtest

from aim_flax import AiM, Memory, intervene
from aim_flax import config as configs
from aim_flax.cli import evaluate as evaluate_command
from aim_flax.data.dataset import Dataset, EvalBatches
from aim_flax.data.digits import load_digits
from aim_flax.data.in_memory import InMemory, Split
from aim_flax.data.scaling import Scaling
from aim_flax.devices import KINDS, Devices
from aim_flax.evaluate import effects, report
from aim_flax.evaluate.effects import Effect
from aim_flax.evaluate.evaluation import Evaluation, build_evaluate
from aim_flax.evaluate.interventions import (
    READ_KINDS,
    Choosable,
    layers,
    matching,
    reads_per_example,
)
from aim_flax.evaluate.memory_use import memory_use
from aim_flax.models.mlp import MLP
from aim_flax.statistics import holm
from aim_flax.train import evaluate_run, loop, restore
from aim_flax.train import plots as run_plots
from aim_flax.train.page import write_page
from aim_flax.train.report import HISTORY_COLUMNS, Events
from tests.arrays import KEY, random_variables
from tests.asserts import fails, refused
from tests.runs import digits, read_csv, read_json, snapshot, write_run

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
    batches = InMemory((), {"test": examples}).eval_batches(
        devices, "test", batch_size, Scaling(255.0)
    )
    evaluate = build_evaluate(Mean(), devices, batches, 3)
    evaluation = evaluate(devices.replicate({}), 0)

    means = (examples.images.astype(np.float32) / 255).mean(axis=(1, 2, 3))
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (examples.labels, (means > 0.5).astype(int)), 1)
    np.testing.assert_array_equal(evaluation.confusion, confusion)
    logits = np.stack([0.5 - means, means - 0.5, np.full_like(means, -9)], axis=-1)
    log_sum = np.log(np.exp(logits).sum(-1))
    losses = log_sum - logits[np.arange(count), examples.labels]
    assert evaluation.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert evaluation.count == count
    # Image by image, whatever the devices and the size of the batches.
    np.testing.assert_array_equal(evaluation.is_correct, (means > 0.5) == examples.labels)
    assert evaluation.is_correct.dtype == bool
    assert 0 < evaluation.correct == evaluation.is_correct.sum() < count


def evaluation_of(confusion):
    confusion = np.array(confusion)
    return Evaluation(0.0, confusion, np.arange(confusion.sum()) < np.trace(confusion))


@pytest.mark.parametrize("correct", [0, 1, 8, 351, 359, 360])
def test_accuracy_interval_is_scipys(correct):
    interval = binomtest(correct, 360).proportion_ci(0.95, method="wilson")
    evaluation = evaluation_of([[correct, 360 - correct], [0, 0]])
    assert evaluation.accuracy_interval() == tuple(interval)


def test_accuracy_interval_is_wilsons():
    evaluation = evaluation_of([[8, 2], [0, 0]])
    z, p, n = 1.959964, 0.8, 10
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert evaluation.accuracy_interval() == pytest.approx(expected, rel=1e-5)


def test_per_class_ratios():
    evaluation = evaluation_of([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    rows = report.per_class(evaluation, ("a", "b", "c"))
    assert rows[0] == {"class": "a", "examples": 4, "recall": 0.75, "precision": 0.6, "f1": 6 / 9}
    assert rows[2] == {"class": "c", "examples": 0, "recall": None, "precision": None, "f1": None}
    lines = report.class_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["c", "0", "-", "-", "-"]


def test_digits_splits_are_stratified_disjoint_and_fixed():
    dataset = load_digits()
    assert {n: len(s) for n, s in dataset.splits.items()} == {
        "train": 1257,
        "val": 180,
        "test": 360,
    }
    assert dataset.classes == tuple("0123456789")
    scans = np.concatenate([s.images.reshape(len(s), -1) for s in dataset.splits.values()])
    expected = sklearn.datasets.load_digits().data.astype(np.uint8)
    np.testing.assert_array_equal(np.sort(scans.view("V64"), 0), np.sort(expected.view("V64"), 0))
    for name, share in (("val", 18), ("test", 36)):
        assert abs(np.bincount(dataset.splits[name].labels) - share).max() <= 1
    # Fixed for good: another split would make results incomparable.
    assert dataset.splits["test"].labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert int(dataset.splits["test"].images.astype(np.int64).sum()) == 112350


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for name in ("layer2", "layer10", "head"):
            x = nn.Dense(4, name=name)(x)
        return x


def test_memory_use_is_that_which_the_network_records_in_the_order_of_the_calls():
    model = AiM(Layers(), Memory((2,), kind="direct"), read=".*", update_after="layer10")
    x = jnp.ones((5, 6))
    variables = jax.jit(model.init)(KEY, x)
    use = jax.jit(partial(memory_use, model))(variables, x)
    _, seen = model.apply(variables, x, mutable=["intermediates"])
    recorded = seen["intermediates"]
    expected = {f"read {name}": recorded[name]["memory_use"][0] for name in recorded}
    expected["update layer10"] = recorded["layer10"]["memory_update_use"][0]
    assert use.keys() == expected.keys()
    for name, norms in expected.items():
        assert use[name].keys() == norms.keys()
        for part, norm in norms.items():
            assert float(use[name][part]) == pytest.approx(float(norm), rel=1e-5)
    traced = memory_use(model, variables, x)
    reads = ["read layer2", "read layer10", "read head"]
    assert [name for name in traced if name.startswith("read ")] == reads
    assert memory_use(Layers(), {"params": random_variables(Layers(), x)["params"]}, x) == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory, standard_promotion, quick_compile):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    summary = loop.run(digits("aim", "train.epochs=3"), workdir, 1, quiet=True)
    return workdir, summary


@pytest.mark.parametrize("damage", [lambda png: b"", lambda png: b"GIF", lambda png: png[:99]])
def test_a_damaged_sheet_of_mistakes_is_made_anew(run, tmp_path, damage):
    workdir = Path(shutil.copytree(run[0], tmp_path / "run"))
    sheet = workdir / "mistakes_test.png"
    whole = sheet.read_bytes()
    sheet.write_bytes(damage(whole))
    write_page(workdir)
    assert "mistakes_test.png, the images, is damaged." in (workdir / "report.html").read_text()
    evaluate_run.evaluate_run(workdir, device_count=1)
    assert sheet.read_bytes() == whole
    assert "is damaged" not in (workdir / "report.html").read_text()


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_of_the_best_checkpoint_equals_the_summary(run, devices, capsys):
    workdir, summary = run
    evaluation = evaluate_run.evaluate_run(workdir, "best", "test", devices)
    assert evaluation.accuracy == summary["test_accuracy"]
    assert evaluation.loss == pytest.approx(summary["test_loss"], rel=1e-5)
    written = read_json(workdir / "eval_test.json")
    assert written["accuracy"] == summary["test_accuracy"]
    assert written["step"] == summary["best_step"]
    assert written["examples"] == np.sum(written["confusion"]) == 360
    assert [row["class"] for row in written["classes"]] == list("0123456789")
    assert (workdir / "confusion_test.png").read_bytes().startswith(b"\x89PNG")
    assert f"accuracy {summary['test_accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_leave_nothing_in_memory(run, kind):
    """Each compiles a program, and reads the images."""
    backend = jax.extend.backend.get_backend()

    def evaluate_once():
        evaluate_run.evaluate_run(run[0], device_count=1, overrides=[f"parallel={kind}"])
        gc.collect()
        kept = sum(isinstance(item, Dataset | EvalBatches) for item in gc.get_objects())
        return kept, len(backend.live_executables())

    first = evaluate_once()
    assert [evaluate_once() for _ in range(3)] == [first] * 3


def test_an_altered_evaluation_says_so_and_leaves_the_other_alone(run, capsys):
    workdir, summary = run
    keep = evaluate_run.evaluate_run(workdir, device_count=1)
    before = {path.name: path.read_bytes() for path in workdir.glob("*_test.*")}
    capsys.readouterr()
    zero = evaluate_run.evaluate_run(workdir, device_count=1, memory="zero", at="layer.*")
    printed = capsys.readouterr().out
    assert "with altered memory (zero at 'layer.*'): loss" in printed
    assert {path.name: path.read_bytes() for path in workdir.glob("*_test.*")} == before
    written = read_json(workdir / "eval_test_zero.json")
    assert (written["memory"], written["at"]) == ("zero", "layer.*")
    assert written["accuracy"] == zero.accuracy
    assert (workdir / "confusion_test_zero.png").is_file()
    assert json.loads(before["eval_test.json"])["memory"] == "keep"

    # A plain Linen module, or what `intervene` makes of it.
    restored, test = restore.restore_run(workdir), load_digits().splits["test"]
    for model, evaluation in (
        (restored.model, keep),
        (intervene(restored.model, "zero", "layer.*"), zero),
    ):
        logits = model.apply(restored.variables, test.images / np.float32(16))
        expected = np.argmax(logits, -1) == test.labels
        np.testing.assert_array_equal(evaluation.is_correct, expected)
    assert (keep.is_correct != zero.is_correct).any()


@pytest.fixture(scope="module")
def measured(run):
    return evaluate_run.evaluate_interventions(run[0], device_count=1, per_layer=True)


@pytest.mark.slow
def test_every_effect_is_that_of_the_network_that_intervene_makes(run, measured):
    restored, test = restore.restore_run(run[0]), load_digits().splits["test"]
    images = test.images / np.float32(16)

    def is_correct(kind, layer):
        model = intervene(restored.model, kind, layer or ".*")
        logits = jax.jit(model.apply)(restored.variables, images)
        return np.argmax(np.asarray(logits), -1) == test.labels

    reads, updates = ["layer1/dense", "layer2/dense", "head"], ["layer1", "layer2"]
    keep = is_correct("keep", None)
    assert measured.rows[0] == Effect(
        "keep", None, keep.mean(), pytest.approx(run[1]["test_loss"]), 0.0, 0, 0, None, None
    )
    rows = {(row.kind, row.layer): row for row in measured.rows[1:]}
    of_kind = {"zero": reads, "mean": reads[1:], "shuffle": reads[1:], "noise": reads}
    of_kind |= {"no_write": updates, "reset": reads[1:]}
    expected = [(kind, None) for kind in of_kind if kind != "reset"]
    expected += [(kind, layer) for kind, of in of_kind.items() for layer in of]
    assert list(rows) == expected
    for (kind, layer), row in rows.items():
        altered = is_correct(kind, layer)
        assert row.accuracy == altered.mean()
        assert row.worse == (keep & ~altered).sum()
        assert row.better == (altered & ~keep).sum()
        assert row.difference == pytest.approx(altered.mean() - keep.mean())
        assert row.p == effects.mcnemar(row.worse, row.better)
    # `reset` everywhere, which is not shown, is `no_write`; at the first layer it is `keep`.
    np.testing.assert_array_equal(is_correct("reset", None), is_correct("no_write", None))
    np.testing.assert_array_equal(is_correct("reset", "layer1/dense"), keep)
    ps = [row.p for row in measured.rows[1:]]
    assert [row.p_holm for row in measured.rows[1:]] == holm(ps)
    assert sum(row.p < 0.01 for row in measured.rows[1:]) > 3


def test_effects_are_written_and_shown(run, measured):
    workdir, _ = run
    written = read_json(workdir / "interventions_test.json")
    assert (written["split"], written["at"], written["examples"]) == ("test", ".*", 360)
    assert [Effect(**row) for row in written["effects"]] == measured.rows
    rows = read_csv(workdir / "interventions_test.csv")
    assert [float(row["accuracy"]) for row in rows] == [row.accuracy for row in measured.rows]
    assert (workdir / "interventions_test.png").read_bytes().startswith(b"\x89PNG")
    lines = report.effects_table(measured).splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(rows)]}) == 1
    row = measured.rows[-2]
    assert lines[len(rows)].startswith(
        f"| `reset` | `layer2/dense` | {row.accuracy:.2%} | {row.loss:.4f} |"
        f" {100 * row.difference:+z.2f} | {row.worse} | {row.better} | "
    )
    assert lines[-3] == (
        "At `layer1/dense` the memory is the same for all images: `mean`, `shuffle` and `reset`"
        " change nothing."
    )
    assert lines[-1].startswith("`reset` of all reads is not shown: it equals `no_write`")


IMAGES = jax.ShapeDtypeStruct((2, 2, 2, 1), jnp.float32)


@pytest.fixture(scope="module")
def carrying():
    """A network that reads written, carried and second memories; what evaluates it on 4 devices."""
    aim = AiM(
        MLP(3, features=(4,) * 3), Memory((5,), "direct"), r"layer\d/dense|head", "layer[12]",
        read_initial="layer3/dense", read_mode="add", carry="state",
    )  # fmt: skip
    examples, devices = split(48), Devices("pmap", 4)
    # Far apart, so that their memories are, too.
    batches = InMemory((), {"test": examples}).eval_batches(devices, "test", 48, Scaling(8.0))
    variables = random_variables(aim, jnp.ones((2, 2, 2, 1)))

    def build(model):
        evaluate = build_evaluate(model, devices, batches, 3)
        return lambda given: evaluate(devices.replicate({**variables, **given}), 0)

    return aim, build


@pytest.mark.slow
def test_one_program_chooses_among_all_that_can_be_read(carrying):
    aim, build = carrying
    reads, updates = layers(aim, IMAGES)
    assert updates == ["layer1", "layer2"]
    assert reads_per_example(aim, IMAGES) == {"layer2/dense", "head"}
    choosable = Choosable(aim, tuple(reads))
    evaluate = build(choosable)
    losses = []
    for kind, paths in [*((kind, set(reads)) for kind in READ_KINDS), ("noise", {"head"})]:
        found = evaluate(choosable.choose(kind, paths))
        expected = build(intervene(aim, kind, "|".join(paths)))({})
        np.testing.assert_array_equal(found.is_correct, expected.is_correct)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        losses.append(found.loss)
    assert len({round(loss, 4) for loss in losses}) == len(losses)


def test_carried_memories_are_reset_and_silenced_apart(carrying):
    aim, build = carrying
    measured = effects.measure(effects.plan(aim, IMAGES), build)
    kinds = [row.kind for row in measured.rows]
    assert kinds == ["keep", "zero", "mean", "shuffle", "noise", "no_write", "reset"]
    assert measured.notes == [
        "At `layer1/dense`, `layer3/dense` the memory is the same for all images: `mean` and"
        " `shuffle` change nothing."
    ]
    losses = [row.loss for row in measured.rows]
    assert len({round(loss, 4) for loss in losses}) == len(losses)
    no_write = build(intervene(aim, "no_write"))({})
    assert losses[kinds.index("no_write")] == pytest.approx(no_write.loss)


def test_a_pattern_limits_what_is_altered(carrying):
    aim, build = carrying
    assert matching(aim, "layer[13].*", IMAGES) == (["layer1/dense", "layer3/dense"], ["layer1"])
    measured = effects.measure(effects.plan(aim, IMAGES, "layer2"), build)
    assert [row.kind for row in measured.rows] == ["keep", "no_write"]
    expected = build(intervene(aim, "no_write", "layer2"))({})
    assert measured.rows[1].loss == pytest.approx(expected.loss)


def test_mcnemar_is_exact():
    # Of 6 images that differ all get worse: 2 of the 64 ways are as uneven.
    assert effects.mcnemar(6, 0) == pytest.approx(2 / 64)
    assert effects.mcnemar(0, 6) == pytest.approx(2 / 64)
    # 1 of 5: (1 + 5) ways on either side, of 32.
    assert effects.mcnemar(1, 4) == pytest.approx(12 / 32)
    assert effects.mcnemar(3, 3) == effects.mcnemar(0, 0) == 1.0


def test_what_cannot_be_altered_is_told_before_anything_is_written(run, tmp_path):
    loop.run(digits("control", "train.epochs=1"), tmp_path / "run", 1, quiet=True)
    before = set(tmp_path.rglob("*"))
    for act in (
        lambda: evaluate_run.evaluate_run(tmp_path / "run", memory="zero"),
        lambda: evaluate_run.evaluate_interventions(tmp_path / "run"),
    ):
        with refused(exactly="the network, MLP, has no memory to alter"):
            act()
    assert set(tmp_path.rglob("*")) == before
    for act in (
        lambda: evaluate_run.evaluate_run(run[0], memory="mean", at="heat"),
        lambda: evaluate_run.evaluate_interventions(run[0], at="heat"),
    ):
        with refused(r"no read of MLP \(did you mean 'head'\?\); there"):
            act()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory", "zeros"], "invalid choice: 'zeros'"),
        (["--at", "head"], "--at says where the memory is altered: give --memory"),
        (["--memory", "zero", "--per-layer"], "--per-layer goes with --memory all"),
        (["--memory", "no_write", "--at", "head"], "matches no update of MLP; there are: layer1,"),
    ],
)
def test_wrong_flags_are_told_in_a_line(run, capsys, argv, message):
    command = ["--workdir", str(run[0]), "--devices", "1", *argv]
    assert message in fails(capsys, evaluate_command.main, *command)


def test_command_line_with_altered_memory(run, capsys):
    flags = ["--workdir", str(run[0]), "--devices", "1", "--split", "val"]
    evaluate_command.main([*flags, "--memory", "all", "--at", "head"])
    printed = capsys.readouterr().out
    assert "val split, 180 images, with altered memory, reads and updates that match 'head':" in (
        printed
    )
    assert "\n| `zero` | all | " in printed
    evaluate_command.main([*flags, "--memory", "no_write", "--at", "layer1"])
    assert "with altered memory (no_write at 'layer1'): loss" in capsys.readouterr().out
    assert (run[0] / "eval_val_no_write.json").is_file()


def history_of(uses, epochs=3):
    row = dict.fromkeys(HISTORY_COLUMNS, 0.5)
    return [row | {"epoch": e, "step": 10 * e, "memory_use": uses} for e in range(1, epochs + 1)]


@pytest.mark.parametrize("count", [1, 49])
def test_memory_use_has_a_bar_per_layer(tmp_path, monkeypatch, count):
    figures = []
    draw = Figure.draw_without_rendering
    monkeypatch.setattr(run_plots, "save_figure", lambda f, _: figures.append(f) or draw(f))
    history = history_of({})
    names = [f"layer{i}" for i in range(count)]
    for row in history:
        row["memory_use"] = {
            **{f"read {n}": {"share": i + row["epoch"], "own": 2.0} for i, n in enumerate(names)},
            "read last": {"share": 1.0, "own": 0.0},
            "read none": {"share": 0.0, "own": 1.0},
            "update layer0": {"share": 1.0, "own": 4.0},
        }
    run_plots.plot_memory_use(tmp_path / "x.png", history, "title", step=20)
    bars, lines, updates, _ = figures[0].axes
    assert [label.get_text() for label in bars.get_yticklabels()] == [*names, "last", "none"]

    def ends(axis):
        """Where bars end; all begin at 1, where both sides are equal."""
        assert {bar.get_x() for bar in axis.patches} <= {1}
        return [1 + bar.get_width() for bar in axis.patches]

    assert ends(bars) == [(i + 2) / 2 for i in range(count)]
    # What is nothing is told from what cannot be measured.
    shown = [f"{ratio:.2g}" for ratio in ends(bars)]
    assert [t.get_text() for t in bars.texts] == [*shown, "no multiple: its own norm is 0", "0"]
    assert lines.lines[0].get_ydata().tolist() == [0.5, 1.0, 1.5]
    assert ends(updates) == [0.25]
    # Bars and lines of 0.25 are as visible as those of 25: by factors.
    for axis, low, high in ((bars, 0.5, (count + 1) / 2), (updates, 0.25, 1)):
        assert axis.get_xscale() == "log"
        left, right = axis.get_xlim()
        assert left < low <= high < right
    assert lines.get_yscale() == "log"
    for axis in (bars.xaxis, lines.yaxis):
        labels = [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
        assert labels == [f"{float(label):g}" for label in labels] != []
    run_plots.plot_memory_use(tmp_path / "x.png", history, "title")
    assert ends(figures[1].axes[0])[0] == 1.5


def test_shares_of_nothing_are_no_events(tmp_path, caplog, capsys):
    uses = {"read a": {"share": 1.0, "own": 0.0}, "read b": {"share": 1.0, "own": 2.0}}
    Events(tmp_path, 0).write(history_of(uses)[0], None)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"memory_use/read_b" in file.read_bytes()
    assert b"memory_use/read_a" not in file.read_bytes()
    assert not caplog.records
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("7", r"no checkpoint of step 7 in .*; there: (19, |38, )?57$"),
        ("newest", "checkpoint is 'newest', expected best, latest or a step"),
    ],
)
def test_missing_checkpoints_are_told(run, checkpoint, message):
    with refused(message):
        restore.restore_run(run[0], checkpoint)


def test_directory_that_is_no_run_is_told(tmp_path):
    with refused(r"config.json not found: .* is no run's workdir"):
        restore.restore_run(tmp_path)
    (tmp_path / "config.json").write_text(configs.to_json(digits()))
    with refused("there are no checkpoints in"):
        restore.restore_run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("memory", ["keep", "all"])
def test_a_loss_that_is_no_number_is_no_result(tmp_path, capsys, memory):
    """One weight is enough: the accuracy is that of the first class, with status 0 until now."""
    run = tmp_path / "run"
    config = digits("aim")
    write_run(config, run, lambda name, array: np.nan * array if "head" in name else array)
    before = snapshot(run)
    argv = ["--workdir", str(run), "--devices", "1", "--memory", memory]
    line = fails(capsys, evaluate_command.main, *argv, status=1)
    what = f"{run}, step 0, on test" if memory == "keep" else "the unaltered network"
    assert f"the loss of {what} is nan, so its accuracy, 10." in line
    assert snapshot(run) == before
