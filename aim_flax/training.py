"""The training loop: from a config and a workdir to a trained network and its summary."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_flax import report
from aim_flax.checkpoint import Checkpoints
from aim_flax.console import Part, Reporter
from aim_flax.errors import DataError, DivergenceError, InterruptionError
from aim_flax.evaluation import Evaluation
from aim_flax.experiment import Experiment
from aim_flax.parallel import any_process, union_size
from aim_flax.schedules import best_epoch, plateau_cuts, select_epoch, should_stop
from aim_flax.workdir import claim, held, read_json, versions

EPOCH_SHOWN = ("train_loss", "train_accuracy", "val_accuracy")


def run(
    config: ConfigDict, workdir: str | Path, device_count: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains the network of a config, or goes on with it where the workdir's run was left.

    Args:
      config: the experiment.
      workdir: a directory of this run's own; created if it isn't there.
      device_count: how many devices to use; None for all.
      quiet: leave out the reports on progress.

    Returns:
      What it writes to `summary.json`.

    Raises:
      UsageError: before anything is touched, on a config that can't be run, or a workdir that
        holds something else, or in which another process is at work (BusyError).
      DivergenceError: the loss became NaN or infinite; the checkpoints before it are kept.
      DataError: an image can't be read; the state is saved.
      InterruptionError: SIGTERM or Ctrl-C; the state is saved.
    """
    return train(Experiment(config, device_count), Path(workdir), quiet)


def train(
    experiment: Experiment, workdir: Path, quiet: bool, part: Part | None = None
) -> dict[str, Any]:
    """Does what `run` does for an experiment that is built.

    Args:
      part: reports on progress in place of a reporter of the run's own.
    """
    claim(workdir, experiment.config)
    summary = workdir / "summary.json"
    if not summary.is_file():
        with held(workdir):
            # Another process may have finished it before it let go.
            if not summary.is_file():
                return _Run(experiment, workdir, quiet, part).train()
    if not quiet:
        print(f"{workdir} holds this run, finished")
    return read_json(summary)


@dataclasses.dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside the training state, as JSON.

    Attributes:
      history: a row per finished epoch, see report.HISTORY_COLUMNS, and its `memory_use`.
      best_step: the step after which the accuracy on the selection split was best.
      epoch_sums: loss and accuracy summed over the steps of the epoch under way.
      seconds: wall-clock time spent in training, over all tries.
      timed_examples, timed_seconds: of calls that did not compile.
      waited_seconds: of `timed_seconds`, those spent waiting for data.
      skipped: for each split, the indices of records that can't be read and were left out.
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

    @property
    def accuracies(self) -> list[float]:
        return [row["val_accuracy"] for row in self.history]

    @property
    def wait_share(self) -> float | None:
        """The share of training time that went into waiting for data."""
        return self.waited_seconds / self.timed_seconds if self.timed_seconds else None


class _Run:
    """One try at a run: from its latest checkpoint, or from the start, to its end."""

    def __init__(self, experiment: Experiment, workdir: Path, quiet: bool, part: Part | None):
        self.experiment, self.config, self.workdir = experiment, experiment.config, workdir
        self.devices, self.quiet, self.part = experiment.devices, quiet, part
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        state, self.progress = self._start()
        for split, indices in self.progress.skipped.items():
            experiment.dataset.skipped[split].update(indices)
        self.step = int(state.step)
        self.state = self.devices.replicate(state)
        self.started = time.monotonic() - self.progress.seconds
        self.saved_at = time.monotonic()

    def _start(self) -> tuple[Any, Progress]:
        restored = self.checkpoints.restore_latest(self.experiment.abstract_state)
        if restored is None:
            return self.experiment.initial_state(), Progress()
        state, progress, messages = restored
        self.checkpoints.set_aside_after(int(state.step))
        for message in messages:
            print(f"{message}; going back to step {state.step}", flush=True)
        if not self.quiet:
            total = self.experiment.total_steps
            print(f"resuming {self.workdir} at step {state.step} of {total}", flush=True)
        return state, Progress(**progress)

    def train(self) -> dict[str, Any]:
        experiment, config, progress = self.experiment, self.config, self.progress
        feed = experiment.train_batches.feed(config.seed, self.step, experiment.total_steps)
        seed = self.devices.replicate(np.uint32(config.seed))
        select = experiment.evaluate(config.eval.select_on)
        probe = experiment.memory_probe()
        calls: dict[int, Callable] = {}
        events = report.Events(self.workdir, self.step)
        if self.part:
            self.part.begin(self.step)
            reporting = contextlib.nullcontext(self.part)
        else:
            reporting = Reporter(experiment.total_steps, self.step, self.quiet)
        with (
            signals(self.part and self.part.received) as received,
            events,
            reporting as reporter,
            contextlib.closing(feed),
        ):
            while not self._done():
                left_in_epoch = experiment.epoch_steps - self.step % experiment.epoch_steps
                length = min(experiment.steps_per_call, left_in_epoch)
                compiled = length in calls
                if not compiled:
                    calls[length] = experiment.train_call(length)
                before = time.monotonic()
                data = self._data(feed)
                waited = time.monotonic() - before
                self.state, metrics = calls[length](self.state, data, seed)
                metrics = self.devices.fetch(metrics)
                if compiled:
                    progress.waited_seconds += waited
                    progress.timed_seconds += time.monotonic() - before
                    progress.timed_examples += length * config.train.batch_size
                self._check_finite(metrics["loss"], self.step + 1)
                self.step += length
                for name, values in metrics.items():
                    for value in values:
                        progress.epoch_sums[name] += float(value)
                shown = {name: float(values[-1]) for name, values in metrics.items()}
                minutes = (time.monotonic() - self.saved_at) / 60
                stop, save = any_process(bool(received), minutes >= config.train.checkpoint_minutes)
                if length == left_in_epoch:
                    shown = self._finish_epoch(select, probe)
                    self._save()
                    self._write_epoch(events)
                elif stop or save:
                    self._save()
                reporter.advance(self.step, shown)
                if stop and not self._done():
                    self.checkpoints.close()
                    # Another process may have been the one to get it.
                    raise interruption(received[0] if received else signal.SIGTERM, self.step)
            summary = self._finish()
            if not self.quiet:
                reporter.say(one_line(summary))
        return summary

    def _data(self, feed: Any) -> Any:
        try:
            return feed.at(self.step)
        except DataError as error:
            # Saving takes all processes, and the others may be well.
            if jax.process_count() > 1 or not self.step:
                raise
            self._save()
            self.checkpoints.close()
            raise DataError(
                f"{error}; saved at step {self.step}, the same command goes on from there"
            ) from None

    def _done(self) -> bool:
        patience = self.config.train.stop_patience
        if patience is not None and self.progress.history:
            accuracies = self.progress.accuracies
            if should_stop(accuracies, patience, self.config.train.stop_min_delta):
                return True
        return self.step >= self.experiment.total_steps

    def _check_finite(self, losses: Sequence[float], first_step: int) -> None:
        """Raises DivergenceError if the loss of one of these consecutive steps is not finite."""
        step = first_not_finite(losses, first_step)
        if step is not None:
            self.checkpoints.wait()
            steps = self.checkpoints.steps
            self.checkpoints.close()
            kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "none saved"
            epoch = (step - 1) // self.experiment.epoch_steps + 1
            loss = losses[step - first_step]
            raise DivergenceError(f"loss {loss} at step {step} (epoch {epoch}); {kept}", step)

    def _finish_epoch(
        self, select: Callable[[Any], Evaluation], probe: Callable
    ) -> dict[str, float]:
        """Evaluates, adds a row to the history, and lets a plateau cut the learning rate."""
        variables = {"params": self.state.params, **self.state.model_state}
        selection = select(variables)
        self._check_finite([selection.loss], self.step)
        scale = float(self.devices.fetch(self.state.learning_rate_scale))
        add_epoch(self.experiment, self.progress, self.step, scale, selection, probe(variables))
        if self.config.schedule.plateau_patience is not None:
            scale = plateau_scale(self.config, self.progress)
            self.state = self.state.replace(learning_rate_scale=self.devices.replicate(scale))
        row = self.progress.history[-1]
        return {name: row[name] for name in EPOCH_SHOWN}

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self.started
        self.progress.skipped = {
            split: sorted(indices) for split, indices in self.experiment.dataset.skipped.items()
        }
        state = self.devices.fetch(self.state)
        self.checkpoints.save(self.step, state, dataclasses.asdict(self.progress))
        self.saved_at = time.monotonic()

    def _write_epoch(self, events: report.Events) -> None:
        events.write(self.progress.history[-1], self.progress.wait_share)
        if jax.process_index() == 0:
            report.write_metrics(self.workdir, self.progress.history)

    def _finish(self) -> dict[str, Any]:
        """Tests the best checkpoint, writes what the run leaves, and returns its summary."""
        self.progress.seconds = time.monotonic() - self.started
        self.checkpoints.wait()
        best, _ = self.checkpoints.restore(self.progress.best_step, self.experiment.abstract_state)
        self.checkpoints.close()
        variables = self.devices.replicate({"params": best.params, **best.model_state})
        test = self.experiment.evaluate("test")(variables)
        summary = summarize(self.experiment, self.progress, best, test)
        if jax.process_index() == 0:
            write_results(self.workdir, self.config, self.progress.history, summary)
        return summary


def first_not_finite(losses: Sequence[float], first_step: int) -> int | None:
    """Returns the first of these consecutive steps with a loss that is NaN or infinite, or None."""
    steps = enumerate(losses, start=first_step)
    return next((step for step, loss in steps if not math.isfinite(loss)), None)


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
    """Returns what the plateaus so far have left of the schedule's learning rate."""
    schedule = config.schedule
    cuts = plateau_cuts(progress.accuracies, schedule.plateau_patience, schedule.plateau_min_delta)
    return np.float32(schedule.plateau_factor ** len(cuts))


def summarize(
    experiment: Experiment, progress: Progress, best: Any, test: Evaluation
) -> dict[str, Any]:
    """Returns the summary of a run that has come to its end.

    Args:
      best: the training state of its best epoch.
      test: what that made of the test split.
    """
    config = experiment.config
    low, high = test.accuracy_interval()
    row = next(row for row in progress.history if row["step"] == progress.best_step)
    timed, waited = progress.timed_seconds, progress.wait_share
    return {
        "name": config.name,
        "arm": config.arm,
        "seed": config.seed,
        "test_accuracy": test.accuracy,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_loss": test.loss,
        "test_examples": test.count,
        "skipped_images": sum(
            union_size(indices, experiment.dataset.records[split])
            for split, indices in experiment.dataset.skipped.items()
        ),
        "val_accuracy": row["val_accuracy"],
        "val_loss": row["val_loss"],
        "selected_on": config.eval.select_on,
        "best_step": progress.best_step,
        "steps": progress.history[-1]["step"],
        "epochs": len(progress.history),
        "params": _size(best.params),
        "batch_stats": _size(best.model_state.get("batch_stats", {})),
        "memory_floats": 0 if config.memory is None else math.prod(config.memory.shape),
        "train_seconds": round(progress.seconds, 3),
        "examples_per_second": round(progress.timed_examples / timed, 1) if timed else None,
        "data_wait_share": None if waited is None else round(waited, 4),
        "device": f"{experiment.devices.count} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }


def write_results(
    workdir: Path, config: ConfigDict, history: report.History, summary: dict[str, Any]
) -> None:
    """Writes what a finished run leaves beside its checkpoints and events."""
    title = f"{config.name}:{config.arm}, seed {config.seed}"
    report.write_metrics(workdir, history)
    report.plot_history(workdir / "history.png", history, title)
    if config.memory is not None:
        report.plot_memory_use(workdir / "memory_use.png", history, title)
    # Last, for its presence says that the run is finished.
    report.write_json(workdir / "summary.json", summary)


@contextlib.contextmanager
def signals(received: list[int] | None = None) -> Iterator[list[int]]:
    """Yields a list that a first SIGTERM or Ctrl-C is put on; a second one acts as usual.

    Args:
      received: the list; None: a new one.
    """
    received = [] if received is None else received
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def receive(signum, frame):
        received.append(signum)
        restore()

    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            previous[signum] = signal.signal(signum, receive)
    except ValueError:  # Not in the main thread: whoever started the thread handles signals.
        restore()
    try:
        yield received
    finally:
        restore()


def interruption(signum: int, step: int) -> InterruptionError:
    name = signal.Signals(signum).name
    return InterruptionError(
        f"{name}: saved at step {step}; the same command goes on from there", signum
    )


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def one_line(summary: dict[str, Any]) -> str:
    return (
        f"{summary['name']}:{summary['arm']} seed {summary['seed']}: test accuracy"
        f" {summary['test_accuracy']:.2%} ({summary['test_accuracy_low']:.2%} to"
        f" {summary['test_accuracy_high']:.2%}) on {summary['test_examples']} images, best"
        f" {summary['selected_on']} accuracy {summary['val_accuracy']:.2%} at step"
        f" {summary['best_step']}, {summary['train_seconds']:.1f} s"
    )
