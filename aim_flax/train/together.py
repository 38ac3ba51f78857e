"""Several seeds of one config, trained as one compiled program.

The seeds are a leading axis of the training state, and the step is vmapped over it. A run's random
draws depend only on its seed and step, so each seed gets the examples, augmentation and dropout
that it gets when trained alone. Sums are taken in another order, so results are equal up to
rounding.
"""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from aim_flax.console import Part
from aim_flax.errors import UsageError
from aim_flax.files import read_json, write_json, writing
from aim_flax.train import dataset_record
from aim_flax.train.experiment import Experiment
from aim_flax.train.loop import Loop, check_dataset
from aim_flax.train.workdir import claimed

_SEEDS = "seeds_together.json"


def check_together(experiment: Experiment) -> None:
    """Raises UsageError if seeds of this experiment can only be trained one at a time."""
    if experiment.config.train.stop_patience is not None:
        raise UsageError("train.stop_patience is set, and seeds that stop early are trained alone")
    if experiment.train_batches.seed_axes is None:
        raise UsageError("its images are streamed, and each seed takes them in another order")
    if jax.process_count() > 1:
        raise UsageError("there are several processes, which train one seed at a time")


def train_together(
    experiment: Experiment,
    seeds: Sequence[int],
    workdirs: Sequence[Path],
    folder: Path,
    part: Part,
    other_images: bool = False,
) -> None:
    """Trains runs that differ only in their seed, or continues them where they stopped.

    Each workdir gets the files that `loop.run` writes. A run whose loss becomes NaN or infinite is
    marked in its workdir (`workdir.mark_diverged`), and the others continue.

    Args:
      experiment: of the config that the runs share; its own seed is not used.
      seeds, workdirs: of the runs. A workdir with a finished run is not touched.
      folder: holds the group's checkpoints until it is done, and is then deleted; the checkpoints
        of another group there are deleted first.
      part: reports on progress.
      other_images: as for `loop.run`.

    Raises:
      UsageError: `check_together`'s, or a workdir holds something else, or another process is at
        work in one (BusyError).
      InterruptionError: SIGTERM, SIGHUP or Ctrl-C; the state is saved.
      StorageError: as `run` does.
    """
    check_together(experiment)
    runs = [experiment.with_seed(seed) for seed in seeds]
    with contextlib.ExitStack() as stack:
        for run, workdir in zip(runs, workdirs, strict=True):
            if note := check_dataset(workdir, run, other_images):
                part.say(note)
            stack.enter_context(claimed(workdir, run.config))
            dataset_record.write(workdir, run.dataset.fingerprint, run.epoch_steps)
        if unfinished_group(folder) != list(seeds):
            shutil.rmtree(folder, ignore_errors=True)
            with writing(folder):
                folder.mkdir(parents=True)
                write_json(folder / _SEEDS, list(seeds))
        Loop(runs, workdirs, folder / "checkpoints", part).train()
        shutil.rmtree(folder, ignore_errors=True)


def unfinished_group(folder: Path) -> list[int]:
    """Returns the seeds of an unfinished group from its folder; [] if there is none."""
    if not (folder / _SEEDS).is_file() or not any(folder.glob("checkpoints/*/")):
        return []
    seeds = read_json(folder / _SEEDS)
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise UsageError(f"{folder / _SEEDS} is damaged: expected a list of seeds")
    return seeds
