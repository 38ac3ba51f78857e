"""A run's directory: whose it is, and what code wrote it."""

import contextlib
import importlib.metadata
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from aim_flax import files
from aim_flax.config import differing_keys, flatten, to_json
from aim_flax.devices import any_process
from aim_flax.errors import BusyError, UsageError
from aim_flax.files import read_json, write_json

LOCK = ".lock"
# What a run may go on with changed, its results the same.
NOT_OF_THE_RUN = ("data.dir", "data.threads")


def default_workdir(config: ConfigDict) -> Path:
    return Path("runs") / f"{config.name}-{config.arm}-{config.seed}"


def versions() -> dict[str, str]:
    """Returns the versions of what a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"aim_flax": _code_version(), **found}


def _code_version() -> str:
    """Returns the package's version, and the git commit where it runs from a checkout."""
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
    """Returns in which keys two configs differ, of those that a result depends on, or ""."""
    keys = [key for key in differing_keys(there, here) if key not in NOT_OF_THE_RUN]
    old, new = (
        {key: repr(value) for key, value in flatten(config).items()} for config in (there, here)
    )
    return ", ".join(
        f"{key} ({old.get(key, 'missing')} there, {new.get(key, 'missing')} here)" for key in keys
    )


def check_claim(workdir: Path, config: ConfigDict) -> None:
    """Raises UsageError unless the workdir is this run's, or free to become it."""
    saved = workdir / "config.json"
    if saved.is_file():
        other = ConfigDict(read_json(saved))
        if changes := differences(other, config):
            raise UsageError(
                f"{workdir} holds a run of another config, which differs in {changes};"
                " choose another --workdir"
            )
        if not os.access(workdir, os.W_OK):
            raise UsageError(f"{workdir} is not writable")
    elif workdir.exists():
        if not workdir.is_dir():
            raise UsageError(f"{workdir} is a file, expected a directory")
        if any(not file.name.startswith(".") for file in workdir.iterdir()):
            raise UsageError(f"{workdir} is not empty and holds no run; choose another --workdir")


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the workdir this run's own, or raises UsageError and leaves it as it was."""
    check_claim(workdir, config)
    saved = workdir / "config.json"
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # In this order: a workdir with a config is a run's, whenever this process is killed.
        if not saved.is_file():
            files.write_text(saved, to_json(config))
        if not (workdir / "code_version.json").is_file():
            files.write_json(workdir / "code_version.json", versions())
    except OSError as error:
        raise UsageError(f"{workdir} is not writable: {error.strerror}") from None


@contextlib.contextmanager
def held(workdir: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of a workdir; all processes of a run must call this.

    The operating system lets go of it when this process ends, however it ends.

    Args:
      workdir: exists.
      wait: for so many seconds at most, while another process holds it.

    Raises:
      BusyError: another process, or another run of this one, holds the workdir.
      UsageError: the workdir is not writable.
    """
    with contextlib.ExitStack() as stack:
        busy = False
        if jax.process_index() == 0:
            try:
                stack.enter_context(FileLock(workdir / LOCK, timeout=wait))
            except Timeout:
                busy = True
            except OSError as error:
                raise UsageError(f"{workdir} is not writable: {error.strerror}") from None
        if any_process(busy)[0]:
            raise BusyError(f"another process is at work in {workdir}")
        yield


def mark_diverged(workdir: Path, step: int) -> None:
    """Notes beside a run that its loss was not finite at `step`, so that its row says so."""
    write_json(workdir / "diverged.json", {"step": step})


def divergence(workdir: Path) -> int | None:
    file = workdir / "diverged.json"
    return int(read_json(file)["step"]) if file.is_file() else None
