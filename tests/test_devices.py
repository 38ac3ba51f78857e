"""Data on devices: each has its part, and what is donated never was the host's."""

import jax
import numpy as np
import pytest

from aim_flax.devices import KINDS, Devices


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
