"""Several seeds of one config, trained together as one compiled program.

The seeds are a further axis of the training state, over which the step is vmapped; what a run
draws depends on its seed and step alone, so each seed sees the examples, augmentation and dropout
that it sees alone. Sums are taken in another order, so results are equal up to rounding.
"""

import contextlib
import copy
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aim_flax import files
from aim_flax.console import Part
from aim_flax.data.in_memory import InMemory
from aim_flax.data.order import epoch_order
from aim_flax.devices import AXIS
from aim_flax.errors import UsageError
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.memory_use import memory_use
from aim_flax.files import read_json
from aim_flax.keys import data_key
from aim_flax.train import report
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import Experiment
from aim_flax.train.loop import EPOCH_SHOWN
from aim_flax.train.progress import Progress, add_epoch, first_not_finite, plateau_scale
from aim_flax.train.signals import interruption, signals
from aim_flax.train.summary import one_line, summarize, write_results
from aim_flax.train.workdir import claim, held, mark_diverged

_SEEDS = "seeds.json"


def check_together(experiment: Experiment) -> None:
    """Raises UsageError if seeds of this experiment can only be trained one by one."""
    if experiment.config.train.stop_patience is not None:
        raise UsageError("train.stop_patience is set, and seeds that stop early are trained alone")
    if not isinstance(experiment.dataset, InMemory):
        raise UsageError("its images are streamed, and each seed takes them in another order")


def train_together(
    experiment: Experiment,
    seeds: Sequence[int],
    workdirs: Sequence[Path],
    folder: Path,
    part: Part,
) -> None:
    """Trains runs that differ in their seed alone, or goes on with them where they were left.

    Each workdir is left as `training.run` leaves it, with the best and the last checkpoint. A run
    whose loss becomes NaN or infinite is marked in its workdir (`table.mark_diverged`), and the
    others go on.

    Args:
      experiment: of the config that the runs share; its seed plays no part.
      seeds, workdirs: of the runs. A workdir that holds its finished run is left alone.
      folder: holds the group's checkpoints while it isn't done, and is deleted then; what another
        group left there is deleted first.
      part: reports on progress.

    Raises:
      UsageError: `check_together`'s, or a workdir holds something else, or another process is at
        work in one (BusyError).
      InterruptionError: SIGTERM or Ctrl-C; the state is saved.
    """
    check_together(experiment)
    runs = [experiment.with_seed(seed) for seed in seeds]
    with contextlib.ExitStack() as stack:
        for run, workdir in zip(runs, workdirs, strict=True):
            claim(workdir, run.config)
            stack.enter_context(held(workdir))
        _begin(folder, seeds)
        _Group(experiment, runs, workdirs, folder / "checkpoints", part).train()
        shutil.rmtree(folder)


def unfinished_group(folder: Path) -> list[int]:
    """Returns the seeds whose common checkpoints lie in a group's folder; none where none do."""
    if not (folder / _SEEDS).is_file() or not any(folder.glob("checkpoints/*/")):
        return []
    return read_json(folder / _SEEDS)


def _begin(folder: Path, seeds: Sequence[int]) -> None:
    if unfinished_group(folder) != list(seeds):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files.write_json(folder / _SEEDS, list(seeds))


@dataclasses.dataclass
class _GroupProgress:
    """What a group's checkpoint holds beside the stacked states, as JSON.

    Attributes:
      runs: each run's Progress; of the group's time each has an equal share.
      diverged: for each run the step of its first loss that was not finite, or None.
      best_step: None: the best states lie in every checkpoint.
    """

    runs: list[dict[str, Any]]
    diverged: list[int | None]
    best_step: None = None


class _Group:
    """One try at a group of runs: from its latest checkpoint, or from the start, to its end."""

    def __init__(
        self,
        experiment: Experiment,
        runs: Sequence[Experiment],
        workdirs: Sequence[Path],
        folder: Path,
        part: Part,
    ):
        self.experiment, self.config, self.devices = experiment, runs[0].config, experiment.devices
        self.runs, self.workdirs, self.part = runs, workdirs, part
        self.seeds = np.array([run.config.seed for run in runs], np.uint32)
        self.checkpoints = Checkpoints(folder)
        states = self._start()
        self.step = int(states["last"].step[0])
        self.states = self.devices.replicate(states["last"])
        self.best = self.devices.replicate(states["best"])
        self.saved_at = time.monotonic()

    def _start(self) -> dict[str, Any]:
        """Returns the runs' stacked states, the last and the best, and sets their progress."""
        stacked = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((len(self.runs), *x.shape), x.dtype),
            self.experiment.abstract_state,
        )
        restored = self.checkpoints.restore_latest({"last": stacked, "best": stacked})
        if restored is None:
            self.progress = [Progress() for _ in self.runs]
            self.diverged: list[int | None] = [None] * len(self.runs)
            states = [run.initial_state() for run in self.runs]
            initial = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
            return {"last": initial, "best": initial}
        states, progress, messages = restored
        step = int(states["last"].step[0])
        self.checkpoints.set_aside_after(step)
        progress = _GroupProgress(**progress)
        self.progress = [Progress(**run) for run in progress.runs]
        self.diverged = progress.diverged
        for message in messages:
            self.part.say(f"{message}; going back to step {step}")
        self.part.say(
            f"resuming {len(self.runs)} seeds of {self.config.arm} at step {step} of"
            f" {self.experiment.total_steps}"
        )
        return states

    @property
    def alive(self) -> list[int]:
        """The positions of the runs that have not diverged."""
        return [i for i, step in enumerate(self.diverged) if step is None]

    def train(self) -> None:
        experiment = self.experiment
        seeds = self.devices.replicate(self.seeds)
        data_of = _Feed(experiment, self.seeds)
        calls: dict[int, Callable] = {}
        self.part.begin(self.step)
        with signals(self.part.received) as received:
            while self.step < experiment.total_steps and self.alive:
                before = time.monotonic()
                left_in_epoch = experiment.epoch_steps - self.step % experiment.epoch_steps
                length = min(experiment.steps_per_call, left_in_epoch)
                compiled = length in calls
                if not compiled:
                    calls[length] = _train_call(experiment, length)
                self.states, metrics = calls[length](self.states, data_of(self.step), seeds)
                metrics = self.devices.fetch(metrics)
                self._note(metrics, length, time.monotonic() - before if compiled else None)
                self.step += length
                alive = self.alive or [0]
                shown = {name: float(values[alive, -1].mean()) for name, values in metrics.items()}
                if length == left_in_epoch:
                    shown = self._finish_epoch() or shown
                for progress in self.progress:
                    progress.seconds += (time.monotonic() - before) / len(self.runs)
                minutes = (time.monotonic() - self.saved_at) / 60
                done = self.step == experiment.total_steps or not self.alive
                # Also at the end: from there on runs become finished, and are not trained again.
                if received or done or minutes >= self.config.train.checkpoint_minutes:
                    self._save()
                self.part.advance(self.step, shown)
                if received and not done:
                    self.checkpoints.close()
                    raise interruption(received[0], self.step)
            self._finish()

    def _note(self, metrics: dict[str, np.ndarray], length: int, seconds: float | None) -> None:
        """Adds the metrics of consecutive steps, (runs, length) each, to the runs' progress."""
        for i in self.alive:
            self.diverged[i] = first_not_finite(metrics["loss"][i], self.step + 1)
            for name, values in metrics.items():
                for value in values[i]:
                    self.progress[i].epoch_sums[name] += float(value)
        if seconds is not None:
            for progress in self.progress:
                progress.timed_seconds += seconds / len(self.runs)
                progress.timed_examples += length * self.config.train.batch_size

    def _finish_epoch(self) -> dict[str, float]:
        """Evaluates, adds a row to each history, keeps the best states, and lets plateaus cut.

        Returns means over the runs that have not diverged.
        """
        variables = _variables(self.states)
        selections = self._evaluate(self.config.eval.select_on)(variables)
        uses = self._memory_probe()(variables)
        scales = self.devices.fetch(self.states.learning_rate_scale)
        improved = np.zeros(len(self.runs), bool)
        for i in self.alive:
            self.diverged[i] = first_not_finite([selections[i].loss], self.step)
        for i in self.alive:
            use = jax.tree.map(lambda norms, i=i: float(norms[i]), uses)
            scale = float(scales[i])
            add_epoch(self.runs[i], self.progress[i], self.step, scale, selections[i], use)
            improved[i] = self.progress[i].best_step == self.step
            if self.config.schedule.plateau_patience is not None:
                scales[i] = plateau_scale(self.config, self.progress[i])
        if self.config.schedule.plateau_patience is not None:
            scales = self.devices.replicate(scales)
            self.states = self.states.replace(learning_rate_scale=scales)
        if improved.any():
            keep = self.experiment.program(("keep",), lambda: self.devices.map(_keep, donate=(0,)))
            self.best = keep(self.best, self.states, self.devices.replicate(improved))
        rows = [self.progress[i].history[-1] for i in self.alive]
        return {name: float(np.mean([row[name] for row in rows])) for name in EPOCH_SHOWN if rows}

    def _save(self) -> None:
        states = {"last": self.devices.fetch(self.states), "best": self.devices.fetch(self.best)}
        runs = [dataclasses.asdict(progress) for progress in self.progress]
        self.checkpoints.save(
            self.step, states, dataclasses.asdict(_GroupProgress(runs, self.diverged))
        )
        self.saved_at = time.monotonic()

    def _finish(self) -> None:
        """Tests the best states and writes what each run leaves."""
        self.checkpoints.wait()
        self.checkpoints.close()
        tests = self._evaluate("test")(_variables(self.best)) if self.alive else None
        best, last = self.devices.fetch(self.best), self.devices.fetch(self.states)
        for i, (run, workdir) in enumerate(zip(self.runs, self.workdirs, strict=True)):
            if (workdir / "summary.json").is_file():
                continue
            take = partial(jax.tree.map, lambda leaf, i=i: leaf[i])
            progress = self.progress[i]
            _write_checkpoints(workdir, progress, take(best), take(last))
            _write_events(workdir, progress)
            if self.diverged[i] is not None:
                if progress.history:
                    report.write_metrics(workdir, progress.history)
                mark_diverged(workdir, self.diverged[i])
                self.part.say(f"{_name(run)}: diverged at step {self.diverged[i]}")
                continue
            summary = summarize(run, progress, take(best), tests[i])
            write_results(workdir, run.config, progress.history, summary)
            self.part.say(one_line(summary))

    def _evaluate(self, split: str) -> Callable[[Any], list[Evaluation]]:
        return self.experiment.program(
            ("evaluate together", split), lambda: _build_evaluate(self.experiment, split)
        )

    def _memory_probe(self) -> Callable[[Any], dict[str, dict[str, np.ndarray]]]:
        """Returns stacked variables -> the use of memory, see `Experiment.memory_probe`."""
        if self.config.memory is None:
            return lambda variables: {}
        use = self.experiment.program(
            ("probe together",),
            lambda: jax.jit(jax.vmap(partial(memory_use, self.experiment.model), (0, None))),
        )
        images = self.experiment.probe_images()
        return lambda variables: jax.tree.map(
            np.asarray, use(self.devices.local(variables), images)
        )


def _name(run: Experiment) -> str:
    return f"{run.config.name}:{run.config.arm} seed {run.config.seed}"


def _variables(states: Any) -> dict[str, Any]:
    return {"params": states.params, **states.model_state}


def _train_call(experiment: Experiment, length: int) -> Callable:
    """Returns `Experiment.train_call` for stacked states, orders of examples and seeds."""

    def build() -> Callable:
        steps = jax.vmap(experiment.steps_on_device(length), in_axes=(0, (None, None, 0), 0))
        return experiment.devices.map(steps, donate=(0,))

    return experiment.program(("train together", length), build)


class _Feed:
    """What `steps_on_device` takes as data, with an epoch's order of each seed: step -> data."""

    def __init__(self, experiment: Experiment, seeds: np.ndarray):
        split = experiment.dataset.splits["train"]
        self._devices, self._epoch_steps = experiment.devices, experiment.epoch_steps
        self._data = self._devices.replicate((split.images, split.labels))
        self._epoch, self._seeds = None, seeds
        orders = jax.vmap(lambda seed, epoch: epoch_order(data_key(seed), epoch, len(split)))
        self._orders_of = jax.jit(lambda seeds, epoch: orders(seeds, epoch))

    def __call__(self, step: int) -> Any:
        epoch = step // self._epoch_steps
        if epoch != self._epoch:
            self._epoch = epoch
            epochs = np.full(len(self._seeds), epoch)
            self._orders = self._devices.replicate(self._orders_of(self._seeds, epochs))
        return (*self._data, self._orders)


def _keep(best: Any, states: Any, improved: jax.Array) -> Any:
    """Returns the states of the runs that improved, and of the others those that were best."""

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(improved.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, best, states)


def _build_evaluate(experiment: Experiment, split: str) -> Callable[[Any], list[Evaluation]]:
    """Returns replicated stacked variables -> each run's Evaluation of a split.

    Raises RuntimeError if any example was not counted once.
    """
    batches, devices = experiment.eval_batches(split), experiment.devices
    classes = len(experiment.dataset.classes)

    def on_device(variables, data):
        images, labels, counted, _ = batches.on_device(data)
        apply = partial(experiment.model.apply, train=False)
        logits = jax.vmap(apply, in_axes=(0, None))(variables, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None])
        of_runs = jax.lax.all_gather((losses, logits.argmax(-1)), AXIS, axis=1, tiled=True)
        return *of_runs, *jax.lax.all_gather((labels, counted), AXIS, tiled=True)

    outputs_of = devices.map(on_device)

    def evaluate(variables: Any) -> list[Evaluation]:
        outputs = [devices.fetch(outputs_of(variables, data)) for data in batches]
        losses, predicted, labels, counted = (
            np.concatenate(parts, axis=-1) for parts in zip(*outputs, strict=True)
        )
        if not counted.sum() == counted[: batches.examples].sum() == batches.examples:
            raise RuntimeError(f"{counted.sum()} of {batches.examples} examples were evaluated")
        labels = labels[counted]
        evaluations = []
        for of_run, predictions in zip(losses[:, counted], predicted[:, counted], strict=True):
            confusion = np.zeros((classes, classes), np.int32)
            np.add.at(confusion, (labels, predictions), 1)
            loss = float(of_run.sum()) / batches.examples
            evaluations.append(Evaluation(loss, confusion, predictions == labels))
        return evaluations

    return evaluate


def _write_checkpoints(workdir: Path, progress: Progress, best: Any, last: Any) -> None:
    """Writes a run's best state, and unless it diverged later its last, in place of any there."""
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    if progress.best_step is None:
        return
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        then = copy.copy(progress)
        then.history = [row for row in progress.history if row["step"] <= progress.best_step]
        checkpoints.save(progress.best_step, best, dataclasses.asdict(then))
        if progress.best_step < progress.history[-1]["step"] == last.step:
            checkpoints.save(int(last.step), last, dataclasses.asdict(progress))
        checkpoints.wait()


def _write_events(workdir: Path, progress: Progress) -> None:
    shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
    with report.Events(workdir, 0) as events:
        for row in progress.history:
            events.write(row, None)
