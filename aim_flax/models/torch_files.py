"""Tensors from files that PyTorch wrote, without PyTorch, and without running anything in them.

Such a file is a pickle, which can call any function that it names. Here it can name only what
makes a tensor, a pickle with any other instruction is refused before it is read, and what a tensor
says of its place in the file is checked.

Formats: that of before PyTorch 1.6 (four pickles in a row, a fifth with the storages' names, then
the storages), and the zip archive of later versions (github.com/pytorch/pytorch,
torch/serialization.py).
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

OLD, ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e", b"PK\x03\x04"
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# All that PyTorch writes for a dictionary of tensors.
_OPCODES = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_LIST"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM"),
    *("SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD"),
    "BINPERSID",
}
_FAILURES = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, ValueError),
    *(TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
)
# The unpickler makes a list of this length.
_MOST_MEMOS = 10**6


class TorchFileError(ValueError):
    """A file that is damaged, or holds something other than tensors by name."""


class _Storage(NamedTuple):
    """A named array of numbers, of which tensors are views."""

    key: str
    dtype: np.dtype
    size: int


class _View(NamedTuple):
    """A tensor: a part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Named(dict):
    """A dictionary that a pickle makes; what it sets as attributes is left out."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Admitted:
    """A function that a pickle may call, and nothing else: it has no attributes to set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TorchFileError("it sets attributes of a function")


def read_torch(file: BinaryIO) -> dict[str, np.ndarray]:
    """Returns the tensors in a file, by name.

    Args:
      file: open for reading, at its start: a dictionary of tensors (a `state_dict`), or a
        dictionary with one under "state_dict".

    Raises:
      TorchFileError: the file is damaged, or holds anything else.
    """
    start = file.read(len(OLD))
    file.seek(0)
    try:
        found, storages = (_read_zip if start.startswith(ZIP) else _read_old)(file)
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        if not isinstance(found, dict) or not found:
            raise TorchFileError("it holds no dictionary of tensors")
        for name, view in found.items():
            if not isinstance(name, str) or not isinstance(view, _View):
                which = f"{name[:80]!r} in it" if isinstance(name, str) else "something in it"
                raise TorchFileError(f"{which} is no tensor")
        return {name: _array(name, view, storages) for name, view in found.items()}
    except TorchFileError:
        raise
    # A pickle can fail in any of these ways.
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:120]
        raise TorchFileError(f"{type(error).__name__}: {reason}") from None


def _read_old(file: BinaryIO) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns what the file holds, with a `_View` for each tensor, and its storages."""
    _, protocol, system = (_unpickle(file) for _ in range(3))
    if protocol != 1001 or system.get("little_endian") is not True:
        raise TorchFileError("it is of another protocol, or big-endian")
    named: dict[str, _Storage] = {}
    found = _unpickle(file, named)
    storages = {}
    for key in _unpickle(file):
        storage = named[key]
        (size,) = struct.unpack("<q", file.read(8))
        if size != storage.size:
            raise TorchFileError(f"the storage {key} has {size} numbers, expected {storage.size}")
        storages[key] = _numbers(file.read(size * storage.dtype.itemsize), storage)
    return found, storages


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns what `_read_old` does."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise TorchFileError("it is no archive that PyTorch wrote")
        folder = names[0].removesuffix("data.pkl")

        def read(name: str) -> bytes:
            entry = archive.getinfo(folder + name)
            # PyTorch compresses nothing; unpacked, a small file could fill the memory.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise TorchFileError(f"{name} is compressed")
            return archive.read(entry)

        order = f"{folder}byteorder"
        if order in archive.namelist() and read("byteorder") != b"little":
            raise TorchFileError("it is big-endian")
        named: dict[str, _Storage] = {}
        found = _unpickle(io.BytesIO(read("data.pkl")), named)
        # Entries may lie over each other, so that together they are larger than the file.
        if sum(s.size * s.dtype.itemsize for s in named.values()) > file.seek(0, io.SEEK_END):
            raise TorchFileError("its storages are larger than the file")
        storages = {key: _numbers(read(f"data/{key}"), storage) for key, storage in named.items()}
    return found, storages


def _unpickle(file: BinaryIO, named: dict[str, _Storage] | None = None) -> Any:
    """Returns the object of one pickle, behind which the file then stands.

    Args:
      named: is given the storages that the pickle names.

    Raises:
      TorchFileError: the pickle does anything but make tensors by name.
    """
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name not in _OPCODES:
            raise TorchFileError(f"its pickle has the instruction {opcode.name}")
        if opcode.name == "LONG_BINPUT" and argument > _MOST_MEMOS:
            raise TorchFileError("its pickle remembers too much")
        if opcode.name == "GLOBAL":
            _admitted(*argument.split(" ", 1))
    stop = file.tell()
    file.seek(start)
    found = _Unpickler(file, {} if named is None else named).load()
    file.seek(stop)
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, named: dict[str, _Storage]):
        super().__init__(file, encoding="ascii")
        self._named = named

    def find_class(self, module: str, name: str) -> Any:
        return _admitted(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, of, key, _, size, *view = pid
        if kind != "storage" or any(part is not None for part in view):
            raise TorchFileError("it refers to something other than a storage of its own")
        if not isinstance(of, str) or of not in _STORAGES or not isinstance(key, str):
            raise TorchFileError("it has a storage without a type or a name")
        storage = _Storage(key, np.dtype(_STORAGES[of]), _whole(size))
        if self._named.setdefault(key, storage) != storage:
            raise TorchFileError(f"it describes the storage {key} twice")
        return storage


def _admitted(module: str, name: str) -> Any:
    """Returns what stands for a name in a pickle, or raises TorchFileError."""
    if module == "torch" and name in _STORAGES:
        return name
    if (module, name) not in _FUNCTIONS:
        raise TorchFileError(f"it names {module}.{name}, which makes no tensor")
    return _FUNCTIONS[module, name]


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise TorchFileError("it has a tensor without a storage, or not a stride for each axis")
    return _View(storage, _whole(offset), tuple(map(_whole, shape)), tuple(map(_whole, strides)))


def _parameter(view: _View, *_: Any) -> _View:
    if not isinstance(view, _View):
        raise TorchFileError("it has a parameter that is no tensor")
    return view


_FUNCTIONS = {
    ("collections", "OrderedDict"): _Admitted(lambda *pairs: _Named(*pairs)),
    ("torch._utils", "_rebuild_tensor_v2"): _Admitted(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Admitted(_parameter),
}


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise TorchFileError("it has something other than a number where a size is expected")
    return number


def _numbers(data: bytes, storage: _Storage) -> np.ndarray:
    if len(data) != storage.size * storage.dtype.itemsize:
        raise TorchFileError(f"the storage {storage.key} is cut off")
    return np.frombuffer(data, storage.dtype)


def _array(name: str, view: _View, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    numbers, size = storages[view.storage.key], math.prod(view.shape)
    reach = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    # A tensor that repeats its numbers could be of any size.
    if size > len(numbers) or (size and view.offset + reach >= len(numbers)):
        raise TorchFileError(f"the tensor {name!r} is larger than its storage")
    itemsize = numbers.dtype.itemsize
    strides = [stride * itemsize for stride in view.strides]
    parts = numbers[view.offset :] if size else numbers[:0]
    seen = np.lib.stride_tricks.as_strided(parts, view.shape, strides, writeable=False)
    return np.ascontiguousarray(seen).reshape(view.shape)
