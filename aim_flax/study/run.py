"""Running a study: flags -> `Study` -> a list of work -> a workdir per run -> rows -> the report.

A study's directory holds DIR/<arm>/<seed>/ as `loop.run` leaves them, `study.json` (what it
consists of), `progress.json` (how far it is), and the report: report.md, report.html, results.csv,
curves.png and differences.png. While seeds are trained together, their common checkpoints lie in
DIR/.groups/<arm>/<first seed>/.
"""

import contextlib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.console import Part, Reporter
from aim_flax.data.in_memory import InMemory
from aim_flax.errors import InterruptionError, UsageError
from aim_flax.files import writing
from aim_flax.study import report as study_report
from aim_flax.study.plan import NOT_RECORDED, Study
from aim_flax.study.power import power_table
from aim_flax.study.record import SECONDS_TO_WAIT, add, merge, read_study
from aim_flax.study.results import STUDY, read_run, without_result
from aim_flax.study.table import arm_table
from aim_flax.study.work import GROUPS, Work, do, folder_of, pending
from aim_flax.study.workers import check_workers, how_many, train
from aim_flax.train import dataset_record, signals
from aim_flax.train.experiment import Experiment
from aim_flax.train.loop import check_dataset
from aim_flax.train.together import check_together, unfinished_group
from aim_flax.train.workdir import (
    PROGRESS,
    can_go_on,
    check_claim,
    dataset_label,
    differences,
    held,
)

_SECONDS_BETWEEN_LINES = 5.0


def run(
    planned: Study,
    workdir: str | Path | None = None,
    seeds_per_program: int | None = None,
    device_count: int | None = None,
    quiet: bool = False,
    other_images: bool = False,
    workers: int | None = 1,
) -> list[dict[str, Any]]:
    """Trains every arm with every seed that is not trained yet, and writes the study's report.

    A study that was stopped continues where it stopped, and arms and seeds can be added to it. A
    run whose loss becomes NaN or infinite is marked in its workdir, and the others continue.
    Several processes can share a study: each leaves out the runs that another one is training.

    Args:
      planned: what to train, see `plan.plan`.
      workdir: the study's directory; None: `default_workdir`'s.
      seeds_per_program: how many seeds of an arm to train as one program; None: all, where
        `fits_together` says so, and otherwise each alone.
      device_count: how many devices to use; None for all.
      quiet: print no progress and no results.
      other_images: go on with other images of the same classes than the study's runs were trained
        on, see `dataset_record.check`.
      workers: how many processes train runs beside each other, each on its share of the cores; 1:
        this one does it; None: `workers.how_many`.

    Returns:
      A row of `results.COLUMNS` for each run of the study.

    Raises:
      UsageError: before anything is written: the study can't be run, or the workdir holds
        something else.
      DataError: an image can't be read; the state is saved.
      InterruptionError: SIGTERM, SIGHUP or Ctrl-C; the state is saved.
      StorageError: something can't be written, or a run's workdir or the study's is gone.
    """
    if seeds_per_program is not None and seeds_per_program < 1:
        raise UsageError(f"seeds per program: {seeds_per_program}, expected at least 1, or auto")
    if workers is not None:
        check_workers(workers, device_count)
    workdir = Path(workdir) if workdir is not None else default_workdir(planned)
    whole = merge(workdir, planned)  # raises before anything is written
    options = (device_count, seeds_per_program, other_images)
    experiments = _experiments(workdir, planned, whole, *options)
    add(workdir, planned)
    work = []
    for name, arm in planned.arms.items():
        # From here on only the work holds the experiment, so its programs are freed with it.
        work += pending(workdir, experiments.pop(name), arm.seeds, seeds_per_program)
    if workers is None:
        workers = how_many(work, device_count)
    options = dict(quiet=quiet, other_images=other_images)
    _train(workdir, work, min(workers, len(work)), options)
    return write_report(workdir, quiet=quiet)


def default_workdir(planned: Study) -> Path:
    """Returns runs/ablation-<config>, with `workdir.dataset_label` behind it.

    A study that an earlier version began there without the label, on the same folder, goes on.
    """
    before = Path(f"runs/ablation-{planned.name}")
    label = _dataset_label(planned)
    there = read_study(before) if label and (before / STUDY).is_file() else None
    if not label or (there is not None and _dataset_label(there) == label):
        return before
    return before.with_name(before.name + label)


def _dataset_label(study: Study) -> str:
    return dataset_label(next(iter(study.arms.values())).config)


def write_report(
    workdir: str | Path,
    reference: str | None = None,
    quiet: bool = False,
    command: str = NOT_RECORDED,
) -> list[dict[str, Any]]:
    """Writes and prints the report of a study, finished or not, and returns its runs' rows.

    Args:
      workdir: the study's directory.
      reference: the arm that others are compared with from now on; None: as before.
      quiet: print nothing.
      command: the command line that asks for another reference.

    Raises:
      UsageError: the workdir holds no study, or the study has no such arm.
    """
    workdir = Path(workdir)
    study = read_study(workdir)
    if study is None:
        raise UsageError(f"{workdir / STUDY} not found: {workdir} holds no study")
    if reference is not None:
        planned = Study(study.name, study.config, reference, {}, [command])
        merge(workdir, planned)  # raises before anything is written
        study = add(workdir, planned)
    compared = study.reference is not None and len(study.arms) > 1
    # Read and written under one lock: of several processes, the last to write knows the most.
    with held(workdir, SECONDS_TO_WAIT) if compared else contextlib.nullcontext():
        rows, histories = _results(workdir, study)
        if compared:
            title, commands = f"Ablation of {study.name}", "\n".join(study.commands)
            with writing(workdir):
                study_report.write(workdir, rows, histories, study.reference, title, commands)
    if not quiet:
        print(arm_table(rows, study.reference if compared else None))
        if compared:
            print(f"\n{workdir / 'report.md'}")
        elif len(study.arms) > 1:
            print("\nno report: no arm is named control; --reference ARM says what to compare with")
    return rows


def power(workdir: str | Path, reference: str | None, points: Sequence[float]) -> str:
    """Returns what the finished runs of a study tell of seeds, see `power.power_table`; nothing is
    written.

    Raises:
      UsageError: the workdir holds no study; see `power_table`.
    """
    workdir = Path(workdir)
    study = read_study(workdir)
    if study is None:
        raise UsageError(f"{workdir / STUDY} not found: {workdir} holds no study")
    rows, _ = _results(workdir, study)
    return power_table(rows, reference or study.reference, points)


def _results(
    workdir: Path, study: Study
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], list[dict[str, float]]]]:
    """Returns each run's row, and the histories of those that have finished an epoch."""
    rows, histories = [], {}
    for name, arm in study.arms.items():
        for seed in arm.seeds:
            folder = folder_of(workdir, name, seed)
            if (folder / "config.json").is_file():
                rows.append(read_run(folder))
            else:
                rows.append(without_result(ConfigDict(arm.config.to_dict() | {"seed": seed})))
            if history := study_report.read_history(folder):
                histories[name, seed] = history
    return rows, histories


def _experiments(
    workdir: Path,
    study: Study,
    whole: Study,
    device_count: int | None,
    seeds_per_program: int | None,
    other_images: bool,
) -> dict[str, Experiment]:
    """Returns the arms' experiments; those with the same images share them in memory.

    Args:
      study: what is planned.
      whole: that and what the workdir has.

    Raises:
      UsageError: an arm can't be run, or the workdir of a run holds something else.
    """
    shared: dict[str, InMemory] = {}
    experiments = {}
    for name, arm in study.arms.items():
        config = configs.override(arm.config, [f"seed={arm.seeds[-1]}"])
        images = json.dumps([config.data.to_json(), config.eval.to_json()])
        try:
            experiment = Experiment(config, device_count, shared.get(images))
        except UsageError as error:
            raise UsageError(f"arm {name}: {error}") from None
        if seeds_per_program not in (None, 1):
            try:
                check_together(experiment)
            except UsageError as error:
                raise UsageError(f"arm {name}: {error}; leave --seeds-per-program out") from None
        _check_dataset(workdir, whole, experiment, other_images)
        for seed in arm.seeds:
            check_claim(folder_of(workdir, name, seed), experiment.with_seed(seed).config)
        groups = (workdir / GROUPS / name).glob("*")
        begun = {seed for group in groups for seed in unfinished_group(group)}
        begun |= {seed for seed in arm.seeds if can_go_on(folder_of(workdir, name, seed))}
        # What has begun needs the weights that it started from no more.
        if not begun.issuperset(arm.seeds):
            try:
                experiment.pretrained()
            except UsageError as error:
                raise UsageError(f"arm {name}: {error}") from None
        if isinstance(experiment.dataset, InMemory):
            shared[images] = experiment.dataset
        experiments[name] = experiment
    return experiments


def _check_dataset(workdir: Path, study: Study, experiment: Experiment, other_images: bool) -> None:
    """Raises UsageError if an arm would be trained on other images than the study's runs were.

    Of the study's other arms a run counts where they take the same part of the same dataset.
    """
    config, found = experiment.config, experiment.dataset.fingerprint
    for name, arm in study.arms.items():
        folders = [folder_of(workdir, name, seed) for seed in arm.seeds]
        if name == config.arm:
            for folder in folders:
                check_dataset(folder, experiment, other_images)
        elif not differences(*(ConfigDict({"data": c.data}) for c in (arm.config, config))):
            for folder in [folder for folder in folders if dataset_record.exists(folder)][:1]:
                # Its epochs may have another number of batches.
                dataset_record.check(folder, config, found, None, other_images)


def _train(workdir: Path, work: list[Work], count: int, options: dict[str, Any]) -> None:
    """Does the work, in this process or in `count` others, and takes each item off the list."""
    total, done = sum(item.steps for item in work), 0
    reporter = Reporter(total, 0, options["quiet"], _SECONDS_BETWEEN_LINES, workdir / PROGRESS)
    # A signal may come between two runs, too.
    with signals.signals() as received, reporter:
        if count > 1 and not reporter.quiet:
            reporter.say(f"{count} processes, each on cores of its own")
        if count > 1:
            train(workdir, work, count, reporter, received, options)
        while work:
            item = work.pop(0)
            part = Part(reporter, item.label, done, len(item.seeds), received)
            do(workdir, item, part, **options)
            done += item.steps
            if received and work:
                name = signal.Signals(received[0]).name
                message = f"{name}: {item.label} done; the same command continues from there"
                raise InterruptionError(message, received[0])
    # Only what is empty: another process may be about to train a group.
    for folder in (*(workdir / GROUPS).glob("*"), workdir / GROUPS):
        with contextlib.suppress(OSError):
            folder.rmdir()
