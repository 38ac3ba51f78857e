"""Maps per-device functions over the devices of a run: the only place that knows how.

`pmap` and `shard_map` give equal results. State is replicated; a mapped function takes its
device's part of a batch by its index along the axis, so all its arguments and results are
replicated too.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aim_flax.errors import UsageError, check_choice

AXIS = "batch"
KINDS = ("pmap", "shard_map")


class Devices:
    """The devices of a run.

    Attributes:
      kind: "pmap" or "shard_map".
      count: number of devices, over all hosts.
    """

    def __init__(self, kind: str, count: int | None = None):
        """Takes `count` devices, or all there are.

        Raises:
          UsageError: an unknown kind, or more devices than there are.
        """
        check_choice("parallel", kind, KINDS)
        available = jax.devices()
        if count is not None and not 1 <= count <= len(available):
            raise UsageError(
                f"{count} devices were asked for; there are {len(available)}"
                f" ({available[0].platform})"
            )
        if count not in (None, len(available)) and jax.process_count() > 1:
            raise UsageError("with several hosts all devices are used: leave --devices out")
        self.kind = kind
        self._devices = available[:count]
        self.count = len(self._devices)
        self._mesh = Mesh(np.array(self._devices), (AXIS,))

    def map(self, fn: Callable, donate: Sequence[int] = ()) -> Callable:
        """Returns `fn` compiled for all devices, with collectives over `AXIS`.

        Args:
          fn: called once per device, with replicated arguments; must return the same on each.
          donate: positions of arguments whose memory the results may take over.
        """
        if self.kind == "pmap":
            return jax.pmap(fn, AXIS, devices=self._devices, donate_argnums=tuple(donate))
        # Results are equal on all devices by contract, as with pmap, so that isn't checked here:
        # with the check, gradients of replicated parameters would be summed a second time.
        replicated = PartitionSpec()
        mapped = jax.shard_map(
            fn, mesh=self._mesh, in_specs=replicated, out_specs=replicated, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=tuple(donate))

    def replicate(self, tree: Any) -> Any:
        """Returns a copy of a tree of host arrays on every device, in the form `map` takes."""
        stacked = self.kind == "pmap"
        spec = PartitionSpec(AXIS) if stacked else PartitionSpec()
        sharding = NamedSharding(self._mesh, spec)

        def put(x):
            x = np.asarray(x)
            shape = (self.count, *x.shape) if stacked else x.shape
            part = x[None] if stacked else x
            return jax.make_array_from_callback(shape, sharding, lambda _: part)

        return jax.tree.map(put, tree)

    def fetch(self, tree: Any) -> Any:
        """Returns the one value that all devices hold, as numpy arrays of their own."""
        # Copies, because on CPU a view would change once the array is donated.
        take = partial(np.array, copy=True)

        def get(x):
            part = take(x.addressable_data(0))
            return part[0] if self.kind == "pmap" else part

        return jax.tree.map(get, tree)

    def local(self, tree: Any) -> Any:
        """Returns the value as it lies on this host's first device, for a function of one."""

        def get(x):
            part = x.addressable_data(0)
            return part[0] if self.kind == "pmap" else part

        return jax.tree.map(get, tree)


def any_process(*flags: bool) -> list[bool]:
    """Returns, for each flag, whether it is set in any of the processes; all must call this.

    What processes decide by their own clocks and signals they must decide alike, for saving and
    stopping take all of them.
    """
    if jax.process_count() == 1:
        return list(flags)
    everywhere = multihost_utils.process_allgather(np.array(flags))
    return [bool(flag) for flag in everywhere.any(axis=0)]
