"""PyTorch's files, read without PyTorch: tensors come out, and nothing else is done."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from aim_flax.models.torch_files import OLD, TorchFileError, read_torch

ORDER = np.arange(24, dtype=np.float32)


class Global:
    """Stands for a name in a pickle, as `pickle` writes it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Stands for a call in a pickle."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args, self.state)


class Storage:
    def __init__(self, key="0", numbers=ORDER, kind="FloatStorage", view=None):
        self.key, self.numbers, self.kind, self.view = key, numbers, kind, view


class Pickler(pickle._Pickler):
    """Writes pickles that name what is not there, as only a stranger's file would."""

    def __init__(self, file, old):
        super().__init__(file, protocol=2)
        self.old, self.storages = old, {}

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            return self.write(f"c{obj.module}\n{obj.name}\n".encode())
        if isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
            return None
        return super().save(obj, save_persistent_id)

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        self.storages[obj.key] = obj.numbers
        kind = Global("torch", obj.kind)
        pid = ("storage", kind, obj.key, "cpu", len(obj.numbers))
        return (*pid, obj.view) if self.old else pid


def tensor(storage=None, offset=0, shape=(2, 3), strides=(3, 1)):
    make = Global("torch._utils", "_rebuild_tensor_v2")
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(make, storage or Storage(), offset, shape, strides, False, hooks)


def old_file(content, size=None) -> io.BytesIO:
    """Writes what PyTorch before 1.6 did."""
    file = io.BytesIO()
    file.write(OLD)
    for head in (1001, dict(protocol_version=1001, little_endian=True, type_sizes={})):
        pickle.dump(head, file, protocol=2)
    pickler = Pickler(file, old=True)
    pickler.dump(content)
    pickle.dump(list(pickler.storages), file, protocol=2)
    for numbers in pickler.storages.values():
        file.write(struct.pack("<q", len(numbers) if size is None else size))
        file.write(numbers.tobytes())
    file.seek(0)
    return file


def zip_file(content, compression=zipfile.ZIP_STORED, **more) -> io.BytesIO:
    """Writes what PyTorch does since 1.6."""
    file, pickled = io.BytesIO(), io.BytesIO()
    pickler = Pickler(pickled, old=False)
    pickler.dump(content)
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("net/data.pkl", pickled.getvalue())
        for key, numbers in pickler.storages.items():
            archive.writestr(f"net/data/{key}", numbers.tobytes())
        for name, data in more.items():
            archive.writestr(f"net/{name}", data)
    file.seek(0)
    return file


FORMATS = pytest.mark.parametrize("write", [old_file, zip_file])


@FORMATS
def test_tensors_are_views_of_their_storages(write):
    named = Call(
        Global("collections", "OrderedDict"),
        state={"_metadata": OrderedDict(version=1)},
    )
    found = read_torch(
        write({"whole": tensor(shape=(4, 6), strides=(6, 1)), "turned": tensor(strides=(1, 2))})
    )
    np.testing.assert_array_equal(found["whole"], ORDER.reshape(4, 6))
    np.testing.assert_array_equal(found["turned"], [[0, 2, 4], [1, 3, 5]])
    assert found["turned"].dtype == np.float32
    scalar = read_torch(write({"n": tensor(Storage("7", np.array([5]), "LongStorage"), 0, (), ())}))
    assert scalar["n"].shape == ()
    assert scalar["n"].dtype == np.int64
    assert scalar["n"] == 5
    halves = np.array([1, 2], np.float16)
    assert (
        read_torch(write({"h": tensor(Storage("1", halves, "HalfStorage"), 1, (1,), (1,))}))["h"]
        == 2
    )
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), tensor(), True, named)
    wrapped = read_torch(write({"state_dict": {"a": parameter}, "epoch": 3}))
    np.testing.assert_array_equal(wrapped["a"], ORDER[:6].reshape(2, 3))


def touching(path):
    """Returns a call that would leave a file behind."""
    return Call(Global("builtins", "open"), str(path), "w")


@FORMATS
def test_nothing_in_a_file_is_called(write, tmp_path):
    mark = tmp_path / "called"
    for call in (
        touching(mark),
        Call(Global("os", "system"), f"touch {mark}"),
        Call(Global("builtins", "eval"), f"open({str(mark)!r}, 'w')"),
        Call(Global("torch._utils", "_rebuild_tensor_v3"), f"touch {mark}"),
        Call(Global("collections", "namedtuple"), "a", "b"),
        Call(Global("torch", "FloatStorage.__init__")),
    ):
        with pytest.raises(TorchFileError, match="which makes no tensor"):
            read_torch(write({"a": tensor(), "b": call}))
        assert not mark.exists()


@FORMATS
@pytest.mark.parametrize(
    ("content", "instruction"), [({"a": 10**700}, "LONG4"), ({"a": {1}}, "__builtin__.set")]
)
def test_only_instructions_for_tensors_are_followed(write, content, instruction):
    with pytest.raises(TorchFileError, match=instruction):
        read_torch(write(content))


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02(ios\nsystem\n.",  # INST
        b"\x80\x02}\x93.",  # STACK_GLOBAL
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a place in the memory that would take 16 GiB
        b"\x80\x04\x8c\x02os.",
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02P1\n.",  # PERSID
        b"\x80\x02ccollections\nOrderedDict\n}(X\x01\x00\x00\x00aK\x01ub.",  # sets attributes of it
        b"\x80\x02ccollections\nOrderedDict\nN}X\x09\x00\x00\x00_functionK\x01s\x86b.",
        b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02.",
        b"\x80\x02}",
        b"garbage",
        b"",
    ],
)
def test_damaged_and_hostile_pickles_are_refused(code):
    heads = old_file({"a": tensor()}).getvalue()
    start = heads.index(b"\x80\x02}", heads.index(b"type_sizes"))
    with pytest.raises(TorchFileError):
        read_torch(io.BytesIO(heads[:start] + code))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("net/data.pkl", code)
    archive.seek(0)
    with pytest.raises(TorchFileError):
        read_torch(archive)
    # What was admitted is as before.
    assert read_torch(old_file(Call(Global("collections", "OrderedDict"), [("a", tensor())])))


@FORMATS
@pytest.mark.parametrize(
    "wrong",
    [
        tensor(shape=(5, 6), strides=(6, 1)),
        tensor(offset=20),
        tensor(offset=-1),
        tensor(strides=(-3, 1)),
        tensor(shape=(2, -3)),
        tensor(shape=(2.0, 3)),
        tensor(shape=(10**6, 10**6), strides=(0, 0)),  # 4 TB
        tensor(shape=(2, 3, 1)),
        tensor(Storage(kind="QUInt8Storage")),
        tensor(Storage(kind="LongStorage")),  # of twice the bytes that are there
        "no tensor",
        Call(Global("torch._utils", "_rebuild_parameter"), "no tensor", True, None),
        {"b": tensor()},
    ],
)
def test_what_is_no_tensor_of_its_storage_is_refused(write, wrong):
    with pytest.raises(TorchFileError) as refusal:
        read_torch(write({"a": wrong}))
    assert len(str(refusal.value)) < 200


def test_files_that_are_cut_off_or_lie_are_refused():
    whole = old_file({"a": tensor()}).getvalue()
    assert read_torch(io.BytesIO(whole))
    for length in range(0, len(whole), 7):
        with pytest.raises(TorchFileError):
            read_torch(io.BytesIO(whole[:length]))
    for file, message in (
        (old_file({"a": tensor()}, size=10**12), "has 1000000000000 numbers, expected 24"),
        (old_file({"a": tensor(Storage(view=("k", 0, 1)))}), "a storage of its own"),
        (zip_file({"a": tensor()}, zipfile.ZIP_DEFLATED), "is compressed"),
        (zip_file({"a": tensor()}, byteorder=b"big"), "big-endian"),
        (zip_file([tensor()]), "no dictionary of tensors"),
        (old_file({}), "no dictionary of tensors"),
        (old_file({1: tensor()}), "something in it is no tensor"),
    ):
        with pytest.raises(TorchFileError, match=message):
            read_torch(file)
    two = {"a": tensor(), "b": tensor(Storage(numbers=ORDER[:8]), shape=(2,), strides=(1,))}
    with pytest.raises(TorchFileError, match="describes the storage 0 twice"):
        read_torch(old_file(two))
