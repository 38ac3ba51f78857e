"""A study's own file, study.json: what the study consists of."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from aim_flax import files
from aim_flax.errors import UsageError, check_choice
from aim_flax.study.plan import NOT_RECORDED, Arm, Study
from aim_flax.study.results import STUDY
from aim_flax.train.workdir import NOT_OF_THE_RUN, differences, held

SECONDS_TO_WAIT = 60.0  # for another process that is writing the study's files


def read_study(workdir: Path) -> Study | None:
    """Returns the study of a workdir; None if there is none yet.

    Raises:
      UsageError: the workdir holds something else.
    """
    if (workdir / STUDY).is_file():
        content = files.read_mapping(workdir / STUDY, ("name", "arms"), "study")
        saved = {"commands": [NOT_RECORDED]} | content
        try:
            arms = {
                name: Arm(ConfigDict(arm.pop("config")), arm.pop("seeds"), origin=arm)
                for name, arm in saved["arms"].items()
            }
            return Study(**saved | {"arms": arms})
        except (AttributeError, KeyError, TypeError) as error:
            raise UsageError(f"{workdir / STUDY} is damaged: {error!r}") from None
    if workdir.exists():
        if not workdir.is_dir():
            raise UsageError(f"{workdir} is a file, expected a directory")
        if any(not file.name.startswith(".") for file in workdir.iterdir()):
            raise UsageError(f"{workdir} is not empty and holds no study; choose another --workdir")
    return None


def add(workdir: Path, planned: Study) -> Study:
    """Adds what is planned to the workdir's study, writes it, and returns it.

    Raises:
      UsageError: as `merge` does, or the workdir is not writable.
    """
    with files.writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with held(workdir, SECONDS_TO_WAIT):
            study = merge(workdir, planned)
            arms = {
                name: arm.origin | {"seeds": arm.seeds, "config": json.loads(arm.config.to_json())}
                for name, arm in study.arms.items()
            }
            files.write_json(workdir / STUDY, vars(study) | {"arms": arms}, sealed=True)
    return study


def merge(workdir: Path, planned: Study) -> Study:
    """Returns the workdir's study with what is planned added; nothing is written.

    Raises:
      UsageError: the workdir holds another study or something else, or the reference is no arm.
    """
    saved = read_study(workdir) or dataclasses.replace(planned, arms={}, commands=[])
    if saved.name != planned.name:
        raise UsageError(f"{workdir} holds a study of {saved.name}; choose another --workdir")
    arms = dict(saved.arms)
    for name, arm in planned.arms.items():
        there = arms.setdefault(name, arm)
        if changes := differences(there.config, arm.config):
            raise UsageError(
                f"{workdir} holds a study with another arm {name}, which differs in {changes};"
                " choose another --workdir"
            )
        seeds = sorted({*there.seeds, *arm.seeds})
        arms[name] = dataclasses.replace(there, seeds=seeds)
    _check_same_overrides(workdir, arms)
    reference = saved.reference if planned.reference is None else planned.reference
    if reference is None and "control" in arms:
        reference = "control"
    if reference is not None:
        check_choice("the reference arm", reference, arms)
    commands = list(dict.fromkeys([*saved.commands, *planned.commands]))
    return Study(saved.name, planned.config, reference, arms, commands)


def _check_same_overrides(workdir: Path, arms: Mapping[str, Arm]) -> None:
    """Raises UsageError if arms that are compared were made with different overrides."""
    there = _settings(next(iter(arms.values())))
    for name, arm in arms.items():
        here = _settings(arm)
        for key in {**there, **here}:
            old, new = there.get(key, "not set"), here.get(key, "not set")
            if old != new:
                raise UsageError(
                    f"{workdir} holds a study of another config: {key} is {old} there, {new} for"
                    f" the arm {name}; choose another --workdir"
                )


def _settings(arm: Arm) -> dict[str, str]:
    """Returns {key: "set to VALUE"} for the overrides that a result depends on."""
    pairs = (override.split("=", 1) for override in arm.origin["overrides"])
    return {key: f"set to {value}" for key, value in pairs if key not in NOT_OF_THE_RUN}
