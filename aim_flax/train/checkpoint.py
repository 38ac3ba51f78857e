"""Checkpoints of a run: written by orbax in the background, the latest two kept."""

import contextlib
import dataclasses
import errno
import io
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import LatestN

from aim_flax.console import without_noise
from aim_flax.errors import StorageError, UsageError
from aim_flax.files import refused
from aim_flax.train.digest import DigestRestore, DigestSave, changed
from aim_flax.train.step import TrainState, variables_of

# Two, so that there is one to go back to if the last is damaged.
_KEEP_LATEST = 2
_SET_ASIDE = "set-aside-"
_DIGESTS = "digests"
_ATTEMPTS = 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved after a step.

    Attributes:
      step: the number of steps taken.
      state: the training state; None if only the best network was saved, because the loss was not
        finite.
      best: the variables of the best epoch so far; None before the first epoch has ended.
      progress: JSON; its `best_step` is the step of `best`, or None.
      is_checked: whether all of it is known to be what was saved; checkpoints of earlier versions
        have no digests.
    """

    step: int
    state: TrainState | None
    best: dict[str, Any] | None
    progress: dict[str, Any]
    is_checked: bool

    @property
    def note(self) -> str | None:
        """What users should know of it, or None."""
        if self.is_checked:
            return None
        return (
            f"the checkpoint of step {self.step} has no digests, by which damage is noticed: an"
            " earlier version wrote it"
        )


class Checkpoints:
    """The checkpoints under a directory.

    A checkpoint appears whole or not at all, also when the process is killed while one is
    written. Each holds all that a run needs to continue, and the best network so far.
    """

    def __init__(self, directory: Path, read_only: bool = False):
        """Opens the directory, or makes it; its parent exists."""
        self._directory, self._read_only = directory.resolve(), read_only
        if read_only and not directory.is_dir():
            raise UsageError(f"there are no checkpoints in {directory}")
        self._manager = self._open()
        # The step of the last save, until it is known how that went.
        self._writing: int | None = None

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only:
            self._directory.mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(_KEEP_LATEST),
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            create=False,
        )
        with _quiet():
            return ocp.CheckpointManager(self._directory, options=options)

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def steps(self) -> Sequence[int]:
        """The steps at which there is a checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        progress: dict[str, Any],
        state: TrainState | None = None,
        best: dict[str, Any] | None = None,
    ) -> None:
        """Starts to write a checkpoint of numpy arrays, which must not change until `wait` returns.

        One of the same step is set aside.

        Args:
          step, progress, state, best: as in `Checkpoint`; `best` may be left out if it is the
            network of the state.

        Raises:
          StorageError: as `wait` does, of this checkpoint or of the one before.
        """
        trees = {
            name: jax.tree.map(np.asarray, tree)
            for name, tree in {"state": state, "best": best}.items()
            if tree is not None
        }
        arguments = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
            progress=ocp.args.JsonSave(progress),
            digests=DigestSave({**trees, "progress": progress}),
        )
        self.wait()
        with self._writes(step):
            if step in self.steps:
                self.set_aside_after(step - 1)
            self._manager.save(step, args=arguments, force=True)
            self._writing = step

    def restore(self, step: int, like: TrainState) -> Checkpoint:
        """Returns the checkpoint of a step, with the structure, shapes and dtypes of `like`.

        Raises:
          UsageError: there is no checkpoint of that step, or it cannot be read, or is not what was
            saved.
        """
        if step not in self.steps:
            raise UsageError(f"no checkpoint of step {step} in {self._directory}")
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        trees = {"state": like, "best": variables_of(like)}
        items = {
            name: ocp.args.StandardRestore(tree)
            for name, tree in trees.items()
            if (self._directory / str(step) / name).is_dir()
        }
        # Earlier versions wrote none.
        has_digests = (self._directory / str(step) / _DIGESTS).is_dir()
        if has_digests:
            items[_DIGESTS] = DigestRestore()
        arguments = ocp.args.Composite(**items, progress=ocp.args.JsonRestore())
        try:
            with _quiet():
                restored = dict(self._manager.restore(step, args=arguments).items())
        except Exception as error:  # Orbax and tensorstore raise many kinds on damaged files.
            # Raises where another process is lost, which tells nothing of the checkpoint.
            multihost_utils.sync_global_devices("after a checkpoint that could not be read")
            reason = " ".join(str(error).split())[:120]
            raise UsageError(f"the checkpoint of step {step} cannot be read: {reason}") from error
        written = restored.pop(_DIGESTS, None)
        if has_digests and (part := changed(restored, written)):
            raise UsageError(
                f"the checkpoint of step {step} is damaged: {part} is not what was saved"
            )
        state, best = restored.get("state"), restored.get("best")
        best_step = restored["progress"]["best_step"]
        if best is None and best_step == step:
            best = variables_of(state)
        elif best is None and best_step is not None:
            # An earlier version: the best network has a checkpoint of its own.
            best = self.restore(best_step, like).best
        return Checkpoint(step, state, best, restored["progress"], has_digests)

    def latest(self, like: TrainState, needs: str = "state") -> tuple[Checkpoint | None, list[str]]:
        """Returns the latest readable checkpoint that has what is needed, or None if there is none,
        and a message for each later one that cannot be read.

        Args:
          like: as for `restore`.
          needs: "state" or "best".

        Raises:
          UsageError: there are checkpoints, and none can be read.
        """
        messages: list[str] = []
        steps = self.steps
        for step in reversed(steps):
            try:
                found = self.restore(step, like)
            except UsageError as error:
                messages.append(str(error))
                continue
            if getattr(found, needs) is not None:
                return found, messages
        if messages and len(messages) == len(steps):
            raise UsageError("; ".join(messages))
        return None, messages

    def set_aside_after(self, step: int) -> None:
        """Moves checkpoints later than `step` out of the way, without deleting them."""
        later = [s for s in self.steps if s > step]
        # One process does it, after all have listed the steps and before any does again.
        multihost_utils.sync_global_devices("before setting checkpoints aside")
        if jax.process_index() == 0:
            for unused in later:
                aside = self._directory / f"{_SET_ASIDE}{unused}"
                for number in itertools.count(2):
                    if not aside.exists():
                        break
                    aside = self._directory / f"{_SET_ASIDE}{unused}-{number}"
                (self._directory / str(unused)).rename(aside)
        multihost_utils.sync_global_devices("after setting checkpoints aside")
        self._manager.reload()

    def variables(self, which: str | int, like: TrainState) -> tuple[dict[str, Any], int]:
        """Returns the variables of a saved network, and the step after which it had them.

        Args:
          which: "best"; "latest"; or the step of a checkpoint or of a best network. If a checkpoint
            cannot be read, the one before it is taken, and a line says so.
          like: as for `restore`.

        Raises:
          UsageError: there is no such network, or it cannot be read.
        """
        if which in ("best", "latest"):
            found, messages = self.latest(like, "best" if which == "best" else "state")
            for message in messages:
                print(message, flush=True)
            if found is None:
                why = "no epoch was finished" if self.steps else "nothing was saved"
                raise UsageError(f"no {which} checkpoint in {self._directory} yet: {why}")
        elif not str(which).isdecimal():
            raise UsageError(f"checkpoint is {which!r}, expected best, latest or a step")
        elif int(which) in self.steps:
            found = self.restore(int(which), like)
        else:
            all_found = {step: self.restore(step, like) for step in self.steps}
            of_best = {found.progress["best_step"]: found for found in all_found.values()}
            if int(which) not in of_best:
                there = ", ".join(map(str, sorted({*all_found, *of_best} - {None}))) or "none"
                raise UsageError(
                    f"no checkpoint of step {which} in {self._directory}; there: {there}"
                )
            return of_best[int(which)].best, int(which)
        if note := found.note:
            print(note, flush=True)
        if which == "best" or found.state is None:
            return found.best, found.progress["best_step"]
        return variables_of(found.state), found.step

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          StorageError: it could not be written. Nothing is left of it, those before are whole, and
            others can be saved.
        """
        if self._writing is not None:
            with self._writes(self._writing):
                self._manager.wait_until_finished()
            self._writing = None

    @property
    def is_written(self) -> bool:
        """Whether nothing is being written, so that `wait` returns at once."""
        return not self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Waits, and raises, as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _writes(self, step: int) -> Iterator[None]:
        """Turns the errors of writing a checkpoint into a StorageError, and clears up.

        One that came whole all the same, as where a full disk has room again, is no error.
        """
        try:
            yield
        except Exception as error:
            gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            cause = error if self._directory.is_dir() else gone
            if (why := refused(cause)) is None:
                raise
            # While a save begins, one of that step may be there that was to be set aside.
            has_begun, self._writing = self._writing == step, None
            self._give_up(step)
            if has_begun and self._directory.is_dir() and step in self.steps:
                return
            raise StorageError(
                f"{why[0]}: the checkpoint of step {step} could not be written"
            ) from cause

    def _give_up(self, step: int) -> None:
        """Removes what there is of a checkpoint that could not be written."""
        with _quiet(), contextlib.suppress(Exception):
            self._manager.close()
        if jax.process_index() == 0:
            # Threads that have not noticed yet may write more.
            for _ in range(_ATTEMPTS):
                unfinished = list(self._directory.glob(f"{step}.*tmp*"))
                if not unfinished:
                    break
                for folder in unfinished:
                    shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.1)
        # Orbax's list of checkpoints lacks those that it was about to delete.
        if self._directory.is_dir():
            self._manager = self._open()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax's logs off the terminal: its settings, and many lines for each damaged file."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.callback(without_noise())
        yield
