"""Arrays by name from files of weights: safetensors, Keras's HDF5, and what PyTorch writes."""

import hashlib
import os
from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from aim_flax.errors import UsageError
from aim_flax.models.torch_files import OLD, ZIP, TorchFileError, read_torch

_HDF5 = b"\x89HDF\r\n\x1a\n"


def read_arrays(path: str | PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays in a file of weights, by name; what it is, its first bytes tell.

    Args:
      path: a safetensors file; an HDF5 file of Keras, as for `read_keras_hdf5`, whose names are
        "layer/role"; or a file that PyTorch wrote, of which nothing is executed.

    Raises:
      UsageError: the file is absent, damaged or something else, or what reads it is not installed.
    """
    _check_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(OLD))
            if start.startswith((OLD, ZIP)):
                file.seek(0)
                return read_torch(file)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
    except TorchFileError as error:
        raise UsageError(f"{path} is no PyTorch file of tensors, or is damaged: {error}") from None
    if start.startswith(_HDF5):
        return flatten_dict(read_keras_hdf5(path), sep="/")
    return _read_safetensors(path)


def _check_file(path: str | PathLike) -> None:
    """Raises UsageError for what is absent or no regular file: a pipe would be waited for."""
    if not os.path.exists(path):
        raise UsageError(f"there is no file {path}")
    if not os.path.isfile(path):
        raise UsageError(f"{path} is no file")


def sha256(path: str | PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: str | PathLike) -> dict[str, np.ndarray]:
    # Imported here: the command line starts sooner without.
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    # KeyError: a dtype that numpy lacks.
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is none of safetensors, Keras HDF5 and PyTorch, or is damaged:"
            f" {' '.join(str(error).split())[:120]}"
        ) from None


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
    _check_file(path)
    try:
        with h5py.File(path) as file:
            group = file.get("model_weights", file)
            layers = {name: dict(_arrays(group[name])) for name in _names(group, "layer_names")}
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
        yield name.split("/")[-1].partition(":")[0], layer[name][()]


def _names(group: Any, attribute: str) -> list[str]:
    names = group.attrs[attribute]
    return [name.decode() if isinstance(name, bytes) else name for name in names]
