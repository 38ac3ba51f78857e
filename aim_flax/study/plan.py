"""Which arms and seeds a study has, from what a command line says."""

import dataclasses
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.data.load import open_dataset, with_classes
from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.study.controls import CONTROLS, derive


def parse_seeds(text: str | int) -> list[int]:
    """Returns the seeds that are meant by a number N (0 to N - 1), a range A-B (both included), or
    several of them with commas between ("3,5,10-19", where a number is a seed), in order.

    Raises:
      UsageError: the text is something else, or names a seed twice.
    """
    words = str(text).split(",")
    seeds: list[int] = []
    for word in words:
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if not match:
            raise UsageError(f"seeds are {text!r}, expected a number, a range as 100-119, or a,b,c")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(words) == 1 and match[2] is None:
            first, last = 0, first - 1
        if last < first:
            raise UsageError(f"seeds are {text!r}, which is none")
        seeds += range(first, last + 1)
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise UsageError(f"seeds are {text!r}, which names {', '.join(map(str, twice))} twice")
    return sorted(seeds)


def format_seeds(seeds: Sequence[int]) -> str:
    """Returns the text that `parse_seeds` makes these seeds of."""
    if list(seeds) == list(range(len(seeds))):
        return str(len(seeds))
    return format_ranges(seeds) if len(seeds) > 1 else f"{seeds[0]}-{seeds[0]}"


def format_ranges(seeds: Sequence[int]) -> str:
    """Returns "0-4,7" of seeds in ascending order."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm of a study.

    Attributes:
      config: with its name as `arm`.
      options: what a command line needs to make it: `overrides`, `custom` ({name: text} of those
        given that it is, or is made from) and `derive_from` (None where it isn't derived).
    """

    config: ConfigDict
    options: dict[str, Any]


def plan(
    file: str,
    names: Sequence[str],
    custom: Sequence[str],
    overrides: Sequence[str],
    derive_from: str | None,
) -> dict[str, Arm]:
    """Returns the arms by name, in the order given.

    Raises:
      UsageError: an arm is unknown, named twice, or can't be made.
    """
    if ":" in Path(file).name:
        raise UsageError(f"config is {file!r}, expected a file; its arms are named by --arms")
    configs.load(file)  # raises where it is no config
    own: tuple[str, ...] = runpy.run_path(file)["ARMS"]
    for assignment in overrides:
        if assignment.partition("=")[0] in ("seed", "arm", "name"):
            raise UsageError(f"{assignment!r}: a study sets this key by itself")
    defined = _parse_custom(custom, own)
    wanted = [*names, *defined]
    valid = list(dict.fromkeys([*own, *CONTROLS, *defined]))
    if not wanted or not all(wanted):
        raise UsageError(
            f"arms are {','.join(wanted)!r}, expected names; {file} has {', '.join(own)}"
        )
    for name in wanted:
        if name not in valid:
            raise UsageError(
                f"{file} has no arm {name!r}{nearest(name, valid)}; its arms: {', '.join(own)};"
                f" derived: {', '.join(control for control in CONTROLS if control not in own)}"
            )
        if wanted.count(name) > 1:
            raise UsageError(f"the arm {name} is named twice")

    def of_file(name: str) -> ConfigDict:
        config = configs.load(f"{file}:{name}")
        return configs.override(config, _concerning(config, overrides))

    def source() -> str:
        if derive_from is not None:
            check_choice("the arm to derive controls from", derive_from, [*own, *defined])
            return derive_from
        with_memory = (n for n in [*names, *own] if n in own and of_file(n).memory is not None)
        found = next(with_memory, None)
        if found is None:
            raise UsageError(f"{file} has no arm with a memory to derive controls from")
        return found

    def make(name: str, above: tuple[str, ...] = ()) -> ConfigDict:
        if name in above:
            raise UsageError(f"the arm {name} is derived from itself: name another --derive-from")
        if name in own:
            return of_file(name)
        if name in defined:
            base, assignments = defined[name]
            config = configs.override(make(base or own[0], (*above, name)), assignments)
            with config.unlocked():
                config.arm = name
            return config.lock()
        base = _with_classes(make(source(), (*above, name)))
        return derive(base, name)

    def sources(name: str) -> list[str]:
        """Returns the arms that an arm was made from, itself included, the first one first."""
        if name in own:
            return [name]
        return [*sources((defined[name][0] or own[0]) if name in defined else source()), name]

    arms = {}
    texts = dict(zip(defined, custom, strict=True))
    for name in wanted:
        try:
            made = make(name)
        except UsageError as error:
            raise UsageError(f"arm {name}: {error}") from None
        chain = sources(name)
        is_derived = any(n not in own and n not in defined for n in chain)
        options = {
            "overrides": list(overrides),
            "custom": {n: texts[n] for n in chain if n in defined},
            "derive_from": source() if is_derived else None,
        }
        arms[name] = Arm(made, options)
    # Also where only arms without a memory are added to a study.
    if not any(of_file(name).memory is not None for name in own):
        for assignment in overrides:
            if assignment.startswith("memory."):
                raise UsageError(f"{assignment!r} changes nothing: {file} has no arm with a memory")
    return arms


def _parse_custom(
    texts: Sequence[str], own: Sequence[str]
) -> dict[str, tuple[str | None, list[str]]]:
    """Returns {name: (the arm it starts from or None, assignments)}; see `run` for the texts."""
    defined: dict[str, tuple[str | None, list[str]]] = {}
    for text in texts:
        match = re.fullmatch(r"([\w+-][\w.+-]*)(?:=([\w.+-]+))?:\s*(\S.*)", text, re.DOTALL)
        if not match:
            raise UsageError(
                f"the arm {text!r} cannot be read, expected 'NAME:KEY=VALUE KEY=VALUE' or"
                " 'NAME=ARM:KEY=VALUE'"
            )
        name, base, rest = match.groups()
        if name in own or name in CONTROLS:
            raise UsageError(f"the arm {name} is there already: choose another name for {text!r}")
        valid = [*own, *CONTROLS, *defined]
        if base is not None and base not in valid:
            raise UsageError(f"{text!r} starts from no arm that is known{nearest(base, valid)}")
        # A tuple may have blanks of its own: an assignment starts where a key does.
        assignments = re.split(r"[;\s]+(?=[\w.]+=)", rest.strip().rstrip(";"))
        for assignment in assignments:
            if assignment.partition("=")[0] in ("seed", "arm", "name"):
                raise UsageError(f"{assignment!r} in {text!r}: a study sets this key by itself")
        defined[name] = (base, assignments)
    if len(defined) < len(texts):
        raise UsageError("two arms are defined by the same name")
    return defined


def _concerning(config: ConfigDict, assignments: Sequence[str]) -> list[str]:
    """Returns the assignments without those of the memory's options, where there is none."""
    if config.memory is not None:
        return list(assignments)
    return [a for a in assignments if not a.startswith("memory.")]


def _with_classes(config: ConfigDict) -> ConfigDict:
    """Returns the config with its dataset's number of classes, which the size depends on."""
    if config.model.num_classes is not None:
        return config
    return with_classes(config, open_dataset(config).classes)
