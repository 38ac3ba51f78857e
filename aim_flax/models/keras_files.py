"""Weights in Keras's HDF5 files, which need the extra `keras` (h5py).

An HDF5 file can lead to other files, by links, external storage and virtual datasets, and can
declare arrays of any size without holding them. Only what lies in the file itself is read.
"""

import os
from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np

from aim_flax.errors import UsageError

# Deflate makes nothing smaller than this (zlib.net, "Technical Details").
_MOST_COMPRESSED = 1032


def check_file(path: str | PathLike) -> None:
    """Raises UsageError for what is absent or no regular file: a pipe would be waited for."""
    if not os.path.exists(path):
        raise UsageError(f"there is no file {path}")
    if not os.path.isfile(path):
        raise UsageError(f"{path} is no file")


def read_keras_hdf5(path: str | PathLike) -> dict[str, dict[str, np.ndarray]]:
    """Reads the weights in a Keras HDF5 file, which needs the extra `keras` (h5py).

    Args:
      path: of a file that Keras 2 wrote by `save_weights("x.h5")`, or Keras 2 or 3 by
        `save("x.h5")` (a whole model). Not the `.weights.h5` of Keras 3.

    Returns:
      {layer name: {role: array}}, without the layers that have no weights.

    Raises:
      UsageError: when the file is absent, damaged or of another layout, or h5py is.
    """
    try:
        import h5py
    except ImportError:
        raise UsageError(
            "reading Keras weights needs h5py: install the extra `keras` (aim_flax[keras])"
        ) from None
    check_file(path)
    try:
        with h5py.File(path) as file:
            whole = file.id.links.exists(b"model_weights")
            group = _member(file, "model_weights") if whole else file
            layers = {
                name: dict(_arrays(_member(group, name))) for name in _names(group, "layer_names")
            }
    # What h5py raises depends on where the file is damaged.
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UsageError(
            f'{path} holds no weights that Keras 2 wrote by save_weights("x.h5") or save("x.h5"),'
            f" or is damaged: {message}"
        ) from None
    return {layer: arrays for layer, arrays in layers.items() if arrays}


def _arrays(layer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (role, array) for each weight of a layer's HDF5 group."""
    for name in _names(layer, "weight_names"):
        # Such as "conv1/kernel:0"; Keras 3 leaves out the ":0".
        array = _member(layer, name)
        _check_stored(array, name)
        yield name.split("/")[-1].partition(":")[0], array[()]


def _member(group: Any, path: str) -> Any:
    """Returns what lies at a path in the file; raises ValueError for a link, which may lead out."""
    from h5py import h5l

    for name in filter(None, path.split("/")):
        # Not by h5py's own get, which follows a link to see whether anything is there.
        if group.id.links.get_info(name.encode()).type != h5l.TYPE_HARD:
            raise ValueError(f"{path} is a link")
        group = group[name]
    return group


def _check_stored(array: Any, name: str) -> None:
    """Raises ValueError unless something is a dataset whose numbers are in the file."""
    import h5py

    if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is no array of numbers")
    if array.external or array.is_virtual:
        raise ValueError(f"the numbers of {name} are in another file")
    stored = array.id.get_storage_size()
    if array.nbytes > stored * (_MOST_COMPRESSED if array.compression else 1):
        raise ValueError(f"{name} says that it has shape {array.shape}, but holds {stored} bytes")


def _names(group: Any, attribute: str) -> list[str]:
    names = group.attrs[attribute]
    return [name.decode() if isinstance(name, bytes) else name for name in names]
