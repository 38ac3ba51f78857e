"""Experiment configs: loading FILE:ARM, overriding keys, saving and comparing.

A config file defines `ARMS`, the names of its arms with the default first, and
`get_config(arm)`, which returns a `ConfigDict`. Arms differ only in what they study.
"""

import copy
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from aim_flax.errors import UsageError, nearest


def load(file_and_arm: str) -> ConfigDict:
    """Returns the config that "FILE" or "FILE:ARM" names, locked.

    Raises:
      UsageError: no such file, a file that is no config, or an unknown arm.
    """
    file, _, arm = file_and_arm.partition(":")
    if not Path(file).is_file():
        near = Path(file).parent.glob("*.py") if Path(file).parent.is_dir() else ()
        raise UsageError(f"config file {file!r} not found{nearest(file, map(str, near))}")
    spec = importlib.util.spec_from_file_location(f"config_{Path(file).stem}", file)
    if spec is None:
        raise UsageError(f"{file!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (hasattr(module, "ARMS") and hasattr(module, "get_config")):
        raise UsageError(f"{file!r} is no config: it must define ARMS and get_config(arm)")
    arm = arm or module.ARMS[0]
    if arm not in module.ARMS:
        raise UsageError(
            f"{file} has no arm {arm!r}{nearest(arm, module.ARMS)}; its arms: "
            + ", ".join(module.ARMS)
        )
    return module.get_config(arm).lock()


def override(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """Returns a copy with keys set by "key.path=value" strings, each to its own type.

    Raises:
      UsageError: an unknown key, with the nearest valid one, or a value of another type.
    """
    known = flatten(config)
    for assignment in assignments:
        key, equals, _ = assignment.partition("=")
        if key not in known:
            groups = {name.rpartition(".")[0] for name in known}
            why = "is a group of keys" if key in groups else "is no config key"
            raise UsageError(f"{key!r} {why}{nearest(key, known)}")
        if not equals:
            raise UsageError(f"{key!r} has no value: expected {key}=VALUE")
    config = copy.deepcopy(config)
    # Of a key that is set twice the last counts; the flag of a tuple would join them.
    last = {assignment.partition("=")[0]: assignment for assignment in assignments}
    argv = ["config", *(f"--config.{assignment}" for assignment in last.values())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    return config


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted key: value} of all leaves; an empty group is a leaf."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict) and len(value):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def differing_keys(a: ConfigDict, b: ConfigDict) -> list[str]:
    """Returns the dotted keys whose values differ, or that only one of the two has."""
    flat_a, flat_b = (flatten(json.loads(to_json(c))) for c in (a, b))
    absent = object()
    keys: Iterable[str] = dict.fromkeys([*flat_a, *flat_b])
    return [key for key in keys if flat_a.get(key, absent) != flat_b.get(key, absent)]


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON, from which `ConfigDict(json.loads(...))` makes it again, with
    lists for its tuples."""
    return json.dumps(json.loads(config.to_json()), indent=2) + "\n"
