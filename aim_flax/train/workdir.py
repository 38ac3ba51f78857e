"""A run's directory: which run it belongs to, and what code wrote it."""

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from aim_flax import files
from aim_flax.config import LEFT_OUT, differing_keys, flatten, to_json
from aim_flax.devices import any_process
from aim_flax.errors import BusyError, UsageError
from aim_flax.files import read_json, write_json
from aim_flax.train.optimizer import OPEN_ENDED

LOCK = ".lock"
# Which weights the run started from.
PRETRAINED = "pretrained.json"
CHANGES = "config_changes.json"
# Keys that may change when a run continues, because its results so far don't depend on them: what
# an image that can't be read is to do matters from the first one on, and each that was left out is
# counted.
RECORDED = ("data.on_error",)
NOT_OF_THE_RUN = (
    "data.dir",
    "data.threads",
    "train.checkpoint_minutes",
    "train.detect_anomaly",
    *RECORDED,
)
EPOCHS = "train.epochs"
PROGRESS = "progress.json"
# What a run writes and reads again.
_FILES = ("config.json", "dataset.json", "metrics.csv", "summary.json", "diverged.json")
_FOLDERS = ("checkpoints", "tensorboard")


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config of a workdir's run.

    Raises:
      UsageError: there is none, or it is not what was written.
    """
    groups = ("data", "model", "optimizer", "schedule", "train", "eval")
    file, keys = workdir / "config.json", ("name", "arm", "seed", *groups)
    content = files.read_mapping(file, keys, "run's config")
    for group in groups:
        if not isinstance(content[group], dict):
            raise UsageError(f"{file} is no run's config: its {group} is no group of options")
    return ConfigDict(content)


def _save(workdir: Path, config: ConfigDict) -> None:
    files.write_json(workdir / "config.json", json.loads(to_json(config)), sealed=True)


def default_workdir(config: ConfigDict) -> Path:
    """Returns runs/<config>-<arm>-<seed>, with `dataset_label` before the arm.

    A run that an earlier version began there without the label, on the same folder, goes on.
    """
    before = Path("runs") / f"{config.name}-{config.arm}-{config.seed}"
    label, saved = dataset_label(config), before / "config.json"
    if not label or (saved.is_file() and dataset_label(read_config(saved.parent)) == label):
        return before
    return Path("runs") / f"{config.name}{label}-{config.arm}-{config.seed}"


def dataset_label(config: ConfigDict) -> str:
    """Returns "-<folder>-<checksum of where it is>", which tells folders of images apart in the
    names of workdirs; "" for a dataset that the config names by itself."""
    if config.data.name != "folder" or not config.data.dir:
        return ""
    folder = Path(config.data.dir).expanduser().resolve()
    name = re.sub(r"[^\w.-]+", "_", folder.name)[:32]
    return f"-{name}-{zlib.crc32(os.fsencode(folder)):08x}"[:-4]


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"aim_flax": _code_version(), **found}


def _code_version() -> str:
    """Returns the package's version, with the git commit if it runs from a checkout."""
    version = importlib.metadata.version("aim_flax")
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return version
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}+{commit}{'.changed' if changed else ''}"


def differences(there: ConfigDict, here: ConfigDict) -> str:
    """Returns the keys in which two configs differ and that a result depends on, or ""."""
    keys = _differing(there, here)
    old, new = (
        {key: repr(value) for key, value in flatten(config).items()} for config in (there, here)
    )
    return ", ".join(
        f"{key} ({old.get(key, 'missing')} there, {new.get(key, 'missing')} here)" for key in keys
    )


def _differing(there: ConfigDict, here: ConfigDict) -> list[str]:
    return [key for key in differing_keys(there, here) if key not in NOT_OF_THE_RUN]


def check_claim(workdir: Path, config: ConfigDict, more_epochs: bool = False) -> None:
    """Raises UsageError unless the workdir holds this run, or nothing, or a start that failed.

    Args:
      more_epochs: whether it may also hold this run with fewer epochs, see `raise_epochs`.
    """
    saved = workdir / "config.json"
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError:
        # Tensorstore takes no other names.
        raise UsageError(
            f"{workdir} has a name that is no UTF-8, and checkpoints can't be written there; choose"
            " another --workdir"
        ) from None
    if saved.is_file():
        for name in (*_FILES, *_FOLDERS):
            files.check_kind(workdir / name, folder=name in _FOLDERS)
        other = read_config(saved.parent)
        changes = differences(other, config) if has_begun(workdir) else ""
        if changes and more_epochs and _differing(other, config) == [EPOCHS]:
            _check_epochs(workdir, other, config)
        elif changes:
            raise UsageError(
                f"{workdir} holds a run of another config, which differs in {changes};"
                " choose another --workdir"
            )
        for folder in (workdir, *(workdir / name for name in _FOLDERS)):
            if folder.exists() and not os.access(folder, os.W_OK):
                raise UsageError(f"{folder} is not writable")
    elif workdir.exists():
        if not workdir.is_dir():
            raise UsageError(f"{workdir} is a file, expected a directory")
        if any(not file.name.startswith(".") for file in workdir.iterdir()):
            raise UsageError(f"{workdir} is not empty and holds no run; choose another --workdir")


def can_go_on(workdir: Path) -> bool:
    """Returns whether a run in the workdir has a checkpoint to go on from, or is finished."""
    return (workdir / "summary.json").is_file() or bool(_checkpoints(workdir))


def has_begun(workdir: Path) -> bool:
    """Returns whether a run has saved anything."""
    return can_go_on(workdir) or any(
        (workdir / name).exists() for name in ("metrics.csv", "diverged.json")
    )


def _checkpoints(workdir: Path) -> list[str]:
    """Returns the names of a run's checkpoints, without those that orbax has not finished."""
    names = [folder.name for folder in workdir.glob("checkpoints/*/")]
    return [name for name in names if "tmp" not in name]


@contextlib.contextmanager
def claimed(workdir: Path, config: ConfigDict, more_epochs: bool = False) -> Iterator[None]:
    """Makes the workdir this run's, and keeps other processes out of it.

    A config that differs in nothing but RECORDED takes the place of the one that is saved, and the
    changes are listed in CHANGES.

    Args:
      more_epochs: as for `check_claim`; the number of epochs stays as it is.

    Raises:
      UsageError: as `check_claim` and `held` do; nothing is changed.
    """
    check_claim(workdir, config, more_epochs)
    with held(workdir):
        # Again: another process may have come first.
        check_claim(workdir, config, more_epochs)
        if jax.process_index() == 0:
            with files.writing(workdir):
                _write_config(workdir, config)
        yield


def _write_config(workdir: Path, config: ConfigDict) -> None:
    saved = workdir / "config.json"
    # The config first: if this process is killed, the workdir is still this run's.
    if not saved.is_file():
        _save(workdir, config)
    elif (changes := differences(there := read_config(saved.parent), config)) and not has_begun(
        workdir
    ):
        print(
            f"{workdir}: a start with another config saved nothing, and this run takes its place"
            f" (there is another {changes})",
            flush=True,
        )
        _save(workdir, config)
    elif recorded := [key for key in RECORDED if key in differing_keys(there, config)]:
        old, new = flatten(there), flatten(config)
        steps = [int(name) for name in _checkpoints(workdir) if name.isdecimal()]
        list_ = read_json(workdir / CHANGES) if (workdir / CHANGES).is_file() else []
        if not isinstance(list_, list):
            raise UsageError(f"{workdir / CHANGES} is no list of changes")
        for key in recorded:
            change = {"key": key, "from": old.get(key, LEFT_OUT.get(key)), "to": new.get(key)}
            list_.append({"after_step": max(steps, default=0), **change})
        files.write_json(workdir / CHANGES, list_)
        with there.unlocked():
            there.update_from_flattened_dict({key: new.get(key) for key in recorded})
        _save(workdir, there)
    if not (workdir / "code_version.json").is_file():
        files.write_json(workdir / "code_version.json", versions())


def _check_epochs(workdir: Path, there: ConfigDict, here: ConfigDict) -> None:
    """Raises UsageError unless a run can go on to a higher number of epochs."""
    old, new, schedule = there.train.epochs, here.train.epochs, here.schedule.name
    if schedule not in OPEN_ENDED:
        raise UsageError(
            f"{workdir} holds a run of {old} epochs, and its {schedule} schedule was made for"
            f" them: for {new}, train a run of its own in another --workdir"
        )
    if new < old:
        raise UsageError(
            f"{workdir} holds a run of {old} epochs, which can be raised but not lowered to {new};"
            " choose another --workdir"
        )
    if (workdir.absolute().parent.parent / "study.json").is_file():
        raise UsageError(
            f"{workdir} is a run of a study, whose runs all have {old} epochs: for {new}, start the"
            " study in another --workdir"
        )


def is_finished(workdir: Path, config: ConfigDict) -> bool:
    """Returns whether the workdir holds this run, and it has all of its epochs."""
    if not (workdir / "summary.json").is_file():
        return False
    return EPOCHS not in differing_keys(read_config(workdir), config)


def raise_epochs(workdir: Path, config: ConfigDict) -> str | None:
    """Notes that a workdir's run goes on to the config's number of epochs, if that is higher.

    The summary of a finished run is kept as summary_N_epochs.json.

    Returns:
      A line that says so; None if there is nothing to raise.

    Raises:
      UsageError: it can't be raised.
    """
    there = read_config(workdir)
    old, new = there.train.epochs, config.train.epochs
    if old == new:
        return None
    _check_epochs(workdir, there, config)
    with files.writing(workdir):
        # The summary first: without one, a run with the number of before goes on as well.
        if (workdir / "summary.json").is_file():
            os.replace(workdir / "summary.json", workdir / f"summary_{old}_epochs.json")
        there.train.epochs = new
        _save(workdir, there)
    return f"{workdir}: {old} epochs become {new}"


def identity(workdir: Path) -> tuple[int, int] | None:
    """Returns what tells a workdir that is `held` from any in its place; None if it is gone.

    It is the lock file's: as long as a process has that open, nothing else can have the same.
    """
    try:
        (workdir / "config.json").stat()
        lock = (workdir / LOCK).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return lock.st_dev, lock.st_ino


@contextlib.contextmanager
def held(workdir: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of a workdir; all processes of a run must call this.

    The operating system releases it when this process ends, in any way.

    Args:
      workdir: created if it does not exist.
      wait: seconds to wait, at most, while another process holds it.

    Raises:
      BusyError: another process, or another run of this one, holds the workdir.
      UsageError: the workdir is not writable.
    """
    with contextlib.ExitStack() as stack:
        busy = False
        if jax.process_index() == 0:
            with files.writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(FileLock(workdir / LOCK, timeout=wait))
                    files.clear_up(workdir)
                except Timeout:
                    busy = True
        if any_process(busy)[0]:
            raise BusyError(f"another process is at work in {workdir}")
        yield


def mark_diverged(workdir: Path, step: int) -> None:
    """Notes in a run's workdir that its loss was not finite at `step`, for its row in tables."""
    with files.writing(workdir):
        write_json(workdir / "diverged.json", {"step": step})


def divergence(workdir: Path) -> int | None:
    file = workdir / "diverged.json"
    if not file.exists():
        return None
    return files.read_mapping(file, ("step",), "note of a divergence")["step"]
