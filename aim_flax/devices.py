"""Maps per-device functions over the devices of a run; no other module does.

`pmap` and `shard_map` give equal results. State and results are replicated. Where all devices hold
the same data, a mapped function takes its device's part by its index along the axis.
"""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aim_flax.errors import UsageError, check_choice
from aim_flax.pmapped import Pmapped

AXIS = "batch"
KINDS = ("pmap", "shard_map")


class Devices:
    """The devices of a run.

    Attributes:
      kind: "pmap" or "shard_map".
      count: number of devices, over all hosts.
      model: what they are, as JAX calls it.
      platform: "cpu", "gpu" or "tpu".
    """

    def __init__(
        self,
        kind: str,
        count: int | None = None,
        available: Sequence[jax.Device] | None = None,
    ):
        """Takes `count` devices, or all there are.

        Args:
          available: those there are; None: all of this run's processes.

        Raises:
          UsageError: an unknown kind, or more devices than there are.
        """
        check_choice("parallel", kind, KINDS)
        available = jax.devices() if available is None else list(available)
        if count is not None and not 1 <= count <= len(available):
            raise UsageError(
                f"{count} devices were asked for; there are {len(available)}"
                f" ({available[0].platform})"
            )
        if count not in (None, len(available)) and jax.process_count() > 1:
            raise UsageError("with several hosts all devices are used: leave --devices out")
        self.kind = kind
        self._devices = available[:count]
        self.count, self.model = len(self._devices), self._devices[0].device_kind
        self.platform = self._devices[0].platform
        self._mesh = Mesh(np.array(self._devices), (AXIS,))
        self._sharded = NamedSharding(self._mesh, PartitionSpec(AXIS))
        self._replicated = NamedSharding(self._mesh, PartitionSpec())

    @property
    def memory_bytes(self) -> int | None:
        """The memory of one device; None if that isn't known.

        CPU devices share the machine's.
        """
        if self.platform == "cpu":
            if "SC_PHYS_PAGES" not in os.sysconf_names:
                return None
            here = sum(d.process_index == jax.process_index() for d in self._devices)
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here
        return self.memory()

    def map(
        self, fn: Callable, donate: Sequence[int] = (), sharded: Sequence[int] = ()
    ) -> Callable:
        """Returns `fn` compiled for all devices, with collectives over `AXIS`.

        Args:
          fn: called once per device; must return the same on each.
          donate: positions of arguments whose memory the results may reuse.
          sharded: positions of arguments that `shard` made; the others are replicated.
        """
        if self.kind == "pmap":
            return Pmapped(fn, AXIS, self._devices, donate_argnums=tuple(donate))
        # Results are equal on all devices by contract, as with pmap, so that isn't checked here:
        # with the check, gradients of replicated parameters would be summed a second time.
        positions = range(len(inspect.signature(fn).parameters))
        specs = tuple(PartitionSpec(AXIS) if i in sharded else PartitionSpec() for i in positions)
        mapped = jax.shard_map(
            fn, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=tuple(donate))

    def replicate(self, tree: Any) -> Any:
        """Returns a copy of a tree of host arrays on every device, in the form `map` takes."""

        def put(x):
            x = np.asarray(x)
            # `jax.device_put` takes up to twice as long for small arrays.
            if self.kind == "shard_map":
                return jax.make_array_from_callback(x.shape, self._replicated, lambda _: x)
            shape = (self.count, *x.shape)
            return jax.make_array_from_callback(shape, self._sharded, lambda _: x[None])

        return jax.tree.map(put, tree)

    def abstract(self, tree: Any, sharded: bool = False) -> Any:
        """Returns the shapes, dtypes and places of what `replicate` makes of a tree, or `shard`.

        For a program that is compiled, but does not run: nothing is put on a device.

        Args:
          tree: of arrays, or of their shapes and dtypes; to be sharded, of all devices' rows.
        """

        def place(x: Any) -> jax.ShapeDtypeStruct:
            sharding = self._sharded if sharded else self._replicated
            shape = x.shape
            if self.kind == "pmap":
                sharding = self._sharded
                rows = (shape[0] // self.count, *shape[1:]) if sharded else shape
                shape = (self.count, *rows)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(place, tree)

    def memory(self) -> int | None:
        """Returns the bytes that each device has; None where it doesn't tell."""
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")

    def local_rows(self, batch_size: int) -> np.ndarray:
        """Returns which rows of a batch this process's devices compute: (rows,) int."""
        local = batch_size // self.count
        return np.concatenate([rank * local + np.arange(local) for rank in self._local_ranks()])

    def shard(self, tree: Any) -> Any:
        """Returns a batch on the devices, each holding its own part, in the form `map` takes.

        Args:
          tree: host arrays of this process's rows, in the order of `local_rows`.
        """
        if self.kind == "pmap":
            local = len(self._local_ranks())
            tree = jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), tree)
        return jax.make_array_from_process_local_data(self._sharded, tree)

    def _local_ranks(self) -> list[int]:
        process = jax.process_index()
        return [i for i, device in enumerate(self._devices) if device.process_index == process]

    def fetch(self, tree: Any) -> Any:
        """Returns the one value that all devices hold, as numpy arrays of their own."""
        # Copies, because on CPU a view would change once the array is donated.
        return jax.tree.map(lambda x: self._unstack(np.array(x.addressable_data(0))), tree)

    def on_first(self, fn: Callable) -> Callable:
        """Returns `fn` compiled for this host's first device; its first argument is replicated, and
        the others are host arrays."""

        # One program for all parts: of each alone it takes as long. And not within that of `fn`,
        # which XLA would round otherwise.
        unstack, call = jax.jit(lambda parts: jax.tree.map(self._unstack, parts)), jax.jit(fn)

        def of_first(tree: Any, *args: Any) -> Any:
            parts = jax.tree.map(lambda x: x.addressable_data(0), tree)
            return call(unstack(parts), *args)

        return of_first

    def _unstack(self, part: Any) -> Any:
        return part[0] if self.kind == "pmap" else part


def union_size(indices: set[int], count: int) -> int:
    """Returns the size of the union of all processes' sets of indices below `count`; every process
    must call this."""
    if jax.process_count() == 1:
        return len(indices)
    flags = np.zeros(count, bool)
    flags[list(indices)] = True
    return int(multihost_utils.process_allgather(flags).any(axis=0).sum())


def any_process(*flags: bool) -> list[bool]:
    """Returns, for each flag, whether any process has set it; every process must call this.

    Saving and stopping need all processes, so all must take the same decision, although each has
    its own clock and signals.
    """
    if jax.process_count() == 1:
        return list(flags)
    everywhere = multihost_utils.process_allgather(np.array(flags))
    return [bool(flag) for flag in everywhere.any(axis=0)]


def computes_correctly() -> bool:
    """Returns whether a vmapped product followed by a reduction is right under jit.

    jaxlib 0.10.2 silently gets it wrong on CPU (github.com/jax-ml/jax/issues/39103).
    """
    # In numpy: each of JAX's own functions would be one more program to compile.
    n = 32_769
    rows, identity = np.zeros((n, 3), np.float32), np.eye(3, dtype=np.float32)
    rows[:, 0] = np.arange(n)
    sums = jax.jit(jax.vmap(lambda row: jnp.square(jnp.matmul(identity, row)).sum()))(rows)
    return np.asarray(sums)[-1] == float((n - 1) ** 2)


def warn_of_wrong_results() -> None:
    """Prints a line on standard error if this is a CPU backend with wrong results."""
    if jax.default_backend() != "cpu" or computes_correctly():
        return
    print(
        f"warning: jaxlib {jax.lib.__version__} computes wrong results on this CPU"
        " (github.com/jax-ml/jax/issues/39103): install the versions of constraints.txt, or set"
        " XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce",
        file=sys.stderr,
    )
