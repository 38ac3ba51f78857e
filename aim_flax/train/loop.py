"""The training loop: from a config and a workdir to a trained network and its summary.

A single run is a group of one. Several seeds of a config are trained as one program (`together.py`)
by the same loop. Then states, metrics and orders of examples have a leading axis of seeds; for a
single run they have none.
"""

import contextlib
import dataclasses
import importlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from aim_flax.console import Pace, Part, ProgressFile, Reporter
from aim_flax.devices import any_process
from aim_flax.errors import DataError, DivergenceError, NotFiniteError, StorageError
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.files import read_mapping, refused, write_json, writing
from aim_flax.train import dataset_record, report
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import Experiment
from aim_flax.train.optimizer import should_stop
from aim_flax.train.progress import Progress, add_epoch, plateau_scale
from aim_flax.train.signals import asked_to_save, interruption, signals
from aim_flax.train.step import TrainState, size_in_bytes, variables_of
from aim_flax.train.summary import one_line, run_summary, write_results
from aim_flax.train.workdir import (
    PRETRAINED,
    PROGRESS,
    can_go_on,
    check_claim,
    claimed,
    identity,
    is_finished,
    mark_diverged,
    raise_epochs,
)

_EPOCH_SHOWN = ("train_loss", "train_accuracy", "val_accuracy")


def run(
    config: ConfigDict,
    workdir: str | Path,
    device_count: int | None = None,
    quiet: bool = False,
    other_images: bool = False,
) -> dict[str, Any]:
    """Trains the network of a config, or continues the workdir's run where it stopped.

    Args:
      config: the experiment. A run in the workdir may have fewer epochs, see
        `workdir.raise_epochs`.
      workdir: a directory for this run alone; created if it does not exist.
      device_count: how many devices to use; None for all.
      quiet: print no progress.
      other_images: train on with other images of the same classes, see `dataset_record.check`.

    Returns:
      What it writes to `summary.json`.

    Raises:
      UsageError: before anything is written: the config can't be run, the workdir holds something
        else, or another process is at work in it (BusyError).
      DivergenceError: the loss became NaN or infinite; the best network before it is saved.
      DataError: an image can't be read; the state is saved.
      NotFiniteError: the loss on the test split is not finite.
      InterruptionError: SIGTERM, SIGHUP or Ctrl-C; the state is saved.
      StorageError: the results, or the state when the run is to end, can't be written; or the
        workdir is gone.
    """
    experiment = Experiment(config, device_count)
    return train(experiment, Path(workdir), quiet, other_images=other_images)


def train(
    experiment: Experiment,
    workdir: Path,
    quiet: bool,
    part: Part | None = None,
    other_images: bool = False,
) -> dict[str, Any]:
    """Does what `run` does, for an experiment that is already built.

    Args:
      part: reports on progress, where the run is part of longer work.
    """
    config, summary = experiment.config, workdir / "summary.json"
    # Before the config, which may differ because of the images.
    note = check_dataset(workdir, experiment, other_images)
    check_claim(workdir, config, more_epochs=True)
    if not can_go_on(workdir):
        experiment.pretrained()  # raises before anything is written
    if note and not quiet:
        print(note, flush=True)
    # A finished run from before has no record of its images; one that has one keeps it.
    if not is_finished(workdir, config) or not dataset_record.exists(workdir):
        own = claimed(workdir, config, more_epochs=True)
        with own, Reporter(experiment.total_steps, 0, quiet) as reporter:
            dataset_record.write(workdir, experiment.dataset.fingerprint, experiment.epoch_steps)
            # Another process may have finished the run before it released the workdir. All of the
            # run's own look before the first of them changes anything.
            if any_process(not is_finished(workdir, config))[0]:
                part = part or Part(reporter, "", 0, 1, None)
                if jax.process_index() == 0 and (raised := raise_epochs(workdir, config)):
                    part.say(raised)
                return Loop([experiment], [workdir], workdir / "checkpoints", part).train()[0]
    if not quiet:
        print(f"{workdir} holds this run, finished")
    return read_mapping(summary, ("name", "arm", "seed"), "run's summary")


def check_dataset(workdir: Path, experiment: Experiment, other_images: bool) -> str | None:
    """Does what `dataset_record.check` does, for an experiment."""
    found, steps = experiment.dataset.fingerprint, experiment.epoch_steps
    return dataset_record.check(workdir, experiment.config, found, steps, other_images)


class Loop:
    """Trains a run, or several that differ only in their seed, from the latest checkpoint (or from
    the start) to the end.

    Attributes:
      runs: their experiments.
      together: whether there are several, so that arrays have a leading axis of seeds.
      progress: of each run.
      states: the training state on the devices.
      best: the variables of each run's best epoch so far, on the devices.
      step: how many steps have been taken.
    """

    def __init__(
        self,
        runs: Sequence[Experiment],
        workdirs: Sequence[Path],
        checkpoints: Path,
        part: Part,
    ):
        self.runs, self.workdirs, self.part = runs, workdirs, part
        self.experiment, self.config, self.devices = runs[0], runs[0].config, runs[0].devices
        self.together = len(runs) > 1
        self.checkpoints = Checkpoints(checkpoints)
        states, best = self._start()
        for split, indices in self.progress[0].skipped.items():
            self.experiment.dataset.skipped[split].update(indices)
        self.step = int(np.ravel(states.step)[0])
        # At most: what is compressed may take less.
        self.checkpoint_bytes = size_in_bytes((states, best))
        # What the latest checkpoint holds.
        self.saved = self._how_far() if self.step in self.checkpoints.steps else None
        self.states, self.best = self.devices.replicate(states), self.devices.replicate(best)
        seeds = np.array([run.config.seed for run in runs], np.uint32)
        self.seed = seeds if self.together else self.config.seed
        self.pace = Pace(self.experiment.total_steps, self.step)
        self.files = [ProgressFile(workdir / PROGRESS) for workdir in workdirs]
        self.identities = [identity(workdir) for workdir in workdirs]
        self.began = self.saved_at = time.monotonic()
        self.seconds_before = [progress.seconds for progress in self.progress]

    def _start(self) -> tuple[TrainState, dict[str, Any]]:
        """Returns the training state and the best variables, and sets the runs' progress."""
        like = self.experiment.abstract_state
        if self.together:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((len(self.runs), *x.shape), x.dtype), like
            )
        found, messages = self.checkpoints.latest(like)
        step = found.step if found else 0
        for message in messages:
            print(f"{message}; going back to step {step}", flush=True)
        self.checkpoints.set_aside_after(step)
        if found is None:
            self.progress = [Progress() for _ in self.runs]
            pretrained = self.experiment.pretrained()
            initial = [run.initial_state(pretrained) for run in self.runs]
            if pretrained is not None:
                self._note_start(pretrained.record)
            states = initial[0]
            if self.together:
                states = jax.tree.map(lambda *leaves: np.stack(leaves), *initial)
            return states, variables_of(states)
        of_runs = found.progress["runs"] if self.together else [found.progress]
        self.progress = [Progress(**of_run) for of_run in of_runs]
        what = f"{len(self.runs)} seeds of {self.config.arm}" if self.together else self.workdirs[0]
        if note := found.note:
            self.part.say(note)
        self.part.say(f"resuming {what} at step {step} of {self.experiment.total_steps}")
        return found.state, found.best or variables_of(found.state)

    def _note_start(self, record: dict[str, Any]) -> None:
        """Says which weights the runs start from, and writes it into their workdirs."""
        head = ", with a new head" if record["new_head"] else ""
        self.part.say(f"starting from {record['weights']} ({record['sha256'][:12]}){head}")
        if jax.process_index() == 0:
            for workdir in self.workdirs:
                with writing(workdir):
                    write_json(workdir / PRETRAINED, record)

    @property
    def alive(self) -> list[int]:
        """The positions of the runs that have not diverged."""
        return [i for i, progress in enumerate(self.progress) if progress.diverged_at is None]

    def train(self) -> list[dict[str, Any]]:
        """Trains to the end, leaves each run's results in its workdir, and returns the summaries.

        Raises:
          DivergenceError, DataError, InterruptionError, StorageError: as `run` does. One of several
            runs that diverges is marked (`mark_diverged`), and the others continue.
        """
        experiment, config = self.experiment, self.config
        compiled: set[int] = set()
        with contextlib.ExitStack() as stack:
            received = self.part.received
            if received is None:
                received = stack.enter_context(signals())
            asked = stack.enter_context(asked_to_save())
            # None if only results are missing: the files of a finished run are not touched.
            workdirs = [] if self._done() else self.workdirs
            events = [report.Events(workdir, self.step) for workdir in workdirs]
            self.part.begin(self.step)
            feed = experiment.train_batches.feed(self.seed, self.step, experiment.total_steps)
            stack.enter_context(contextlib.closing(feed))
            seed = self.devices.replicate(np.asarray(self.seed, np.uint32))
            select = experiment.evaluate(config.eval.select_on, self.together)
            probe = experiment.memory_probe(self.together)
            if not self._done():
                self._look_at_space()
            if self._awaits_evaluation():
                self._end_epoch(select, probe, events)
                if self._done():
                    self._save()
            while not self._done():
                left_in_epoch = experiment.epoch_steps - self.step % experiment.epoch_steps
                length = min(experiment.steps_per_call, left_in_epoch)
                call = experiment.train_call(length, self.together)
                before = time.monotonic()
                data = self._data(feed)
                waited = time.monotonic() - before
                self.states, metrics = call(self.states, data, seed)
                metrics = self.devices.fetch(metrics)
                if length in compiled:
                    self._note_time(length, time.monotonic() - before, waited)
                if not compiled and jax.process_index() == 0:
                    stack.callback(_begin_import("aim_flax.train.plots").join)
                compiled.add(length)
                shown = self._note_metrics(metrics)
                self.step += length
                minutes = (time.monotonic() - self.saved_at) / 60
                due, times = minutes >= config.train.checkpoint_minutes, len(asked)
                flags = bool(received), due or times > 0, self._is_gone()
                stop, save, gone = any_process(*flags)
                if gone:
                    raise self._lost()
                if length == left_in_epoch and self.alive:
                    shown = self._end_epoch(select, probe, events) or shown
                done = self._done()
                if stop and not done:
                    self._save_now()
                elif done or save:
                    self._save()
                elif self.checkpoints.is_written:
                    self._wait()
                if times:
                    del asked[:times]  # Another may have come since.
                    if self._wait() and self.saved is not None:
                        self.part.say(f"SIGUSR1: saved at step {self.step}")
                self.part.advance(self.step, shown)
                self._write_progress(done, stop or length == left_in_epoch)
                if stop and not done:
                    self.checkpoints.close()
                    # The signal may have come to another process.
                    raise interruption(received[0] if received else signal.SIGTERM, self.step)
            return self._finish()

    def _data(self, feed: Any) -> Any:
        try:
            return feed.at(self.step)
        except DataError as error:
            raise self._saved_before(error) from None

    def _end_epoch(
        self, select: Callable, probe: Callable, events: Sequence[report.Events]
    ) -> dict[str, float]:
        try:
            shown = self._finish_epoch(select, probe)
        except DataError as error:
            raise self._saved_before(error) from None
        self._write_epoch(events)
        return shown

    def _saved_before(self, error: DataError) -> DataError:
        """Saves the state, and returns the error with where."""
        # Saving needs all processes, and the others may have read their images.
        if jax.process_count() > 1 or not self.step:
            return error
        try:
            self._save_now()
        except StorageError as unsaved:
            return DataError(f"{error}; {unsaved}")
        self.checkpoints.close()
        return DataError(
            f"{error}; saved at step {self.step}, the same command continues from there"
        )

    def _awaits_evaluation(self) -> bool:
        """Returns whether the step ends an epoch of which nobody could read an image that
        selects."""
        epochs = self.step // self.experiment.epoch_steps
        return any(len(self.progress[i].history) < epochs for i in self.alive)

    def _done(self) -> bool:
        if self._awaits_evaluation():
            return False
        patience = self.config.train.stop_patience
        if patience is not None and self.progress[0].history:
            accuracies = self.progress[0].accuracies
            if should_stop(accuracies, patience, self.config.train.stop_min_delta):
                return True
        return self.step >= self.experiment.total_steps or not self.alive

    def _note_time(self, length: int, seconds: float, waited: float) -> None:
        """Adds the time of a call that did not compile, in equal shares, to each run."""
        for progress in self.progress:
            progress.timed_seconds += seconds / len(self.runs)
            progress.waited_seconds += waited / len(self.runs)
            progress.timed_examples += length * self.config.train.batch_size

    def _note_metrics(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Adds the metrics of consecutive steps, and returns the last ones, as means over the runs
        that have not diverged."""
        metrics = {name: np.atleast_2d(values) for name, values in metrics.items()}
        for i in self.alive:
            of_run = {name: values[i] for name, values in metrics.items()}
            if "anomaly" in of_run:
                names = self.experiment.anomaly_names
                self.progress[i].note_anomaly(of_run["anomaly"], names, self.step + 1)
            self.progress[i].add_steps(of_run["loss"], of_run["accuracy"], self.step + 1)
            self._check_alone(of_run["loss"], self.step + 1)
        alive, shown = self.alive or [0], ("loss", "accuracy")
        return {name: float(metrics[name][alive, -1].mean()) for name in shown}

    def _check_alone(self, losses: Sequence[float], first_step: int) -> None:
        """Saves the best network and raises DivergenceError, if a single run has diverged."""
        step = self.progress[0].diverged_at
        if self.together or step is None:
            return
        best_step = self.progress[0].best_step
        self._wait()
        if best_step is not None and best_step not in self.checkpoints.steps:
            best = self.devices.fetch(self.best)
            # Of a disk that refuses, it is said below what was saved before.
            with contextlib.suppress(StorageError):
                self.checkpoints.save(best_step, self._as_json(), best=best)
                self.checkpoints.wait()
        steps = self.checkpoints.steps
        self.checkpoints.close()
        kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "none saved"
        epoch = (step - 1) // self.experiment.epoch_steps + 1
        what = f"loss {losses[step - first_step]}"
        where = f"step {step} (epoch {epoch})"
        raise DivergenceError(f"{what} at {where}; {kept}{self._cause(self.progress[0])}", step)

    def _cause(self, progress: Progress) -> str:
        """Returns what is known of why a run diverged, as the end of a message."""
        if progress.anomaly:
            return f"; the first that is not finite is {progress.anomaly}"
        if self.experiment.places is None:
            return "; --config.train.detect_anomaly=True tells in which layer it begins"
        return ""

    def _finish_epoch(self, select: Callable, probe: Callable) -> dict[str, float]:
        """Evaluates, adds a row to each history, keeps the best networks, and cuts learning rates.

        Returns means over the runs that have not diverged.
        """
        variables = variables_of(self.states)
        selections, uses = select(variables, self.seed), probe(variables, self.seed)
        scales = np.atleast_1d(self.devices.fetch(self.states.learning_rate_scale))
        improved = np.zeros(len(self.runs), bool)
        for i in self.alive:
            self.progress[i].check_finite([selections[i].loss], self.step)
            self._check_alone([selections[i].loss], self.step)
        for i in self.alive:
            run, progress = self.runs[i], self.progress[i]
            use = jax.tree.map(lambda norms, i=i: float(np.atleast_1d(norms)[i]), uses)
            add_epoch(run, progress, self.step, float(scales[i]), selections[i], use)
            improved[i] = progress.best_step == self.step
            if self.config.schedule.plateau_patience is not None:
                scales[i] = plateau_scale(self.config, progress)
        if self.config.schedule.plateau_patience is not None:
            scales = self.devices.replicate(scales if self.together else scales[0])
            self.states = self.states.replace(learning_rate_scale=scales)
        if improved.any():
            keep = self.experiment.program(("keep",), lambda: self.devices.map(_keep, donate=(0,)))
            improved = self.devices.replicate(improved if self.together else improved[0])
            self.best = keep(self.best, variables_of(self.states), improved)
        rows = [self.progress[i].history[-1] for i in self.alive]
        return {name: float(np.mean([row[name] for row in rows])) for name in _EPOCH_SHOWN if rows}

    def _note_seconds(self) -> None:
        """Brings the training time up to date, of which several runs have equal shares."""
        seconds = (time.monotonic() - self.began) / len(self.runs)
        for progress, before in zip(self.progress, self.seconds_before, strict=True):
            progress.seconds = before + seconds

    def _as_json(self) -> dict[str, Any]:
        """Returns what a checkpoint holds besides the states."""
        self._note_seconds()
        skipped = self.experiment.dataset.skipped
        self.progress[0].skipped = {split: sorted(indices) for split, indices in skipped.items()}
        of_runs = [dataclasses.asdict(progress) for progress in self.progress]
        return {"runs": of_runs, "best_step": None} if self.together else of_runs[0]

    def _look_at_space(self) -> None:
        """Says if the disk has no space for the checkpoints that are there at a time."""
        free, size = shutil.disk_usage(self.checkpoints.directory).free, self.checkpoint_bytes
        if free < (3 - len(self.checkpoints.steps)) * size:
            self.part.say(
                f"{free / 1e6:,.1f} MB are free for {self.checkpoints.directory}, and a checkpoint"
                f" takes up to {size / 1e6:,.1f} MB: fewer than three fit, of which two are kept"
                " while one is written"
            )

    def _save(self) -> None:
        """Starts to write a checkpoint, unless it is written; if it can't be, training goes on."""
        if self.saved == self._how_far():
            return
        self._wait()
        with self._going_on():
            self._start_to_save()

    def _save_now(self) -> None:
        """Saves, and waits until that is on disk.

        Raises:
          StorageError: it can't be written.
        """
        with self._needed():
            if self.saved != self._how_far():
                with self._going_on():
                    self.checkpoints.wait()
                self._start_to_save()
            self.checkpoints.wait()

    def _wait(self) -> bool:
        """Waits for what is being saved, and returns whether it is on disk."""
        with self._going_on():
            self.checkpoints.wait()
            return True
        return False

    def _start_to_save(self) -> None:
        self.saved_at = time.monotonic()
        best_steps = {progress.best_step for progress in self.progress}
        # A best network that the state itself has is not written twice.
        best = None if best_steps <= {None, self.step} else self.devices.fetch(self.best)
        state = self.devices.fetch(self.states)
        self.checkpoints.save(self.step, self._as_json(), state, best)
        self.saved = self._how_far()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Says that a checkpoint can't be written; the next one is tried at its time."""
        try:
            yield
        except StorageError as error:
            # The others wait for this one.
            if jax.process_count() > 1:
                raise
            self.saved = None
            steps = self.checkpoints.steps
            kept = f"that of step {steps[-1]} is whole" if steps else "there is none yet"
            self.part.say(f"{error}, {kept}; training goes on, and the next one is tried")

    @contextlib.contextmanager
    def _needed(self) -> Iterator[None]:
        """Makes one line of the errors of writing what a run can't end without."""
        try:
            yield
        except (OSError, StorageError) as error:
            if (why := refused(error)) is None:
                raise
            what, advice = why
            steps = self.checkpoints.steps
            kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "nothing was saved"
            raise StorageError(
                f"{what} at step {self.step}; {kept}; {advice} and start the same command again"
            ) from error

    def _is_gone(self) -> bool:
        """Returns whether a workdir was deleted, moved or emptied since the run began."""
        # The process that has its lock.
        if jax.process_index() != 0:
            return False
        return self.identities != [identity(workdir) for workdir in self.workdirs]

    def _lost(self) -> StorageError:
        found = zip(self.workdirs, self.identities, strict=True)
        gone = [str(workdir) for workdir, before in found if identity(workdir) != before]
        with contextlib.suppress(Exception):
            self.checkpoints.close()
        # A write that was under way may have made them again.
        for folder in (self.checkpoints.directory, *self.workdirs):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return StorageError(
            f"{', '.join(gone[:3]) or self.workdirs[0]} was deleted, moved or emptied while the run"
            f" was at step {self.step}; it ends here, and writes nothing more"
        )

    def _how_far(self) -> tuple[int, int]:
        """Returns the step, and for how many epochs the runs have been evaluated."""
        return self.step, sum(len(progress.history) for progress in self.progress)

    def _write_epoch(self, events: Sequence[report.Events]) -> None:
        for i in self.alive:
            progress = self.progress[i]
            events[i].write(progress.history[-1], progress.wait_share)
            if jax.process_index() == 0:
                # All of it is written again after the next epoch, and at the end.
                with contextlib.suppress(OSError):
                    report.write_metrics(self.workdirs[i], progress.history)

    def _write_progress(self, done: bool, now: bool) -> None:
        """Says in each run's workdir how far it is; `now`, or if that was long ago."""
        self.pace.advance(self.step)
        if jax.process_index() != 0:
            return
        self._note_seconds()
        # The epoch under way, or just done. A run that stops early has no steps left.
        epoch = -(-self.step // self.experiment.epoch_steps)
        where = {"epoch": epoch, "epochs": self.config.train.epochs}
        steps = self.step if done else self.experiment.total_steps
        for i in self.alive:
            seconds = self.progress[i].seconds * len(self.runs)
            self.files[i].write(self.pace, steps, done or now, seconds, **where)

    def _finish(self) -> list[dict[str, Any]]:
        """Tests the best networks, writes the results of each run, and returns the summaries."""
        self._as_json()  # brings the training time up to date
        tests = None
        if self.alive:
            tests = self.experiment.evaluate("test", self.together)(self.best, self.seed)
        best, last = self.devices.fetch(self.best), self.devices.fetch(self.states)
        if any_process(self._is_gone())[0]:
            raise self._lost()
        self._save_now()
        self.checkpoints.close()
        with self._needed():
            return self._write_results(tests, best, last)

    def _write_results(
        self, tests: Sequence[Evaluation] | None, best: Any, last: Any
    ) -> list[dict[str, Any]]:
        summaries, not_finite = [], []
        for i, (run, workdir) in enumerate(zip(self.runs, self.workdirs, strict=True)):
            progress = self.progress[i]
            own_best, own_last = best, last
            if self.together:
                if (workdir / "summary.json").is_file():
                    continue
                own_best, own_last = (
                    jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (best, last)
                )
                _write_checkpoint(workdir, progress, own_last, own_best)
            if progress.diverged_at is not None:
                mark_diverged(workdir, progress.diverged_at)
                name = f"{run.config.name}:{run.config.arm} seed {run.config.seed}"
                cause = self._cause(progress)
                self.part.say(f"{name}: diverged at step {progress.diverged_at}{cause}")
                continue
            try:
                tests[i].check_finite(f"{workdir}, step {progress.best_step}, on test")
            except NotFiniteError as error:
                not_finite.append(error)
                continue
            summaries.append(run_summary(run, progress, own_best, tests[i]))
            if jax.process_index() == 0:
                write_results(workdir, run, progress.history, summaries[-1], tests[i])
            self.part.say(one_line(summaries[-1]))
        if not_finite:
            raise not_finite[0]
        return summaries


def _begin_import(name: str) -> threading.Thread:
    """Imports a module while the devices compute, and returns the thread that does."""
    # No daemon: Python may crash that ends while such a thread imports a module of C++.
    thread = threading.Thread(target=importlib.import_module, args=(name,))
    thread.start()
    return thread


def _keep(best: Any, variables: Any, improved: jax.Array) -> Any:
    """Returns the new variables of the runs that improved, and the old best ones of the others."""

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(
            improved.reshape(improved.shape + (1,) * (new.ndim - improved.ndim)), new, old
        )

    return jax.tree.map(choose, best, variables)


def _write_checkpoint(workdir: Path, progress: Progress, last: TrainState, best: Any) -> None:
    """Writes the checkpoint of one of several runs, in place of any that is there.

    For a run that diverged, it holds only the best network.
    """
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    if progress.best_step is None:
        return
    as_json = dataclasses.asdict(progress)
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        if progress.diverged_at is not None:
            checkpoints.save(progress.best_step, as_json, best=best)
        else:
            step = int(last.step)
            checkpoints.save(step, as_json, last, None if progress.best_step == step else best)
        checkpoints.wait()
