"""Files: each is written whole or not at all."""

import contextlib
import csv
import errno
import functools
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim_flax.errors import StorageError, UsageError
from aim_flax.names import fonts

try:
    import fcntl
except ImportError:  # Not on Windows.
    fcntl = None

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


_DIGEST = "digest"
# What a disk refuses, in words, and what to do about it.
_REFUSALS = {
    errno.ENOSPC: ("disk full", "free space"),
    errno.EDQUOT: ("disk quota used up", "free space"),
    errno.EFBIG: ("file larger than this process may write", "raise the limit"),
    errno.EROFS: ("disk read-only", "make it writable"),
    errno.EACCES: ("no permission to write", "give it"),
    errno.EPERM: ("no permission to write", "give it"),
    errno.EIO: ("disk error", "mend the disk"),
    errno.ENOENT: ("folder gone", "put it back"),
    errno.ETIMEDOUT: ("disk too slow, or this process was stopped meanwhile", "see to that"),
}
# Of those, what another place would not be asked for.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a file to write, which becomes `path` at the end."""
    # Of this write alone: another process may be writing the same file. And made anew, so that no
    # link that someone put there leads the content elsewhere.
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        # mkstemp lets no one else read it; a file that is opened to be written follows the umask.
        os.fchmod(descriptor, 0o666 & ~_umask())
        # Open and locked as long as this process lives: see `clear_up`.
        _lock(descriptor)
        yield temporary
        os.replace(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Returns whether no other process has locked a file, and locks it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clear_up(folder: Path) -> None:
    """Removes what processes that were killed have left half written in a folder."""
    for path in folder.glob(".*.tmp"):
        # A younger one may not be locked yet.
        with contextlib.suppress(OSError):
            if re.fullmatch(r"\.\w{8}\.tmp", path.name) and time.time() - path.stat().st_mtime > 1:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _lock(descriptor):
                        path.unlink()
                finally:
                    os.close(descriptor)


@functools.cache
def _umask() -> int:
    """Returns the process's umask, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the errors of writing into a folder into one line.

    Raises:
      StorageError: the disk is full or broken.
      UsageError: nothing can be written there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what, advice = _REFUSALS[error.errno]
            raise StorageError(
                f"{what} while {folder} was written to; {advice} and start the same command again"
            ) from None
        raise UsageError(f"{folder} is not writable: {error.strerror or error}") from None


def refused(error: BaseException) -> tuple[str, str] | None:
    """Returns what a disk refused, in words, and what to do about it; None of any other error.

    Args:
      error: of Python; of tensorstore, which has the system's number in its text; or a StorageError
        that was made of one.
    """
    if isinstance(error, StorageError) and error.__cause__ is not None:
        error = error.__cause__
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, TimeoutError):
        number = errno.ETIMEDOUT  # Orbax's own has no number.
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        number = int(found[1])
    return _REFUSALS.get(number)


def check_kind(path: Path, folder: bool = False) -> None:
    """Raises UsageError if something else than a file (a folder) is where one belongs."""
    if not path.exists() or (path.is_dir() if folder else path.is_file()):
        return
    other = "a folder" if path.is_dir() else "a pipe or a device"
    there = "a file" if path.is_file() else other
    raise UsageError(f"{path} is {there}, expected a {'folder' if folder else 'file'}")


def check_outputs(asked: Sequence[tuple[str, Path]]) -> None:
    """Raises UsageError unless files can be written at the places that flags name, one at each.

    Args:
      asked: flags and places.
    """
    taken = set()
    for flag, path in asked:
        check_output(flag, path)
        if path.resolve() in taken:
            raise UsageError(f"{flag} is {path}, where another file is asked for: choose another")
        taken.add(path.resolve())


def check_output(flag: str, path: Path) -> None:
    """Raises UsageError unless a file can be written at a place that a flag names."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{flag} is {path}, but there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{flag} is {path}, a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} is {path}, a pipe or a device, expected a file to write")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{path.parent} is not writable: {error.strerror}"
        raise UsageError(f"{flag} is {path}, but {reason}") from None


def write_bytes(path: Path, content: bytes) -> None:
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    # Names of files and classes may have bytes that are no text.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any, sealed: bool = False) -> None:
    """Writes a JSON file; a dictionary can be `sealed`, so that `read_json` notices a change."""
    if sealed:
        content = {**content, _DIGEST: _digest(content)}
    write_text(path, json.dumps(content, indent=2) + "\n")


def _digest(content: dict[str, Any]) -> str:
    # As it comes back: with lists for tuples, and keys that are strings.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    how = dict(newline="", encoding="utf-8", errors="backslashreplace")
    # The writer quotes only the line break that it writes itself.
    torn = any("\r" in str(cell) for line in lines for cell in line)
    quoting = csv.QUOTE_ALL if torn else csv.QUOTE_MINIMAL
    with _replacing(path) as temporary, temporary.open("w", **how) as file:
        csv.writer(file, lineterminator="\n", quoting=quoting).writerows(lines)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG; its texts may have letters that Matplotlib's own font lacks."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontfamily(fonts())
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def save_image(image: "Image.Image", path: Path) -> None:
    """Writes an image of Pillow as PNG."""
    with _replacing(path) as temporary:
        image.save(temporary, "PNG")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file, without the digest of one that was sealed.

    Raises:
      UsageError: it is missing, no file, or damaged; or it was sealed and is not what was written.
    """
    try:
        # Reading a pipe waits for ever.
        if not path.is_dir():
            check_kind(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except UsageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} not found: {path.parent} is no run's workdir") from None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    # Earlier versions sealed nothing.
    written = content.pop(_DIGEST, None) if isinstance(content, dict) else None
    if written is not None and written != (found := _digest(content)):
        raise UsageError(
            f"{path} is not what was written: it is damaged, or was changed by hand; if the change"
            f" is yours, write {found!r} for its digest"
        )
    return content


def read_mapping(path: Path, expected: Collection[str], what: str) -> dict[str, Any]:
    """Returns the content of a JSON file as `read_json` does.

    Args:
      expected: keys that it must have.
      what: such a file is, for the message.

    Raises:
      UsageError: as `read_json` does, or it lacks some of the keys.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no {what}, but a {type(content).__name__}")
    if missing := [key for key in expected if key not in content]:
        raise UsageError(f"{path} is no {what}: it has no {', '.join(missing)}")
    return content
