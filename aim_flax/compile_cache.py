"""JAX's persistent compilation cache: a program that was compiled once is loaded by later commands.

It lies in the user's cache folder and is JAX's own, with its own switches: where
JAX_COMPILATION_CACHE_DIR is set it is left as the user has it, and JAX_ENABLE_COMPILATION_CACHE=0
turns it off (docs.jax.dev/en/latest/persistent_compilation_cache.html). What is added here is that
it can't fill the disk, mix up machines, or take a damaged program for a good one.
"""

import contextlib
import functools
import hashlib
import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
from jax._src import compilation_cache
from jax.experimental import serialize_executable

_MOST_BYTES = 1 << 30
# Programs that take less are quicker compiled than looked up.
_LEAST_SECONDS = 0.1
# JAX writes a program, and then the time at which it was last used, under this lock.
_PROGRAM, _USED, _LOCK = "-cache", "-atime", ".lockfile"
# An entry of a process that is still writing is younger.
_LONGEST_WRITE = 60.0
_TROUBLE = re.compile(
    r"Error (?P<what>reading|writing) persistent compilation cache entry for '(?P<program>[^']*)'"
)
_FEATURES = re.compile(rb"[+-][\w.-]+(?:,[+-][\w.-]+)+")
# With AVX-512 XLA notes hints to its optimiser among the features of the CPU.
_HINT = b"prefer-no-"
_NOT_TO_NOTE = re.compile(rb"\+(avx512|prefer-no-)")


def default_folder() -> Path:
    """Returns the user's cache folder of this package (specifications.freedesktop.org/basedir)."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "aim_flax" / "compiled"


def enable() -> Path | None:
    """Makes this process load compiled programs from the user's cache folder, and save them there.

    Not if the user set a folder of JAX's own, or turned it off; nor where it would do harm:
      - the folder can't be written, or others than this user can write to it: what is in it is run;
      - the Python package zstandard is there. JAX would then write entries without a checksum (its
        other format, zlib, has one), and might run a damaged program;
      - XLA would print an error for each program that it loads, see `_without_hints`, and this
        version of JAX leaves no way to prevent it.

    Must be called once the processes of a run have found each other.

    Returns:
      The folder; None if nothing was changed.
    """
    given = jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache
    if given or find_spec("zstandard"):
        return None
    try:
        folder = default_folder()
        name = jax.default_backend()
        if name == "cpu":
            features = _cpu_features()
            if _HINT in features and not _write_without_hints():
                return None
            # JAX's keys don't tell CPUs apart, and machines of several kinds may share a home.
            name += f"-{hashlib.sha256(features).hexdigest()[:12]}"
        folder /= name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_own(folder)
        _tidy(folder)
    except (OSError, RuntimeError):  # RuntimeError: there is no home.
        return None
    _tell_trouble(folder)
    for option, value in {
        "jax_compilation_cache_max_size": _MOST_BYTES,
        "jax_persistent_cache_min_compile_time_secs": _LEAST_SECONDS,
        # XLA's own caches have neither a limit nor checksums.
        "jax_persistent_cache_enable_xla_caches": "none",
    }.items():
        if option.upper() not in os.environ:
            jax.config.update(option, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _cpu_features() -> bytes:
    """Returns what XLA compiles for on this CPU, as a compiled program says it."""
    number = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(lambda x: x + x).lower(number).compile()
    return b" ".join(_FEATURES.findall(serialize_executable.serialize(compiled)[0]))


def _without_hints(program: bytes) -> bytes:
    """Returns a program as XLA writes it, without a note of which it would complain.

    XLA notes for which features of the CPU a program was compiled. Where AVX-512 is among them it
    adds hints to its optimiser, now and when it loads the program, and finds them in no CPU: two
    lines of an error for each program, which it takes all the same (github.com/openxla/xla issue
    44565). The folder's name sees to it that a program is loaded on a CPU with the same features.
    """

    def noted(features: re.Match[bytes]) -> bytes:
        text = features[0]
        # As long as before: lengths are written around it.
        return _NOT_TO_NOTE.sub(rb"-\1", text) if _HINT in text else text

    return _FEATURES.sub(noted, program)


def _write_without_hints() -> bool:
    """Makes JAX save programs so; returns whether it can be made to."""
    compress = getattr(compilation_cache, "compress_executable", None)
    if compress is None:
        return False
    if not hasattr(compress, "__wrapped__"):

        @functools.wraps(compress)
        def compressed(program: bytes) -> bytes:
            return compress(_without_hints(program))

        compilation_cache.compress_executable = compressed
    return True


def _check_own(folder: Path) -> None:
    """Raises PermissionError unless only this user can write to a folder."""
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} is not this user's alone")


def _tidy(folder: Path) -> None:
    """Deletes what processes left that were killed while they wrote.

    JAX would stumble over an entry without its time at each write, and never replaces one.

    Raises:
      OSError: the folder can't be written.
    """

    def is_left(entry: Path) -> bool:
        used = entry.with_name(entry.name.removesuffix(_PROGRAM) + _USED)
        whole = used.is_file() and used.stat().st_size == 8
        return not whole and time.time() - entry.stat().st_mtime > _LONGEST_WRITE

    _delete(folder, f"*{_PROGRAM}", is_left)


def _delete(folder: Path, pattern: str, condition: Callable[[Path], bool]) -> None:
    """Deletes entries, under JAX's lock; not now if other processes hold that for long."""
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / _LOCK, timeout=1):
        for entry in filter(condition, list(folder.glob(pattern))):
            entry.unlink()


def _tell_trouble(folder: Path) -> None:
    """Makes a line of each of JAX's warnings about an entry, and deletes one that can't be read.

    JAX compiles the program anew, and would never replace the entry.
    """
    show: Callable[..., Any] = warnings.showwarning
    told = set()

    def shown(message: Any, *args: Any, **kwargs: Any) -> None:
        trouble = _TROUBLE.match(str(message))
        if trouble is None:
            show(message, *args, **kwargs)
            return
        if trouble["what"] == "reading":
            with contextlib.suppress(OSError):
                # Its name has more, which the warning doesn't tell: so all of this program's.
                _delete(folder, f"{trouble['program']}-*", lambda entry: True)
            line = f"a compiled program in {folder} is damaged: it is compiled anew"
        else:
            line = f"compiled programs can't be saved in {folder}, and are compiled each time"
        if line not in told:
            told.add(line)
            print(f"note: {line}", file=sys.stderr, flush=True)

    warnings.showwarning = shown
    warnings.filterwarnings("always", message=_TROUBLE.pattern)
