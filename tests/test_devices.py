"""Data on devices: each has its part, and what is donated never was the host's."""

import gc
import weakref

import jax
import jax.extend.backend
import numpy as np
import pytest
from jax.experimental import multihost_utils

from aim_flax.devices import KINDS, Devices, any_process, computes_correctly, union_size
from tests.asserts import assert_equal, refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_each_device_has_its_part(kind, count):
    devices = Devices(kind, count)
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    parts = [shard.data for shard in devices.shard({"rows": rows})["rows"].addressable_shards]
    copies = [shard.data for shard in devices.replicate(rows).addressable_shards]
    assert len(parts) == len(copies) == count
    np.testing.assert_array_equal(np.concatenate(parts).reshape(rows.shape), rows)
    for copy in copies:
        np.testing.assert_array_equal(np.reshape(copy, rows.shape), rows)


def aligned(size):
    """Returns an array that JAX can take over on CPU without a copy."""
    memory = np.zeros(4 * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * size].view(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 8])
def test_donated_arrays_leave_the_host_arrays_alone(kind, count):
    devices = Devices(kind, count)
    host = aligned(8 * 1024)
    for put, sharded in ((devices.replicate, ()), (devices.shard, (0,))):
        add_one = devices.map(lambda x: x + 1, donate=(0,), sharded=sharded)
        before = put(host)
        after = add_one(before)
        assert before.is_deleted()
        np.testing.assert_array_equal(after.addressable_data(0).max(), 1)
        np.testing.assert_array_equal(jax.device_get(add_one(after)).max(), 2)
        np.testing.assert_array_equal(host, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_what_devices_hold_comes_back(kind, count):
    devices = Devices(kind, count)
    tree = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.float32(0.5)}
    there = devices.replicate(tree)
    assert_equal(devices.fetch(there), tree)
    twice = devices.on_first(lambda *trees: jax.tree.map(jax.numpy.add, *trees))
    assert_equal(jax.tree.map(np.asarray, twice(there, tree)), jax.tree.map(np.add, tree, tree))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_mapped_is_freed(kind):
    """jax.pmap itself keeps all that it mapped: a dataset of each evaluation, for example."""
    devices, backend = Devices(kind, 2), jax.extend.backend.get_backend()

    def mapped_once():
        kept = np.ones(1000)
        double = devices.map(lambda x: x * kept.sum())
        assert devices.fetch(double(devices.replicate(np.float32(2)))) == 2000
        return weakref.ref(kept)

    mapped_once()
    gc.collect()
    before = len(backend.live_executables())
    assert [mapped_once()() for _ in range(3)] == [None] * 3
    gc.collect()
    assert len(backend.live_executables()) == before


def test_so_many_devices_are_there(monkeypatch):
    with refused(r"^0 devices were asked for; there are 8 \(cpu\)$"):
        Devices("pmap", 0)
    assert [Devices("pmap", count).count for count in (None, 1, 8)] == [8, 1, 8]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with refused("^with several hosts all devices are used: leave --devices out$"):
        Devices("pmap", 4)
    assert [Devices("pmap", count).count for count in (None, 8)] == [8, 8]


@pytest.fixture
def beside(monkeypatch):
    """Returns a function that makes this process one of two, where the other sends an array."""

    def beside(theirs):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        gather = lambda mine: np.stack([mine, np.asarray(theirs, bool)])  # noqa: E731
        monkeypatch.setattr(multihost_utils, "process_allgather", gather)

    return beside


def test_processes_decide_alike(beside):
    assert any_process(False, True) == [False, True]
    beside([True, False, False])
    assert any_process(False, True, False) == [True, True, False]


def test_indices_of_all_processes_are_counted_once(beside):
    assert union_size({1, 3}, 6) == 2
    beside([False, False, False, True, False, True])
    assert union_size({1, 3}, 6) == 3
    assert union_size(set(), 6) == 2


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_wrong_sums_are_noticed(monkeypatch, factor):
    assert computes_correctly()
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda fn: lambda rows: factor * jit(fn)(rows))
    assert not computes_correctly()
