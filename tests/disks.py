"""Disks that refuse: small ones, and a limit that does the same where none can be mounted."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def no_space(most: int = 100) -> Iterator[None]:
    """Lets no file of this process grow beyond so many bytes.

    C++ as well as Python gets the system's error, as on a full disk, and has written a part.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    name = "jax_persistent_cache_min_compile_time_secs"
    cached = getattr(jax.config, name)
    # JAX would leave halves of compiled programs, and warn of them.
    jax.config.update(name, 1e9)
    # Python ignores the signal that comes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update(name, cached)


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """Mounts a disk of this size in a folder; yields whether that is allowed here."""
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
