"""Digests of what a checkpoint holds, so that a bit that changes on disk is noticed.

Orbax and tensorstore check the index of what they write, not the numbers: of 600 one-bit flips in
a checkpoint's files 115 came back as other parameters.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_FILE = "digests.json"


def digests(items: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Returns the SHA-256 digests of a checkpoint's items.

    Args:
      items: {name: numpy arrays in any containers, or what JSON can hold}.

    Returns:
      {name: {path: dtype, shape and digest of the bytes}}; what is JSON has the path "".
    """
    return {name: _of_item(content) for name, content in items.items()}


def changed(items: Mapping[str, Any], written: Any) -> str | None:
    """Returns a part of the items that is not what was written, or None.

    Args:
      items: as for `digests`.
      written: what that returned when the checkpoint was saved, or anything else, if damaged.
    """
    found = digests(items)
    if not isinstance(written, dict) or written.keys() != found.keys():
        return "the list of its digests"
    for name, of_item in found.items():
        there = written[name]
        if not isinstance(there, dict) or there.keys() != of_item.keys():
            return f"the list of digests of its {name}"
        for path, digest in of_item.items():
            if there[path] != digest:
                return f"its {name}{path}"
    return None


def _of_item(content: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(content)
    if any(isinstance(leaf, np.ndarray | np.generic) for _, leaf in leaves):
        return {jax.tree_util.keystr(path): _of_array(leaf) for path, leaf in leaves}
    # As it comes back: with keys that are strings, which sort otherwise than numbers.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return {"": hashlib.sha256(text.encode()).hexdigest()}


def _of_array(leaf: Any) -> str:
    array = np.asarray(leaf)
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(content.data).hexdigest()}"


class DigestHandler(ocp.AsyncCheckpointHandler):
    """Writes the digests of a checkpoint's other items, beside them and in the background."""

    async def async_save(self, directory: Path, args: "DigestSave") -> list[Any]:
        write = self._write(directory, args.items)
        return [ocp.future.CommitFutureAwaitingContractedSignals(write, name="digests")]

    async def _write(self, directory: Path, items: Mapping[str, Any]) -> None:
        if jax.process_index() == 0:
            (directory / _FILE).write_text(json.dumps(digests(items)))

    def save(self, directory: Path, args: "DigestSave") -> None:
        raise NotImplementedError("checkpoints are written in the background")

    def restore(self, directory: Path, args: "DigestRestore") -> Any:
        return json.loads((directory / _FILE).read_text())


@ocp.args.register_with_handler(DigestHandler, for_save=True)
@dataclasses.dataclass
class DigestSave(ocp.args.CheckpointArgs):
    """What `DigestHandler` saves: the digests of these items."""

    items: Mapping[str, Any]


@ocp.args.register_with_handler(DigestHandler, for_restore=True)
@dataclasses.dataclass
class DigestRestore(ocp.args.CheckpointArgs):
    """Asks `DigestHandler` for them."""
