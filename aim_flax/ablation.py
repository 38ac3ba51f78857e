"""A study: every arm with every seed, each run in a workdir of its own, and a report on them.

A study's directory holds DIR/<arm>/<seed>/ as `training.run` leaves them, `study.json` (what it
consists of), and the report: report.md, results.csv, curves.png and differences.png. While seeds
are trained together, their common checkpoints lie in DIR/.groups/<arm>/<first seed>/.
"""

import copy
import dataclasses
import json
import re
import runpy
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax import report, study_report, training
from aim_flax.console import Part, Reporter
from aim_flax.controls import CONTROLS, derive
from aim_flax.data.in_memory import InMemory
from aim_flax.data.load import open_dataset, with_classes
from aim_flax.errors import (
    BusyError,
    DivergenceError,
    InterruptionError,
    UsageError,
    check_choice,
    nearest,
)
from aim_flax.experiment import Experiment
from aim_flax.seeds import check_together, train_together, unfinished_group
from aim_flax.table import Row, arm_table, mark_diverged, read_run, without_result
from aim_flax.workdir import NOT_OF_THE_RUN, check_claim, differences, held, read_json

STUDY = "study.json"
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
    planned = _plan(config, arms, custom, overrides, derive_from)
    name = next(iter(planned.values())).config.name
    workdir = Path(workdir) if workdir is not None else Path("runs") / f"ablation-{name}"

    def study() -> dict[str, Any]:
        there = _read_study(workdir)
        return _merge(there, workdir, name, config, planned, chosen, reference)

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
        _write_study(workdir, study())
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
    study = _read_study(workdir)
    if study is None:
        raise UsageError(f"{workdir / STUDY} not found: {workdir} holds no study")
    if reference is not None:
        _check_reference(reference, study["arms"])
        study["reference"] = reference
        _write_study(workdir, study)
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
        study_report.write(workdir, rows, histories, reference, title, _command(study))
    if not quiet:
        print(arm_table(rows, reference if compared else None))
        if compared:
            print(f"\n{workdir / 'report.md'}")
        elif len(study["arms"]) > 1:
            print("\nno report: no arm is named control; --reference ARM says what to compare with")
    return rows


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


def _format_seeds(seeds: Sequence[int]) -> str:
    """Returns the text that `parse_seeds` makes these seeds of."""
    if list(seeds) == list(range(len(seeds))):
        return str(len(seeds))
    return _ranges(seeds) if len(seeds) > 1 else f"{seeds[0]}-{seeds[0]}"


def _ranges(seeds: Sequence[int]) -> str:
    """Returns "0-4,7" of seeds in ascending order."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


@dataclasses.dataclass(frozen=True)
class _Arm:
    """An arm of a study.

    Attributes:
      config: with its name as `arm`.
      options: what a command line needs to make it: `overrides`, `custom` ({name: text} of those
        given that it is, or is made from) and `derive_from` (None where it isn't derived).
    """

    config: ConfigDict
    options: dict[str, Any]


def _plan(
    file: str,
    names: Sequence[str],
    custom: Sequence[str],
    overrides: Sequence[str],
    derive_from: str | None,
) -> dict[str, _Arm]:
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
        arms[name] = _Arm(made, options)
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


def _read_study(workdir: Path) -> dict[str, Any] | None:
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


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{workdir} is not writable: {error.strerror}") from None


def _write_study(workdir: Path, study: dict[str, Any]) -> None:
    try:
        report.write_json(workdir / STUDY, study)
    except OSError as error:
        raise UsageError(f"{workdir} is not writable: {error.strerror}") from None


def _merge(
    study: dict[str, Any] | None,
    workdir: Path,
    name: str,
    file: str,
    planned: dict[str, _Arm],
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
        _check_reference(reference, arms)
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


def _check_reference(reference: str, arms: dict[str, Any]) -> None:
    check_choice("the reference arm", reference, arms)


def _command(study: dict[str, Any]) -> str:
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
        words += ["--seeds", _format_seeds(line["seeds"])]
        if study["reference"] not in (None, "control"):
            words += ["--reference", study["reference"]]
        commands.append(shlex.join([*words, *(f"--config.{a}" for a in overrides)]))
    return "\n".join(commands)


def _experiments(
    planned: dict[str, _Arm], seeds: Sequence[int], device_count: int | None
) -> dict[str, Experiment]:
    """Returns the arms' experiments; arms with the same images in memory share them.

    Raises:
      UsageError: an arm can't be run.
    """
    shared: dict[str, InMemory] = {}
    experiments = {}
    for arm, plan in planned.items():
        config = copy.deepcopy(plan.config)
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
    with training.signals() as received, reporter:
        for arm, planned in programs.items():
            experiment = experiments.pop(arm)
            for together in planned:
                count = len(together)
                seeds_of = f"seed {together[0]}" if count == 1 else f"seeds {_ranges(together)}"
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
        training.train(run, folder, quiet, part)
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
