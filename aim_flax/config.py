"""Experiment configs: loading FILE:ARM, overriding keys, saving and comparing.

FILE is a path, or the name of a config that comes with this package: digits_mlp. A config file
defines `ARMS`, the names of its arms with the default first, and `get_config(arm)`, which returns a
`ConfigDict`. Arms differ only in what they study. A file can say `from . import base`: that is the
base.py beside it, or else configs/base.py.
"""

import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import operator
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from aim_flax import sources
from aim_flax.errors import UsageError, nearest
from aim_flax.names import shortened
from aim_flax.options import check_values

# Beside the package in a checkout, in it where it is installed (see pyproject.toml).
_CONFIGS = next(
    folder
    for folder in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
    if (folder / "base.py").is_file()
)
_NO_CONFIGS = ("base", "__init__")
# What a config must have at the top; its groups are those that base.start makes.
_NEEDED = ("name", "arm", "seed", "dtype", "parallel", "data", "augment", "model", "memory")
_NEEDED += ("optimizer", "schedule", "train", "eval")
_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "values in brackets, with commas, such as (3,4)",
    list: "values in brackets, with commas, such as (3,4)",
    str: "a text",
}
_numbers = itertools.count()


def load(file_and_arm: str) -> ConfigDict:
    """Returns the config that "FILE" or "FILE:ARM" names, locked.

    Raises:
      UsageError: no such file, a file that is no config or fails, an unknown arm, or a value that
        its option can't have.
    """
    file, _, arm = file_and_arm.partition(":")
    module = _run(file)
    arm = arm or module.ARMS[0]
    if arm not in module.ARMS:
        raise UsageError(
            f"{file} has no arm {arm!r}{nearest(arm, module.ARMS)}; its arms: "
            + ", ".join(module.ARMS)
        )
    with _told_as_mistakes_of(file):
        config = module.get_config(arm)
    what = f"get_config({arm!r}) of {file!r} returned"
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{what} a {type(config).__name__}, expected what base.start makes")
    for key in _NEEDED:
        if key not in config:
            raise UsageError(f"{what} a config without {key}, expected what base.start makes")
    with _told_as_mistakes_of(file):
        values = flatten(config)
    check_values(values)
    return config.lock()


def arms(file: str) -> tuple[str, ...]:
    """Returns the names of a config file's arms, the default first.

    Raises:
      UsageError: no such file, or a file that is no config.
    """
    return tuple(_run(file).ARMS)


def names() -> list[str]:
    """Returns the names of the configs that come with this package."""
    return sorted(file.stem for file in _CONFIGS.glob("*.py") if file.stem not in _NO_CONFIGS)


def _find(file: str) -> str:
    """Returns the path of a config file that is given by its path, or by its name.

    Raises:
      UsageError: no such file, with the nearest path and name.
    """
    if Path(file).is_file():
        return file
    if file in names():
        return str(_CONFIGS / f"{file}.py")
    near = Path(file).parent.glob("*.py") if Path(file).parent.is_dir() else ()
    close = nearest(file, map(str, near)) or nearest(Path(file).stem, names())
    raise UsageError(f"config file {file!r} not found{close}")


def _run(file: str) -> ModuleType:
    """Returns a config file as a module."""
    file = _find(file)
    # In a package of its own: each file imports the base of its own folder, as it is now.
    package = ModuleType(f"aim_flax_config_{next(_numbers)}")
    package.__path__ = [str(Path(file).absolute().parent), str(_CONFIGS)]
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.experiment", file)
    if spec is None:
        raise UsageError(f"{file!r} is no Python file")
    sys.modules[package.__name__] = package
    module = importlib.util.module_from_spec(spec)
    with _told_as_mistakes_of(file):
        spec.loader.exec_module(module)
    if not (hasattr(module, "ARMS") and callable(getattr(module, "get_config", None))):
        raise UsageError(f"{file!r} is no config: it must define ARMS and get_config(arm)")
    names = module.ARMS
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise UsageError(f"ARMS of {file!r} is {names!r}, expected a tuple of the arms' names")
    if not names:
        raise UsageError(f"ARMS of {file!r} is empty, expected a tuple of the arms' names")
    return module


@contextlib.contextmanager
def _told_as_mistakes_of(file: str) -> Iterator[None]:
    """Turns what a config file raises into a UsageError of one line, with the file's own line."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        where = f"{file!r}"
        calls = traceback.extract_tb(error.__traceback__)
        # Paths may differ in form; a base beside it has its lines in a file of its own.
        names = [Path(file).name, "base.py"]
        line = next((c for c in reversed(calls) if Path(c.filename).name in names), None)
        if isinstance(error, SyntaxError) and error.filename:
            where = f"{error.filename!r}, line {error.lineno}"
        elif line is not None:
            where = f"{line.filename!r}, line {line.lineno}"
        text = shortened(" ".join(str(getattr(error, "msg", None) or error).split()), 200)
        raise UsageError(f"{where} fails: {type(error).__name__}: {text}") from None


def override(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """Returns a copy with keys set by "key.path=value" strings, each to its own type.

    "None" is None for a key that can be None: for one that the config file made by `placeholder`.
    "model.pretrained=..." also sets what those weights expect (`aim_flax.sources`), but for keys
    that are set themselves.

    Raises:
      UsageError: an unknown key, with the nearest valid one, or a value of another type, or one
        that its option can't have.
    """
    known = flatten(config)
    for assignment in assignments:
        key, equals, _ = assignment.partition("=")
        if key not in known:
            groups = {name.rpartition(".")[0] for name in known} - {""}
            why = "is a group of keys" if key in groups else "is no config key"
            raise UsageError(f"{key!r} {why}{nearest(key, known)}")
        if not equals:
            raise UsageError(f"{key!r} has no value: expected {key}=VALUE")
    # First what weights set along with themselves: anything else that is asked for is said later.
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key == "model.pretrained" and value != "None":
            assignments = [*sources.assignments(value, config.model.name), *assignments]
    # Of a key that is set twice the last counts; the flag of a tuple would join them.
    last = {assignment.partition("=")[0]: assignment for assignment in assignments}
    changed = copy.deepcopy(config)
    try:
        _set(changed, last)
    except (flags.Error, ValueError, TypeError):
        for key, assignment in last.items():
            _check_type(config, key, assignment)
        raise
    # Only what was set: a pattern that follows from a wrong size could not be found.
    given = {key: functools.reduce(operator.getitem, key.split("."), changed) for key in last}
    check_values({"model.name": changed.get("model", {}).get("name"), **given}, last)
    return changed


def _set(config: ConfigDict, assignments: Mapping[str, str]) -> None:
    """Sets keys of a config, each to its own type; raises what a wrong value makes absl raise."""
    words = ["config"]
    for key, assignment in assignments.items():
        *groups, name = key.split(".")
        group = functools.reduce(operator.getitem, groups, config)
        if isinstance(group[name], list):  # A saved config has lists for its tuples.
            with group.unlocked():
                values = tuple(group[name])
                del group[name]  # Or its type would stay.
                group[name] = values
        if assignment == f"{key}=None" and _can_be_none(config, key):
            config.update_from_flattened_dict({key: None})
        else:
            words.append(f"--config.{assignment}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    values(words)


def _check_type(config: ConfigDict, key: str, assignment: str) -> None:
    """Raises UsageError if a value is none of its key's type."""
    try:
        _set(copy.deepcopy(config), {key: assignment})
    except (flags.Error, ValueError, TypeError):
        *groups, name = key.split(".")
        group = functools.reduce(operator.getitem, groups, config)
        kind = group.get_type(name)
        expected = _TYPES.get(kind, f"a {kind.__name__}")
        or_none = " or None" if _can_be_none(config, key) else ""
        raise UsageError(f"{assignment}: expected {expected}{or_none}") from None


def _can_be_none(config: ConfigDict, key: str) -> bool:
    *groups, name = key.split(".")
    group = functools.reduce(operator.getitem, groups, config)
    value = dict(group.items(preserve_field_references=True))[name]
    # Not what is derived from other keys, which is a reference of another class.
    return type(value) is FieldReference


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted key: value} of all leaves; an empty group is a leaf."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict) and len(value):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


# What holds where a config lacks a key, as those of earlier runs do. It stays as it is, whatever
# becomes of the values in configs/base.py: those runs were made with it.
LEFT_OUT = flatten(
    {
        # Digits lacked most of these, and have no use for those.
        "data": {
            "mean": [],
            "deviation": [],
            "dir": "",
            "formats": "usual",
            "fit": "stretch",
            "centre": 1.0,
            "val_fraction": 0.1,
            "test_fraction": 0.2,
            "in_memory_mb": 1024.0,
            "threads": 4,
            "on_error": "stop",
        },
        "augment": {
            "crop": 0.0,
            "rotation": 0.0,
            "translation": 0.0,
            "shift": 0,
            "flip_horizontal": False,
            "flip_vertical": False,
            "contrast": 0.0,
            "roll": False,
        },
        "model": {
            "momentum": 0.99,
            "epsilon": 1e-3,
            "stride_on": "conv1",
            "dense_norm": True,
        },
        "train": {
            "accumulate": 1,
            "balance": "none",
            "freeze": "",
            "rates": [],
            "remat": "",
            "detect_anomaly": False,
        },
        "memory": {
            "kernel_size": 1,
            "fit": "reshape",
            "per": [],
            "update_block": {
                "features": [16, 16, 32],
                "kernel_size": 3,
                "form": "published",
                "mode": "replace",
                "momentum": 0.99,
                "epsilon": 1e-3,
            },
            "learning_rate_scale": 1.0,
        },
        "instead": {"at": "", "hidden": [], "stddev": 0.0, "zero_init": False},
    }
)


def differing_keys(a: ConfigDict, b: ConfigDict) -> list[str]:
    """Returns the dotted keys whose values differ, or that only one of the two has.

    A key that is missing has its value of LEFT_OUT, or else None. An empty group counts as missing.
    """
    leaves_a, leaves_b = (_leaves(config) for config in (a, b))
    values_a, values_b = (LEFT_OUT | leaves for leaves in (leaves_a, leaves_b))
    keys = dict.fromkeys([*leaves_a, *leaves_b])
    pairs = {key: (values_a.get(key), values_b.get(key)) for key in keys}
    # NaN is what differs from itself.
    return [key for key, (a, b) in pairs.items() if a != b and not (a != a and b != b)]


def _leaves(config: ConfigDict) -> dict[str, Any]:
    """Returns {dotted key: value} as JSON has the values, without what says nothing."""
    leaves = flatten(json.loads(to_json(config)))
    return {key: value for key, value in leaves.items() if value not in (None, {})}


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON, from which `ConfigDict(json.loads(...))` makes it again, with
    lists for its tuples."""
    return json.dumps(json.loads(config.to_json()), indent=2) + "\n"
