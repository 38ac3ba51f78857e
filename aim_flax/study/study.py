"""A study: every arm with every seed, each run in a workdir of its own, and a report on them.

A study's directory holds DIR/<arm>/<seed>/ as `training.run` leaves them, `study.json` (what it
consists of), and the report: report.md, results.csv, curves.png and differences.png. While seeds
are trained together, their common checkpoints lie in DIR/.groups/<arm>/<first seed>/.
"""

import copy
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from aim_flax.console import Part, Reporter
from aim_flax.data.in_memory import InMemory
from aim_flax.errors import BusyError, DivergenceError, InterruptionError, UsageError
from aim_flax.study import report as study_report
from aim_flax.study.plan import Arm, format_ranges, parse_seeds, plan
from aim_flax.study.record import STUDY, check_reference, command, merge, read_study, write_study
from aim_flax.study.results import Row, read_run, without_result
from aim_flax.study.table import arm_table
from aim_flax.train import loop, signals
from aim_flax.train.experiment import Experiment
from aim_flax.train.together import check_together, train_together, unfinished_group
from aim_flax.train.workdir import check_claim, held, mark_diverged

_GROUPS = ".groups"
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_TO_WAIT = 60.0  # for another process that is adding to the study


def run(
    config: str,
    workdir: str | Path | None = None,
    arms: Sequence[str] = (),
    seeds: str | int = 10,
    custom: Sequence[str] = (),
    overrides: Sequence[str] = (),
    derive_from: str | None = None,
    reference: str | None = None,
    seeds_per_program: int | None = None,
    device_count: int | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Trains what is missing of every arm with every seed, and writes the study's report.

    A study that was stopped goes on where it was left; arms and seeds may be added to one. A run
    whose loss becomes NaN or infinite is marked in its workdir, and the others go on. Several
    processes may work at one study: each leaves out the runs that another is training.

    Args:
      config: a config file.
      workdir: the study's; None: runs/ablation-<the config's name>.
      arms: names of the file's arms, or of controls that are derived, see `controls.derive`.
      seeds: see `parse_seeds`.
      custom: further arms, "NAME:KEY=VALUE KEY=VALUE" from the file's default arm, or
        "NAME=ARM:..." from another one; blanks or semicolons part the assignments.
      overrides: "key=value" for all arms; what concerns the memory, for those that have one.
      derive_from: the arm that controls are derived from; None: the first arm with a memory, of
        `arms` or else of the file.
      reference: the arm that others are compared with; None: `control`, if there is one.
      seeds_per_program: how many seeds of an arm to train as one program; None: all, where
        `fits_together` says so, else each by itself.
      device_count: how many devices to use; None for all.
      quiet: leave out the reports on progress.

    Returns:
      A row of `table.COLUMNS` for each run of the study.

    Raises:
      UsageError: before anything is touched, on a study that can't be run, or a workdir that
        holds something else.
      DataError: an image can't be read; the state is saved.
      InterruptionError: SIGTERM or Ctrl-C; the state is saved.
    """
    chosen = parse_seeds(seeds)
    if seeds_per_program is not None and seeds_per_program < 1:
        raise UsageError(f"seeds per program: {seeds_per_program}, expected at least 1, or auto")
    planned = plan(config, arms, custom, overrides, derive_from)
    name = next(iter(planned.values())).config.name
    workdir = Path(workdir) if workdir is not None else Path("runs") / f"ablation-{name}"

    def study() -> dict[str, Any]:
        there = read_study(workdir)
        return merge(there, workdir, name, config, planned, chosen, reference)

    study()  # raises before anything is touched
    experiments = _experiments(planned, chosen, device_count)
    for arm, experiment in experiments.items():
        if seeds_per_program not in (None, 1):
            try:
                check_together(experiment)
            except UsageError as error:
                raise UsageError(f"arm {arm}: {error}; leave --seeds-per-program out") from None
        for seed in chosen:
            check_claim(_folder(workdir, arm, seed), experiment.with_seed(seed).config)
    _make(workdir)
    with held(workdir, _SECONDS_TO_WAIT):
        write_study(workdir, study())
    _train(workdir, experiments, chosen, seeds_per_program, quiet)
    return write_report(workdir, quiet=quiet)


def write_report(
    workdir: str | Path, reference: str | None = None, quiet: bool = False
) -> list[dict[str, Any]]:
    """Writes and prints the report of a study as far as it has come, and returns its runs' rows.

    Args:
      reference: the arm that others are compared with from now on; None: as before.

    Raises:
      UsageError: the workdir holds no study, or it has no such arm.
    """
    workdir = Path(workdir)
    study = read_study(workdir)
    if study is None:
        raise UsageError(f"{workdir / STUDY} not found: {workdir} holds no study")
    if reference is not None:
        check_reference(reference, study["arms"])
        study["reference"] = reference
        write_study(workdir, study)
    rows, histories = [], {}
    for arm, planned in study["arms"].items():
        for seed in planned["seeds"]:
            folder = _folder(workdir, arm, seed)
            rows.append(_row(folder, planned["config"], seed))
            if history := study_report.read_history(folder):
                histories[arm, seed] = history
    reference = study["reference"]
    compared = reference is not None and len(study["arms"]) > 1
    if compared:
        title = f"Ablation of {study['name']}"
        study_report.write(workdir, rows, histories, reference, title, command(study))
    if not quiet:
        print(arm_table(rows, reference if compared else None))
        if compared:
            print(f"\n{workdir / 'report.md'}")
        elif len(study["arms"]) > 1:
            print("\nno report: no arm is named control; --reference ARM says what to compare with")
    return rows


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{workdir} is not writable: {error.strerror}") from None


def _experiments(
    planned: dict[str, Arm], seeds: Sequence[int], device_count: int | None
) -> dict[str, Experiment]:
    """Returns the arms' experiments; arms with the same images in memory share them.

    Raises:
      UsageError: an arm can't be run.
    """
    shared: dict[str, InMemory] = {}
    experiments = {}
    for arm, made in planned.items():
        config = copy.deepcopy(made.config)
        with config.unlocked():
            config.seed = seeds[-1]
        images = json.dumps([config.data.to_json(), config.eval.to_json()])
        try:
            experiment = Experiment(config, device_count, shared.get(images))
        except UsageError as error:
            raise UsageError(f"arm {arm}: {error}") from None
        if isinstance(experiment.dataset, InMemory):
            shared[images] = experiment.dataset
        experiments[arm] = experiment
    return experiments


def fits_together(experiment: Experiment) -> bool:
    """Returns whether it is worth it to train several seeds of an experiment as one program.

    Not convolutions on CPU: with a kernel per seed they become grouped ones, and nothing is gained.
    A training step of five seeds of a small ResNet (stages of 1 and 1 block, width 16, batch 32 of
    32x32 pixels) took 1.14 s of CPU together and five times 0.20 s apart, and apart each run is
    bit-equal to the one that train.py makes.
    """
    try:
        check_together(experiment)
    except UsageError:
        return False
    return jax.default_backend() != "cpu" or not _has_convolutions(experiment)


def _has_convolutions(experiment: Experiment) -> bool:
    config = experiment.config
    image = jax.ShapeDtypeStruct((1, *config.data.image_shape), "float32")
    trace = jax.make_jaxpr(lambda key, image: experiment.model.init(key, image, train=False))
    return "conv_general_dilated" in str(trace(jax.random.key(0), image))


def _train(
    workdir: Path,
    experiments: dict[str, Experiment],
    seeds: Sequence[int],
    seeds_per_program: int | None,
    quiet: bool,
) -> None:
    """Trains the runs that have no result yet."""
    programs = {
        arm: list(_programs(workdir, arm, experiment, seeds, seeds_per_program))
        for arm, experiment in experiments.items()
    }
    total = sum(
        len(together) * experiments[arm].total_steps
        for arm, planned in programs.items()
        for together in planned
    )
    done = 0
    reporter = Reporter(total, 0, quiet, _SECONDS_BETWEEN_LINES)
    # A signal may come between two runs, too.
    with signals.signals() as received, reporter:
        for arm, planned in programs.items():
            experiment = experiments.pop(arm)
            for together in planned:
                count = len(together)
                seeds_of = (
                    f"seed {together[0]}" if count == 1 else f"seeds {format_ranges(together)}"
                )
                label = f"{arm} {seeds_of}"
                part = Part(reporter, label, done, count, received)
                folders = [_folder(workdir, arm, seed) for seed in together]
                try:
                    if all(map(_is_done, folders)):
                        pass  # another process has trained them meanwhile
                    elif count == 1:
                        _train_alone(experiment, together[0], folders[0], part, quiet)
                    else:
                        group = workdir / _GROUPS / arm / str(together[0])
                        train_together(experiment, together, folders, group, part)
                except BusyError as error:
                    part.say(f"{label} left out: {error}")
                done += count * experiment.total_steps
                reporter.advance(done, {}, label)
                if received and done < total:
                    name = signal.Signals(received[0]).name
                    message = f"{name}: {label} done; the same command goes on from there"
                    raise InterruptionError(message, received[0])
    if not any((workdir / _GROUPS).glob("*/*")):
        shutil.rmtree(workdir / _GROUPS, ignore_errors=True)


def _train_alone(experiment: Experiment, seed: int, folder: Path, part: Part, quiet: bool) -> None:
    run = experiment.with_seed(seed)
    if not isinstance(run.dataset, InMemory):
        # What can't be read is noted in the dataset: each run its own, as by itself.
        run = Experiment(run.config, experiment.devices.count)
    try:
        loop.train(run, folder, quiet, part)
    except DivergenceError as error:
        mark_diverged(folder, error.step)
        part.say(f"{run.config.name}:{run.config.arm} seed {seed}: {error}")


def _programs(
    workdir: Path,
    arm: str,
    experiment: Experiment,
    seeds: Sequence[int],
    seeds_per_program: int | None,
) -> Iterator[list[int]]:
    """Yields which seeds to train together, those first that were left unfinished."""
    left = [seed for seed in seeds if not _is_done(_folder(workdir, arm, seed))]
    for folder in sorted((workdir / _GROUPS / arm).glob("*"), key=lambda f: int(f.name)):
        group = unfinished_group(folder)
        if not any(seed in left for seed in group):
            continue
        yield group
        left = [seed for seed in left if seed not in group]
    for seed in list(left):
        if any(_folder(workdir, arm, seed).glob("checkpoints/*/")):
            yield [seed]
            left.remove(seed)
    size = seeds_per_program or (max(len(left), 1) if fits_together(experiment) else 1)
    yield from (left[i : i + size] for i in range(0, len(left), size))


def _is_done(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("summary.json", "diverged.json"))


def _folder(workdir: Path, arm: str, seed: int) -> Path:
    return workdir / arm / str(seed)


def _row(folder: Path, config: dict[str, Any], seed: int) -> Row:
    if (folder / "config.json").is_file():
        return read_run(folder)
    return without_result(ConfigDict(config | {"seed": seed}))
