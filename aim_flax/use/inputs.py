"""The image files that a user means by names, folders and patterns."""

import collections
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from aim_flax.data.folder import FORMATS, MORE_SUFFIXES, Found, scan
from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.names import printable

# The real paths of folders.
_Real = frozenset[str]


def find(places: Iterable[str], formats: str = "usual") -> list[str]:
    """Returns the files that are meant, each once, in the order of the places.

    What folders hold besides is counted in a line on standard error for each place.

    Args:
      places: files of any suffix; folders, of which all images are meant, those in folders within
        them too, but no hidden ones; or patterns of files and folders, with *, ? and [...], ** for
        any number of folders. Links to folders are followed, but for those in a circle.
      formats: which images of a folder are meant, of FORMATS, as for `read_folder`.

    Raises:
      UsageError: a place where there is nothing, or no image.
    """
    check_choice("data.formats", formats, FORMATS)
    suffixes = FORMATS[formats]
    found: list[str] = []
    for place in places:
        others: dict[str, str] = {}
        if os.path.exists(place):
            matches = {place: frozenset()}
        elif glob.has_magic(place):
            matches = _matches(os.path.expanduser(place), suffixes, others)
            # Not what is neither: a pattern asks for no pipe.
            matches = {
                m: matches[m] for m in sorted(matches) if os.path.isfile(m) or os.path.isdir(m)
            }
            if not matches:
                raise UsageError(f"no file matches {place!r}")
        else:
            siblings = Path(place).absolute().parent
            names = os.listdir(siblings) if siblings.is_dir() else []
            close = nearest(os.path.basename(place), names)
            raise UsageError(f"{place} does not exist{close}")
        files = [
            file for m, above in matches.items() for file in _images(m, above, suffixes, others)
        ]
        kinds = collections.Counter(others[path] for path in others.keys() - files)
        beside = f"passed over {_counted(kinds)}" if kinds else ""
        if not files:
            raise UsageError(
                f"{place} has no images, expected {', '.join(suffixes)}"
                + (f"; {beside}" if beside else "")
            )
        if beside:
            print(printable(f"{place}: {beside}"), file=sys.stderr, flush=True)
        found += files
    return list(dict.fromkeys(found))


def _matches(pattern: str, suffixes: Sequence[str], others: dict[str, str]) -> dict[str, _Real]:
    """Returns what a pattern matches, each with the real paths of the folders that ** led through.

    `glob.glob` with ** walks each path through links in a circle, and there is no end to those of
    two links. Here they are added to {path: kind} of `others`.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        return dict.fromkeys(glob.glob(pattern), frozenset())
    depth = parts.index("**")
    roots = glob.glob(os.path.join(*parts[:depth])) if depth else [""]
    rest = os.path.join(*(parts[depth + 1 :] or "*"))
    found: dict[str, _Real] = {}
    for root in roots:
        if os.path.isdir(root or "."):
            for folder, _, within in _walk(root, frozenset(), suffixes, others):
                inner = _matches(os.path.join(glob.escape(folder), rest), suffixes, others)
                found |= {match: within | above for match, above in inner.items()}
    return found


def _images(place: str, above: _Real, suffixes: Sequence[str], others: dict[str, str]) -> list[str]:
    """Returns a file, or the images of a folder; adds what else lies there to `others`."""
    if os.path.isfile(place):
        return [place]
    if not os.path.isdir(place):
        raise UsageError(f"{place} is no file and no folder")
    found: list[str] = []
    for folder, inner, _ in _walk(place, above, suffixes, others):
        found += [os.path.join(folder, name) for name in inner.images]
        others.update({os.path.join(folder, name): kind for name, kind in inner.others.items()})
    return found


def _walk(
    place: str, above: _Real, suffixes: Sequence[str], others: dict[str, str]
) -> Iterator[tuple[str, Found, _Real]]:
    """Yields a folder and those in it at any depth: each with what is in it, and the real paths of
    itself and of those that it was reached by.

    Links to folders are followed, as in training; one back to where it lies in, or to one of those
    above, has no end, and is only added to `others`.
    """
    waiting = [(place, above)]
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(folder)
        if real in above:
            others[folder] = "links in a circle"
            continue
        problems: list[str] = []
        inner = scan(Path(folder), problems, suffixes)
        if problems:
            raise UsageError(problems[0])
        within = above | {real}
        yield folder, inner, within
        waiting += [(os.path.join(folder, name), within) for name in reversed(inner.folders)]


def _counted(kinds: Mapping[str, int]) -> str:
    """Returns a text like "3 .gif, 1 .txt; patterns, such as '*.gif', take .gif"."""
    more = [kind for kind in sorted(kinds) if kind in MORE_SUFFIXES]
    hint = f"; patterns, such as '*{more[0]}', take {', '.join(more)}" if more else ""
    return ", ".join(f"{kinds[kind]:,} {kind}" for kind in sorted(kinds)) + hint
