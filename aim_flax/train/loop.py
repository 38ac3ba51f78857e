"""The training loop: from a config and a workdir to a trained network and its summary."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_flax.console import Part, Reporter
from aim_flax.devices import any_process
from aim_flax.errors import DataError, DivergenceError
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.files import read_json
from aim_flax.train import report
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import Experiment
from aim_flax.train.optimizer import should_stop
from aim_flax.train.progress import Progress, add_epoch, first_not_finite, plateau_scale
from aim_flax.train.signals import interruption, signals
from aim_flax.train.summary import one_line, summarize, write_results
from aim_flax.train.workdir import claim, held

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
