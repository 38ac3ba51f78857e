"""A study's own file, study.json: what the study consists of."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax import files
from aim_flax.errors import UsageError, check_choice
from aim_flax.files import read_json
from aim_flax.study.plan import Arm, format_seeds
from aim_flax.train.workdir import NOT_OF_THE_RUN, differences

STUDY = "study.json"


def read_study(workdir: Path) -> dict[str, Any] | None:
    """Returns the content of study.json; None where a study can be begun.

    Raises:
      UsageError: the workdir holds something else.
    """
    if (workdir / STUDY).is_file():
        return read_json(workdir / STUDY)
    if workdir.exists():
        if not workdir.is_dir():
            raise UsageError(f"{workdir} is a file, expected a directory")
        if any(not file.name.startswith(".") for file in workdir.iterdir()):
            raise UsageError(f"{workdir} is not empty and holds no study; choose another --workdir")
    return None


def write_study(workdir: Path, study: dict[str, Any]) -> None:
    try:
        files.write_json(workdir / STUDY, study)
    except OSError as error:
        raise UsageError(f"{workdir} is not writable: {error.strerror}") from None


def merge(
    study: dict[str, Any] | None,
    workdir: Path,
    name: str,
    file: str,
    planned: dict[str, Arm],
    seeds: Sequence[int],
    reference: str | None,
) -> dict[str, Any]:
    """Returns what the study consists of with these arms and seeds added.

    Raises:
      UsageError: the workdir's study is another one.
    """
    study = study or {"name": name, "config": file, "reference": None, "arms": {}}
    if study["name"] != name:
        raise UsageError(f"{workdir} holds a study of {study['name']}; choose another --workdir")
    arms = study["arms"]
    for arm, plan in planned.items():
        if arm not in arms:
            arms[arm] = plan.options | {"seeds": [], "config": json.loads(plan.config.to_json())}
        elif changes := differences(ConfigDict(arms[arm]["config"]), plan.config):
            raise UsageError(
                f"{workdir} holds a study with another arm {arm}, which differs in {changes};"
                " choose another --workdir"
            )
        arms[arm]["seeds"] = sorted({*arms[arm]["seeds"], *seeds})
    _check_same_overrides(workdir, arms)
    if reference is not None:
        check_reference(reference, arms)
        study["reference"] = reference
    elif study["reference"] is None and "control" in arms:
        study["reference"] = "control"
    study["config"] = file
    return study


def _check_same_overrides(workdir: Path, arms: dict[str, Any]) -> None:
    """Raises UsageError where arms that are compared were made with different overrides."""
    first, *others = arms
    there = _of_result(arms[first]["overrides"])
    for arm in others:
        here = _of_result(arms[arm]["overrides"])
        for key in dict.fromkeys([*there, *here]):
            if there.get(key) != here.get(key):
                raise UsageError(
                    f"{workdir} holds a study of another config: {key} is {_value(there, key)}"
                    f" there, {_value(here, key)} for the arm {arm}; choose another --workdir"
                )


def _of_result(overrides: Sequence[str]) -> dict[str, str]:
    """Returns {key: value} of the overrides that a result depends on."""
    values = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    return {key: value for key, value in values.items() if key not in NOT_OF_THE_RUN}


def _value(values: dict[str, str], key: str) -> str:
    return f"set to {values[key]}" if key in values else "not set"


def check_reference(reference: str, arms: dict[str, Any]) -> None:
    check_choice("the reference arm", reference, arms)


def command(study: dict[str, Any]) -> str:
    """Returns the command that makes the study; several lines where one can't."""
    lines: list[dict[str, Any]] = []
    for arm, plan in study["arms"].items():
        source = plan["derive_from"]
        for line in lines:
            same_source = source is None or line["from"] in (None, source)
            if line["seeds"] == plan["seeds"] and same_source:
                break
        else:
            line = {"seeds": plan["seeds"], "from": None, "arms": [], "custom": {}}
            lines.append(line)
        line["from"] = line["from"] or source
        line["custom"] |= plan["custom"]
        if arm not in plan["custom"]:
            line["arms"].append(arm)
    overrides = next(iter(study["arms"].values()))["overrides"]
    commands = []
    for line in lines:
        words = ["python", "ablate.py", "--config", study["config"]]
        words += ["--arms", ",".join(line["arms"])] if line["arms"] else []
        for text in line["custom"].values():
            words += ["--arm", text]
        words += ["--derive-from", line["from"]] if line["from"] else []
        words += ["--seeds", format_seeds(line["seeds"])]
        if study["reference"] not in (None, "control"):
            words += ["--reference", study["reference"]]
        commands.append(shlex.join([*words, *(f"--config.{a}" for a in overrides)]))
    return "\n".join(commands)
