"""The training loop: from a config and a workdir to a trained network and its summary."""

import dataclasses
import importlib.metadata
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_flax import report
from aim_flax.build import build_model
from aim_flax.checkpoint import Checkpoints, read_json
from aim_flax.config import differing_keys, flatten, from_json, to_json
from aim_flax.console import Reporter
from aim_flax.data.in_memory import Dataset, epoch_order, gather, steps_per_epoch
from aim_flax.data.load import load_dataset
from aim_flax.errors import DivergenceError, InterruptionError, UsageError, check_choice
from aim_flax.evaluation import build_evaluate, memory_use
from aim_flax.parallel import AXIS, Devices
from aim_flax.schedules import (
    best_epoch,
    build_optimizer,
    build_schedule,
    plateau_cuts,
    should_stop,
)
from aim_flax.steps import TrainState, create_state, data_key, train_step


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
        holds something else.
      DivergenceError: the loss became NaN or infinite; the checkpoints before it are kept.
      InterruptionError: SIGTERM or Ctrl-C; the state is saved.
    """
    trainer = _Trainer(config, device_count)
    workdir = Path(workdir)
    summary = workdir / "summary.json"
    _claim(workdir, config)
    if summary.is_file():
        if not quiet:
            print(f"{workdir} holds this run, finished")
        return read_json(summary)
    return trainer.train(workdir, quiet)


@dataclasses.dataclass
class _Progress:
    """How far a run has come: what a checkpoint holds beside the training state, as JSON.

    Attributes:
      history: a row per finished epoch, see report.HISTORY_COLUMNS, and its `memory_use`.
      best_step: the step after which validation accuracy was best.
      epoch_sums: loss and accuracy summed over the steps of the epoch under way.
      seconds: wall-clock time spent in training, over all tries.
      timed_examples, timed_seconds: of calls that did not compile.
    """

    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_step: int | None = None
    epoch_sums: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"loss": 0.0, "accuracy": 0.0}
    )
    seconds: float = 0.0
    timed_examples: int = 0
    timed_seconds: float = 0.0


class _Trainer:
    """The parts of a run, built and checked from its config."""

    def __init__(self, config: ConfigDict, device_count: int | None):
        self.config = config
        _check_positive(
            config,
            "train.batch_size",
            "train.epochs",
            "train.steps_per_call",
            "eval.batch_size",
        )
        check_choice("eval.select_on", config.eval.select_on, ("val", "test"))
        self.devices = Devices(config.parallel, device_count)
        batch_size = config.train.batch_size
        if batch_size % self.devices.count:
            raise UsageError(
                f"train.batch_size is {batch_size}, which {self.devices.count} devices cannot"
                " share equally"
            )
        self.model = build_model(config, axis_name=AXIS)
        self.dataset: Dataset = load_dataset(config)
        examples = len(self.dataset.splits["train"])
        if batch_size > examples:
            raise UsageError(
                f"train.batch_size is {batch_size}, but there are {examples} training examples"
            )
        self.epoch_steps = steps_per_epoch(examples, batch_size)
        self.total_steps = self.epoch_steps * config.train.epochs
        self.schedule = build_schedule(config, self.epoch_steps)
        self.optimizer = build_optimizer(config, self.schedule)
        self.create = partial(
            create_state,
            self.model,
            self.optimizer,
            image_shape=tuple(config.data.image_shape),
        )
        # Finds a memory that doesn't fit the network before any file is touched.
        self.abstract_state: TrainState = jax.eval_shape(self.create, config.seed)

    def train(self, workdir: Path, quiet: bool) -> dict[str, Any]:
        config, devices = self.config, self.devices
        checkpoints = Checkpoints(workdir / "checkpoints")
        restored = checkpoints.restore_latest(self.abstract_state)
        if restored is None:
            state, progress = jax.jit(self.create)(config.seed), _Progress()
            state = jax.tree.map(np.asarray, state)
        else:
            state, saved, messages = restored
            progress = _Progress(**saved)
            checkpoints.set_aside_after(int(state.step))
            for message in messages:
                print(f"{message}; going back to step {state.step}", flush=True)
        step = int(state.step)
        if restored is not None and not quiet:
            print(f"resuming {workdir} at step {step} of {self.total_steps}", flush=True)

        self.splits = {
            name: devices.replicate((split.images, split.labels))
            for name, split in self.dataset.splits.items()
        }
        self.seed = devices.replicate(np.uint32(config.seed))
        evaluate = {name: self._evaluate(name) for name in {config.eval.select_on, "test"}}
        calls: dict[int, Callable] = {}
        compiled: set[int] = set()
        probe = self._memory_probe()
        events = report.Events(workdir, step)
        state = devices.replicate(state)
        started, saved_at = time.monotonic() - progress.seconds, time.monotonic()

        def save() -> None:
            nonlocal saved_at
            progress.seconds = time.monotonic() - started
            checkpoints.save(step, devices.fetch(state), dataclasses.asdict(progress))
            saved_at = time.monotonic()

        with _signals() as received, Reporter(self.total_steps, step, quiet) as reporter:
            while step < self.total_steps and not self._stopped(progress.history):
                length = min(
                    config.train.steps_per_call, self.epoch_steps - step % self.epoch_steps
                )
                if length not in calls:
                    calls[length] = self._train_call(length)
                before = time.monotonic()
                state, metrics = calls[length](state, self.splits["train"], self.seed)
                metrics = devices.fetch(metrics)
                if length in compiled:
                    progress.timed_seconds += time.monotonic() - before
                    progress.timed_examples += length * config.train.batch_size
                compiled.add(length)
                self._check_finite(metrics["loss"], step, checkpoints)
                step += length
                for name, values in metrics.items():
                    for value in values:
                        progress.epoch_sums[name] += float(value)

                shown = {name: float(values[-1]) for name, values in metrics.items()}
                if step % self.epoch_steps == 0:
                    variables = {"params": state.params, **state.model_state}
                    selection = evaluate[config.eval.select_on](variables)
                    self._check_finite([selection.loss], step - 1, checkpoints)
                    row = self._finish_epoch(step, state, progress, selection, probe(variables))
                    cuts = self._plateau_cuts(progress.history)
                    scale = np.float32(config.schedule.plateau_factor ** len(cuts))
                    state = state.replace(learning_rate_scale=devices.replicate(scale))
                    save()
                    if jax.process_index() == 0:
                        report.write_metrics(workdir, progress.history)
                        events.write(row)
                    shown = {k: row[k] for k in ("train_loss", "train_accuracy", "val_accuracy")}
                elif received or saved_at + 60 * config.train.checkpoint_minutes <= before:
                    save()
                reporter.advance(step, shown)
                if received and step < self.total_steps:
                    checkpoints.close()
                    events.close()
                    name = signal.Signals(received[0]).name
                    message = f"{name}: saved at step {step}; the same command goes on from there"
                    raise InterruptionError(message, received[0])
            checkpoints.wait()
            progress.seconds = time.monotonic() - started
            summary = self._summarize(checkpoints, progress, step, evaluate["test"])
            checkpoints.close()
            events.close()
            if jax.process_index() == 0:
                self._write_results(workdir, progress.history, summary)
            if not quiet:
                reporter.say(_one_line(summary))
        return summary

    def _train_call(self, length: int) -> Callable:
        """Returns `length` steps within one epoch as a program of all devices.

        (state, training split, seed) -> (state, {loss, accuracy: (length,)}), replicated.
        """
        batch_size = self.config.train.batch_size
        local = batch_size // self.devices.count
        num_examples, scale = len(self.dataset.splits["train"]), self.dataset.scale

        def on_device(state, split, seed):
            epoch = state.step // self.epoch_steps
            order = epoch_order(data_key(seed), epoch, num_examples)
            rank = jax.lax.axis_index(AXIS)

            def body(state, _):
                start = state.step % self.epoch_steps * batch_size + rank * local
                indices = jax.lax.dynamic_slice_in_dim(order, start, local)
                images, labels = gather(split, indices, scale)
                return train_step(
                    self.model, self.optimizer, state, images, labels, seed, axis_name=AXIS
                )

            return jax.lax.scan(body, state, length=length)

        return self.devices.map(on_device, donate=(0,))

    def _evaluate(self, split: str) -> Callable:
        return build_evaluate(
            self.model,
            self.devices,
            self.splits[split],
            self.config.eval.batch_size,
            len(self.dataset.splits[split]),
            len(self.dataset.classes),
            self.dataset.scale,
        )

    def _memory_probe(self) -> Callable[[Any], dict[str, dict[str, float]]]:
        """Returns replicated variables -> the use of memory on the first selection batch."""
        if self.config.memory is None:
            return lambda variables: {}
        images = self.dataset.splits[self.config.eval.select_on].images
        images = images[: self.config.eval.batch_size].astype(np.float32) / self.dataset.scale
        use = jax.jit(partial(memory_use, self.model))

        def probe(variables):
            uses = use(self.devices.local(variables), images)
            return jax.tree.map(float, uses)

        return probe

    def _finish_epoch(self, step, state, progress, selection, uses) -> dict[str, Any]:
        scale = float(self.devices.fetch(state.learning_rate_scale))
        means = {k: total / self.epoch_steps for k, total in progress.epoch_sums.items()}
        row = {
            "epoch": step // self.epoch_steps,
            "step": step,
            "learning_rate": float(self.schedule(step - 1)) * scale,
            "train_loss": means["loss"],
            "train_accuracy": means["accuracy"],
            "val_loss": selection.loss,
            "val_accuracy": selection.accuracy,
            "memory_use": uses,
        }
        progress.history.append(row)
        progress.epoch_sums = dict.fromkeys(progress.epoch_sums, 0.0)
        best = best_epoch(_accuracies(progress.history), self._stop_delta)
        progress.best_step = best * self.epoch_steps
        return row

    @property
    def _stop_delta(self) -> float:
        train = self.config.train
        return 0.0 if train.stop_patience is None else train.stop_min_delta

    def _stopped(self, history: report.History) -> bool:
        patience = self.config.train.stop_patience
        if patience is None or not history:
            return False
        return should_stop(_accuracies(history), patience, self._stop_delta)

    def _plateau_cuts(self, history: report.History) -> list[int]:
        schedule = self.config.schedule
        if schedule.plateau_patience is None:
            return []
        accuracies = _accuracies(history)
        return plateau_cuts(accuracies, schedule.plateau_patience, schedule.plateau_min_delta)

    def _check_finite(self, losses: Any, step: int, checkpoints: Checkpoints) -> None:
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                checkpoints.wait()
                kept = f"of step {checkpoints.steps[-1]}" if checkpoints.steps else "none"
                checkpoints.close()
                epoch = (step + i) // self.epoch_steps + 1
                raise DivergenceError(
                    f"the loss is {loss} at step {step + i + 1} (epoch {epoch}): stopped; last"
                    f" good checkpoint: {kept}"
                )

    def _summarize(
        self, checkpoints: Checkpoints, progress: _Progress, step: int, evaluate: Callable
    ) -> dict[str, Any]:
        config, history = self.config, progress.history
        state, _ = checkpoints.restore(progress.best_step, self.abstract_state)
        variables = self.devices.replicate({"params": state.params, **state.model_state})
        test = evaluate(variables)
        low, high = test.accuracy_interval()
        best = history[progress.best_step // self.epoch_steps - 1]
        rate = progress.timed_examples / progress.timed_seconds if progress.timed_seconds else None
        return {
            "name": config.name,
            "arm": config.arm,
            "seed": config.seed,
            "test_accuracy": test.accuracy,
            "test_accuracy_low": low,
            "test_accuracy_high": high,
            "test_loss": test.loss,
            "test_examples": test.count,
            "val_accuracy": best["val_accuracy"],
            "val_loss": best["val_loss"],
            "selected_on": config.eval.select_on,
            "best_step": progress.best_step,
            "steps": step,
            "epochs": len(history),
            "params": _size(state.params),
            "batch_stats": _size(state.model_state.get("batch_stats", {})),
            "memory_floats": 0 if config.memory is None else math.prod(config.memory.shape),
            "train_seconds": round(progress.seconds, 3),
            "examples_per_second": rate and round(rate, 1),
            "device": f"{self.devices.count} x {jax.devices()[0].device_kind}",
            "versions": versions(),
        }

    def _write_results(
        self, workdir: Path, history: report.History, summary: dict[str, Any]
    ) -> None:
        title = f"{self.config.name}:{self.config.arm}, seed {self.config.seed}"
        report.plot_history(workdir / "history.png", history, title)
        if self.config.memory is not None:
            report.plot_memory_use(workdir / "memory_use.png", history, title)
        report.write_json(workdir / "summary.json", summary)


def default_workdir(config: ConfigDict) -> Path:
    return Path("runs") / f"{config.name}-{config.arm}-{config.seed}"


def versions() -> dict[str, str]:
    """Returns the versions of what a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"aim_flax": _code_version(), **found}


def _code_version() -> str:
    """Returns the package's version, and the git commit where it runs from a checkout."""
    version = importlib.metadata.version("aim_flax")
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return version
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}+{commit}{'.changed' if changed else ''}"


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the workdir this run's own, or raises UsageError and leaves it as it was."""
    saved = workdir / "config.json"
    if saved.is_file():
        other = from_json(saved.read_text())
        differing = differing_keys(other, config)
        if differing:
            old, new = flatten(other), flatten(config)
            changes = (f"{k} ({old.get(k)!r} there, {new.get(k)!r} here)" for k in differing)
            raise UsageError(
                f"{workdir} holds a run of another config, which differs in {', '.join(changes)};"
                " choose another --workdir"
            )
        if not os.access(workdir, os.W_OK):
            raise UsageError(f"{workdir} is not writable")
    elif workdir.exists():
        if not workdir.is_dir():
            raise UsageError(f"{workdir} is a file, expected a directory")
        if any(not file.name.startswith(".") for file in workdir.iterdir()):
            raise UsageError(f"{workdir} is not empty and holds no run; choose another --workdir")
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # In this order: a workdir with a config is a run's, whenever this process is killed.
        if not saved.is_file():
            report.write_text(saved, to_json(config))
        if not (workdir / "code_version.json").is_file():
            report.write_json(workdir / "code_version.json", versions())
    except OSError as error:
        raise UsageError(f"{workdir} is not writable: {error.strerror}") from None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list that a first SIGTERM or Ctrl-C is put on; a second one acts as usual."""
    received: list[int] = []
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


def _accuracies(history: report.History) -> list[float]:
    return [row["val_accuracy"] for row in history]


def _check_positive(config: ConfigDict, *keys: str) -> None:
    values = flatten(config)
    for key in keys:
        if values[key] < 1:
            raise UsageError(f"{key} is {values[key]}, expected at least 1")


def _size(tree: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def _one_line(summary: dict[str, Any]) -> str:
    return (
        f"{summary['name']}:{summary['arm']} seed {summary['seed']}: test accuracy"
        f" {summary['test_accuracy']:.2%} ({summary['test_accuracy_low']:.2%} to"
        f" {summary['test_accuracy_high']:.2%}) on {summary['test_examples']} images, best"
        f" {summary['selected_on']} accuracy {summary['val_accuracy']:.2%} at step"
        f" {summary['best_step']}, {summary['train_seconds']:.1f} s"
    )
