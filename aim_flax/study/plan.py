"""A study as a value, and how it is planned from the flags of a command line."""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.data.load import open_dataset, with_classes
from aim_flax.errors import UsageError, nearest
from aim_flax.study.controls import CONTROLS, derive

MOST_SEEDS = 10_000
# Stands in for a command line, as a comment among them.
NOT_RECORDED = "# A step from Python, or from before command lines were recorded: see study.json"


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm of a study.

    Attributes:
      config: its config, in which `arm` is its name.
      seeds: the seeds of its runs, in ascending order.
      origin: how it was made, as in study.json: `overrides`, the "key=value" set for all arms, and
        `source`, the arm that it was made from (None: the config file).
    """

    config: ConfigDict
    seeds: list[int]
    origin: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms with their seeds, and the arm that the others are compared with.

    Attributes:
      name: the config's name.
      config: the config file.
      reference: the arm that the others are compared with; None if there is none yet.
      arms: by name, in the order in which they were added.
      commands: the command lines that started the study, each different one once.
    """

    name: str
    config: str
    reference: str | None
    arms: dict[str, Arm]
    commands: list[str]


# What an arm is made from: another arm (None: the config file), and the assignments to set (None:
# it is derived as a control).
_Source = tuple[str | None, Sequence[str] | None]


def plan(
    file: str,
    names: Sequence[str] = (),
    seeds: str | int = 10,
    custom: Sequence[str] = (),
    overrides: Sequence[str] = (),
    derive_from: str | None = None,
    reference: str | None = None,
    command: str = NOT_RECORDED,
) -> Study:
    """Returns the study that the flags of one command line ask for.

    Args:
      file: a config file.
      names: arms of the file, or controls to derive, see `controls.derive`.
      seeds: see `parse_seeds`.
      custom: further arms, "NAME:KEY=VALUE KEY=VALUE" from the file's default arm, or
        "NAME=ARM:..." from another one; blanks or semicolons separate the assignments.
      overrides: "key=value" for all arms; arms without a memory ignore the memory's keys.
      derive_from: the arm that controls are derived from; None: the first arm with a memory, of
        `names` or else of the file.
      reference: the arm that the others are compared with; None: `control`, if there is one.
      command: the command line, for the report.

    Raises:
      UsageError: the seeds can't be read, or an arm is unknown, named twice, or can't be made.
    """
    chosen = parse_seeds(seeds)
    if ":" in Path(file).name:
        raise UsageError(f"config is {file!r}, expected a file; its arms are named by --arms")
    own = {name: configs.load(f"{file}:{name}") for name in configs.arms(file)}
    default = next(iter(own))
    with_memory = (n for n in (*names, *own) if n in own and own[n].memory is not None)
    base = next(with_memory, default)
    # Raises for a wrong key of the memory, too, which arms without a memory would ignore.
    configs.override(own[base], overrides)
    not_of_memory = [text for text in overrides if not text.startswith("memory.")]
    table: dict[str, _Source] = dict.fromkeys(CONTROLS, (derive_from or base, None))
    for name, config in own.items():
        table[name] = (None, not_of_memory if config.memory is None else overrides)
    wanted = list(names)
    for text in custom:
        name, source, assignments = _parse_custom(text)
        if name in table:
            raise UsageError(f"the arm {name} is there already: choose another name for {text!r}")
        table[name] = (source or default, assignments)
        wanted.append(name)
    _check(file, wanted, own, table)
    arms = {}
    for name in wanted:
        try:
            config = _make(file, name, table)
        except UsageError as error:
            raise UsageError(f"arm {name}: {error}") from None
        origin = {"overrides": list(overrides), "source": table[name][0]}
        arms[name] = Arm(config, chosen, origin)
    return Study(config.name, file, reference, arms, [command])


def _parse_custom(text: str) -> tuple[str, str | None, list[str]]:
    """Returns the arm's name, the arm that it starts from (None: not given), and assignments."""
    match = re.fullmatch(r"([\w+-][\w.+-]*)(?:=([\w.+-]+))?:\s*(\S.*)", text, re.DOTALL)
    if not match:
        raise UsageError(
            f"the arm {text!r} cannot be read, expected 'NAME:KEY=VALUE KEY=VALUE' or"
            " 'NAME=ARM:KEY=VALUE'"
        )
    name, base, rest = match.groups()
    # A tuple may contain blanks, so only a blank before the next key ends an assignment.
    return name, base, re.split(r"[;\s]+(?=[\w.]+=)", rest.strip().rstrip(";"))


def _check(
    file: str, wanted: Sequence[str], own: Collection[str], table: Mapping[str, _Source]
) -> None:
    """Raises UsageError for a name or a key that a study can't have."""
    in_file = ", ".join(own)
    if not wanted or not all(wanted):
        raise UsageError(f"arms are {','.join(wanted)!r}, expected names; {file} has {in_file}")
    sources = [source for source, _ in table.values() if source is not None]
    for name in [*wanted, *sources]:
        if name not in table:
            raise UsageError(
                f"{file} has no arm {name!r}{nearest(name, table)}; its arms: {in_file};"
                f" derived: {', '.join(control for control in CONTROLS if control not in own)}"
            )
        if wanted.count(name) > 1:
            raise UsageError(f"the arm {name} is named twice")
    for _, assignments in table.values():
        for assignment in assignments or ():
            if assignment.partition("=")[0] in ("seed", "arm", "name"):
                raise UsageError(f"{assignment!r}: a study sets this key by itself")


def _make(file: str, name: str, table: Mapping[str, _Source]) -> ConfigDict:
    """Returns an arm's config, made step by step from one of the config file's own arms."""
    chain = [name]
    while (source := table[chain[0]][0]) is not None:
        if source in chain:
            raise UsageError(f"the arm {source} is derived from itself: name another --derive-from")
        chain.insert(0, source)
    config = configs.load(f"{file}:{chain[0]}")
    for arm in chain:
        _, assignments = table[arm]
        if assignments is not None:
            config = configs.override(config, assignments)
            with config.unlocked():
                config.arm = arm
        else:
            # A control's size depends on the number of classes.
            if config.model.num_classes is None:
                config = with_classes(config, open_dataset(config).classes)
            config = derive(config, arm)
    return config


def parse_seeds(text: str | int) -> list[int]:
    """Returns the seeds that a text means, in ascending order.

    Args:
      text: a number N (0 to N - 1), a range A-B (both included), or several of them with commas
        between ("3,5,10-19", where a number is a seed).

    Raises:
      UsageError: the text is something else, names a seed twice, or means more than MOST_SEEDS.
    """
    words = str(text).split(",")
    seeds: list[int] = []
    for word in words:
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if not match:
            raise UsageError(f"seeds are {text!r}, expected a number, a range like 5-9, or a,b,c")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(words) == 1 and match[2] is None:
            first, last = 0, first - 1
        if last < first:
            raise UsageError(f"seeds are {text!r}, which names no seed")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise UsageError(f"seeds are {text!r}, expected at most {MOST_SEEDS:,} of them")
        seeds += range(first, last + 1)
    twice = [str(seed) for seed, times in sorted(Counter(seeds).items()) if times > 1]
    if twice:
        raise UsageError(f"seeds are {text!r}, which names {', '.join(twice)} twice")
    return sorted(seeds)


def format_ranges(seeds: Sequence[int]) -> str:
    """Returns "0-4,7" for seeds in ascending order."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
