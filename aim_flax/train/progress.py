"""How far a run has come: its history by epoch, and the best epoch."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.train.experiment import Experiment
from aim_flax.train.optimizer import best_epoch, plateau_cuts, select_epoch


@dataclasses.dataclass
class Progress:
    """How far a run has come; checkpoints hold it, as JSON, besides the training state.

    Attributes:
      history: a row per finished epoch, see report.HISTORY_COLUMNS, and its `memory_use`.
      best_step: the step after which the accuracy on the selection split was best.
      epoch_sums: loss and accuracy, summed over the steps of the current epoch.
      seconds: wall-clock time of training, over all processes that worked on the run.
      timed_examples, timed_seconds: of calls that did not compile.
      waited_seconds: of `timed_seconds`, those spent waiting for data.
      skipped: for each split, the indices of records that can't be read and were left out.
      diverged_at: the step of the first loss that was not finite, or None.
      anomaly: what was the first in that step that was not finite, where that was looked for.
    """

    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_step: int | None = None
    epoch_sums: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"loss": 0.0, "accuracy": 0.0}
    )
    seconds: float = 0.0
    timed_examples: int = 0
    timed_seconds: float = 0.0
    waited_seconds: float = 0.0
    skipped: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    diverged_at: int | None = None
    anomaly: str | None = None

    def add_steps(self, losses: Sequence[float], accuracies: Sequence[float], step: int) -> None:
        """Adds the metrics of consecutive steps, the first of which is `step`."""
        for loss, accuracy in zip(losses, accuracies, strict=True):
            self.epoch_sums["loss"] += float(loss)
            self.epoch_sums["accuracy"] += float(accuracy)
        self.check_finite(losses, step)

    def check_finite(self, losses: Sequence[float], step: int) -> None:
        """Notes the first of the losses of consecutive steps that is NaN or infinite."""
        bad = (i for i, loss in enumerate(losses, start=step) if not math.isfinite(loss))
        if self.diverged_at is None:
            self.diverged_at = next(bad, None)

    def note_anomaly(self, indices: Sequence[int], names: Sequence[str], step: int) -> None:
        """Notes the first anomaly of consecutive steps, the first of which is `step`.

        Args:
          indices: of `names`, for each step; -1: none.
        """
        bad = [(i, index) for i, index in enumerate(indices, start=step) if index >= 0]
        if bad and self.diverged_at is None:
            self.diverged_at, self.anomaly = bad[0][0], names[bad[0][1]]

    @property
    def accuracies(self) -> list[float]:
        return [row["val_accuracy"] for row in self.history]

    @property
    def wait_share(self) -> float | None:
        """The share of training time spent waiting for data."""
        return self.waited_seconds / self.timed_seconds if self.timed_seconds else None


def add_epoch(
    experiment: Experiment,
    progress: Progress,
    step: int,
    learning_rate_scale: float,
    selection: Evaluation,
    memory_use: dict[str, dict[str, float]],
) -> None:
    """Adds the row of the epoch that ends with `step` to a run's history, and finds the best."""
    config, epoch_steps = experiment.config, experiment.epoch_steps
    progress.history.append(
        {
            "epoch": step // epoch_steps,
            "step": step,
            "learning_rate": float(experiment.schedule(step - 1)) * learning_rate_scale,
            "train_loss": progress.epoch_sums["loss"] / epoch_steps,
            "train_accuracy": progress.epoch_sums["accuracy"] / epoch_steps,
            "val_loss": selection.loss,
            "val_accuracy": selection.accuracy,
            "memory_use": memory_use,
        }
    )
    progress.epoch_sums = dict.fromkeys(progress.epoch_sums, 0.0)
    if config.train.stop_patience is None:
        losses = [row["val_loss"] for row in progress.history]
        best = select_epoch(progress.accuracies, losses)
    else:
        best = best_epoch(progress.accuracies, config.train.stop_min_delta)
    progress.best_step = best * epoch_steps


def plateau_scale(config: ConfigDict, progress: Progress) -> np.float32:
    """Returns the factor by which the plateaus so far have cut the learning rate."""
    schedule = config.schedule
    cuts = plateau_cuts(progress.accuracies, schedule.plateau_patience, schedule.plateau_min_delta)
    return np.float32(schedule.plateau_factor ** len(cuts))
