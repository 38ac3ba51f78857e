"""Arrays by name from files of weights: safetensors, Keras's HDF5, and what PyTorch writes."""

import hashlib
from os import PathLike

import numpy as np
from flax.traverse_util import flatten_dict

from aim_flax.errors import UsageError
from aim_flax.models.keras_files import check_file, read_keras_hdf5
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
    check_file(path)
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
