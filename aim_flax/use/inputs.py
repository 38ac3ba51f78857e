"""The image files that a user means by names, folders and patterns."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from aim_flax.data.folder import SUFFIXES
from aim_flax.errors import UsageError, nearest


def find(places: Iterable[str]) -> list[str]:
    """Returns the files that are meant, each once, in the order of the places.

    Args:
      places: files of any suffix; folders, of which all images are meant, those in folders within
        them too, but no hidden ones; or patterns of files and folders, with *, ? and [...], ** for
        any number of folders.

    Raises:
      UsageError: a place where there is nothing, or no image.
    """
    found: list[str] = []
    for place in places:
        if os.path.exists(place):
            matches = [place]
        elif glob.has_magic(place):
            matches = sorted(glob.glob(os.path.expanduser(place), recursive=True))
            # Not what is neither: a pattern asks for no pipe.
            matches = [m for m in matches if os.path.isfile(m) or os.path.isdir(m)]
            if not matches:
                raise UsageError(f"no file matches {place!r}")
        else:
            siblings = Path(place).absolute().parent
            names = os.listdir(siblings) if siblings.is_dir() else []
            close = nearest(os.path.basename(place), names)
            raise UsageError(f"{place} does not exist{close}")
        files = [file for match in matches for file in _images(match)]
        if not files:
            raise UsageError(f"{place} has no images, expected {', '.join(SUFFIXES)}")
        found += files
    return list(dict.fromkeys(found))


def _images(place: str) -> list[str]:
    if os.path.isfile(place):
        return [place]
    if not os.path.isdir(place):
        raise UsageError(f"{place} is no file and no folder")

    def fail(error: OSError) -> None:
        raise UsageError(f"{error.filename} can't be read: {error.strerror}")

    found = []
    for folder, folders, files in os.walk(place, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in sorted(files) if name.lower().endswith(SUFFIXES))
        paths = (os.path.join(folder, name) for name in images if not name.startswith("."))
        # Not what is no file in spite of its name: reading a pipe would wait without end.
        found += [path for path in paths if os.path.isfile(path)]
    return found
