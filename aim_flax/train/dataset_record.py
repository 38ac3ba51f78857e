"""A run's dataset.json: the classes that it knows, and which images it was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from aim_flax import files
from aim_flax.data.fingerprint import Change, Fingerprint, changes, taken_over
from aim_flax.data.load import open_dataset, with_classes
from aim_flax.errors import UsageError
from aim_flax.train.workdir import has_begun

DATASET = "dataset.json"
# Damaged files that were repaired: so few that the images are still the same.
_MOST_CHANGED = 0.01
_MOST_NAMED = 6


def exists(workdir: Path) -> bool:
    """Returns whether a run has its images recorded; a start that saved nothing is no run."""
    return (workdir / DATASET).is_file() and has_begun(workdir)


def read(workdir: Path) -> Fingerprint | None:
    """Returns the images of a workdir's run; None if it is from before this was recorded."""
    files.check_kind(workdir / DATASET)
    if not (workdir / DATASET).is_file():
        return None
    content = files.read_mapping(workdir / DATASET, (), "record of images")
    try:
        return Fingerprint.from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{workdir / DATASET} is damaged: {error!r}") from None


def classes_of(workdir: Path, config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the classes that a run knows.

    Raises:
      UsageError: it is from before they were recorded, and its dataset isn't there any more.
    """
    recorded = read(workdir)
    if recorded is not None:
        return recorded.classes
    try:
        classes = open_dataset(config).classes
        with_classes(config, classes)
    except UsageError as error:
        raise UsageError(
            f"{workdir} has no {DATASET}, which names the classes, and its dataset doesn't tell"
            f" them: {error}; the command that trained it writes it, with --config.data.dir=DIR if"
            " the images are elsewhere now"
        ) from None
    return classes


def check(
    workdir: Path,
    config: ConfigDict,
    found: Fingerprint,
    epoch_steps: int | None,
    other_images: bool = False,
) -> str | None:
    """Checks that a run, if there is one in the workdir, can be trained on with these images.

    Args:
      config: names the dataset.
      found: its images.
      epoch_steps: batches in an epoch with them; None: of no importance.
      other_images: whether images may be others than those that the run was trained on so far.

    Returns:
      A line that says which images changed; None if none did.

    Raises:
      UsageError: the classes are others; the images are others, and that was not asked for; with
        them an epoch would have another number of batches than the run counts in.
    """
    if not exists(workdir) or (there := read(workdir)) is None:
        return None
    check_classes(workdir, there.classes, config, found.classes, "; choose another --workdir")
    changed = changes(there, found)
    if not changed:
        return None
    if not other_images and not _is_repaired(changed):
        raise UsageError(
            f"{workdir} was trained on other images of these classes: {described(changed)};"
            " --other-images trains on with those that are there now, another --workdir anew"
        )
    before = files.read_json(workdir / DATASET).get("epoch_steps")
    if None not in (before, epoch_steps) and before != epoch_steps:
        raise UsageError(
            f"{workdir} has epochs of {before} batches, which would be {epoch_steps} with the"
            f" images that are there now ({described(changed)}); choose another --workdir"
        )
    return f"{workdir} was trained on other images of these classes: {described(changed)}"


def write(workdir: Path, found: Fingerprint, epoch_steps: int | None = None) -> None:
    """Records the images of a run that `check` has let through, and keeps what was recorded."""
    if jax.process_index() != 0:
        return
    content: dict[str, Any] = found.to_json() | {"epoch_steps": epoch_steps, "earlier": []}
    there = read(workdir) if exists(workdir) else None
    if there is not None:
        if not changes(there, found):
            return
        earlier = files.read_json(workdir / DATASET)
        content["earlier"] = [*earlier.pop("earlier", []), earlier]
    with files.writing(workdir):
        files.write_json(workdir / DATASET, content, sealed=True)


def check_classes(
    workdir: Path,
    there: Sequence[str],
    config: ConfigDict,
    here: Sequence[str],
    advice: str = "",
) -> None:
    """Raises UsageError unless a run's classes are those of the dataset that a config names."""
    if list(there) == list(here):
        return
    only_here = [name for name in here if name not in set(there)]
    only_there = [name for name in there if name not in set(here)]
    if only_here or only_there:
        difference = f"only here: {_listed(only_here)}; only there: {_listed(only_there)}"
    else:
        difference = "the same ones in another order"
    raise UsageError(
        f"{workdir} knows other classes than {config.data.dir or config.data.name} has: there"
        f" {len(there)} ({_listed(there)}), here {len(here)} ({_listed(here)}); {difference}"
        f"{advice}"
    )


def check_unseen(workdir: Path, there: Fingerprint, here: Fingerprint, split: str) -> None:
    """Raises UsageError if a split to evaluate on has images now that the run has seen as others.

    Args:
      there: the images of the run.
      here: those of the dataset as it is now.
    """
    if split == "train":
        return
    for of, seen in (("train", "was trained on"), ("val", "chose its best epoch by")):
        # Of a split itself none are new to it.
        if count := taken_over(there, here, split, of):
            raise UsageError(
                f"{count:,} of the {len(here.marks[split]):,} images of the {split} split are ones"
                f" that {workdir} {seen}: where a dataset has no such split of its own, other"
                " images, or other data.test_fraction and data.val_fraction, draw another one; put"
                f" what is to be evaluated into a folder of its own, DIR/{split}"
            )


def described(changed: Mapping[str, Change]) -> str:
    """Returns "train has 12 new of 60 and lacks 3; ..." for the splits that differ."""
    return "; ".join(
        f"{split} has {change.new:,} new of {change.images:,} and lacks {change.gone:,}"
        for split, change in changed.items()
    )


def _is_repaired(changed: Mapping[str, Change]) -> bool:
    """Returns whether a few files have another content, and none was added or taken away."""
    return all(
        change.new == change.gone <= max(1, _MOST_CHANGED * change.images)
        for change in changed.values()
    )


def _listed(names: Sequence[str]) -> str:
    """Returns some of the names on one line, whatever is in them."""
    printable = (name if name.isprintable() else ascii(name) for name in names[:_MOST_NAMED])
    shown = ", ".join(printable)
    more = len(names) - _MOST_NAMED
    return (shown or "none") + (f" and {more:,} more" if more > 0 else "")
