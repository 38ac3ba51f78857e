"""From a run's workdir alone to its network, its weights and their evaluation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from aim_flax import report
from aim_flax.build import build_model
from aim_flax.checkpoint import Checkpoints
from aim_flax.config import override
from aim_flax.data.load import load_dataset
from aim_flax.errors import UsageError
from aim_flax.evaluation import Evaluation, build_evaluate
from aim_flax.experiment import abstract_state
from aim_flax.parallel import Devices
from aim_flax.workdir import read_json


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint of a run.

    Attributes:
      config: the run's.
      model: its network, as `build_model` returns it.
      variables: the network's variables, numpy arrays: `model.apply(variables, images)`.
      step: the checkpoint's.
    """

    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    step: int


def restore_run(workdir: str | Path, checkpoint: str | int = "best") -> Restored:
    """Restores a checkpoint of a run.

    Args:
      workdir: of the run.
      checkpoint: "best" (by the accuracy on the split that selects), "latest" (the latest that
        can be read), or a step.

    Raises:
      UsageError: `workdir` is no run's, or has no such checkpoint.
    """
    workdir = Path(workdir)
    config = ConfigDict(read_json(workdir / "config.json")).lock()
    model = build_model(config)
    like = abstract_state(config, model)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        if checkpoint == "latest":
            found = checkpoints.restore_latest(like)
            if found is None:
                raise UsageError(f"there are no checkpoints in {workdir} yet")
            state, _, messages = found
            for message in messages:
                print(f"{message}; going back to step {state.step}", flush=True)
        else:
            if checkpoint != "best" and not str(checkpoint).isdecimal():
                raise UsageError(f"checkpoint is {checkpoint!r}, expected best, latest or a step")
            step = checkpoints.best_step() if checkpoint == "best" else int(checkpoint)
            state, _ = checkpoints.restore(step, like)
    finally:
        checkpoints.close()
    variables = {"params": state.params, **state.model_state}
    return Restored(config, model, variables, int(state.step))


def evaluate_run(
    workdir: str | Path,
    checkpoint: str | int = "best",
    split: str = "test",
    device_count: int | None = None,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Evaluates a checkpoint of a run, prints the result and writes it into the workdir.

    Writes `eval_<split>.json` and `confusion_<split>.png`. Arguments and errors are those of
    `restore_run`; `split` is "train", "val" or "test"; `overrides` are "key=value" of the config,
    as `config.override` takes them, for what concerns the data or the evaluation.
    """
    workdir = Path(workdir)
    restored = restore_run(workdir, checkpoint)
    config = override(restored.config, overrides)
    dataset = load_dataset(config)
    if split not in dataset.sizes:
        raise UsageError(f"no split {split!r}; there are: {', '.join(dataset.sizes)}")
    devices = Devices(config.parallel, device_count)
    batches = dataset.eval_batches(devices, split, config.eval.batch_size, config.data.scale)
    evaluate = build_evaluate(restored.model, devices, batches, len(dataset.classes))
    evaluation = evaluate(devices.replicate(restored.variables))
    low, high = evaluation.accuracy_interval()
    classes = report.per_class(evaluation, dataset.classes)
    result = {
        "split": split,
        "checkpoint": checkpoint,
        "step": restored.step,
        "examples": evaluation.count,
        "skipped": evaluation.skipped,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "classes": classes,
        "confusion": evaluation.confusion.tolist(),
    }
    try:
        report.write_json(workdir / f"eval_{split}.json", result)
        title = f"{config.name}:{config.arm}, seed {config.seed}, {split} split"
        report.plot_confusion(
            workdir / f"confusion_{split}.png", evaluation, dataset.classes, title
        )
    except OSError as error:
        raise UsageError(f"{workdir} is not writable: {error.strerror}") from None
    print(report.class_table(classes))
    left_out = f" ({evaluation.skipped} left out)" if evaluation.skipped else ""
    print(
        f"{workdir}, step {restored.step}, {split} split, {evaluation.count} images{left_out}: loss"
        f" {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.2%} (95 % interval {low:.2%} to"
        f" {high:.2%})"
    )
    return evaluation
