"""The work of a study: its runs that have no result yet, alone or several as one program."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from aim_flax.console import Part
from aim_flax.data.in_memory import InMemory
from aim_flax.errors import BusyError, DivergenceError, StorageError, UsageError
from aim_flax.study.plan import format_ranges
from aim_flax.study.results import STUDY
from aim_flax.train import loop
from aim_flax.train.experiment import Experiment
from aim_flax.train.together import check_together, train_together, unfinished_group
from aim_flax.train.workdir import mark_diverged

GROUPS = ".groups"


@dataclasses.dataclass(frozen=True)
class Work:
    """Runs of an arm that are trained together: one, or several as one program.

    Attributes:
      experiment: the arm's; its own seed plays no part.
      seeds: those of the runs.
    """

    experiment: Experiment
    seeds: list[int]

    @property
    def steps(self) -> int:
        return len(self.seeds) * self.experiment.total_steps

    @property
    def label(self) -> str:
        word = "seed" if len(self.seeds) == 1 else "seeds"
        return f"{self.experiment.config.arm} {word} {format_ranges(self.seeds)}"


def pending(
    workdir: Path, experiment: Experiment, seeds: Sequence[int], seeds_per_program: int | None
) -> list[Work]:
    """Returns the work on those of an arm's runs that have no result, begun ones first."""
    arm = experiment.config.arm
    left = [seed for seed in seeds if not is_done(folder_of(workdir, arm, seed))]
    together = []
    for folder in sorted((workdir / GROUPS / arm).glob("*"), key=lambda folder: int(folder.name)):
        group = unfinished_group(folder)
        if not set(group).isdisjoint(left):
            together.append(group)
            left = [seed for seed in left if seed not in group]
    begun = [seed for seed in left if any(folder_of(workdir, arm, seed).glob("checkpoints/*/"))]
    together += [[seed] for seed in begun]
    left = [seed for seed in left if seed not in begun]
    if left:
        size = seeds_per_program or (len(left) if fits_together(experiment) else 1)
        together += [left[i : i + size] for i in range(0, len(left), size)]
    return [Work(experiment, seeds) for seeds in together]


def fits_together(experiment: Experiment) -> bool:
    """Returns whether training several seeds of an experiment as one program saves time.

    Convolutions on CPU gain nothing: with one kernel per seed they become grouped convolutions. A
    training step of a small ResNet with five seeds (stages of 1 and 1 block, width 16, batch 32 of
    32x32 pixels) took 1.14 s of CPU as one program, and 0.20 s for each seed alone. A run that is
    trained alone is also bit-equal to the one that train.py makes.
    """
    try:
        check_together(experiment)
    except UsageError:
        return False
    if jax.default_backend() != "cpu":
        return True
    image = jax.ShapeDtypeStruct((1, *experiment.config.data.image_shape), "float32")
    trace = jax.make_jaxpr(lambda key, image: experiment.model.init(key, image, train=False))
    return "conv_general_dilated" not in str(trace(jax.random.key(0), image))


def do(workdir: Path, item: Work, part: Part, quiet: bool, other_images: bool) -> None:
    """Does an item of work, and leaves it out where another process is at it.

    A run that diverges is marked. Raises what `loop.train` and `train_together` do otherwise.
    """
    # Not made anew by the next run.
    if not (workdir / STUDY).is_file():
        raise StorageError(
            f"{workdir} was deleted, moved or emptied while {item.label} was next; the study ends"
            " here, and writes nothing more"
        )
    try:
        _train(workdir, item, part, quiet, other_images)
    except BusyError as error:
        part.say(f"{item.label} left out: {error}")
    # Steps that another process did, or early stopping saved, took no time here.
    part.begin(item.experiment.total_steps)
    part.advance(item.experiment.total_steps, {})


def _train(workdir: Path, item: Work, part: Part, quiet: bool, other_images: bool) -> None:
    arm = item.experiment.config.arm
    folders = [folder_of(workdir, arm, seed) for seed in item.seeds]
    if all(map(is_done, folders)):
        return  # another process has trained them meanwhile
    if len(item.seeds) > 1:
        group = workdir / GROUPS / arm / str(item.seeds[0])
        train_together(item.experiment, item.seeds, folders, group, part, other_images)
        return
    run = item.experiment.with_seed(item.seeds[0])
    if not isinstance(run.dataset, InMemory):
        # The dataset notes which images can't be read, so each run needs one of its own.
        run = Experiment(run.config, run.devices.count)
    try:
        loop.train(run, folders[0], quiet, part, other_images)
    except DivergenceError as error:
        mark_diverged(folders[0], error.step)
        part.say(f"{run.config.name}:{item.label}: {error}")


def is_done(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("summary.json", "diverged.json"))


def folder_of(workdir: Path, arm: str, seed: int) -> Path:
    return workdir / arm / str(seed)
