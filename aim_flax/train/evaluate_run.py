"""Evaluates a checkpoint of a run from its workdir alone: the work of eval.py."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from aim_flax import files
from aim_flax.config import override
from aim_flax.data.augment import rolls
from aim_flax.data.dataset import Dataset, EvalBatches
from aim_flax.data.fingerprint import changes
from aim_flax.data.load import decode_if_small, open_dataset, with_classes
from aim_flax.data.preprocessing import Preprocessing
from aim_flax.data.scaling import scaling
from aim_flax.devices import Devices
from aim_flax.errors import UsageError
from aim_flax.evaluate import effects, report
from aim_flax.evaluate import memory_pictures as pictures
from aim_flax.evaluate.evaluation import Evaluation, build_evaluate
from aim_flax.evaluate.interventions import Choosable, intervene, layers
from aim_flax.names import printable
from aim_flax.train import dataset_record
from aim_flax.train.page import page, write_page
from aim_flax.train.restore import Restored, restore_run

_OTHER = "_other_images"


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A checkpoint of a run and the split to evaluate it on.

    Attributes:
      config: the run's, with overrides.
      variables: replicated.
      other_images: how many of the split's images are new to the run's split, and how many of that
        are gone; None if they are the run's own, or it is from before that was recorded.
      record: whether the run is from before its images were recorded, and these are its own.
    """

    restored: Restored
    config: ConfigDict
    split: str
    dataset: Dataset
    devices: Devices
    batches: EvalBatches
    variables: dict[str, Any]
    other_images: dict[str, int] | None
    record: bool

    def build(self, model: nn.Module | Choosable) -> Callable[[dict[str, Any]], Evaluation]:
        """Returns a function that evaluates a network with given variables added to the
        checkpoint's."""
        evaluate = build_evaluate(model, self.devices, self.batches, len(self.classes))
        seed = self.config.seed
        return lambda variables: evaluate(
            {**self.variables, **self.devices.replicate(variables)}, seed
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    @property
    def label(self) -> str:
        """What names of files say: of other images than the run's the results are others."""
        return self.split if self.other_images is None else f"{self.split}{_OTHER}"

    @property
    def title(self) -> str:
        config = self.restored.config
        of_others = "" if self.other_images is None else " of other images"
        return f"{config.name}:{config.arm}, seed {config.seed}, {self.split} split{of_others}"


def _open(
    workdir: Path,
    restored: Restored,
    split: str,
    device_count: int | None,
    overrides: Sequence[str],
) -> _Opened:
    config = override(restored.config, overrides)
    _check_images(restored, config)
    dataset = open_dataset(config)
    if split not in dataset.sizes:
        raise UsageError(f"no split {split!r}; there are: {', '.join(dataset.sizes)}")
    recorded = dataset_record.read(workdir)
    if recorded is not None:
        dataset_record.check_classes(workdir, recorded.classes, config, dataset.classes)
    with_classes(config, dataset.classes)
    changed = recorded and changes(recorded, dataset.fingerprint).get(split)
    if changed:
        dataset_record.check_unseen(workdir, recorded, dataset.fingerprint, split)
        print(
            f"not the images of the run: {dataset_record.described({split: changed})};"
            f" {workdir} keeps its own results, these go to files named {split}{_OTHER}"
        )
    dataset = decode_if_small(dataset, config)
    devices = Devices(config.parallel, device_count)
    page(workdir)  # raises before anything is written
    batches = dataset.eval_batches(
        devices, split, config.eval.batch_size, scaling(config.data), rolls(config.augment)
    )
    variables = devices.replicate(restored.variables)
    other = {"new": changed.new, "gone": changed.gone} if changed else None
    # Not of images that it may never have seen.
    record = recorded is None and not any(text.startswith("data.") for text in overrides)
    return _Opened(restored, config, split, dataset, devices, batches, variables, other, record)


@contextmanager
def _writing(workdir: Path, opened: _Opened) -> Iterator[None]:
    """For the results of an evaluation that went well: the run's page is written again, too."""
    with files.writing(workdir):
        if opened.record:
            dataset_record.write(workdir, opened.dataset.fingerprint)
        yield
        write_page(workdir)


def _check_images(restored: Restored, config: ConfigDict) -> None:
    """Raises UsageError if the network can't compute with images of another shape."""
    trained, shape = restored.config.data.image_shape, config.data.image_shape
    if tuple(shape) == tuple(trained):
        return
    images = jax.ShapeDtypeStruct((2, *shape), np.float32)
    try:
        jax.eval_shape(partial(restored.model.apply, train=False), restored.variables, images)
    except (flax.errors.FlaxError, TypeError, ValueError):  # UsageError is a ValueError.
        raise UsageError(
            f"data.image_shape is {tuple(shape)}, but the network was trained on {tuple(trained)}"
            " and can't compute with it"
        ) from None


def evaluate_run(
    workdir: str | Path,
    checkpoint: str | int = "best",
    split: str = "test",
    device_count: int | None = None,
    overrides: Sequence[str] = (),
    memory: str = "keep",
    at: str = ".*",
) -> Evaluation:
    """Evaluates a checkpoint of a run, prints the result and writes it into the workdir.

    Writes `eval_<split>.json`, `confusion_<split>.png` and `mistakes_<split>.png`, with an altered
    memory `eval_<split>_<memory>.json` and so on, of other images than the run's
    `eval_<split>_other_images.json` and so on; and the run's page, `report.html`, again.

    Args:
      workdir, checkpoint: as for `restore_run`.
      split: "train", "val" or "test".
      device_count: how many devices to use; None for all.
      overrides: "key=value" for the config's groups data and eval, as for `config.override`.
      memory, at: how and where the memory is altered, see `interventions.intervene`.

    Raises:
      UsageError: as `restore_run` and `intervene` do; no such split or number of devices; the
        dataset has other classes than the run; some of the images are ones that the run was trained
        on, or selected by, as another split. Other images of the same classes are told in a line.
      NotFiniteError: the loss is NaN or infinite; nothing is written.
    """
    workdir = Path(workdir)
    restored = restore_run(workdir, checkpoint)
    model, altered, suffix = restored.model, "", ""
    where = "everywhere" if at == ".*" else f"at {at!r}"
    if memory != "keep":
        model = intervene(model, memory, at)
        layers(model, _images(restored.config))  # raises before data are loaded
        altered, suffix = f", with altered memory ({memory} {where})", f"_{memory}"
    opened = _open(workdir, restored, split, device_count, overrides)
    name = f"{opened.label}{suffix}"
    for file in (f"eval_{name}.json", f"confusion_{name}.png", f"mistakes_{name}.png"):
        files.check_kind(workdir / file)
    evaluation = opened.build(model)({})
    evaluation.check_finite(f"{workdir}, step {restored.step}, on {split}{altered}")
    low, high = evaluation.accuracy_interval()
    context = {
        "split": split,
        "checkpoint": checkpoint,
        "step": restored.step,
        "memory": memory,
        "at": at,
        "other_images": opened.other_images,
    }
    white = Preprocessing.of(opened.config.data).white
    from aim_flax.evaluate.plots import plot_confusion

    with _writing(workdir, opened):
        report.write_evaluation(workdir, name, evaluation, opened.dataset, white, context)
        plot_confusion(
            workdir / f"confusion_{name}.png",
            evaluation,
            opened.classes,
            opened.title + altered,
        )
    print(report.class_table(report.per_class(evaluation, opened.classes)))
    print(
        f"{_heading(workdir, opened, evaluation)}{altered}: loss {evaluation.loss:.4f}, accuracy"
        f" {evaluation.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%}), balanced"
        f" {evaluation.balanced_accuracy:.2%}, macro F1 {evaluation.macro_f1:.2%}"
    )
    return evaluation


def evaluate_interventions(
    workdir: str | Path,
    checkpoint: str | int = "best",
    split: str = "test",
    device_count: int | None = None,
    overrides: Sequence[str] = (),
    at: str = ".*",
    per_layer: bool = False,
) -> effects.Effects:
    """Compares a checkpoint of a run with itself under every intervention on its memory.

    Prints a Markdown table and writes `interventions_<split>.json` and `.csv`, with `per_layer`
    also `.png`. Other arguments and errors are those of `evaluate_run`; `at` and `per_layer` are
    those of `effects.plan`.
    """
    workdir = Path(workdir)
    restored = restore_run(workdir, checkpoint)
    # Raises before data are loaded.
    plan = effects.plan(restored.model, _images(restored.config), at, per_layer)
    opened = _open(workdir, restored, split, device_count, overrides)
    measured = effects.measure(plan, opened.build)
    where = "" if at == ".*" else f", reads and updates that match {at!r}"
    context = {
        "split": split,
        "checkpoint": checkpoint,
        "step": restored.step,
        "at": at,
        "examples": measured.keep.count,
        "skipped": measured.keep.skipped,
        "other_images": opened.other_images,
    }
    with _writing(workdir, opened):
        report.write_effects(
            workdir / f"interventions_{opened.label}", measured, context, opened.title + where
        )
    print(f"{_heading(workdir, opened, measured.keep)}, with altered memory{where}:\n")
    print(report.effects_table(measured))
    return measured


def picture_memory(
    workdir: str | Path,
    checkpoint: str | int = "best",
    split: str = "test",
    device_count: int | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Draws what is in the memory of a run's network.

    Writes `memory_learned.png` and, if the network writes, `memory_written_<split>.png`, what
    single images write, and `memory_classes_<split>.png` and `.json`, how far the memories of
    classes are apart: see `evaluate.memory_pictures`. Arguments and errors are those of
    `evaluate_run`; a network without memory is a UsageError.
    """
    workdir = Path(workdir)
    restored = restore_run(workdir, checkpoint)
    if restored.config.memory is None:
        raise UsageError(f"{workdir} has no memory to draw: its network is plain")
    opened = _open(workdir, restored, split, device_count, overrides)
    notebooks = pictures.collect(
        restored.model, opened.devices, opened.batches, opened.variables, opened.config.seed
    )
    context = {
        "split": split,
        "checkpoint": checkpoint,
        "step": restored.step,
        "other_images": opened.other_images,
    }
    with _writing(workdir, opened):
        written = pictures.write(
            workdir, opened.label, notebooks, opened.classes, context, opened.title
        )
    images = f"{len(notebooks.labels)} images: {', '.join(written)}"
    print(f"{printable(workdir)}, step {restored.step}, {images}")


def _images(config: ConfigDict) -> jax.ShapeDtypeStruct:
    """Returns the shape of two images: interventions need several."""
    return jax.ShapeDtypeStruct((2, *config.data.image_shape), np.float32)


def _heading(workdir: Path, opened: _Opened, evaluation: Evaluation) -> str:
    left_out = f" ({evaluation.skipped} left out)" if evaluation.skipped else ""
    return (
        f"{printable(workdir)}, step {opened.restored.step}, {opened.split} split,"
        f" {evaluation.count} images{left_out}"
    )
