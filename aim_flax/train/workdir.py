"""A run's directory: which run it belongs to, and what code wrote it."""

import contextlib
import importlib.metadata
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
from aim_flax.config import differing_keys, flatten, to_json
from aim_flax.devices import any_process
from aim_flax.errors import BusyError, UsageError
from aim_flax.files import read_json, write_json

LOCK = ".lock"
# Keys that may change when a run continues, because its results don't depend on them.
NOT_OF_THE_RUN = ("data.dir", "data.threads")


def default_workdir(config: ConfigDict) -> Path:
    """Returns runs/<config>-<arm>-<seed>, with `dataset_label` before the arm.

    A run that an earlier version began there without the label, on the same folder, goes on.
    """
    before = Path("runs") / f"{config.name}-{config.arm}-{config.seed}"
    label, saved = dataset_label(config), before / "config.json"
    if not label or (saved.is_file() and dataset_label(ConfigDict(read_json(saved))) == label):
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
    keys = [key for key in differing_keys(there, here) if key not in NOT_OF_THE_RUN]
    old, new = (
        {key: repr(value) for key, value in flatten(config).items()} for config in (there, here)
    )
    return ", ".join(
        f"{key} ({old.get(key, 'missing')} there, {new.get(key, 'missing')} here)" for key in keys
    )


def check_claim(workdir: Path, config: ConfigDict) -> None:
    """Raises UsageError unless the workdir holds this run, or nothing."""
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
    """Makes the workdir this run's, or raises UsageError and changes nothing."""
    check_claim(workdir, config)
    saved = workdir / "config.json"
    if jax.process_index() != 0:
        return
    with files.writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        # The config first: if this process is killed, the workdir is still this run's.
        if not saved.is_file():
            files.write_text(saved, to_json(config))
        if not (workdir / "code_version.json").is_file():
            files.write_json(workdir / "code_version.json", versions())


@contextlib.contextmanager
def held(workdir: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of a workdir; all processes of a run must call this.

    The operating system releases it when this process ends, in any way.

    Args:
      workdir: exists.
      wait: seconds to wait, at most, while another process holds it.

    Raises:
      BusyError: another process, or another run of this one, holds the workdir.
      UsageError: the workdir is not writable.
    """
    with contextlib.ExitStack() as stack:
        busy = False
        if jax.process_index() == 0:
            with files.writing(workdir):
                try:
                    stack.enter_context(FileLock(workdir / LOCK, timeout=wait))
                except Timeout:
                    busy = True
        if any_process(busy)[0]:
            raise BusyError(f"another process is at work in {workdir}")
        yield


def mark_diverged(workdir: Path, step: int) -> None:
    """Notes in a run's workdir that its loss was not finite at `step`, for its row in tables."""
    write_json(workdir / "diverged.json", {"step": step})


def divergence(workdir: Path) -> int | None:
    file = workdir / "diverged.json"
    return int(read_json(file)["step"]) if file.is_file() else None
