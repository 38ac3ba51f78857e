"""Checkpoints of a run: written by orbax in the background, the latest ones and the best kept."""

import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from aim_flax.errors import UsageError

# Two, so that there is one to fall back on when the last was damaged.
_KEEP_LATEST = 2
_DAMAGED = "damaged-"


class Checkpoints:
    """The checkpoints under a directory, each a training state and the run's progress.

    A checkpoint appears whole or not at all, also when the process is killed while one is
    written. Progress is JSON; its `best_step` (None, or a step) names the checkpoint that is
    kept beside the latest two.
    """

    def __init__(self, directory: Path, read_only: bool = False):
        self._directory = directory.resolve()
        self._best_step: int | None = None
        if read_only and not directory.is_dir():
            raise UsageError(f"there are no checkpoints in {directory}")
        with _quiet():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_KeepLatestAndBest(self),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def steps(self) -> Sequence[int]:
        """The steps at which there is a checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts to write a checkpoint; the arrays, numpy, must not change until it is done."""
        self._best_step = progress["best_step"]
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(np.asarray, state)),
            progress=ocp.args.JsonSave(progress),
        )
        self._manager.save(step, args=arguments, force=True)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns state (of the structure, shapes and dtypes of `like`) and progress of a step.

        Raises:
          UsageError: there is no checkpoint of that step, or it cannot be read.
        """
        if step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise UsageError(f"no checkpoint of step {step} in {self._directory}; there: {there}")
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
        )
        try:
            with _quiet():
                restored = self._manager.restore(step, args=arguments)
        except Exception as error:  # Whatever a damaged file makes orbax or tensorstore raise.
            reason = " ".join(str(error).split())[:120]
            raise UsageError(f"the checkpoint of step {step} cannot be read: {reason}") from error
        return restored.state, restored.progress

    def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any], list[str]] | None:
        """Returns state and progress of the latest readable checkpoint, or None if there is none.

        Also the messages of those that came after it and could not be read.

        Raises:
          UsageError: there are checkpoints, and none can be read.
        """
        messages: list[str] = []
        for step in reversed(self.steps):
            try:
                state, progress = self.restore(step, like)
            except UsageError as error:
                messages.append(str(error))
                continue
            self._best_step = progress["best_step"]
            return state, progress, messages
        if messages:
            raise UsageError("; ".join(messages))
        return None

    def set_aside_after(self, step: int) -> None:
        """Moves checkpoints later than `step` out of the way, without deleting them."""
        later = [s for s in self.steps if s > step]
        # Only the first of several processes, once all have looked and before any looks again.
        multihost_utils.sync_global_devices("before setting checkpoints aside")
        if jax.process_index() == 0:
            for damaged in later:
                aside = self._directory / f"{_DAMAGED}{damaged}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(damaged)).rename(aside)
        multihost_utils.sync_global_devices("after setting checkpoints aside")
        self._manager.reload()

    def best_step(self) -> int:
        """Returns the step that the latest readable progress names best.

        Raises:
          UsageError: there is no checkpoint, or no validation has been done yet.
        """
        for step in reversed(self.steps):
            with contextlib.suppress(OSError, ValueError), _quiet():
                arguments = ocp.args.Composite(progress=ocp.args.JsonRestore())
                best = self._manager.restore(step, args=arguments).progress["best_step"]
                if best is not None:
                    return best
        raise UsageError(f"no best checkpoint in {self._directory} yet: no epoch was finished")

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class _KeepLatestAndBest:
    """An orbax preservation policy: the latest checkpoints, and the one named best."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        latest = {info.step for info in checkpoints[-_KEEP_LATEST:]}
        keep = latest | {self._checkpoints._best_step}
        return [info.step in keep for info in checkpoints]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the terminal what orbax reports of its settings, and its background tasks of a
    damaged file, many lines each."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
