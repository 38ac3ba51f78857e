"""The image files that a user means by names, folders and patterns."""

import collections
import glob
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from aim_flax.data.folder import FORMATS, MORE_SUFFIXES, scan
from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.names import printable


def find(places: Iterable[str], formats: str = "usual") -> list[str]:
    """Returns the files that are meant, each once, in the order of the places.

    What folders hold besides is counted in a line on standard error for each place.

    Args:
      places: files of any suffix; folders, of which all images are meant, those in folders within
        them too, but no hidden ones; or patterns of files and folders, with *, ? and [...], ** for
        any number of folders.
      formats: which images of a folder are meant, of FORMATS, as for `read_folder`.

    Raises:
      UsageError: a place where there is nothing, or no image.
    """
    check_choice("data.formats", formats, FORMATS)
    suffixes = FORMATS[formats]
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
        others: collections.Counter[str] = collections.Counter()
        files = [file for match in matches for file in _images(match, suffixes, others)]
        beside = f"passed over {_counted(others)}" if others else ""
        if not files:
            raise UsageError(
                f"{place} has no images, expected {', '.join(suffixes)}"
                + (f"; {beside}" if beside else "")
            )
        if beside:
            print(printable(f"{place}: {beside}"), file=sys.stderr, flush=True)
        found += files
    return list(dict.fromkeys(found))


def _images(place: str, suffixes: Sequence[str], others: collections.Counter[str]) -> list[str]:
    """Returns a file, or the images of a folder; adds to the numbers of what else lies there."""
    if os.path.isfile(place):
        return [place]
    if not os.path.isdir(place):
        raise UsageError(f"{place} is no file and no folder")
    found: list[str] = []
    waiting: list[tuple[str, frozenset[str]]] = [(place, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        # Links to folders are followed, as in training; one back to where it lies in has no end.
        real = os.path.realpath(folder)
        if real in above:
            others["links in a circle"] += 1
            continue
        problems: list[str] = []
        inner = scan(Path(folder), problems, suffixes)
        if problems:
            raise UsageError(problems[0])
        found += [os.path.join(folder, name) for name in inner.images]
        others.update(inner.others.values())
        within = above | {real}
        waiting += [(os.path.join(folder, name), within) for name in reversed(inner.folders)]
    return found


def _counted(others: Mapping[str, int]) -> str:
    """Returns a text like "3 .gif, 1 .txt; patterns, such as '*.gif', take .gif"."""
    more = [kind for kind in sorted(others) if kind in MORE_SUFFIXES]
    hint = f"; patterns, such as '*{more[0]}', take {', '.join(more)}" if more else ""
    return ", ".join(f"{others[kind]:,} {kind}" for kind in sorted(others)) + hint
